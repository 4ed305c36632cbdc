"""Latent attention whose keys and values are expanded once and kept, not anew at every step.

DeepSeek's attention caches what its keys and values are made of, and at every step of every answer multiplies the whole
of it, padding included, to make them. Where that saves little memory and the multiplying is dear, on a CPU with a small
base, what it gives is kept in place of what it is made of. The invariant: logits are the same, since each position's
keys and values follow from its latent and its row's adapter, and a row never changes its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

MOST_GROWTH = 4.0  # of the cache; DeepSeek-V3 itself would need 70 times as much


class Expanded(DynamicCache):  # type: ignore[misc]
    """Keys and values as attention uses them."""

    def __init__(self, past: Any = None) -> None:
        super().__init__()
        if past is not None:
            self.layers = past.layers

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Latents pass through to be expanded."""
        return key_states, value_states

    def keep(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer, with the new ones."""
        found: tuple[Tensor, Tensor] = super().update(keys, values, layer)
        return found


class Expansion:
    """Has the latent attention of a model keep what it expands. One thread at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._cache: Expanded | None = None
        for module in model.modules():
            if hasattr(module, "expand_kv"):
                attention: Any = module
                attention.expand_kv = partial(self._expand, attention.expand_kv, attention.layer_idx)

    @contextmanager
    def into(self, past: Any) -> Iterator[Expanded]:
        """A cache with what `past` holds, None for nothing, that a forward pass inside fills."""
        self._cache = past if isinstance(past, Expanded) else Expanded(past)
        try:
            yield self._cache
        finally:
            self._cache = None

    def _expand(
        self, expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], layer: int, latent: Tensor, rotated: Tensor
    ) -> tuple[Tensor, Tensor]:
        new = expand(latent, rotated)
        return new if self._cache is None else self._cache.keep(*new, layer)


def worth_expanding(model: nn.Module) -> bool:
    """Whether the attention is latent, of a family whose forward pass is known here, and the cache grows little."""
    config: Any = model.config
    if config.model_type != "deepseek_v3" or not any(hasattr(module, "expand_kv") for module in model.modules()):
        return False
    heads, size = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return bool(heads * size <= MOST_GROWTH * (config.kv_lora_rank + config.qk_rope_head_dim))
