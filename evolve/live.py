"""The live adapter in an engine, followed as the alias moves.

The invariant: a request ends on the adapter that it was given, and waits for no other's load. What serves no more
leaves the engine when its last request has ended; an adapter that is refused leaves in service what served before it,
unless that is tainted, also where it is a new process that finds it refused.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from ..errors import GateRefused, ServingError
from ..serving.engine import Engine
from .registry import Registry
from .sealing import ensure_loaded
from .types import Adapter

log = logging.getLogger("nightschool")
RETRY_S = 60.0  # until an adapter that was refused is tried again: a server may have been down


@contextmanager
def unloading_afterwards(engine: Engine, registry: Registry) -> Iterator[None]:
    """What is loaded inside leaves the engine at the end, but for the live adapter."""
    before = set(engine.adapters())
    try:
        yield
    finally:
        live = registry.live()
        for adapter_id in set(engine.adapters()) - before - {live.id if live else ""}:
            _unload(engine, adapter_id)


def _unload(engine: Engine, adapter_id: str) -> None:
    """What was answered or decided is not lost if it fails."""
    try:
        if adapter_id in engine.adapters():
            engine.unload(adapter_id)
    except ServingError as error:
        log.warning("adapter %s could not be unloaded: %s", adapter_id, error)


class Live:
    """Threads may share one; it loads into `engine` and unloads only what it loaded or found serving."""

    def __init__(self, registry: Registry, engine: Engine, tolerance: float) -> None:
        self._registry, self._engine, self._tolerance = registry, engine, tolerance
        self._changing = Lock()  # one request loads or unloads, and the others go on
        self._counting = Lock()
        self._held: Counter[str | None] = Counter()
        self._served: str | None = None
        self._followed = False
        self._refused: tuple[str, float] = ("", 0.0)  # which, and until when it is not tried again

    @contextmanager
    def hold(self) -> Iterator[str | None]:
        """The id of the adapter to answer with, loaded until the context ends; None is the base."""
        self._follow()
        with self._counting:
            held = self._served
            self._held[held] += 1
        try:
            yield held
        finally:
            with self._counting:
                self._held[held] -= 1
            self._drop_unused()

    def _follow(self) -> None:
        """Serve what the alias names. One request loads it; others wait for that only if nothing else may serve."""
        if self._settled(self._registry.live()) or not self._changing.acquire(blocking=not self._may_stay()):
            return
        try:
            adapter = self._registry.live()  # as it is now, so that the alias never goes back
            if not self._settled(adapter):
                self._serve(self._loaded(adapter) if adapter else None)
                if not self._followed:
                    self._discard_tainted()
                self._followed = True
        finally:
            self._changing.release()

    def _discard_tainted(self) -> None:
        """What another process served, or a killed night judged, and was forgotten from since."""
        try:
            self._engine.discard(self._registry.tainted())
        except ServingError as error:
            log.warning("what was withdrawn may still be loaded: %s", error)

    def _settled(self, adapter: Adapter | None) -> bool:
        if adapter is None:
            return self._followed and self._served is None
        if adapter.id == self._served:
            return adapter.id in self._engine.adapters()
        refused, until = self._refused
        return adapter.id == refused and time.monotonic() < until and self._may_stay()

    def _loaded(self, adapter: Adapter) -> str | None:
        """Its id, or what goes on serving because it is refused."""
        try:
            ensure_loaded(self._engine, adapter, self._tolerance)
            return adapter.id
        except (GateRefused, ServingError, RuntimeError) as error:  # the last where a card is full
            self._refused = adapter.id, time.monotonic() + RETRY_S
            stays = self._served if self._may_stay() else self._earlier(adapter)
            log.warning("%s answers, since the live adapter is refused: %s", stays or "the base", error)
            return stays

    def _earlier(self, adapter: Adapter) -> str | None:
        """What served last before it and can be loaded; None is the base."""
        for found in self._registry.predecessors(adapter.id):
            try:
                ensure_loaded(self._engine, found, self._tolerance)
                return found.id
            except (GateRefused, ServingError, RuntimeError) as error:
                log.warning("%s, which served before, is refused as well: %s", found.id, error)
        return None

    def _may_stay(self) -> bool:
        """Whether what serves may go on serving."""
        served = self._served
        if served is None:
            return self._followed
        return served in self._engine.adapters() and served not in self._registry.tainted()

    def _serve(self, adapter_id: str | None) -> None:
        with self._counting:
            self._held[adapter_id] += 0
            self._served = adapter_id

    def _drop_unused(self) -> None:
        """Unload what neither serves nor answers; whoever comes while another changes something leaves it to later."""
        with self._counting:
            if not self._unused():
                return
        if not self._changing.acquire(blocking=False):
            return
        try:
            with self._counting:
                gone = self._unused()
                for adapter_id in gone:
                    del self._held[adapter_id]
            for adapter_id in gone:
                _unload(self._engine, adapter_id)
        finally:
            self._changing.release()

    def _unused(self) -> list[str]:
        return [i for i, count in self._held.items() if i is not None and not count and i != self._served]
