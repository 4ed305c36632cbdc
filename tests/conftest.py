"""One home a test, nothing from the machine's own settings, and the real embedder loaded once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",  # torch reads it when it is first imported
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np
import pytest
from nightschool.memory.embed import MiniLM
from nightschool.memory.store import MemoryStore
from nightschool.settings import Settings
from numpy.typing import NDArray


class HashEmbedder:
    """A vector from the hash of each word: the same words, the same vector; no words in common, about orthogonal."""

    def __init__(self, dimension: int = 64, name: str = "hash") -> None:
        self.name, self.dimension = name, dimension
        self.embedded: list[str] = []

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.embedded += texts
        rows = [sum(map(self._word, t.lower().split() or [""]), np.zeros(self.dimension)) for t in texts]
        unit = [row / np.linalg.norm(row) for row in rows]
        return np.array(unit, dtype=np.float32).reshape(len(texts), self.dimension)

    def _word(self, word: str) -> NDArray[np.float64]:
        seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        return np.random.default_rng(seed).normal(size=self.dimension)


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NIGHTSCHOOL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture(scope="session")
def embedder() -> MiniLM:
    """The real one; loaded when a test first embeds."""
    return MiniLM()


@pytest.fixture
def hash_embedder() -> HashEmbedder:
    return HashEmbedder()


@pytest.fixture
def make_embedder() -> type[HashEmbedder]:
    return HashEmbedder


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(settings: Settings, embedder: MiniLM, clock: Clock) -> Iterator[MemoryStore]:
    """A store with the real embedder, in the test's own home."""
    with MemoryStore(settings, embedder=embedder, clock=clock) as opened:
        yield opened


@pytest.fixture
def quick_store(settings: Settings, hash_embedder: HashEmbedder, clock: Clock) -> Iterator[MemoryStore]:
    """A store where what the vectors mean does not matter."""
    with MemoryStore(settings, embedder=hash_embedder, clock=clock) as opened:
        yield opened


@pytest.fixture
def bytes_in_home(tmp_path: Path) -> Callable[[bytes], list[str]]:
    """Which files under the home hold these bytes."""

    def search(wanted: bytes) -> list[str]:
        files = (path for path in sorted(tmp_path.rglob("*")) if path.is_file())
        return [str(path.relative_to(tmp_path)) for path in files if wanted in path.read_bytes()]

    return search
