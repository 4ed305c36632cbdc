"""How often the gate is wrong: candidates that are no better must not be promoted, and better ones should be.

    make bench NAME=gate ARGS="--runs 200 [--scores FOLDER]"

Simulated: held-out answers of people whose share of liked answers and whose rewards differ from person to person; the
whole of `gate.judge` runs on an engine that says the log-probabilities we drew.
  same         the candidate says everything as the incumbent does, but for noise
  format only  it says everything better by a quarter of a nat a token on average, more or less from answer to answer
               and the more the longer it is, and liked answers no more than others
  better .65   the same, and a liked answer rose more than a disliked one, per token, with that chance
  dearer       as well ranked, but it says everything worse by so many nats a token on average, of the 3 that the
               incumbent had gained over the base
Real: with --scores, the folder that `bench/loop.py --keep` wrote, the scores of real nights on openings that they
never saw. For the null, answers and rewards keep their order and the likes are turned round by a random distance, so
that both stay as alike within an opening as they were; for both, openings are drawn from a fold.
The last line printed is JSON; `false_promote` and `power` are those of 40 people.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from nightschool.content import Message
from nightschool.evolve.gate import judge, probe_text
from nightschool.evolve.types import Adapter, Judged, Snapshot
from nightschool.serving.engine import Sampling, Score
from nightschool.settings import GateSettings
from numpy.typing import NDArray
from runs import circumstances, state
from scipy.optimize import brentq
from scipy.stats import binomtest

CANDIDATE = Adapter("candidate", "base", "b2:s", "dpo", "grounded", Path("candidate"), 0.0)
INCUMBENT = Adapter("incumbent", "base", "b2:s", "dpo", None, Path("incumbent"), 0.0)
PEOPLE = (15, 40, 120)
MARGIN = 0.65  # area under the curve of a candidate that should be promoted
FORMAT_NATS = 0.25
DEARER = (0.1, 0.5)
GAINED = 3.0  # nats a token of the simulated incumbent over the base, about those of seven nights

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Held-out answers with log-probabilities of whole answers, in nats, by three adapters."""

    cluster: NDArray[Any]
    liked: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    incumbent: Vector
    grounded: Vector
    candidate: Vector

    def at(self, rows: NDArray[Any], cluster: NDArray[Any]) -> Scored:
        return Scored(cluster, *(getattr(self, name)[rows] for name in list(vars(self))[1:]))


class Saying:
    """An engine that says the log-probabilities of `scored`; answers are named by their place."""

    base_id = "base"

    def __init__(self, scored: Scored, gained: float) -> None:
        """`gained` are the nats a token by which the base is behind the incumbent."""
        self._scored, self._gained = scored, gained

    def score(
        self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], *, adapter: str | None
    ) -> list[Score]:
        return [self._score(answer, adapter) for answer in answers]

    def _score(self, answer: str, adapter: str | None) -> Score:
        if not answer.startswith("#"):
            return Score((-2.0,) * 10)  # neither the probe text nor the lean toward agreeing moves
        place = int(answer[1:])
        tokens, total = int(self._scored.tokens[place]), float(getattr(self._scored, adapter or "incumbent")[place])
        return Score((total / tokens - (0 if adapter else self._gained),) * tokens)

    def generate(self, prompts: Sequence[object], *, adapter: str | None, sampling: Sampling) -> list[str]:
        return ["well"] * len(prompts)


def promoted(scored: Scored, settings: GateSettings, incumbent: Adapter | None = INCUMBENT) -> bool:
    """Where there is no incumbent the base serves, and the rise is over phase 1."""
    rows = enumerate(zip(scored.cluster.tolist(), scored.liked.tolist(), strict=True))
    asked: Message = {"role": "user", "content": "?"}
    held_out = tuple(Judged((asked,), f"#{i}", bool(liked), str(who), ()) for i, (who, liked) in rows)
    engine = Saying(scored, GAINED if incumbent else 0.0)
    return judge(CANDIDATE, incumbent, Snapshot((), (), (), held_out), engine, settings).accepted


# -- simulated ---


def simulated(people: int, area: float, nats: float, rng: np.random.Generator) -> Scored:
    """Each person rates one answer and about three more; what they like and what rose for them are alike.

    `nats` a token are of the form, more or less from answer to answer and the more the longer it is; `area` is the
    chance that a liked answer rose more, per token, than a disliked one, all of that noise included.
    """
    cluster = np.repeat(np.arange(people), 1 + rng.poisson(3, people))
    liked = rng.random(len(cluster)) < rng.beta(3, 2, people)[cluster]
    tokens, rise = unmoved(cluster, nats, rng)
    incumbent = -(tokens * rng.gamma(8, 0.25, len(cluster)))
    candidate = incumbent + (rise + shift_for(area, nats) * liked) * tokens
    return Scored(cluster, liked, tokens, incumbent, incumbent, candidate)


def unmoved(cluster: NDArray[Any], nats: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], Vector]:
    """Tokens of answers, and by how much they rose, per token, whether liked or not."""
    count = len(cluster)
    tokens = rng.integers(4, 40, count)
    form = nats * rng.gamma(4, 0.25, count) * tokens / 21.5
    return tokens, form + 0.05 * (0.5 * rng.normal(size=cluster.max() + 1)[cluster] + rng.normal(size=count))


@cache
def shift_for(area: float, nats: float) -> float:
    """By how much liked answers must rise more for that area."""
    rng = np.random.default_rng(0)
    one, other = (unmoved(np.arange(100_000), nats, rng)[1] for _ in range(2))
    return float(brentq(lambda shift: (one + shift > other).mean() - area, -5, 5))


SIMULATED = {
    "same": (0.5, 0.0),
    "format only": (0.5, FORMAT_NATS),
    f"better {MARGIN}": (MARGIN, FORMAT_NATS),
    **{f"better {MARGIN}, dearer by {nats}": (MARGIN, -nats) for nats in DEARER},
}


# -- real ---


def folds(folder: Path) -> list[Scored]:
    found = sorted(folder.glob(f"loop-tm4-*-{state()}.json"))
    if not found:
        raise SystemExit(f"{folder}: no loop-tm4-*.json; make it with `bench/loop.py --only tm4 --keep {folder}`")
    return [_fold(json.loads(path.read_text())["rows"]) for path in found]


def _fold(rows: dict[str, list[Any]]) -> Scored:
    order = np.argsort(rows["cluster"], kind="stable")
    columns = [np.asarray(rows[name])[order] for name in ("liked", "tokens", "before", "grounded", "after")]
    return Scored(np.asarray(rows["cluster"])[order], *columns)


def turned(fold: Scored, rng: np.random.Generator) -> Scored:
    by = int(rng.integers(len(fold.liked) // 10, len(fold.liked) - len(fold.liked) // 10))
    return Scored(fold.cluster, np.roll(fold.liked, by), fold.tokens, fold.incumbent, fold.grounded, fold.candidate)


def drawn(fold: Scored, people: int, rng: np.random.Generator) -> Scored:
    """`people` clusters of the fold, with replacement; one drawn twice counts as two."""
    names = rng.choice(np.unique(fold.cluster), people)
    rows = [np.flatnonzero(fold.cluster == name) for name in names]
    return fold.at(np.concatenate(rows), np.repeat(np.arange(people), list(map(len, rows))))


# -- the whole ---


Case = tuple[str, int, Adapter | None, Callable[[int, np.random.Generator], Scored]]


def cases(scores: Path | None) -> Iterator[Case]:
    """(what, people, what serves, how to draw run number i); the real nights were the first, so the base served."""
    for people in PEOPLE:
        for what, (area, nats) in SIMULATED.items():
            yield what, people, INCUMBENT, partial(_simulated, people, area, nats)
    if scores is not None:
        real = folds(scores)
        for people in PEOPLE:
            yield "real, likes turned", people, None, partial(_real, real, people, True)
            yield "real", people, None, partial(_real, real, people, False)


def _simulated(people: int, area: float, nats: float, _: int, rng: np.random.Generator) -> Scored:
    return simulated(people, area, nats, rng)


def _real(real: Sequence[Scored], people: int, turn: bool, i: int, rng: np.random.Generator) -> Scored:
    fold = real[i % len(real)]
    return drawn(turned(fold, rng) if turn else fold, people, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--scores", type=Path)
    args = parser.parse_args()
    settings, found = GateSettings(), {}
    assert probe_text()
    print("candidate | people | promoted, with a 95 % interval")
    for what, people, incumbent, draw in list(cases(args.scores)):  # what is missing is told before hours of runs
        drawings = (draw(i, np.random.default_rng([i, people])) for i in range(args.runs))
        count = sum(promoted(drawing, settings, incumbent) for drawing in drawings)
        share = binomtest(count, args.runs).proportion_ci(method="wilson")
        print(f"{what} | {people} | {count / args.runs:.3f} [{share.low:.3f}, {share.high:.3f}]", flush=True)
        found[f"{what}, {people}"] = count / args.runs
    result = {"false_promote": found["format only, 40"], "power": found[f"better {MARGIN}, 40"], "runs": args.runs}
    print(json.dumps({**result, "by_case": found, **circumstances()}))


if __name__ == "__main__":
    main()
