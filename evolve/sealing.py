"""Adapters on disk: sealed under the hash of their weights, read back, loaded into an engine, erased.

The invariant: what `read_adapter` returns has the weights and the config that were sealed. A folder without
`adapter.json` is debris, since the manifest is written last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Container
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from ..content import files_id
from ..errors import GateRefused
from ..serving import parity
from ..serving.engine import CONFIG, MANIFEST, WEIGHTS, Engine, of_another_base
from .types import Adapter, Phase

log = logging.getLogger("nightschool")
FILES, CONFIG_ID = (WEIGHTS, CONFIG), "config_id"  # the latter in an adapter's details
GONE = "put it back from a backup, or let go of what nothing needs with `nightschool adapters prune`"
PRUNED = "pruned"  # beside a manifest: its weights were erased on purpose
# By engine: it lists an adapter before it is known to answer with it as its trainer did.
_LOADING: WeakKeyDictionary[Engine, Lock] = WeakKeyDictionary()
_GUARD = Lock()


def seal(
    folder: Path,
    *,
    base_id: str,
    snapshot_id: str,
    phase: Phase,
    parent_id: str | None,
    created_utc: float,
    details: dict[str, Any],
) -> Adapter:
    """Name the weights in `folder` by their hash, write the manifest last, and rename the folder after the weights.

    Weights that are there already stay as they are. If they came of the same data and start, what is returned is that
    adapter with the settings of this time; else `Registry.add` decides whose they are.
    """
    adapter_id = files_id([folder / WEIGHTS])
    if (folder / CONFIG).exists():
        details = {**details, CONFIG_ID: files_id([folder / CONFIG])}
    target = folder.parent / adapter_id.replace(":", "-")
    adapter = Adapter(adapter_id, base_id, snapshot_id, phase, parent_id, target, created_utc, details)
    if intact(target):
        shutil.rmtree(folder)
        known = read_adapter(target)
        kept = {key: value for key, value in known.details.items() if key == CONFIG_ID}  # its config stays as well
        adapter = replace(adapter, details={k: v for k, v in details.items() if k != CONFIG_ID} | kept)
        return replace(known, details=adapter.details) if origin(known) == origin(adapter) else adapter
    write_manifest(folder, adapter)
    if target.exists():
        shutil.rmtree(target)  # debris of a crash, or damaged
    os.replace(folder, target)
    return adapter


def origin(adapter: Adapter) -> tuple[str, str | None]:
    """What it was trained on, and from."""
    return adapter.snapshot_id, adapter.parent_id


def write_manifest(folder: Path, adapter: Adapter) -> None:
    """Whole or not at all."""
    manifest = {key: value for key, value in asdict(adapter).items() if key != "path"}
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def mend(adapter: Adapter) -> None:
    """Write the manifest anew from what is on record, if it alone is missing."""
    weights = adapter.path / WEIGHTS
    if weights.exists() and not (adapter.path / MANIFEST).exists() and files_id([weights]) == adapter.id:
        log.warning("%s had no %s; it is written anew", adapter.path, MANIFEST)
        write_manifest(adapter.path, adapter)


def read_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`; GateRefused when its manifest is missing or its weights are not what they were."""
    manifest = folder / MANIFEST
    try:
        if not manifest.exists():
            why = f"no {MANIFEST}, so the adapter is incomplete; run `nightschool night`, or {GONE}"
            raise GateRefused(f"{folder.name}: {why}")
        adapter = Adapter(path=folder, **json.loads(manifest.read_text(encoding="utf-8")))
        if not (folder / WEIGHTS).exists():
            raise GateRefused(f"{folder.name}: its weights are gone; run `nightschool night` to train anew, or {GONE}")
        found, config = (files_id([folder / name]) if (folder / name).exists() else "missing" for name in FILES)
    except (ValueError, TypeError) as error:  # not UTF-8, not JSON, or not these fields
        raise GateRefused(f"{folder.name}: {MANIFEST} is damaged: {error}; run `nightschool audit verify`") from error
    except OSError as error:
        raise GateRefused(f"{folder.name} cannot be read: {error}; who runs the night may be another user") from error
    if found != adapter.id:
        raise GateRefused(
            f"{folder.name}: its weights are {found}, the manifest says {adapter.id}; run `nightschool audit verify`"
        )
    if config != adapter.details.get(CONFIG_ID, config):
        raise GateRefused(
            f"{folder.name}: its {CONFIG} is not what was sealed; put it back from a backup, or run `nightschool night`"
            " to train anew"
        )
    return adapter


def manifest_of(folder: Path) -> Adapter | None:
    """The adapter that the manifest in `folder` names, whatever its weights are; None without one that can be read."""
    try:
        return Adapter(path=folder, **json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def intact(folder: Path) -> bool:
    """Whether `folder` holds an adapter whose weights and config are what its manifest says."""
    return refusal(folder) is None


def refusal(folder: Path) -> str | None:
    """Why `read_adapter` refuses that folder; None if it does not."""
    try:
        read_adapter(folder)
    except GateRefused as error:
        return str(error)
    return None


def is_held(adapter: Adapter) -> bool:
    """Whether its weights are on the disk; what is tainted or pruned has none."""
    return (adapter.path / WEIGHTS).exists()


def weights_to_account_for(adapter: Adapter, tainted: Container[str]) -> bool:
    """Whether its weights are on disk, or are missing without a taint or a `pruned` mark that explains it."""
    return is_held(adapter) or not (adapter.id in tainted or (adapter.path / PRUNED).exists())


def ensure_loaded(engine: Engine, adapter: Adapter, tolerance: float) -> None:
    """Load `adapter` into `engine` unless it is there.

    GateRefused when it is damaged or made for another base; ServingError when the engine does not answer with it as its
    trainer did, to `tolerance` nats per token.
    """
    with _GUARD:
        alone = _LOADING.setdefault(engine, Lock())
    with alone:
        if adapter.id not in engine.adapters():
            _load(engine, adapter, tolerance)


def require_itself(adapter: Adapter) -> None:
    """GateRefused unless its folder is whole and holds this one."""
    if (found := read_adapter(adapter.path)).id != adapter.id:
        raise GateRefused(
            f"{adapter.path} holds {found.id} instead of adapter {adapter.id}; put it back from a backup, or run"
            " `nightschool night` again"
        )


def _load(engine: Engine, adapter: Adapter, tolerance: float) -> None:
    if adapter.base_id != engine.base_id:
        raise GateRefused(of_another_base(adapter.id, adapter.base_id, engine.base_id))
    require_itself(adapter)
    engine.load(adapter.id, adapter.path)
    recorded = adapter.details.get("parity")  # an adapter that was not trained here has none
    try:
        if recorded:
            parity.check(engine, adapter.id, recorded, tolerance)
    except BaseException:
        engine.unload(adapter.id)
        raise


def erase(weights: Path) -> bool:
    """Whether they are gone; what cannot be erased is told in the log."""
    try:
        weights.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s could not be erased: %s; delete it", weights, error.strerror)
        return False
    return True
