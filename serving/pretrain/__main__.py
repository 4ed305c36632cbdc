"""The command line of pretraining: train, export, measure; each can be left out."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from . import corpus
from .export import WEIGHTS, export, origin
from .measure import card, measure
from .run import Plan, Trainer
from .tokens import Batches, train_tokenizer


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    if not (args.export_only or args.evaluate):
        wanted = {name: getattr(args, name) for name in ("seed", "minutes", "steps", "tokens", "peak", "float32")}
        plan = Plan(workers=args.threads, **wanted)
        train(plan, args.dialogues, args.checkpoint, resume=args.resume, start=args.start, device=args.device)
    if args.out:
        export(args.checkpoint, args.out)
    if args.evaluate or (args.out and args.dialogues):
        evaluate(args.evaluate or args.out, args.dialogues, args.checkpoint)


def train(
    plan: Plan, dialogues: Path, folder: Path, *, resume: bool, start: Path | None = None, device: str = "cpu"
) -> None:
    from transformers import AutoTokenizer

    talks, held_out = corpus.read_dialogues(dialogues)
    print(f"{len(talks)} dialogues to train on, {len(held_out)} held out", flush=True)
    begun = (folder / WEIGHTS).exists()
    if begun and not resume:
        raise SystemExit(f"{folder} holds a checkpoint: go on from it with --resume, or name another --checkpoint")
    resume = resume and begun
    made = folder if resume else start
    tokenizer = AutoTokenizer.from_pretrained(made) if made else train_tokenizer(talks, plan.seed)
    tokenizer.save_pretrained(folder)
    batches = Batches(tokenizer, talks, plan.seed, plan.tokens, plan.weights, plan.real)
    trainer = Trainer(plan, batches, folder, lambda line: print(line, flush=True), device)
    if resume:
        trainer.load()
    elif start:
        trainer.begin_from(start)
    trainer.run()


def evaluate(folder: Path, dialogues: Path | None, checkpoint: Path) -> None:
    """Print what the model in `folder` can do, and write its card where the checkpoint is the one it was made of."""
    if dialogues is None:
        raise SystemExit("--dialogues is needed to measure: its held-out part gives the perplexity")
    state = origin(folder)
    at_hand = bool(state) and (checkpoint / WEIGHTS).exists() and origin(checkpoint) == state
    report = measure(folder, corpus.read_dialogues(dialogues)[1], checkpoint if at_hand else None)
    print(json.dumps({key: value for key, value in asdict(report).items() if key != "conversations"}))
    if at_hand:
        size = sum(p.stat().st_size for p in folder.iterdir() if p.name != "README.md")
        text = card(report, json.loads(state), _parameters(checkpoint), size)
        (folder / "README.md").write_text(text, encoding="utf-8")
    else:
        print(f"no card: {checkpoint} is not the checkpoint that {folder} was made of", file=sys.stderr)


def _parameters(checkpoint: Path) -> int:
    with safe_open(checkpoint / WEIGHTS, "pt") as weights:
        sizes = [torch.Size(weights.get_slice(name).get_shape()).numel() for name in weights.keys()]  # noqa: SIM118
    return sum(sizes)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nightschool.serving.pretrain", description=__doc__)
    parser.add_argument("--dialogues", type=Path, help="dialogues.jsonl.gz of the self_dialogue corpus")
    parser.add_argument("--out", type=Path, help="where the exported model goes")
    parser.add_argument("--checkpoint", type=Path, default=Path("seedling_checkpoint"))
    parser.add_argument("--minutes", type=float, default=Plan.minutes)
    parser.add_argument("--steps", type=int, default=0, help="a number of steps instead of minutes: repeats exactly")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a longer training; nothing else changes")
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="of a step; a card has room for more")
    parser.add_argument("--start", type=Path, metavar="DIR", help="an exported model to begin with, and its tokenizer")
    parser.add_argument("--peak", type=float, default=Plan.peak, help="what every learning rate is multiplied by")
    parser.add_argument("--float32", action="store_true", help="for CPUs that do not multiply bfloat16 in hardware")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=Plan.workers)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint as it stands")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only measure the model in DIR")
    args = parser.parse_args()
    if not (args.export_only or args.evaluate or args.dialogues):
        parser.error("--dialogues is needed to train")
    if args.export_only and not args.out:
        parser.error("--export-only exports to --out; name it")
    if min(args.minutes, args.peak) <= 0 or args.steps < 0 or min(args.threads, args.tokens) < 1:
        parser.error("--minutes and --peak are above 0, --steps 0 or more, --threads and --tokens 1 or more")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device is {args.device}, and torch finds no CUDA device")
    return args


if __name__ == "__main__":
    main()
