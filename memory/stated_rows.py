"""What users stated, in SQL: rows of kind `fact` and `preference`.

The invariant: the rows of a subject are what `statements.periods` makes of the turns they name, so they are made again
whenever such a turn comes or goes, and can be checked the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import inf

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from ..content import content_id
from .conversations import request_of
from .reading import by_id
from .rows import chunks, from_memory, to_memory
from .statements import Period, Said, periods, stated
from .tables import MemoryRow
from .types import Interaction, Memory

Subject = tuple[str, str, str]  # user, agent, subject


def add_statements(session: Session, interactions: Iterable[Interaction]) -> list[str]:
    """Take in what was stated in these turns, which are in SQL already. Returns the ids of rows that went."""
    return _restate(session, _sources(interactions))


def restate_all(session: Session, interactions: Iterable[Interaction]) -> list[str]:
    """Make every statement again from all turns. Returns the ids of rows that went."""
    sources = _sources(interactions)
    row = MemoryRow
    held = session.execute(select(row.user_id, row.agent_id, row.subject).where(row.subject != "").distinct())
    for user_id, agent_id, subject in held:
        sources.setdefault((user_id, agent_id, subject), set())
    return _restate(session, sources)


def _sources(interactions: Iterable[Interaction]) -> dict[Subject, set[str]]:
    sources: dict[Subject, set[str]] = defaultdict(set)
    for interaction in interactions:
        for statement in stated(request_of(interaction.turn)):
            sources[interaction.user_id, interaction.agent_id, statement.subject].add(interaction.id)
    return sources


def drop_sources(session: Session, gone: Iterable[Interaction]) -> list[str]:
    """Make the rows again that name these turns, which are not in SQL any more. Returns the ids of rows that went."""
    subjects = {(i.user_id, i.agent_id, statement.subject) for i in gone for statement in stated(request_of(i.turn))}
    return _restate(session, {subject: set() for subject in subjects})


def begun_in(session: Session, turns: Sequence[Interaction]) -> list[Memory]:
    """The statements that were first made in these turns: their words are gone with the turn."""
    ids = {turn.id for turn in turns}
    owners = sorted({(turn.user_id, turn.agent_id) for turn in turns})
    return [m for owner in owners for m in statements_of(session, *owner) if m.source_ids[0] in ids]


def statements_of(session: Session, user_id: str, agent_id: str, subject: str | None = None) -> list[Memory]:
    """What this user stated, current or not, by subject and time."""
    rows = select(MemoryRow).where(
        MemoryRow.user_id == user_id, MemoryRow.agent_id == agent_id, MemoryRow.subject != ""
    )
    if subject is not None:
        rows = rows.where(MemoryRow.subject == subject)
    found = (to_memory(row) for row in session.scalars(rows.order_by(MemoryRow.id)))
    return sorted(found, key=lambda m: (m.subject, m.created_utc, inf if m.valid_to is None else m.valid_to))


def derived(user_id: str, agent_id: str, subject: str, sources: Iterable[Interaction]) -> list[Memory]:
    """The rows that a subject has, given the turns in which it was stated."""
    said = [
        Said(statement, interaction.id, interaction.created_utc, interaction.position)
        for interaction in sources
        for statement in stated(request_of(interaction.turn))
        if statement.subject == subject
    ]
    sessions = {interaction.id: interaction.session_id for interaction in sources}
    return [_memory(user_id, agent_id, sessions[period.sources[0]], period) for period in periods(said)]


def _memory(user_id: str, agent_id: str, session_id: str, period: Period) -> Memory:
    s = period.statement
    named = content_id(["statement", user_id, agent_id, s.subject, s.value, period.sources[0]])
    return Memory(
        named,
        user_id,
        agent_id,
        session_id,
        s.kind,
        s.text,
        period.valid_from,
        period.sources,
        subject=s.subject,
        valid_to=period.valid_to,
    )


def _restate(session: Session, sources: dict[Subject, set[str]]) -> list[str]:
    gone: list[str] = []
    for subjects in _by_owner(sources):
        user_id, agent_id, _ = subjects[0]
        held: dict[str, list[Memory]] = defaultdict(list)
        for memory in statements_of(session, user_id, agent_id):
            held[memory.subject].append(memory)
        named = {s: sources[user_id, agent_id, s].union(*(m.source_ids for m in held[s])) for _, _, s in subjects}
        turns = {i.id: i for i in by_id(session, set().union(*named.values()))}
        for subject, ids in named.items():
            wanted = derived(user_id, agent_id, subject, [turns[i] for i in ids if i in turns])
            gone += _write(session, held[subject], wanted)
    return gone


def _by_owner(subjects: Iterable[Subject]) -> list[list[Subject]]:
    owners: dict[tuple[str, str], list[Subject]] = defaultdict(list)
    for subject in sorted(subjects):
        owners[subject[:2]].append(subject)
    return list(owners.values())


def _write(session: Session, held: Sequence[Memory], wanted: Sequence[Memory]) -> list[str]:
    """First what is new or changed, then what is no more: nothing is superseded before its successor is there."""
    known = {memory.id: memory for memory in held}
    if new := [memory for memory in wanted if memory.id not in known]:
        session.execute(insert(MemoryRow), [from_memory(memory) for memory in new])
    for memory in wanted:
        if memory.id in known and memory != known[memory.id]:
            row = session.get_one(MemoryRow, memory.id)
            row.source_ids, row.valid_to = list(memory.source_ids), memory.valid_to
    session.flush()
    gone = sorted(known.keys() - {memory.id for memory in wanted})
    for some in chunks(gone):
        session.execute(delete(MemoryRow).where(MemoryRow.id.in_(some)))
    return gone
