"""What a night learns of people's own ratings, against stock trl on the same data: a scorer, and what the model says.

    make bench NAME=preference ARGS="--jobs 2 --keep FOLDER"

tm4: Taskmaster-4 rewards, held out by opening, five folds. convai2: thumbs of ConvAI2, held out by user, `--users`
folds. The arms are those of `bench/learning.py` that train, in the same visits of rows, and stock trl:

  full                both phases; the learnt preference is told from phase 1
  equal, shuffled     the same with every weight 1, with the weights dealt out anew
  hostile             the same where a tenth of the people whose ratings are learnt from rate the other way round
  sft, dpo            one phase alone with the passes of both, told from the base
  trl_dpo, trl_kto    from phase 1 of `full`: trl's DPO on the pairs, KTO on the thumbs of the same snapshot, liked and
                      disliked in balance, prompts cut as ours are, at our rate, which falls linearly, for twice the
                      seconds that phase 2 of `full` trained or ten passes; else as they come. A fold without pairs
                      teaches trl's DPO nothing

The learnt preference of a held-out answer is the rise of its log-probability over the arm's start; its AUC is
within a fold and averaged, its accuracy that of calling as many liked as were. Generations: one answer a held-out
opening, drawn with the same seed from phase 1, from `sft` and from `full`; a scorer fitted on people's ratings in the
other folds (TF-IDF and logistic regression) says which is better. 95 % intervals are bootstraps over openings or users.
Our settings were chosen with results of folds 0, 1 and 4 of Taskmaster-4 in sight (bench/results/loop.md), so folds 2
and 3 are told apart as well; trl's are untuned. Seconds are of training and scoring. With --keep, an arm of a
fold that was run is not run again. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import learning
import loop
import numpy as np
import sources
from numpy.typing import NDArray

Conversation = dict[str, Any]
Rows = list[dict[str, Any]]  # prompt (messages), answer, liked, cluster
STOCK = ("trl_dpo", "trl_kto")
ARMS = ("full", *STOCK, "sft", "dpo", "equal", "shuffled", "hostile")  # in the order in which they are run
SPEAKERS = {"full": ("phase 1", "full"), "sft": ("sft",)}  # the adapters of an arm that answer
UNTOUCHED = (2, 3)  # folds of Taskmaster-4 that had no part in choosing settings
HOSTILE_SHARE = 0.1
TIMES = 2.0  # what trl has of our seconds
MOST_EPOCHS = 10.0  # of trl, where its rows are few
DRAWS = 1000


# -- one arm of one fold, in a process of its own ---


def tm4_fold(args: argparse.Namespace) -> tuple[list[Conversation], Rows]:
    conversations = [c for c in sources.taskmaster4(args.data) if len(c["messages"]) > 1]
    held = sources.folds([c["user_id"] for c in conversations], 5)[args.number]
    train = [c for c in conversations if c["user_id"] not in held]
    test = [_row(c["messages"], len(c["messages"]) - 1, c["user_id"]) for c in conversations if c["user_id"] in held]
    return train, test


def convai2_fold(args: argparse.Namespace) -> tuple[list[Conversation], Rows]:
    conversations = sources.convai2(args.data)
    held = sources.folds([c["user_id"] for c in conversations], 5)[args.number]
    test = [
        _row(c["messages"], i, c["user_id"])
        for c in conversations
        if c["user_id"] in held
        for i, m in enumerate(c["messages"])
        if "rating" in m and i
    ]
    return [c for c in conversations if c["user_id"] not in held], test


PARTS = {"tm4": tm4_fold, "convai2": convai2_fold}


def _row(messages: Sequence[dict[str, Any]], at: int, cluster: str) -> dict[str, Any]:
    prompt = [{"role": m["role"], "content": m["content"]} for m in messages[:at]]
    return {
        "prompt": prompt,
        "answer": messages[at]["content"],
        "liked": messages[at]["rating"] > 0,
        "cluster": cluster,
    }


def one(args: argparse.Namespace) -> dict[str, Any]:
    """What one arm makes of each held-out row, people numbered, and how its answers are judged."""
    import torch

    torch.set_num_threads(1)
    learning.keep_replay()
    train, test = PARTS[args.part](args)
    people = {name: n for n, name in enumerate(dict.fromkeys(r["cluster"] for r in test))}
    test = [r | {"cluster": people[r["cluster"]]} for r in test]
    with tempfile.TemporaryDirectory() as folder:
        taught, began = Fold(train, test, Path(folder)), time.monotonic()
        rise, adapters = taught.stock(args) if args.arm in STOCK else taught.ours(args.arm)
        seconds = round(time.monotonic() - began, 1)
        speakers = dict(zip(SPEAKERS.get(args.arm, ()), adapters, strict=False)) if args.part == "tm4" else {}
        return {
            "liked": [r["liked"] for r in test],
            "cluster": [r["cluster"] for r in test],
            "rise": [round(float(value), 4) for value in rise],
            "seconds": seconds,
            "phase2_seconds": adapters[-1].details["seconds"],
            "better": better(train, test, {name: a.path for name, a in speakers.items()}, taught.settings),
        }


@dataclass
class Fold:
    """What one fold teaches and is judged on; `home` takes what is made of it."""

    train: Sequence[Conversation]
    test: Rows
    home: Path

    def __post_init__(self) -> None:
        self.snapshot, self.settings = frozen(self.train, made(self.home))

    def ours(self, arm: str) -> tuple[NDArray[np.float64], list[Any]]:
        """How far each row's log-probability rises over the start of the arm, and the adapters of its phases."""
        taught = learning.ARMS[arm]
        snapshot, settings = self._given(taught)
        adapters = learning.learn(snapshot, taught.phases, settings)
        start = adapters[0].path if taught.phases == learning.BOTH else None
        return self._scored(adapters[-1].path) - self._scored(start), adapters

    def stock(self, args: argparse.Namespace) -> tuple[NDArray[np.float64], list[Any]]:
        """The same of trl, from phase 1 of `full`."""
        from nightschool.evolve import sft

        grounded = sft.run(self.snapshot, self.settings, folder=made(self.home), progress=tell)
        home = made(self.home)
        return stock(args.arm, self.snapshot, grounded, args.seconds, self.settings, home, self.test), [grounded]

    def _given(self, taught: learning.Arm) -> tuple[Any, Any]:
        if taught.hostile:
            return frozen(spoiled(self.train), made(self.home))
        return taught.reweigh(self.snapshot, 0), self.settings

    def _scored(self, path: Path | None) -> NDArray[np.float64]:
        from nightschool.evolve.trainer import student

        found: NDArray[np.float64] = scores(student(self.settings, path), self.test)
        return found


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


def stock(
    arm: str, snapshot: Any, grounded: Any, seconds: float, settings: Any, home: Path, test: Rows
) -> NDArray[np.float64]:
    """How far the log-probabilities of `test` rise. A fresh adapter, so that without it the model is its reference."""
    from nightschool.evolve import trainer as t
    from nightschool.serving.lora import as_named
    from peft import get_peft_model

    if arm == "trl_dpo" and not snapshot.pairs:
        return np.zeros(len(test))  # nothing to compare: it learns nothing
    night = t.suited(settings.night, snapshot)
    pupil = t.student(settings, grounded.path)
    shape = pupil.model.peft_config["default"]
    merged = pupil.model.merge_and_unload()
    with as_named(merged):
        pupil.model = get_peft_model(merged, replace(shape, inference_mode=False))
        before = scores(pupil, test)
        trainer = (_dpo if arm == "trl_dpo" else _kto)(pupil, snapshot, night, home)
    trainer._send_telemetry = lambda: None
    trainer.add_callback(timed(seconds, night.preference_lr))
    trainer.train()
    rows = trainer.state.global_step * night.batch_size
    tell(f"{arm}: {rows} rows, {trainer.state.epoch:.2f} epochs in {seconds:.0f} s")
    return scores(pupil, test) - before


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


def better(
    train: Sequence[Conversation], test: Rows, speakers: Mapping[str, Path], settings: Any
) -> dict[str, list[list[Any]]]:
    """By speaker, a row an opening: the opening, how the scorer likes the answer, and its length in words."""
    from nightschool.serving.engine import Sampling
    from nightschool.serving.local import LocalEngine

    if not speakers:
        return {}
    asked = list({r["cluster"]: r for r in test}.values())
    prompts, judge = [r["prompt"] for r in asked], scorer(train)
    engine, sampling = LocalEngine(settings.serving), Sampling(max_tokens=48, temperature=0.7, seed=0)
    found: dict[str, list[list[Any]]] = {}
    for name, path in speakers.items():
        engine.load(name, path)
        said = [a for k in range(0, len(prompts), 32) for a in _drawn(engine, prompts[k : k + 32], name, sampling)]
        marks = judge([_context(p, a) for p, a in zip(prompts, said, strict=True)])
        found[name] = [[r["cluster"], round(m, 5), len(a.split())] for r, m, a in zip(asked, marks, said, strict=True)]
    engine.close()
    return found


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
    """The share of openings at which the answer of `full` scores above another speaker's, equal scores halved."""
    spoken = {name: [row for f in folds for row in f["better"][name]] for name in folds[0]["better"]}
    marks = {name: np.array([row[1] for row in rows]) for name, rows in spoken.items()}
    found: dict[str, Any] = {}
    print(f"\ngenerations, {len(marks['full'])} openings: speaker | mean score | words | full scores higher")
    for name, mark in marks.items():
        won = (marks["full"] > mark) + (marks["full"] == mark) / 2
        draws = np.random.default_rng(0).integers(0, len(won), (DRAWS, len(won)))
        share = [round(float(won.mean()), 4), *interval(won[draws].mean(1).tolist())]
        words = np.mean([row[2] for row in spoken[name]])
        print(f"{name} | {mark.mean():.3f} | {words:.1f} | {'' if name == 'full' else share}")
        found[name] = share
    return {"tm4_better_generations": found["phase 1"], "tm4_better_than_sft": found["sft"]}


def run_folds(part: str, count: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm of every fold, `--jobs` at a time; trl's after `full`, whose seconds they have."""
    done: dict[tuple[int, str], Future[dict[str, Any]]] = {}

    def run(number: int, arm: str) -> dict[str, Any]:
        seconds = TIMES * done[number, "full"].result()["phase2_seconds"] if arm in STOCK else 0.0
        words = ("--part", part, "--number", str(number), "--arm", arm, "--seconds", str(seconds))
        found = loop.run_part(__file__, words, f"preference-{part}-{number}-{arm}", args)
        tell(f"{part} {number} {arm}: {found['seconds']} s")
        return found

    with ThreadPoolExecutor(args.jobs) as pool:
        for arm in ARMS:
            for number in range(count):
                done[number, arm] = pool.submit(run, number, arm)
    return [_joined({arm: done[number, arm].result() for arm in ARMS}) for number in range(count)]


def _joined(arms: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    by_arm = {what: {arm: found[what] for arm, found in arms.items()} for what in ("rise", "seconds")}
    spoken = {name: rows for found in arms.values() for name, rows in found["better"].items()}
    return {key: arms["full"][key] for key in ("liked", "cluster")} | by_arm | {"better": spoken}


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
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(one(args)))
        return
    result: dict[str, Any] = {}
    for name, count in (("tm4", args.folds), ("convai2", args.users)):
        if name in args.only.split(","):
            folds = run_folds(name, count, args)
            result |= summary(folds, name)
            if name == "tm4":
                result |= summary([folds[k] for k in UNTOUCHED if k < len(folds)], "tm4_untouched")
                result |= generations(folds)
    print(json.dumps({**result, **loop.circumstances()}))


if __name__ == "__main__":
    main()
