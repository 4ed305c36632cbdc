"""Is anything lost or doubled when writers are killed? `make bench NAME=durability ARGS="--kills 100"`.

Four processes write to one home, each noting every acknowledged write in a file of its own (fsync). Each is killed with
SIGKILL at a random moment while the others write. When all four are dead the store is opened again and must hold every
acknowledged write, nothing twice, and agree with its index. The same home goes through all rounds. The embedder is a
double of our own protocol, so that the time goes into the writing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import runs
from nightschool.memory.store import MemoryStore
from nightschool.settings import Settings
from numpy.typing import NDArray

WRITERS = 4
LONGEST_S = 1.5  # from the first write of all to the last kill
PATIENCE_S = 120.0


class HashEmbedder:
    """A unit vector from the hash of the text."""

    name, dimension = "hash", 16

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        seeds = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest()) for t in texts]
        rows = [np.random.default_rng(seed).normal(size=self.dimension) for seed in seeds]
        unit = [row / np.linalg.norm(row) for row in rows]
        return np.array(unit, dtype=np.float32).reshape(len(texts), self.dimension)


def write(home: Path, acknowledged: Path, name: str) -> None:
    """Write until killed; an id is noted only after the call that made it has returned."""
    with MemoryStore(Settings(home=home), embedder=HashEmbedder()) as store, acknowledged.open("a") as notes:
        n = 0
        while True:
            for made in _some(store, name, n):
                notes.write(made + "\n")
            notes.flush()
            os.fsync(notes.fileno())
            n += 1


def _some(store: MemoryStore, name: str, n: int) -> list[str]:
    """One write of each kind in turn; every text is of its own."""
    said, owner = f"{name} asks {n}", {"user_id": name, "session_id": f"s{n // 10}"}
    if n % 5 == 1:
        return [store.remember(f"{name} notes {n}", user_id=name).id]
    if n % 5 == 2:
        messages = [{"role": "user", "content": f"{said}, {m}"} for m in "abc"]
        given = [m for message in messages for m in (message, {"role": "assistant", "content": "ok"})]
        store.record_conversation(given, user_id=name, session_id=f"c{n}")
        return [i.id for i in store.latest_interactions(name, "", f"c{n}", 1)]
    made = store.record([{"role": "user", "content": said}], "ok", **owner)
    return [made.id, store.rate(made.id, rating=1).id] if n % 5 == 3 else [made.id]


def round_of_kills(home: Path, number: int, draw: random.Random) -> set[str]:
    """Start the writers, kill each at a random moment, and return what was acknowledged."""
    files = [home.parent / f"acknowledged-{number}-{w}" for w in range(WRITERS)]
    commands = [[sys.executable, __file__, "--write", str(home), str(f), f"r{number}w{w}"] for w, f in enumerate(files)]
    running = [subprocess.Popen(command) for command in commands]
    deadline = time.monotonic() + PATIENCE_S
    while not all(f.exists() and f.stat().st_size for f in files):
        if time.monotonic() > deadline or any(p.poll() is not None for p in running):
            for p in running:
                p.kill()
            raise SystemExit(f"round {number}: a writer did not begin to write or ended by itself")
        time.sleep(0.01)
    started = time.monotonic()
    for moment, process in sorted((draw.uniform(0, LONGEST_S), i) for i in range(WRITERS)):
        time.sleep(max(0.0, started + moment - time.monotonic()))
        running[process].kill()
    codes = [process.wait() for process in running]
    assert codes == [-9] * WRITERS, codes
    return {line for f in files for line in f.read_text().splitlines()}


def check(home: Path, acknowledged: set[str]) -> dict[str, int]:
    """Open the store again: acknowledged writes that are lost, rows that are doubled, and what disagrees."""
    with MemoryStore(Settings(home=home), embedder=HashEmbedder()) as store:
        index = Counter(store._indexing.index.ids())
        said = list(store.interactions())
        feedback = {f.id for some in store.feedback().values() for f in some}
        notes = store.memories(index)
        held = {i.id for i in said} | feedback | notes.keys()
        texts = Counter((i.session_id, i.user_id, i.text) for i in said)
        doubled = sum(n - 1 for n in texts.values()) + sum(n - 1 for n in index.values())
        return {
            "writes": len(said) + len(feedback) + sum(m.kind == "note" for m in notes.values()),
            "lost": len(acknowledged - held),
            "doubled": doubled,
            "disagreements": len(store.verify()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", nargs=3, metavar=("HOME", "FILE", "NAME"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(Path(given.write[0]), Path(given.write[1]), given.write[2])
    draw, acknowledged, worst = random.Random(given.seed), set[str](), Counter[str]()
    rounds = -(-given.kills // WRITERS)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        for number in range(rounds):
            acknowledged |= round_of_kills(home, number, draw)
            found = check(home, acknowledged)
            worst.update({name: found[name] for name in ("lost", "doubled", "disagreements")})
            print(f"round {number + 1:3d} of {rounds}: {len(acknowledged)} acknowledged, {found}", flush=True)
    summary = {
        "kills": rounds * WRITERS,
        "writers": WRITERS,
        "acknowledged": len(acknowledged),
        "stored": found["writes"],
        **{name: worst[name] for name in ("lost", "doubled", "disagreements")},
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps({**summary, **runs.circumstances()}))
    raise SystemExit(any(worst.values()))


if __name__ == "__main__":
    main()
