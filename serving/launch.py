"""The command that starts a vLLM server for a base, with room for our adapters and nothing sent elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..errors import SettingsError
from ..settings import Settings, without_user
from .base import load_config, locate, lora_targets

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM can be built for
RESIDENT = 4  # adapters: live, candidate, its phase 1, and one that is leaving
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def vllm_command(settings: Settings, extra: Sequence[str] = (), trained: Sequence[tuple[int, str]] = ()) -> list[str]:
    """`vllm serve` with its arguments; `extra` (more GPUs, more nodes) goes last and so wins.

    There is room for what the settings train and for what was `trained`: ranks and `night.lora_targets` of then.

    An FP8 checkpoint is recognised by the server itself. It listens where `serving.url` points, loopback by default.
    """
    serving, night = settings.serving, settings.night
    ranks, targets = zip((night.lora_rank, night.lora_targets), *trained, strict=True)
    rank = max(ranks)
    wide_enough = [r for r in RANKS if r >= rank]
    if not wide_enough:
        raise SettingsError(
            f"night.lora_rank is {rank}, or was when what serves was trained; a vLLM server takes at most {RANKS[-1]}"
        )
    host, port = _address(serving.url)
    config = load_config(serving.base)
    return [
        *(serving.vllm_command, "serve", str(locate(serving.base))),
        *("--served-model-name", serving.base),
        *("--host", host, "--port", str(port)),
        *("--enable-lora", "--max-loras", str(RESIDENT), "--max-lora-rank", str(wide_enough[0])),
        *(
            "--lora-target-modules",
            *_leaves("|".join(lora_targets(config, name, "vllm") for name in sorted(set(targets)))),
        ),
        *("--generation-config", "vllm"),  # else the checkpoint's own penalties apply to what we ask for greedily
        *extra,
    ]


def _address(url: str) -> tuple[str, int]:
    """Where to listen, so that whoever asks at `url` is heard."""
    try:
        address = urlsplit(url)
        host, port = address.hostname, address.port
    except ValueError:
        host, port = None, None
    if host is None or port is None or address.scheme != "http":
        raise SettingsError(
            f"serving.url is {without_user(url)!r}, where a server of ours cannot listen; give http://HOST:PORT, or"
            " have what answers there pass it on to such an address"
        )
    return host, port


def _leaves(pattern: str) -> list[str]:
    """The last names of the modules that a pattern of `lora_targets` matches."""
    return sorted({re.sub(r"\\(.)", r"\1", branch).rsplit(".", 1)[-1] for branch in pattern.split("|")})
