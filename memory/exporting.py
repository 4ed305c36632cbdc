"""The store as lines of JSON that any tool can read, see docs/export.md.

The invariant: an export is one moment of the store, and appears under its name only when it is whole. What is derived
(the index, the memories of turns, centroids of topics) is left out, and so is what was learnt: snapshots and adapters.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..errors import InputError, StoreError
from .reading import PLACE
from .rows import ROWS_A_PAGE
from .tables import FeedbackRow, InteractionRow, MemoryRow, TombstoneRow, TopicRow
from .tombstones import salt_of

EXPORTS = "exports"  # the folder in the home whose files are ours to erase
VERSION = 1
ABANDONED_S = 3600.0  # since the last word was written
HEAD = b'{"type": "nightschool"'  # how an export begins
INTERACTION = ("id", "user_id", "agent_id", "session_id", "position", "turn", "reply")
ANSWERED = ("adapter_id", "memory_ids", "topic_id", "created_utc")
FEEDBACK = ("id", "interaction_id", "rating", "correction", "comment", "event", "created_utc")
NOTE = ("id", "user_id", "agent_id", "session_id", "text", "source_ids", "shared", "created_utc", "valid_to")


def exports_in(home: Path) -> tuple[str, ...]:
    """All files and links under the home's folder for exports, also what a crash left, by path from the home."""

    def refuse(error: OSError) -> None:
        raise StoreError(f"{home / EXPORTS}: the exports in it cannot be listed: {error.strerror}") from error

    folder = home / EXPORTS
    walked = os.walk(folder, onerror=refuse) if folder.exists() else ()
    found = (Path(where) / name for where, folders, files in walked for name in (*folders, *files))
    return tuple(sorted(str(path.relative_to(home)) for path in found if path.is_symlink() or not path.is_dir()))


def write_export(session: Session, path: Path, now: float) -> Counter[str]:
    """Write the whole store to `path`, readable by its owner only, and say how many lines of each type it has."""
    try:
        return _written(session, path, now)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from error


def _written(session: Session, path: Path, now: float) -> Counter[str]:
    _require_ours(path)
    written: Counter[str] = Counter()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_abandoned(path)
    # a name of its own, as two may write to one path; readable by its owner alone
    handle, name = mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        with open(handle, "w", encoding="ascii") as file:
            for kind, values in _records(session, now):
                file.write(json.dumps({"type": kind, **values}, allow_nan=False) + "\n")
                written[kind] += 1
            file.write(json.dumps({"type": "end", "lines": written.total() + 1}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except FileNotFoundError:
        raise StoreError(f"{path}: something was forgotten meanwhile, and the export with it; export again") from None
    except BaseException:
        partial.unlink(missing_ok=True)  # `forget` does not reach it
        raise
    return written


def _remove_abandoned(path: Path) -> None:
    """What exports to `path` left that were killed: all that was said may be in it."""
    ours = re.compile(re.escape(path.name) + r"\.[a-z0-9_]{8}\.partial")
    for left in path.parent.iterdir():
        with suppress(OSError):  # another came before, or it is not ours to remove
            old = time.time() - left.lstat().st_mtime > ABANDONED_S
            if old and ours.fullmatch(left.name):
                left.unlink()


def _require_ours(path: Path) -> None:
    """What stands there is replaced only if it is an export."""
    if not path.exists() and not path.is_symlink():
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            if file.read(len(HEAD)) == HEAD:
                return
    raise InputError(f"{path} is there and is no export; it was left as it is, so give another name")


def _records(session: Session, now: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every fact, in an order in which nothing refers to what comes later."""
    yield "nightschool", {"version": VERSION, "created_utc": now, "salt": salt_of(session)}
    by_id = TopicRow.created_utc, TopicRow.id
    for topic in session.scalars(select(TopicRow).order_by(*by_id).execution_options(yield_per=ROWS_A_PAGE)):
        yield "topic", {"id": topic.id, "label": topic.label, "created_utc": topic.created_utc}
    for kind, row, names, order in (
        ("interaction", InteractionRow, (*INTERACTION, *ANSWERED), PLACE),
        ("feedback", FeedbackRow, FEEDBACK, (FeedbackRow.created_utc, FeedbackRow.id)),
    ):
        for found in session.scalars(select(row).order_by(*order).execution_options(yield_per=ROWS_A_PAGE)):
            yield kind, {name: getattr(found, name) for name in names}
    notes = select(MemoryRow).where(MemoryRow.kind == "note").order_by(MemoryRow.created_utc, MemoryRow.id)
    for note in session.scalars(notes.execution_options(yield_per=ROWS_A_PAGE)):
        yield "note", {name: getattr(note, name) for name in NOTE}
    for key in session.scalars(select(TombstoneRow.key).order_by(TombstoneRow.key)):
        yield "tombstone", {"key": key}
