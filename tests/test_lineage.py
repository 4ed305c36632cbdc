"""A snapshot of a real store, an adapter of made-up weights that it taught, and what is told of it later."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nightschool.errors import GateRefused, NotFound
from nightschool.evolve.dataset import Remembered, freeze, from_rows, to_rows
from nightschool.evolve.lineage import events, lineage, verify
from nightschool.evolve.registry import Registry
from nightschool.evolve.sealing import seal
from nightschool.evolve.types import Adapter, Example, Judged, Snapshot, Verdict
from nightschool.memory.conversations import Conversation, Owner
from nightschool.memory.store import MemoryStore
from nightschool.serving.engine import MANIFEST, WEIGHTS

ASKED = "How do I patch a flat tyre?"
SAID = [("user", ASKED), ("assistant", "Clean it and glue a patch on."), ("user", "Thanks, that worked perfectly!")]


def told(store: MemoryStore, *more: tuple[str, str]) -> None:
    messages = tuple({"role": role, "content": content} for role, content in (*SAID, *more))
    store.record_many([Conversation(Owner("ann", "", "s"), messages, (1.0,) * len(messages))])


@pytest.fixture
def registry(quick_store: MemoryStore) -> Registry:
    return Registry.of(quick_store)


def sealed(registry: Registry, snapshot_id: str, weights: bytes = b"one", created_utc: float = 1.0) -> Adapter:
    folder = registry.building()
    (folder / WEIGHTS).write_bytes(weights)
    facts = {"base_id": "base", "snapshot_id": snapshot_id, "parent_id": None, "details": {}}
    adapter = seal(folder, phase="sft", created_utc=created_utc, **facts)
    registry.add(adapter)
    return adapter


@pytest.fixture
def taught(quick_store: MemoryStore, registry: Registry) -> Adapter:
    """By a reply whose thanks were not answered yet."""
    told(quick_store)
    snapshot = freeze(quick_store, quick_store.settings, now=quick_store.clock())
    rows = (*snapshot.examples, *snapshot.held_out)
    assert [len(row.interaction_ids) for row in rows] == [2]  # the reply and the thanks
    registry.add_snapshot(snapshot, to_rows(snapshot))
    return sealed(registry, snapshot.id)


@pytest.mark.parametrize("how", ["recorded", "imported", "said more, then answered"])
def test_reaction_that_is_answered_later_leaves_what_it_taught_sound_and_nothing_forgotten(
    quick_store: MemoryStore, registry: Registry, taught: Adapter, how: str
) -> None:
    if how == "imported":
        told(quick_store, ("assistant", "You are welcome."))
    else:
        turn = [{"role": "tool", "content": "clock: 12"}]
        if how != "recorded":
            told(quick_store, ("user", "And a slow one?"))
            turn = [{"role": "user", "content": "Hello?"}]
        quick_store.record(turn, "You are welcome.", user_id="ann", session_id="s")
    assert verify(quick_store, registry) == []
    found = lineage(quick_store, registry, taught.id)
    assert found.forgotten == ()
    told_of = {i for source in (*found.sources, *found.held_out) for i in source.interaction_ids}
    assert told_of == {i.id for i in quick_store.interactions()}


def test_forgetting_the_answered_reaction_reaches_what_it_taught_before(
    quick_store: MemoryStore,
    registry: Registry,
    taught: Adapter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    told(quick_store, ("assistant", "You are welcome."))
    reaction = next(i.id for i in quick_store.interactions() if i.text != ASKED)
    plan = quick_store.forget(interaction_ids=[reaction])
    assert plan.tainted_snapshots == (taught.snapshot_id,)
    quick_store.forget_apply(plan)
    assert taught.id in registry.tainted()
    assert lineage(quick_store, registry, taught.id).forgotten == (reaction,)
    (problem,) = verify(quick_store, registry)
    assert problem.endswith(f"its weights are not erased; delete {taught.path / WEIGHTS}")
    assert registry.unerased([taught.id]) == [taught.path / WEIGHTS]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "not permitted")))
        assert registry.erase_tainted() == []
    assert "could not be erased: not permitted" in caplog.text
    assert registry.erase_tainted() == [taught.id] and not (taught.path / WEIGHTS).exists()
    assert registry.erase_tainted() == registry.unerased([taught.id]) == []
    assert lineage(quick_store, registry, taught.id).forgotten == (reaction,)
    assert verify(quick_store, registry) == []
    with pytest.raises(NotFound, match="made of what is forgotten now: interaction"):
        from_rows(quick_store, registry.snapshot_rows(taught.snapshot_id))


@pytest.mark.parametrize("by_hand", [False, True])
def test_weights_that_were_pruned_or_let_go_of_are_sound_and_those_that_are_lost_are_not(
    quick_store: MemoryStore, registry: Registry, taught: Adapter, by_hand: bool
) -> None:
    sealed(registry, taught.snapshot_id, b"newer", created_utc=2.0)
    if by_hand:
        shutil.rmtree(taught.path)
        assert any("adapters prune" in line for line in verify(quick_store, registry))
    assert registry.prune(0) == [taught.id] and verify(quick_store, registry) == []
    (registry.adapters()[-1].path / WEIGHTS).unlink()
    assert any("its weights are gone" in line for line in verify(quick_store, registry))


def test_what_taught_it_is_told_apart_from_what_it_was_judged_on(quick_store: MemoryStore, registry: Registry) -> None:
    told(quick_store)
    one, other = (interaction.id for interaction in quick_store.interactions())
    judged = Judged((), "Yes.", True, "ann", (other,))
    snapshot = Snapshot((Example((), "Yes.", 1.0, (one,)),), (), (), (judged,))
    registry.add_snapshot(snapshot, to_rows(snapshot))
    found = lineage(quick_store, registry, sealed(registry, snapshot.id).id)
    assert [source.interaction_ids for source in found.sources] == [(one,)]
    assert [source.interaction_ids for source in found.held_out] == [(other,)]


def test_what_it_was_judged_on_did_not_teach_it_once_it_is_answered(
    quick_store: MemoryStore, registry: Registry
) -> None:
    told(quick_store)
    judged = Judged((), "Yes.", True, "ann", tuple(interaction.id for interaction in quick_store.interactions()))
    snapshot = Snapshot((), (), (), (judged,))
    registry.add_snapshot(snapshot, to_rows(snapshot))
    adapter = sealed(registry, snapshot.id)
    told(quick_store, ("assistant", "You are welcome."))
    found = lineage(quick_store, registry, adapter.id)
    assert found.sources == () and found.forgotten == ()
    assert {i for s in found.held_out for i in s.interaction_ids} == {i.id for i in quick_store.interactions()}


def test_manifest_that_names_another_snapshot_is_not_sound(
    quick_store: MemoryStore, registry: Registry, taught: Adapter
) -> None:
    manifest = taught.path / MANIFEST
    manifest.write_text(manifest.read_text().replace(taught.snapshot_id, "b2:" + "0" * 64))
    assert any("name different origins" in line for line in verify(quick_store, registry))


def test_adapter_in_service_that_was_rejected_since_is_not_sound(
    quick_store: MemoryStore, registry: Registry, taught: Adapter
) -> None:
    accepted = Verdict(taught.id, None, taught.snapshot_id, True, (), ("better",))
    registry.add_verdict(accepted)
    registry.promote(taught.id)
    assert verify(quick_store, registry) == []
    registry.add_verdict(replace(accepted, accepted=False))
    assert any("in service and was rejected when it was judged again" in line for line in verify(quick_store, registry))


def test_snapshot_that_lost_its_rows_is_not_sound(
    quick_store: MemoryStore, registry: Registry, taught: Adapter
) -> None:
    with quick_store.sql.begin() as connection:
        connection.exec_driver_sql("UPDATE snapshots SET rows = '[]'")
    assert any(f"{taught.snapshot_id} re-derives as" in line for line in verify(quick_store, registry))


def test_what_is_just_frozen_is_not_followed_to_turns_that_forgetting_would_not_find_it_by(
    quick_store: MemoryStore, registry: Registry, taught: Adapter
) -> None:
    told(quick_store, ("assistant", "You are welcome."))
    rows = registry.snapshot_rows(taught.snapshot_id)
    assert from_rows(quick_store, rows).id == taught.snapshot_id
    with pytest.raises(NotFound):
        Remembered(quick_store).require(rows)


def test_events_tell_what_served_and_how_much_was_forgotten_and_never_whose(
    quick_store: MemoryStore, registry: Registry, taught: Adapter
) -> None:
    cycle_id = registry.open_cycle()
    registry.add_verdict(Verdict(taught.id, None, taught.snapshot_id, True, (), ("all passed",)), cycle_id)
    registry.promote(taught.id, cycle_id)
    registry.update_cycle(cycle_id, finished_utc=quick_store.clock())
    quick_store.forget_apply(quick_store.forget(user_id="ann"))
    found = {event.kind: event for event in events(registry)}
    night, served, forgot = (found[kind] for kind in ("night", "switch", "forgotten"))
    assert (night.id, night.what) == (cycle_id, "promoted")
    assert (served.id, served.what) == (taught.id, "promoted")
    assert forgot.what == f"2 turns, 2 memories, 0 ratings; weights withdrawn: {taught.id}"
    assert "ann" not in str(events(registry))


def test_events_of_a_kind_keep_their_order_though_the_clock_is_set_back(
    quick_store: MemoryStore, registry: Registry, taught: Adapter, clock: Any
) -> None:
    registry.add_verdict(Verdict(taught.id, None, taught.snapshot_id, True, (), ("all passed",)))
    began = clock.now
    nights = []
    for moved in (0.0, 100.0, 50.0, 200.0):  # the third after the clock was set back
        clock.now = began + moved
        nights.append(registry.open_cycle())
        clock.now += 1.0
        registry.rollback() if registry.live() else registry.promote(taught.id)
    found = events(registry)
    assert [event.id for event in found if event.kind == "night"] == nights
    switches = [event for event in found if event.kind == "switch"]
    assert [(event.id, event.what, event.created_utc) for event in switches] == [
        (d["adapter_id"], d["reason"], d["created_utc"]) for d in registry.deployments()
    ]
    assert registry.live() is None and switches[-1].id is None
    assert "".join(event.kind[0] for event in found) == "nsnnssns"


def test_turn_that_taught_by_the_reader_alone_and_is_held_out_too_is_told_as_taught(
    quick_store: MemoryStore, registry: Registry
) -> None:
    told(quick_store)
    first, second = (i.id for i in quick_store.interactions())
    snapshot = Snapshot((), (), (), (Judged((), "x", True, "ann", (first,)),), reader_ids=(first, second))
    registry.add_snapshot(snapshot, [{"part": "held_out", "interaction_ids": [first]}])
    found = lineage(quick_store, registry, sealed(registry, snapshot.id).id)
    assert [s.interaction_ids for s in found.sources] == [(first, second)] and found.held_out == ()


def test_folder_that_holds_another_adapter_is_told_of_and_serves_nobody(
    quick_store: MemoryStore, registry: Registry, taught: Adapter
) -> None:
    other = sealed(registry, taught.snapshot_id, b"two")
    registry.add_verdict(Verdict(taught.id, None, taught.snapshot_id, True, (), ("better",)))
    shutil.rmtree(taught.path)
    shutil.copytree(other.path, taught.path)
    assert f"adapter {taught.id}: its manifest names {other.id}" in verify(quick_store, registry)
    with pytest.raises(GateRefused, match=f"holds {other.id} instead of adapter {taught.id}"):
        registry.promote(taught.id)
