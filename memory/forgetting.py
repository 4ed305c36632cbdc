"""What a `forget` reaches: the rows, what was made of them, and what was trained on them.

The invariant: after the transaction no row of SQL holds forgotten words, and every adapter that learnt from them is
tainted. A note falls with any of its sources, a turn's memory with its turn, and the turn with its memory. Not covered:
other people's replies that repeat the words, and bringing the same file in again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import String, cast, delete, func, select, update
from sqlalchemy.orm import Session

from ..errors import InputError, NotFound
from .conversations import Owner, request_of, turn_memory_id
from .reading import of_session, owner_of
from .rows import chunks, to_interaction
from .tables import AdapterRow, FeedbackRow, InteractionRow, MemoryRow, SnapshotSourceRow
from .types import ForgetReceipt, Interaction

Row = TypeVar("Row", InteractionRow, MemoryRow)


@dataclass(frozen=True)
class Targets:
    interactions: tuple[Interaction, ...]
    memory_ids: tuple[str, ...]
    receipt: ForgetReceipt


def targets(
    session: Session,
    *,
    user_id: str | None,
    session_id: str | None,
    interaction_ids: Sequence[str],
    memory_ids: Sequence[str],
) -> Targets:
    """All that has to go. User and session narrow each other and the ids; without ids they are all of the scope."""
    if user_id is None and session_id is None and not interaction_ids and not memory_ids:
        raise InputError("forget what? give user_id, session_id, interaction_ids or memory_ids")
    scope = {name: value for name, value in (("user_id", user_id), ("session_id", session_id)) if value is not None}
    if interaction_ids or memory_ids:
        memories = _named(session, MemoryRow, memory_ids, scope)
        sources = [i for row in memories if row.kind == "turn" for i in row.source_ids]
        found = _named(session, InteractionRow, [*interaction_ids, *sources], scope)
    else:
        memories = list(session.scalars(select(MemoryRow).filter_by(**scope)))
        found = list(session.scalars(select(InteractionRow).filter_by(**scope)))
    gone = {row.id: to_interaction(row) for row in found}
    going = {row.id for row in memories} | set(_memories_of(session, list(gone.values())))
    snapshots = _snapshots_with(session, [*gone, *_shown(session, going)])
    receipt = ForgetReceipt(
        len(gone), len(going), _count_feedback(session, list(gone)), snapshots, _adapters_of(session, snapshots)
    )
    return Targets(tuple(gone.values()), tuple(sorted(going)), receipt)


def erase_rows(session: Session, targets: Targets) -> None:
    """Delete the targets and taint the adapters, in the caller's transaction."""
    gone = [interaction.id for interaction in targets.interactions]
    for some in chunks(targets.memory_ids):
        session.execute(delete(MemoryRow).where(MemoryRow.id.in_(some)))
    for some in chunks(gone):
        session.execute(delete(FeedbackRow).where(FeedbackRow.interaction_id.in_(some)))
        session.execute(delete(InteractionRow).where(InteractionRow.id.in_(some)))
    snapshots = ", ".join(targets.receipt.tainted_snapshots)
    reason = f"snapshot {snapshots} holds interactions that were forgotten ({len(gone)} with this receipt)"
    for adapters in chunks(targets.receipt.tainted_adapters):
        untainted = AdapterRow.id.in_(adapters), AdapterRow.tainted.is_(None)
        session.execute(update(AdapterRow).where(*untainted).values(tainted=reason))
    for owner in sorted(set(map(owner_of, targets.interactions))):
        _inherit_again(session, owner)


def _inherit_again(session: Session, owner: Owner) -> None:
    """A turn without words of the user repeats the request before it; that may be what was forgotten."""
    text, topic_id = "", None
    for row in session.scalars(of_session(owner).order_by(InteractionRow.position)):
        if own := request_of(to_interaction(row).turn):
            text, topic_id = own, row.topic_id
        elif (row.text, row.topic_id) != (text, topic_id):
            row.text, row.topic_id = text, topic_id
    session.flush()


def _named(session: Session, kind: type[Row], ids: Sequence[str], scope: dict[str, str]) -> list[Row]:
    found: dict[str, Row] = {}
    for some in chunks(list(ids)):
        found |= {row.id: row for row in session.scalars(select(kind).filter_by(**scope).where(kind.id.in_(some)))}
    if missing := sorted(set(ids) - found.keys()):
        where = " of " + " and ".join(f"{name} {value!r}" for name, value in scope.items()) if scope else ""
        raise NotFound(f"nothing{where} has the id {', '.join(missing[:5])}; nothing was forgotten")
    return list(found.values())


def _memories_of(session: Session, gone: Sequence[Interaction]) -> Iterable[str]:
    ids = {interaction.id for interaction in gone}
    for some in chunks([turn_memory_id(i) for i in ids]):
        yield from session.scalars(select(MemoryRow.id).where(MemoryRow.id.in_(some)))
    users = sorted({interaction.user_id for interaction in gone})
    for some in chunks(users):
        notes = select(MemoryRow.id, MemoryRow.source_ids).where(MemoryRow.kind == "note", MemoryRow.user_id.in_(some))
        yield from (i for i, sources in session.execute(notes) if not ids.isdisjoint(sources))


def _shown(session: Session, memory_ids: set[str]) -> list[str]:
    """The interactions whose reply was given one of these memories: what is learnt from the reply comes from there."""
    given = select(InteractionRow.id, InteractionRow.memory_ids)
    some = session.execute(given.where(cast(InteractionRow.memory_ids, String) != "[]"))
    return [i for i, ids in some if not memory_ids.isdisjoint(ids)]


def _count_feedback(session: Session, ids: Sequence[str]) -> int:
    count = select(func.count()).select_from(FeedbackRow)
    return sum(session.scalars(count.where(FeedbackRow.interaction_id.in_(some))).one() for some in chunks(ids))


def _snapshots_with(session: Session, ids: Sequence[str]) -> tuple[str, ...]:
    found: set[str] = set()
    for some in chunks(ids):
        rows = select(SnapshotSourceRow.snapshot_id).where(SnapshotSourceRow.interaction_id.in_(some)).distinct()
        found.update(session.scalars(rows))
    return tuple(sorted(found))


def _adapters_of(session: Session, snapshots: Sequence[str]) -> tuple[str, ...]:
    """Adapters trained on these snapshots, and all that were trained from those."""
    rows = session.execute(select(AdapterRow.id, AdapterRow.snapshot_id, AdapterRow.parent_id)).all()
    found = {row.id for row in rows if row.snapshot_id in snapshots}
    while more := {row.id for row in rows if row.parent_id in found} - found:
        found |= more
    return tuple(sorted(found))
