"""What `nightschool doctor` looks at: versions, settings, counts, and what would stop the next reply or night."""

from __future__ import annotations

import platform
import shlex
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..content import plain
from ..errors import NightschoolError
from ..memory.erasing import size_of
from ..settings import Settings, without_user
from .printing import ENDED, checked_home, is_home

if TYPE_CHECKING:
    from ..evolve.registry import Registry
    from ..evolve.types import Cycle
    from ..memory.database import Database

PACKAGES = ("nightschool", "torch", "transformers", "peft", "trl", "lancedb", "sentence-transformers", "sqlalchemy")
LEAST_FREE = 50_000_000  # bytes, of writing a day
ANSWERING, TRAINING = ("accelerate", "peft"), ("trl", "datasets")  # what of the extras is needed for what


def examine(settings: Settings) -> dict[str, Any]:
    """Findings as plain data; `problems` is empty when all is well. That a machine cannot train is one of `notes`."""
    problems = [f"{name} is missing; pip install 'nightschool[serve]'" for name in ANSWERING if not find_spec(name)]
    notes = [
        f"no night runs here: {name} is missing; pip install 'nightschool[train]'"
        for name in TRAINING
        if not find_spec(name)
    ]
    problems += _open_to_others("home", settings.home)
    _try(problems, "index", lambda: problems.extend(_index_open_to_others(settings)))
    _try(problems, "disk", lambda: problems.extend(_short_of_room(settings.home)))
    return {
        "home": str(settings.home),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": _try(problems, "device", _device),
        "base": _try(problems, "base", lambda: _base(settings, problems)),
        "engine": _try(problems, "engine", lambda: _engine(settings)),
        "memory": _try(problems, "memory", lambda: _counts(settings)),
        "probes": _try(problems, "probes", lambda: _probes(settings)),
        "interrupted_nights": _try(problems, "interrupted_nights", lambda: _ended(settings)),
        "serving": _try(problems, "serving", lambda: _in_service(settings, problems)),
        "settings": _try(problems, "settings", lambda: _shown(settings)),
        "notes": notes,
        "problems": problems,
    }


def _open_to_others(what: str, folder: Path) -> list[str]:
    mode = folder.stat().st_mode & 0o777 if folder.is_dir() else 0
    if not mode & 0o077:
        return []
    return [f"{what}: others may read it (its mode is {mode:o}); run `chmod 700 {shlex.quote(str(folder))}`"]


def _index_open_to_others(settings: Settings) -> list[str]:
    index = Path(settings.index_url)
    return [] if index.is_relative_to(settings.home) else _open_to_others("index", index)


def _short_of_room(home: Path) -> list[str]:
    """Forgetting and compacting write database and index once more."""
    names = [home / name for name in ("nightschool.db", "index")] if home.is_dir() else []
    needed = LEAST_FREE + sum(size_of(path) for path in names)
    free = shutil.disk_usage(home).free if home.is_dir() else needed
    if free >= needed:
        return []
    return [f"disk: {free / 1e6:.0f} MB are free at {home}; forgetting and compacting may want {needed / 1e6:.0f}"]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _base(settings: Settings, problems: list[str]) -> str:
    from ..serving.checking import check
    from ..serving.engine import LEAST_PROMPT

    serving, found = settings.serving, check(settings.serving.base, settings.night.lora_rank, settings.serving.engine)
    problems += [f"base: {problem}" for problem in found.problems]
    if settings.night.lora_targets not in found.lora_modules:
        problems.append(f"base: night.lora_targets is {settings.night.lora_targets!r}, which does not fit it")
    if serving.max_tokens > (most := found.context - LEAST_PROMPT):
        problems.append(f"base: serving.max_tokens is {serving.max_tokens}, and its context takes at most {most}")
    if (longest := settings.night.max_tokens) > found.context:
        problems.append(f"base: night.max_tokens is {longest}, and its context takes at most {found.context}")
    return f"{serving.base} = {found.base_id}"


def _engine(settings: Settings) -> str:
    """The one that would answer; of a server, whether it does."""
    serving = settings.serving
    if serving.engine == "vllm":
        from ..serving.vllm import VLLMEngine

        VLLMEngine(serving).close()
        return f"vllm at {without_user(serving.url)}"
    from ..serving.base import choose_device

    return f"local, on {choose_device(serving.device)}"


def _shown(settings: Settings) -> dict[str, Any]:
    """The settings without a password, of a database, an index or a server."""
    from ..memory.database import without_password

    found = {name: plain(section) for name, section in settings.to_json().items()}
    if url := settings.memory.database_url:
        found["memory"]["database_url"] = without_password(url)
    if "://" in (place := settings.memory.index_url):
        found["memory"]["index_url"] = without_user(place)
    found["serving"]["url"] = without_user(settings.serving.url)
    return found


def _counts(settings: Settings) -> dict[str, int]:
    from ..memory.store import MemoryStore

    with MemoryStore(checked_home(settings)) as store:
        store.check_index()
        return store.counts()


def _probes(settings: Settings) -> int:
    from ..evolve.probes import load_probes

    return len(load_probes(settings.home))


def _ended(settings: Settings) -> list[str]:
    """Nights that ended without a word; the next one records it."""
    if not is_home(settings):
        return []
    from ..evolve.registry import Registry
    from ..memory.store import MemoryStore

    with MemoryStore(checked_home(settings)) as store:
        registry = Registry.of(store)
        told = {c.id: outcome_by_now(c, settings.home, store.database) for c in registry.cycles()}
        return [f"{cycle_id} {ENDED}" for cycle_id, outcome in told.items() if outcome == ENDED]


def outcome_by_now(cycle: Cycle, home: Path, database: Database) -> str:
    """`ENDED` of a night that is unfinished and does not run: it was killed, or the power failed."""
    return ENDED if cycle.outcome == "running" and not _night_runs(home, database) else cycle.outcome


def _night_runs(home: Path, database: Database) -> bool:
    from ..pipelines.lock import NightRunning, night_lock

    try:
        with night_lock(home, database):
            return False
    except (NightRunning, OSError):  # the latter in a home that may only be read
        return True


def _in_service(settings: Settings, problems: list[str]) -> str:
    """The live adapter, and whether it is whole and of the base in use."""
    if not is_home(settings):
        return "the base"
    from ..evolve.registry import Registry
    from ..evolve.sealing import read_adapter
    from ..memory.store import MemoryStore
    from ..serving.base import base_id

    with MemoryStore(checked_home(settings)) as store:
        registry = Registry.of(store)
        live = registry.live()
        problems += unrecorded(registry)
    if live is None:
        return "the base"
    if live.base_id != (used := base_id(settings.serving.base)):
        problems.append(
            f"serving: {live.id} was trained on base {live.base_id}, but serving.base is {used}, so it cannot answer;"
            " run `nightschool night` to train for it, or `nightschool base use` to set the other back"
        )
    return read_adapter(live.path).id


def unrecorded(registry: Registry) -> list[str]:
    """Whole adapters in the folder that no record knows: made elsewhere, or the database is another than theirs."""
    from ..serving.engine import MANIFEST

    known = {adapter.path for adapter in registry.adapters()}
    found = sorted({manifest.parent for manifest in registry.folder.glob(f"*/{MANIFEST}")} - known)
    return [f"{path}: no record knows this adapter; is the database the one of this home?" for path in found]


def _try(problems: list[str], what: str, look: Any) -> Any:
    try:
        return look()
    except NightschoolError as error:
        problems.append(f"{what}: {error}")
    except Exception as error:  # whatever it is, the other findings are told
        problems.append(f"{what}: {type(error).__name__}: {error}")
    return "not usable"
