"""From messages to interactions: how a conversation is cut, how the parts are named, and how it may grow. Pure.

Every assistant message closes an interaction, whose turn is what was said since the reply before. The invariant: the
same conversation gives the same ids, and a conversation that is held can be extended but never contradicted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import inf, isfinite
from typing import NamedTuple, get_args

from ..content import Message, Role, content_id
from ..errors import InputError
from .types import FeedbackEvent, Interaction, MemoryKind

ROLES: tuple[str, ...] = get_args(Role)
EVENTS: tuple[str, ...] = get_args(FeedbackEvent)
NAME_LENGTH = 255  # bytes: PostgreSQL has to find room for three of them in a row of an index
ID_LENGTH = 64
MOST_ASKED = 10**9  # memories at once; the index takes no number of more than 63 bits
CALLS = "tool_calls"  # a reply that is nothing else is JSON with this key
AHEAD = 86_400.0  # seconds that the clock of another machine may be ahead of the one here
TOO_LATE = "more than a day ahead of the clock of this machine"


class Owner(NamedTuple):
    user_id: str
    agent_id: str
    session_id: str


@dataclass(frozen=True)
class Review:
    """What somebody said of one reply, or did with it; see `types.Feedback`."""

    rating: float | None = None
    correction: str | None = None
    comment: str | None = None
    event: FeedbackEvent | None = None


@dataclass(frozen=True)
class Conversation:
    """A whole conversation to be brought in; `created_utc` has one time a message, `reviews` go by index of message."""

    owner: Owner
    messages: tuple[Message, ...]
    created_utc: tuple[float, ...]
    reviews: Mapping[int, Review] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """What bringing in one conversation means: rows to write, unanswered rows that they replace, rows held before."""

    new: tuple[Interaction, ...]
    replaced: Mapping[str, str]  # old id: new id
    known: int
    reviews: tuple[tuple[str, Review, float], ...]  # interaction id, review, time
    forgotten: int  # rows left out, since they were forgotten before


# -- names ---


def owner_of(interaction: Interaction) -> Owner:
    return Owner(interaction.user_id, interaction.agent_id, interaction.session_id)


def interaction_id(owner: Owner, position: int, turn: Sequence[Message], reply: str) -> str:
    return content_id([*owner, position, list(turn), reply])


def turn_memory_id(interaction_id: str) -> str:
    return content_id(["turn", interaction_id])


def note_id(user_id: str, agent_id: str, shared: bool, text: str) -> str:
    return content_id(["note", user_id, agent_id, shared, text])


def feedback_id(interaction_id: str, review: Review) -> str:
    event = [] if review.event is None else [review.event]  # feedback without one keeps the id that it always had
    return content_id(["feedback", interaction_id, review.rating, review.correction, review.comment, *event])


def draft_id(interaction_id: str, base_id: str, text: str) -> str:
    return content_id(["draft", interaction_id, base_id, text])


# -- what a turn says ---


def opening_of(first: Interaction) -> list[Message]:
    """The system messages that begin the first turn of a session: they hold for all of it."""
    return list(takewhile(lambda message: message["role"] == "system", first.turn))


def user_words(turn: Iterable[Message]) -> str:
    """All that the user said in this turn; empty for a turn of tools only."""
    return "\n".join(m["content"] for m in turn if m["role"] == "user" and m["content"].strip())


def request_of(turn: Sequence[Message]) -> str:
    """The latest words of the user in this turn, empty if there are none."""
    return next((m["content"] for m in reversed(turn) if m["role"] == "user" and m["content"].strip()), "")


def leaves_memory(interaction: Interaction) -> bool:
    """Whether it is remembered: the user said something, or what tools said, or a reply before, was followed by words.

    Not what the assistant begins a session with, and no further calls of tools.
    """
    answered = bool(interaction.reply.strip()) and not interaction.reply.startswith(f'{{"{CALLS}":')
    again = not interaction.turn and interaction.position > 0
    return bool(request_of(interaction.turn)) or (
        answered and (again or any(m["role"] == "tool" for m in interaction.turn))
    )


def turn_memory_text(interaction: Interaction) -> str:
    return "\n".join(part for part in (user_words(interaction.turn), interaction.reply) if part.strip())


def messages_of(interactions: Iterable[Interaction]) -> list[Message]:
    """The interactions of one session, in order, as the chat that they were."""
    messages: list[Message] = []
    for interaction in interactions:
        messages += interaction.turn
        if interaction.reply:
            messages.append({"role": "assistant", "content": interaction.reply})
    return messages


# -- cutting and growing ---


def answered_since(ids: Set[str], interactions: Collection[Interaction]) -> dict[str, str]:
    """What `interactions` go by now that had one of these `ids` before they were answered.

    What takes the place of an unanswered turn begins with its words, so that the former id derives from the later turn.
    """
    missing = ids - {i.id for i in interactions}
    return {old: i.id for i in interactions for old in _unanswered(i) if old in missing} if missing else {}


def _unanswered(interaction: Interaction) -> Iterator[str]:
    for end in range(1, len(interaction.turn) + 1):
        yield interaction_id(owner_of(interaction), interaction.position, interaction.turn[:end], "")


def interactions_of(conversation: Conversation) -> list[tuple[Interaction, Review | None]]:
    """The interactions of a whole conversation, in order; what the user said last without an answer has reply ""."""
    cut: list[tuple[Interaction, Review | None]] = []
    turn: list[Message] = []
    text = ""
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            turn.append(message)
            continue
        text = request_of(turn) or text
        made = made_interaction(
            conversation.owner, len(cut), turn, text, message["content"], conversation.created_utc[index]
        )
        cut.append((made, conversation.reviews.get(index)))
        turn = []
    if last := request_of(turn):
        cut.append((made_interaction(conversation.owner, len(cut), turn, last, "", conversation.created_utc[-1]), None))
    return cut


def made_interaction(
    owner: Owner, position: int, turn: Sequence[Message], text: str, reply: str, created_utc: float
) -> Interaction:
    named = interaction_id(owner, position, turn, reply)
    return Interaction(named, *owner, position, tuple(turn), text, reply, created_utc)


def plan(
    conversation: Conversation,
    held: Mapping[int, Interaction],
    rated: frozenset[str],
    forgotten: Collection[str] = (),
) -> Planned:
    """What `conversation` adds to the `held` rows of its session; InputError where it contradicts them.

    A row without a reply may be answered, unless its id is in `rated`: then the empty reply is the reply. Rows whose
    id is in `forgotten` are left out and contradict nothing.
    """
    new: list[Interaction] = []
    replaced: dict[str, str] = {}
    reviews: list[tuple[str, Review, float]] = []
    known = left_out = 0
    for made, review in interactions_of(conversation):
        if made.id in forgotten:
            left_out += 1
            continue
        mine = held.get(made.position)
        if mine is None:
            new.append(made)
        elif mine.id == made.id:
            known += 1
        elif answers(made, mine):
            known += 1  # an older copy, from before the answer
            continue
        elif answers(mine, made) and mine.id not in rated:
            new.append(made)
            replaced[mine.id] = made.id
        else:
            raise InputError(
                f"session {made.session_id!r} of user {made.user_id!r} has something else at position {made.position};"
                " give the conversation another session_id"
            )
        if review is not None:
            reviews.append((made.id, review, made.created_utc))
    return Planned(tuple(new), replaced, known, tuple(reviews), left_out)


def answers(unanswered: Interaction, later: Interaction) -> bool:
    """Whether `unanswered` has no reply and `later` is the same turn, or more of it."""
    return unanswered.reply == "" and later.turn[: len(unanswered.turn)] == unanswered.turn


def continued(last: Interaction | None, open_ended: bool, owner: Owner, made: Interaction) -> Interaction:
    """`made` as the next interaction after `last`: in its place if that is `open_ended`, with both turns in one."""
    if last is None:
        return made
    turn, position = made.turn, last.position + 1
    if open_ended:
        position = last.position
        turn = turn if turn[: len(last.turn)] == last.turn else (*last.turn, *turn)
    named = interaction_id(owner, position, turn, made.reply)
    return replace(made, id=named, position=position, turn=turn, text=request_of(turn) or last.text)


# -- checking what comes in ---


def checked_owner(user_id: str, agent_id: str, session_id: str) -> Owner:
    owner = Owner(user_id, agent_id, session_id)
    for where, value in owner._asdict().items():
        checked_text(where, value)
    if not user_id:
        raise InputError("user_id is empty")
    return owner


def checked_new_owner(user_id: str, agent_id: str, session_id: str) -> Owner:
    """The same, if every database has room for it; what is held of before may have longer names."""
    owner = checked_owner(user_id, agent_id, session_id)
    for where, value in owner._asdict().items():
        if (size := len(value.encode())) > NAME_LENGTH:
            raise InputError(f"{where} has {size} bytes; at most {NAME_LENGTH}")
    return owner


def checked_conversation(conversation: Conversation, now: float = inf) -> Conversation:
    """The same, if every part can be kept and every review is of a reply."""
    messages = checked_messages(conversation.messages)
    if len(conversation.created_utc) != len(messages):
        raise InputError(f"created_utc has {len(conversation.created_utc)} times for {len(messages)} messages")
    for time in conversation.created_utc:
        checked_past("created_utc", time, now)
    for index in conversation.reviews:
        if not 0 <= index < len(messages) or messages[index]["role"] != "assistant":
            raise InputError(f"message {index}: only a message of the assistant can be rated or corrected")
    reviews = {index: checked_review(review) for index, review in conversation.reviews.items()}
    return replace(conversation, owner=checked_new_owner(*conversation.owner), messages=messages, reviews=reviews)


def checked_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with role and content alone, each checked; InputError names the message and the field."""
    checked: list[Message] = []
    if not isinstance(messages, Iterable):
        raise InputError(f"the messages are of type {type(messages).__name__}; give a list of them")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i} is of type {type(message).__name__}, not one of a role and its content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"message {i}: role is not one of {', '.join(ROLES)}")
        checked.append({"role": role, "content": checked_text(f"message {i}: content", content)})
    return tuple(checked)


def checked_text(where: str, value: str) -> str:
    """Text that every database can hold and give back as it was."""
    if not isinstance(value, str):
        raise InputError(f"{where} is of type {type(value).__name__}, not text")
    if fault := fault_of(value):
        raise InputError(f"{where} holds {fault}; take it out")
    return value


def fault_of(text: str) -> str | None:
    """What in it no database can hold, and where; None where all can be held."""
    if "\0" in text:
        return f"a NUL character at {text.index(chr(0))}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair at {error.start}"
    return None


def checked_id(where: str, value: str) -> str:
    """One that the tables have room for, of whatever kind."""
    if len(checked_text(where, value)) > ID_LENGTH:
        raise InputError(f"{where} has {len(value)} characters; at most {ID_LENGTH}")
    return value


def checked_ids(where: str, ids: Iterable[str] | None) -> tuple[str, ...] | None:
    """The ids, None where none are asked for; a text is no list of them, though it is one of characters."""
    if ids is None:
        return None
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InputError(f"{where} is of type {type(ids).__name__}; give a list of ids")
    return tuple(checked_text(f"{where}: an id", i) for i in ids)


def checked_kind(kind: MemoryKind | None) -> MemoryKind | None:
    if kind not in (None, *get_args(MemoryKind)):
        raise InputError(f"kind is {kind!r}; give one of {', '.join(get_args(MemoryKind))}")
    return kind


def checked_limit(limit: int) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MOST_ASKED:
        raise InputError(f"limit is {limit!r}; give a whole number from 1 to {MOST_ASKED}")
    return limit


def checked_time(where: str, value: float) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):  # the latter of hundreds of digits
        raise InputError(f"{where} is not a finite number of seconds since 1970") from None


def checked_past(where: str, value: float, now: float) -> float:
    """The same, if it can have been: what lies ahead would be kept, and taught by no night until then."""
    time = checked_time(where, value)
    if time > now + AHEAD:
        raise InputError(
            f"{where} is {str(value)[:40]}, {TOO_LATE}; it is in seconds since 1970: are these milliseconds?"
        )
    return time


def checked_review(review: Review) -> Review:
    """A rating in [-1, 1], a correction or a comment with words in them, a known event; one of the four at least."""
    rating = review.rating
    if rating is not None:
        if isinstance(rating, bool) or not isinstance(rating, int | float):
            raise InputError(f"rating is of type {type(rating).__name__}, not a number from -1 to 1")
        if not -1 <= rating <= 1:
            raise InputError(f"rating is {rating}, not a number from -1 to 1")
        rating = float(rating) + 0.0  # -0.0 is 0.0, so that it has one id
    for where, text in (("correction", review.correction), ("comment", review.comment)):
        if text is not None and not checked_text(where, text).strip():
            raise InputError(f"{where} is blank")
    if review.event is not None and review.event not in EVENTS:
        raise InputError(f"event is {repr(review.event)[:30]}; give one of {', '.join(EVENTS)}")
    if review.event == "edited" and review.correction is None:
        raise InputError("event is edited, but there is no correction that says into what")
    if (rating, review.correction, review.comment, review.event) == (None, None, None, None):
        raise InputError("nothing to keep: give a rating, a correction, a comment or an event")
    return Review(rating, review.correction, review.comment, review.event)
