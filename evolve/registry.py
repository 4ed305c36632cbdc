"""Adapters on record: judged, promoted, rolled back, withdrawn. Their folders are those of `sealing`.

The invariant: what `live` returns has an accepted verdict, is not tainted, and its weights hash to its id. The live
alias is the newest row of `deployments`, so a switch is one insert.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice, takewhile
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from ..errors import GateRefused, NotFound
from ..memory.database import Database
from ..memory.reading import the_one
from ..memory.tables import (
    AdapterRow,
    CycleRow,
    DeploymentRow,
    ReceiptRow,
    SnapshotRow,
    SnapshotSourceRow,
    VerdictRow,
)
from ..serving.engine import MANIFEST, WEIGHTS
from .sealing import (
    PRUNED,
    erase,
    is_held,
    manifest_of,
    mend,
    origin,
    require_itself,
    weights_to_account_for,
    write_manifest,
)
from .types import INTERRUPTED, Adapter, Cycle, Excluded, Measure, PhaseCost, Snapshot, Verdict

if TYPE_CHECKING:
    from ..memory.store import MemoryStore

log = logging.getLogger("nightschool")
DEBRIS, SEALED = ".building-", "b2-"  # how the names of our folders begin
PROMOTED = "promoted"  # the reason of a deployment that goes forth
ROLLED_BACK = "rolled back from "  # and the adapter


class AliasMoved(GateRefused):
    """Something else was put into service meanwhile."""


def _forgotten_meanwhile(session: Session, snapshot_id: str, last: int) -> str | None:
    """Why what is trained on that snapshot is tainted: something in it was forgotten after the `last` receipt.

    What was forgotten before, and is in it again, was said again. Receipts are counted, since clocks may differ.
    """
    receipts = session.scalars(select(ReceiptRow).where(ReceiptRow.id > last).order_by(ReceiptRow.id))
    if any(snapshot_id in receipt.details["tainted_snapshots"] for receipt in receipts):
        return f"snapshot {snapshot_id} holds interactions that were forgotten while it was trained on"
    return None


def _rollback_stack(deployments: Iterable[DeploymentRow]) -> list[str | None]:
    """What serves and what it would be gone back to, each once: a promotion puts on, going back takes off.

    What was rolled back from is gone back to no more, though it may have served before as well.
    """
    served: list[str | None] = [None]
    for row in deployments:
        if row.reason.startswith(ROLLED_BACK):
            served = [s for s in served if s != row.reason.removeprefix(ROLLED_BACK)]
        if row.reason == PROMOTED or row.adapter_id not in served:
            served.append(row.adapter_id)
        while served[-1] != row.adapter_id:
            served.pop()
    return list(dict.fromkeys(reversed(served)))


def _excluded(rows: Sequence[dict[str, Any]]) -> tuple[Excluded, ...]:
    return tuple(Excluded(row["reason"], tuple(row["interaction_ids"])) for row in rows)


def _verdict(row: VerdictRow) -> Verdict:
    measures = tuple(Measure(**m) for m in row.measures)
    ids = (row.candidate_id, row.incumbent_id, row.snapshot_id)
    return Verdict(*ids, row.accepted, measures, tuple(row.reasons), row.criteria)


class Registry:
    """What was trained, how it was judged and which adapter serves, in the memory's own database."""

    def __init__(self, database: Database, folder: Path, clock: Callable[[], float]) -> None:
        self.database, self.folder, self.clock = database, folder, clock
        self._last_receipt = 0  # of what was forgotten when the night began

    @classmethod
    def of(cls, store: MemoryStore) -> Registry:
        """That of the home in which `store` is."""
        return cls(store.database, store.settings.home / "adapters", store.clock)

    def building(self) -> Path:
        """A new empty folder for a training run; `sweep` removes it if the run dies."""
        path = self.folder / f"{DEBRIS}{uuid4().hex}"
        path.mkdir(parents=True)
        return path

    def sweep(self) -> int:
        """Remove what a crash left: folders of ours that are not whole, or of a snapshot of ours and in no record.

        Only the night calls it, under its lock. What is on record stays, and gets back a manifest that was lost. What
        is whole and made elsewhere stays: the database may be the wrong one.
        """
        for adapter in self.adapters():
            mend(adapter)
        ours = (p for name in (DEBRIS, SEALED) for p in self.folder.glob(name + "*") if p.is_dir())
        debris = [p for p in ours if not p.is_symlink() and self._is_debris(p)]
        for path in debris:
            log.warning("%s is no whole adapter and is removed: a night was interrupted", path)
            shutil.rmtree(path)
        return len(debris)

    def _is_debris(self, path: Path) -> bool:
        with self.database.reading() as session:
            if session.scalars(select(AdapterRow.id).where(AdapterRow.folder == path.name)).first():
                return False
            if path.name.startswith(DEBRIS) or not (path / MANIFEST).exists():
                return True
            named = manifest_of(path)
            return named is not None and session.get(SnapshotRow, named.snapshot_id) is not None

    # -- snapshots ---

    def add_snapshot(self, snapshot: Snapshot, rows: list[dict[str, Any]]) -> None:
        """Keep the references of a snapshot (`rows`, from `dataset.to_rows`), and what was left out of it this time."""
        excluded = [asdict(e) for e in snapshot.excluded]
        with self.database.writing() as session:
            if held := session.get(SnapshotRow, snapshot.id):
                held.excluded = excluded
                held.reader_ids = sorted({*(held.reader_ids or ()), *snapshot.reader_ids})
            else:
                kept = {"rows": rows, "excluded": excluded, "censor": snapshot.censor}
                kept |= {"reader_ids": list(snapshot.reader_ids)}
                session.add(SnapshotRow(id=snapshot.id, **kept, created_utc=self.clock()))
                session.flush()
            named = select(SnapshotSourceRow.interaction_id).where(SnapshotSourceRow.snapshot_id == snapshot.id)
            fresh = (snapshot.interaction_ids() | {*snapshot.reader_ids}).difference(session.scalars(named))
            session.add_all(SnapshotSourceRow(snapshot_id=snapshot.id, interaction_id=i) for i in sorted(fresh))

    def snapshot_rows(self, snapshot_id: str) -> list[dict[str, Any]]:
        with self.database.reading() as session:
            row = session.get(SnapshotRow, snapshot_id)
            if row is None:
                raise NotFound(f"no snapshot {snapshot_id}; see `nightschool snapshots list`")
            return row.rows

    def snapshot_ids(self) -> list[str]:
        with self.database.reading() as session:
            return list(session.scalars(select(SnapshotRow.id).order_by(SnapshotRow.created_utc)))

    def reader_ids(self, snapshot_id: str) -> set[str]:
        """What the reader was fitted on whose guesses are in it."""
        with self.database.reading() as session:
            row = session.get(SnapshotRow, snapshot_id)
            return set((row.reader_ids if row else None) or ())

    def censor_of(self, snapshot_id: str) -> str:
        """The version of the Censor that it was frozen with; empty for one from before versions had names."""
        with self.database.reading() as session:
            return session.scalars(select(SnapshotRow.censor).where(SnapshotRow.id == snapshot_id)).first() or ""

    def excluded(self, snapshot_id: str) -> tuple[Excluded, ...]:
        """What was left out of it the last time that it was made."""
        with self.database.reading() as session:
            row = session.get(SnapshotRow, snapshot_id)
            return _excluded(row.excluded if row else [])

    def new_sources(self, snapshot_id: str, earlier: Sequence[str]) -> int:
        """How many interactions that snapshot was made of and none of the `earlier` ones."""
        named = SnapshotSourceRow.interaction_id
        known = select(named).where(SnapshotSourceRow.snapshot_id.in_(earlier))
        own = select(func.count(named)).where(SnapshotSourceRow.snapshot_id == snapshot_id, named.not_in(known))
        with self.database.reading() as session:
            return session.scalars(own).one()

    def sources(self, snapshot_id: str) -> set[str]:
        """The interactions that snapshot was made of, forgotten ones included."""
        with self.database.reading() as session:
            query = select(SnapshotSourceRow.interaction_id).where(SnapshotSourceRow.snapshot_id == snapshot_id)
            return set(session.scalars(query))

    # -- adapters ---

    def add(self, adapter: Adapter) -> None:
        """Record what was trained. Weights that are known keep their origin, unless that is tainted and this is clean:
        then what was forgotten had taught them nothing; or this names all their sources and more. The settings are
        those that made them last."""
        with self.database.writing() as session:
            known = session.get(AdapterRow, adapter.id)
            tainted = _forgotten_meanwhile(session, adapter.snapshot_id, self._last_receipt)
            if known and origin(self._adapter(known)) == origin(adapter):
                known.details, known.tainted = adapter.details, tainted
                write_manifest(adapter.path, self._adapter(known))
                return
            if known and tainted:
                return
            if known and not known.tainted and not self._covers(adapter.snapshot_id, known.snapshot_id):
                return
            values = {k: v for k, v in asdict(adapter).items() if k != "path"}
            session.merge(AdapterRow(**values, folder=adapter.path.name, tainted=tainted))
            write_manifest(adapter.path, adapter)

    def _covers(self, snapshot_id: str, other: str) -> bool:
        return self.sources(snapshot_id) >= self.sources(other)

    def adapters(self) -> list[Adapter]:
        """Every adapter that was trained and recorded, oldest first."""
        with self.database.reading() as session:
            return [self._adapter(row) for row in session.scalars(select(AdapterRow).order_by(AdapterRow.created_utc))]

    def adapter(self, adapter_id: str) -> Adapter:
        """By id or by an unambiguous prefix of it."""
        with self.database.reading() as session:
            return self._adapter(the_one(session, AdapterRow, adapter_id, "adapter", "nightschool adapters list"))

    def tainted(self) -> dict[str, str]:
        """Adapters that may not serve any more, and why."""
        with self.database.reading() as session:
            rows = session.scalars(select(AdapterRow).where(AdapterRow.tainted.is_not(None)))
            return {row.id: row.tainted or "" for row in rows}

    def erase_tainted(self) -> list[str]:
        """Erase the weights that may know what was forgotten, and say whose; manifests and rows stay, for lineage.

        What cannot be erased is told in the log, with the file, and tried again by the next night.
        """
        return [adapter.id for adapter in (*self._held_tainted(), *self._lost()) if erase(adapter.path / WEIGHTS)]

    def unerased(self, adapter_ids: Collection[str]) -> list[Path]:
        """The files of the weights of these tainted adapters that are still there."""
        return [adapter.path / WEIGHTS for adapter in self._held_tainted() if adapter.id in adapter_ids]

    def _held_tainted(self) -> list[Adapter]:
        with self.database.reading() as session:  # at every start, so of the tainted alone
            rows = select(AdapterRow).where(AdapterRow.tainted.is_not(None)).order_by(AdapterRow.created_utc)
            return [a for a in map(self._adapter, session.scalars(rows)) if is_held(a)]

    def _lost(self) -> list[Adapter]:
        """What a night sealed and did not record, of snapshots of which something was forgotten: it may have been
        stopped in between. Their folders are left to `sweep`, since a night may be about to record them."""
        with self.database.reading() as session:
            known = set(session.scalars(select(AdapterRow.folder)))
            found = (manifest_of(path) for path in self.folder.glob(SEALED + "*") if path.name not in known)
            lost = [adapter for adapter in found if adapter and is_held(adapter)]
            receipts = session.scalars(select(ReceiptRow.details)).all() if lost else ()
        tainted = {snapshot_id for details in receipts for snapshot_id in details["tainted_snapshots"]}
        return [adapter for adapter in lost if adapter.snapshot_id in tainted]

    def prunable(self, keep: int) -> list[Adapter]:
        """Those whose weights are needed by nothing, and held or lost, oldest first.

        Needed is what serves, the `keep` others that served last and still may, the newest, which may be judged again,
        and what these were trained from.
        """
        found, live = self.adapters(), self.live()
        kept = {a.id for a in (*found[-1:], *([live] if live else []))}
        deployed = dict.fromkeys(d["adapter_id"] for d in reversed(self.deployments()) if d["adapter_id"])
        kept |= set(islice((i for i in deployed if i not in kept and self._servable(self.adapter(i))), keep))
        while more := {a.parent_id for a in found if a.id in kept and a.parent_id} - kept:
            kept |= more
        tainted = self.tainted()
        return [a for a in found if a.id not in kept and weights_to_account_for(a, tainted)]

    def prune(self, keep: int) -> list[str]:
        """Erase the weights of what is `prunable`, and say whose; manifests and rows stay, for lineage.

        A folder that was removed by hand is made again for the mark alone, so that `audit verify` is sound.
        """
        going = self.prunable(keep)
        for adapter in going:
            adapter.path.mkdir(parents=True, exist_ok=True)
            (adapter.path / PRUNED).touch()
        return [adapter.id for adapter in going if erase(adapter.path / WEIGHTS)]

    def taint(self, adapter_id: str, reason: str) -> None:
        with self.database.writing() as session:
            session.execute(update(AdapterRow).where(AdapterRow.id == adapter_id).values(tainted=reason))

    def _adapter(self, row: AdapterRow) -> Adapter:
        names = ("id", "base_id", "snapshot_id", "phase", "parent_id", "created_utc", "details")
        return Adapter(path=self.folder / row.folder, **{name: getattr(row, name) for name in names})

    # -- verdicts ---

    def add_verdict(self, verdict: Verdict, cycle_id: str | None = None) -> None:
        """Record it, with the night that reached it if one did."""
        with self.database.writing() as session:
            values = {**asdict(verdict), "reasons": list(verdict.reasons)}
            session.add(row := VerdictRow(**values, created_utc=self.clock()))
            session.flush()
            if cycle := session.get(CycleRow, cycle_id) if cycle_id else None:
                cycle.candidate_id, cycle.verdict_id = row.candidate_id, row.id

    def verdict(self, candidate_id: str) -> Verdict | None:
        """The newest verdict on that adapter."""
        with self.database.reading() as session:
            query = select(VerdictRow).where(VerdictRow.candidate_id == candidate_id).order_by(VerdictRow.id.desc())
            row = session.scalars(query.limit(1)).first()
            return _verdict(row) if row else None

    def was_accepted(self, candidate_id: str) -> bool:
        """Whether the gate ever took that adapter, which stays in service where newer rules do not."""
        accepted = select(VerdictRow.id).where(VerdictRow.candidate_id == candidate_id, VerdictRow.accepted)
        with self.database.reading() as session:
            return session.scalars(accepted.limit(1)).first() is not None

    def undecided(self, candidate_id: str) -> bool:
        """Whether nothing was switched since its newest verdict, as where a night was stopped right after it."""
        judged = select(func.max(VerdictRow.created_utc)).where(VerdictRow.candidate_id == candidate_id)
        with self.database.reading() as session:
            moved = session.scalars(select(func.max(DeploymentRow.created_utc))).one()
            return moved is None or moved < (session.scalars(judged).one() or -inf)

    # -- the live alias ---

    def live(self) -> Adapter | None:
        """The adapter in service; None is the base. Where the newest deployment was tainted since, its predecessor."""
        with self.database.reading() as session:
            row = session.scalars(select(DeploymentRow).order_by(DeploymentRow.id.desc()).limit(1)).first()
            adapter = session.get(AdapterRow, row.adapter_id) if row and row.adapter_id else None
            if adapter is None or not adapter.tainted:
                return self._adapter(adapter) if adapter else None
        return self.predecessor(adapter.id)

    def promote(self, adapter_id: str, cycle_id: str | None = None, after: int | None = None) -> Adapter:
        """Put an accepted, untainted, undamaged adapter into service; GateRefused otherwise.

        Of a night `cycle_id`, which judged it `after` the switch of that number: AliasMoved if there was another since.
        """
        adapter = self.adapter(adapter_id)
        self._require_servable(adapter)
        self._deploy(adapter.id, PROMOTED, after, cycle_id)
        return adapter

    def _require_servable(self, adapter: Adapter) -> None:
        verdict = self.verdict(adapter.id)
        if verdict is None:
            raise GateRefused(f"adapter {adapter.id} was never judged; run `nightschool night`")
        if not verdict.accepted:
            raise GateRefused(f"adapter {adapter.id} was rejected: {'; '.join(verdict.reasons)}")
        if reason := self.tainted().get(adapter.id):
            raise GateRefused(
                f"adapter {adapter.id} is tainted: {reason}; run `nightschool night` to train a clean one"
            )
        require_itself(adapter)

    def rollback(self) -> Adapter | None:
        """Back to what served before the live adapter and may still serve; None is the base.

        Rolling back twice goes back two steps: only what was deployed before the live one's promotion counts.
        """
        seen, live = self.newest_deployment(), self.live()
        if live is None:
            raise GateRefused(
                "the base is serving: there is nothing to roll back from; see `nightschool adapters list`"
            )
        target = self.predecessor(live.id)
        self._deploy(target.id if target else None, f"{ROLLED_BACK}{live.id}", after=seen)
        return target

    def withdraw_tainted(self) -> Adapter | None:
        """If the newest deployment is tainted, record that its last clean predecessor serves; returns that."""
        seen = self.newest_deployment()
        with self.database.reading() as session:
            row = session.get(DeploymentRow, seen)
            deployed = row.adapter_id if row else None
        if deployed is None or deployed not in self.tainted():
            return self.live()
        target = self.predecessor(deployed)
        try:
            self._deploy(target.id if target else None, f"withdrew {deployed}: tainted", after=seen)
        except AliasMoved:
            return self.withdraw_tainted()
        return target

    def newest_deployment(self) -> int:
        """The number of the latest switch of the alias; 0 before the first."""
        with self.database.reading() as session:
            return session.scalars(select(func.max(DeploymentRow.id))).one() or 0

    def in_service(self) -> Iterator[Adapter]:
        """What serves, then what each further rollback would put back, until the base."""
        if live := self.live():
            yield live
            yield from self.predecessors(live.id)

    def predecessor(self, adapter_id: str) -> Adapter | None:
        """What served before that adapter was put into service this time and may still serve; None is the base."""
        return next(self.predecessors(adapter_id), None)

    def predecessors(self, adapter_id: str) -> Iterator[Adapter]:
        """All that served before it and may still serve, the latest first, until the base."""
        with self.database.reading() as session:
            ids = _rollback_stack(session.scalars(select(DeploymentRow).order_by(DeploymentRow.id)))
        below = ids[ids.index(adapter_id) + 1 :] if adapter_id in ids else ids
        served = takewhile(lambda found: found is not None, below)  # before the base, nothing is gone back to
        return filter(self._servable, map(self.adapter, filter(None, served)))

    def _servable(self, adapter: Adapter) -> bool:
        """Whether `promote` would take it: what served once may have been rejected since, tainted or damaged."""
        try:
            self._require_servable(adapter)
        except GateRefused:
            return False
        return True

    def deployments(self) -> list[dict[str, Any]]:
        """Every switch of the alias, oldest first."""
        with self.database.reading() as session:
            rows = session.scalars(select(DeploymentRow).order_by(DeploymentRow.id))
            return [{"adapter_id": r.adapter_id, "reason": r.reason, "created_utc": r.created_utc} for r in rows]

    def receipts(self) -> list[dict[str, Any]]:
        """Every `forget`, oldest first: how much it erased, what it withdrew, and since when its bytes are gone."""
        with self.database.reading() as session:
            rows = session.scalars(select(ReceiptRow).order_by(ReceiptRow.id))
            times = ("id", "created_utc", "finished_utc")
            return [row.details | {name: getattr(row, name) for name in times} for row in rows]

    def _deploy(
        self, adapter_id: str | None, reason: str, after: int | None = None, cycle_id: str | None = None
    ) -> None:
        """AliasMoved, and nothing done, if the alias was switched `after` the switch of that number."""
        with self.database.writing() as session:
            if after is not None and (session.scalars(select(func.max(DeploymentRow.id))).one() or 0) != after:
                raise AliasMoved("another adapter was put into service meanwhile; see `nightschool adapters list`")
            row = session.get(AdapterRow, adapter_id) if adapter_id else None
            if row and row.tainted:  # since it was looked at
                raise GateRefused(f"adapter {adapter_id} is tainted: {row.tainted}; run `nightschool night` again")
            made = DeploymentRow(adapter_id=adapter_id, reason=reason, created_utc=self.clock())
            session.add(made)
            session.flush()
            if cycle := session.get(CycleRow, cycle_id) if cycle_id else None:
                cycle.deployment_id = made.id

    # -- cycles ---

    def open_cycle(self) -> str:
        cycle_id = uuid4().hex[:12]
        with self.database.writing() as session:
            number = (session.scalars(select(func.max(CycleRow.number))).one() or 0) + 1
            session.add(CycleRow(id=cycle_id, started_utc=self.clock(), number=number))
            self._last_receipt = session.scalars(select(func.max(ReceiptRow.id))).one() or 0
        return cycle_id

    def close_interrupted(self) -> None:
        """Nights that ended without a word, as by a loss of power. Only the night calls it, under its lock."""
        with self.database.writing() as session:
            left = update(CycleRow).where(CycleRow.finished_utc.is_(None))
            session.execute(left.values(finished_utc=self.clock(), error=INTERRUPTED))

    def update_cycle(self, cycle_id: str, **values: Any) -> None:
        with self.database.writing() as session:
            session.execute(update(CycleRow).where(CycleRow.id == cycle_id).values(**values))

    def cycle(self, cycle_id: str) -> Cycle:
        with self.database.reading() as session:
            row = the_one(session, CycleRow, cycle_id, "night", "nightschool report")
            verdict = session.get(VerdictRow, row.verdict_id) if row.verdict_id else None
            decided = row.deployment_id or row.finished_utc is not None  # else it may have been killed in between
            accepted = verdict.accepted if verdict and decided else None
            error = None if row.deployment_id else row.error  # whatever came after it
            return Cycle(row.id, row.started_utc, row.finished_utc, row.snapshot_id, row.candidate_id, accepted, error)

    def cycle_verdict(self, cycle: Cycle) -> Verdict | None:
        """What was decided that night."""
        its = select(CycleRow.verdict_id).where(CycleRow.id == cycle.id).scalar_subquery()
        with self.database.reading() as session:
            row = session.scalars(select(VerdictRow).where(VerdictRow.id == its)).first()
            return _verdict(row) if row else None

    def cycle_excluded(self, cycle: Cycle) -> tuple[Excluded, ...]:
        """What was left out of its snapshot that night."""
        with self.database.reading() as session:
            row = session.get(CycleRow, cycle.id)
            return _excluded((row.excluded if row else None) or [])

    def cycle_trained(self, cycle: Cycle) -> list[PhaseCost] | None:
        """What it trained, by phase; None where that is not on record."""
        with self.database.reading() as session:
            row = session.get(CycleRow, cycle.id)
            return None if row is None or row.trained is None else [PhaseCost(**cost) for cost in row.trained]

    def latest_cycle(self) -> Cycle:
        with self.database.reading() as session:
            found = session.scalars(select(CycleRow.id).order_by(CycleRow.number.desc()).limit(1)).first()
        if found is None:
            raise NotFound("no night has been run; run `nightschool night`")
        return self.cycle(found)

    def cycles(self) -> list[Cycle]:
        """Every night, oldest first."""
        with self.database.reading() as session:
            ids = list(session.scalars(select(CycleRow.id).order_by(CycleRow.number)))
        return [self.cycle(i) for i in ids]
