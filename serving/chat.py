"""A conversation as token ids, the one way for training, scoring and answering.

The invariant: the ids of a prompt followed by the ids of an answer are what the model meets when it serves, up to and
with the end of its turn. A control token that somebody wrote into a message is only text: nobody ends a turn or opens
one of the system by typing it. A template that takes a user and an assistant in turn and nothing else, as those of
Gemma and Mistral, is given the conversation in that form (`_in_turn`). Nothing is thought aloud before an answer where
a base leaves the choice: a hybrid's template (Qwen3) is told so, and of Harmony's channels (gpt-oss) the prompt begins
the final one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from itertools import takewhile
from typing import Any

from ..content import Message
from ..errors import InputError, ServingError

Ids = tuple[int, ...]
BY_TEMPLATE = (TypeError, ValueError, ArithmeticError, LookupError)  # what one may raise beside errors of its own
_NOW_RE = re.compile(r"""\bstrftime_now\(\s*(?P<quote>["'])(?P<form>.*?)(?P=quote)\s*\)""")
_DAY: ContextVar[datetime | None] = ContextVar("_DAY", default=None)
FINAL = "<|channel|>final<|message|>"  # of Harmony, which else begins with an analysis


def prompt_ids(tokenizer: Any, prompt: Sequence[Message], room: int) -> Ids:
    """The templated prompt in at most `room` ids: the oldest turns go first, the system messages that open it last.

    InputError if there is no message, ServingError if the template refuses the conversation.
    """
    system = list(takewhile(lambda message: message["role"] == "system", prompt))
    turns = _end(tokenizer, prompt[len(system) :], room)
    system = _end(tokenizer, system, room)
    # where what is kept may begin: with a request, and where not even the last one fits, with what followed it
    starts = [0, *(i for i, m in enumerate(turns) if i and m["role"] == "user")]
    starts += range(starts[-1] + 1, len(turns))
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        if len(_templated(tokenizer, [*system, *turns[starts[middle] :]])) <= room:
            high = middle
        else:
            low = middle + 1
    ids = _templated(tokenizer, [*system, *turns[starts[low] :]])
    if len(ids) <= room:
        return ids
    kept = _opening(tokenizer, ids, system, room // 2)
    return ids[:kept] + ids[len(ids) - (room - kept) :]


def _end(tokenizer: Any, messages: Sequence[Message], room: int) -> list[Message]:
    """Their end, where it alone is more than `room` ids can show: nobody waits until megabytes are read to be cut."""
    characters = 16 * room
    while sum(len(message["content"]) for message in messages) > characters:
        end = _last(messages, characters)
        if len(_templated(tokenizer, end)) > 2 * room:  # the first of them are not those of the whole
            return end
        characters *= 2
    return list(messages)


def _last(messages: Sequence[Message], characters: int) -> list[Message]:
    found: list[Message] = []
    for message in reversed(messages):
        if characters > 0:
            found.insert(0, {"role": message["role"], "content": message["content"][-characters:]})
        characters -= len(message["content"])
    return found


def _opening(tokenizer: Any, ids: Ids, system: list[Message], most: int) -> int:
    """How many ids stand before the words of the first turn, with the system message if that is short enough."""
    empty: Message = {"role": "user", "content": ""}
    found = (_common_prefix(ids, _templated(tokenizer, opening)) for opening in ([*system, empty], [empty]))
    return next((length for length in found if length <= most), 0)


def answer_ids(tokenizer: Any, prompt: Sequence[Message], answer: str) -> Ids:
    """What follows the generation prompt, up to the end of the turn, which is looked for behind the answer's words: a
    control token may open them (`_turn`).

    Where that is not the eos_token, as in Gemma's templates, more may follow that nobody generates.
    """
    said: Message = {"role": "assistant", "content": answer}
    words = _inert_messages(tokenizer, [said])[0]["content"]
    head = templated_text(tokenizer, prompt, add_generation_prompt=True)
    whole = templated_text(tokenizer, [*prompt, said])
    # a template may open a thought for the model, or drop one of earlier turns
    text = whole[len(head) :] if whole.startswith(head) else words + tokenizer.eos_token
    turn = _turn(tokenizer, text, words.strip())
    return tuple(tokenizer(turn, add_special_tokens=False, verbose=False)["input_ids"])


def _turn(tokenizer: Any, text: str, words: str) -> str:
    """`text` up to and with the first control token behind the `words`, which hold none themselves. Where one opens it,
    as `<|START_RESPONSE|>`, more of them may end it: up to and with the eos_token, if that is there."""
    eos = tokenizer.eos_token
    ends = {*_controls(tokenizer)} - {tokenizer.unk_token} | {eos}
    controls = [control for control in ends if control and control in text]
    if not controls:
        return text
    longest_first = sorted(controls, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)  # every second one is a control token
    plain = [part.strip() for part in parts[::2]]
    if eos in parts and not plain[0]:
        return "".join(parts[: parts.index(eos) + 1])
    # a template may have changed the words
    said = max(range(len(plain)), key=lambda i: (plain[i] == words, words in plain[i], len(plain[i])))
    return "".join(parts[: 2 * said + 2])


def _templated(tokenizer: Any, messages: Sequence[Message]) -> Ids:
    text = templated_text(tokenizer, messages, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@contextmanager
def on_day(day: datetime) -> Iterator[None]:
    """A template that tells the date tells this one, in this thread."""
    token = _DAY.set(day)
    try:
        yield
    finally:
        _DAY.reset(token)


def templated_text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as the base reads it, in which nothing that was said is a control token."""
    from jinja2 import TemplateError

    if not messages:
        raise InputError("a prompt holds no messages; give one of the user at least")
    inert = _inert_messages(tokenizer, messages)
    try:
        return _rendered(tokenizer, inert, add_generation_prompt)
    except (TemplateError, *BY_TEMPLATE):
        pass
    try:
        return _rendered(tokenizer, _in_turn(inert), add_generation_prompt)
    except (TemplateError, *BY_TEMPLATE) as error:
        raise ServingError(f"the chat template of the base refuses a conversation: {error}") from error


def _rendered(tokenizer: Any, messages: Sequence[Message], opened: bool) -> str:
    """By the template; what one does not know of, it does not look at. `opened` for an answer to follow."""
    how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": opened, "enable_thinking": False}
    if day := _DAY.get():  # transformers passes no function on to a template
        told = _NOW_RE.sub(lambda asked: repr(day.strftime(asked["form"])), tokenizer.get_chat_template())
        how["chat_template"] = told
    text = str(tokenizer.apply_chat_template(messages, **how))
    return text + FINAL if opened and FINAL in str(tokenizer.chat_template) and not text.endswith(FINAL) else text


def _in_turn(messages: Sequence[Message]) -> list[Message]:
    """User and assistant in turn, the user first: whoever is not the assistant speaks as the user."""
    found: list[Message] = []
    for message in messages:
        role: Any = "assistant" if message["role"] == "assistant" else "user"
        if not found and role == "assistant":
            found.append({"role": "user", "content": ""})
        if found and found[-1]["role"] == role:
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append({"role": role, "content": message["content"]})
    return found


def _inert_messages(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """`messages` with a space after the first character of every control token in their text.

    In what is not the assistant's also of tokens that a template makes turns of: not every tokenizer flags those.
    """
    added, template = tokenizer.added_tokens_decoder.values(), str(tokenizer.chat_template)
    special = _controls(tokenizer)
    turns = [str(token) for token in added if token.special or (str(token).strip() and str(token) in template)]
    return [
        {"role": m["role"], "content": _inert(special if m["role"] == "assistant" else turns, m["content"])}
        for m in messages
    ]


def _controls(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def _inert(controls: Sequence[str], text: str) -> str:
    for control in controls:
        if control in text:
            text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
