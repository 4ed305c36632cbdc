"""The registry over a real database, with folders that hold made-up weights."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event

import pytest
from nightschool.errors import GateRefused, NotFound, ServingError
from nightschool.evolve.registry import AliasMoved, Registry
from nightschool.evolve.sealing import ensure_loaded, intact, is_held, read_adapter, seal
from nightschool.evolve.types import Adapter, Excluded, Judged, Snapshot, Verdict
from nightschool.memory.database import Database
from nightschool.memory.tables import ReceiptRow
from nightschool.serving.engine import CONFIG, MANIFEST, WEIGHTS, Score
from sqlalchemy import select


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    ticks = count(1)
    found = Registry(database, tmp_path / "adapters", lambda: float(next(ticks)))
    found.add_snapshot(SNAPSHOT, [{"part": "held_out"}])
    yield found
    database.close()


SNAPSHOT = Snapshot((), (), (), (Judged((), "an answer", True, "ada", ("b2:1",)),))
WIDER = Snapshot((), (), (), (Judged((), "an answer", True, "ada", ("b2:1", "b2:reaction")),))


def trained(registry: Registry, weights: bytes, parent_id: str | None = None, snapshot: Snapshot = SNAPSHOT) -> Adapter:
    folder = registry.building()
    (folder / WEIGHTS).write_bytes(weights)
    facts = {"base_id": "base", "snapshot_id": snapshot.id, "parent_id": parent_id, "details": {"night": {}}}
    adapter = seal(folder, phase="sft", created_utc=registry.clock(), **facts)
    registry.add(adapter)
    return adapter


def judged(registry: Registry, adapter: Adapter, accepted: bool = True) -> Adapter:
    registry.add_verdict(Verdict(adapter.id, None, SNAPSHOT.id, accepted, (), ("because",)))
    return adapter


def promoted(registry: Registry, weights: bytes) -> Adapter:
    return registry.promote(judged(registry, trained(registry, weights)).id)


def forgotten(registry: Registry, snapshot: Snapshot = SNAPSHOT, created_utc: float = 1.0) -> None:
    """The receipt of something in that snapshot."""
    with registry.database.writing() as session:
        details = {"tainted_snapshots": [snapshot.id]}
        session.add(ReceiptRow(details=details, created_utc=created_utc, finished_utc=None))


def test_adapter_is_named_by_its_weights_and_reads_back(registry: Registry) -> None:
    adapter = trained(registry, b"one")
    assert read_adapter(adapter.path) == adapter == registry.adapter(adapter.id[:12])
    assert trained(registry, b"two").id != adapter.id


def test_snapshot_keeps_the_version_of_the_censor_that_scored_it(registry: Registry) -> None:
    held = Judged((), "another answer", True, "ada", ("b2:2",))
    snapshot = Snapshot((), (), (), (held,), censor="b2:one")
    newer = replace(snapshot, censor="b2:two")
    for made in (snapshot, newer):
        registry.add_snapshot(made, [])
    assert newer.id == snapshot.id
    assert (registry.censor_of(snapshot.id), registry.censor_of(SNAPSHOT.id)) == ("b2:one", "")


def test_sealing_the_same_weights_twice_keeps_the_first(registry: Registry) -> None:
    first, again = trained(registry, b"one"), trained(registry, b"one")
    assert again == first
    assert registry.adapters() == [first]
    assert [p.name for p in registry.folder.iterdir()] == [first.path.name]


def test_what_a_crash_left_is_swept_and_folders_of_others_stay(registry: Registry, tmp_path: Path) -> None:
    adapter = trained(registry, b"one")
    registry.building()
    (registry.folder / "b2-half").mkdir()
    folder = registry.building()
    (folder / WEIGHTS).write_bytes(b"sealed and not recorded")
    facts = {"base_id": "base", "snapshot_id": SNAPSHOT.id, "parent_id": None, "details": {}}
    unknown = seal(folder, phase="sft", created_utc=registry.clock(), **facts)
    (registry.folder / "kept before the move").mkdir()
    (registry.folder / "b2-link").symlink_to(tmp_path)
    assert registry.sweep() == 3 and not unknown.path.exists()
    left = {p.name for p in registry.folder.iterdir()}
    assert left == {adapter.path.name, "kept before the move", "b2-link"}


def test_nothing_whole_is_swept_where_the_database_is_another(registry: Registry, tmp_path: Path) -> None:
    adapter = promoted(registry, b"one")
    database = Database(f"sqlite:///{tmp_path / 'other.db'}")
    assert Registry(database, registry.folder, registry.clock).sweep() == 0
    database.close()
    assert registry.live() == adapter and read_adapter(adapter.path) == adapter


def test_what_was_rolled_back_from_is_not_pruned(registry: Registry) -> None:
    _, two = promoted(registry, b"one"), promoted(registry, b"two")
    judged(registry, trained(registry, b"newest"), accepted=False)
    registry.rollback()
    registry.rollback()
    assert registry.live() is None and registry.prunable(3) == [] and registry.prunable(1) == [two]
    assert registry.promote(two.id) == two


def test_rejected_candidate_never_serves(registry: Registry) -> None:
    adapter = judged(registry, trained(registry, b"one"), accepted=False)
    with pytest.raises(GateRefused, match="rejected: because"):
        registry.promote(adapter.id)
    assert registry.live() is None


def test_unjudged_candidate_never_serves(registry: Registry) -> None:
    with pytest.raises(GateRefused, match="never judged"):
        registry.promote(trained(registry, b"one").id)


def test_damaged_weights_are_refused_and_the_incumbent_stays(registry: Registry) -> None:
    incumbent = promoted(registry, b"one")
    damaged = judged(registry, trained(registry, b"two"))
    (damaged.path / WEIGHTS).write_bytes(b"twi")
    with pytest.raises(GateRefused, match="audit verify"):
        registry.promote(damaged.id)
    assert registry.live() == incumbent


def test_adapter_without_manifest_is_refused(registry: Registry) -> None:
    adapter = judged(registry, trained(registry, b"one"))
    (adapter.path / MANIFEST).unlink()
    with pytest.raises(GateRefused, match="incomplete"):
        registry.promote(adapter.id)


def test_rollback_goes_back_one_step_each_time_and_ends_at_the_base(registry: Registry) -> None:
    one, two, three = (promoted(registry, w) for w in (b"one", b"two", b"three"))
    assert registry.live() == three
    assert [registry.rollback(), registry.rollback(), registry.rollback()] == [two, one, None]
    assert registry.live() is None
    with pytest.raises(GateRefused, match="nothing to roll back"):
        registry.rollback()
    assert [d["reason"].split()[0] for d in registry.deployments()] == ["promoted"] * 3 + ["rolled"] * 3


def test_rollback_passes_over_tainted_adapters(registry: Registry) -> None:
    one, two = promoted(registry, b"one"), promoted(registry, b"two")
    promoted(registry, b"three")
    registry.taint(two.id, "a turn was forgotten")
    assert registry.rollback() == one


@pytest.mark.parametrize("back", [Registry.rollback, Registry.withdraw_tainted])
def test_what_was_rejected_since_or_is_damaged_never_comes_back(
    registry: Registry, back: Callable[[Registry], Adapter | None]
) -> None:
    one, two, three, live = (promoted(registry, w) for w in (b"one", b"two", b"three", b"four"))
    judged(registry, three, accepted=False)
    (two.path / WEIGHTS).write_bytes(b"twi")
    if back is Registry.withdraw_tainted:
        registry.taint(live.id, "a turn was forgotten")
    assert back(registry) == one == registry.live()


def test_base_serves_where_all_that_served_before_was_rejected_since(registry: Registry) -> None:
    one, two = promoted(registry, b"one"), promoted(registry, b"two")
    judged(registry, one, accepted=False)
    registry.taint(two.id, "a turn was forgotten")
    assert registry.withdraw_tainted() is None
    assert registry.deployments()[-1]["adapter_id"] is None


def test_what_served_before_the_base_is_not_gone_back_to(registry: Registry) -> None:
    promoted(registry, b"one")
    registry.rollback()
    promoted(registry, b"two")
    assert registry.rollback() is None


def test_only_weights_that_nothing_needs_are_pruned(registry: Registry) -> None:
    ground = trained(registry, b"ground")
    first = registry.promote(judged(registry, trained(registry, b"first", ground.id)).id)
    second, live = promoted(registry, b"second"), promoted(registry, b"live")
    rejected, newest = (judged(registry, trained(registry, w), accepted=False) for w in (b"rejected", b"newest"))
    assert registry.prunable(2) == [rejected]
    assert registry.prunable(1) == [ground, first, rejected]
    assert registry.prune(1) == [ground.id, first.id, rejected.id] and registry.prunable(1) == []
    assert registry.live() == live and is_held(second) and is_held(newest) and read_adapter(live.path) == live
    assert registry.rollback() == second and registry.rollback() is None  # what is gone is passed over
    with pytest.raises(GateRefused, match="its weights are gone"):
        registry.promote(first.id)


def test_what_was_rejected_since_takes_no_place_of_what_may_still_serve(registry: Registry) -> None:
    _, two, _ = (promoted(registry, w) for w in (b"one", b"two", b"three"))
    judged(registry, two, accepted=False)
    assert registry.prunable(1) == [two]


def test_lost_or_changed_config_is_refused_and_the_same_weights_heal_it(registry: Registry) -> None:
    def made() -> Adapter:
        folder = registry.building()
        (folder / WEIGHTS).write_bytes(b"one")
        (folder / CONFIG).write_text('{"r": 16}')
        facts = {"base_id": "base", "snapshot_id": "b2:s", "phase": "sft", "parent_id": None, "details": {}}
        return seal(folder, created_utc=0.0, **facts)  # type: ignore[arg-type]

    adapter = made()
    for damage in ((adapter.path / CONFIG).unlink, lambda: (adapter.path / CONFIG).write_text('{"r": 8}')):
        damage()
        with pytest.raises(GateRefused, match=CONFIG):
            read_adapter(adapter.path)
        assert read_adapter(made().path) == adapter and (adapter.path / CONFIG).read_text() == '{"r": 16}'


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"id": 1}', b"\xff"])
def test_damaged_manifest_is_refused_by_name(registry: Registry, text: bytes) -> None:
    adapter = trained(registry, b"one")
    (adapter.path / MANIFEST).write_bytes(text)
    with pytest.raises(GateRefused, match="is damaged"):
        read_adapter(adapter.path)
    assert not intact(adapter.path)


def test_tainted_live_adapter_stops_serving_and_its_clean_predecessor_returns(registry: Registry) -> None:
    one, two = promoted(registry, b"one"), promoted(registry, b"two")
    registry.taint(two.id, "a turn was forgotten")
    assert registry.live() == one and len(registry.deployments()) == 2
    assert registry.withdraw_tainted() == one == registry.live()
    assert registry.withdraw_tainted() == one
    with pytest.raises(GateRefused, match="tainted: a turn was forgotten"):
        registry.promote(two.id)


def test_unknown_and_ambiguous_ids_are_named(registry: Registry) -> None:
    trained(registry, b"one"), trained(registry, b"two")
    with pytest.raises(NotFound, match="no adapters have an id that begins with 'b2:zzzzzz'"):
        registry.adapter("b2:zzzzzz")
    with pytest.raises(NotFound, match="'b2:' is too short to name an adapter"):
        registry.adapter("b2:")
    with pytest.raises(NotFound, match="no adapters have an id that begins with '%%%%%%%%%'"):
        registry.adapter("%" * 9)
    with pytest.raises(NotFound, match="'' is too short to name an adapter"):
        registry.promote("")
    with pytest.raises(NotFound, match="no snapshot b2:0"):
        registry.snapshot_rows("b2:0")
    with pytest.raises(NotFound, match="no nights have an id that begins with 'xxxxxxxxx'; see `nightschool report`"):
        registry.cycle("x" * 9)
    night = registry.open_cycle()
    assert registry.cycle(night[:9]).id == night


def test_snapshot_is_kept_once_with_its_sources(registry: Registry) -> None:
    registry.add_snapshot(SNAPSHOT, [{"part": "other"}])
    assert registry.snapshot_rows(SNAPSHOT.id) == [{"part": "held_out"}]
    assert registry.sources(SNAPSHOT.id) == {"b2:1"}
    assert registry.snapshot_ids() == [SNAPSHOT.id]


def test_outcome_of_a_cycle_follows_from_what_exists(registry: Registry) -> None:
    cycle = registry.open_cycle()
    assert registry.cycle(cycle).outcome == "running"
    registry.update_cycle(cycle, finished_utc=9.0)
    assert registry.cycle(cycle).outcome == "nothing to learn"
    adapter = judged(registry, trained(registry, b"one"), accepted=False)
    assert registry.cycle(cycle).outcome == "nothing to learn"  # no verdict of that night
    for accepted, outcome in ((False, "rejected"), (True, "promoted")):
        registry.add_verdict(Verdict(adapter.id, None, SNAPSHOT.id, accepted, (), ("because",)), cycle)
        assert registry.cycle(cycle).outcome == outcome
    registry.update_cycle(cycle, error="boom")
    assert [c.outcome for c in registry.cycles()] == ["failed"]
    registry.promote(adapter.id, cycle)
    assert [c.outcome for c in registry.cycles()] == ["promoted"]


def test_night_that_was_killed_between_its_verdict_and_its_promotion_has_promoted_nothing(registry: Registry) -> None:
    cycle, adapter = registry.open_cycle(), trained(registry, b"one")
    registry.add_verdict(Verdict(adapter.id, None, SNAPSHOT.id, True, (), ("better",)), cycle)
    assert registry.cycle(cycle).outcome == "running"
    registry.close_interrupted()
    assert registry.cycle(cycle).outcome == "failed"


def test_nights_keep_their_order_and_verdicts_where_the_clock_is_set_back(registry: Registry) -> None:
    first, ticks = registry.open_cycle(), count(-100)
    registry.clock = lambda: float(next(ticks))
    adapter = trained(registry, b"one")
    registry.add_verdict(Verdict(adapter.id, None, SNAPSHOT.id, True, (), ("better",)), first)
    registry.promote(adapter.id, first)
    registry.update_cycle(first, finished_utc=registry.clock(), error="died afterwards")
    second = registry.open_cycle()
    assert [(c.id, c.outcome) for c in registry.cycles()] == [(first, "promoted"), (second, "running")]
    verdict = registry.cycle_verdict(registry.cycle(first))
    assert verdict and verdict.reasons == ("better",) and registry.latest_cycle().id == second


def test_a_night_promotes_nothing_over_what_was_put_into_service_since_it_judged(registry: Registry) -> None:
    one, two = promoted(registry, b"one"), judged(registry, trained(registry, b"two"))
    seen = registry.newest_deployment()
    registry.rollback()
    with pytest.raises(AliasMoved, match="put into service meanwhile"):
        registry.promote(two.id, registry.open_cycle(), after=seen)
    assert registry.live() is None and one.id not in {c.candidate_id for c in registry.cycles()}


def test_sealed_weights_that_no_night_recorded_are_erased_with_what_they_learnt_from(registry: Registry) -> None:
    folder = registry.building()
    (folder / WEIGHTS).write_bytes(b"killed")
    facts = {"base_id": "base", "snapshot_id": SNAPSHOT.id, "parent_id": None, "details": {}}
    lost = seal(folder, phase="sft", created_utc=registry.clock(), **facts)
    assert registry.erase_tainted() == [] and is_held(lost)
    forgotten(registry)
    assert registry.erase_tainted() == [lost.id] and not is_held(lost)
    assert registry.erase_tainted() == [] and lost.path.exists()  # a night may be about to record it
    assert registry.sweep() == 1 and not lost.path.exists()


class ListingEngine:
    base_id = "base"

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def adapters(self) -> list[str]:
        return self.loaded

    def load(self, adapter_id: str, path: Path) -> None:
        self.loaded.append(adapter_id)


def test_adapter_is_loaded_once_and_only_on_its_own_base(registry: Registry) -> None:
    adapter, engine = trained(registry, b"one"), ListingEngine()
    ensure_loaded(engine, adapter, 0.1)
    ensure_loaded(engine, adapter, 0.1)
    assert engine.loaded == [adapter.id]
    stranger = ListingEngine()
    stranger.base_id = "another"
    with pytest.raises(GateRefused, match="trained on base base, but another is serving"):
        ensure_loaded(stranger, adapter, 0.1)


class FailingEngine(ListingEngine):
    """Lists what it loads at once, and cannot score with it; `asked` is set when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on = Event(), Event()

    def discard(self, adapter_ids: Collection[str]) -> None:
        pass

    def unload(self, adapter_id: str) -> None:
        self.loaded.remove(adapter_id)

    def score(self, *_: object, **__: object) -> list[Score]:
        self.asked.set()
        assert self.go_on.wait(10)
        raise ServingError("no card")


def test_whoever_comes_while_an_adapter_is_checked_does_not_take_it_as_loaded(registry: Registry) -> None:
    figures = {"parity": {"base": [-1.0, -1.0, -1.0], "adapter": [-2.0, -2.0, -2.0]}}
    adapter, engine = replace(trained(registry, b"one"), details=figures), FailingEngine()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ensure_loaded, engine, adapter, 0.1)
        assert engine.asked.wait(10)
        second = pool.submit(ensure_loaded, engine, adapter, 0.1)
        assert wait([second], 0.2).not_done == {second}
        engine.go_on.set()
        for call in (first, second):
            with pytest.raises(ServingError, match="no card"):
                call.result()
    assert not engine.loaded


def test_adapter_trained_on_what_was_forgotten_meanwhile_is_tainted_and_never_serves(registry: Registry) -> None:
    forgotten(registry)
    adapter = judged(registry, trained(registry, b"late"))
    assert "forgotten while it was trained on" in registry.tainted()[adapter.id]
    with pytest.raises(GateRefused, match="tainted"):
        registry.promote(adapter.id)


def test_what_was_forgotten_before_the_night_and_said_again_taints_nothing(registry: Registry) -> None:
    forgotten(registry)
    registry.open_cycle()
    assert trained(registry, b"again").id not in registry.tainted()


def test_what_is_forgotten_during_the_night_taints_whatever_the_clock_of_who_forgot_it_says(registry: Registry) -> None:
    registry.open_cycle()
    forgotten(registry, created_utc=-60.0)
    assert trained(registry, b"late").id in registry.tainted()


def test_weights_made_again_of_the_same_snapshot_after_something_in_it_was_forgotten_are_clean(
    registry: Registry,
) -> None:
    adapter = promoted(registry, b"one")
    registry.taint(adapter.id, "a note was forgotten that none of its prompts held")
    registry.open_cycle()
    assert trained(registry, b"one").id == adapter.id and registry.tainted() == {}
    assert registry.promote(adapter.id) == registry.live()


@pytest.mark.parametrize("back", [Registry.rollback, Registry.withdraw_tainted])
def test_what_is_promoted_while_another_is_taken_back_stays_in_service(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, back: Callable[[Registry], Adapter | None]
) -> None:
    promoted(registry, b"one")
    two = promoted(registry, b"two")
    three = judged(registry, trained(registry, b"three"))
    if back is Registry.withdraw_tainted:
        registry.taint(two.id, "a turn was forgotten")
    look = Registry.predecessor

    def promoted_then(self: Registry, adapter_id: str) -> Adapter | None:
        monkeypatch.setattr(Registry, "predecessor", look)
        registry.promote(three.id)
        return look(self, adapter_id)

    monkeypatch.setattr(Registry, "predecessor", promoted_then)
    if back is Registry.rollback:
        with pytest.raises(GateRefused, match="another adapter was put into service meanwhile"):
            back(registry)
    else:
        assert back(registry) == three
    assert registry.live() == three and registry.deployments()[-1]["reason"] == "promoted"


def test_adapter_that_is_tainted_while_it_is_promoted_never_serves(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = judged(registry, trained(registry, b"one"))
    require = Registry._require_servable

    def forgotten_then(self: Registry, found: Adapter) -> None:
        require(self, found)
        self.taint(found.id, "a turn was forgotten")

    monkeypatch.setattr(Registry, "_require_servable", forgotten_then)
    with pytest.raises(GateRefused, match="tainted: a turn was forgotten"):
        registry.promote(adapter.id)
    assert registry.deployments() == []


def test_what_is_left_out_is_that_of_the_latest_reading(registry: Registry) -> None:
    for reason in ("one", "other"):
        registry.add_snapshot(replace(SNAPSHOT, excluded=(Excluded(reason, ("b2:9",)),)), [])
    assert registry.excluded(SNAPSHOT.id) == (Excluded("other", ("b2:9",)),)


def test_ratings_that_a_reader_was_fitted_on_are_sources(registry: Registry) -> None:
    registry.add_snapshot(replace(SNAPSHOT, reader_ids=("b2:rated",)), [])
    assert registry.sources(SNAPSHOT.id) == {"b2:1", "b2:rated"} and registry.reader_ids(SNAPSHOT.id) == {"b2:rated"}
    assert registry.new_sources(SNAPSHOT.id, []) == 2 and registry.new_sources(SNAPSHOT.id, [SNAPSHOT.id]) == 0


def test_the_same_weights_from_what_is_left_after_forgetting_are_clean(registry: Registry) -> None:
    tainted = promoted(registry, b"one")
    registry.taint(tainted.id, "forgotten")
    assert registry.live() is None
    left = Snapshot((), (), (), (Judged((), "another answer", True, "ada", ("b2:2",)),))
    registry.add_snapshot(left, [])
    again = trained(registry, b"one", snapshot=left)
    assert again.id == tainted.id and registry.tainted() == {}
    assert read_adapter(again.path) == again == registry.adapter(again.id)
    assert registry.promote(judged(registry, again).id).snapshot_id == left.id


def test_clean_weights_take_the_origin_that_names_all_their_sources_and_more(registry: Registry) -> None:
    live = promoted(registry, b"one")
    registry.add_snapshot(WIDER, [])
    trained(registry, b"one", snapshot=WIDER)
    found = registry.live()
    assert found and (found.id, found.snapshot_id) == (live.id, WIDER.id)
    assert registry.sources(found.snapshot_id) == {"b2:1", "b2:reaction"} and read_adapter(live.path) == found


def test_clean_weights_stay_clean_where_the_wider_origin_was_forgotten_meanwhile(registry: Registry) -> None:
    live = promoted(registry, b"one")
    registry.add_snapshot(WIDER, [])
    registry.open_cycle()
    forgotten(registry, WIDER)
    trained(registry, b"one", snapshot=WIDER)
    assert registry.tainted() == {} and registry.live() == live


def test_clean_weights_keep_their_origin_whatever_makes_them_again(registry: Registry) -> None:
    live = promoted(registry, b"one")
    later = Snapshot((), (), (), (Judged((), "another answer", True, "ada", ("b2:2",)),))
    registry.add_snapshot(later, [])
    trained(registry, b"one", snapshot=later)
    assert registry.live() == live == read_adapter(live.path)


def test_what_is_recorded_while_another_process_writes_waits_for_it(registry: Registry) -> None:
    other = Database(registry.database.url)
    with ThreadPoolExecutor(1) as pool, other.writing() as session:
        session.execute(select(1))
        job = pool.submit(registry.add_snapshot, replace(SNAPSHOT, held_out=()), [])
        time.sleep(0.3)
        assert not job.done()
    job.result()
    other.close()
    assert len(registry.snapshot_ids()) == 2


def test_what_is_on_record_is_never_swept_and_gets_its_manifest_back(registry: Registry) -> None:
    live, damaged = promoted(registry, b"one"), trained(registry, b"two")
    for adapter in (live, damaged):
        (adapter.path / MANIFEST).unlink()
    (damaged.path / WEIGHTS).write_bytes(b"twi")
    assert registry.sweep() == 0
    assert read_adapter(live.path) == live
    assert (damaged.path / WEIGHTS).exists() and not intact(damaged.path)


def test_what_was_rolled_back_from_does_not_come_back_by_what_served_before(registry: Registry) -> None:
    one, two = promoted(registry, b"one"), promoted(registry, b"two")
    registry.promote(one.id)
    assert registry.predecessor(one.id) == two and registry.predecessor(two.id) is None  # each once, so this ends
    assert registry.rollback() == two
    registry.taint(two.id, "a turn was forgotten")
    assert registry.live() is None is registry.withdraw_tainted()
    assert registry.promote(one.id) == registry.live()  # by name it does


def test_tainted_adapter_that_was_promoted_again_gives_way_to_what_served_before_it(registry: Registry) -> None:
    one, two = promoted(registry, b"one"), promoted(registry, b"two")
    registry.promote(one.id)
    registry.taint(one.id, "a turn was forgotten")
    assert registry.live() == two == registry.withdraw_tainted() == registry.live()
    assert registry.rollback() is None


def test_what_was_removed_by_hand_is_marked_by_prune(registry: Registry) -> None:
    gone, kept = trained(registry, b"gone"), trained(registry, b"kept")
    shutil.rmtree(gone.path)
    with pytest.raises(GateRefused, match=r"backup.*adapters prune"):
        read_adapter(gone.path)
    assert registry.prunable(3) == [gone] and registry.prune(3) == [gone.id]
    assert registry.prunable(3) == [] and registry.sweep() == 0 and is_held(kept)
