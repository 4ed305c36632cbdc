"""What the benches share: their parts in processes of their own, what is kept of those, and whence a figure is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("nightschool", "torch", "transformers", "trl", "peft", "lancedb", "sentence-transformers")


def circumstances(parts: Iterable[dict[str, Any]] = ()) -> dict[str, Any]:
    """When, with what and on what base these figures came about; `parts` may be of other commits than this one."""
    from nightschool.serving.base import base_id

    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": ", ".join(sorted({part["commit"] for part in parts})) or commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "base": base_id("seedling"),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
    }


def commit() -> str:
    """Of the code that runs, with `-dirty` where it was changed since; empty where it is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def state(**changed: Any) -> str:
    """Names the base, the recipe, our defaults and what was `changed` of them: others' work is not taken for one's own.

    The rest of the code is not in it; each part that is kept says of which commit it is.
    """
    from nightschool.evolve.types import RECIPE
    from nightschool.serving.base import base_id
    from nightschool.settings import Settings

    held = [
        base_id("seedling"),
        RECIPE,
        Settings(home=Path()).to_json(),
        {name: asdict(value) for name, value in changed.items()},
    ]
    return sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:8]


def child(script: str, words: Sequence[str]) -> dict[str, Any]:
    """What `script` prints last, run in a process of its own with one thread."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **quiet, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *words], stdout=subprocess.PIPE, text=True, env=env, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def part(script: str, words: Sequence[str], kept: Path | None) -> dict[str, Any]:
    """As `child`; what was found is kept in the file `kept`, and a part whose file is there is not run again."""
    if kept and kept.exists():
        return dict(json.loads(kept.read_text()))
    found = child(script, words) | {"commit": commit()}
    if kept:
        write_whole(kept, found)
    return found


def write_whole(path: Path, found: Any) -> None:
    """What is cut off in the middle is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(found) + "\n")
    whole.replace(path)


def bring_in(store: Any, folder: Path, conversations: Sequence[dict[str, Any]], now: float) -> Any:
    """Import all of them through a file in `folder`, or end."""
    from nightschool.memory.importer import import_files

    lines = folder / "in.jsonl"
    lines.write_text("".join(json.dumps(c) + "\n" for c in conversations), encoding="utf-8")
    report = import_files(store, [lines], now=now)
    if report.errors:
        sys.exit(f"{report.errors[0]}: the data was not read whole")
    return report
