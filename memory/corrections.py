"""What people said a reply should have been, as memories that recall shows in place of the turn.

The invariant: the rows of a turn are what `corrections_of` makes of it and its feedback, one for each correction, of
which the latest holds. They come with feedback and go with the turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Select, insert, select
from sqlalchemy.orm import Session

from ..content import content_id
from .conversations import leaves_memory, turn_memory_text
from .reading import by_id, memories
from .rows import change_memory, chunks, delete_in, from_memory, scalars_in, to_feedback
from .tables import FeedbackRow, MemoryRow
from .types import Feedback, Interaction, Memory

CORRECTING: Select[FeedbackRow] = select(FeedbackRow).where(FeedbackRow.correction.is_not(None))


def correction_memory_id(feedback_id: str) -> str:
    return content_id(["correction", feedback_id])


def corrections_of(interaction: Interaction, given: Iterable[Feedback]) -> list[Memory]:
    """The memories of its corrections, oldest first: the turn as if that had been replied, until the next was given.

    None is older than the turn, also where clocks differ.
    """
    said = ((f, (f.correction or "").strip()) for f in sorted(given, key=lambda f: (f.created_utc, f.id)))
    turns = ((f, replace(interaction, reply=text)) for f, text in said if text)
    kept = [(max(f.created_utc, interaction.created_utc), f.id, turn) for f, turn in turns if leaves_memory(turn)]
    ends = [*(time for time, _, _ in kept[1:]), None][: len(kept)]
    return [_memory(turn, named, time, end) for (time, named, turn), end in zip(kept, ends, strict=True)]


def _memory(turn: Interaction, feedback_id: str, created_utc: float, valid_to: float | None) -> Memory:
    owner, named = (turn.user_id, turn.agent_id, turn.session_id), correction_memory_id(feedback_id)
    return Memory(named, *owner, "correction", turn_memory_text(turn), created_utc, (turn.id,), valid_to=valid_to)


def remember_corrections(session: Session, interaction_ids: Iterable[str]) -> list[Memory]:
    """Make the rows of these turns again from the feedback that SQL has; they wait to be indexed."""
    wanted = _derived(session, interaction_ids)
    held = memories(session, [memory.id for memory in wanted])
    if new := [from_memory(memory) for memory in wanted if memory.id not in held]:
        session.execute(insert(MemoryRow), new)
    for memory in wanted:
        if held.get(memory.id, memory) != memory:
            change_memory(session.get_one(MemoryRow, memory.id), memory)
    return wanted


def remember_all_corrections(session: Session) -> None:
    """Make those of all feedback, and no others."""
    wanted = set[str]()
    for some in _corrected(session):
        wanted.update(memory.id for memory in remember_corrections(session, some))
    held = session.scalars(select(MemoryRow.id).where(MemoryRow.kind == "correction"))
    delete_in(session, MemoryRow.id, set(held) - wanted)


def every_correction(session: Session) -> Iterator[Memory]:
    """What is to be remembered of all feedback."""
    for some in _corrected(session):
        yield from _derived(session, some)


def _corrected(session: Session) -> Iterator[Sequence[str]]:
    """The turns that somebody corrected, some at a time."""
    yield from chunks(list(session.scalars(CORRECTING.with_only_columns(FeedbackRow.interaction_id).distinct())))


def _derived(session: Session, interaction_ids: Iterable[str]) -> list[Memory]:
    given = _given(session, interaction_ids)
    return [memory for turn in by_id(session, given) for memory in corrections_of(turn, given[turn.id])]


def corrected(session: Session, turns: Sequence[Memory], as_of: float | None) -> dict[str, Memory]:
    """The correction that held by then, by the memory of each of these turns that had one."""
    named = {turn.source_ids[0]: turn.id for turn in turns}
    found = memories(session, correction_ids(session, named)).values()
    return {named[memory.source_ids[0]]: memory for memory in found if memory.held(as_of)}


def correction_ids(session: Session, interaction_ids: Iterable[str]) -> list[str]:
    """By which the corrections of these turns are remembered."""
    given = _given(session, interaction_ids)
    return [correction_memory_id(f.id) for corrections in given.values() for f in corrections]


def _given(session: Session, interaction_ids: Iterable[str]) -> Mapping[str, list[Feedback]]:
    """The corrections of these turns, by turn."""
    found: dict[str, list[Feedback]] = defaultdict(list)
    for row in scalars_in(session, CORRECTING, FeedbackRow.interaction_id, interaction_ids):
        found[row.interaction_id].append(to_feedback(row))
    return found
