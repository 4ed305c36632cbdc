"""The bytes on the disk: what was forgotten goes for good, and what is merely gone gives its space back.

The invariant: a receipt stays unfinished until every byte is gone, so whatever stopped the erasing (a crash, a reader
of the log, a file that may not be deleted) is taken up at the next opening. Not covered: copies that a file system, an
object store or a backup keeps beneath the files that we can name, see docs/object-storage.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_ISREG

from ..errors import StoreError
from .database import Database
from .exporting import exports_in
from .forgetting import finish, unfinished
from .indexing import Indexing
from .reader import readers_in

DELETED = "the rows are deleted"
AGAIN = "open the store again, which takes it up where it stopped"


def erase_bytes(home: Path, database: Database, indexing: Indexing, now: float) -> None:
    """After the rows: the index, our exports, the readers fitted on them, and what the files still hold."""
    with database.reading() as session:
        receipts = unfinished(session)
    if not receipts:
        return
    try:
        indexing.erase()
        kept = _undeleted(readers_in(home))
        while not kept and (names := exports_in(home)):  # one may just have got its name
            kept = _undeleted([home / name for name in names])
        database.erase()
    except StoreError as error:
        said = str(error)
        raise StoreError(said if DELETED in said else f"{DELETED}, but not yet their bytes: {said}; {AGAIN}") from error
    if kept:
        raise StoreError(
            f"{DELETED}, but these files may hold them and cannot be deleted: {', '.join(kept)};"
            f" make them deletable and {AGAIN}"
        )
    with database.writing() as session:
        finish(session, receipts, now)


def compact(home: Path, database: Database, indexing: Indexing) -> tuple[int, int]:
    """Give back the space of what is gone, and make recall quick again: bytes of the home before and after."""
    before = size_of(home)
    indexing.erase()
    database.compact()
    return before, size_of(home)


def _undeleted(paths: list[Path]) -> list[str]:
    """Delete them, and say which could not be deleted and why."""
    kept: list[str] = []
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            kept.append(f"{path} ({error.strerror})")
    return kept


def size_of(path: Path) -> int:
    """Bytes of the file, or of all files in the folder, but for those that go meanwhile."""
    names = [path, *(Path(where) / name for where, _, files in os.walk(path) for name in files)]
    return sum(map(_bytes_of, names))


def _bytes_of(path: Path) -> int:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0
    return found.st_size if S_ISREG(found.st_mode) else 0
