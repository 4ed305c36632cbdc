"""What `nightschool doctor` looks at: versions, settings, counts, and what would stop the next reply or night."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ..errors import NightschoolError
from ..settings import Settings

PACKAGES = ("nightschool", "torch", "transformers", "peft", "trl", "lancedb", "sentence-transformers", "sqlalchemy")
EXTRAS = {"accelerate": "serve", "peft": "serve", "trl": "train"}


def examine(settings: Settings) -> dict[str, Any]:
    """Findings as plain data; `problems` is empty when all is well."""
    problems: list[str] = []
    for package, extra in EXTRAS.items():
        if find_spec(package) is None:
            problems.append(f"{package} is missing; pip install 'nightschool[{extra}]'")
    return {
        "home": str(settings.home),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": _device(),
        "base": _try(problems, "base", lambda: _base(settings)),
        "memory": _try(problems, "memory", lambda: _counts(settings)),
        "settings": settings.to_json(),
        "problems": problems,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _base(settings: Settings) -> str:
    from ..serving.base import base_id

    return f"{settings.serving.base} = {base_id(settings.serving.base)}"


def _counts(settings: Settings) -> dict[str, int] | str:
    if not settings.home.exists():
        return "no home yet; run `nightschool init`"
    from ..memory.store import MemoryStore

    with MemoryStore(settings) as store:
        return store.counts()


def _try(problems: list[str], what: str, look: Any) -> Any:
    try:
        return look()
    except NightschoolError as error:
        problems.append(f"{what}: {error}")
        return "not usable"
