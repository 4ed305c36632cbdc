"""One home a test, nothing from the machine's own settings, and the real embedder loaded once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",  # torch reads it when it is first imported
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np
import pytest
from hypothesis import settings as how
from nightschool.memory.embed import MiniLM
from nightschool.memory.passages import Passages, index_row
from nightschool.memory.store import MemoryStore
from nightschool.memory.types import Memory
from nightschool.settings import Settings
from numpy.typing import NDArray
from sqlalchemy import event

# The machines that run this are busy, so that how long an example takes says nothing of it.
how.register_profile("busy", deadline=None)
how.load_profile("busy")


class HashEmbedder:
    """A vector from the hash of each word: the same words, the same vector; no words in common, about orthogonal."""

    def __init__(self, dimension: int = 64, name: str = "hash") -> None:
        self.name, self.dimension = name, dimension
        self.embedded: list[str] = []

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.embedded += texts
        counted = [Counter(t.lower().split() or [""]) for t in texts]
        rows = [sum(n * _of_word(word, self.dimension) for word, n in words.items()) for words in counted]
        unit = [row / np.linalg.norm(row) for row in rows]
        return np.array(unit, dtype=np.float32).reshape(len(texts), self.dimension)


@lru_cache(maxsize=10_000)
def _of_word(word: str, dimension: int) -> NDArray[np.float64]:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
    return np.random.default_rng(seed).normal(size=dimension)


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


@pytest.fixture
def executed() -> Callable[[MemoryStore], AbstractContextManager[list[str]]]:
    """The statements of SQL that a store executes meanwhile."""

    @contextmanager
    def counting(store: MemoryStore) -> Iterator[list[str]]:
        seen: list[str] = []

        def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            seen.append(statement)

        event.listen(store.sql, "before_cursor_execute", note)
        try:
            yield seen
        finally:
            event.remove(store.sql, "before_cursor_execute", note)

    return counting


@pytest.fixture
def add_to_index() -> Callable[[MemoryStore, Memory, NDArray[np.float32]], None]:
    """A row in the index behind the back of SQL."""

    def add(store: MemoryStore, m: Memory, vector: NDArray[np.float32]) -> None:
        row = index_row(m, 0, Passages(m.text, (m.text,)), {m.text: vector})
        store._indexing.index.add([row])

    return add


# -- a base of toy size ---

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer DeepSeek-V3 with one dense and one expert layer, and a byte tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("toy")
    _save_toy(folder)
    return str(folder)


def _save_toy(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"])
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, **special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.15,
    )
    DeepseekV3ForCausalLM(config).save_pretrained(folder)
