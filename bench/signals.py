"""How well the Censor tells who was satisfied, on dialogues whose ratings it never saw.

    python bench/signals.py [--only satisfaction,refit,curation] [--data FOLDER] [--cache FOLDER]

satisfaction: readers fitted on the training part of ConvAI2 and of DBDC3, each scored on the test part of both, the
coefficients that ship, and the whole Censor at its default settings. Intervals are bootstraps over dialogues.
refit: how many ratings of one's own it takes to do better than a reader from elsewhere, within ConvAI2's training half.
curation: the figures of bench/curation.py, where that is present.
Where to get the data: bench/rated.py. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import rated
import runs
from fit_censor import Array, Vectors, auc, fit_one
from nightschool.memory.cues import Exchange
from nightschool.memory.reader import Reader, shipped_reader
from nightschool.memory.signals import assess, label, learned_signal
from nightschool.memory.types import Interaction, Satisfaction
from nightschool.settings import CensorSettings
from rated import Rated
from sources import DATA

SETTINGS = CensorSettings()
BINS, WORST, DRAWS = 10, 0.1, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="satisfaction,refit,curation")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, help="keep the vectors here, for the next run")
    args = parser.parse_args()
    wanted, result = args.only.split(","), {}
    if {"satisfaction", "refit"} & set(wanted):
        parts = {"convai2": rated.convai2(args.data), "dbdc3": rated.dbdc3(args.data)}
        vectors = rated.embedded([t for part in parts.values() for t in part.texts], args.cache)
        if "satisfaction" in wanted:
            result |= satisfaction(parts, vectors)
        if "refit" in wanted:
            refit(parts, vectors)
    if "curation" in wanted and find_spec("curation"):
        import curation

        result |= curation.figures(args.data)
    print(json.dumps({**result, **runs.circumstances()}))


# -- satisfaction ---


def satisfaction(parts: dict[str, Rated], vectors: Vectors) -> dict[str, Any]:
    shipped = shipped_reader()
    own = {name: fit_one(part.at(~part.test), vectors, shipped.coherence) for name, part in parts.items()}
    tests = {name: part.at(part.test) for name, part in parts.items()}
    print(f"{'reader':<26}{'tested on':<10}AUC of disliked [95 %]       AP    worst 10 %  ECE    ECE of disliked")
    found = {
        (reader, test): report(f"fitted on {reader}", test, own[reader], tests[test], vectors)
        for reader in own
        for test in tests
    }
    shipped_found = {test: report("shipped, both", test, shipped, tests[test], vectors) for test in tests}
    whole = [whole_censor(name, test, shipped, vectors) for name, test in tests.items()]
    return {
        "convai2_auc": found["convai2", "convai2"]["auc"],
        "dbdc3_auc": found["dbdc3", "dbdc3"]["auc"],
        "cross_auc": min(found["convai2", "dbdc3"]["auc"], found["dbdc3", "convai2"]["auc"]),
        "ece": max(found[name, name]["ece"] for name in tests),
        "worst_tenth_precision": min(found[name, name]["worst"] for name in tests),
        **{f"shipped_{test}_{what}": told[what] for test, told in shipped_found.items() for what in ("auc", "ece")},
        "coverage": min(whole),
        "turns_per_s": turns_per_s(tests["dbdc3"], shipped, vectors),
    }


def report(name: str, on: str, reader: Reader, test: Rated, vectors: Vectors) -> dict[str, float]:
    odds = reader.log_odds(test.exchanges, vectors)
    predicted = 1 / (1 + np.exp(-odds))
    low, high = interval(test, lambda rows: auc(test.disliked[rows], odds[rows]))
    worst = np.argsort(odds, kind="stable")[: round(WORST * len(odds))]
    figures = {
        "auc": auc(test.disliked, odds),
        "worst": round(float(test.disliked[worst].mean()), 3),
        "ap": average_precision(test.disliked, odds),
        "ece": calibration_error(predicted, test.satisfied),
        "ece_disliked": calibration_error(1 - predicted, test.disliked.astype(float)),
    }
    print(
        f"{name:<26}{on:<10}{figures['auc']:.3f} [{low:.3f}, {high:.3f}]"
        f"{figures['ap']:>15.3f}{figures['worst']:>9.3f}{figures['ece']:>11.3f}{figures['ece_disliked']:>9.3f}"
    )
    return figures


def calibration_error(predicted: Array, observed: Array) -> float:
    """Mean distance of predicted and observed over ten equal bins of the predictions."""
    bins = np.array_split(np.argsort(predicted, kind="stable"), BINS)
    gaps = [len(b) * abs(predicted[b].mean() - observed[b].mean()) for b in bins]
    return round(float(sum(gaps) / len(predicted)), 4)


def average_precision(disliked: Any, odds: Array) -> float:
    from sklearn.metrics import average_precision_score

    return round(float(average_precision_score(disliked, -odds)), 3)


def interval(test: Rated, measure: Callable[[Any], float]) -> tuple[float, float]:
    """The middle 95 % of `measure` over dialogues drawn with replacement."""
    random = np.random.default_rng(0)
    rows_of = [np.flatnonzero(test.dialogues == name) for name in np.unique(test.dialogues)]
    drawn = (random.integers(len(rows_of), size=len(rows_of)) for _ in range(DRAWS))
    values = [measure(np.concatenate([rows_of[i] for i in draw])) for draw in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def whole_censor(name: str, test: Rated, reader: Reader, vectors: Vectors) -> float:
    """The share of turns that cues and the shipped reader label by default, and how often they are right."""
    odds = reader.log_odds(test.exchanges, vectors)
    for what, learned in (("cues alone", np.zeros(len(odds))), ("cues and reader", odds)):
        met = [assessed(e, float(o), vectors) for e, o in zip(test.exchanges, learned, strict=True)]
        labels = np.array([label(m, SETTINGS) or "" for m in met])
        shares = {which: (labels == which) for which in ("disliked", "liked")}
        said = "; ".join(
            f"{rows.sum()} {which}: mean satisfaction {test.satisfied[rows].mean() if rows.any() else float('nan'):.2f}"
            for which, rows in shares.items()
        )
        covered = round(float((labels != "").mean()), 3)
        print(f"{name}, {what}: {covered:.1%} labelled; {said}; all {test.satisfied.mean():.2f}")
    return covered


def assessed(e: Exchange, odds: float, vectors: Vectors) -> Satisfaction:
    def turn(text: str, reply: str) -> Interaction:
        return Interaction("", "", "", "", 0, (), text, reply, 0.0)

    cosine = float(vectors[e.request] @ vectors[e.reaction]) if {e.request, e.reaction} <= vectors.keys() else None
    learned = learned_signal(odds, at_home=False)
    return assess(turn(e.request, e.reply), [], turn(e.reaction or "", ""), cosine, e.earlier_replies, learned)


def turns_per_s(test: Rated, reader: Reader, vectors: Vectors) -> int:
    """Cues, features and both heads, with the vectors at hand; processor time of one thread."""
    started = time.process_time()
    for e, o in zip(test.exchanges, reader.log_odds(test.exchanges, vectors), strict=True):
        assessed(e, float(o), vectors)
    return round(len(test.exchanges) / (time.process_time() - started))


# -- refitting ---


def refit(parts: dict[str, Rated], vectors: Vectors, sizes: tuple[int, ...] = (50, 100, 200, 300, 400, 500)) -> None:
    """AUC on a fifth of ConvAI2's training dialogues of readers fitted on so many ratings of the others."""
    coherence = shipped_reader().coherence
    home = parts["convai2"].at(~parts["convai2"].test)
    abroad = fit_one(parts["dbdc3"].at(~parts["dbdc3"].test), vectors, coherence)
    found: dict[str, list[float]] = {"from elsewhere": [], **{str(size): [] for size in sizes}}
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(np.unique(home.dialogues))
        judged = home.at(np.isin(home.dialogues, order[: len(order) // 5]))
        others = np.flatnonzero(np.isin(home.dialogues, order[len(order) // 5 :]))
        others = others[np.argsort([np.flatnonzero(order == d)[0] for d in home.dialogues[others]], kind="stable")]
        found["from elsewhere"].append(auc(judged.disliked, abroad.log_odds(judged.exchanges, vectors)))
        for size in sizes:
            reader = fit_one(home.at(others[:size]), vectors, coherence)
            found[str(size)].append(auc(judged.disliked, reader.log_odds(judged.exchanges, vectors)))
    for name, values in found.items():
        print(f"own ratings {name:>15}: AUC {np.mean(values):.3f} ± {np.std(values):.3f} over five draws")


if __name__ == "__main__":
    main()
