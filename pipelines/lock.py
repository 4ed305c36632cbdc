"""One night at a time in a home, enforced by the operating system: a crash releases the lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import NightschoolError


class NightRunning(NightschoolError):
    """Another process is running a night in this home."""


@contextmanager
def night_lock(home: Path) -> Iterator[None]:
    lock = FileLock(home / "night.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise NightRunning(f"another night is running in {home}; wait for it, or stop that process") from None
    try:
        yield
    finally:
        lock.release()
