"""Other people's files as conversations: OpenAI chat, ShareGPT and the ChatGPT export. Pure.

The invariant: a record becomes a whole conversation or an InputError that names the field and what kind of value it
has, never the words of a message. Keys that are not known are left alone, since every exporter adds its own; but one
that reads like a mistyped rating, correction, comment or event is an error, so that no feedback is lost in silence, and
so is one that reads like the owner or the time where those are not given, so that no people are mixed in silence. A
rating or correction of a whole record is an error, too, since it does not say which answer it is about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

from ..content import Message, Role, canonical_json, content_id
from ..errors import InputError
from .conversations import AHEAD, CALLS, TOO_LATE, Conversation, Owner, Review, checked_past
from .types import DEFAULT_USER

ROLES_HERE: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
REVIEW_KEYS = ("rating", "correction", "comment", "event")
MISTYPED = 0.8  # how alike a key has to be to one of those, as difflib reckons
RATINGS_ELSEWHERE = frozenset({"feedback", "thumb", "thumbs", "vote"})
OF_ONE_ANSWER = RATINGS_ELSEWHERE | {"rating", "ratings", "correction", "corrections"}
OF_AN_ANSWER = frozenset(
    "disliked downvote liked reward score stars thumbs_down thumbs_up upvote".split()
)  # in it only
OWNER_KEYS, TIME_KEYS = ("user_id", "agent_id", "session_id"), ("created_utc",)
MISNAMED = 0.83  # the same for these, without case and underscores; `used` and `sessions` are less alike
OTHER_NAMES = {
    **{"user": "user_id", "username": "user_id", "agent": "agent_id", "session": "session_id"},
    **dict.fromkeys(("createdat", "timestamp", "created", "createtime", "date", "datetime"), "created_utc"),
}
# What ChatGPT shows to nobody, or keeps beside the talk.
NOT_SAID = {"thoughts", "reasoning_recap", "user_editable_context", "model_editable_context"}


def conversation_of(record: object, now: float, user_id: str = DEFAULT_USER, agent_id: str = "") -> Conversation | None:
    """The conversation in one JSON value; None if it is a ChatGPT conversation in which nothing was said.

    It belongs to `user_id` and `agent_id` where it names none.
    """
    if not isinstance(record, dict):
        raise InputError(f"the record is {_kind(record)}, not an object")
    if record.get("user_id") == "":
        raise InputError("user_id is empty; leave it out, or name somebody")
    if (made := _read(record, now)) is None:
        return None
    named = {"user_id": _name(record, "user_id") or user_id, "agent_id": _name(record, "agent_id") or agent_id}
    return replace(made, owner=made.owner._replace(**named))


def _read(record: dict[str, Any], now: float) -> Conversation | None:
    if "mapping" in record:
        return _from_chatgpt(record, now)
    for key in ("messages", "conversations"):
        if key in record:
            return _from_chat(record, key, now)
    if record.get("type") == "nightschool":
        raise InputError("this is an export of nightschool; run `nightschool memory import` on the file")
    raise InputError("the record has none of messages (OpenAI), conversations (ShareGPT), mapping (ChatGPT export)")


# -- OpenAI and ShareGPT ---


def _from_chat(record: dict[str, Any], key: str, now: float) -> Conversation:
    given = record[key]
    if not isinstance(given, list) or not given:
        raise InputError(f"{key} is {_kind(given)}, not a list with messages in it")
    _require_no_misnamed(record, (*OWNER_KEYS, *TIME_KEYS))
    _require_no_review(record)
    began = _time(record, now, now)
    messages: list[Message] = []
    times: list[float] = []
    reviews: dict[int, Review] = {}
    for i, message in enumerate(given):
        try:
            messages.append(_message(message))
            times.append(_time(message, began, now))
        except InputError as error:
            raise InputError(f"{key}[{i}].{error}") from None
        if any(message.get(name) is not None for name in REVIEW_KEYS):
            reviews[i] = Review(*(message.get(name) for name in REVIEW_KEYS))
    return _conversation(record, messages, times, reviews)


def _message(message: object) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"message is {_kind(message)}, not an object")
    role_key = "role" if "role" in message else "from"
    role = message.get(role_key)
    if not isinstance(role, str) or role not in ROLES_HERE:
        raise InputError(f"{role_key} is {_kind(role)}, not one of {', '.join(ROLES_HERE)}")
    _require_no_mistyped(message, RATINGS_ELSEWHERE | (OF_AN_ANSWER if ROLES_HERE[role] == "assistant" else set()))
    _require_no_misnamed(message, TIME_KEYS)
    return {"role": ROLES_HERE[role], "content": _content(message)}


def _require_no_mistyped(message: dict[str, Any], ratings: Set[str]) -> None:
    """No key of feedback by another name, `ratings` among them: a review would be passed over."""
    for key, value in message.items():
        meant = _meant_review(key, value, ratings)
        if meant and key not in REVIEW_KEYS:
            raise InputError(f"{key} is no key known here; did you mean {meant}? Else give it another name")


def _require_no_review(record: dict[str, Any]) -> None:
    for key, value in record.items():
        if key.casefold() in OF_ONE_ANSWER and isinstance(value, str | int | float | dict):
            raise InputError(f"{key} is beside the messages; put it into the assistant message that it is about")


def _meant_review(key: str, value: object, ratings: Set[str]) -> str | None:
    """The key of feedback that this one is, or that it reads like."""
    if key.casefold() in ratings and isinstance(value, str | int | float | dict):
        return "rating"
    meant = get_close_matches(key.casefold(), REVIEW_KEYS, n=1, cutoff=MISTYPED)
    return meant[0] if meant and isinstance(value, str | int | float) else None


def _require_no_misnamed(record: dict[str, Any], keys: Sequence[str]) -> None:
    """No other name of one of these `keys` that is not given, with a value that could be meant for it."""
    for key, value in record.items():
        meant = _meant(key, keys)
        if meant and record.get(meant) is None and value is not None and not isinstance(value, bool | list):
            raise InputError(f"{key} is no key known here; did you mean {meant}? Else give it another name")


def _meant(key: str, keys: Sequence[str]) -> str | None:
    bare = "".join(filter(str.isalnum, key)).casefold()
    named = {name.replace("_", ""): name for name in keys}
    close = get_close_matches(bare, named, n=1, cutoff=MISNAMED)
    meant = named[close[0]] if close else OTHER_NAMES.get(bare)
    return meant if meant in keys else None


def _content(message: dict[str, Any]) -> str:
    key = "value" if "value" in message and "content" not in message else "content"
    content, calls = message.get(key), message.get("tool_calls")
    parts = [_text_of(key, content)] if content is not None else []
    if isinstance(message.get("refusal"), str) and content is None:
        parts.append(message["refusal"])
    if calls:
        parts.append(_calls(calls))
    if not parts:
        raise InputError(f"{key} is {_kind(content) if key in message else 'missing'}")
    return "\n".join(part for part in parts if part)


def _calls(calls: object) -> str:
    try:
        return canonical_json({CALLS: calls})
    except ValueError:
        raise InputError("tool_calls holds a number that is not finite") from None
    except RecursionError:
        raise InputError("tool_calls are nested too deeply") from None


def _text_of(key: str, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{key} is {_kind(content)}, not text or a list of parts")
    return "\n".join(_part(f"{key}[{i}]", part) for i, part in enumerate(content))


def _part(where: str, part: object) -> str:
    """The words of one part; a picture or a sound leaves its kind in brackets."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise InputError(f"{where} is {_kind(part)}, not a part")
    words = part.get("text")
    if isinstance(words, str):
        return words
    kind = part.get("type") or part.get("content_type")
    if not isinstance(kind, str):
        raise InputError(f"{where} has neither text nor type")
    return f"[{kind}]"


# -- the ChatGPT export ---


def _from_chatgpt(record: dict[str, Any], now: float) -> Conversation | None:
    _require_no_misnamed(record, OWNER_KEYS)
    began = _time(record, now, now, "create_time")
    messages: list[Message] = []
    times: list[float] = []
    for node in _branch(record):
        message = node.get("message")
        if not isinstance(message, dict):
            continue
        said = _chatgpt_message(message)
        if said is not None:
            messages.append(said)
            times.append(_time(message, began, now, "create_time"))
    if not messages:
        return None
    named = record.get("conversation_id") or record.get("id")
    return _conversation({"session_id": named, **record}, messages, times, {})


def _branch(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """From the root to `current_node`: the versions that were edited away or regenerated are left out."""
    mapping, node_id = record["mapping"], record.get("current_node")
    if not isinstance(mapping, dict):
        raise InputError(f"mapping is {_kind(mapping)}, not an object")
    if mapping and (not isinstance(node_id, str) or node_id not in mapping):
        raise InputError("current_node is not in mapping")
    path: dict[str, dict[str, Any]] = {}
    while isinstance(node_id, str) and node_id in mapping and node_id not in path:
        node = mapping[node_id]
        if not isinstance(node, dict):
            raise InputError(f"a node of mapping is {_kind(node)}, not an object")
        path[node_id] = node
        node_id = node.get("parent")
    return reversed(path.values())


def _chatgpt_message(message: dict[str, Any]) -> Message | None:
    author, content = message.get("author"), message.get("content")
    if not isinstance(author, dict) or not isinstance(content, dict):
        raise InputError("a message of mapping has no author or no content")
    role = ROLES_HERE.get(str(author.get("role")))
    if role is None:
        raise InputError(f"author.role is none of {', '.join(ROLES_HERE)}")
    if str(content.get("content_type")) in NOT_SAID:
        return None
    words = _text_of("content.parts", content["parts"]) if "parts" in content else content.get("text")
    if not isinstance(words, str) or not words.strip():
        return None
    return {"role": role, "content": words}


# -- what both have ---


def _conversation(
    record: dict[str, Any], messages: list[Message], times: list[float], reviews: dict[int, Review]
) -> Conversation:
    owner = Owner(DEFAULT_USER, "", _name(record, "session_id") or content_id(messages))
    return Conversation(owner, tuple(messages), tuple(times), reviews)


def _name(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"{key} is {_kind(value)}, not text")
    return str(value)


def _time(record: dict[str, Any], default: float, now: float, key: str = "created_utc") -> float:
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        return checked_past(key, value, now)
    time = _from_iso(key, value)
    if time > now + AHEAD:
        raise InputError(f"{key} is a date, {TOO_LATE}")
    return time


def _from_iso(key: str, value: str) -> float:
    try:
        if value.strip().isdigit() and len(value.strip()) != len("20240403"):  # seconds or milliseconds as text
            raise ValueError(value)
        read = datetime.fromisoformat(value)
    except ValueError:
        raise InputError(f"{key} is text that is no ISO date") from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def _kind(value: object) -> str:
    """What kind of JSON value it is; numbers and the like are shown, text is not."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    return json.dumps(value)[:40]
