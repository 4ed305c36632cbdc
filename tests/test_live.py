"""The live adapter, followed while threads answer with it; the registry and its files are real."""

import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import pytest
from nightschool.errors import ServingError
from nightschool.evolve import live as following
from nightschool.evolve.live import Live, unloading_afterwards
from nightschool.evolve.registry import Registry
from nightschool.evolve.sealing import seal
from nightschool.evolve.types import Adapter, Judged, Snapshot, Verdict
from nightschool.memory.store import MemoryStore
from nightschool.serving.engine import WEIGHTS


class StrictEngine:
    """Knows what is loaded, refuses what is not, and takes `pause` seconds to load."""

    base_id = "base"

    def __init__(self, pause: float = 0.0) -> None:
        self.loaded: set[str] = set()
        self.lock, self.pause = Lock(), pause
        self.broken = False
        self.discarded: list[str] | None = None
        self.loading = Event()

    def adapters(self) -> list[str]:
        with self.lock:
            return list(self.loaded)

    def load(self, adapter_id: str, path: Path) -> None:
        if self.broken:
            raise ServingError("the server is down")
        self.loading.set()
        time.sleep(self.pause)
        with self.lock:
            self.loaded.add(adapter_id)

    def discard(self, adapter_ids: Collection[str]) -> None:
        if self.broken:
            raise ServingError("the server is down")
        self.discarded = sorted(adapter_ids)

    def unload(self, adapter_id: str) -> None:
        with self.lock:
            self.loaded.remove(adapter_id)

    def answer(self, adapter_id: str | None) -> None:
        with self.lock:
            if adapter_id is not None and adapter_id not in self.loaded:
                raise ServingError(f"adapter {adapter_id} is not loaded")


@pytest.fixture
def registry(quick_store: MemoryStore) -> Iterator[Registry]:
    yield Registry.of(quick_store)


def accepted(registry: Registry, weights: bytes, interaction_id: str = "b2:1") -> Adapter:
    snapshot = Snapshot((), (), (), (Judged((), "x", True, "ada", (interaction_id,)),))
    registry.add_snapshot(snapshot, [])
    folder = registry.building()
    (folder / WEIGHTS).write_bytes(weights)
    made = {"base_id": "base", "snapshot_id": snapshot.id, "phase": "sft", "parent_id": None}
    adapter = seal(folder, created_utc=0.0, details={}, **made)  # type: ignore[arg-type]
    registry.add(adapter)
    registry.add_verdict(Verdict(adapter.id, None, snapshot.id, True, (), ("better",)))
    return adapter


def test_no_answer_meets_an_adapter_that_was_unloaded_while_the_alias_moves(registry: Registry) -> None:
    made = [accepted(registry, bytes([i])) for i in range(3)]
    engine = StrictEngine(pause=0.002)
    live = Live(registry, engine, 0.1)
    registry.promote(made[0].id)
    stop = Event()

    def ask() -> int:
        count = 0
        while not stop.is_set():
            with live.hold() as adapter_id:
                for _ in range(3):
                    engine.answer(adapter_id)
                    time.sleep(0.0005)
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask) for _ in range(6)]
        for move in range(30):
            registry.promote(made[(move + 1) % 3].id)
            time.sleep(0.01)
        stop.set()
        assert sum(future.result() for future in asked) > 30
    with live.hold() as adapter_id:
        assert adapter_id == made[0].id
    assert engine.loaded == {made[0].id}


def test_requests_go_on_with_the_one_before_while_another_loads(registry: Registry) -> None:
    one, two = accepted(registry, b"one"), accepted(registry, b"two")
    registry.promote(one.id)
    engine = StrictEngine()
    live = Live(registry, engine, 0.1)
    with live.hold() as adapter_id:
        assert adapter_id == one.id
    engine.pause = 0.5
    engine.loading.clear()
    registry.promote(two.id)

    def first() -> str | None:
        with live.hold() as adapter_id:
            return adapter_id

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(first)
        assert engine.loading.wait(5)
        with live.hold() as adapter_id:
            assert adapter_id == one.id and not loading.done()
        assert loading.result() == two.id


def test_base_goes_on_answering_while_the_first_adapter_loads(registry: Registry) -> None:
    one, engine = accepted(registry, b"one"), StrictEngine(pause=0.5)
    live = Live(registry, engine, 0.1)
    with live.hold() as adapter_id:
        assert adapter_id is None
    registry.promote(one.id)

    def first() -> str | None:
        with live.hold() as adapter_id:
            return adapter_id

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(first)
        assert engine.loading.wait(5)
        with live.hold() as adapter_id:
            assert adapter_id is None and not loading.done()
        assert loading.result() == one.id


def test_adapter_that_is_refused_leaves_the_one_before_and_is_tried_again_later(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = accepted(registry, b"one"), accepted(registry, b"two")
    registry.promote(one.id)
    engine = StrictEngine()
    live = Live(registry, engine, 0.1)
    with live.hold():
        pass
    engine.broken = True
    registry.promote(two.id)
    for _ in range(3):
        with live.hold() as adapter_id:
            assert adapter_id == one.id
    assert caplog.text.count("the server is down") == 1 and f"{one.id} answers" in caplog.text
    engine.broken = False
    now = time.monotonic() + following.RETRY_S + 1
    monkeypatch.setattr(following.time, "monotonic", lambda: now)
    with live.hold() as adapter_id:
        assert adapter_id == two.id
    assert engine.loaded == {two.id}


def test_tainted_adapter_does_not_stay_because_the_next_is_refused(registry: Registry) -> None:
    one, two = accepted(registry, b"one"), accepted(registry, b"two")
    engine = StrictEngine()
    live = Live(registry, engine, 0.1)
    registry.promote(one.id)
    registry.promote(two.id)
    with live.hold() as adapter_id:
        assert adapter_id == two.id
    (one.path / WEIGHTS).write_bytes(b"damaged")
    registry.taint(two.id, "forgotten")
    registry.withdraw_tainted()
    for _ in range(2):
        with live.hold() as adapter_id:
            assert adapter_id is None
    assert engine.loaded == set()


def test_nobody_is_answered_by_a_tainted_adapter_while_its_predecessor_loads(registry: Registry) -> None:
    one, two = accepted(registry, b"one"), accepted(registry, b"two")
    registry.promote(one.id)
    registry.promote(two.id)
    engine = StrictEngine()
    live = Live(registry, engine, 0.1)
    with live.hold() as adapter_id:
        assert adapter_id == two.id
    engine.pause = 0.3
    registry.taint(two.id, "forgotten")
    registry.withdraw_tainted()

    def first() -> str | None:
        with live.hold() as adapter_id:
            return adapter_id

    with ThreadPoolExecutor(4) as pool:
        assert {future.result() for future in [pool.submit(first) for _ in range(4)]} == {one.id}


def test_unload_that_fails_ends_neither_an_answer_nor_a_night(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = accepted(registry, b"one"), accepted(registry, b"two")
    engine = StrictEngine()

    def fail(adapter_id: str) -> None:
        raise ServingError("the server is down")

    engine.unload = fail  # type: ignore[method-assign]
    live = Live(registry, engine, 0.1)
    for adapter in (one, two):
        registry.promote(adapter.id)
        with live.hold() as adapter_id:
            assert adapter_id == adapter.id
    with unloading_afterwards(engine, registry):
        engine.load("b2:another", one.path)
    assert caplog.text.count("could not be unloaded") == 2


def test_adapter_that_somebody_else_unloaded_is_loaded_again(registry: Registry) -> None:
    one = accepted(registry, b"one")
    registry.promote(one.id)
    engine = StrictEngine()
    live = Live(registry, engine, 0.1)
    for _ in range(2):
        with live.hold() as adapter_id:
            engine.answer(adapter_id)
        engine.unload(one.id)


def test_what_is_loaded_for_now_leaves_but_for_the_live_one(registry: Registry) -> None:
    kept, passing, serving = (accepted(registry, weights) for weights in (b"one", b"two", b"three"))
    engine = StrictEngine()
    engine.load(kept.id, kept.path)
    with pytest.raises(ServingError), unloading_afterwards(engine, registry):
        for adapter in (passing, serving):
            engine.load(adapter.id, adapter.path)
        registry.promote(serving.id)
        raise ServingError("on the way")
    assert engine.loaded == {kept.id, serving.id}


def test_adapter_that_may_not_be_read_or_does_not_fit_leaves_what_served(registry: Registry) -> None:
    engine = StrictEngine()
    live = Live(registry, engine, 0.1)
    first = registry.promote(accepted(registry, b"one").id)
    with live.hold() as held:
        assert held == first.id
    second = registry.promote(accepted(registry, b"two").id)
    weights = registry.folder / second.path.name / WEIGHTS
    weights.unlink()
    weights.mkdir()  # whatever reads it meets an OSError
    with live.hold() as held:
        assert held == first.id
    third = registry.promote(accepted(registry, b"three").id)

    def full(adapter_id: str, path: Path) -> None:
        raise RuntimeError("CUDA out of memory")

    engine.load = full  # type: ignore[method-assign]
    with live.hold() as held:
        assert held == first.id != third.id


def test_a_new_process_that_finds_the_live_adapter_refused_answers_with_the_one_before(registry: Registry) -> None:
    one, two = accepted(registry, b"one"), accepted(registry, b"two")
    registry.promote(one.id)
    registry.promote(two.id)
    (two.path / WEIGHTS).write_bytes(b"damaged")
    engine = StrictEngine()
    with Live(registry, engine, 0.1).hold() as adapter_id:
        assert adapter_id == one.id
    (one.path / WEIGHTS).write_bytes(b"damaged")
    with Live(registry, StrictEngine(), 0.1).hold() as adapter_id:
        assert adapter_id is None


def test_the_first_reply_of_a_process_discards_what_was_withdrawn_meanwhile(registry: Registry) -> None:
    made, other = accepted(registry, b"one"), accepted(registry, b"two")
    registry.taint(made.id, "a turn was forgotten")
    engine = StrictEngine()
    for _ in range(2):
        engine.discarded = None
        with Live(registry, engine, 0.1).hold() as held:
            assert (held, engine.discarded) == (None, [made.id])
        registry.promote(other.id)
        engine.broken = True  # whoever answers does not fail by it
        with Live(registry, engine, 0.1).hold() as held:
            assert held is None
        registry.rollback()
        engine.broken = False
