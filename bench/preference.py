"""What a night learns of people's own ratings, against stock trl on the same data: a scorer, and what the model says.

    make bench NAME=preference ARGS="--jobs 2 --keep FOLDER"

tm4: Taskmaster-4 rewards, held out by opening, five folds. convai2: thumbs of ConvAI2, held out by user, `--users`
folds. The arms are those of `bench/learning.py` that train, in the same visits of rows, and stock trl:

  full                both phases; the learnt preference is told from phase 1
  equal, shuffled     the same with every weight 1, with the weights dealt out anew; both also undo the balance of likes
                      and dislikes
  hostile             the same where a tenth of the people whose ratings are learnt from rate the other way round
  sft, dpo            one phase alone with the passes of both, told from the base
  trl_dpo, trl_kto    from phase 1 of `full`: trl's DPO on the pairs, KTO on the thumbs of the same snapshot, liked and
                      disliked in balance, prompts cut as ours are, at our rate, which falls linearly, for twice the
                      seconds of CPU that phase 2 of `full` trained or ten passes; else as they come. A fold without
                      pairs teaches trl's DPO nothing

The learnt preference of a held-out answer is the rise of its log-probability over the arm's start. Its AUC is within a
fold and averaged. Beside it stand that of the rise per token, which the gate looks at, since length alone ranks some
folds and whatever raises or lowers all tokens then counts as preference, and that of the rise over the base, which all
arms have in common. Accuracy is that of calling as many liked as were. Two baselines need no model: counts (the length
of answer and prompt, and how far in the talk it is) and TF-IDF of the answer in its context, each by logistic
regression on the ratings of the other folds. What an arm makes of liked answers, in nats a token before and after, says
whether it still would say them.

Generations: one answer a held-out opening, drawn with the same seed from phase 1, from `sft` and from `full`, and which
is better by two scorers (TF-IDF and logistic regression): one fitted on people's ratings in the other folds, which are
those that the speakers learnt from, and one on those of this fold, which none of them saw.

95 % intervals are bootstraps over openings or users. An arm of a fold is one run, and another order of its rows moves
an AUC by some .03, which they leave out. Our settings were chosen with results of folds 0, 1 and 4 of Taskmaster-4 and
4 of ConvAI2 in sight (bench/results/loop.md, trial-training.md), so folds 2 and 3 of Taskmaster-4 are told apart as
well; trl's are untuned. Seconds are of training and scoring. With --keep, an arm of a fold that was run is not run
again. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learning
import numpy as np
import runs
import sources
from baselines import BASELINES, Rows, by_words, rated
from nightschool.evolve.gate import cluster_draws, weighted_auc
from numpy.typing import NDArray
from stock import STOCK, TIMES, stock

Conversation = dict[str, Any]
ARMS = ("full", *STOCK, "sft", "dpo", "equal", "shuffled", "hostile")  # in the order in which they are run
SPEAKERS = {"full": ("phase 1", "full"), "sft": ("sft",)}  # the adapters of an arm that answer
UNTOUCHED = (2, 3)  # folds of Taskmaster-4 that had no part in choosing settings
HOSTILE_SHARE = 0.1
DRAWS = 1000


# -- one arm of one fold, in a process of its own ---


def tm4(args: argparse.Namespace) -> list[Conversation]:
    return [c for c in sources.taskmaster4(args.data) if len(c["messages"]) > 1]


def convai2(args: argparse.Namespace) -> list[Conversation]:
    return sources.convai2(args.data)


PARTS = {"tm4": tm4, "convai2": convai2}


def one(args: argparse.Namespace) -> dict[str, Any]:
    """What one arm makes of each held-out row, people numbered, and how its answers are judged."""
    import torch

    torch.set_num_threads(1)
    learning.keep_replay()
    conversations = PARTS[args.part](args)
    held = sources.folds([c["user_id"] for c in conversations], 5)[args.number]
    train = [c for c in conversations if c["user_id"] not in held]
    test, elsewhere = rated([c for c in conversations if c["user_id"] in held]), rated(train)
    people = {name: n for n, name in enumerate(dict.fromkeys(r["cluster"] for r in test))}
    test = [r | {"cluster": people[r["cluster"]]} for r in test]
    with tempfile.TemporaryDirectory() as folder:
        taught, began = Fold(train, test, Path(folder)), time.monotonic()
        found, adapters = taught.stock(args) if args.arm in STOCK else taught.ours(args.arm)
        found["seconds"] = round(time.monotonic() - began, 1)
        speakers = dict(zip(SPEAKERS.get(args.arm, ()), adapters, strict=False)) if args.part == "tm4" else {}
        spoken = better(elsewhere, test, {name: a.path for name, a in speakers.items()}, taught.settings)
    told = {"liked": [r["liked"] for r in test], "cluster": [r["cluster"] for r in test]}
    baselines = {name: list(map(_short, of(elsewhere)(test))) for name, of in BASELINES.items()}
    return told | found | {"better": spoken, "baselines": baselines}


def _short(value: float) -> float:
    return round(float(value), 4)


@dataclass
class Fold:
    """What one fold teaches and is judged on; `home` takes what is made of it."""

    train: Sequence[Conversation]
    test: Rows
    home: Path

    def __post_init__(self) -> None:
        self.snapshot, self.settings = frozen(self.train, made(self.home))

    def ours(self, arm: str) -> tuple[dict[str, Any], list[Any]]:
        """Log-probabilities of each row from the base, the start of the arm and its end; the adapters of its phases."""
        taught = learning.ARMS[arm]
        snapshot, settings = self._given(taught)
        cpu, clock = time.process_time(), time.monotonic()
        adapters = learning.learn(snapshot, taught.phases, settings)
        busy = (time.process_time() - cpu) / (time.monotonic() - clock)
        start = adapters[0].path if taught.phases == learning.BOTH else None
        plans = [a.details["plan"] for a in adapters if "plan" in a.details]
        seconds = round(busy * adapters[-1].details["seconds"], 1)
        return self._scored(start, adapters[-1].path) | {"plans": plans, "phase2_cpu_seconds": seconds}, adapters

    def stock(self, args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
        """The same of trl, from phase 1 of `full`."""
        from nightschool.evolve import sft

        grounded = sft.run(self.snapshot, self.settings, folder=made(self.home), progress=tell)
        given = args.arm, self.snapshot, grounded, args.seconds, self.settings, made(self.home)
        after, passes = stock(*given, lambda pupil: scores(pupil, self.test)[0])
        return self._scored(grounded.path) | {"after": list(map(_short, after)), **passes}, [grounded]

    def _given(self, taught: learning.Arm) -> tuple[Any, Any]:
        if taught.hostile:
            return frozen(spoiled(self.train), made(self.home))
        return taught.reweigh(self.snapshot, 0), self.settings

    def _scored(self, start: Path | None, end: Path | None = None) -> dict[str, list[float]]:
        from nightschool.evolve.trainer import student

        base, tokens = scores(student(self.settings), self.test)
        found = {"tokens": tokens, "base": base, "start": base}
        for name, path in (("start", start), ("after", end)):
            if path:
                found[name], _ = scores(student(self.settings, path), self.test)
        return {name: list(map(_short, values)) for name, values in found.items()}


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
    from nightschool.memory.store import MemoryStore
    from nightschool.settings import Settings

    settings = Settings(home=home / "home")
    with MemoryStore(settings) as store:
        runs.bring_in(store, home, train, sources.CLOCK)
        return dataset.freeze(store, settings, now=store.clock()), settings


# -- what is learnt ---


def scores(pupil: Any, test: Rows) -> tuple[Any, Any]:
    """The log-probability of each held-out answer, and its number of tokens."""
    import torch
    from nightschool.evolve.batches import collate, logps
    from nightschool.evolve.lessons import Lesson, encode, lay_out

    encoded = [encode(pupil.tokenizer, r["prompt"], [r["answer"]], 4096) for r in test]
    lessons = [Lesson(*(ids or ((0,), ((0,),))), "imitate", 1.0) for ids in encoded]  # an empty one is some token
    values = np.full(len(test), np.nan)
    pupil.model.eval()
    with torch.no_grad():
        for passage in lay_out(lessons, 1024, 8, pupil.merges):
            batch = collate([passage], lessons, pupil.pad, pupil.merges)
            for (i, _), value in zip(batch["answer"].tolist(), logps(pupil.model, batch).tolist(), strict=True):
                values[i] = value
    assert np.isfinite(values).all()
    return values, np.array([len(lesson.answers[0]) for lesson in lessons])


# -- what is said ---


def better(train: Rows, test: Rows, speakers: Mapping[str, Path], settings: Any) -> dict[str, list[list[Any]]]:
    """By speaker, a row an opening: the opening, how each of the two scorers likes the answer, its length in words."""
    from nightschool.serving.engine import Sampling
    from nightschool.serving.local import LocalEngine

    if not speakers:
        return {}
    asked = list({r["cluster"]: r for r in test}.values())
    prompts, judges = [r["prompt"] for r in asked], [by_words(train), by_words(test)]
    engine = LocalEngine(settings.serving)
    found: dict[str, list[list[Any]]] = {}
    for name, path in speakers.items():
        engine.load(name, path)
        said: list[str] = []
        for k in range(0, len(prompts), 32):
            sampling = Sampling(max_tokens=48, temperature=0.7, seed=k)
            said += engine.generate(prompts[k : k + 32], adapter=name, sampling=sampling)
        answers = [r | {"answer": a} for r, a in zip(asked, said, strict=True)]
        marks = np.transpose([judge(answers) for judge in judges])
        found[name] = [
            [r["cluster"], *map(_short, m), len(r["answer"].split())] for r, m in zip(answers, marks, strict=True)
        ]
    engine.close()
    return found


# -- the whole ---


def summary(folds: Sequence[dict[str, Any]], name: str, arms: Sequence[str]) -> dict[str, Any]:
    """AUC and accuracy by arm, ours minus each other arm, with intervals; prints the table."""
    draws = [_draws(f, seed) for seed, f in enumerate(folds)]
    areas = {arm: _areas(folds, [_rise(f, arm) for f in folds], draws) for arm in arms}
    print(
        f"\n{name}, {len(folds)} folds:"
        " arm | AUC [95 %] | full minus it | per token | over the base | accuracy | nats a token of liked answers,"
        " before and after | seconds a fold"
    )
    result: dict[str, Any] = {}
    for arm in arms:
        less = areas["full"] - areas[arm]
        others = {
            "per_token": _areas(folds, [_rise(f, arm) / np.array(f[arm]["tokens"]) for f in folds], draws),
            "over_base": _areas(folds, [_rise(f, arm, "base") for f in folds], draws),
        }
        told = " | ".join(_told(values) for values in others.values())
        right = np.mean([accuracy(_rise(f, arm), np.array(f["full"]["liked"])) for f in folds])
        seconds = np.mean([f[arm]["seconds"] for f in folds])
        cost = [float(np.mean([_cost(f[arm], stage) for f in folds])) for stage in ("start", "after")]
        print(
            f"{arm} | {_told(areas[arm])} | {less[0]:+.3f} {interval(less[1:])} | {told} | {right:.3f}"
            f" | {cost[0]:.2f}, {cost[1]:.2f} | {seconds:.0f}"
        )
        key = f"{name}_auc" if arm == "full" else f"{name}_auc_{arm}"
        result[key] = round(areas[arm][0], 4)
        result |= {f"{key}_{what}": round(values[0], 4) for what, values in others.items()}
        result[f"{key}_nll_liked"] = [round(nats, 4) for nats in cost]
        if arm != "full":
            result[f"{name}_full_minus_{arm}"] = interval(less[1:])
    for what in BASELINES:
        values = _areas(folds, [np.array(f["full"]["baselines"][what]) for f in folds], draws)
        less = areas["full"] - values
        print(f"{what} | {_told(values)} | {less[0]:+.3f} {interval(less[1:])}")
        result[f"{name}_auc_{what}"] = round(values[0], 4)
    most = np.mean([max(np.mean(f["full"]["liked"]), 1 - np.mean(f["full"]["liked"])) for f in folds])
    print(f"calling all the same is right in {most:.3f}")
    return result


def _cost(found: dict[str, Any], stage: str) -> float:
    """Nats a token of the liked answers: a scorer that ranks well may have forgotten how to say them."""
    liked = np.array(found["liked"])
    return float(-np.array(found[stage])[liked].sum() / np.array(found["tokens"])[liked].sum())


def _draws(fold: dict[str, Any], seed: int) -> NDArray[np.int64]:
    """How often each row counts, (1 + DRAWS, rows): once each, then in samples of whole clusters."""
    cluster = fold["full"]["cluster"]
    return np.vstack([np.ones((1, len(cluster)), int), cluster_draws(cluster, DRAWS, seed)])


def _rise(fold: dict[str, Any], arm: str, over: str = "start") -> NDArray[np.float64]:
    return np.array(fold[arm]["after"]) - np.array(fold[arm][over])


def _areas(folds: Sequence[dict[str, Any]], values: Sequence[Any], draws: Sequence[Any]) -> NDArray[np.float64]:
    """The AUC of `values` within folds, averaged, (1 + DRAWS,): as it is, and in the samples."""
    parts = zip(values, folds, draws, strict=True)
    areas: NDArray[np.float64] = np.mean(
        [weighted_auc(v, np.array(f["full"]["liked"]), d) for v, f, d in parts], axis=0
    )
    return areas


def _told(values: NDArray[np.float64]) -> str:
    return f"{values[0]:.3f} {interval(values[1:])}"


def accuracy(rise: NDArray[np.float64], liked: NDArray[np.bool_]) -> float:
    """Of calling liked the answers that rose most, as many as were; where all rose alike, of calling all the same."""
    if np.ptp(rise) == 0:
        return float(max(liked.mean(), 1 - liked.mean()))
    called = np.zeros(len(rise), bool)
    called[np.argsort(-rise, kind="stable")[: liked.sum()]] = True
    return float(np.mean(called == liked))


def interval(values: NDArray[np.float64]) -> list[float]:
    return [round(float(np.quantile(values, q)), 4) for q in (0.025, 0.975)]


def generations(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share of openings at which the answer of `full` scores above another speaker's, equal scores halved."""
    spoken: dict[str, list[Any]] = {}
    for f in folds:
        for name, rows in [said for arm in f.values() for said in arm["better"].items()]:
            spoken.setdefault(name, []).extend(rows)
    print(f"\ngenerations, {len(spoken['full'])} openings: speaker | scorer | mean score | words | full scores higher")
    found: dict[tuple[str, int], list[float]] = {}
    for n, scorer in enumerate(("of the other folds", "of this fold"), 1):
        marks = {name: np.array([row[n] for row in rows]) for name, rows in spoken.items()}
        for name, mark in marks.items():
            share = _wins(marks["full"], mark)
            words = np.mean([row[3] for row in spoken[name]])
            print(f"{name} | {scorer} | {mark.mean():.3f} | {words:.1f} | {'' if name == 'full' else share}")
            found[name, n] = share
    keys = {"phase 1": "tm4_better_generations", "sft": "tm4_better_than_sft"}
    return {f"{keys[name]}{'' if n == 1 else '_own_scorer'}": found[name, n] for name, n in found if name in keys}


def _wins(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> list[float]:
    won = (ours > theirs) + (ours == theirs) / 2
    draws = np.random.default_rng(0).integers(0, len(won), (DRAWS, len(won)))
    return [round(float(won.mean()), 4), *interval(won[draws].mean(1))]


def run_folds(part: str, count: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm of every fold, `--jobs` at a time; trl's after `full`, whose seconds they have."""
    done: dict[tuple[int, str], Future[dict[str, Any]]] = {}

    def run(number: int, arm: str) -> dict[str, Any]:
        seconds = TIMES * done[number, "full"].result()["phase2_cpu_seconds"] if arm in STOCK else 0.0
        words = ("--part", part, "--number", str(number), "--arm", arm, "--seconds", str(seconds))
        kept = args.keep / f"preference-{part}-{number}-{arm}-{runs.state()}.json" if args.keep else None
        found = runs.part(__file__, (*words, "--data", str(args.data)), kept)
        tell(f"{part} {number} {arm}: {found['seconds']} s")
        return found

    arms = [arm for arm in ARMS if arm in args.arms]
    with ThreadPoolExecutor(args.jobs) as pool:
        for arm in arms:
            for number in range(count):
                done[number, arm] = pool.submit(run, number, arm)
    return [{arm: done[number, arm].result() for arm in arms} for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="tm4,convai2")
    parser.add_argument("--folds", type=int, default=5, help="of the five of Taskmaster-4")
    parser.add_argument("--arms", type=lambda names: names.split(","), default=ARMS, help="full, and others of them")
    parser.add_argument("--users", type=int, default=5, help="of the five of ConvAI2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", type=Path, default=sources.DATA)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "full" not in args.arms or set(args.arms) - set(ARMS):
        parser.error(f"--arms is {','.join(args.arms)}; it is full and others of {', '.join(ARMS)}")
    if args.part:
        print(json.dumps(one(args)))
        return
    result: dict[str, Any] = {}
    parts: list[dict[str, Any]] = []
    for name, count in (("tm4", args.folds), ("convai2", args.users)):
        if name in args.only.split(","):
            folds = run_folds(name, count, args)
            parts += [part for fold in folds for part in fold.values()]
            result |= summary(folds, name, list(folds[0]))
            if name == "tm4":
                if untouched := [folds[k] for k in UNTOUCHED if k < len(folds)]:
                    result |= summary(untouched, "tm4_untouched", list(folds[0]))
                result |= generations(folds)
    print(json.dumps({**result, **runs.circumstances(parts)}))


if __name__ == "__main__":
    main()
