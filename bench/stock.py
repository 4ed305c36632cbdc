"""Stock trl on the rows of a snapshot, for `bench/preference.py`: DPO on its pairs, KTO on its thumbs.

From phase 1 merged into the base, with a fresh adapter of our shape, so that without it the model is the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

STOCK = ("trl_dpo", "trl_kto")
TIMES = 2.0  # what trl has of our seconds
MOST_EPOCHS = 10.0  # of trl, where its rows are few


def stock(
    arm: str, snapshot: Any, grounded: Any, seconds: float, settings: Any, home: Path, score: Callable[[Any], Any]
) -> tuple[Any, dict[str, float]]:
    """What `score` gives of the model after training, and how many rows and passes it saw. Seconds are of the CPU."""
    from nightschool.evolve import trainer as t
    from nightschool.serving.lora import as_named
    from peft import get_peft_model

    night = t.suited(settings.night, snapshot)
    pupil = t.student(settings, grounded.path)
    if arm == "trl_dpo" and not snapshot.pairs:
        return score(pupil), {"rows": 0, "passes": 0.0}  # nothing to compare: it learns nothing
    shape = pupil.model.peft_config["default"]
    merged = pupil.model.merge_and_unload()
    with as_named(merged):
        pupil.model = get_peft_model(merged, replace(shape, inference_mode=False))
        trainer = (_dpo if arm == "trl_dpo" else _kto)(pupil, snapshot, night, home)
    trainer._send_telemetry = lambda: None
    trainer.add_callback(timed(seconds, night.preference_lr))
    trainer.train()
    passes = {"rows": trainer.state.global_step * night.batch_size, "passes": round(trainer.state.epoch, 2)}
    return score(pupil), passes


def timed(seconds: float, rate: float) -> Any:
    """Ends training after `seconds` of this process, or with its last step, until when the rate falls linearly."""
    from transformers import TrainerCallback

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.process_time()  # a busy machine takes nothing from trl

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
            done = max((time.process_time() - self.began) / seconds, state.global_step / state.max_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * max(0.0, 1 - done)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= time.process_time() - self.began >= seconds

    return Timed()


def _common(night: Any, home: Path) -> dict[str, Any]:
    from nightschool.evolve.trainer import checkpointing

    return {
        "output_dir": str(home),
        "per_device_train_batch_size": night.batch_size,
        "num_train_epochs": MOST_EPOCHS,
        "learning_rate": night.preference_lr,
        "lr_scheduler_type": "constant",  # `timed` lets it fall
        "max_length": None,  # at a length trl drops rows with a long prompt, where ours cuts the prompt
        "seed": night.seed,
        "use_cpu": True,
        "bf16": False,
        "router_aux_loss_coef": 0.0,
        "precompute_ref_log_probs": True,  # as ours are; before the clock begins
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **checkpointing(False),
        "dataloader_pin_memory": False,
    }


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _cut(prompt: Sequence[dict[str, Any]], answers: Sequence[str], tokenizer: Any, night: Any) -> list[dict[str, Any]]:
    """The latest messages of the prompt that fit beside the longest answer; the last one in any case."""
    from nightschool.serving.chat import answer_ids, prompt_ids

    room = night.max_tokens - max(len(answer_ids(tokenizer, prompt, answer)) for answer in answers)
    kept = list(prompt)
    while len(kept) > 1 and len(prompt_ids(tokenizer, kept, 100_000)) > room:
        kept = kept[1:]
    return kept


def _dpo(pupil: Any, snapshot: Any, night: Any, home: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {
            "prompt": _cut(p.prompt, (p.chosen, p.rejected), pupil.tokenizer, night),
            "chosen": _said(p.chosen),
            "rejected": _said(p.rejected),
        }
        for p in snapshot.pairs
    ]
    args = DPOConfig(**_common(night, home))
    return DPOTrainer(pupil.model, args=args, train_dataset=Dataset.from_list(rows), processing_class=pupil.tokenizer)


def _kto(pupil: Any, snapshot: Any, night: Any, home: Path) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [
        {
            "prompt": _cut(t.prompt, (t.completion,), pupil.tokenizer, night),
            "completion": _said(t.completion),
            "label": t.liked,
        }
        for t in snapshot.thumbs
    ]
    Random(night.seed).shuffle(rows)  # it goes through them in order, and neighbours are of one talk
    liked = sum(row["label"] for row in rows)
    args = KTOConfig(**_common(night, home), undesirable_weight=liked / (len(rows) - liked))
    return KTOTrainer(pupil.model, args=args, train_dataset=Dataset.from_list(rows), processing_class=pupil.tokenizer)
