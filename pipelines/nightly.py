"""The whole night on one page: freeze what was heard, ground, prefer, judge, promote.

Whatever fails, the incumbent goes on serving: the live alias moves only in the last step, and only for an accepted
verdict. What was trained on the same memory with the same settings is not trained again, and judged again only where
the rules have changed: the gate's settings or the operator's probes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from ..errors import GateRefused, NotFound, ServingError, SettingsError, StoreError
from ..evolve import dataset, gate
from ..evolve.curation import CURATION
from ..evolve.expansion import base_of
from ..evolve.live import unloading_afterwards
from ..evolve.probes import Probe, load_probes
from ..evolve.prompts import Words
from ..evolve.registry import ROLLED_BACK, AliasMoved, Registry
from ..evolve.sealing import ensure_loaded, intact
from ..evolve.types import NOTHING, Adapter, Cycle, Phase, PhaseCost, Snapshot, Verdict, recipe
from ..memory.store import MemoryStore
from ..serving.base import base_id, context_of, has_weights_vllm_ignores, load_config
from ..serving.engine import Engine
from ..settings import Settings
from .lock import NightRunning, night_lock

log = logging.getLogger("nightschool")
Progress = Callable[[str], None]
READINGS = JUDGINGS = 3  # of the memory, if something is forgotten each time; of a candidate, if what serves changes


def run(
    store: MemoryStore, registry: Registry, engine: Callable[[], Engine], settings: Settings, progress: Progress
) -> Cycle:
    """One night. Returns how it ended; what ended it too soon is recorded in the cycle and raised. Once its adapter
    serves the cycle is that of a promotion, whatever comes then.

    `engine` opens the one that answers: where it holds the base in this process, after training, which needs the room.
    """
    progress = _while_heard(progress)
    with night_lock(settings.home, store.database) as alone:
        registry.close_interrupted()
        cycle_id = registry.open_cycle()
        still_alone = partial(_require_alone, alone, registry, cycle_id)
        try:
            registry.sweep()
            registry.withdraw_tainted()
            why_not = _night(cycle_id, store, registry, engine, settings, progress, still_alone)
            registry.erase_tainted()  # what was trained on what was forgotten meanwhile
            registry.update_cycle(cycle_id, finished_utc=store.clock(), error=why_not)
        except BaseException as error:  # an unattended night must record why it ended, whatever it was
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            with suppress(StoreError):  # that would hide what ended it
                registry.update_cycle(cycle_id, finished_utc=store.clock(), error=why)
                registry.erase_tainted()
            if not (isinstance(error, Exception) and _has_promoted(registry, cycle_id)):
                raise
            log.warning("its adapter serves, but the night %s did not end well: %s", cycle_id, why)
        return registry.cycle(cycle_id)


def _has_promoted(registry: Registry, cycle_id: str) -> bool:
    with suppress(StoreError):
        return registry.cycle(cycle_id).outcome == "promoted"
    return False


def _require_alone(alone: Callable[[], None], registry: Registry, cycle_id: str) -> None:
    """NightRunning if the lock was lost and not had again, or another night ran before it was."""
    alone()
    if registry.cycle(cycle_id).finished_utc is not None:  # each closes those that it takes for killed
        raise NightRunning(
            f"another night ran after the lock of {cycle_id} was lost, so that it may have promoted something; run"
            " `nightschool night` again"
        )


def _while_heard(progress: Progress) -> Progress:
    """The same until it fails, and then nothing: a closed pipe or a broken printer ends no night."""
    heard = [progress]

    def say(line: str) -> None:
        try:
            for each in heard:
                each(line)
        except (Exception, SystemExit) as error:  # the latter is what rich makes of a closed pipe
            heard.clear()
            log.warning("the night goes on and is not told of any more: %s: %s", type(error).__name__, error)

    return say


def _night(
    cycle_id: str,
    store: MemoryStore,
    registry: Registry,
    opened: Callable[[], Engine],
    settings: Settings,
    progress: Progress,
    still_alone: Callable[[], None],
) -> str | None:
    """Why nothing was learnt, where nothing was."""
    probes = load_probes(settings.home)  # a mistake in them shows before the work, not after
    _require_context(settings)
    if settings.serving.engine != "local":
        opened()  # no more does a server that is down
    snapshot = _gather(store, registry, opened, settings, progress)
    left_out = [asdict(e) for e in snapshot.excluded]
    registry.update_cycle(cycle_id, snapshot_id=snapshot.id, excluded=left_out, trained=[])
    known = trained_before(snapshot, registry, settings, "dpo" if snapshot.pairs or snapshot.thumbs else "sft")
    if reason := nothing_to_learn(snapshot, known, store, registry, settings, probes, progress):
        return _told(f"{NOTHING}: {reason}", progress)
    if known:
        progress(f"adapter {known.id} was trained on this memory with these settings: it is only judged")
    candidate = known or _learn(snapshot, registry, settings, progress, cycle_id)
    if reason := _taken_out(candidate, registry):
        return _told(f"{NOTHING}: {reason}", progress)
    engine = opened()
    still_alone()  # training takes long, and so does judging
    with unloading_afterwards(engine, registry):
        for _ in range(JUDGINGS):
            seen = registry.newest_deployment()
            if reason := _taken_out(candidate, registry):  # meanwhile
                raise GateRefused(reason)
            verdict = _judge(candidate, snapshot, probes, store, registry, engine, settings, progress)
            registry.add_verdict(verdict, cycle_id)
            still_alone()
            with suppress(AliasMoved):
                _decide(candidate, verdict, registry, progress, cycle_id, seen)
                return None
            progress("something else serves by now")
    raise GateRefused(f"something else was put into service {JUDGINGS} times while {candidate.id} was judged")


def _require_context(settings: Settings) -> None:
    """SettingsError where rows may be longer than the base ever reads: the gate could not score what is as long."""
    most, context = settings.night.max_tokens, context_of(load_config(settings.serving.base))
    if most > context:
        raise SettingsError(f"night.max_tokens is {most}, and the context of the base takes at most {context}")


def _told(line: str, progress: Progress) -> str:
    progress(line)
    return line


def trained_before(snapshot: Snapshot, registry: Registry, settings: Settings, phase: Phase) -> Adapter | None:
    """The adapter that training in that phase would make again, if it may still serve."""
    night, tainted = recipe(settings.night), registry.tainted()
    would_be = snapshot.id, base_id(settings.serving.base), phase
    for adapter in registry.adapters():
        same = (adapter.snapshot_id, adapter.base_id, adapter.phase) == would_be
        if settings.serving.engine == "vllm" and has_weights_vllm_ignores(adapter.path):
            continue  # as it was trained for the engine in process
        if same and adapter.details.get("night") == night and adapter.id not in tainted and _whole(adapter, registry):
            return adapter
    return None


def _whole(adapter: Adapter, registry: Registry) -> bool:
    """Whether its weights and those of the phase before are as they were sealed."""
    before = [registry.adapter(adapter.parent_id)] if adapter.parent_id else []
    return all(intact(a.path) for a in (adapter, *before))


def nothing_to_learn(
    snapshot: Snapshot,
    known: Adapter | None,
    store: MemoryStore,
    registry: Registry,
    settings: Settings,
    probes: Sequence[Probe],
    progress: Progress,
) -> str | None:
    """Why this snapshot teaches nothing new; None if it does, or if what it taught is to be judged by new rules."""
    least = max(1, settings.dataset.min_liked)
    if len(snapshot.examples) < least:
        return (
            f"{len(snapshot.examples)} answers to learn (liked or corrected, those held out not counted), at least"
            f" {least} are needed"
        )
    incumbent = _expected(known, registry, settings)
    left = gate.unknown(snapshot.held_out, _taught(incumbent, store, registry, progress))
    if few := gate.too_little(left, settings.gate):
        seen = len(snapshot.held_out) - len(left)
        return f"nothing could be promoted, {'; '.join(few)}" + (f" ({seen} more taught what serves)" if seen else "")
    verdict = registry.verdict(known.id) if known else None
    if known is None or verdict is None or verdict.snapshot_id != snapshot.id:
        return None
    decided = verdict.criteria == gate.criteria(settings.gate, probes)
    decided = decided and (verdict.accepted or _serving(registry) in (verdict.incumbent_id, known.id))
    if decided and not (verdict.accepted and _left_behind(verdict, registry)):
        return f"adapter {known.id} was already trained on this memory with these settings, and judged"
    return _taken_out(known, registry)


def _taken_out(adapter: Adapter, registry: Registry) -> str | None:
    """Why a night does not put it into service: the gate accepted it, and somebody rolled back from it."""
    verdict, found = registry.verdict(adapter.id), adapter.id
    if verdict and verdict.accepted and found in _rolled_back(registry):
        return f"adapter {found} was taken out of service; `nightschool adapters promote {found}` puts it back"
    return None


def _serving(registry: Registry) -> str | None:
    live = registry.live()
    return live.id if live else None


def _left_behind(verdict: Verdict, registry: Registry) -> bool:
    """Whether a night that was killed after its verdict put nothing into service: what it judged never served, or is
    better than what serves, and nothing was switched since."""
    if verdict.candidate_id not in {d["adapter_id"] for d in registry.deployments()}:
        return True
    return verdict.incumbent_id == _serving(registry) and registry.undecided(verdict.candidate_id)


def _rolled_back(registry: Registry) -> set[str]:
    """What was taken out of service so, and was not put back since."""
    found: set[str] = set()
    for d in registry.deployments():
        if d["reason"].startswith(ROLLED_BACK):
            found.add(d["reason"].removeprefix(ROLLED_BACK))
        found.discard(d["adapter_id"])
    return found


def _gather(
    store: MemoryStore,
    registry: Registry,
    opened: Callable[[], Engine],
    settings: Settings,
    progress: Progress,
    tries: int = READINGS,
) -> Snapshot:
    progress("reading the memory")
    author = base_of(opened(), settings, progress) if settings.dataset.expand_share else None
    snapshot = dataset.freeze(store, settings, now=store.clock(), author=author)
    rows = dataset.to_rows(snapshot)
    registry.add_snapshot(snapshot, rows)
    try:
        # what is forgotten from now on finds the snapshot, and taints what it teaches, but not by an id of before
        dataset.Remembered(store).require(rows)
        dataset.require_held(store, snapshot.reader_ids)
    except NotFound:
        if tries == 1:
            raise
        progress("something was forgotten or answered meanwhile: reading again")
        return _gather(store, registry, opened, settings, progress, tries - 1)
    counts = ", ".join(f"{len(getattr(snapshot, part))} {part}" for part in ("examples", "pairs", "thumbs", "held_out"))
    progress(f"snapshot {snapshot.id}: {counts.replace('_', ' ')}")
    for excluded in snapshot.excluded:
        progress(f"  left out, {excluded.reason}: {len(excluded.interaction_ids)}")
    return snapshot


def _learn(snapshot: Snapshot, registry: Registry, settings: Settings, progress: Progress, cycle_id: str) -> Adapter:
    from ..evolve import dpo, sft

    examples, few = len(snapshot.examples), settings.night.few_rows
    if examples < few:
        progress(f"{examples} examples are few (night.few_rows is {few}): seen more often")
    trained = list[Adapter]()

    def keep(adapter: Adapter) -> Adapter:
        registry.add(adapter)
        trained.append(adapter)
        registry.update_cycle(cycle_id, trained=[asdict(PhaseCost.of(a)) for a in trained])
        return adapter

    if grounded := trained_before(snapshot, registry, settings, "sft"):
        progress(f"phase 1 was trained by a night that ended before phase 2: {grounded.id}")
    else:
        grounded = keep(sft.run(snapshot, settings, folder=registry.building(), progress=progress))
    if not (snapshot.pairs or snapshot.thumbs):
        progress("no pairs and no thumbs: phase 2 is left out")
        return grounded
    return keep(dpo.run(snapshot, grounded, settings, folder=registry.building(), progress=progress))


def _judge(
    candidate: Adapter,
    snapshot: Snapshot,
    probes: Sequence[Probe],
    store: MemoryStore,
    registry: Registry,
    engine: Engine,
    settings: Settings,
    progress: Progress,
) -> Verdict:
    grounded = registry.adapter(candidate.parent_id) if candidate.parent_id else None
    for adapter in filter(None, (candidate, grounded)):
        ensure_loaded(engine, adapter, settings.serving.parity_tolerance)
    incumbent = _incumbent(candidate, registry, engine, settings, progress)
    progress(f"judging against {incumbent.id if incumbent else 'the base'}")
    known = _taught(incumbent, store, registry, progress)
    if seen := len(snapshot.held_out) - len(gate.unknown(snapshot.held_out, known)):
        progress(f"  {seen} of {len(snapshot.held_out)} held-out answers do not count: they taught what serves")
    verdict = gate.judge(candidate, incumbent, snapshot, engine, settings.gate, probes, known)
    for reason in verdict.reasons:
        progress(f"  {reason}")
    if incumbent and any(m.name == "probes" and m.incumbent < 1 for m in verdict.measures):
        progress(f"  {incumbent.id}, which serves, breaks a probe as well; see `nightschool gate probes`")
    return verdict


def _taught(adapter: Adapter | None, store: MemoryStore, registry: Registry, progress: Progress) -> Set[Words]:
    """What it was taught, in the words in which answers are judged now; nothing for the base."""
    if adapter is None:
        return frozenset()
    rows = [
        {**row, "curation": CURATION}
        for row in registry.snapshot_rows(adapter.snapshot_id)
        if row["part"] != "held_out"
    ]
    try:
        return dataset.taught(dataset.from_rows(store, rows))
    except NotFound:  # forgotten since it was looked up, so it will not serve much longer
        progress(f"  what {adapter.id} was taught is not all held any more: it is judged on all that is held out")
        return frozenset()


def _incumbent(
    candidate: Adapter, registry: Registry, engine: Engine, settings: Settings, progress: Progress
) -> Adapter | None:
    """What serves, loaded; what served before it where it cannot be compared with; None is the base."""
    for found in _in_service(candidate, registry):
        try:
            ensure_loaded(engine, found, settings.serving.parity_tolerance)
            return found
        except (GateRefused, ServingError) as error:  # damaged, of another base, or more than the engine takes
            engine.score([[{"role": "user", "content": "?"}]], ["!"])  # an engine that is down ends the night
            progress(f"{found.id} cannot be compared with: {error}")
    return None


def _expected(known: Adapter | None, registry: Registry, settings: Settings) -> Adapter | None:
    """The incumbent, as far as can be told before training, which needs the room of the engine."""
    used = base_id(settings.serving.base)
    return next((a for a in _in_service(known, registry) if a.base_id == used and intact(a.path)), None)


def _in_service(candidate: Adapter | None, registry: Registry) -> Iterator[Adapter]:
    """What serves, then what served before it, and so on until the base; not `candidate` itself.

    Where that serves, it is judged again, by new rules: against what it took over from.
    """
    return (a for a in registry.in_service() if candidate is None or a.id != candidate.id)


def _decide(
    candidate: Adapter, verdict: Verdict, registry: Registry, progress: Progress, cycle_id: str, seen: int
) -> None:
    serves = _serving(registry) == candidate.id
    if verdict.accepted and not serves:
        registry.promote(candidate.id, cycle_id, after=seen)
    progress(f"{'promoted' if verdict.accepted else 'rejected'} {candidate.id}")
    if serves and not verdict.accepted:
        progress("  it is what serves now; `nightschool adapters rollback` takes it out of service")
