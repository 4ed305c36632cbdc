"""One night at a time in a home, and in a database that several homes share: a crash releases both locks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import NightschoolError
from ..memory.database import Database

NIGHT_LOCK = 5_177_014  # any number, the same in every process
WAIT_S = 2.0  # whoever asks whether a night runs holds each lock for a moment


class NightRunning(NightschoolError):
    """Another process is running a night in this home."""


@contextmanager
def night_lock(home: Path, database: Database) -> Iterator[Callable[[], None]]:
    """Alone in `home` and in `database`; NightRunning otherwise. What it gives raises it where that was lost since."""
    lock = FileLock(home / "night.lock", timeout=WAIT_S)
    try:
        lock.acquire()
    except Timeout:
        raise NightRunning(f"another night is running in {home}; wait for it, or stop that process") from None
    try:
        with database.alone(NIGHT_LOCK, WAIT_S) as alone:
            if not alone():
                raise NightRunning(f"another home runs a night in {database.url}; wait for it, or stop that process")
            yield lambda: _require(alone, database)
    finally:
        lock.release()


def _require(alone: Callable[[], bool], database: Database) -> None:
    if not alone():
        raise NightRunning(
            f"the lock of this night in {database.url} was lost with its connection, so another may have begun;"
            " run `nightschool night` again"
        )
