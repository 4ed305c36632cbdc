"""The engine in this process: transformers, and LoRA adapters beside the model. The embedded default.

The invariant: `adapter=None` is the base to the last bit, and a call ends on the adapter it started with: an adapter
that is unloaded while it answers is freed after its last call. Threads may share one engine; their calls are batched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ServingError
from ..settings import ServingSettings
from . import fp8
from .adapters import BASE, Deltas, Lora, applied, blended, read
from .base import (
    base_id,
    choose_device,
    context_of,
    disk_bytes,
    end_tokens,
    is_fp8,
    load_base,
    load_config,
    load_tokenizer,
    lora_targets,
)
from .batching import Batcher, Request, batches
from .chat import Ids, answer_ids, prompt_ids
from .decoding import Answer
from .engine import Limit, Pieces, Prompt, Sampling, Score, require_pairs, room_for_prompt
from .graphs import Graphs, is_plain, use_attention
from .latents import Expansion, worth_expanding

SCORED_TOKENS = 2048  # of one forward pass, padding included; answers on their way wait for it
T = TypeVar("T")
DEFAULT, NO_LIMIT = Sampling(), Limit()
LEAST_BYTES = 2 << 30  # a smaller base is as fast in full, and loses most by rounding


class LocalEngine:
    def __init__(self, settings: ServingSettings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._device = choose_device(settings.device)
        self._model = _loaded(settings, self._device)
        self._modules = dict(self._model.named_modules())
        on_card = torch.device(self._device).type == "cuda" and use_attention(self._model)
        self._graphs = Graphs(self._model, self._modules, record=True) if on_card else None
        on_cpu = self._device == "cpu" and worth_expanding(self._model)
        self._expansion = Expansion(self._model) if on_cpu else None
        self._tokenizer = load_tokenizer(settings.base)
        self._base_id = base_id(settings.base)
        self._context = context_of(self._model.config)
        self._ends = end_tokens(self._model, self._tokenizer)
        self._adapters: dict[str, Lora] = {}
        self._batcher = Batcher(self._next, self._device, settings.threads or torch.get_num_threads())

    @property
    def base_id(self) -> str:
        return self._base_id

    def close(self) -> None:
        """Let go of the model and the adapters. What is asked later, or not answered yet, is a ServingError."""
        self._batcher.hand_in(self._let_go).result()

    def _let_go(self) -> None:
        self._model, self._graphs, self._expansion = None, None, None
        self._modules, self._adapters = {}, {}
        self._batcher.forget()

    def _require_open(self) -> None:
        if self._model is None:
            raise ServingError("the engine is closed; open another")

    # -- answering ---

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        adapter: str | None = None,
        sampling: Sampling = DEFAULT,
        cancel: Event | None = None,
    ) -> list[str]:
        """One answer a prompt, in order. ServingError when one of them fails or is not ready in time, or when another
        thread sets `cancel`."""
        requests = self._requests(prompts, adapter, sampling, cancel)
        try:
            limits = self._batcher.limits
            for group in batches([request.size for request in requests], limits.columns, limits.rows):
                self._batcher.add([requests[i] for i in group])
                for i in group:
                    for _ in requests[i].pieces():
                        pass
        finally:
            for request in requests:
                request.given_up = True
        return [request.answer.text for request in requests]

    def stream(self, prompt: Prompt, *, adapter: str | None = None, sampling: Sampling = DEFAULT) -> Pieces:
        """The pieces of what `generate` would return. Closing the iterator ends the answer."""
        (request,) = self._requests([prompt], adapter, sampling)
        request.streamed = True
        return self._streamed(request)

    def _streamed(self, request: Request) -> Pieces:
        self._batcher.add([request])
        try:
            yield from request.pieces()
        finally:
            request.given_up = True

    def _requests(
        self, prompts: Sequence[Prompt], adapter: str | None, sampling: Sampling, cancel: Event | None = None
    ) -> list[Request]:
        lora, limit = self._lora(adapter), Limit(sampling.timeout_s, cancel)
        answers = [Answer(self._tokenizer, sampling, row, self._ends) for row in range(len(prompts))]
        ids = [self._prompt(prompt, sampling.max_tokens) for prompt in prompts]
        return [Request(*row, lora, limit) for row in zip(ids, answers, strict=True)]

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        *,
        adapter: str | None = None,
        timeout_s: float = 0.0,
        cancel: Event | None = None,
    ) -> list[Score]:
        """Log-probabilities of `answers`, each with its end of turn, given their prompts. ServingError when they are
        not ready in time (0 = whenever they are), or when another thread sets `cancel`."""
        require_pairs(prompts, answers)
        lora, limit = self._lora(adapter), Limit(timeout_s, cancel)
        tails = [answer_ids(self._tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
        rows = [(self._prompt(prompt, len(tail)), tail) for prompt, tail in zip(prompts, tails, strict=True)]
        scores: dict[int, Score] = {}
        for group in batches([len(head) + len(tail) for head, tail in rows], SCORED_TOKENS):
            found = self._call(partial(self._scored, lora, [rows[i] for i in group], limit), limit)
            scores |= zip(group, found, strict=True)
        return [scores[i] for i in range(len(rows))]

    def _call(self, job: Callable[[], T], limit: Limit = NO_LIMIT) -> T:
        try:
            future = self._batcher.hand_in(job)
            limit.wait(lambda seconds: bool(wait([future], seconds).done))
            return future.result()
        except (RuntimeError, ValueError) as error:  # as where the card is full, or a kernel refuses a shape
            raise ServingError(f"the model failed: {error}") from error

    def _prompt(self, prompt: Prompt, reserved: int) -> Ids:
        return prompt_ids(self._tokenizer, prompt, room_for_prompt(self._context, reserved))

    # -- the model; only the batcher's thread comes here ---

    def _next(self, deltas: Deltas, **inputs: Any) -> tuple[Tensor, Any]:
        self._require_open()
        past = inputs.get("past_key_values")
        if self._graphs and inputs["input_ids"].shape[1] == 1 and past is not None and is_plain(past):
            return self._graphs.step(deltas, **inputs)
        if past is None:
            return self._in_room(partial(self._read, deltas, inputs))
        return self._read(deltas, inputs)  # once: it may break off with a part of the cache longer

    def _in_room(self, work: Callable[[], T]) -> T:
        """What `work` returns; where the card is full, of a second try without the buffers that no batch has."""
        if self._graphs:
            with suppress(torch.OutOfMemoryError):
                return work()
            self._graphs.give_back()
        return work()

    def _read(self, deltas: Deltas, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        past = inputs.get("past_key_values")
        with self._kept(past) as cache, applied(self._modules, deltas), torch.inference_mode():
            out = self._model(**{**inputs, "past_key_values": cache}, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def _kept(self, past: Any) -> AbstractContextManager[Any]:
        return self._expansion.into(past) if self._expansion else nullcontext(past)

    def _scored(self, lora: Lora, rows: Sequence[tuple[Ids, Ids]], limit: Limit) -> list[Score]:
        limit.left()  # nobody may wait any more
        return self._in_room(partial(self._score_batch, lora, rows))

    def _score_batch(self, lora: Lora, rows: Sequence[tuple[Ids, Ids]]) -> list[Score]:
        width = max(len(head) + len(tail) for head, tail in rows) - 1  # the last token predicts nothing
        ids, mask = torch.zeros((2, len(rows), width), dtype=torch.long)
        predicting: list[int] = []
        for row, (head, tail) in enumerate(rows):
            size = len(head) + len(tail) - 1
            ids[row, :size], mask[row, :size] = torch.tensor((head + tail)[:-1]), 1
            predicting += range(row * width + len(head) - 1, row * width + size)
        logits = self._logits_at(lora, ids, mask, torch.tensor(predicting))
        target = torch.tensor([token for _, tail in rows for token in tail], device=logits.device)
        values = (logits.gather(1, target[:, None])[:, 0].float() - logits.float().logsumexp(-1)).cpu()
        found = iter(values.tolist())
        return [Score(tuple(next(found) for _ in tail)) for _, tail in rows]

    def _logits_at(self, lora: Lora, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits at flattened positions of (rows, width) ids; only these meet the vocabulary."""
        self._require_open()
        head = self._model.get_output_embeddings()
        positions = positions.to(self._device)

        def select(_: torch.nn.Module, hidden: tuple[Tensor]) -> tuple[Tensor]:
            return (hidden[0].flatten(0, 1)[positions],)

        deltas = blended([lora])
        with head.register_forward_pre_hook(select), applied(self._modules, deltas), torch.inference_mode():
            out = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False)
        logits: Tensor = out.logits
        return logits

    # -- adapters ---

    def adapters(self) -> list[str]:
        return list(self._adapters)

    def load(self, adapter_id: str, path: Path) -> None:
        """Take the adapter in `path` into memory. Ids are immutable: a loaded one is not read again."""
        if adapter_id in self._adapters:
            return
        self._lora(None)
        lora = read(adapter_id, path, self._base_id, self._modules, self._device)
        self._call(partial(self._require_effect, adapter_id, lora))
        self._adapters.setdefault(adapter_id, lora)

    def unload(self, adapter_id: str) -> None:
        """Answer no new call with it; it leaves memory when the running ones have ended."""
        lora = self._adapters.pop(adapter_id, None)
        if lora is None:
            raise self._unknown(adapter_id)
        if self._graphs:
            self._batcher.hand_in(partial(self._forget, lora))

    def discard(self, adapter_ids: Collection[str]) -> None:
        """Other processes have their own."""

    def _forget(self, lora: Lora) -> None:
        if self._graphs:  # not closed meanwhile
            self._graphs.forget(lora)

    def _lora(self, adapter: str | None) -> Lora:
        """What the call holds of the adapter until it ends."""
        self._require_open()
        lora = BASE if adapter is None else self._adapters.get(adapter)
        if lora is None:
            raise self._unknown(str(adapter))
        return lora

    def _unknown(self, adapter_id: str) -> ServingError:
        loaded = ", ".join(self._adapters) or "none"
        return ServingError(f"adapter {adapter_id} is not loaded; loaded: {loaded}")

    def _require_effect(self, adapter_id: str, lora: Lora) -> None:
        """An adapter that changes no logit holds nothing."""
        ids = torch.tensor([self._prompt([{"role": "user", "content": "Hello, who are you?"}], 1)])
        mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])
        plain, adapted = (self._logits_at(one, ids, mask, positions) for one in (BASE, lora))
        if not bool(adapted.isfinite().all()):
            raise ServingError(f"adapter {adapter_id}: answers with it are not finite; train it again")
        if torch.equal(plain, adapted):
            raise ServingError(f"adapter {adapter_id} changes nothing: all its weights are 0")


def _loaded(settings: ServingSettings, device: str) -> Any:
    """On a CPU in float32, which is both faster and exact; elsewhere as the checkpoint was made for."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if not _in_fp8(settings, device):
        return load_base(settings.base, dtype=dtype, device=device)
    model = load_base(settings.base, dtype=dtype, device="cpu")
    try:
        return fp8.convert(model, lora_targets(model.config, "attention+mlp"), device)
    except RuntimeError as error:  # as a card without room for it
        raise ServingError(f"base {settings.base}: cannot be put on {device}: {error}") from error


def _in_fp8(settings: ServingSettings, device: str) -> bool:
    wanted = settings.weights
    if wanted == "auto":
        return fp8.supported(device) and disk_bytes(settings.base) >= LEAST_BYTES and is_fp8(load_config(settings.base))
    if wanted == "fp8" and device != "cpu" and not fp8.supported(device):
        raise ServingError(f"torch has no FP8 products for {device} (Hopper has them); set serving.weights to full")
    return wanted == "fp8"
