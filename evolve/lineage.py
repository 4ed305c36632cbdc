"""The arrows backwards: from an answer to the adapter that gave it, to the conversations that taught it.

`verify` re-derives what can be re-derived and returns what disagrees; an empty list means sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import merge
from itertools import accumulate
from operator import itemgetter
from typing import Any, Literal

from ..errors import GateRefused, StoreError
from ..memory.conversations import answered_since
from ..memory.store import MemoryStore
from ..memory.types import Feedback, Interaction, Satisfaction
from ..serving.engine import WEIGHTS
from . import dataset
from .reception import met
from .registry import Registry
from .sealing import read_adapter, weights_to_account_for
from .types import Adapter, Verdict


@dataclass(frozen=True)
class Source:
    """A conversation that taught an adapter, or that it was judged on. Texts are left out: they are asked for by id."""

    user_id: str
    session_id: str
    interaction_ids: tuple[str, ...]


@dataclass(frozen=True)
class Lineage:
    """Where an adapter comes from. `sources` taught it, by a row or through the Censor's
    reader, `held_out` are what else it was judged on, and `forgotten` are
    interactions of either that memory no longer holds."""

    adapter: Adapter
    parents: tuple[Adapter, ...]
    verdict: Verdict | None
    tainted: str | None
    sources: tuple[Source, ...]
    held_out: tuple[Source, ...]
    forgotten: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        for adapter in (data["adapter"], *data["parents"]):
            adapter["path"] = str(adapter["path"])
        return data


@dataclass(frozen=True)
class Why:
    """Why an answer came out as it did, and how it was met.

    `lineage` is None where the base answered, something else did, or an adapter of another home, which `interaction`
    names.
    """

    interaction: Interaction
    satisfaction: Satisfaction
    memories: tuple[dict[str, Any], ...]
    lineage: Lineage | None
    feedback: tuple[Feedback, ...] = ()  # what was said of it and done with it, in order

    def to_json(self) -> dict[str, Any]:
        lineage = self.lineage.to_json() if self.lineage else None
        said = {"interaction": asdict(self.interaction), "satisfaction": asdict(self.satisfaction)}
        given = [asdict(feedback) for feedback in self.feedback]
        return said | {"feedback": given, "memories": list(self.memories), "lineage": lineage}


def why(store: MemoryStore, registry: Registry, interaction_id: str) -> Why:
    """What an answer was made from, the memories it was shown and the adapter that spoke, and how it was met."""
    interaction = store.interaction(interaction_id)
    known = store.memories(interaction.memory_ids)
    shown = tuple(
        {"id": i, "text": known[i].text, "source_ids": known[i].source_ids}
        if i in known
        else {"id": i, "forgotten": True}
        for i in interaction.memory_ids
    )
    adapter_id = interaction.adapter_id
    satisfaction = met(store, interaction_id, store.settings.censor)
    known_here = adapter_id in {a.id for a in registry.adapters()}  # an import brings answers of adapters that are not
    found = lineage(store, registry, adapter_id) if adapter_id and known_here else None
    return Why(interaction, satisfaction, shown, found, tuple(store.feedback([interaction_id]).get(interaction_id, ())))


def lineage(store: MemoryStore, registry: Registry, adapter_id: str) -> Lineage:
    """The adapter, its ancestors, its verdict and the conversations it was made of."""
    adapter = registry.adapter(adapter_id)
    parents: list[Adapter] = []
    while (parents[-1] if parents else adapter).parent_id:
        parents.append(registry.adapter((parents[-1] if parents else adapter).parent_id or ""))
    rows, named = registry.snapshot_rows(adapter.snapshot_id), registry.sources(adapter.snapshot_id)
    taught = {i for row in rows if row["part"] != "held_out" for i in row["interaction_ids"]}
    taught |= registry.reader_ids(adapter.snapshot_id)  # through the reader
    judged = {i for row in rows if row["part"] == "held_out" for i in row["interaction_ids"]}
    interactions = list(store.interactions())
    # `named` have the ids of now where a turn was answered since, rows those of then
    ids_now = answered_since(named | taught | judged, interactions)
    wanted, taught, judged = ({ids_now.get(i, i) for i in ids} for ids in (named, taught, judged))
    taught |= wanted - judged  # of before it was kept what the reader was fitted on, which is in no row
    held = [i for i in interactions if i.id in wanted]
    return Lineage(
        adapter=adapter,
        parents=tuple(parents),
        verdict=registry.verdict(adapter.id),
        tainted=registry.tainted().get(adapter.id),
        sources=_sources(i for i in held if i.id in taught),
        held_out=_sources(i for i in held if i.id not in taught),
        forgotten=tuple(sorted(wanted - {i.id for i in held})),
    )


def _sources(interactions: Iterable[Interaction]) -> tuple[Source, ...]:
    sessions: dict[tuple[str, str], list[str]] = {}
    for interaction in interactions:
        sessions.setdefault((interaction.user_id, interaction.session_id), []).append(interaction.id)
    return tuple(Source(user, session, tuple(ids)) for (user, session), ids in sorted(sessions.items()))


@dataclass(frozen=True)
class Event:
    """Something that decided what serves, or could have. `id` is a night's, that of the adapter that served from then
    on (None: the base), or a receipt's; `what` never says whose words it was about."""

    created_utc: float
    kind: Literal["night", "switch", "forgotten"]
    id: str | None
    what: str


def events(registry: Registry) -> list[Event]:
    """Nights as they began, switches of what serves and what was forgotten, oldest first.

    Each kind in the order of its record, so that the last switch is what serves though a clock was set back.
    """
    nights = [Event(c.started_utc, "night", c.id, c.outcome) for c in registry.cycles()]
    switches = [Event(d["created_utc"], "switch", d["adapter_id"], d["reason"]) for d in registry.deployments()]
    forgotten = [Event(r["created_utc"], "forgotten", str(r["id"]), _forgotten(r)) for r in registry.receipts()]
    timed = merge(*map(_with_latest, (nights, switches, forgotten)), key=itemgetter(0))
    return [event for _, event in timed]


def _with_latest(recorded: Sequence[Event]) -> Iterable[tuple[float, Event]]:
    """Each with the latest time until then, which goes on where a clock was set back."""
    return zip(accumulate((event.created_utc for event in recorded), max), recorded, strict=True)


def _forgotten(receipt: Mapping[str, Any]) -> str:
    counts = (("turns", "interactions"), ("memories", "memories"), ("ratings", "feedback"))
    told = ", ".join(f"{receipt[key]} {name}" for name, key in counts)
    withdrawn = ", ".join(receipt["tainted_adapters"])
    unfinished = "" if receipt["finished_utc"] else "; some of their bytes are not erased yet"
    return told + (f"; weights withdrawn: {withdrawn}" if withdrawn else "") + unfinished


def verify(store: MemoryStore, registry: Registry) -> list[str]:
    """Everything that disagrees, from the memory to the adapter in service; empty = sound."""
    return [*store.verify(), *_bad_snapshots(store, registry), *_bad_adapters(registry)]


def _bad_snapshots(store: MemoryStore, registry: Registry) -> list[str]:
    """Snapshots that no longer hash to their id though nothing they are made of was forgotten on record."""
    tainted = registry.tainted()
    adapters = registry.adapters()
    trained_on = {a.snapshot_id for a in adapters} - {a.snapshot_id for a in adapters if a.id in tainted}
    found: list[str] = []
    remembered = dataset.Remembered(store)
    for snapshot_id in filter(trained_on.__contains__, registry.snapshot_ids()):
        try:
            derived = remembered.again(registry.snapshot_rows(snapshot_id)).id
        except StoreError as error:
            derived = str(error)
        if derived != snapshot_id:
            found.append(f"snapshot {snapshot_id} re-derives as {derived}")
    return found


def _bad_adapters(registry: Registry) -> list[str]:
    found: list[str] = []
    live, tainted = registry.live(), registry.tainted()
    for adapter in registry.adapters():
        if not weights_to_account_for(adapter, tainted):
            continue  # erased with what taught them, or pruned
        if adapter.id in tainted:
            found.append(
                f"adapter {adapter.id} is withdrawn, but its weights are not erased; delete {adapter.path / WEIGHTS}"
            )
            continue
        try:
            on_disk = read_adapter(adapter.path)
        except GateRefused as error:
            found.append(f"adapter {error}")
            continue
        if on_disk.id != adapter.id:
            found.append(f"adapter {adapter.id}: its manifest names {on_disk.id}")
        elif (on_disk.snapshot_id, on_disk.parent_id) != (adapter.snapshot_id, adapter.parent_id):
            found.append(f"adapter {adapter.id}: its manifest and the database name different origins")
    verdict = registry.verdict(live.id) if live else None
    if live and (verdict is None or not verdict.accepted):
        why = "was rejected when it was judged again" if registry.was_accepted(live.id) else "was never accepted"
        found.append(f"adapter {live.id} is in service and {why}; `nightschool adapters rollback` takes it out")
    return found
