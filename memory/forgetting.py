"""What a `forget` reaches: the rows, what was made of them, and what was trained on them.

The invariant: after the transaction no row of SQL holds forgotten words, every adapter that learnt from them is
tainted, a tombstone keeps them from being brought in again, and a receipt stands until their bytes are gone, too. A
note or a draft falls with any of its sources, the memories of a turn and of its corrections with the turn, and the turn
with any of these memories. Not covered: other people's replies that repeat the words, and the ids of what is gone in
snapshots, which are unsalted hashes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from ..content import content_id
from ..errors import InputError, NotFound
from .conversations import Owner, checked_owner, checked_past, checked_text, owner_of, request_of, turn_memory_id
from .corrections import correction_ids
from .reading import of_session, shown
from .rows import chunks, delete_in, rows_in, scalars_in, to_interaction
from .stated_rows import begun_in, follow, stated_by
from .tables import AdapterRow, DraftRow, FeedbackRow, InteractionRow, MemoryRow, ReceiptRow, SnapshotSourceRow
from .tombstones import Tombstones
from .types import DEFAULT_USER, ForgetPlan, ForgetReceipt, Interaction, Selection

Row = TypeVar("Row", InteractionRow, MemoryRow)


@dataclass(frozen=True)
class Targets:
    interactions: tuple[Interaction, ...]
    note_ids: tuple[str, ...]
    plan: ForgetPlan

    @property
    def empty(self) -> bool:
        return not (self.plan.interaction_ids or self.plan.memory_ids)

    @property
    def receipt(self) -> ForgetReceipt:
        p = self.plan
        counts = len(p.interaction_ids), len(p.memory_ids), len(p.feedback_ids)
        return ForgetReceipt(*counts, p.tainted_snapshots, p.tainted_adapters, p.exports)


def checked_selection(selection: Selection, now: float) -> Selection:
    """The same, if it says what to forget; InputError otherwise, as for a time in milliseconds, before which is all."""
    if not isinstance(selection, Selection):
        raise InputError(f"a plan's selection is of type {type(selection).__name__}; give what `forget` returned")
    if selection == Selection():
        raise InputError("forget what? give user_id, session_id, before_utc, interaction_ids, memory_ids or query")
    for name in ("user_id", "session_id"):
        if getattr(selection, name) == "":
            raise InputError(f"{name} is empty; name one, or leave it out")
    user_id = DEFAULT_USER if selection.user_id is None else selection.user_id
    checked_owner(user_id, "", "" if selection.session_id is None else selection.session_id)
    if selection.before_utc is not None:
        checked_past("before_utc", selection.before_utc, now)
    if selection.query is not None and selection.user_id is None:
        raise InputError("query finds the memories of one user; give user_id (--user), too")
    if selection.query is not None:
        checked_text("query", selection.query)
    return selection


def targets(session: Session, selection: Selection, found: Collection[str], exports: tuple[str, ...]) -> Targets:
    """All that has to go; `found` are the memories that the query of the selection finds."""
    scope = {name: v for name in ("user_id", "session_id") if (v := getattr(selection, name)) is not None}
    before = selection.before_utc
    if (selection.interaction_ids, selection.memory_ids, selection.query) == (None, None, None):
        memories = _within(session, MemoryRow, scope, before)
        rows = _within(session, InteractionRow, scope, before)
    else:
        named = selection.interaction_ids or ()
        memories = _named(session, MemoryRow, selection.memory_ids or (), scope, before)
        memories += _within(session, MemoryRow, scope, before, found)
        sources = [i for row in memories if row.kind != "note" for i in row.source_ids]
        rows = _named(session, InteractionRow, named, scope, before)
        rows += _within(session, InteractionRow, scope, before, set(sources) - set(named))
    return _reached(session, selection, list(map(to_interaction, rows)), memories, exports)


def _reached(
    session: Session, selection: Selection, gone: list[Interaction], memories: list[MemoryRow], exports: tuple[str, ...]
) -> Targets:
    ids = sorted(interaction.id for interaction in gone)
    notes = {row.id for row in memories if row.kind == "note"} | set(_notes_of(session, gone))
    stated = {memory.id for memory in begun_in(session, gone)}
    going = sorted({row.id for row in memories} | notes | stated | set(_made_of(session, ids)))
    feedback = sorted(_feedback_of(session, ids))
    # what is learnt from a reply comes from what the reply was shown, too
    snapshots = _snapshots_with(session, [*ids, *shown(session, going)])
    token = content_id(["forget", ids, going, feedback])
    adapters, exports = _adapters_of(session, snapshots), exports if ids or going else ()
    users = tuple(sorted({turn.user_id for turn in gone} | {row.user_id for row in memories}))
    plan = ForgetPlan(token, selection, tuple(ids), tuple(going), tuple(feedback), users, exports, snapshots, adapters)
    return Targets(tuple(gone), tuple(sorted(notes)), plan)


def confirmed(targets: Targets, token: str) -> Targets:
    """The same, if it is what the token was given for."""
    receipt = targets.receipt
    if targets.plan.token != token:
        raise InputError(
            f"the token {token} was not given for what this would erase now: {receipt.interactions} turns,"
            f" {receipt.memories} memories, {receipt.feedback} ratings; nothing was forgotten, ask for a new plan"
        )
    return targets


def erase_rows(session: Session, targets: Targets, now: float) -> int:
    """Delete the targets and taint the adapters, in the caller's transaction. Returns the number of the receipt."""
    plan = targets.plan
    Tombstones(session).add(targets.interactions, targets.note_ids)
    _erase_drafts(session, {*plan.interaction_ids, *shown(session, plan.memory_ids)})
    delete_in(session, FeedbackRow.interaction_id, plan.interaction_ids)
    delete_in(session, InteractionRow.id, plan.interaction_ids)
    held = stated_by(session, targets.interactions)
    delete_in(session, MemoryRow.id, plan.memory_ids)
    follow(session, held, plan.interaction_ids)  # what another turn states, too, is there again
    _taint(session, plan)
    for owner in sorted(set(map(owner_of, targets.interactions))):
        inherit_again(session, owner)
    row = ReceiptRow(details=_details(targets.receipt), created_utc=now, finished_utc=None)
    session.add(row)
    session.flush()
    return row.id


def _erase_drafts(session: Session, ids: set[str]) -> None:
    """What was written to a prompt with the words of any of these."""
    held = session.execute(select(DraftRow.id, DraftRow.source_ids))
    delete_in(session, DraftRow.id, [i for i, sources in held if not ids.isdisjoint(sources)])


def unfinished(session: Session) -> list[int]:
    """Receipts of which the bytes may still be on the disk."""
    rows = select(ReceiptRow.id).where(ReceiptRow.finished_utc.is_(None)).order_by(ReceiptRow.id)
    return list(session.scalars(rows))


def finish(session: Session, receipts: Sequence[int], now: float) -> None:
    session.execute(update(ReceiptRow).where(ReceiptRow.id.in_(receipts)).values(finished_utc=now))


def _details(receipt: ForgetReceipt) -> dict[str, Any]:
    """What the receipt keeps: the names of exports are the operator's words, and only their number stays."""
    return asdict(receipt) | {"exports": len(receipt.exports)}


def _taint(session: Session, plan: ForgetPlan) -> None:
    turns, memories = len(plan.interaction_ids), len(plan.memory_ids)
    reason = (
        f"snapshot {', '.join(plan.tainted_snapshots)} was made of what was forgotten since"
        f" ({turns} turns and {memories} memories with this receipt)"
    )
    for adapters in chunks(plan.tainted_adapters):
        untainted = AdapterRow.id.in_(adapters), AdapterRow.tainted.is_(None)
        session.execute(update(AdapterRow).where(*untainted).values(tainted=reason))


def inherit_again(session: Session, owner: Owner) -> None:
    """A turn without words of the user repeats the request before it; that may be what was forgotten."""
    text, topic_id = "", None
    for row in session.scalars(of_session(owner).order_by(InteractionRow.position)):
        if own := request_of(to_interaction(row).turn):
            text, topic_id = own, row.topic_id
        elif (row.text, row.topic_id) != (text, topic_id):
            row.text, row.topic_id = text, topic_id
    session.flush()


def _within(
    session: Session, kind: type[Row], scope: dict[str, str], before: float | None, ids: Collection[str] | None = None
) -> list[Row]:
    rows = select(kind).filter_by(**scope)
    if before is not None:
        rows = rows.where(kind.created_utc < before)
    if ids is None:
        return list(session.scalars(rows))
    return list(scalars_in(session, rows, kind.id, sorted(ids)))


def _named(
    session: Session, kind: type[Row], ids: Sequence[str], scope: dict[str, str], before: float | None
) -> list[Row]:
    found = _within(session, kind, scope, before, set(ids))
    if missing := sorted(set(ids) - {row.id for row in found}):
        narrowed = [f"{name} {value!r}" for name, value in scope.items()]
        narrowed += [] if before is None else [f"before {before}"]
        where = " of " + " and ".join(narrowed) if narrowed else ""
        raise NotFound(f"nothing{where} has the id {', '.join(missing[:5])}; nothing was forgotten")
    return found


def _made_of(session: Session, gone: Collection[str]) -> Iterable[str]:
    """The memories of these turns and of their corrections."""
    ids = [*map(turn_memory_id, gone), *correction_ids(session, gone)]
    return scalars_in(session, select(MemoryRow.id), MemoryRow.id, ids)


def _notes_of(session: Session, gone: Iterable[Interaction]) -> Iterable[str]:
    """Those made from an interaction that goes; notes are made from interactions of their own user."""
    ids = {interaction.id for interaction in gone}
    users = {interaction.user_id for interaction in gone}
    notes = select(MemoryRow.id, MemoryRow.source_ids).where(MemoryRow.kind == "note")
    found = rows_in(session, notes, MemoryRow.user_id, users)
    return (i for i, sources in found if not ids.isdisjoint(sources))


def _feedback_of(session: Session, ids: Sequence[str]) -> Iterable[str]:
    return scalars_in(session, select(FeedbackRow.id), FeedbackRow.interaction_id, ids)


def _snapshots_with(session: Session, ids: Sequence[str]) -> tuple[str, ...]:
    named = select(SnapshotSourceRow.snapshot_id).distinct()
    return tuple(sorted(set(scalars_in(session, named, SnapshotSourceRow.interaction_id, ids))))


def _adapters_of(session: Session, snapshots: Sequence[str]) -> tuple[str, ...]:
    """Adapters trained on these snapshots, and all that were trained from those."""
    rows = session.execute(select(AdapterRow.id, AdapterRow.snapshot_id, AdapterRow.parent_id)).all()
    found = {row.id for row in rows if row.snapshot_id in snapshots}
    while more := {row.id for row in rows if row.parent_id in found} - found:
        found |= more
    return tuple(sorted(found))
