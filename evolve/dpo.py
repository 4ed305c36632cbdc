"""Phase 2, preference: what people preferred, weighted by how often such is asked; from the adapter of phase 1.

    Σ w_i·[−log σ(β(Δ_i,chosen − Δ_i,rejected))]   over pairs
  + Σ w_i·[−log σ(±β'·Δ_i)]                        over thumbs, each over the number of rows
  + α·(the objective of phase 1, over its examples and the base's own text)

with Δ = log π − log π_ref and π_ref the adapter that phase 1 made, whose log-probabilities are computed once before
training. The last term keeps what phase 1 taught and what the base could say before: without it the margin grows as
well by making both answers unlikely. It is phase 1's own objective, and not the NLL of the chosen answers, because an
answer is chosen as often as there are worse ones, and those who ask most would drown the others
(bench/results/learning.md). What is saved lies `interpolation` of the way from phase 1 to what was trained: it answers
as people like it, and forgets less of what phase 1 taught (bench/results/trial-training.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..settings import NightSettings, Settings
from .types import Adapter, Pair, Snapshot, Thumb

if TYPE_CHECKING:
    from torch import Tensor

    from .lessons import Kind, Lesson


def run(
    snapshot: Snapshot, start: Adapter, settings: Settings, *, folder: Path, progress: Callable[[str], None]
) -> Adapter:
    """Train on pairs and thumbs from `start`, which is also the reference, and seal the adapter, from `folder`."""
    from . import sft
    from .replay import sample
    from .trainer import adapter_weights, interpolate, replay_rows, save, student, train

    night = settings.night
    pupil = student(settings, start.path)
    if pupil.base_id != start.base_id:
        raise TrainingError(f"phase 2: {start.id} was trained on {start.base_id}, but serving.base is {pupil.base_id}")
    lessons, left_out = lessons_of(snapshot, pupil.tokenizer, night.max_tokens)
    if not lessons:
        raise TrainingError(
            f"phase 2: no pair or thumb of {len(snapshot.pairs)} and {len(snapshot.thumbs)} fits"
            f" night.max_tokens = {night.max_tokens}"
        )
    examples, _ = sft.lessons_of(snapshot.examples, pupil.tokenizer, night.max_tokens)
    own = sample(pupil, replay_rows(night, len(lessons)), night.seed + 1, progress)
    replayed = sft.replay_lessons(own, pupil.tokenizer, night)
    grounded = adapter_weights(pupil.model)
    done = train(
        pupil,
        [*lessons, *examples, *replayed],
        objective(night),
        settings,
        name="preference",
        epochs=night.preference_epochs,
        rate=night.preference_lr,
        progress=progress,
        references=True,
    )
    interpolate(pupil.model, grounded, night.interpolation)
    details = {**done, "too_long": left_out, "replay": len(replayed)}
    return save(pupil, folder, settings, snapshot_id=snapshot.id, phase="dpo", parent_id=start.id, details=details)


def lessons_of(snapshot: Snapshot, tokenizer: Any, max_tokens: int) -> tuple[list[Lesson], int]:
    """Pairs and thumbs as lessons under one scale of weights, and how many do not fit."""
    from .lessons import Lesson, encode
    from .loss import unit_mean

    given: list[Pair | Thumb] = [*snapshot.pairs, *snapshot.thumbs]
    rows = [row for row in given if row.weight > 0]
    found = [(row, encode(tokenizer, row.prompt, _answers(row), max_tokens)) for row in rows]
    kept = [(row, ids) for row, ids in found if ids]
    weights = unit_mean([row.weight for row, _ in kept])
    lessons = [Lesson(*ids, _kind(row), w) for (row, ids), w in zip(kept, weights, strict=True)]
    return lessons, len(found) - len(kept)


def _answers(row: Pair | Thumb) -> list[str]:
    return [row.chosen, row.rejected] if isinstance(row, Pair) else [row.completion]


def _kind(row: Pair | Thumb) -> Kind:
    if isinstance(row, Pair):
        return "pair"
    return "liked" if row.liked else "disliked"


def objective(night: NightSettings) -> Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]:
    """The loss of this phase. `totals` counts the tokens imitated and the rows of the whole optimiser batch."""
    from . import sft
    from .loss import weighted_bco_loss, weighted_dpo_loss

    def loss(logps: Tensor, batch: dict[str, Tensor], totals: Tensor) -> Tensor:
        reference, weight, rows = batch["reference"], batch["weight"], totals[1].clamp(min=1)
        chosen, rejected, thumb = batch["chosen"], batch["rejected"], batch["thumb"]
        pairs = weighted_dpo_loss(
            logps[chosen], logps[rejected], reference[chosen], reference[rejected], weight[chosen], night.beta, rows
        )
        thumbs = weighted_bco_loss(
            logps[thumb], reference[thumb], batch["liked"], weight[thumb], night.thumb_beta, rows
        )
        return pairs + thumbs + night.sft_term * sft.objective(logps, batch, totals)

    return loss
