from __future__ import annotations

import os
import random
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from nightschool.errors import InputError, NotFound, StoreError
from nightschool.memory.conversations import Conversation, Owner, draft_id
from nightschool.memory.database import Database
from nightschool.memory.indexing import Indexing
from nightschool.memory.store import MemoryStore
from nightschool.memory.tables import AdapterRow, ReceiptRow, SnapshotRow, SnapshotSourceRow, TopicRow
from nightschool.memory.types import Draft, ForgetReceipt
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

SECRET = "kq7zv9x1w4 the vault opens with 8842071355"
EVE = "eve-of-7719"


def said(store, words, reply="ok", user="ann", session="s", role="user"):
    return store.record([{"role": role, "content": words}], reply, user_id=user, session_id=session)


def texts(store):
    return [i.text for i in store.interactions()]


def learnt(store, snapshot, interactions, adapters=(), parents=()):
    """A snapshot of these interactions, adapters trained on it, and `parents`: adapter to the one it came from."""
    rows = [
        {"id": a, "parent_id": dict(parents).get(a), "snapshot_id": snapshot, "base_id": "b", "phase": "sft"}
        | {"folder": a, "details": {}, "tainted": None, "created_utc": 0.0}
        for a in adapters
    ]
    with Session(store.sql) as session, session.begin():
        session.execute(insert(SnapshotRow), [{"id": snapshot, "rows": [], "excluded": [], "created_utc": 0.0}])
        sources = [{"snapshot_id": snapshot, "interaction_id": i.id} for i in interactions]
        session.execute(insert(SnapshotSourceRow), sources)
        for row in rows:
            session.execute(insert(AdapterRow), [row])


def tainted(store):
    with Session(store.sql) as session:
        return {i: why for i, why in session.execute(select(AdapterRow.id, AdapterRow.tainted)) if why}


def test_forgotten_words_and_vectors_leave_no_byte_in_the_home(store, embedder, bytes_in_home):
    said(store, "what are the opening hours?")
    told = said(store, SECRET, f"I keep that {SECRET}", user=EVE)
    store.rate(told.id, comment=SECRET, correction=SECRET + "!")
    store.rate(told.id, correction=SECRET + "?", event="edited")
    store.remember(SECRET, user_id=EVE, shared=True)
    text = f"well, {SECRET}"
    store.keep_drafts([Draft(draft_id(told.id, "base", text), told.id, text, "base", (told.id,), 1.0)])
    said(store, "thanks", user=EVE)
    planted = embedder.embed([SECRET])[0].astype(np.float32).tobytes()
    assert bytes_in_home(SECRET.encode()) and bytes_in_home(planted)
    receipt = store.forget_apply(store.forget(user_id=EVE))
    assert receipt == ForgetReceipt(2, 5, 2, (), ())
    for wanted in (SECRET.encode(), b"kq7zv9x1w4", b"8842071355", planted, EVE.encode()):
        assert bytes_in_home(wanted) == []
    assert texts(store) == ["what are the opening hours?"]
    assert [r.memory.text for r in store.recall("opening hours", user_id="ann")] == ["what are the opening hours?\nok"]
    assert store.verify() == []


def test_no_vector_of_anything_that_was_embedded_stays_in_any_precision(quick_store, hash_embedder, bytes_in_home):
    said(quick_store, "what are the opening hours?")
    hash_embedder.embedded.clear()
    windows = "The first of many sentences is here. The second one follows it at once. And a third ends what was said."
    said(quick_store, f"I live in Kqzvtown. {SECRET}. {windows}", f"A reply on {SECRET}. {windows}", user=EVE)
    quick_store.remember(f"{SECRET}, noted", user_id=EVE, agent_id="cook")
    embedded = sorted(set(hash_embedder.embedded))
    needles = [v.astype(kind).tobytes() for v in hash_embedder.embed(embedded) for kind in ("<f4", "<f2")]
    assert len(embedded) == 8
    assert sum(bool(bytes_in_home(needle)) for needle in needles) >= len(embedded)
    assert bytes_in_home(b"I live in Kqzvtown.")
    quick_store.forget_apply(quick_store.forget(user_id=EVE))
    left = [needle for needle in [*needles, b"Kqzvtown", b"kqzvtown", EVE.encode()] if bytes_in_home(needle)]
    assert left == []


def test_no_copy_stays_in_the_pages_that_rows_were_moved_between(quick_store, bytes_in_home):
    """Many sizes of rows of many users, so that the database moves cells between pages before they are deleted."""
    draw, words = random.Random(0), {}
    for n in range(10):
        conversations = []
        for m in range(100):
            user, messages = f"user{draw.randrange(100):03d}", []
            for _ in range(3):
                word = "".join(draw.choices("abcdefghijk0123456789", k=24))
                words.setdefault(user, []).append(word)
                messages.append({"role": "user", "content": word + " x" * draw.choice([5, 50, 500, 4500])})
                messages.append({"role": "assistant", "content": "re " + word})
            conversations.append(Conversation(Owner(user, "", f"s{n}-{m}"), tuple(messages), (0.0,) * 6))
        quick_store.record_many(conversations)
    plan = quick_store.forget(user_id="user009")
    quick_store.forget_apply(plan)
    kept = words.pop("user000")
    assert all(bytes_in_home(word.encode()) for word in kept)
    assert [word for word in words["user009"] if bytes_in_home(word.encode())] == []


def test_exports_in_the_home_are_erased_and_the_receipt_names_them(quick_store, settings, bytes_in_home):
    said(quick_store, SECRET)
    kept = settings.home / "exports"
    kept.mkdir()
    (kept / "all.jsonl").write_text(SECRET)
    weekly, _ = quick_store.export(kept / "weekly" / "1.jsonl")
    plan = quick_store.forget(user_id="ann")
    assert plan.exports == ("exports/all.jsonl", "exports/weekly/1.jsonl")
    assert weekly.exists()
    assert quick_store.forget_apply(plan).exports == plan.exports
    assert bytes_in_home(SECRET.encode()) == []
    with Session(quick_store.sql) as session:  # which keeps no names: they are the operator's words
        assert session.scalars(select(ReceiptRow)).one().details["exports"] == 2


def test_export_that_gets_its_name_while_the_exports_are_deleted_goes_too(quick_store, settings, monkeypatch):
    said(quick_store, SECRET)
    first, second = (settings.home / "exports" / name for name in ("one.jsonl", "two.jsonl"))
    first.parent.mkdir()
    first.write_text(SECRET)
    unlink = Path.unlink

    def meanwhile(path: Path, **how: bool) -> None:
        if path == first:
            second.write_text(SECRET)
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    quick_store.forget_apply(quick_store.forget(user_id="ann"))
    assert not first.exists() and not second.exists() and not quick_store.unfinished()


def test_link_among_the_exports_goes_and_what_it_points_to_stays(quick_store, settings, tmp_path):
    said(quick_store, SECRET)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (settings.home / "exports").mkdir()
    (settings.home / "exports" / "weekly").symlink_to(elsewhere)
    plan = quick_store.forget(user_id="ann")
    assert plan.exports == ("exports/weekly",)
    quick_store.forget_apply(plan)
    assert elsewhere.is_dir() and not (settings.home / "exports" / "weekly").is_symlink()


@pytest.mark.parametrize("fault", [(Indexing, "erase"), (Database, "erase")])
def test_erasing_that_a_crash_interrupted_is_finished_at_the_next_opening(
    settings, hash_embedder, monkeypatch, bytes_in_home, fault
):
    def crash(_: object) -> None:
        raise KeyboardInterrupt

    with MemoryStore(settings, embedder=hash_embedder) as store:
        said(store, SECRET)
        kept = said(store, "kept", user="bob")
        plan = store.forget(user_id="ann")
        with monkeypatch.context() as patch:
            patch.setattr(*fault, crash)
            with pytest.raises(KeyboardInterrupt):
                store.forget_apply(plan)
        assert "the forgotten bytes may still be in the files" in store.verify()[0]
    with MemoryStore(settings, embedder=hash_embedder) as store:
        assert bytes_in_home(b"8842071355") == []
        assert store.verify() == []
        assert texts(store) == [kept.text]
        with Session(store.sql) as session:
            (receipt,) = session.scalars(select(ReceiptRow))
            assert receipt.details["interactions"] == 1
            assert receipt.finished_utc is not None


def test_erasing_that_cannot_be_finished_yet_leaves_the_store_usable_and_says_so(
    settings, hash_embedder, monkeypatch, caplog
):
    def busy(_: object) -> None:
        raise StoreError("busy")

    with MemoryStore(settings, embedder=hash_embedder) as store:
        said(store, SECRET)
        monkeypatch.setattr(Database, "erase", busy)
        with pytest.raises(StoreError, match="busy"):
            store.forget_apply(store.forget(user_id="ann"))
    with MemoryStore(settings, embedder=hash_embedder) as store:
        assert "the rows are deleted, but not yet their bytes: busy" in caplog.text
        said(store, "more")
        assert len(store.verify()) == 1


@pytest.mark.parametrize("name", ["exports/kept.jsonl", "censor-1.safetensors"])
def test_file_that_may_not_be_deleted_is_named_and_taken_up_again_and_the_rest_is_erased(
    settings, hash_embedder, monkeypatch, caplog, bytes_in_home, name
):
    def refused(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    (settings.home / "exports").mkdir()
    with MemoryStore(settings, embedder=hash_embedder) as store:
        said(store, SECRET)
        (settings.home / name).write_text(SECRET)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refused)
            with pytest.raises(StoreError, match=rf"cannot be deleted: .*{name} \(Permission denied\); make them"):
                store.forget_apply(store.forget(user_id="ann"))
            assert bytes_in_home(SECRET.encode()) == [name]
            with MemoryStore(settings, embedder=hash_embedder) as again:
                assert "not finished yet: the rows are deleted, but these files" in caplog.text
                assert said(again, "more").position == 0
                assert len(again.verify()) == 1
    with MemoryStore(settings, embedder=hash_embedder) as store:
        assert bytes_in_home(SECRET.encode()) == []
        assert store.verify() == []


def test_exports_that_cannot_be_listed_are_not_taken_for_erased(settings, hash_embedder, monkeypatch, caplog):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    with MemoryStore(settings, embedder=hash_embedder) as store:
        said(store, SECRET)
        plan = store.forget(user_id="ann")
        store.export()
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refused)
            with pytest.raises(StoreError, match="exports: the exports in it cannot be listed: Permission denied"):
                store.forget_apply(plan)
        assert texts(store) == [SECRET]


def test_what_is_forgotten_is_gone_also_after_closing_and_opening(settings, hash_embedder, bytes_in_home):
    with MemoryStore(settings, embedder=hash_embedder) as store:
        said(store, SECRET, user=EVE)
    with MemoryStore(settings, embedder=hash_embedder) as store:
        store.forget_apply(store.forget(user_id=EVE))
    with MemoryStore(settings, embedder=hash_embedder) as store:
        assert store.counts()["interactions"] == 0
    assert bytes_in_home(b"kq7zv9x1w4") == []


def test_user_session_and_ids_narrow_each_other(quick_store):
    for user in ("ann", "bob"):
        for session in ("s", "t"):
            said(quick_store, f"{user} {session}", user=user, session=session)
    quick_store.forget_apply(quick_store.forget(user_id="ann", session_id="s"))
    assert texts(quick_store) == ["ann t", "bob s", "bob t"]
    quick_store.forget_apply(quick_store.forget(session_id="t"))
    assert texts(quick_store) == ["bob s"]
    (left,) = quick_store.interactions()
    with pytest.raises(NotFound, match=f"nothing of user_id 'ann' has the id {left.id}; nothing was forgotten"):
        quick_store.forget_apply(quick_store.forget(user_id="ann", interaction_ids=[left.id]))
    quick_store.forget_apply(quick_store.forget(user_id="bob", interaction_ids=[left.id]))
    assert texts(quick_store) == []


def test_forgetting_needs_a_selector_and_known_ids(quick_store):
    kept = said(quick_store, "hi")
    with pytest.raises(InputError, match="forget what"):
        quick_store.forget_apply(quick_store.forget())
    with pytest.raises(NotFound, match="nothing has the id b2:gone"):
        quick_store.forget_apply(quick_store.forget(interaction_ids=[kept.id, "b2:gone"]))
    with pytest.raises(NotFound, match="b2:gone"):
        quick_store.forget_apply(quick_store.forget(memory_ids=["b2:gone"]))
    assert texts(quick_store) == ["hi"]


def test_no_id_is_nothing_and_not_all_that_the_user_has(quick_store):
    said(quick_store, "hi")
    quick_store.remember("a note", user_id="ann")
    for none in ({"memory_ids": []}, {"interaction_ids": ()}, {"memory_ids": [], "interaction_ids": []}, {"query": ""}):
        plan = quick_store.forget(user_id="ann", **none)
        assert (plan.interaction_ids, plan.memory_ids) == ((), ())
        assert quick_store.forget_apply(plan) == ForgetReceipt(0, 0, 0, (), ())
    assert quick_store.forget(interaction_ids=[]).interaction_ids == ()
    assert texts(quick_store) == ["hi"] and quick_store.counts()["memories"] == 2


@pytest.mark.parametrize(
    ("selected", "found"),
    [
        ({"memory_ids": "b2:1"}, "memory_ids is of type str; give a list of ids"),
        ({"interaction_ids": 5}, "interaction_ids is of type int; give a list of ids"),
        ({"interaction_ids": [None]}, "interaction_ids: an id is of type NoneType, not text"),
        ({"query": 5, "user_id": "ann"}, "query is of type int, not text"),
        ({"query": "\ud800", "user_id": "ann"}, "query holds half of a surrogate pair"),
        ({"user_id": "\ud800"}, "user_id holds half of a surrogate pair"),
        ({"user_id": b"ann"}, "user_id is of type bytes, not text"),
        ({"session_id": 5}, "session_id is of type int, not text"),
    ],
)
def test_selection_that_is_malformed_is_refused(quick_store, selected, found):
    with pytest.raises(InputError, match=found):
        quick_store.forget(**selected)


def test_only_a_plan_is_applied(quick_store):
    with pytest.raises(InputError, match="plan is of type str; give what `forget` returned"):
        quick_store.forget_apply("b2:1")


def test_plan_counts_and_changes_nothing_and_its_token_applies_it(quick_store):
    gone = said(quick_store, "hi")
    rated = quick_store.rate(gone.id, rating=1)
    learnt(quick_store, "s1", [gone], ["a1"])
    plan = quick_store.forget(user_id="ann")
    assert (plan.interaction_ids, plan.feedback_ids, len(plan.memory_ids)) == ((gone.id,), (rated.id,), 1)
    assert (plan.tainted_snapshots, plan.tainted_adapters) == (("s1",), ("a1",))
    assert (texts(quick_store), tainted(quick_store)) == (["hi"], {})
    assert quick_store.forget_apply(plan) == ForgetReceipt(1, 1, 1, ("s1",), ("a1",))
    assert texts(quick_store) == []


def test_plan_is_refused_once_more_or_less_would_go(quick_store):
    gone = said(quick_store, "hi")
    plan = quick_store.forget(user_id="ann")
    changes = (
        lambda: said(quick_store, "more"),
        lambda: quick_store.rate(gone.id, rating=1),
        lambda: quick_store.remember("a note", user_id="ann"),
    )
    for change in changes:
        change()
        with pytest.raises(InputError, match="was not given for what this would erase now"):
            quick_store.forget_apply(plan)
        plan = quick_store.forget(user_id="ann")
    said(quick_store, "of another", user="bob")
    assert quick_store.forget_apply(plan).interactions == 2
    assert texts(quick_store) == ["of another"]


def test_everything_older_is_forgotten(quick_store, clock):
    said(quick_store, "old")
    quick_store.remember("old note", user_id="ann")
    clock.now += 100
    kept = said(quick_store, "young")
    assert quick_store.forget(before_utc=clock.now - 100).interaction_ids == ()
    plan = quick_store.forget(before_utc=clock.now)
    assert quick_store.forget(user_id="ann", before_utc=clock.now - 50).token == plan.token
    with pytest.raises(NotFound, match=f"nothing of before {clock.now} has the id {kept.id}"):
        quick_store.forget(before_utc=clock.now, interaction_ids=[kept.id])
    assert quick_store.forget_apply(plan).memories == 2
    assert texts(quick_store) == ["young"]
    with pytest.raises(InputError, match="before_utc is not a finite number"):
        quick_store.forget(before_utc=float("nan"))


def test_time_in_milliseconds_would_be_everything_and_is_refused(quick_store, clock):
    said(quick_store, "young")
    with pytest.raises(InputError, match=r"before_utc is .* are these milliseconds"):
        quick_store.forget(before_utc=(clock.now - 90 * 86400) * 1000)
    with pytest.raises(InputError, match=r"since is .* are these milliseconds"):
        quick_store.recall("young", user_id="ann", since=clock.now * 1000)


def test_plan_that_was_carried_as_json_is_refused_by_name(quick_store):
    said(quick_store, "young")
    plan = quick_store.forget(user_id="ann")
    with pytest.raises(InputError, match="selection is of type dict"):
        quick_store.forget_apply(replace(plan, selection=asdict(plan.selection)))


def test_what_a_query_finds_of_that_user_is_forgotten(store):
    said(store, "my dog Rex is ill")
    said(store, "when do you open?")
    said(store, "my dog Rex is ill", user="bob")
    store.remember("my dog Rex is ill", user_id="bob", shared=True)
    with pytest.raises(InputError, match=r"query finds the memories of one user; give user_id \(--user\), too"):
        store.forget(query="dog")
    plan = store.forget(user_id="ann", query="my dog Rex is ill")
    assert len(plan.interaction_ids) == 1
    store.forget_apply(plan)
    assert texts(store) == ["when do you open?", "my dog Rex is ill"]
    export, _ = store.export()
    nothing = store.forget(user_id="ann", session_id="another", query="when do you open?")
    assert store.forget_apply(nothing) == ForgetReceipt(0, 0, 0, (), ())
    assert export.exists()
    assert len(texts(store)) == 2


def test_positions_of_the_rest_stay_and_the_next_turn_goes_on(quick_store):
    said(quick_store, "one")
    gone = said(quick_store, "two")
    said(quick_store, "three")
    quick_store.forget_apply(quick_store.forget(interaction_ids=[gone.id]))
    assert [i.position for i in quick_store.interactions()] == [0, 2]
    assert said(quick_store, "four").position == 3
    assert quick_store.verify() == []


def test_turn_of_tools_does_not_keep_the_forgotten_request(quick_store, bytes_in_home):
    first = said(quick_store, "the weather")
    gone = said(quick_store, SECRET)
    said(quick_store, "result", role="tool")
    quick_store.forget_apply(quick_store.forget(interaction_ids=[gone.id]))
    assert texts(quick_store) == ["the weather", "the weather"]
    assert [i.topic_id for i in quick_store.interactions()] == [first.topic_id] * 2
    quick_store.forget_apply(quick_store.forget(interaction_ids=[first.id]))
    assert [(i.text, i.topic_id) for i in quick_store.interactions()] == [("", None)]
    assert bytes_in_home(b"kq7zv9x1w4") == []
    assert quick_store.verify() == []


def test_turns_of_tools_of_every_session_lose_the_forgotten_request(quick_store):
    gone = [said(quick_store, SECRET, session=session).id for session in "st"]
    for session in "st":
        said(quick_store, "result", role="tool", session=session)
    quick_store.forget_apply(quick_store.forget(interaction_ids=gone))
    assert texts(quick_store) == ["", ""]


def test_reply_to_tools_is_found_by_a_query_and_forgotten(quick_store, bytes_in_home):
    said(quick_store, "the weather")
    kept, answer = said(quick_store, "what is the code?"), said(quick_store, "result", reply=SECRET, role="tool")
    plan = quick_store.forget(user_id="ann", query=SECRET)
    assert plan.interaction_ids == (answer.id,)
    quick_store.forget_apply(plan)
    assert bytes_in_home(b"kq7zv9x1w4") == []
    assert list(quick_store.interactions())[-1] == kept
    assert quick_store.verify() == []


def test_turn_of_tools_keeps_the_request_that_was_not_forgotten(quick_store):
    gone, kept = said(quick_store, "one"), said(quick_store, "two")
    answer = said(quick_store, "result", role="tool")
    quick_store.forget_apply(quick_store.forget(interaction_ids=[gone.id]))
    assert list(quick_store.interactions()) == [kept, answer]


def test_greeting_is_forgotten_without_a_topic(quick_store):
    greeting = quick_store.record([], "Hello!", user_id="ann", session_id="s")
    said(quick_store, "one")
    assert quick_store.forget_apply(quick_store.forget(interaction_ids=[greeting.id])) == ForgetReceipt(1, 0, 0, (), ())
    assert quick_store.verify() == []


def test_topic_loses_the_forgotten_words_and_keeps_its_other_turns(settings, make_embedder, bytes_in_home):
    class OneTopic(make_embedder):
        """All texts lie so near each other that they are one topic."""

        def embed(self, texts):
            near = super().embed(texts) + 20
            return near / np.linalg.norm(near, axis=1, keepdims=True)

    with MemoryStore(settings, embedder=OneTopic()) as store:
        gone = said(store, SECRET)
        kept = said(store, "opening hours")
        assert gone.topic_id == kept.topic_id
        store.forget_apply(store.forget(interaction_ids=[gone.id]))
        (topic,) = store.topics(0)
        assert (topic.id, topic.label) == (kept.topic_id, "opening hours")
        with Session(store.sql) as session:
            row = session.scalars(select(TopicRow)).one()
            centroid = np.frombuffer(row.centroid, dtype=np.float32)
        np.testing.assert_allclose(centroid, store.embedder.embed(["opening hours"])[0], atol=1e-5)
        assert bytes_in_home(b"8842071355") == []
        store.forget_apply(store.forget(interaction_ids=[kept.id]))
        assert store.topics(0) == []


def test_note_made_from_a_forgotten_turn_goes_with_it(quick_store):
    kept, gone = said(quick_store, "one"), said(quick_store, "two")
    with_sources = [
        quick_store.remember(f"n{n}", user_id="ann", source_ids=s).id
        for n, s in enumerate(([kept.id], [kept.id, gone.id]))
    ]
    free = quick_store.remember("free", user_id="ann").id
    quick_store.forget_apply(quick_store.forget(interaction_ids=[gone.id]))
    assert quick_store.memories([*with_sources, free]).keys() == {with_sources[0], free}
    assert quick_store.verify() == []


def test_forgetting_the_memory_of_a_turn_forgets_the_turn_and_a_note_only_itself(quick_store):
    turn = said(quick_store, "the zebra")
    note = quick_store.remember("a zebra", user_id="ann", source_ids=[turn.id])
    quick_store.forget_apply(quick_store.forget(memory_ids=[note.id]))
    assert texts(quick_store) == ["the zebra"]
    (found,) = quick_store.recall("zebra", user_id="ann")
    both = quick_store.forget(interaction_ids=[turn.id], memory_ids=[found.memory.id])
    assert both.interaction_ids == (turn.id,)
    assert quick_store.forget_apply(quick_store.forget(memory_ids=[found.memory.id])).interactions == 1
    assert (texts(quick_store), quick_store.recall("zebra", user_id="ann")) == ([], [])


def test_what_learnt_from_it_is_tainted_with_all_its_descendants(quick_store):
    gone, kept = said(quick_store, "one"), said(quick_store, "two")
    learnt(quick_store, "s1", [gone, kept], ["sft", "dpo"], {"dpo": "sft"}.items())
    learnt(quick_store, "s2", [kept], ["clean"])
    learnt(quick_store, "s3", [kept], ["warm", "warmer"], {"warm": "dpo", "warmer": "warm"}.items())
    receipt = quick_store.forget_apply(quick_store.forget(interaction_ids=[gone.id]))
    assert receipt.tainted_snapshots == ("s1",)
    assert receipt.tainted_adapters == ("dpo", "sft", "warm", "warmer")
    reasons = tainted(quick_store)
    assert reasons.keys() == set(receipt.tainted_adapters)
    assert "s1" in reasons["warmer"]


def test_forgetting_a_note_taints_what_was_learnt_from_replies_that_were_shown_it(quick_store):
    note = quick_store.remember("a zebra", user_id="ann", shared=True)
    owner = {"user_id": "bob", "session_id": "s"}
    shown = quick_store.record([{"role": "user", "content": "pet?"}], "zebra", **owner, memory_ids=[note.id])
    learnt(quick_store, "s1", [shown], ["sft"])
    learnt(quick_store, "s2", [said(quick_store, "two")], ["clean"])
    assert quick_store.forget_apply(quick_store.forget(memory_ids=[note.id])).tainted_adapters == ("sft",)


def test_first_reason_of_a_taint_stays(quick_store):
    one, two = said(quick_store, "one"), said(quick_store, "two")
    learnt(quick_store, "s1", [one, two], ["a"])
    quick_store.forget_apply(quick_store.forget(interaction_ids=[one.id]))
    before = tainted(quick_store)
    assert quick_store.forget_apply(quick_store.forget(interaction_ids=[two.id])).tainted_adapters == ("a",)
    assert tainted(quick_store) == before


def test_many_rows_are_forgotten_in_pieces(quick_store, monkeypatch):
    monkeypatch.setattr("nightschool.memory.rows.IDS_A_QUERY", 2)
    ids = [said(quick_store, f"message {n}").id for n in range(7)]
    learnt(quick_store, "s1", [quick_store.interaction(i) for i in ids])
    assert quick_store.forget_apply(quick_store.forget(interaction_ids=ids[1:])).interactions == 6
    assert texts(quick_store) == ["message 0"]
    assert quick_store.verify() == []


def test_forgotten_conversation_can_be_told_anew(quick_store):
    gone = said(quick_store, "hi")
    quick_store.forget_apply(quick_store.forget(user_id="ann"))
    assert said(quick_store, "hi").id == gone.id
    assert quick_store.verify() == []


def test_forgetting_says_so_when_somebody_still_reads_the_log(settings, hash_embedder, monkeypatch):
    monkeypatch.setattr(
        "nightschool.memory.database.PRAGMAS", ("journal_mode=WAL", "busy_timeout=50", "foreign_keys=ON")
    )
    with MemoryStore(settings, embedder=hash_embedder) as store:
        said(store, SECRET)
        reader = sqlite3.connect(settings.home / "nightschool.db", isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM interactions").fetchall()
        with pytest.raises(StoreError, match="the rows are deleted, but another connection still reads the log"):
            store.forget_apply(store.forget(user_id="ann"))
        reader.close()
        assert store.counts()["interactions"] == 0
