"""Finding and loading a base: the shipped seedling, a folder, or a hub id.

A base is always loaded dequantised, since LoRA trains on the very numbers that serve. The invariant: `base_id` names
the content, so an adapter trained on one base is never applied to another that bears the same name.
"""

from __future__ import annotations

import json
import os
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..content import files_id
from ..errors import ServingError, SettingsError
from ..loading import loading
from .engine import WEIGHTS as ADAPTER_WEIGHTS

if TYPE_CHECKING:
    import torch

SEEDLING = Path(__file__).parent / "seedling"
CONFIG = "config.json"
DESCRIBING = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]  # config, tokenizer, chat template
NAMING = [  # what a base answers by; other files, as a night's or a trainer's beside it, may come and go
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "*.jinja", "*.model", "merges.txt", "vocab.*", "*.safetensors"),
]
WEIGHTS = "model.safetensors"  # of a checkpoint without an index
INDEX = "model.safetensors.index.json"
DEQUANTISED = ("fp8", "mxfp4")  # on loading, of the methods of transformers
WRONG = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError)
OVER_FILES = (OSError, ImportError, RuntimeError, *WRONG)  # what transformers raises, beside errors of its own
VLLM_IGNORES = "kv_b_proj"  # of latent attention: vLLM splits its weight at load, and never sees what LoRA adds to it
NOISE = re.compile("drop|jitter")  # in names of a config: what a model adds in train mode, and not when it serves
MLP_NAMES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc"}


def locate(spec: str, weights: bool = False) -> Path:
    """The folder of a base. What the cache lacks of a hub id, with `@COMMIT` for that one, is downloaded; `weights`, as
    they are large, only if they are asked for.

    The commit that is held stays: a new one, were it only of the model card, would be another base, and no adapter
    would fit it.
    """
    folder = _on_disk(spec)
    if os.path.isdir(folder):  # unlike Path.is_dir it takes what cannot be looked at for missing
        if not (folder / CONFIG).exists():
            raise ServingError(f"base {spec}: {folder} has no config.json; give the folder of a checkpoint")
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", spec):
        from huggingface_hub.errors import HFValidationError

        with suppress(HFValidationError):
            return _from_hub(spec, weights)
    raise ServingError(f"base {spec}: no such folder; set serving.base to seedling, a folder or a hub id")


def _on_disk(spec: str) -> Path:
    return SEEDLING if spec == "seedling" else Path(os.path.expanduser(spec))  # Path's raises where none is


@lru_cache(maxsize=16)  # once a process
def _from_hub(spec: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, commit = spec.partition("@")
    fetched = partial(snapshot_download, repo_id=name)
    held: Path | None = None
    with suppress(LocalEntryNotFoundError, OSError):  # a commit that lacks anything that is asked for is not found
        held = Path(fetched(revision=commit or None, allow_patterns=[CONFIG], local_files_only=True))
    try:  # of the commit that is held, what is missing
        held = Path(fetched(revision=held.name if held else commit or None, allow_patterns=DESCRIBING))
        return Path(fetched(revision=held.name, allow_patterns=_weights(held))) if weights else held
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if held and (not weights or has_weights(held)):
            return held
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else type(error).__name__
        what = "its weights are " if held else ""
        raise ServingError(f"base {spec}: {what}not in the local cache and not downloaded ({why}); {error}") from error


def has_weights(folder: Path) -> bool:
    """Whether all that are loaded are there, as far as an index tells."""
    return all((folder / name).exists() for name in _weights(folder))


def _weights(folder: Path) -> list[str]:
    """What transformers loads of it; others, as those in the layout of the model's maker, are none of ours."""
    return sorted(set((_index(folder).get("weight_map") or {}).values())) or [WEIGHTS]


def damaged(spec: str) -> list[str]:
    """What is wrong with the files of its weights that are there, as far as their heads and lengths tell."""
    from safetensors import SafetensorError, safe_open

    found: list[str] = []
    folder = locate(spec)
    for file in (folder / name for name in _weights(folder) if (folder / name).exists()):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            found.append(f"base {spec}: {file} is damaged: {error}; copy or download it anew")
    return found


def _index(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8")) if (folder / INDEX).exists() else {}
        return dict(found)
    except (ValueError, TypeError) as error:
        raise ServingError(f"base {folder}: its {INDEX} is damaged: {error}") from error


def base_id(spec: str) -> str:
    """`b2:` and a hash over config, weights, tokenizer and chat template; of a hub id, whose commits never change, the
    commit."""
    folder = locate(spec)
    if folder != _on_disk(spec):
        return f"hub:{spec.partition('@')[0]}@{folder.name}"
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return f"hub:{spec}@{folder.name}"  # a folder of the hub's own cache
    paths = sorted({path for pattern in NAMING for path in folder.glob(pattern)})
    return _hashed(tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths))


@lru_cache(maxsize=16)
def _hashed(files: tuple[tuple[str, int, int], ...]) -> str:
    return files_id([Path(path) for path, _, _ in files])


def disk_bytes(spec: str) -> int:
    """Of its weights, 0 if there are none. What the index of a hub id tells is not downloaded for it."""
    folder = locate(spec)
    told = (_index(folder).get("metadata") or {}).get("total_size")
    if told and folder != _on_disk(spec) and not has_weights(folder):
        return int(told)
    folder = locate(spec, weights=True)
    return sum((folder / name).stat().st_size for name in _weights(folder) if (folder / name).exists())


# -- loading; nothing but safetensors is read, and no code that comes with a base is run ---


@contextmanager
def _refusing(problem: str) -> Iterator[None]:
    """ServingError that begins with `problem` for whatever is raised over a file that is damaged or odd."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (StrictDataclassError, SafetensorError, *OVER_FILES) as error:
        missing = "; run `pip install 'nightschool[serve]'`" if isinstance(error, ImportError) else ""
        raise ServingError(f"{problem}: {type(error).__name__}: {error}{missing}") from error


def load_config(spec: str) -> Any:
    """The model's config; nothing else of it is read."""
    from transformers import AutoConfig

    folder = locate(spec)
    with _refusing(f"base {spec}: its config.json cannot be used"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(spec: str) -> Any:
    from transformers import AutoTokenizer

    folder = locate(spec)
    with _refusing(f"base {spec}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ServingError(f"base {spec}: the tokenizer has no chat template; take the instruct version of the model")
    return tokenizer


def load_base(spec: str, *, dtype: torch.dtype, device: str = "auto") -> Any:
    """The dequantised model in `dtype` on `device`, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    from . import blocks

    folder = locate(spec, weights=True)
    with loading(), _refusing(f"base {spec}: cannot be loaded from {folder}"):
        config = _without_noise(_dequantising(spec))
        # the FP8 loader writes bfloat16 and stumbles over any other dtype
        kind = torch.bfloat16 if is_fp8(config) else dtype
        how: dict[str, Any] = {"config": config, "dtype": kind, "trust_remote_code": False, "use_safetensors": True}
        with blocks.of_size(_block_size(config)):
            model, told = AutoModelForCausalLM.from_pretrained(folder, **how, output_loading_info=True)
        _require_whole(spec, told)
        model = model if kind == dtype else _in_dtype(model, dtype)
        return model.to(choose_device(device)).eval()


def require_tensors(spec: str) -> None:
    """ServingError where its files lack something that the model is made of. Of them only the heads are read."""
    import torch
    from transformers.modeling_utils import load_state_dict

    from . import blocks

    folder = locate(spec)
    with loading(), _refusing(f"base {spec}: cannot be loaded from {folder}"):
        config = _dequantising(spec)
        heads = [load_state_dict(folder / name, map_location="meta") for name in _weights(folder)]
        how: dict[str, Any] = {"config": config, "dtype": torch.bfloat16, "device_map": "meta"}
        how |= {"state_dict": dict(ChainMap(*heads)), "output_loading_info": True}
        with blocks.of_size(_block_size(config)):
            _, told = type(_unloaded(config)).from_pretrained(None, **how)
    _require_whole(spec, told)


def _require_whole(spec: str, told: Mapping[str, Any]) -> None:
    """What a checkpoint lacks is drawn at random by transformers, at each load anew."""
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ServingError(
            f"base {spec}: its weights lack {', '.join(missing[:3])}{more}; copy or download it anew, or take the"
            " checkpoint of a causal language model"
        )


def _dequantising(spec: str) -> Any:
    """The config under which its weights are loaded."""
    config = load_config(spec)
    if reason := why_not_dequantised(spec, config):
        raise ServingError(reason)
    if quantised_by(config):
        config.quantization_config = {**config.quantization_config, "dequantize": True}
    return config


def _without_noise(config: Any) -> Any:
    """Without dropout and jitter: what is trained is the model that serves, from which its references are taken."""
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _without_noise(value)
        elif isinstance(value, float) and NOISE.search(name):
            setattr(config, name, 0.0)
    return config


def context_of(config: Any) -> int:
    """Tokens that prompt and answer may have together."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not context:
        raise ServingError(f"the config of a {config.model_type} names no max_position_embeddings; take another base")
    return int(context)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a turn: the tokenizer's, and what the checkpoint lists for generation."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    return frozenset(token for token in [tokenizer.eos_token_id, *listed] if token is not None)


def choose_device(device: str) -> str:
    """As torch names it; a CPU is always "cpu", whatever number it is given."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"serving.device is {device!r}, which torch cannot use here: {reason}") from error
    return kind if kind == "cpu" else device


def is_fp8(config: Any) -> bool:
    return quantised_by(config) == "fp8"


def _block_size(config: Any) -> tuple[int, int] | None:
    """Rows and columns that have one scale, in an FP8 checkpoint of blocks."""
    size = config.quantization_config.get("weight_block_size") if is_fp8(config) else None
    return (int(size[0]), int(size[1])) if size else None


def quantised_by(config: Any) -> str:
    """The method; empty for weights as they were trained."""
    quantization = getattr(config, "quantization_config", None)
    return str(quantization.get("quant_method", "no named method")) if quantization else ""


def why_not_dequantised(spec: str, config: Any) -> str:
    """Empty for a base that can be."""
    method = quantised_by(config)
    if method in {"", *DEQUANTISED}:
        return ""
    return (
        f"base {spec}: its weights are quantised by {method}, which is not undone here; take the checkpoint in full"
        f" precision, or one with quant_method {' or '.join(DEQUANTISED)}"
    )


def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """A fresh model with the same weights; `model.to(dtype)` would keep rotary buffers that bfloat16 rounded."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


# -- where LoRA goes ---


def lora_targets(config: Any, setting: str, engine: str = "local") -> str:
    """A pattern of module names for peft: attention, and with `attention+mlp` the dense and shared-expert MLPs.

    Read off the model's own modules, so it holds for any family; routers and routed experts are never in it, nor what
    `engine` would pass by.
    """
    names = [name for name in modules_of(config).linear if _is_target(name.split("."), setting)]
    names = [name for name in names if engine != "vllm" or not name.endswith(VLLM_IGNORES)]
    if not names:
        raise ServingError(f"no linear layer of a {config.model_type} fits night.lora_targets = {setting!r}")
    shapes = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in names})
    return "|".join(re.escape(shape).replace(r"\#", r"\d+") for shape in shapes)


def has_weights_vllm_ignores(adapter: Path) -> bool:
    """Whether the adapter in that folder has weights that a vLLM server would leave out without a word."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, "np") as file:
            return any(f".{VLLM_IGNORES}." in key for key in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):  # whoever reads it says so
        return False


@dataclass(frozen=True)
class Modules:
    linear: dict[str, tuple[int, int]]  # name → features in and out
    parameters: dict[str, int]  # name → how many numbers


def modules_of(config: Any) -> Modules:
    """What a model of `config` is made of; nothing is allocated."""
    import torch

    model = _unloaded(config)
    linear = {n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return Modules(linear, {name: p.numel() for name, p in model.named_parameters()})


def _unloaded(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    problem = f"base {config.name_or_path}: no causal language model can be made of a {config.model_type}"
    with loading(), _refusing(problem), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def expert_share(config: Any) -> float:
    """The share of the routed experts that one token meets; 1 for a dense model."""
    text = config.get_text_config()
    counts = [getattr(text, key, None) for key in ("n_routed_experts", "num_local_experts", "num_experts")]
    return min(1.0, (getattr(text, "num_experts_per_tok", None) or 1) / next(filter(None, counts), 1))


def _is_target(path: list[str], setting: str) -> bool:
    owners, leaf = path[:-1], path[-1]
    if "experts" in owners:
        return False
    if any("attn" in owner or "attention" in owner for owner in owners):
        return True
    return setting == "attention+mlp" and leaf in MLP_NAMES
