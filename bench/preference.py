"""What a night learns of people's own ratings, against stock trl on the same data: a scorer, and what the model says.

    make bench NAME=preference ARGS="--jobs 2 --keep FOLDER"

tm4: Taskmaster-4 rewards, held out by opening, five folds. convai2: thumbs of ConvAI2, held out by user, `--users`
folds. In every fold one phase 1 is trained, and from it the arms of phase 2:

  full                our phase 2
  equal, shuffled     the same with every weight 1, with the weights dealt out anew
  trl_dpo, trl_kto    trl's DPO on the pairs, KTO on the thumbs of the same snapshot, at our learning rate, with no
                      more rows than ours sees and everything else as it comes
  sft                 phase 1 itself, against the base
  dpo                 our phase 2 from a fresh adapter, with the rows of both phases, against the base
  hostile             both phases, where a tenth of the people whose ratings are learnt from rate the other way round

The learnt preference of a held-out answer is the rise of its log-probability over the arm's start; its AUC is
within a fold and averaged, its accuracy that of calling as many liked as were. Generations: one answer a held-out
opening, drawn with the same seed from phase 1 and from `full`; a scorer fitted on people's ratings in the other folds
(TF-IDF and logistic regression) says which is better. 95 % intervals are bootstraps over openings or users.
Seconds are of training and scoring: `full` was there before `equal` and `shuffled` and paid for what they share, and
`hostile` has an import and a phase 1 of its own. With --keep, a fold that was run is not run again. The last line
printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import learning
import loop
import numpy as np
import sources

Conversation = dict[str, Any]
Rows = list[dict[str, Any]]  # prompt (messages), answer, liked, cluster
OURS = ("full", "equal", "shuffled")  # from the same phase 1
STOCK = ("trl_dpo", "trl_kto")
ARMS = ("sft", "dpo", *OURS, "hostile", *STOCK)
HOSTILE_SHARE = 0.1
MOST_PAIR_EPOCHS = 3  # of trl's DPO for one of ours, where pairs are few
DRAWS = 1000


# -- one fold, in a process of its own ---


def tm4_fold(args: argparse.Namespace) -> dict[str, Any]:
    conversations = [c for c in sources.taskmaster4(args.data) if len(c["messages"]) > 1]
    held = sources.folds([c["user_id"] for c in conversations], 5)[args.number]
    train = [c for c in conversations if c["user_id"] not in held]
    test = [_row(c["messages"], len(c["messages"]) - 1, c["user_id"]) for c in conversations if c["user_id"] in held]
    return fold(args, train, test)


def convai2_fold(args: argparse.Namespace) -> dict[str, Any]:
    conversations = sources.convai2(args.data)
    held = sources.folds([c["user_id"] for c in conversations], 5)[args.number]
    test = [
        _row(c["messages"], i, c["user_id"])
        for c in conversations
        if c["user_id"] in held
        for i, m in enumerate(c["messages"])
        if "rating" in m and i
    ]
    return fold(args, [c for c in conversations if c["user_id"] not in held], test)


def _row(messages: Sequence[dict[str, Any]], at: int, cluster: str) -> dict[str, Any]:
    prompt = [{"role": m["role"], "content": m["content"]} for m in messages[:at]]
    return {
        "prompt": prompt,
        "answer": messages[at]["content"],
        "liked": messages[at]["rating"] > 0,
        "cluster": cluster,
    }


def fold(args: argparse.Namespace, train: Sequence[Conversation], test: Rows) -> dict[str, Any]:
    """Per held-out row what each arm makes of it, and whose answers the scorer prefers."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        taught = Fold(train, test, Path(folder))
        found: dict[str, Any] = {"liked": [r["liked"] for r in test], "cluster": [r["cluster"] for r in test]}
        found |= {"rise": {}, "seconds": {}}
        for arm in ARMS:
            began = time.monotonic()
            found["rise"][arm] = taught.rise(arm)
            found["seconds"][arm] = round(time.monotonic() - began, 1)
            tell(f"{args.part} {args.number} {arm}: {found['seconds'][arm]} s")
        if args.part == "tm4":
            found["better"] = better(train, test, taught.grounded.path, taught.full, taught.settings)
    return found


@dataclass
class Fold:
    """What one fold teaches and is judged on; `home` takes what is made of it."""

    train: Sequence[Conversation]
    test: Rows
    home: Path

    def __post_init__(self) -> None:
        self.snapshot, self.settings = frozen(self.train, made(self.home))

    def rise(self, arm: str) -> list[float]:
        """Of the log-probability of each row of `test` over the start of `arm`."""
        if arm in STOCK:
            return list(stock(arm, self.snapshot, self.grounded, self.settings, self.home, self.test).tolist())
        start, path = self.trained(arm)
        return list((self.scored(path) - start).tolist())

    def trained(self, arm: str) -> tuple[Any, Path]:
        """How the start of `arm` scores, and the adapter that it made."""
        if arm == "sft":
            return self.scored(None), self.grounded.path
        if arm == "dpo":
            return self.scored(None), learning.learn(self.snapshot, ("dpo",), self.settings)[-1].path
        if arm == "hostile":
            snapshot, settings = frozen(spoiled(self.train), made(self.home))
            grounded, preferred = learning.learn(snapshot, learning.BOTH, settings)
            return self.scored(grounded.path), preferred.path
        return self.start, self.full if arm == "full" else self.preferred(arm)

    @cached_property
    def grounded(self) -> Any:
        from nightschool.evolve import sft

        return sft.run(self.snapshot, self.settings, folder=made(self.home), progress=tell)

    @cached_property
    def start(self) -> Any:
        return self.scored(self.grounded.path)

    @cached_property
    def full(self) -> Path:
        return self.preferred("full")

    def preferred(self, arm: str) -> Path:
        """The adapter of our phase 2, with the weights of `arm`."""
        from nightschool.evolve import dpo

        snapshot = learning.ARMS[arm].reweigh(self.snapshot, 0)
        return Path(dpo.run(snapshot, self.grounded, self.settings, folder=made(self.home), progress=tell).path)

    def scored(self, path: Path | None) -> Any:
        from nightschool.evolve.trainer import student

        return scores(student(self.settings, path), self.test)


def spoiled(train: Sequence[Conversation]) -> list[Conversation]:
    """`train`, where a tenth of the people rate the other way round."""
    people = sorted({c["user_id"] for c in train})
    order = np.random.default_rng(0).permutation(len(people))
    hostile = {people[i] for i in order[: round(HOSTILE_SHARE * len(people))]}
    return [_opposed(c) if c["user_id"] in hostile else c for c in train]


def _opposed(conversation: Conversation) -> Conversation:
    messages = [m | {"rating": -m["rating"]} if "rating" in m else m for m in conversation["messages"]]
    return conversation | {"messages": messages}


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def made(home: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=home))


def frozen(train: Sequence[Conversation], home: Path) -> tuple[Any, Any]:
    """The snapshot that a night would learn from, and the settings it would learn by."""
    from nightschool.evolve import dataset
    from nightschool.memory.importer import import_files
    from nightschool.memory.store import MemoryStore
    from nightschool.settings import Settings

    settings = Settings(home=home / "home")
    with MemoryStore(settings) as store:
        report = import_files(store, [sources.write_lines(home / "in.jsonl", train)], now=sources.CLOCK)
        if report.errors:
            sys.exit(f"{report.errors[0]}: the data was not read whole")
        return dataset.freeze(store, settings, now=store.clock()), settings


# -- stock trl, on phase 1 merged into the base ---


def stock(arm: str, snapshot: Any, grounded: Any, settings: Any, home: Path, test: Rows) -> Any:
    """How far the log-probabilities of `test` rise. A fresh adapter, so that without it the model is its reference."""
    from nightschool.evolve import trainer as t
    from nightschool.serving.lora import as_named
    from peft import get_peft_model

    night = t.suited(settings.night, snapshot)
    pupil = t.student(settings, grounded.path)
    shape = pupil.model.peft_config["default"]
    merged = pupil.model.merge_and_unload()
    with as_named(merged):
        pupil.model = get_peft_model(merged, replace(shape, inference_mode=False))
        before = scores(pupil, test)
        trainer = _dpo(pupil, snapshot, night, home) if arm == "trl_dpo" else _kto(pupil, snapshot, night, home)
    trainer._send_telemetry = lambda: None
    trainer.train()
    return scores(pupil, test) - before


def _common(night: Any, home: Path, epochs: float) -> dict[str, Any]:
    return {
        "output_dir": str(made(home)),
        "per_device_train_batch_size": night.batch_size,
        "num_train_epochs": epochs,
        "learning_rate": night.preference_lr,
        "max_length": None,  # at a length trl drops rows with a long prompt, where ours cuts the prompt
        "seed": night.seed,
        "use_cpu": True,
        "bf16": False,
        "router_aux_loss_coef": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _dpo(pupil: Any, snapshot: Any, night: Any, home: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": list(p.prompt), "chosen": _said(p.chosen), "rejected": _said(p.rejected)} for p in snapshot.pairs
    ]
    passes = min(MOST_PAIR_EPOCHS, (len(snapshot.pairs) + len(snapshot.thumbs)) / len(rows))
    epochs = night.preference_epochs * passes
    args = DPOConfig(**_common(night, home, epochs), activation_checkpointing=False)
    return DPOTrainer(pupil.model, args=args, train_dataset=Dataset.from_list(rows), processing_class=pupil.tokenizer)


def _kto(pupil: Any, snapshot: Any, night: Any, home: Path) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": list(t.prompt), "completion": _said(t.completion), "label": t.liked} for t in snapshot.thumbs]
    args = KTOConfig(**_common(night, home, night.preference_epochs))
    return KTOTrainer(pupil.model, args=args, train_dataset=Dataset.from_list(rows), processing_class=pupil.tokenizer)


# -- what is learnt ---


def scores(pupil: Any, test: Rows) -> Any:
    """The log-probability of each held-out answer."""
    import torch
    from nightschool.evolve.batches import collate, logps
    from nightschool.evolve.lessons import Lesson, encode, lay_out

    encoded = [encode(pupil.tokenizer, r["prompt"], [r["answer"] or " "], 4096) for r in test]
    lessons = [Lesson(*(ids or ((0,), ((0,),))), "imitate", 1.0) for ids in encoded]
    values = np.full(len(test), np.nan)
    pupil.model.eval()
    with torch.no_grad():
        for passage in lay_out(lessons, 1024, 8, pupil.merges):
            batch = collate([passage], lessons, pupil.pad, pupil.merges)
            for (i, _), value in zip(batch["answer"].tolist(), logps(pupil.model, batch).tolist(), strict=True):
                values[i] = value
    assert np.isfinite(values).all()
    return values


# -- what is said ---


def better(train: Sequence[Conversation], test: Rows, before: Path, after: Path, settings: Any) -> list[list[Any]]:
    """Per opening: how the answers of phase 1 and of `full` score, and their lengths in words."""
    from nightschool.serving.engine import Sampling
    from nightschool.serving.local import LocalEngine

    asked = list({r["cluster"]: r for r in test}.values())
    prompts = [r["prompt"] for r in asked]
    engine = LocalEngine(settings.serving)
    said = []
    for name, path in (("before", before), ("after", after)):
        engine.load(name, path)
        sampling = Sampling(max_tokens=48, temperature=0.7, seed=0)
        said.append(
            [a for k in range(0, len(prompts), 32) for a in _drawn(engine, prompts[k : k + 32], name, sampling)]
        )
    engine.close()
    judge = scorer(train)
    marks = [judge([_context(p, a) for p, a in zip(prompts, answers, strict=True)]) for answers in said]
    lengths = [[len(a.split()) for a in answers] for answers in said]
    return [list(v) for v in zip([r["cluster"] for r in asked], *marks, *lengths, strict=True)]


def _drawn(engine: Any, prompts: Any, name: str, sampling: Any) -> list[str]:
    found: list[str] = engine.generate(prompts, adapter=name, sampling=sampling)
    return found


def _context(prompt: Sequence[dict[str, Any]], answer: str) -> str:
    return " ".join(m["content"] for m in prompt[-4:]) + " || " + answer


def scorer(train: Sequence[Conversation]) -> Callable[[Sequence[str]], list[float]]:
    """Fitted on people's ratings in the other folds: the chance that an answer in its context is liked."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    texts = [_context(c["messages"][:-1], c["messages"][-1]["content"]) for c in train]
    model = LogisticRegression(C=3, max_iter=500, class_weight="balanced")
    model.fit(vectorizer.fit_transform(texts), [c["messages"][-1]["rating"] > 0 for c in train])
    return lambda said: [float(p) for p in model.predict_proba(vectorizer.transform(said))[:, 1]]


# -- the whole ---


def summary(folds: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """AUC and accuracy by arm, ours minus each other arm, with intervals; prints the table."""
    rng = np.random.default_rng(0)
    index = [np.unique(f["cluster"], return_inverse=True) for f in folds]
    ones = [np.ones(len(f["liked"])) for f in folds]
    point = areas(folds, ones)
    drawn = []
    for _ in range(DRAWS):
        drawn.append(areas(folds, [rng.multinomial(len(n), np.full(len(n), 1 / len(n)))[i] for n, i in index]))
    print(f"\n{name}, {len(folds)} folds: arm | AUC [95 %] | full minus it | accuracy | seconds a fold")
    result: dict[str, Any] = {}
    for arm in ARMS:
        less = [d["full"] - d[arm] for d in drawn]
        seconds = np.mean([f["seconds"].get(arm, np.nan) for f in folds])
        difference = f"{point['full'] - point[arm]:+.3f} {interval(less)}"
        print(
            f"{arm} | {point[arm]:.3f} {interval([d[arm] for d in drawn])} | {difference}"
            f" | {accuracy(folds, arm):.3f} | {seconds:.0f}"
        )
        result[f"{name}_auc" if arm == "full" else f"{name}_auc_{arm}"] = round(point[arm], 4)
        if arm in STOCK:
            result[f"{name}_full_minus_{arm}"] = interval(less)
    return result


def areas(folds: Sequence[dict[str, Any]], weights: Sequence[Any]) -> dict[str, float]:
    def area(arm: str) -> float:
        pairs = zip(folds, weights, strict=True)
        return float(np.mean([loop.auc(np.array(f["liked"]), np.array(f["rise"][arm]), w) for f, w in pairs]))

    return {arm: area(arm) for arm in ARMS}


def accuracy(folds: Sequence[dict[str, Any]], arm: str) -> float:
    right = []
    for f in folds:
        rise = np.array(f["rise"][arm])
        liked = np.array(f["liked"])
        right.append(np.mean((rise > np.quantile(rise, 1 - liked.mean())) == liked))
    return float(np.mean(right))


def interval(values: Sequence[float]) -> list[float]:
    return [round(float(np.quantile(values, q)), 4) for q in (0.025, 0.975)]


def generations(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of openings at which the answer after phase 2 scores above that before it, equal scores halved."""
    rows = [row for f in folds for row in f["better"]]
    old, new = (np.array([row[k] for row in rows]) for k in (1, 2))
    won = (new > old) + (new == old) / 2
    draws = np.random.default_rng(0).integers(0, len(won), (DRAWS, len(won)))
    words = [float(np.mean([row[k] for row in rows])) for k in (3, 4)]
    print(f"\ngenerations: {len(rows)} openings, the answer after phase 2 scores higher in {won.mean():.1%}")
    print(f"  mean score {old.mean():.3f} before, {new.mean():.3f} after; words {words[0]:.1f} and {words[1]:.1f}")
    return {"tm4_better_generations": round(float(won.mean()), 4), "ci": interval(won[draws].mean(1).tolist())}


PARTS = {"tm4": tm4_fold, "convai2": convai2_fold}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="tm4,convai2")
    parser.add_argument("--folds", type=int, default=5, help="of the five of Taskmaster-4")
    parser.add_argument("--users", type=int, default=5, help="of the five of ConvAI2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", type=Path, default=sources.DATA)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](args)))
        return
    result: dict[str, Any] = {}
    for name, count in (("tm4", args.folds), ("convai2", args.users)):
        if name in args.only.split(","):
            folds = loop.run_parts(name, count, args, script=__file__)
            result |= summary(folds, name)
            if name == "tm4":
                result |= generations(folds)
    print(json.dumps({**result, **loop.circumstances()}))


if __name__ == "__main__":
    main()
