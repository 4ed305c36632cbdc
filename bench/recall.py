"""How well recall finds, how fast, and what a memory costs.

    make bench NAME=recall ARGS="--scale 100k,1m"

Quality goes through `MemoryStore` as an application would: conversations in, `recall` out, one setting for all sets.
Recall@10 is the mean share of the turns that answer a question among the ten memories given; `dense` is the cosine of
question and memory text alone, with the same MiniLM. Each ingredient is left out once. Speed is a whole `recall` but
for the embedding of the query, over unit vectors and words drawn at random, written straight to SQL and the index.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import runs
from nightschool.memory.conversations import Conversation, Owner
from nightschool.memory.embed import MiniLM
from nightschool.memory.passages import index_row, of_note, of_turn
from nightschool.memory.ranking import WEIGHTS
from nightschool.memory.rows import from_memory
from nightschool.memory.store import MemoryStore
from nightschool.memory.tables import MemoryRow
from nightschool.memory.types import Memory
from nightschool.settings import Settings
from numpy.typing import NDArray
from recall_sets import Case, Said, clinc, favourites, locomo, madial
from sources import DATA
from sqlalchemy import insert

Vectors = NDArray[np.float32]

SETS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "locomo": locomo,
    "madial": madial,
    "favourites": partial(favourites, replies=False),
    "favourites in turns": partial(favourites, replies=True),
    "clinc": clinc,
}
LEFT_OUT: dict[str, dict[str, float]] = {
    "windows": {"windows": 0.0},
    "words": {"words": 0.0},
    "neighbours": {"next": 0.0, "after_next": 0.0},
    "less for replies": {"reply": 0.0},
}
SIZES = {"10k": 10_000, "100k": 100_000, "1m": 1_000_000}
MEMORIES_A_USER = 100


class Remembering:
    """MiniLM that embeds a text once, also over runs if there is a file to keep the vectors in."""

    def __init__(self, embedder: MiniLM, path: Path | None = None) -> None:
        self.name, self.dimension = embedder.name, embedder.dimension
        self._embedder, self._path = embedder, path
        self._known: dict[str, Vectors] = {}
        if path is not None and path.exists():
            with np.load(path) as held:
                texts = held["texts"].tobytes().decode().split("\0")
                self._known.update(zip(texts, held["vectors"].astype(np.float32), strict=True))

    def embed(self, texts: Sequence[str]) -> Vectors:
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known.update(zip(missing, self._embedder.embed(missing), strict=True))
        return np.stack([self._known[text] for text in texts])

    def save(self) -> None:
        if self._path is not None:
            texts = np.frombuffer("\0".join(self._known).encode(), np.uint8)
            np.savez(self._path, texts=texts, vectors=np.stack(list(self._known.values())).astype(np.float16))


# -- quality ---


def conversations(case: Case) -> list[Conversation]:
    """What was said, a conversation a session; a turn without an answer has an empty one."""
    sessions: dict[str, list[Said]] = {}
    for said in case.said:
        sessions.setdefault(said.session, []).append(said)
    return [
        Conversation(
            Owner("ann", "", name),
            tuple(
                m
                for s in turns
                for m in ({"role": "user", "content": s.text}, {"role": "assistant", "content": s.reply})
            ),
            tuple(s.created_utc for s in turns for _ in range(2)),
        )
        for name, turns in sessions.items()
    ]


def places(case: Case, store: MemoryStore) -> dict[str, int]:
    """Interaction id: index of what was said."""
    counted: dict[str, int] = {}
    at: dict[tuple[str, int], int] = {}
    for n, said in enumerate(case.said):
        at[said.session, counted.get(said.session, 0)] = n
        counted[said.session] = counted.get(said.session, 0) + 1
    return {i.id: at[i.session_id, i.position] for i in store.interactions()}


def recalls(case: Case, store: MemoryStore, place: dict[str, int]) -> list[float]:
    shares = []
    for question in case.questions:
        found = store.recall(question.text, user_id="ann", limit=10, threshold=0.0)
        given = {place[recall.memory.source_ids[0]] for recall in found}
        shares.append(len(given & question.gold) / len(question.gold))
    return shares


def dense(case: Case, embedder: Remembering) -> list[float]:
    held = embedder.embed(["\n".join(filter(None, (s.text, s.reply))) for s in case.said])
    nearest = np.argsort(-(embedder.embed([q.text for q in case.questions]) @ held.T), axis=1, kind="stable")[:, :10]
    return [len(q.gold & set(row.tolist())) / len(q.gold) for q, row in zip(case.questions, nearest, strict=True)]


def measured(cases: Iterable[Case], embedder: Remembering, left_out: Sequence[str]) -> dict[str, Any]:
    """Recall@10 by variant, over all the questions and over those of the cases that nothing was chosen on."""
    variants = {"all of it": WEIGHTS} | {f"without {name}": replace(WEIGHTS, **LEFT_OUT[name]) for name in left_out}
    shares: dict[str, list[tuple[bool, float]]] = {}
    for case in cases:
        shares.setdefault("dense", []).extend((case.dev, share) for share in dense(case, embedder))
        with TemporaryDirectory() as home, MemoryStore(Settings(home=Path(home)), embedder=embedder) as store:
            recorded = store.record_many(conversations(case))
            assert not recorded.errors, recorded.errors
            place = places(case, store)
            for name, weights in variants.items():
                store.weights = weights
                shares.setdefault(name, []).extend((case.dev, share) for share in recalls(case, store, place))
    return {
        name: (_mean(s for _, s in found), _mean(s for dev, s in found if not dev), len(found))
        for name, found in shares.items()
    }


def _mean(shares: Iterable[float]) -> float:
    return float(np.mean(list(shares)))


def quality(data: Path, names: Sequence[str], embedder: Remembering, left_out: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in names:
        table = measured(SETS[name](data), embedder, left_out)
        embedder.save()
        questions = table["dense"][2]
        print(f"\n{name}: recall@10 over {questions} questions; of those held out from choosing")
        for variant, (share, held_out, _) in table.items():
            print(f"  {variant:26s} {share:.3f}  {held_out:.3f}", flush=True)
        share, held_out, _ = table["all of it"]
        key = name.replace(" ", "_")
        found |= {f"{key}_r10": share, f"{key}_r10_held_out": held_out, f"{key}_dense": table["dense"][0]}
    return found


# -- speed ---


class Given:
    """Whatever is asked for, the vector is the next of those given."""

    name = "random"

    def __init__(self, vectors: Vectors) -> None:
        self.dimension = vectors.shape[1]
        self._vectors, self._next = vectors, 0

    def embed(self, texts: Sequence[str]) -> Vectors:
        self._next += 1
        return np.repeat(self._vectors[[self._next % len(self._vectors)]], len(texts), axis=0)


def unit(count: int, dimension: int, rng: np.random.Generator) -> Vectors:
    made = rng.standard_normal((count, dimension), dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def fill(store: MemoryStore, count: int, dimension: int) -> None:
    """Notes of sixteen words, every third of two windows, for `count` / 100 users in random order, ten a session."""
    batch = max(5000, count // 20)
    rng, words = np.random.default_rng(0), [f"word{n}" for n in range(20_000)]
    index = store._indexing.index
    for start in range(0, count, batch):
        users = rng.integers(0, count // MEMORIES_A_USER, batch)
        drawn = rng.zipf(1.3, (batch, 16)) % len(words)
        notes = []
        for n, (user, row) in enumerate(zip(users, drawn, strict=True)):
            text = " ".join(words[w] for w in row) + (". And so it is said once more here." if n % 3 == 0 else "")
            session = f"s{(start + n) // 10}"
            notes.append(Memory(f"{start + n:064d}", f"user{user}", "", session, "note", text, 1e9 + start + n))
        passages = [of_note(note) for note in notes]
        vectors = [unit(len(p.texts), dimension, rng) for p in passages]
        index.add(
            [
                index_row(note, 0, p, dict(zip(p.texts, v, strict=True)))
                for note, p, v in zip(notes, passages, vectors, strict=True)
            ]
        )
        with store.database.writing() as session:
            session.execute(insert(MemoryRow), [from_memory(note) | {"indexed": True} for note in notes])
    index.optimize()


def latencies(store: MemoryStore, users: int, searches: int = 300) -> tuple[float, float, float]:
    """The median and the 95th percentile of a recall, and what processor time it takes, in milliseconds."""
    rng = random.Random(1)
    times, spent = [], 0.0
    for n in range(searches + 20):
        if n == 20:  # warm
            spent = time.process_time()
        query = " ".join(f"word{rng.randrange(1, 200)}" for _ in range(5))
        user = f"user{rng.randrange(users)}"
        start = time.perf_counter()
        found = store.recall(query, user_id=user, threshold=0.0)
        if n >= 20:
            times.append(1e3 * (time.perf_counter() - start))
        assert found and {r.memory.user_id for r in found} == {user}
    cpu = 1e3 * (time.process_time() - spent) / searches
    return float(np.percentile(times, 50)), float(np.percentile(times, 95)), cpu


def writes(store: MemoryStore, count: int = 60) -> tuple[float, float]:
    """Medians in milliseconds: keeping a note, and the next recall, which must find it."""
    written, read = [], []
    for n in range(count):
        start = time.perf_counter()
        note = store.remember(f"unheard{n} of word", user_id="user1")
        middle = time.perf_counter()
        found = store.recall(f"unheard{n}", user_id="user1", threshold=0.0)
        read.append(1e3 * (time.perf_counter() - middle))
        written.append(1e3 * (middle - start))
        assert note.id in [recall.memory.id for recall in found]
    return float(np.median(written)), float(np.median(read))


def scale(name: str, folder: Path) -> dict[str, float]:
    dimension, rng = MiniLM.dimension, np.random.default_rng(2)
    embedder = Given(unit(64, dimension, rng))
    with TemporaryDirectory(dir=folder) as home, MemoryStore(Settings(home=Path(home)), embedder=embedder) as store:
        start = time.perf_counter()
        fill(store, SIZES[name], dimension)
        filled = time.perf_counter() - start
        p50, p95, cpu = latencies(store, SIZES[name] // MEMORIES_A_USER)
        written, lag = writes(store)
    print(f"\n{name} memories of {SIZES[name] // MEMORIES_A_USER} users, written in {filled:.0f} s")
    print(
        f"  recall: p50 {p50:.1f} ms, p95 {p95:.1f} ms, processor {cpu:.1f} ms;"
        f" a note but its embedding {written:.1f} ms,"
        f" found {lag:.1f} ms later"
    )
    return {
        f"p50_ms_{name}": p50,
        f"p95_ms_{name}": p95,
        f"cpu_ms_{name}": cpu,
        f"write_ms_{name}": written,
        f"lag_ms_{name}": lag,
    }


# -- ingest ---


def ingest(data: Path, embedder: MiniLM, folder: Path) -> dict[str, float]:
    """Turns with replies brought into an open store at once, against the bare embedder over the same texts."""
    case = next(favourites(data, replies=True, stores=1, dialogues=400))
    cut = conversations(case)
    with TemporaryDirectory(dir=folder) as home, MemoryStore(Settings(home=Path(home)), embedder=embedder) as store:
        store.remember("The index is made and LanceDB imported.", user_id="bob")
        start = time.perf_counter()
        memories = store.record_many(cut).new
        taken = time.perf_counter() - start
        texts = [text for i in store.interactions() for text in of_turn(i).texts]
        start = time.perf_counter()
        embedder.embed(texts)
        bare = time.perf_counter() - start
        store.close()
        size = sum(path.stat().st_size for path in Path(home).rglob("*") if path.is_file())
    distinct = len(set(texts))
    print(
        f"\ningest: {memories} turns with replies in {taken:.1f} s, their {distinct} texts embedded bare"
        f" in {bare:.1f} s"
    )
    print(f"  {100 * bare / taken:.0f} % of the bare embedder's throughput; {size / memories:.0f} bytes a memory")
    return {
        "ingest_per_s": distinct / taken,
        "embed_per_s": distinct / bare,
        "memories_per_s": memories / taken,
        "bytes_per_memory": size / memories,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", default="quality,scale,ingest", help="parts, joined by commas")
    parser.add_argument("--sets", default=",".join(SETS), help="sets, joined by commas")
    parser.add_argument("--left-out", default=",".join(LEFT_OUT), help="ingredients, joined by commas; empty = none")
    parser.add_argument("--vectors", type=Path, help="a file to keep the sets' vectors in over runs (.npz)")
    parser.add_argument("--scale", default="100k", help="sizes, joined by commas: " + ", ".join(SIZES))
    parser.add_argument("--folder", type=Path, help="where stores are made (default: the system's temporary folder)")
    args = parser.parse_args()
    parts, embedder = args.only.split(","), MiniLM()
    result: dict[str, float] = {}
    if "quality" in parts:
        result |= quality(
            args.data,
            args.sets.split(","),
            Remembering(embedder, args.vectors),
            [name for name in args.left_out.split(",") if name],
        )
    if "scale" in parts:
        for name in args.scale.split(","):
            result |= scale(name, args.folder)
    if "ingest" in parts:
        result |= ingest(args.data, embedder, args.folder)
    print()
    figures = {name: round(value, 4) for name, value in result.items()}
    print(json.dumps({**figures, **runs.circumstances()}))


if __name__ == "__main__":
    main()
