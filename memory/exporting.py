"""The store as lines of JSON that any tool can read, see docs/export.md.

The invariant: an export is one moment of the store, and appears under its name only when it is whole.
"""

from __future__ import annotations

from pathlib import Path

EXPORTS = "exports"  # the folder in the home whose files are ours to erase


def exports_in(home: Path) -> tuple[str, ...]:
    """The exports that we wrote into the home, and what a crash left of one, by path from the home."""
    return tuple(sorted(str(p.relative_to(home)) for p in (home / EXPORTS).glob("*") if p.is_file()))
