"""What a base is and what it takes, before a night or a server is started with it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ServingError
from ..settings import LORA_TARGETS
from .base import (
    base_id,
    context_of,
    damaged,
    disk_bytes,
    expert_share,
    has_weights,
    is_fp8,
    load_config,
    load_tokenizer,
    locate,
    lora_targets,
    modules_of,
    quantised_by,
    require_tensors,
    why_not_dequantised,
)
from .chat import answer_ids

GIB = 1 << 30
TRAINED_BYTES = 16  # of a LoRA parameter: float32 value and gradient, two moments of Adam
ALONE = (
    "it attends within windows, or keeps states: in this process its answers do not join a running batch, use nothing"
    " again of what was read of a session, and are not recorded as CUDA graphs; a vLLM server batches them"
)


@dataclass(frozen=True)
class BaseReport:
    """Sizes are in GiB. Memory is for weights alone; activations and the cache of a conversation come on top."""

    spec: str
    base_id: str
    family: str
    parameters: int
    active_parameters: int  # that one token meets: of the routed experts only those that are chosen
    context: int
    fp8: str  # the layout of its FP8 weights; else how it is quantised, if it is
    lora_modules: dict[str, tuple[str, ...]]  # by value of night.lora_targets
    on_disk_gib: float
    loading_gib: dict[str, float]  # the most of the machine's own memory on the way there, by device
    serving_gib: dict[str, float]  # by engine
    training_gib: dict[str, float]  # by device
    cache_kib_a_token: float  # bfloat16 keys and values, or the latents of MLA
    notes: tuple[str, ...]  # what it does not get here
    problems: tuple[str, ...]


def check(spec: str, rank: int, engine: str = "local") -> BaseReport:
    """Everything a night or a server will ask of the base at `spec`; `problems` is empty when it can be used.

    LoRA goes where `engine` applies it.

    In this process weights are dequantised, to 4 bytes on a CPU and 2 elsewhere; a card that multiplies in FP8 keeps
    what is on disk (`serving.weights`), and so does a vLLM server. Training holds the dequantised weights and
    TRAINED_BYTES for each parameter of the adapter. Every base goes through the machine's memory, dequantised; FP8 on a
    CPU in bfloat16 and float32 at once.
    """
    config = load_config(spec)
    sizes = modules_of(config)
    parameters = sum(sizes.parameters.values())
    on_disk = disk_bytes(spec) / GIB
    problems = _problems(spec, config, on_disk)
    patterns = _patterns(config, engine, problems)
    trained = max((_lora_parameters(sizes.linear, pattern, rank) for pattern in patterns.values()), default=0)
    text, share = config.get_text_config(), expert_share(config)
    return BaseReport(
        spec=spec,
        base_id=base_id(spec),
        family=config.model_type,
        parameters=parameters,
        active_parameters=round(sum(n * (share if ".experts." in name else 1) for name, n in sizes.parameters.items())),
        context=context_of(config),
        fp8=_fp8(config),
        lora_modules={setting: _names(sizes.linear, pattern) for setting, pattern in patterns.items()},
        on_disk_gib=on_disk,
        loading_gib={
            "cpu": (6 if is_fp8(config) else 4) * parameters / GIB,
            "cuda": 2 * parameters / GIB,
        },
        serving_gib={
            "local, cpu": 4 * parameters / GIB,
            "local, cuda": 2 * parameters / GIB,
            **({"local, cuda in fp8": on_disk} if is_fp8(config) else {}),
            "vllm": on_disk,
        },
        training_gib={
            "cpu": (4 * parameters + TRAINED_BYTES * trained) / GIB,
            "cuda": (2 * parameters + TRAINED_BYTES * trained) / GIB,
        },
        cache_kib_a_token=_cache_bytes(text) / 1024,
        notes=() if is_by_position(config) else (ALONE,),
        problems=tuple(problems),
    )


def _problems(spec: str, config: Any, on_disk: float) -> list[str]:
    whole = has_weights(locate(spec))
    found = [] if on_disk else [f"base {spec}: no *.safetensors in {locate(spec)}"]
    if on_disk and os.environ.get("HF_HUB_OFFLINE") and not whole:
        found.append(f"base {spec}: not all its weights are in {locate(spec)}, and HF_HUB_OFFLINE is set")
    found += [*damaged(spec), *filter(None, [why_not_dequantised(spec, config)])]
    looks: list[Callable[[str], object]] = [_try_tokenizer] if found or not whole else [require_tensors, _try_tokenizer]
    for look in looks:
        try:
            look(spec)
        except ServingError as error:
            found.append(str(error))
    return found


def _try_tokenizer(spec: str) -> None:
    answer_ids(load_tokenizer(spec), [{"role": "user", "content": "?"}], "!")


def _patterns(config: Any, engine: str, problems: list[str]) -> dict[str, str]:
    """The pattern of each value of night.lora_targets that fits the base; why another does not goes to `problems`."""
    found: dict[str, str] = {}
    for setting in LORA_TARGETS:
        try:
            found[setting] = lora_targets(config, setting, engine)
        except ServingError as error:
            problems.append(str(error))
    return found


def _names(linear: dict[str, tuple[int, int]], pattern: str) -> tuple[str, ...]:
    """The module names that LoRA goes to, without the numbers of layers."""
    fitting = [name for name in linear if re.fullmatch(pattern, name)]
    return tuple(sorted({".".join(name.split(".")[-2:]) for name in fitting}))


def _lora_parameters(linear: dict[str, tuple[int, int]], pattern: str, rank: int) -> int:
    return sum(rank * (i + o) for name, (i, o) in linear.items() if re.fullmatch(pattern, name))


def _fp8(config: Any) -> str:
    if not is_fp8(config):
        return f"none; quantised by {method}" if (method := quantised_by(config)) else ""
    quantization = config.quantization_config
    block = quantization.get("weight_block_size")
    return f"{quantization.get('fmt', 'e4m3')}, " + ("blocks of " + "×".join(map(str, block)) if block else "by tensor")


def is_by_position(config: Any) -> bool:
    """Whether its cache is by position throughout, as the embedded engine needs to move rows between batches, and a
    trainer to let each token see its ancestors alone."""
    from transformers import DynamicCache

    from .graphs import is_plain

    try:
        return is_plain(DynamicCache(config=config))
    except (AttributeError, KeyError, ValueError):  # a family with a cache of its own (DeepSeek V4)
        return False


def _cache_bytes(text: Any) -> int:
    if latent := getattr(text, "kv_lora_rank", None):
        return int(2 * text.num_hidden_layers * (latent + text.qk_rope_head_dim))
    if not (queries := getattr(text, "num_attention_heads", None)):
        return 0  # it keeps states (RWKV), or parts of it have heads of their own (BLT)
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    return int(2 * 2 * text.num_hidden_layers * heads * size)
