"""What users stated, in SQL: rows of kind `fact` and `preference`.

The invariant: the rows of a subject are what `statements.periods` makes of the turns they name, so they are made again
whenever such a turn comes or goes, and can be checked the same way.

A row is named by what it says and how many periods before it said the same ("Oslo" again, after "Rome"), not by its
sources: a turn that comes in can begin or split a period and never makes them fewer, so no id goes that a reply may
have been shown, whatever comes in and in whatever order. Only forgetting takes ids away.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from math import inf

from sqlalchemy import ColumnElement, insert, select
from sqlalchemy.orm import Session

from ..content import content_id
from .conversations import request_of, turn_memory_id, user_words
from .reading import by_id, shown
from .rows import change_memory, delete_in, from_memory, scalars_in, to_interaction, to_memory
from .statements import Period, Said, periods, stated
from .tables import InteractionRow, MemoryRow
from .types import Interaction, Memory

Subject = tuple[str, str, str]  # user, agent, subject
Stated = Mapping[tuple[str, str], Sequence[Memory]]  # by user and agent


def add_statements(
    session: Session,
    interactions: Iterable[Interaction],
    replaced: Sequence[Interaction],
    named: Set[str] = frozenset(),
) -> list[str]:
    """Take in what was stated in these turns, which are in SQL already, and let go of those that they replaced.

    Replies in `named` say already by its last id what they were shown. Returns the ids of rows that went.
    """
    sources, ids = _sources(interactions), {turn.id for turn in replaced}
    for owner, rows in stated_by(session, replaced).items():
        for memory in rows:
            if not ids.isdisjoint(memory.source_ids):
                sources[*owner, memory.subject] |= set()
    return _restate(session, sources, spared=named)


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


def follow(session: Session, held: Stated, forgotten: Collection[str] = ()) -> None:
    """Make the rows of `held` again, of which some are deleted by now; the turns that are `forgotten` are gone, too."""
    _restate(session, _sources_of(held), held, forgotten)


def name_again(session: Session) -> None:
    """Statements that an earlier version named get their ids, here and where a reply was shown one."""
    owners = select(MemoryRow.user_id, MemoryRow.agent_id).where(MemoryRow.subject != "").distinct()
    held = {
        (user_id, agent_id): statements_of(session, user_id, agent_id) for user_id, agent_id in session.execute(owners)
    }
    follow(session, held)


def state_again(session: Session) -> None:
    """What users state by the rules of now."""
    restate_all(session, map(to_interaction, session.scalars(select(InteractionRow).execution_options(yield_per=1000))))


def begun_in(session: Session, turns: Sequence[Interaction]) -> list[Memory]:
    """The statements that were first made in these turns: their words are gone with the turn."""
    ids = {turn.id for turn in turns}
    return [m for held in stated_by(session, turns).values() for m in held if m.source_ids[0] in ids]


def stated_by(session: Session, turns: Iterable[Interaction]) -> dict[tuple[str, str], list[Memory]]:
    """All that those stated who said these turns, by user and agent."""
    owners = sorted({(turn.user_id, turn.agent_id) for turn in turns})
    return {owner: statements_of(session, *owner) for owner in owners}


def statements_of(session: Session, user_id: str, agent_id: str, subject: str | None = None) -> list[Memory]:
    """What this user stated, current or not, by subject and time."""
    rows = select(MemoryRow).where(
        MemoryRow.user_id == user_id, MemoryRow.agent_id == agent_id, MemoryRow.subject != ""
    )
    if subject is not None:
        rows = rows.where(MemoryRow.subject == subject)
    found = (to_memory(row) for row in session.scalars(rows.order_by(MemoryRow.id)))
    return sorted(found, key=lambda m: (m.subject, m.created_utc, inf if m.valid_to is None else m.valid_to))


def ended_by_turn(session: Session, turns: Sequence[Memory]) -> dict[str, Memory]:
    """The statement that was superseded, by the memory of each of these turns that says nothing else."""
    subjects = {i.id: only for i in by_id(session, [t.source_ids[0] for t in turns]) if (only := _only_subject(i))}
    users, agents = {turn.user_id for turn in turns}, {turn.agent_id for turn in turns}
    row = MemoryRow
    ended = select(row).where(row.user_id.in_(users), row.agent_id.in_(agents), row.valid_to.is_not(None))
    found: dict[str, Memory] = {}
    for memory in map(to_memory, scalars_in(session, ended, row.subject, sorted(set(subjects.values())))):
        found |= {source: memory for source in memory.source_ids if subjects.get(source) == memory.subject}
    return {turn.id: found[turn.source_ids[0]] for turn in turns if turn.source_ids[0] in found}


def _only_subject(interaction: Interaction) -> str | None:
    words = user_words(interaction.turn).strip()
    return next((s.subject for s in stated(words) if s.text == words), None)


def derived(user_id: str, agent_id: str, subject: str, sources: Iterable[Interaction]) -> list[Memory]:
    """The rows that a subject has, given the turns in which it was stated."""
    said = [
        Said(statement, interaction.id, interaction.created_utc, interaction.position)
        for interaction in sources
        for statement in stated(request_of(interaction.turn))
        if statement.subject == subject
    ]
    sessions = {interaction.id: interaction.session_id for interaction in sources}
    earlier: Counter[str] = Counter()
    made: list[Memory] = []
    for period in periods(said):
        value = period.statement.value
        named = content_id(["statement", user_id, agent_id, subject, value, earlier[value]])
        made.append(_memory(named, user_id, agent_id, sessions[period.sources[0]], period))
        earlier[value] += 1
    return made


def _memory(named: str, user_id: str, agent_id: str, session_id: str, period: Period) -> Memory:
    s = period.statement
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


def _restate(
    session: Session,
    sources: dict[Subject, set[str]],
    held: Stated | None = None,
    forgotten: Collection[str] = (),
    spared: Set[str] = frozenset(),
) -> list[str]:
    """Make the rows of these subjects again; `held` are those that they had, if some of them are deleted by now.

    Replies are named anew what they were shown, but for those `spared`.
    """
    gone: list[str] = []
    renamed: dict[str, str] = {}
    for subjects in _by_owner(sources):
        user_id, agent_id, _ = subjects[0]
        rows = _by_subject(statements_of(session, user_id, agent_id))
        named = {s: sources[user_id, agent_id, s].union(*(m.source_ids for m in rows[s])) for _, _, s in subjects}
        turns = {i.id: i for i in by_id(session, set().union(*named.values()))}
        old = rows if held is None else _by_subject(held[user_id, agent_id])
        for subject, ids in named.items():
            wanted = derived(user_id, agent_id, subject, [turns[i] for i in ids if i in turns])
            renamed |= _renamed(old.get(subject, []), wanted, turns.keys(), set(forgotten))
            gone += _write(session, rows[subject], wanted)
    rename_shown(session, renamed, spared)
    return gone


def _renamed(before: Iterable[Memory], now: Iterable[Memory], turns: Set[str], forgotten: Set[str]) -> dict[str, str]:
    """By which id a reply goes on to name what it was shown: that of the row that has its first turn.

    Where a version of later rules finds no statement in that turn any more, it is that of the turn itself.
    What was first stated in one of the `forgotten` turns goes by an id that nothing has: others may state the same, but
    the reply was shown words that are gone. A row that only loses a repeat is still named, so that forgetting its first
    turn later reaches the reply.
    """
    has = {i: turn_memory_id(i) for i in turns} | {source: memory.id for memory in now for source in memory.source_ids}
    renamed = {m.id: has.get(m.source_ids[0], m.id) for m in before}
    renamed |= {m.id: content_id(["forgotten", m.id]) for m in before if m.source_ids[0] in forgotten}
    return {old: new for old, new in renamed.items() if old != new}


def rename_shown(
    session: Session,
    renamed: Mapping[str, str],
    spared: Set[str] = frozenset(),
    among: Iterable[ColumnElement[bool]] = (),
) -> None:
    """Replies go on to name what they were shown by its new id."""
    those = [i for i in shown(session, renamed, among) if i not in spared]
    for row in scalars_in(session, select(InteractionRow), InteractionRow.id, those):
        row.memory_ids = [renamed.get(i, i) for i in row.memory_ids]
    session.flush()


def _sources_of(held: Stated) -> dict[Subject, set[str]]:
    sources: dict[Subject, set[str]] = defaultdict(set)
    for owner, rows in held.items():
        for memory in rows:
            sources[*owner, memory.subject].update(memory.source_ids)
    return sources


def _by_subject(statements: Iterable[Memory]) -> dict[str, list[Memory]]:
    found: dict[str, list[Memory]] = defaultdict(list)
    for memory in statements:
        found[memory.subject].append(memory)
    return found


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
            change_memory(session.get_one(MemoryRow, memory.id), memory)
    session.flush()
    gone = sorted(known.keys() - {memory.id for memory in wanted})
    delete_in(session, MemoryRow.id, gone)
    return gone
