"""The nouns of learning: frozen values. `Snapshot` and `Adapter` are named by the hash of their content.

`interaction_ids` of a row: first the interaction that was answered (of a pair of two interactions, the chosen answer's,
then the rejected one's, whose prompt it is if the request was rephrased or the reply regenerated), then every other
whose words or judgement are in it: duplicates, earlier turns, sources of notes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..content import Message, content_id, plain
from ..settings import NightSettings

Phase = Literal["sft", "dpo"]
INTERRUPTED = "interrupted"  # the error of a night that ended without a word
NOTHING = "nothing to learn"  # begins the error of a night that taught nothing, and is no failure
RECIPE = 5  # to be raised with any change to what the same rows, base and settings are made into
TOLD = "told, and decides nothing"  # the rule of a measure that has none
PairSource = Literal["correction", "regeneration", "contrast", "rephrasing", "synthetic"]
Prompt = tuple[Message, ...]


def recipe(night: NightSettings) -> dict[str, Any]:
    """What an adapter was trained by; it stands in its details, and another one trains anew."""
    return {**plain(asdict(night)), "recipe": RECIPE}


@dataclass(frozen=True)
class Example:
    """An answer worth imitating (phase 1)."""

    prompt: Prompt
    completion: str
    weight: float
    interaction_ids: tuple[str, ...]
    correction_id: str | None = None  # the feedback whose correction is the completion


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred (phase 2)."""

    prompt: Prompt
    chosen: str
    rejected: str
    weight: float
    interaction_ids: tuple[str, ...]
    how: PairSource
    correction_id: str | None = None  # the feedback whose correction is `chosen`
    draft_ids: tuple[str, ...] = ()  # of a synthetic pair: the drafts that are `chosen` and `rejected`


@dataclass(frozen=True)
class Thumb:
    """One answer that was liked or not, with nothing to compare it with (phase 2)."""

    prompt: Prompt
    completion: str
    liked: bool
    weight: float
    interaction_ids: tuple[str, ...]
    correction_id: str | None = None  # the feedback whose correction is the completion


@dataclass(frozen=True)
class Judged:
    """A held-out answer with the satisfaction it met. `cluster` is the number of the user or session to draw."""

    prompt: Prompt
    completion: str
    liked: bool
    cluster: str
    interaction_ids: tuple[str, ...]
    correction_id: str | None = None  # the feedback whose correction is the completion


@dataclass(frozen=True)
class Excluded:
    """Why an answer to each of these interactions is not in the snapshot; what corrects that answer may be."""

    reason: str
    interaction_ids: tuple[str, ...]


def without_nothing(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row; a pair that is not synthetic has those, and the id, that it had before there were any."""
    return {name: value for name, value in row.items() if name != "draft_ids" or value}


@dataclass(frozen=True)
class Snapshot:
    """The frozen data of one night. Not part of the id are `excluded`, which is a report, `censor`, the version of the
    Censor that scored what is in it (empty for one read back by reference), and `reader_ids`, the interactions
    whose words the reader was fitted on whose guesses are in it."""

    examples: tuple[Example, ...]
    pairs: tuple[Pair, ...]
    thumbs: tuple[Thumb, ...]
    held_out: tuple[Judged, ...]
    excluded: tuple[Excluded, ...] = ()
    censor: str = ""
    reader_ids: tuple[str, ...] = ()
    id: str = field(init=False)

    def __post_init__(self) -> None:
        parts = {
            name: [without_nothing(asdict(row)) for row in getattr(self, name)]
            for name in ("examples", "pairs", "thumbs", "held_out")
        }
        object.__setattr__(self, "id", content_id(parts))

    def interaction_ids(self) -> set[str]:
        """Every interaction that was trained on or judged on."""
        rows: tuple[Example | Pair | Thumb | Judged, ...] = (*self.examples, *self.pairs, *self.thumbs, *self.held_out)
        return {i for row in rows for i in row.interaction_ids}


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA in `path`, named by the hash of its weights."""

    id: str
    base_id: str
    snapshot_id: str
    phase: Phase
    parent_id: str | None
    path: Path
    created_utc: float
    details: dict[str, Any] = field(default_factory=dict)  # settings, losses, seconds, peak memory


@dataclass(frozen=True)
class PhaseCost:
    """What one night trained in one phase, and what that took."""

    adapter_id: str
    phase: Phase
    rows: int  # that were seen, with what the base wrote itself
    replayed: int  # of them the base's own
    epochs: float  # passes over what was gathered
    asked: float  # passes that were to be made; more than `epochs` where `night.budget_minutes` had no room
    steps: int
    seconds: float
    peak_mb: int

    @classmethod
    def of(cls, adapter: Adapter) -> PhaseCost:
        d = adapter.details
        passes = d["plan"]["epochs"], d["asked"]
        return cls(adapter.id, adapter.phase, d["rows"], d["replay"], *passes, d["steps"], d["seconds"], d["peak_mb"])


@dataclass(frozen=True)
class Measure:
    """One quantity for incumbent and candidate. `low` and `high` bound `change` (candidate − incumbent).

    Of `probe_nll` the change is a share of the incumbent's. Where nothing was drawn anew both bounds are the change.
    """

    name: str
    incumbent: float
    candidate: float
    change: float
    low: float
    high: float
    passed: bool
    rule: str

    @property
    def decides(self) -> bool:
        return self.rule != TOLD

    @property
    def worded(self) -> tuple[str, str, str]:
        """The change and its bounds for people; of `probe_nll` they are shares."""
        form = "{:+.1%}" if self.name == "probe_nll" else "{:+.3f}"
        change, low, high = (form.format(x) for x in (self.change, self.low, self.high))
        return change, low, high


@dataclass(frozen=True)
class Verdict:
    candidate_id: str
    incumbent_id: str | None  # None = the base
    snapshot_id: str
    accepted: bool
    measures: tuple[Measure, ...]
    reasons: tuple[str, ...]
    criteria: str = ""  # id of the gate's settings and the operator's probes; none in verdicts of old


@dataclass(frozen=True)
class Cycle:
    """One night. Its outcome follows from what exists; nothing records a status."""

    id: str
    started_utc: float
    finished_utc: float | None
    snapshot_id: str | None
    candidate_id: str | None
    accepted: bool | None
    error: str | None

    @property
    def outcome(self) -> str:
        if self.error and not self.error.startswith(NOTHING):
            return "failed"
        if self.accepted is not None:
            return "promoted" if self.accepted else "rejected"
        return NOTHING if self.finished_utc else "running"
