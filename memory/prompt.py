"""What the model reads: turns and notes put together, by day for a reply and by night for its training row. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from ..content import Message
from .conversations import messages_of, opening_of
from .types import Interaction

REACH = 64  # turns before a request that its prompt holds; a session without end would cost its length squared


def prompt_of(
    opening: Iterable[Interaction], earlier: Iterable[Interaction], turn: Iterable[Message], notes: Sequence[str]
) -> list[Message]:
    """What the model reads: the session's opening where it is out of reach, the turns within reach, this turn; notes.

    The one place that decides this: what a reply was given by day is what its training row is given by night.
    """
    opened = chain.from_iterable(map(opening_of, opening))
    return with_notes([*opened, *messages_of(earlier), *turn], notes)


def opening_out_of_reach(first: Interaction | None, earlier: Sequence[Interaction]) -> list[Interaction]:
    """The `first` turn of a session where it came before the `earlier` ones and opens with what holds for all."""
    if first is None or not earlier or first.position >= earlier[0].position:
        return []
    return [first] if opening_of(first) else []


def notes_message(texts: Sequence[str]) -> Message:
    """How remembered texts are shown to the model, one line each."""
    lines = "\n".join("- " + " ".join(text.split()) for text in texts)
    return {"role": "system", "content": f"Notes from earlier conversations:\n{lines}"}


def with_notes(messages: Sequence[Message], texts: Sequence[str]) -> list[Message]:
    """`messages` with the notes at the end of the system message that opens them, or as a new first message.

    A system message further on is no place for them: it is left out where a conversation is too long.
    """
    if not texts:
        return list(messages)
    notes = notes_message(texts)
    if not messages or messages[0]["role"] != "system":
        return [notes, *messages]
    return [{"role": "system", "content": f"{messages[0]['content']}\n\n{notes['content']}"}, *messages[1:]]
