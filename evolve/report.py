"""What one night was: what came in, what it taught, what the gate measured, what was left out, what it cost.

Everything is read from what the night left behind, so a report can be made at any later time; what was forgotten since
is missing from it. Of what people wrote it holds the words that name a topic, masked; examples are answered anew when
they are asked for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from ..content import Message
from ..errors import NotFound
from ..memory.store import MemoryStore
from ..memory.topics import label_of
from ..serving.engine import Engine, Sampling
from . import dataset
from .live import unloading_afterwards
from .privacy import mask
from .registry import Registry
from .sealing import ensure_loaded
from .types import INTERRUPTED, Cycle, Judged, Measure, PhaseCost

TAUGHT = ("examples", "pairs", "thumbs")


@dataclass(frozen=True)
class TaughtTopic:
    label: str
    share: float  # of the weight of all rows
    rows: int


@dataclass(frozen=True)
class Night:
    """One point of the curve over nights: what the candidate reached, by measure."""

    cycle_id: str
    started_utc: float
    outcome: str
    measures: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    cycle: Cycle
    outcome: str
    minutes: float | None
    parts: Mapping[str, int]  # rows by part of the snapshot
    judges: int  # users, or sessions, whose answers were held out
    new_turns: int | None  # in it, that no earlier night learnt from; None where it ended before it read the memory
    incumbent_id: str | None  # None is the base, or no verdict
    withdrawn: bool  # what taught its candidate was forgotten since
    topics: tuple[TaughtTopic, ...]
    measures: tuple[Measure, ...]
    reasons: tuple[str, ...]
    excluded: tuple[tuple[str, int], ...]  # reason, interactions
    phases: tuple[PhaseCost, ...] | None  # none if it made no new adapter; None where that is not on record
    nights: tuple[Night, ...]

    @property
    def taught(self) -> bool:
        """Whether an adapter was made of what was gathered."""
        return bool(self.cycle.candidate_id or self.phases)


@dataclass(frozen=True)
class Compared:
    """A held-out prompt, as the incumbent and the candidate answer it."""

    prompt: tuple[Message, ...]
    before: str
    after: str


def report(store: MemoryStore, registry: Registry, cycle_id: str | None = None) -> Report:
    """Of the night `cycle_id`, or of the latest. NotFound if there is none."""
    cycle = registry.latest_cycle() if cycle_id is None else registry.cycle(cycle_id)
    rows = registry.snapshot_rows(cycle.snapshot_id) if cycle.snapshot_id else []
    verdict, nights = registry.cycle_verdict(cycle), _up_to(registry, cycle)
    excluded, trained = registry.cycle_excluded(cycle), registry.cycle_trained(cycle)
    return Report(
        cycle=cycle,
        outcome=cycle.outcome,
        minutes=_minutes(cycle),
        parts=dict(Counter(row["part"] for row in rows)),
        judges=len({row["cluster"] for row in rows if row["part"] == "held_out"}),
        new_turns=_new_turns(registry, cycle, nights[:-1]),
        incumbent_id=verdict.incumbent_id if verdict else None,
        withdrawn=cycle.candidate_id in registry.tainted(),
        topics=_topics(store, rows),
        measures=verdict.measures if verdict else (),
        reasons=verdict.reasons if verdict else (),
        excluded=tuple((e.reason, len(e.interaction_ids)) for e in excluded),
        phases=None if trained is None else tuple(trained),
        nights=tuple(_night(registry, night) for night in nights),
    )


def _up_to(registry: Registry, cycle: Cycle) -> list[Cycle]:
    """The nights that began before it, and it."""
    return [*takewhile(lambda night: night.id != cycle.id, registry.cycles()), cycle]


def _minutes(cycle: Cycle) -> float | None:
    """None while it runs, and where when it ended is not known: it was interrupted, or the clock was set back."""
    if cycle.finished_utc is None or cycle.error == INTERRUPTED or cycle.finished_utc < cycle.started_utc:
        return None
    return (cycle.finished_utc - cycle.started_utc) / 60


def _new_turns(registry: Registry, cycle: Cycle, earlier: Sequence[Cycle]) -> int | None:
    """Turns that no earlier night made an adapter of."""
    made = sorted({n.snapshot_id for n in earlier if n.snapshot_id and n.candidate_id})
    return registry.new_sources(cycle.snapshot_id, made) if cycle.snapshot_id else None


def _topics(store: MemoryStore, rows: Sequence[Mapping[str, Any]]) -> tuple[TaughtTopic, ...]:
    """What was taught about what, the weightiest first; a row belongs to the topic of its first turn."""
    taught = [(row["interaction_ids"][0], float(row["weight"])) for row in rows if row["part"] in TAUGHT]
    ids = {interaction_id for interaction_id, _ in taught}
    topic_of = dict.fromkeys(store.held(ids), "no request")  # as a turn of the system alone
    topic_of |= {i: _masked_label(request) for i, request in store.topic_requests(ids).items()}
    weights: dict[str, list[float]] = defaultdict(list)
    for interaction_id, weight in taught:
        weights[topic_of.get(interaction_id, "forgotten since")].append(weight)
    total = sum(weight for _, weight in taught) or 1.0
    made = (TaughtTopic(label, sum(found) / total, len(found)) for label, found in weights.items())
    return tuple(sorted(made, key=lambda topic: (-topic.share, topic.label)))


@lru_cache(maxsize=4096)
def _masked_label(request: str) -> str:
    """Of the masked request: once cut into words, an address looks like any other."""
    return label_of(mask([request])[0])


def _night(registry: Registry, cycle: Cycle) -> Night:
    verdict = registry.cycle_verdict(cycle)
    measures = {m.name: m.candidate for m in verdict.measures} if verdict else {}
    return Night(cycle.id, cycle.started_utc, cycle.outcome, measures)


def side_by_side(
    store: MemoryStore, registry: Registry, engine: Engine, cycle: Cycle, count: int, tolerance: float
) -> list[Compared]:
    """`count` held-out prompts of that night, one a user or session, answered by the incumbent and by the candidate.

    NotFound if what one of them learnt from, or what is asked, was forgotten since.
    """
    if cycle.candidate_id is None or cycle.snapshot_id is None or not count:
        return []
    verdict = registry.cycle_verdict(cycle)
    incumbent = verdict.incumbent_id if verdict else None
    tainted = {incumbent, cycle.candidate_id} & registry.tainted().keys()
    if tainted:
        raise NotFound(f"{', '.join(sorted(filter(None, tainted)))} may answer nothing any more: see `adapters list`")
    held_out = dataset.from_rows(store, registry.snapshot_rows(cycle.snapshot_id)).held_out
    prompts = [row.prompt for row in _one_a_cluster(held_out)[:count]]
    sampling = Sampling(max_tokens=48)
    with unloading_afterwards(engine, registry):
        for adapter_id in filter(None, (incumbent, cycle.candidate_id)):
            ensure_loaded(engine, registry.adapter(adapter_id), tolerance)
        before, after = (
            engine.generate(prompts, adapter=a, sampling=sampling) for a in (incumbent, cycle.candidate_id)
        )
    return [Compared(p, b, a) for p, b, a in zip(prompts, before, after, strict=True)]


def _one_a_cluster(held_out: Sequence[Judged]) -> list[Judged]:
    return list({row.cluster: row for row in held_out}.values())
