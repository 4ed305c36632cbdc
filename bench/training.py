"""Our trainer against stock trl on the same rows, model and loss, and Muon against AdamW at equal steps.

    make bench NAME=training ARGS="--rows 96 --rounds 2"

dpo, sft: Taskmaster-4 contexts with a rewarded answer (and another row's as the rejected one), the shipped base with
the default LoRA, all weights 1, no replay, batches of eight, one thread. Each run is a process of its own, ours and
trl's in turn; a rate is rows over the processor's seconds from the rows to the last step, tokens and references
included, so that what else the machine does takes nothing away, after a pass that warms it up. Both give
their loss on all rows with the same random adapter, which must agree to 1e-5. trl runs as it comes, for dpo with
references computed beforehand, and with its rows in order of length, so that nothing is padded for nothing (and for dpo
with references beforehand); the ratio is to the fastest.
linear: seconds that each further row of our phase 2 takes, from one of SIZES to the next, which leaves out what does
not depend on rows; the last over the first.
muon: one epoch of phase 1 on 400 rows, with torch.optim.Muon for all LoRA matrices or AdamW, at the rates of RATES;
nats per token on rows of other openings, the rate chosen on one half of these openings, told on the other.
The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import runs
import sources

Row = dict[str, Any]  # prompt (messages), chosen, rejected, opening
KINDS = {"dpo": ("ours", "trl", "trl precomputed", "trl by length"), "sft": ("ours", "trl", "trl by length")}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SIZES = (48, 96, 192, 384)
MOST = 1024  # tokens of a row
BATCH = 8
BETA = 0.1


def rows(data: Path, count: int, seed: int = 0) -> list[Row]:
    """Rewarded turns in seeded order, each with the next one's answer as the rejected; none that ours would cut."""
    from nightschool.evolve.lessons import encode
    from nightschool.serving.base import load_tokenizer

    given = [c for c in sources.taskmaster4(data) if len(c["messages"]) > 1 and c["messages"][-1]["rating"] > 0]
    chosen = [given[i] for i in np.random.default_rng(seed).permutation(len(given))]
    tokenizer, found = load_tokenizer("seedling"), list[Row]()
    for row in _paired(chosen):
        prompt, answers = encode(tokenizer, row["prompt"], [row["chosen"], row["rejected"]], 8 * MOST)
        found += [row] if len(prompt) + max(map(len, answers)) <= MOST else []
    assert len(found) >= count, f"{count} rows were asked for, {len(found)} are there"
    return found[:count]


def _paired(chosen: list[dict[str, Any]]) -> list[Row]:
    return [
        {
            "prompt": [{"role": m["role"], "content": m["content"]} for m in c["messages"][:-1]],
            "chosen": c["messages"][-1]["content"],
            "rejected": other["messages"][-1]["content"],
            "opening": c["user_id"],
        }
        for c, other in pairwise(chosen)
    ]


# -- one run, in a process of its own ---


def part(name: str, kind: str, args: argparse.Namespace) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    given = rows(args.data, args.rows)
    with tempfile.TemporaryDirectory() as home:
        return (ours if kind == "ours" else stock)(name, kind, given, Path(home))


def settings_of(home: Path) -> Any:
    from nightschool.settings import Settings

    plain = Settings(home=home)
    night = replace(plain.night, max_tokens=MOST, batch_size=BATCH, budget_minutes=1e6, beta=BETA, sft_term=0.0)
    return replace(plain, night=night, serving=replace(plain.serving, device="cpu", threads=1))


def moved(student: Any) -> None:
    """The adapter of `student` made different from the base, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in sorted(student.model.named_parameters()):
            if parameter.requires_grad and "lora_B" in key:  # trl adds a frozen copy as the reference
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def cost(count: int, started: float) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return {"rows_per_s": count / (time.process_time() - started), "peak_mb": peak}


def ours(name: str, kind: str, given: list[Row], home: Path) -> dict[str, float]:
    from nightschool.evolve import dpo, sft
    from nightschool.evolve import trainer as t

    settings = settings_of(home)
    student = t.student(settings)
    objective = sft.objective if name == "sft" else dpo.objective(settings.night)
    loss = our_loss(student, our_lessons(name, given, student.tokenizer), objective, settings)
    started = time.process_time()  # of one thread: what else runs takes nothing away
    lessons = our_lessons(name, given, student.tokenizer)
    t.train(
        student,
        lessons,
        objective,
        settings,
        name=name,
        epochs=1.0,
        rate=1e-4,
        progress=lambda _: None,
        references=name == "dpo",
    )
    return {"loss": loss, **cost(len(given), started)}


def our_lessons(name: str, given: list[Row], tokenizer: Any) -> list[Any]:
    from nightschool.evolve import dpo, sft
    from nightschool.evolve.types import Example, Pair, Snapshot

    if name == "sft":
        examples = [Example(tuple(r["prompt"]), r["chosen"], 1.0, ()) for r in given]
        found, left_out = sft.lessons_of(examples, tokenizer, MOST)
    else:
        pairs = tuple(Pair(tuple(r["prompt"]), r["chosen"], r["rejected"], 1.0, (), "contrast") for r in given)
        found, left_out = dpo.lessons_of(Snapshot((), pairs, (), ()), tokenizer, MOST)
    assert not left_out
    return found


def our_loss(student: Any, lessons: list[Any], objective: Any, settings: Any) -> float:
    """Over all rows, with the moved adapter, against the base; the adapter is put back."""
    import torch
    from nightschool.evolve.batches import collate, logps
    from nightschool.evolve.lessons import lay_out

    before = {key: p.detach().clone() for key, p in student.model.named_parameters() if p.requires_grad}
    moved(student)
    passages = lay_out(lessons, settings.night.max_tokens, BATCH, student.merges)
    batches = [collate([p], lessons, student.pad, student.merges) for p in passages]
    totals = torch.stack([b["totals"] for b in batches]).sum(0)
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            with student.model.disable_adapter():
                batch["reference"] = logps(student.model, batch)
            total += float(objective(logps(student.model, batch), batch, totals))
        for key, parameter in student.model.named_parameters():
            if key in before:
                parameter.copy_(before[key])
    return total


def stock(name: str, kind: str, given: list[Row], home: Path) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from nightschool.evolve import trainer as t
    from nightschool.serving.lora import as_named
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    student = t.student(settings_of(home))
    common = {
        "output_dir": str(home),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        **t.checkpointing(False),
        "router_aux_loss_coef": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if kind == "trl by length":
        common["train_sampling_strategy"] = "sequential"
        given = sorted(given, key=lambda row: _length(row, student.tokenizer, pairs=name == "dpo"))
    said = [{"prompt": r["prompt"], "chosen": _said(r["chosen"]), "rejected": _said(r["rejected"])} for r in given]

    def trainer() -> Any:
        if name == "sft":
            data = Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in said])
            args: Any = SFTConfig(**common, completion_only_loss=True)
            return SFTTrainer(student.model, args, train_dataset=data, processing_class=student.tokenizer)
        args = DPOConfig(**common, beta=BETA, precompute_ref_log_probs=kind != "trl")
        with as_named(student.model.get_base_model()):  # it adds a frozen copy of the adapter as the reference
            data = Dataset.from_list(said)
            return DPOTrainer(student.model, args=args, train_dataset=data, processing_class=student.tokenizer)

    began = time.process_time()
    made = trainer()
    built = time.process_time() - began
    made._send_telemetry = lambda: None
    loss = stock_loss(name, made, student)  # of every kind, so that none is timed cold
    started = time.process_time() - built
    made.train()
    assert all(torch.isfinite(p).all() for p in student.model.parameters())
    return {"loss": loss, **cost(len(given), started)}


def _length(row: Row, tokenizer: Any, pairs: bool) -> int:
    from nightschool.evolve.lessons import encode

    prompt, answers = encode(tokenizer, row["prompt"], [row["chosen"], *[row["rejected"]] * pairs], MOST)
    return len(prompt) + max(map(len, answers))


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def stock_loss(name: str, trainer: Any, student: Any) -> float:
    """As `our_loss`: over all rows, weighted by their tokens for sft."""
    import torch

    before = {key: p.detach().clone() for key, p in student.model.named_parameters() if p.requires_grad}
    moved(student)
    losses, sizes = [], []
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            losses.append(float(trainer.compute_loss(trainer.model, dict(batch))))
            sizes.append(int((batch["labels"] != -100).sum()) if name == "sft" else len(batch["input_ids"]) // 2)
        for key, parameter in student.model.named_parameters():
            if key in before:
                parameter.copy_(before[key])
    return float(np.average(losses, weights=sizes))


# -- Muon ---


def optimised(optimiser: str, rate: float, args: argparse.Namespace) -> dict[str, float]:
    """Nats per token on unseen openings after one epoch of phase 1: on the half to choose by, and on the other."""
    import torch
    from nightschool.evolve import sft
    from nightschool.evolve import trainer as t

    torch.set_num_threads(1)
    given = rows(args.data, 700)
    held = sorted({r["opening"] for r in given})[::4]
    taught = [r for r in given if r["opening"] not in held][:400]
    halves = [[r for r in given if r["opening"] in half] for half in (set(held[::2]), set(held[1::2]))]
    with tempfile.TemporaryDirectory() as home:
        settings = settings_of(Path(home))
        student = t.student(settings)
        if optimiser == "muon":
            t.NightTrainer.create_optimizer = muon(rate)  # type: ignore[attr-defined]
        lessons = our_lessons("sft", taught, student.tokenizer)
        t.train(
            student,
            lessons,
            sft.objective,
            settings,
            name="sft",
            epochs=1.0,
            rate=rate,
            progress=lambda _: None,
            references=False,
        )
        chosen_by, told = (held_out_nll(student, half) for half in halves)
    return {"chosen_by": chosen_by, "told": told}


def muon(rate: float) -> Any:
    import torch

    def create(self: Any, *_: Any) -> Any:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Muon(trained, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        return self.optimizer

    return create


def held_out_nll(student: Any, given: list[Row]) -> float:
    import torch
    from nightschool.evolve.batches import collate, logps
    from nightschool.evolve.lessons import lay_out

    lessons = our_lessons("sft", given, student.tokenizer)
    total = tokens = 0.0
    student.model.eval()
    with torch.no_grad():
        for passage in lay_out(lessons, MOST, BATCH, student.merges):
            batch = collate([passage], lessons, student.pad, student.merges)
            total -= float(logps(student.model, batch).sum())
            tokens += float(batch["totals"][0])
    return total / tokens


# -- the whole ---


def run(args: argparse.Namespace, *words: str, count: int = 0) -> dict[str, float]:
    given = str(count or args.rows)
    found = runs.child(__file__, ("--part", *words, "--data", str(args.data), "--rows", given))
    print(" ".join(words), json.dumps(found), flush=True)
    return found


def compared(name: str, args: argparse.Namespace) -> dict[str, float]:
    kinds = KINDS[name]
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind in kinds:
            found[kind].append(run(args, name, kind))
    ours_, theirs = found["ours"][0]["loss"], found["trl"][0]["loss"]
    assert abs(ours_ - theirs) <= 1e-5 * max(1.0, abs(theirs)), (ours_, theirs)
    rate = {kind: float(np.median([r["rows_per_s"] for r in runs])) for kind, runs in found.items()}
    best = max((kind for kind in kinds if kind != "ours"), key=lambda kind: rate[kind])
    ratios = [a["rows_per_s"] / b["rows_per_s"] for a, b in zip(found["ours"], found[best], strict=True)]
    by_round = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{name}: ours over {best}, by round: {by_round}; loss {ours_:.6f}, {theirs:.6f}")
    peak = found["ours"][0]["peak_mb"] / found[best][0]["peak_mb"]
    return {f"{name}_ratio": float(np.median(ratios)), f"{name}_peak_mb_ratio": peak}


def linear(args: argparse.Namespace) -> dict[str, float]:
    seconds = [
        min(count / run(args, "dpo", "ours", count=count)["rows_per_s"] for _ in range(args.rounds)) for count in SIZES
    ]
    further = [(b - a) / (m - n) for (n, a), (m, b) in pairwise(zip(SIZES, seconds, strict=True))]
    print(f"linear: {', '.join(f'{n} rows {s:.1f} s' for n, s in zip(SIZES, seconds, strict=True))}")
    print(f"  a further row: {', '.join(f'{value:.3f} s' for value in further)}")
    return {"further_row_last_over_first": further[-1] / further[0]}


def muon_against_adamw(args: argparse.Namespace) -> dict[str, float]:
    told = {}
    for optimiser in ("adamw", "muon"):
        tried = {rate: run(args, "optimiser", optimiser, str(rate)) for rate in RATES}
        best = min(tried, key=lambda rate: tried[rate]["chosen_by"])
        told[optimiser] = tried[best]["told"]
        print(f"{optimiser}: {told[optimiser]:.4f} nats per token at {best}")
    return {"muon_minus_adamw": told["muon"] - told["adamw"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=sources.DATA)
    parser.add_argument("--only", default="dpo,sft,linear,muon")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, kind, *rate = args.part
        print(json.dumps(optimised(kind, float(rate[0]), args) if name == "optimiser" else part(name, kind, args)))
        return
    wanted, result = args.only.split(","), {}
    for name in ("dpo", "sft"):
        result |= compared(name, args) if name in wanted else {}
    result |= linear(args) if "linear" in wanted else {}
    result |= muon_against_adamw(args) if "muon" in wanted else {}
    figures = {name: round(value, 4) for name, value in result.items()}
    print(json.dumps({**figures, **runs.circumstances()}))


if __name__ == "__main__":
    main()
