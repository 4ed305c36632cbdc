"""Phase 1, grounding: imitate the answers that satisfied, weighted by how often such are asked and how well they did.

Minimises `Σ w_i·NLL(y_i|x_i) / Σ w_i` over a fresh LoRA on the base, with some of the base's own text among the rows,
on which KL(base ‖ policy), times `replay_weight`, takes the place of the NLL, over the tokens of both, so that it does
not forget. The invariant: the adapter is a pure function of (base, snapshot, settings, seed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..settings import NightSettings, Settings
from .types import Adapter, Example, Snapshot

if TYPE_CHECKING:
    from torch import Tensor

    from .lessons import Lesson


def run(snapshot: Snapshot, settings: Settings, *, folder: Path, progress: Callable[[str], None]) -> Adapter:
    """Train on `snapshot.examples` and seal the adapter, from `folder`."""
    from .replay import sample
    from .trainer import replay_rows, save, student, suited, train

    night = suited(settings.night, snapshot)
    pupil = student(settings)
    lessons, left_out = lessons_of(snapshot.examples, pupil.tokenizer, night.max_tokens)
    if not lessons:
        rows = len(snapshot.examples)
        raise TrainingError(f"phase 1: none of {rows} examples fits night.max_tokens = {night.max_tokens}")
    own = sample(pupil, replay_rows(night, len(lessons)), night.seed, progress)
    replayed = replay_lessons(own, pupil.tokenizer, night)
    done = train(
        pupil,
        [*lessons, *replayed],
        objective,
        settings,
        name="sft",
        epochs=night.sft_epochs,
        rate=night.sft_lr,
        progress=progress,
        references=False,
    )
    details = {**done, "too_long": left_out, "replay": len(replayed)}
    return save(pupil, folder, settings, snapshot_id=snapshot.id, phase="sft", parent_id=None, details=details)


def lessons_of(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> tuple[list[Lesson], int]:
    """The examples as lessons, and how many do not fit. A row of weight 0 is left out, as its weight says."""
    from .lessons import Lesson, encode
    from .loss import unit_mean

    found = [(e, encode(tokenizer, e.prompt, [e.completion], max_tokens)) for e in examples if e.weight > 0]
    kept = [(e, ids) for e, ids in found if ids]
    weights = unit_mean([e.weight for e, _ in kept])
    return [Lesson(*ids, "imitate", w) for (_, ids), w in zip(kept, weights, strict=True)], len(found) - len(kept)


def replay_lessons(own: Sequence[Example], tokenizer: Any, night: NightSettings) -> list[Lesson]:
    """The base's own text as lessons that hold the adapter to what the base would say there."""
    lessons, _ = lessons_of(own, tokenizer, night.max_tokens)
    return [replace(lesson, kind="replay", weight=night.replay_weight) for lesson in lessons]


def objective(logps: Tensor, batch: dict[str, Tensor], totals: Tensor) -> Tensor:
    """Nats per token of what is imitated or replayed; `totals` counts its tokens in the whole optimiser batch."""
    from .loss import weighted_sft_loss

    grounding = batch["imitated"] | batch["replayed"]
    return weighted_sft_loss(logps[grounding], batch["weight"][grounding], (totals[0] + totals[2]).clamp(min=1))
