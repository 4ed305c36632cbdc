"""What both phases share: the student (base and LoRA), the batches, one trainer, and how an adapter is saved.

The trainer is trl's SFTTrainer with a loss of ours, for both phases: DPOTrainer knows only pairs and KTOTrainer only
thumbs, and a night mixes the two with an NLL term under one optimiser. The invariant: a run either changes the
adapter with finite losses and gradients, or raises TrainingError; it never returns an adapter that learnt nothing.
"""

from __future__ import annotations

import gc
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import SettingsError, TrainingError
from ..serving import parity
from ..serving.base import base_id, choose_device, expert_share, load_base, load_tokenizer, lora_targets
from ..serving.chat import answer_ids, on_day, prompt_ids
from ..serving.checking import is_by_position
from ..serving.engine import WEIGHTS
from ..serving.lora import as_named
from ..settings import NightSettings, Settings
from . import sealing
from .batches import Batch, anchored_logps, collate, logps
from .lessons import PREFERRED, Lesson, Passage, Plan, lay_out, plan
from .types import Adapter, Phase, Snapshot, recipe

try:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import PrinterCallback, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    raise TrainingError(f"training needs {error.name}; run `pip install 'nightschool[train]'`") from error

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str], None]
Objective = Callable[["Tensor", Batch, "Tensor"], "Tensor"]  # (A,) log-probabilities, batch, totals → loss

# Parameter-tokens a minute, forward and backward, with LoRA. The plan needs a number, not a clock, so that a night's
# result does not depend on how busy the machine is. Of a CPU, roughly: one
# thread with AVX-512 beside another, by the seconds of phase 2 in bench/loop.py. Of a card: not measured.
SPEED = {"cpu": 6e11, "cuda": 1.5e15}
PHASE_SHARE = 0.4  # of the budget for each phase; the rest is for replay, references and the gate
WARMUP_SHARE = 0.1
LONG = 4096  # tokens; more than any prompt of serving.parity
MOST_REPEATS = 18.0  # of phase 1, however few the examples


# -- the student ---


@dataclass
class Student:
    """A base with a LoRA adapter on it, ready to train."""

    model: PeftModel
    tokenizer: Any
    base_id: str
    device: str

    @cached_property
    def merges(self) -> bool:
        """Whether all its layers take a tree mask: sdpa, without windows, chunks or states."""
        config = self.model.config
        return config.get_text_config()._attn_implementation == "sdpa" and is_by_position(config)

    @property
    def pad(self) -> int:
        token = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def tokens_per_minute(self) -> float:
        return SPEED["cuda" if self.on_gpu else "cpu"] / active_parameters(self.model)


def student(settings: Settings, start: Path | None = None) -> Student:
    """The base with a fresh adapter, or with the one in `start`."""
    night, spec = settings.night, settings.serving.base
    device = _training_device(settings.serving.device)
    gc.collect()  # the trainer of the phase before knows itself, so its model is still there
    torch.cuda.empty_cache()
    if settings.serving.threads:
        torch.set_num_threads(settings.serving.threads)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    base = load_base(spec, dtype=dtype, device=device)
    set_seed(night.seed)
    if start is None:
        targets = lora_targets(base.config, night.lora_targets, settings.serving.engine)
        shape = {"r": night.lora_rank, "lora_alpha": night.lora_alpha, "lora_dropout": 0.0}
        with as_named(base):
            model = get_peft_model(base, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **shape))
    else:
        with as_named(base):
            model = PeftModel.from_pretrained(base, str(start), is_trainable=True)
    model.config.use_cache = False
    return Student(model, load_tokenizer(spec), base_id(spec), device)


def _training_device(wanted: str) -> str:
    """SettingsError for a second card: transformers trains on the first one that it sees."""
    device = choose_device(wanted)
    kind, _, number = device.partition(":")
    if kind == "cuda" and number not in ("", "0"):
        raise SettingsError(
            f"serving.device is {wanted!r}, and a night trains on the first card it sees; set serving.device to cuda"
            f" and run it with CUDA_VISIBLE_DEVICES={number}"
        )
    return device


def active_parameters(model: PeftModel) -> float:
    """Parameters that one token meets: of the routed experts only the share that is chosen."""
    share = expert_share(model.config)
    sizes = {name: float(p.numel()) for name, p in model.named_parameters()}
    return sum(size * (share if ".experts." in name else 1.0) for name, size in sizes.items())


# -- training ---


def suited(night: NightSettings, snapshot: Snapshot) -> NightSettings:
    """`night` as it is for `few_rows` examples and more; fewer are seen more often.

    A hundred rows seen as often as thousands teach nothing. At 1 / share passes phase 1 has as many steps for few as
    for `few_rows`, and that is still too few: the power was chosen by trials (bench/results/trial-training.md).
    """
    examples = sum(e.weight > 0 for e in snapshot.examples)
    share = min(1.0, max(1, examples) / max(1, night.few_rows))
    return replace(night, sft_epochs=night.sft_epochs * min(MOST_REPEATS, share**-1.5))


def replay_rows(night: NightSettings, rows: int) -> int:
    """How many rows of the base's own text to mix with `rows` lessons."""
    return round(night.replay_share * max(rows, night.few_rows / 2))


class NightTrainer(SFTTrainer):  # type: ignore[misc]
    """One item of the data set is one ready batch, so the plan, not a sampler, decides what is seen and when."""

    loss_is_scaled_for_ga = True

    def __init__(
        self, student: Student, steps: int, batch: Callable[[int], Batch], objective: Objective, args: SFTConfig
    ) -> None:
        self.objective = objective
        super().__init__(
            model=student.model,
            args=args,
            train_dataset=Dataset.from_dict({"index": list(range(steps))}),
            data_collator=lambda items: batch(items[0]["index"]),
            processing_class=student.tokenizer,
        )
        self.remove_callback(PrinterCallback)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """The totals of a whole optimiser batch, so that a loss is never normalised inside a micro-batch."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return samples, torch.stack([s["totals"] for s in samples]).sum(0).to(device)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        totals = inputs["totals"] if num_items_in_batch is None else num_items_in_batch
        return self.objective(anchored_logps(model, inputs), inputs, totals)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the stock one walks over all parameters at every step

    def _send_telemetry(self) -> None:
        """Nothing about a night leaves the machine."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Stops a run whose loss or gradient is not finite, and reports about ten times."""

    def __init__(self, name: str, progress: Progress) -> None:
        self.name, self.progress = name, progress
        self.losses: list[float] = []
        self.gradients: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        loss, gradient = float(logs["loss"]), float(logs["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(gradient)):
            raise TrainingError(
                f"{self.name}, step {state.global_step}: loss {loss}, gradient {gradient}; lower night.{self.name}_lr"
            )
        self.losses.append(loss)
        self.gradients.append(gradient)
        if state.global_step % max(1, state.max_steps // 10) == 0:
            self.progress(f"{self.name}: step {state.global_step} of {state.max_steps}, loss {loss:.3f}")


def train(
    student: Student,
    lessons: Sequence[Lesson],
    objective: Objective,
    settings: Settings,
    *,
    name: str,
    epochs: float,
    rate: float,
    progress: Progress,
    references: bool,
) -> dict[str, Any]:
    """Train the adapter of `student` in place. Returns what was done: plan, losses, seconds, peak memory."""
    started = time.monotonic()
    night = settings.night
    passages = lay_out(lessons, night.max_tokens, night.batch_size, student.merges)
    minutes = night.budget_minutes * PHASE_SHARE
    planned = plan(passages, epochs, night.batch_size, student.tokens_per_minute, minutes, night.seed)
    progress(f"{name}: {planned} of {minutes:.1f}, on {student.device}")
    before = adapter_weights(student.model)
    known = reference_logps(student, passages, lessons, planned) if references else {}

    def batch(step: int) -> Batch:
        chosen = [passages[i] for i in planned.batches[step]]
        made = collate(chosen, lessons, student.pad, student.merges)
        if references:
            keys = [(lesson, answer) for lesson, answer in made["answer"].tolist()]
            made["reference"] = torch.tensor([known.get(key, math.nan) for key in keys])  # others: unread
        return made

    watch = Watch(name, progress)
    with tempfile.TemporaryDirectory() as scratch:
        args = _arguments(scratch, student, len(planned.batches), rate, night.seed)
        trainer = NightTrainer(student, len(planned.batches), batch, objective, args)
        trainer.add_callback(watch)
        trainer.train()
    _require_learning(name, before, adapter_weights(student.model), watch)
    return {
        "plan": {key: value for key, value in asdict(planned).items() if key != "batches"},
        "asked": epochs,
        "steps": len(planned.batches),
        "rows": planned.rows,
        "losses": [round(loss, 5) for loss in watch.losses],
        "seconds": round(time.monotonic() - started, 1),
        "peak_mb": peak_mb(student),
    }


def _arguments(scratch: str, student: Student, steps: int, rate: float, seed: int) -> SFTConfig:
    args = SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=round(WARMUP_SHARE * steps),
        weight_decay=0.0,
        seed=seed,
        use_cpu=student.device == "cpu",
        bf16=student.on_gpu,
        **checkpointing(student.on_gpu),
        router_aux_loss_coef=0.0,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        dataloader_pin_memory=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    args._n_gpu = min(1, args.n_gpu)  # with more, it would split a batch that is laid out already over all cards
    return args


def checkpointing(on: bool) -> dict[str, Any]:
    """Whether activations are computed again for the gradient, by the name that this transformers has for it.

    A card lacks room for them sooner than time; a CPU has the room and not the time.
    """
    names = {field.name for field in fields(SFTConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: on, f"{name}_kwargs": {"use_reentrant": False}}


@torch.no_grad()
def reference_logps(
    student: Student, passages: Sequence[Passage], lessons: Sequence[Lesson], planned: Plan
) -> dict[tuple[int, int], float]:
    """log π_ref of every pair and thumb that the plan shows, with the adapter as it stands before training."""
    student.model.eval()
    known: dict[tuple[int, int], float] = {}
    read = [any(lessons[placed.lesson].kind in PREFERRED for placed in passage.placed) for passage in passages]
    for chosen in planned.batches:
        fresh = [passages[i] for i in chosen if read[i] and (passages[i].placed[0].lesson, 0) not in known]
        if not fresh:
            continue
        batch = collate(fresh, lessons, student.pad, student.merges)
        batch = {key: value.to(student.device) for key, value in batch.items()}
        with torch.autocast(torch.device(student.device).type, torch.bfloat16, enabled=student.on_gpu):
            values = logps(student.model, batch)
        known |= {(int(i), int(n)): v for (i, n), v in zip(batch["answer"].tolist(), values.tolist(), strict=True)}
    return known


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def interpolate(model: PeftModel, start: Mapping[str, Tensor], share: float) -> None:
    """Move the adapter back, to `share` of the way from the weights `start` to its own.

    Between a model and what it was fine-tuned to lie weights that keep more of what it could do before, and most of
    what it learnt (arXiv 2109.01903, there for the whole model; here the factors of LoRA are interpolated).
    """
    between = {name: start[name].lerp(weights, share) for name, weights in adapter_weights(model).items()}
    if lost := set_peft_model_state_dict(model, between).unexpected_keys:
        raise TrainingError(f"the adapter could not be drawn back towards phase 1: it has no place for {lost[0]}")


def _require_learning(name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], watch: Watch) -> None:
    if not any(watch.gradients):
        steps = len(watch.gradients)
        raise TrainingError(f"{name}: every gradient was zero over {steps} steps; check night.lora_targets")
    if not all(bool(value.isfinite().all()) for value in after.values()):
        raise TrainingError(f"{name}: the adapter has weights that are not finite; lower night.{name}_lr")
    if all(torch.equal(before[key], value) for key, value in after.items()):
        raise TrainingError(f"{name}: the adapter did not change in {len(watch.losses)} steps; raise night.{name}_lr")


def peak_mb(student: Student) -> int:
    """Peak memory of the accelerator, or of the process where there is none."""
    if student.on_gpu:
        return int(torch.cuda.max_memory_allocated()) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on macOS bytes
    return peak >> (20 if sys.platform == "darwin" else 10)


def save(
    student: Student,
    folder: Path,
    settings: Settings,
    *,
    snapshot_id: str,
    phase: Phase,
    parent_id: str | None,
    details: Mapping[str, Any],
) -> Adapter:
    """Weights and config without a path of this machine in them, then the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(adapter_weights(student.model), str(folder / WEIGHTS), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"the adapter cannot be saved in {folder}: {error}") from error
    (folder / WEIGHTS).chmod(0o644)  # as the other files: where the home is opened, a server may read it
    config = student.model.peft_config["default"]
    config.base_model_name_or_path = student.base_id
    config.inference_mode = True
    config.save_pretrained(str(folder))
    return sealing.seal(
        folder,
        base_id=student.base_id,
        snapshot_id=snapshot_id,
        phase=phase,
        parent_id=parent_id,
        created_utc=time.time(),
        details={**details, "night": recipe(settings.night), "parity": parity_record(student)},
    )


def parity_record(student: Student) -> dict[str, list[float]]:
    """What `serving.parity` compares an engine with: log-probabilities with the adapter and without it."""
    adapted = _talk_logps(student)
    with student.model.disable_adapter():
        return {"base": _talk_logps(student), "adapter": adapted}


@torch.no_grad()
def _talk_logps(student: Student) -> list[float]:
    student.model.eval()
    found = []
    for prompt, answer in parity.TALKS:
        with on_day(parity.DAY):
            head, tail = prompt_ids(student.tokenizer, prompt, LONG), answer_ids(student.tokenizer, prompt, answer)
        ids = torch.tensor([head + tail], device=student.device)
        with torch.autocast(torch.device(student.device).type, torch.bfloat16, enabled=student.on_gpu):
            logits = student.model(input_ids=ids).logits[0, len(head) - 1 : -1]
        values = logits.float().log_softmax(-1).gather(1, ids[0, len(head) :, None])
        found.append(float(values.sum()))
    return found
