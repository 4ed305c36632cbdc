"""The whole loop on real conversations: import, one night, the gate, and what the adapter does on people it never saw.

    python bench/loop.py [--only tm4,convai2,null] [--folds 5] [--seeds 10] [--jobs 2] [--data FOLDER] [--keep FOLDER]

tm4: Taskmaster-4 rewards, held out by opening, five folds; each fold is one process with its own home. The tables show
the held-out fold, which no night saw; intervals are cluster bootstraps over openings, all folds pooled.
convai2: thumbs of real users, imported whole, one night, the verdict as it falls.
null: the same small sample of Taskmaster-4 with its rewards dealt out anew by seed: a night must not be promoted.
With --keep, what a process found is written there and not run again, so that a run that was stopped goes on.
Where to get the data: bench/sources.py. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sources

Conversation = dict[str, Any]


def main() -> None:
    args = parse()
    if not args.data.exists():
        sys.exit(f"{args.data}: no such folder; bench/sources.py says where the data comes from, --data where it lies")
    if args.part:
        print(json.dumps(PARTS[args.part](args.data, args.number)))
        return
    wanted = args.only.split(",")
    result: dict[str, Any] = {}
    if "tm4" in wanted:
        result["tm4"] = tm4_summary(run_parts("tm4", args.folds, args))
    if "convai2" in wanted:
        result["convai2"] = run_parts("convai2", 1, args)[0]
    if "null" in wanted:
        nights = run_parts("null", args.seeds, args)
        result["null"] = {"nights": len(nights), "promoted": sum(n["accepted"] for n in nights)}
    print(json.dumps({**result, **circumstances()}))


def circumstances() -> dict[str, Any]:
    """When, with what and on what base these figures came about."""
    from nightschool.serving.base import base_id

    packages = ("nightschool", "torch", "transformers", "trl", "peft", "lancedb", "sentence-transformers")
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "versions": {name: version(name) for name in packages},
        "base": base_id("seedling"),
        "cores": os.cpu_count(),
    }


def commit() -> str:
    """Of the code that runs, with `-dirty` where it was changed since; empty where it is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def state(**changed: Any) -> str:
    """Names the base, our defaults and what was `changed` of them: what others made is not taken for one's own.

    The code is not in it: whoever goes on after a change tells of which commits the kept figures are.
    """
    from nightschool.serving.base import base_id
    from nightschool.settings import Settings

    held = [
        base_id("seedling"),
        Settings(home=Path()).to_json(),
        {name: asdict(value) for name, value in changed.items()},
    ]
    return sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:8]


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
        found = run_part(__file__, ("--part", part, "--number", str(number)), f"loop-{part}-{number}", args)
        print(f"{part} {number}: {json.dumps({k: v for k, v in found.items() if k != 'rows'})}", flush=True)
        return found

    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(run, range(count)))


def run_part(script: str, words: Sequence[str], name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `script` prints last; with --keep, kept under `name`, the base and the defaults, and not run again."""
    kept = args.keep / f"{name}-{state()}.json" if args.keep else None
    if kept and kept.exists():
        return dict(json.loads(kept.read_text()))
    command = [sys.executable, script, *words, "--data", str(args.data)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, found)
    return found


def write_whole(path: Path, found: Any) -> None:
    """What is cut off in the middle is not there."""
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(found) + "\n")
    whole.replace(path)


# -- one night in a home of its own ---


def night(conversations: Sequence[Conversation], home: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Import, one night; returns the open assistant, the cycle and what it cost."""
    import nightschool
    import torch
    from nightschool.memory.importer import import_files
    from nightschool.pipelines import nightly

    torch.set_num_threads(1)
    started = time.monotonic()
    assistant = nightschool.open(home)
    report = import_files(assistant.store, [sources.write_lines(home / "in.jsonl", conversations)], now=sources.CLOCK)
    if report.errors:
        sys.exit(f"{report.errors[0]}: the data was not read whole")
    imported = time.monotonic()
    print(f"imported {report.interactions_new} turns in {imported - started:.0f}s", file=sys.stderr, flush=True)
    n = assistant
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
    rng = np.random.default_rng(0)
    arrays = [{k: np.asarray(v) for k, v in fold.items()} for fold in folds]
    index = [np.unique(a["cluster"], return_inverse=True) for a in arrays]
    point = measures_once(arrays, [np.ones(len(a["liked"])) for a in arrays])
    drawn = []
    for _ in range(draws):
        weights = [rng.multinomial(len(n), np.full(len(n), 1 / len(n)))[i].astype(float) for n, i in index]
        drawn.append(measures_once(arrays, weights))
    interval = {k: [round(float(np.quantile([d[k] for d in drawn], q)), 4) for q in (0.025, 0.975)] for k in point}
    return {**{k: round(v, 4) for k, v in point.items()}, "ci": interval}


def measures_once(folds: Sequence[dict[str, Any]], weights: Sequence[Any]) -> dict[str, float]:
    def nll(key: str) -> float:
        total = sum(-(w * a["liked"] * a[key]).sum() for a, w in zip(folds, weights, strict=True))
        return float(total / sum((w * a["liked"] * a["tokens"]).sum() for a, w in zip(folds, weights, strict=True)))

    def area(score: Any) -> float:
        return float(np.mean([auc(a["liked"], score(a), w) for a, w in zip(folds, weights, strict=True)]))

    return {
        "nll_before": nll("before"),
        "nll_grounded": nll("grounded"),
        "nll_after": nll("after"),
        "nll_other_context": nll("other"),
        "nll_4gram": nll("gram4"),
        "auc_before": area(lambda a: a["before"] / a["tokens"]),
        "auc_after": area(lambda a: a["after"] - a["grounded"]),
        "auc_logprob_after": area(lambda a: a["after"] / a["tokens"]),
        "auc_tfidf": area(lambda a: a["tfidf"]),
        "auc_after_minus_tfidf": area(lambda a: a["after"] - a["grounded"]) - area(lambda a: a["tfidf"]),
    }


def auc(liked: Any, score: Any, weights: Any) -> float:
    from sklearn.metrics import roc_auc_score

    kept = weights > 0
    return float(roc_auc_score(liked[kept], score[kept], sample_weight=weights[kept]))


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
    """Logistic regression on TF-IDF of context and answer, fitted on the training rewards."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def text(conversation: Conversation) -> str:
        *context, answer = [m["content"] for m in conversation["messages"]]
        return " ".join(context[-4:]) + " || " + answer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=3, max_iter=500, class_weight="balanced")
    model.fit(vectorizer.fit_transform(map(text, train)), [c["messages"][-1]["rating"] > 0 for c in train])
    return [float(p) for p in model.predict_proba(vectorizer.transform(map(text, test)))[:, 1]]


# -- ConvAI2, and nights that have nothing to learn ---


def convai2_night(data: Path, number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        assistant, cycle, cost = night(sources.convai2(data), Path(home))
        rows = assistant.registry.snapshot_rows(cycle.snapshot_id)
        parts = Counter(row["part"] for row in rows)
        found = {**cost, "parts": dict(parts), **verdict_of(assistant, cycle)}
        assistant.close()
    return {**found, "pairs": parts.get("pair", 0) + parts.get("pairs", 0)}


def null_night(data: Path, seed: int, size: int = 250) -> dict[str, Any]:
    conversations = sources.taskmaster4(data)
    chosen = np.random.default_rng(seed).permutation(len(conversations))[:size]
    sample = list(sources.shuffled_ratings([conversations[i] for i in sorted(chosen)], seed))
    with tempfile.TemporaryDirectory() as home:
        assistant, cycle, cost = night(sample, Path(home))
        found = {"seed": seed, **cost, **verdict_of(assistant, cycle)}
        assistant.close()
    return found


PARTS = {"tm4": tm4_fold, "convai2": convai2_night, "null": null_night}

if __name__ == "__main__":
    main()
