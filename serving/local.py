"""The engine in this process: transformers, and peft for adapters. The embedded default.

The invariant: `adapter=None` is the base to the last bit, and a call ends on the adapter it started with: an adapter
that is unloaded while it answers is freed after its last call. Threads may share one engine; forward passes take turns.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ..errors import ServingError
from ..settings import ServingSettings
from .base import base_id, choose_device, load_base, load_tokenizer
from .chat import Ids, answer_ids, prompt_ids
from .decoding import Answer, decode
from .engine import Prompt, Sampling, Score
from .lora import as_named

BATCH_ROWS = 32
BATCH_TOKENS = 8192  # padding included
LEAST_PROMPT = 16  # tokens that must be left for the prompt
DEFAULT = Sampling()
UNKNOWN = "?"  # which adapter peft has made active
LORA_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class LocalEngine:
    def __init__(self, settings: ServingSettings | None = None) -> None:
        settings = settings or ServingSettings()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._device = choose_device(settings.device)
        # on a CPU float32 is both faster and exact; elsewhere what the checkpoint was made for
        dtype = torch.float32 if self._device == "cpu" else torch.bfloat16
        self._model = load_base(settings.base, dtype=dtype, device=self._device)
        self._tokenizer = load_tokenizer(settings.base)
        self._base_id = base_id(settings.base)
        self._context = int(self._model.config.get_text_config().max_position_embeddings)
        self._ends = _end_tokens(self._model, self._tokenizer)
        self._peft: Any = None  # wraps the model while an adapter is loaded
        self._names: dict[str, str] = {}  # adapter id → its name in peft
        self._leases: Counter[str] = Counter()
        self._active: str | None = None  # what the forward pass goes through
        self._lock = RLock()

    @property
    def base_id(self) -> str:
        return self._base_id

    def close(self) -> None:
        """The model goes with the object; nothing else is held."""

    # -- answering ---

    def generate(
        self, prompts: Sequence[Prompt], *, adapter: str | None = None, sampling: Sampling = DEFAULT
    ) -> list[str]:
        """One answer a prompt, in order."""
        ids = [self._prompt(prompt, sampling.max_tokens) for prompt in prompts]
        answers = [Answer(self._tokenizer, sampling, row) for row in range(len(prompts))]
        with self._lease(adapter) as name:
            for batch in batches([len(row) + sampling.max_tokens for row in ids]):
                rows, growing = [ids[i] for i in batch], [answers[i] for i in batch]
                for _ in decode(partial(self._next, name), rows, growing, sampling, self._ends, self._device):
                    pass
        return [answer.text for answer in answers]

    def stream(self, prompt: Prompt, *, adapter: str | None = None, sampling: Sampling = DEFAULT) -> Iterator[str]:
        """The pieces of what `generate` would return. The lock is taken for one token at a time."""
        ids, answer = self._prompt(prompt, sampling.max_tokens), Answer(self._tokenizer, sampling)
        with self._lease(adapter) as name:
            for _ in decode(partial(self._next, name), [ids], [answer], sampling, self._ends, self._device):
                if piece := answer.fresh():
                    yield piece
            if piece := answer.fresh():
                yield piece

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str], *, adapter: str | None = None) -> list[Score]:
        """Log-probabilities of `answers`, each with its end of turn, given their prompts."""
        tails = [answer_ids(self._tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
        rows = [(self._prompt(prompt, len(tail)), tail) for prompt, tail in zip(prompts, tails, strict=True)]
        scores: dict[int, Score] = {}
        with self._lease(adapter) as name:
            for batch in batches([len(head) + len(tail) for head, tail in rows]):
                scores |= zip(batch, self._score_batch(name, [rows[i] for i in batch]), strict=True)
        return [scores[i] for i in range(len(rows))]

    def _score_batch(self, name: str | None, rows: Sequence[tuple[Ids, Ids]]) -> list[Score]:
        width = max(len(head) + len(tail) for head, tail in rows) - 1  # the last token predicts nothing
        ids, mask = torch.zeros((2, len(rows), width), dtype=torch.long)
        predicting: list[int] = []
        for row, (head, tail) in enumerate(rows):
            size = len(head) + len(tail) - 1
            ids[row, :size], mask[row, :size] = torch.tensor((head + tail)[:-1]), 1
            predicting += range(row * width + len(head) - 1, row * width + size)
        logits = self._logits_at(name, ids, mask, torch.tensor(predicting))
        target = torch.tensor([token for _, tail in rows for token in tail], device=logits.device)
        values = (logits.gather(1, target[:, None])[:, 0].float() - logits.float().logsumexp(-1)).cpu()
        found = iter(values.tolist())
        return [Score(tuple(next(found) for _ in tail)) for _, tail in rows]

    def _prompt(self, prompt: Prompt, reserved: int) -> Ids:
        room = self._context - reserved
        if room < LEAST_PROMPT:
            raise ServingError(
                f"an answer of {reserved} tokens leaves no room for a prompt in the base's context of {self._context};"
                " ask for a shorter one"
            )
        return prompt_ids(self._tokenizer, prompt, room)

    # -- the model; every use of it is under the lock ---

    def _next(self, name: str | None, **inputs: Any) -> tuple[Tensor, Any]:
        with self._lock:
            self._use(name)
            with torch.inference_mode():
                out = self._model(**inputs, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def _logits_at(self, name: str | None, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Logits at flattened positions of (rows, width) ids; only these meet the vocabulary."""
        head = self._model.get_output_embeddings()
        positions = positions.to(self._device)

        def select(_: torch.nn.Module, hidden: tuple[Tensor]) -> tuple[Tensor]:
            return (hidden[0].flatten(0, 1)[positions],)

        with self._lock, head.register_forward_pre_hook(select):
            self._use(name)
            with torch.inference_mode():
                out = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False)
        logits: Tensor = out.logits
        return logits

    def _use(self, name: str | None) -> None:
        if self._peft is None or name == self._active:
            return
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(name, inference_mode=True)
        self._active = name

    @contextmanager
    def _lease(self, adapter: str | None) -> Iterator[str | None]:
        """The peft name of an adapter, which stays in memory until the last of its calls has ended."""
        if adapter is None:
            yield None
            return
        with self._lock:
            if adapter not in self._names:
                raise ServingError(f"adapter {adapter} is not loaded; loaded: {', '.join(self._names) or 'none'}")
            name = self._names[adapter]
            self._leases[name] += 1
        try:
            yield name
        finally:
            with self._lock:
                self._leases[name] -= 1
                if not self._leases[name] and name not in self._names.values():
                    self._free(name)

    # -- adapters ---

    def adapters(self) -> list[str]:
        return list(self._names)

    def load(self, adapter_id: str, path: Path) -> None:
        """Take the adapter in `path` into memory. Ids are immutable: a loaded one is not read again."""
        with self._lock:
            if adapter_id in self._names:
                return
            self._check(adapter_id, path)
            name = f"{re.sub(r'[^0-9A-Za-z]', '_', adapter_id)}_{len(self._leases)}"
            self._leases[name] = 0
            try:
                self._add(name, path)
                self._require_effect(adapter_id, name)
            except (RuntimeError, ValueError, KeyError, OSError, TypeError) as error:
                raise ServingError(f"adapter {adapter_id}: cannot be loaded from {path}: {error}") from error
            else:
                self._names[adapter_id] = name
            finally:
                if adapter_id not in self._names:
                    self._free(name)

    def unload(self, adapter_id: str) -> None:
        """Answer no new call with it, and free it when the running ones have ended."""
        with self._lock:
            if adapter_id not in self._names:
                raise ServingError(f"adapter {adapter_id} is not loaded; loaded: {', '.join(self._names) or 'none'}")
            name = self._names.pop(adapter_id)
            if not self._leases[name]:
                self._free(name)

    def _add(self, name: str, path: Path) -> None:
        from peft import PeftModel

        with as_named(self._model):
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._model, str(path), adapter_name=name)
            else:
                self._peft.load_adapter(str(path), adapter_name=name)
        self._peft.eval()
        self._active = UNKNOWN

    def _free(self, name: str) -> None:
        if self._peft is None or name not in self._peft.peft_config:
            return
        others = [other for other in self._peft.peft_config if other != name]
        if others:
            self._use(others[0])  # peft stumbles over deleting the active one
            self._peft.delete_adapter(name)
        else:
            self._model, self._peft, self._active = self._peft.unload(), None, None

    def _check(self, adapter_id: str, path: Path) -> None:
        """Refuse before the model is touched: a missing file, another base, weights that fit no module."""
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (path / file).exists():
                raise ServingError(f"adapter {adapter_id}: {path} has no {file}; run `nightschool audit verify`")
        manifest = path / "adapter.json"
        made_for = json.loads(manifest.read_text(encoding="utf-8"))["base_id"] if manifest.exists() else self._base_id
        if made_for != self._base_id:
            raise ServingError(
                f"adapter {adapter_id} was trained on base {made_for}, but {self._base_id} is serving;"
                " set serving.base back, or run `nightschool night` to train for this base"
            )
        self._check_shapes(adapter_id, path)

    def _check_shapes(self, adapter_id: str, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        rank = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("r")
        modules = dict(self._model.named_modules())
        try:
            with safe_open(path / "adapter_model.safetensors", "pt") as weights:
                shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ServingError(f"adapter {adapter_id}: its weights in {path} are damaged: {error}") from error
        if not shapes:
            raise ServingError(f"adapter {adapter_id}: {path} holds no weights, so it would change nothing")
        for key, shape in shapes.items():
            found = LORA_WEIGHT.fullmatch(key)
            module: Any = modules.get(found[1]) if found else None
            if found is None or not hasattr(module, "in_features"):
                raise ServingError(f"adapter {adapter_id}: the base has no module for its weight {key}; wrong base?")
            wanted = (rank, module.in_features) if found[2] == "A" else (module.out_features, rank)
            if shape != wanted:
                raise ServingError(f"adapter {adapter_id}: {key} is {shape}, the base needs {wanted}")

    def _require_effect(self, adapter_id: str, name: str) -> None:
        """An adapter that changes no logit was not applied, or holds nothing."""
        ids = torch.tensor([self._prompt([{"role": "user", "content": "Hello, who are you?"}], 1)])
        mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])
        plain, adapted = (self._logits_at(n, ids, mask, positions) for n in (None, name))
        if not bool(adapted.isfinite().all()):
            raise ServingError(f"adapter {adapter_id}: answers with it are not finite; train it again")
        if torch.equal(plain, adapted):
            raise ServingError(f"adapter {adapter_id} changes nothing: no module took it up, or all its weights are 0")


def batches(sizes: Sequence[int]) -> Iterable[list[int]]:
    """Indices in groups of like size, the longest first, each within the limits above when padded."""
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if group and (len(group) == BATCH_ROWS or (len(group) + 1) * sizes[group[0]] > BATCH_TOKENS):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn: the tokenizer's, and what the checkpoint lists for generation."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in [tokenizer.eos_token_id, *listed] if token is not None)
