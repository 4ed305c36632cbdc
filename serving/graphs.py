"""Decoding in place: keys, values and inputs in buffers that never move, so that a step can be a recorded CUDA graph.

A step of a small batch is hundreds of small kernels, and starting them one by one costs more than running them. The
invariant: a cache that was lent is valid until the next step or until nobody holds it, and belongs to one batch alone;
what a batch does to its rows in between it does to a copy, which is read in at the step after. A model that cannot be
recorded is stepped without, in the same buffers.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from .adapters import Delta, Deltas, Lora, Same, applied

ATTENTION = "nightschool"
LEAST_WIDTH = 256  # tokens a row; doubled as they grow
RECORDING = Lock()  # of the process: torch empties its caches before it records, which fails while another records
KEPT = 8  # buffers, each with its graph; the longest unused leave
KEPT_BYTES = 4 << 30  # of their keys and values


def is_plain(cache: Any) -> bool:
    """Whether it is keys and values by position; windows and recurrent states cannot be shifted."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if isinstance(cache, Lent):
        return True
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


@dataclass(frozen=True)
class Filled:
    """A layer's keys and values, (rows, heads, columns, size)."""

    keys: Tensor
    values: Tensor


class Lent:
    """The filled part of buffers, as the cache of a batch."""

    def __init__(self, buffers: Buffers, rows: int) -> None:
        self.buffers, self.rows = buffers, rows

    @property
    def layers(self) -> list[Filled]:
        rows, filled = slice(self.rows), slice(self.buffers.filled)
        return [Filled(x.keys[rows, :, filled], x.values[rows, :, filled]) for x in self.buffers.cache.layers]

    def get_seq_length(self) -> int:
        return self.buffers.filled

    def copied(self, kept: Sequence[int]) -> Any:
        """Some of its rows as a cache that belongs to nobody else."""
        from transformers import DynamicCache

        rows = list(kept)
        return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in self.layers])


class Buffers:
    """What one step reads and writes, for so many rows and columns and for adapters that stay in place."""

    def __init__(self, model: Any, key: object, rows: int, width: int, deltas: Deltas) -> None:
        from transformers import StaticCache

        self.key, self.rows, self.width, self.filled = key, rows, width, 0
        self._named = deltas  # by whose tensors the key goes: as long as it is here, no other has their place
        self.deltas = {name: _in_place(delta, rows) for name, delta in deltas.items()}
        self.cache = StaticCache(model.config, max_cache_len=width)
        device = model.device
        self.ids, self.positions = torch.zeros((2, rows, 1), dtype=torch.long, device=device)
        self.mask = torch.zeros((rows, 1, 1, width), dtype=torch.bool, device=device)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._tenant: weakref.ref[Lent] | None = None

    @property
    def free(self) -> bool:
        return self._tenant is None or self._tenant() is None

    @property
    def bytes(self) -> int:
        """Of keys and values; what else a step needs all graphs share."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))

    def holds(self, lora: Lora) -> bool:
        ups = {id(up) for _, up in lora.weights.values()}
        return any(not ups.isdisjoint(found) for _, found in _identity(self._named))

    def lend(self, rows: int) -> Lent:
        lent = Lent(self, rows)
        self._tenant = weakref.ref(lent)
        return lent

    def read_in(self, layers: Sequence[Any], mask: Tensor, deltas: Deltas) -> None:
        """The keys, values and mask of a batch before its step, and which adapter each of its rows has."""
        rows, filled = layers[0].keys.shape[0], layers[0].keys.shape[-2]
        for mine, theirs in zip(self.cache.layers, layers, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(*(_more_rows(t, self.rows) for t in (theirs.keys, theirs.values)))
            for own, given in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                own[:rows, :, :filled] = given
                own[:, :, filled:] = 0  # what is masked counts 0, but 0 times a figure that is none is none
        self.mask.zero_()
        self.mask[rows:, ..., 0] = True  # a row that is not used attends to something, so it stays finite
        self.mask[:rows, 0, 0, :filled] = mask[:, :filled].bool()
        for name, delta in deltas.items():
            own = self.deltas[name]
            if isinstance(delta, Delta) and isinstance(own, Delta):
                own.own.copy_(_more_rows(delta.own, self.rows))
        self._fill(filled)

    def _fill(self, filled: int) -> None:
        self.filled = filled
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(filled)

    def rewind(self) -> None:
        """To where a step began that broke off somewhere."""
        self._fill(self.filled)

    def put(self, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> None:
        rows = len(input_ids)
        self.ids[:rows], self.positions[:rows] = input_ids, position_ids
        self.mask[:rows, 0, 0, self.filled] = mask[:, self.filled].bool()

    def run(self, model: Any, modules: Mapping[str, nn.Module]) -> Tensor:
        """The logits of the last token of every row, and one more column in the cache."""
        with applied(modules, self.deltas), torch.inference_mode():
            out = model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[:, -1]
        return logits

    def record(self, model: Any, modules: Mapping[str, nn.Module], pool: Any, stream: Any) -> None:
        """One step as a graph, on `stream`. Steps that warm up write the same column again and again."""
        filled = self.filled
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run(model, modules)
                self._fill(filled)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _recorded(graph, pool, stream):
            self.logits = self.run(model, modules)
        self._fill(filled)
        self.graph = graph


@contextmanager
def _recorded(graph: torch.cuda.CUDAGraph, pool: Any, stream: Any) -> Iterator[None]:
    """As `torch.cuda.graph`, but where that fails, which leaves its stream and its pool in use, they are given up."""
    with RECORDING, torch.cuda.stream(torch.cuda.current_stream()):  # on leaving it, the caller's stream
        # others may load an adapter meanwhile
        record = partial(torch.cuda.graph, stream=stream, capture_error_mode="thread_local")
        try:
            with record(graph, pool=pool):
                yield
        except BaseException:
            with suppress(AttributeError, RuntimeError):  # of a torch without it; of a pool that was ended
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            with suppress(RuntimeError), record(torch.cuda.CUDAGraph()):
                pass  # until one is recorded, what draws random numbers on the card would think it is being recorded
            raise


class Graphs:
    """Steps of decoding for one model; only one thread at a time comes here. `record` needs a CUDA device."""

    def __init__(self, model: Any, modules: Mapping[str, nn.Module], *, record: bool) -> None:
        self._model, self._modules, self._record = model, modules, record
        # intermediate results of all graphs share their memory: one step runs at a time
        self._pool = torch.cuda.graph_pool_handle() if record else None
        self._stream: Any = torch.cuda.Stream(model.device) if record else None  # type: ignore[no-untyped-call]
        self._buffers: list[Buffers] = []
        self._gone: weakref.WeakSet[Lora] = weakref.WeakSet()  # unloaded, and perhaps still answering

    @property
    def recording(self) -> bool:
        """False from the first step on that could not be recorded."""
        return self._record

    @torch.inference_mode()
    def step(
        self, deltas: Deltas, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any
    ) -> tuple[Tensor, Lent]:
        """As the model does it: logits (rows, vocabulary), valid until the next step, and the cache to go on with.

        Where the card is full, once more without the buffers that no batch has.
        """
        with suppress(torch.OutOfMemoryError):
            return self._step(deltas, input_ids, attention_mask, position_ids, past_key_values)
        self.give_back()
        if isinstance(past_key_values, Lent):
            past_key_values.buffers.rewind()
        return self._step(deltas, input_ids, attention_mask, position_ids, past_key_values)

    def give_back(self) -> None:
        """Let go of the buffers that no batch has."""
        gc.collect()  # what broke off holds its own by its traceback
        self._keep([buffers for buffers in self._buffers if not buffers.free])
        with RECORDING:
            torch.cuda.empty_cache()

    def forget(self, lora: Lora) -> None:
        """Keep no buffers with it any longer than an answer needs them."""
        self._gone.add(lora)
        self._keep([buffers for buffers in self._buffers if not buffers.holds(lora)])

    def _keep(self, kept: list[Buffers]) -> None:
        self._buffers = kept
        if self._record and not any(buffers.graph for buffers in kept):
            self._pool = torch.cuda.graph_pool_handle()  # torch takes up none whose graphs are gone

    def _step(
        self, deltas: Deltas, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any
    ) -> tuple[Tensor, Lent]:
        rows, width = attention_mask.shape
        lent = past_key_values if isinstance(past_key_values, Lent) else None
        if lent is None or width > lent.buffers.width:
            buffers = self._find(deltas, _bucket(rows, 1), _bucket(width, LEAST_WIDTH))
            buffers.read_in(past_key_values.layers, attention_mask, deltas)
            lent = buffers.lend(rows)
            self._bound()
        buffers = lent.buffers
        buffers.put(input_ids, position_ids, attention_mask)
        with self._on_card():
            logits = self._run(buffers)
        buffers.filled += 1
        return logits[:rows], lent

    def _on_card(self) -> AbstractContextManager[Any]:
        """The model's own card, whichever is the thread's."""
        return torch.cuda.device(self._model.device) if self._record else nullcontext()

    def _run(self, buffers: Buffers) -> Tensor:
        if self._record and buffers.graph is None:
            try:
                buffers.record(self._model, self._modules, self._pool, self._stream)
            except RuntimeError as error:
                if found := _out_of_memory(error):
                    raise found from None
                warnings.warn(f"decoding cannot be recorded as a CUDA graph and is slower: {error}", stacklevel=2)
                self._record = False
                buffers.rewind()
        if buffers.graph is None or buffers.logits is None:
            return buffers.run(self._model, self._modules)
        buffers.graph.replay()
        return buffers.logits

    def _find(self, deltas: Deltas, rows: int, width: int) -> Buffers:
        key = (rows, width, _identity(deltas))
        found = next((buffers for buffers in self._buffers if buffers.key == key and buffers.free), None)
        if found:
            self._buffers.remove(found)
        else:
            found = Buffers(self._model, key, rows, width, deltas)
        self._buffers = [*self._buffers, found]
        return found

    def _bound(self) -> None:
        """Those that leave are free ones if there are any; the ones found last stay, unless for what is unloaded."""
        kept = list(self._buffers)
        while len(kept) > 1 and (len(kept) > KEPT or sum(buffers.bytes for buffers in kept) > KEPT_BYTES):
            kept.remove(next((buffers for buffers in kept[:-1] if buffers.free), kept[0]))
        self._keep([buffers for buffers in kept if not any(map(buffers.holds, self._gone))])


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """As `sdpa` of transformers; of a single position, the queries that share a key go in as positions of one head.

    Else it would copy all keys and values once a query head at every step (as 5.17 does).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    if length > 1 or groups == 1:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
        return found
    packed = query.reshape(rows, key.shape[1], groups, size)
    made = scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=rest.get("scaling"))
    return made.reshape(rows, 1, heads, -1), None


def use_attention(model: Any) -> bool:
    """False where a model has an attention of its own kind, which is not replaced."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation not in ("sdpa", ATTENTION):
        return False
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    model.set_attn_implementation(ATTENTION)
    return True


def _bucket(size: int, least: int) -> int:
    while least < size:
        least *= 2
    return least


def _out_of_memory(error: RuntimeError) -> torch.OutOfMemoryError | None:
    """What ended a recording, if it was that: its own end may fail over it."""
    chain = (error, error.__context__)
    return next((one for one in chain if isinstance(one, torch.OutOfMemoryError)), None)


def _identity(deltas: Deltas) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The adapters by the tensors that they consist of, which buffers hold."""
    return tuple(
        (name, (id(d.up),) if isinstance(d, Same) else (0, *(id(up) for _, up, _ in d.parts)))
        for name, d in deltas.items()
    )


def _in_place(delta: Delta | Same, rows: int) -> Delta | Same:
    """Which adapter a row has is read from `own` alone, which can be written over."""
    return delta if isinstance(delta, Same) else replace(delta, own=_more_rows(delta.own, rows).clone(), parts=())


def _more_rows(values: Tensor, rows: int) -> Tensor:
    return pad(values, (*[0, 0] * (values.dim() - 1), 0, rows - values.shape[0]))
