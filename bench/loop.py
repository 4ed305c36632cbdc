"""The whole loop on real conversations: import, one night, the gate, and what the adapter does on people it never saw.

    python bench/loop.py [--only tm4,convai2,null] [--folds 5] [--seeds 10] [--jobs 2] [--data FOLDER] [--keep FOLDER]

tm4: Taskmaster-4 rewards, held out by opening, five folds; each fold is one process with its own home. The tables show
the held-out fold, which no night saw; intervals are cluster bootstraps over openings, all folds pooled.
convai2: thumbs of real users, imported whole, one night, the verdict as it falls.
null: small samples of Taskmaster-4, one a seed, with their rewards dealt out anew: a night must not be promoted.
With --keep, what a process found is written there and not run again, so that a run that was stopped goes on.
Where to get the data: bench/sources.py. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import runs
import sources
from baselines import by_words, rated

Conversation = dict[str, Any]


def main() -> None:
    args = parse()
    if not args.data.exists():
        sys.exit(f"{args.data}: no such folder; bench/sources.py says where the data comes from, --data where it lies")
    if args.part:
        print(json.dumps(PARTS[args.part](args.data, args.number)))
        return
    counts = {"tm4": args.folds, "convai2": 1, "null": args.seeds}
    found = {part: run_parts(part, counts[part], args) for part in args.only.split(",")}
    result = {part: SUMMARIES[part](nights) for part, nights in found.items()}
    print(json.dumps({**result, **runs.circumstances(night for nights in found.values() for night in nights)}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="tm4,convai2,null")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--data", type=Path, default=sources.DATA)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one fold or seed, in a process of its own
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_parts(part: str, count: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each part in a process of its own, `--jobs` at a time, one thread each."""

    def run(number: int) -> dict[str, Any]:
        words = ("--part", part, "--number", str(number), "--data", str(args.data))
        kept = args.keep / f"loop-{part}-{number}-{runs.state()}.json" if args.keep else None
        found = runs.part(__file__, words, kept)
        print(f"{part} {number}: {json.dumps({k: v for k, v in found.items() if k != 'rows'})}", flush=True)
        return found

    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(run, range(count)))


# -- one night in a home of its own ---


def night(conversations: Sequence[Conversation], home: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Import, one night; returns the open assistant, the cycle and what it cost."""
    import nightschool
    import torch
    from nightschool.pipelines import nightly
    from nightschool.settings import Settings

    torch.set_num_threads(1)
    started = time.monotonic()
    assistant = n = nightschool.open(settings=Settings(home=home))  # whatever the environment says
    report = runs.bring_in(assistant.store, home, conversations, sources.CLOCK)
    imported = time.monotonic()
    print(f"imported {report.interactions_new} turns in {imported - started:.0f}s", file=sys.stderr, flush=True)
    cycle = nightly.run(
        n.store, n.registry, lambda: n.engine, n.settings, lambda s: print(s, file=sys.stderr, flush=True)
    )
    cost = {
        "interactions": report.interactions_new,
        "rated": report.feedback_new,
        "seconds": round(time.monotonic() - started, 1),
        "import_seconds": round(imported - started, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    return assistant, cycle, cost


def verdict_of(assistant: Any, cycle: Any) -> dict[str, Any]:
    verdict = assistant.registry.verdict(cycle.candidate_id) if cycle.candidate_id else None
    measures = {m.name: m for m in verdict.measures} if verdict else {}
    probe = measures.get("probe_nll")
    empty, circles = measures.get("empty_answers"), measures.get("repetition")
    return {
        "outcome": cycle.outcome,
        "accepted": bool(verdict and verdict.accepted),
        "reasons": list(verdict.reasons) if verdict else [],
        "probe_nll_change": round(probe.change, 4) if probe else None,
        "empty_answers": empty.candidate if empty else None,
        "repetition": [round(circles.incumbent, 4), round(circles.candidate, 4)] if circles else None,
    }


# -- Taskmaster-4 ---


def tm4_fold(data: Path, number: int) -> dict[str, Any]:
    conversations = [c for c in sources.taskmaster4(data) if len(c["messages"]) > 1]  # six answer nobody
    held_out = sources.folds([c["user_id"] for c in conversations], 5)[number]
    train = [c for c in conversations if c["user_id"] not in held_out]
    test = [c for c in conversations if c["user_id"] in held_out]
    with tempfile.TemporaryDirectory() as home:
        assistant, cycle, cost = night(train, Path(home))
        rows = tm4_rows(assistant, cycle, test)
        rows["gram4"] = four_gram_nll(assistant, train, test)
        rows["tfidf"] = tfidf_scores(train, test)
        found = {**cost, **verdict_of(assistant, cycle), "rows": rows}
        assistant.close()
    return {**found, **tm4_measures([rows])}


def tm4_rows(assistant: Any, cycle: Any, test: Sequence[Conversation]) -> dict[str, list[Any]]:
    """Per held-out turn: log-probabilities before, after phase 1 and after phase 2, and under another row's context."""
    registry, engine = assistant.registry, assistant.engine
    candidate = registry.adapter(cycle.candidate_id)
    grounded = registry.adapter(candidate.parent_id or candidate.id)
    for adapter in (candidate, grounded):
        if adapter.id not in engine.adapters():
            engine.load(adapter.id, adapter.path)
    prompts = [[{"role": m["role"], "content": m["content"]} for m in c["messages"][:-1]] for c in test]
    answers = [c["messages"][-1]["content"] for c in test]
    other = [prompts[i] for i in other_rows([c["user_id"] for c in test])]
    after = engine.score(prompts, answers, adapter=candidate.id)
    return {
        "cluster": [c["user_id"] for c in test],
        "liked": [c["messages"][-1]["rating"] > 0 for c in test],
        "tokens": [s.tokens for s in after],
        "before": [s.logprob for s in engine.score(prompts, answers, adapter=None)],
        "grounded": [s.logprob for s in engine.score(prompts, answers, adapter=grounded.id)],
        "after": [s.logprob for s in after],
        "other": [s.logprob for s in engine.score(other, answers, adapter=candidate.id)],
    }


def other_rows(clusters: Sequence[str], seed: int = 0) -> list[int]:
    """For each row, another row of a different opening."""
    rng = np.random.default_rng(seed)
    return [int(rng.choice([j for j, c in enumerate(clusters) if c != cluster])) for cluster in clusters]


def tm4_measures(folds: Sequence[dict[str, list[Any]]], draws: int = 1000) -> dict[str, Any]:
    """Figures over the held-out rows of all folds, with 95 % intervals over openings.

    An AUC is taken within each fold, whose model it belongs to, and averaged.
    """
    from nightschool.evolve.gate import cluster_draws

    weighed = []
    for number, fold in enumerate(folds):
        rows = {k: np.asarray(v) for k, v in fold.items()}
        once = np.ones((1, len(rows["liked"])), int)
        weighed.append((rows, np.vstack([once, cluster_draws(fold["cluster"], draws, number)])))
    found = measures(weighed)
    interval = {k: [round(float(np.quantile(v[1:], q)), 4) for q in (0.025, 0.975)] for k, v in found.items()}
    return {**{k: round(float(v[0]), 4) for k, v in found.items()}, "ci": interval}


def measures(folds: Sequence[tuple[dict[str, Any], Any]]) -> dict[str, Any]:
    """Each figure, (W,), of folds whose rows count by weights (W, rows)."""
    from nightschool.evolve.gate import weighted_auc

    def nll(key: str) -> Any:
        return -sum(w @ (a["liked"] * a[key]) for a, w in folds) / sum(w @ (a["liked"] * a["tokens"]) for a, w in folds)

    def area(score: Callable[[dict[str, Any]], Any]) -> Any:
        return np.mean([weighted_auc(score(a), a["liked"], w) for a, w in folds], axis=0)

    rise, words = area(lambda a: a["after"] - a["grounded"]), area(lambda a: a["tfidf"])
    return {
        "nll_before": nll("before"),
        "nll_grounded": nll("grounded"),
        "nll_after": nll("after"),
        "nll_other_context": nll("other"),
        "nll_4gram": nll("gram4"),
        "auc_before": area(lambda a: a["before"] / a["tokens"]),
        "auc_after": rise,
        "auc_logprob_after": area(lambda a: a["after"] / a["tokens"]),
        "auc_tfidf": words,
        "auc_after_minus_tfidf": rise - words,
    }


def tm4_summary(folds: list[dict[str, Any]]) -> dict[str, Any]:
    found = tm4_measures([f["rows"] for f in folds])
    names = ["fold", *[k for k in found if k != "ci"], "accepted", "probe_nll_change", "seconds", "peak_mb"]
    print("\n" + " | ".join(names))
    for number, fold in enumerate(folds):
        print(" | ".join(str(v) for v in [number, *(fold[k] for k in names[1:])]))
    print("all  " + " | ".join(f"{k} {found[k]} {found['ci'][k]}" for k in found if k != "ci"))
    return {
        **found,
        "accepted": sum(f["accepted"] for f in folds),
        "folds": len(folds),
        "probe_nll_change": max(f["probe_nll_change"] for f in folds),
        "empty_answers": max(f["empty_answers"] for f in folds),
        "seconds": max(f["seconds"] for f in folds),
        "peak_mb": max(f["peak_mb"] for f in folds),
    }


# -- what a night has to beat ---


def four_gram_nll(assistant: Any, train: Sequence[Conversation], test: Sequence[Conversation]) -> list[float]:
    """Log-probability of each held-out answer under a 4-gram of the liked training answers."""
    from nightschool.serving.base import load_tokenizer

    tokenizer = load_tokenizer(assistant.settings.serving.base)

    def ids(conversation: Conversation) -> list[int]:
        return [*tokenizer.encode(conversation["messages"][-1]["content"], add_special_tokens=False), -2]

    model = FourGram([ids(c) for c in train if c["messages"][-1]["rating"] > 0], len(tokenizer))
    return [model.logprob(ids(c)) for c in test]


class FourGram:
    """Witten-Bell interpolation (Bell, Cleary and Witten, 1990), order 4, over token ids; -1 pads the beginning."""

    def __init__(self, answers: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.count: Counter[tuple[int, ...]] = Counter()
        self.context: Counter[tuple[int, ...]] = Counter()
        self.kinds: Counter[tuple[int, ...]] = Counter()
        for answer in answers:
            padded = [-1, -1, -1, *answer]
            for i in range(3, len(padded)):
                for n in range(4):
                    gram = tuple(padded[i - n : i + 1])
                    self.kinds[gram[:-1]] += gram not in self.count
                    self.count[gram] += 1
                    self.context[gram[:-1]] += 1

    def logprob(self, answer: Sequence[int]) -> float:
        padded = [-1, -1, -1, *answer]
        return sum(math.log(self.probability(tuple(padded[i - 3 : i + 1]))) for i in range(3, len(padded)))

    def probability(self, gram: tuple[int, ...]) -> float:
        context = gram[:-1]
        lower = self.probability(gram[1:]) if context else 1 / self.vocabulary
        if not self.context[context]:
            return lower
        kinds = self.kinds[context]
        return (self.count[gram] + kinds * lower) / (self.context[context] + kinds)


def tfidf_scores(train: Sequence[Conversation], test: Sequence[Conversation]) -> list[float]:
    """The chance that each answer is liked, told from its words and those of its context by the training rewards."""
    return [float(p) for p in by_words(rated(train))(rated(test))]


# -- ConvAI2, and nights that have nothing to learn ---


def convai2_night(data: Path, number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        assistant, cycle, cost = night(sources.convai2(data), Path(home))
        rows = assistant.registry.snapshot_rows(cycle.snapshot_id)
        parts = Counter(row["part"] for row in rows)
        found = {**cost, "parts": dict(parts), **verdict_of(assistant, cycle)}
        assistant.close()
    return {**found, "pairs": parts["pairs"]}


def null_night(data: Path, seed: int, size: int = 250) -> dict[str, Any]:
    conversations = sources.taskmaster4(data)
    chosen = np.random.default_rng(seed).permutation(len(conversations))[:size]
    sample = list(sources.shuffled_ratings([conversations[i] for i in sorted(chosen)], seed))
    with tempfile.TemporaryDirectory() as home:
        assistant, cycle, cost = night(sample, Path(home))
        found = {"seed": seed, **cost, **verdict_of(assistant, cycle)}
        assistant.close()
    return found


def convai2_summary(nights: list[dict[str, Any]]) -> dict[str, Any]:
    return nights[0]


def null_summary(nights: list[dict[str, Any]]) -> dict[str, Any]:
    return {"nights": len(nights), "promoted": sum(n["accepted"] for n in nights)}


PARTS = {"tm4": tm4_fold, "convai2": convai2_night, "null": null_night}
SUMMARIES = {"tm4": tm4_summary, "convai2": convai2_summary, "null": null_summary}

if __name__ == "__main__":
    main()
