"""What people said a reply should have been, as memories that recall shows in place of the turn.

The invariant: the rows of a turn are what `corrections_of` makes of it and its feedback, one for each correction, of
which the latest holds. They come with feedback and go with the turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

from sqlalchemy import Select, insert, select
from sqlalchemy.orm import Session

from ..content import content_id
from .conversations import leaves_memory, turn_memory_text
from .reading import by_id, memories
from .rows import change_memory, chunks, from_memory, to_feedback
from .tables import FeedbackRow, MemoryRow, StateRow
from .types import Feedback, Interaction, Memory

DUE = "corrections"  # the state that a migration leaves where there are corrections that are no memories yet
CORRECTING: Select[FeedbackRow] = select(FeedbackRow).where(FeedbackRow.correction.is_not(None))


def correction_memory_id(feedback_id: str) -> str:
    return content_id(["correction", feedback_id])


def corrections_of(interaction: Interaction, given: Iterable[Feedback]) -> list[Memory]:
    """The memories of its corrections, oldest first: the turn as if that had been replied, until the next was given."""
    ordered = sorted((f for f in given if f.correction), key=lambda f: (f.created_utc, f.id))
    ends = [*(f.created_utc for f in ordered[1:]), None]
    turns = [replace(interaction, reply=f.correction or "") for f in ordered]
    return [_memory(turn, f, end) for turn, f, end in zip(turns, ordered, ends, strict=True) if leaves_memory(turn)]


def _memory(turn: Interaction, given: Feedback, valid_to: float | None) -> Memory:
    owner = turn.user_id, turn.agent_id, turn.session_id
    named, text = correction_memory_id(given.id), turn_memory_text(turn)
    return Memory(named, *owner, "correction", text, given.created_utc, (turn.id,), valid_to=valid_to)


def remember_corrections(session: Session, interaction_ids: Iterable[str]) -> None:
    """Make the rows of these turns again from the feedback that SQL has."""
    wanted = _derived(session, interaction_ids)
    held = memories(session, [memory.id for memory in wanted])
    if new := [from_memory(memory) for memory in wanted if memory.id not in held]:
        session.execute(insert(MemoryRow), new)
    for memory in wanted:
        if held.get(memory.id, memory) != memory:
            change_memory(session.get_one(MemoryRow, memory.id), memory)


def remember_all_corrections(session: Session) -> None:
    for some in _corrected(session):
        remember_corrections(session, some)
    if due := session.get(StateRow, DUE):
        session.delete(due)


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


def corrections_due(session: Session) -> bool:
    return session.get(StateRow, DUE) is not None


def ended_by_correction(session: Session, turns: Sequence[Memory]) -> dict[str, Memory]:
    """Those of these memories of turns that a correction took the place of, by id, and until when they held."""
    by_source = {turn.source_ids[0]: turn for turn in turns}
    found: dict[str, Memory] = {}
    for memory in memories(session, correction_ids(session, by_source)).values():
        turn = by_source[memory.source_ids[0]]
        first = min(memory.created_utc, found[turn.id].valid_to or inf) if turn.id in found else memory.created_utc
        found[turn.id] = replace(turn, valid_to=first)
    return found


def correction_ids(session: Session, interaction_ids: Iterable[str]) -> list[str]:
    """By which the corrections of these turns are remembered."""
    given = _given(session, interaction_ids)
    return [correction_memory_id(f.id) for corrections in given.values() for f in corrections]


def _given(session: Session, interaction_ids: Iterable[str]) -> Mapping[str, list[Feedback]]:
    """The corrections of these turns, by turn."""
    found: dict[str, list[Feedback]] = defaultdict(list)
    for some in chunks(list(interaction_ids)):
        for row in session.scalars(CORRECTING.where(FeedbackRow.interaction_id.in_(some))):
            found[row.interaction_id].append(to_feedback(row))
    return found
