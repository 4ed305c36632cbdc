from __future__ import annotations

import sqlite3

import numpy as np
import pytest
from nightschool.errors import InputError, NotFound, StoreError
from nightschool.memory.store import MemoryStore
from nightschool.memory.tables import AdapterRow, SnapshotRow, SnapshotSourceRow, TopicRow
from nightschool.memory.types import ForgetReceipt
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
    store.rate(said(store, SECRET, f"I keep that {SECRET}", user=EVE).id, comment=SECRET, correction=SECRET + "!")
    store.remember(SECRET, user_id=EVE, shared=True)
    said(store, "thanks", user=EVE)
    planted = embedder.embed([SECRET])[0].astype(np.float32).tobytes()
    assert bytes_in_home(SECRET.encode()) and bytes_in_home(planted)
    receipt = store.forget(user_id=EVE)
    assert receipt == ForgetReceipt(2, 3, 1, (), ())
    for wanted in (SECRET.encode(), b"kq7zv9x1w4", b"8842071355", planted, EVE.encode()):
        assert bytes_in_home(wanted) == []
    assert texts(store) == ["what are the opening hours?"]
    assert [r.memory.text for r in store.recall("opening hours", user_id="ann")] == ["what are the opening hours?\nok"]
    assert store.verify() == []


def test_what_is_forgotten_is_gone_also_after_closing_and_opening(settings, hash_embedder, bytes_in_home):
    with MemoryStore(settings, embedder=hash_embedder) as store:
        said(store, SECRET, user=EVE)
    with MemoryStore(settings, embedder=hash_embedder) as store:
        store.forget(user_id=EVE)
    with MemoryStore(settings, embedder=hash_embedder) as store:
        assert store.counts()["interactions"] == 0
    assert bytes_in_home(b"kq7zv9x1w4") == []


def test_user_session_and_ids_narrow_each_other(quick_store):
    for user in ("ann", "bob"):
        for session in ("s", "t"):
            said(quick_store, f"{user} {session}", user=user, session=session)
    quick_store.forget(user_id="ann", session_id="s")
    assert texts(quick_store) == ["ann t", "bob s", "bob t"]
    quick_store.forget(session_id="t")
    assert texts(quick_store) == ["bob s"]
    (left,) = quick_store.interactions()
    with pytest.raises(NotFound, match=f"nothing of user_id 'ann' has the id {left.id}; nothing was forgotten"):
        quick_store.forget(user_id="ann", interaction_ids=[left.id])
    quick_store.forget(user_id="bob", interaction_ids=[left.id])
    assert texts(quick_store) == []


def test_forgetting_needs_a_selector_and_known_ids(quick_store):
    kept = said(quick_store, "hi")
    with pytest.raises(InputError, match="forget what"):
        quick_store.forget()
    with pytest.raises(NotFound, match="nothing has the id b2:gone"):
        quick_store.forget(interaction_ids=[kept.id, "b2:gone"])
    with pytest.raises(NotFound, match="b2:gone"):
        quick_store.forget(memory_ids=["b2:gone"])
    assert texts(quick_store) == ["hi"]


def test_dry_run_counts_and_changes_nothing(quick_store):
    gone = said(quick_store, "hi")
    quick_store.rate(gone.id, rating=1)
    learnt(quick_store, "s1", [gone], ["a1"])
    planned = quick_store.forget(user_id="ann", dry_run=True)
    assert planned == ForgetReceipt(1, 1, 1, ("s1",), ("a1",))
    assert (texts(quick_store), tainted(quick_store)) == (["hi"], {})
    assert quick_store.forget(user_id="ann") == planned


def test_positions_of_the_rest_stay_and_the_next_turn_goes_on(quick_store):
    said(quick_store, "one")
    gone = said(quick_store, "two")
    said(quick_store, "three")
    quick_store.forget(interaction_ids=[gone.id])
    assert [i.position for i in quick_store.interactions()] == [0, 2]
    assert said(quick_store, "four").position == 3
    assert quick_store.verify() == []


def test_turn_of_tools_does_not_keep_the_forgotten_request(quick_store, bytes_in_home):
    first = said(quick_store, "the weather")
    gone = said(quick_store, SECRET)
    said(quick_store, "result", role="tool")
    quick_store.forget(interaction_ids=[gone.id])
    assert texts(quick_store) == ["the weather", "the weather"]
    assert [i.topic_id for i in quick_store.interactions()] == [first.topic_id] * 2
    quick_store.forget(interaction_ids=[first.id])
    assert [(i.text, i.topic_id) for i in quick_store.interactions()] == [("", None)]
    assert bytes_in_home(b"kq7zv9x1w4") == []
    assert quick_store.verify() == []


def test_turn_of_tools_keeps_the_request_that_was_not_forgotten(quick_store):
    gone, kept = said(quick_store, "one"), said(quick_store, "two")
    answer = said(quick_store, "result", role="tool")
    quick_store.forget(interaction_ids=[gone.id])
    assert list(quick_store.interactions()) == [kept, answer]


def test_greeting_is_forgotten_without_a_topic(quick_store):
    greeting = quick_store.record([], "Hello!", user_id="ann", session_id="s")
    said(quick_store, "one")
    assert quick_store.forget(interaction_ids=[greeting.id]) == ForgetReceipt(1, 0, 0, (), ())
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
        store.forget(interaction_ids=[gone.id])
        (topic,) = store.topics(0)
        assert (topic.id, topic.label) == (kept.topic_id, "opening hours")
        with Session(store.sql) as session:
            row = session.scalars(select(TopicRow)).one()
            centroid = np.frombuffer(row.centroid, dtype=np.float32)
        np.testing.assert_allclose(centroid, store.embedder.embed(["opening hours"])[0], atol=1e-5)
        assert bytes_in_home(b"8842071355") == []
        store.forget(interaction_ids=[kept.id])
        assert store.topics(0) == []


def test_note_made_from_a_forgotten_turn_goes_with_it(quick_store):
    kept, gone = said(quick_store, "one"), said(quick_store, "two")
    with_sources = [
        quick_store.remember(f"n{n}", user_id="ann", source_ids=s).id
        for n, s in enumerate(([kept.id], [kept.id, gone.id]))
    ]
    free = quick_store.remember("free", user_id="ann").id
    quick_store.forget(interaction_ids=[gone.id])
    assert quick_store.memories([*with_sources, free]).keys() == {with_sources[0], free}
    assert quick_store.verify() == []


def test_forgetting_the_memory_of_a_turn_forgets_the_turn_and_a_note_only_itself(quick_store):
    turn = said(quick_store, "the zebra")
    note = quick_store.remember("a zebra", user_id="ann", source_ids=[turn.id])
    quick_store.forget(memory_ids=[note.id])
    assert texts(quick_store) == ["the zebra"]
    (found,) = quick_store.recall("zebra", user_id="ann")
    assert quick_store.forget(memory_ids=[found.memory.id]).interactions == 1
    assert (texts(quick_store), quick_store.recall("zebra", user_id="ann")) == ([], [])


def test_what_learnt_from_it_is_tainted_with_all_its_descendants(quick_store):
    gone, kept = said(quick_store, "one"), said(quick_store, "two")
    learnt(quick_store, "s1", [gone, kept], ["sft", "dpo"], {"dpo": "sft"}.items())
    learnt(quick_store, "s2", [kept], ["clean"])
    learnt(quick_store, "s3", [kept], ["warm", "warmer"], {"warm": "dpo", "warmer": "warm"}.items())
    receipt = quick_store.forget(interaction_ids=[gone.id])
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
    assert quick_store.forget(memory_ids=[note.id]).tainted_adapters == ("sft",)


def test_first_reason_of_a_taint_stays(quick_store):
    one, two = said(quick_store, "one"), said(quick_store, "two")
    learnt(quick_store, "s1", [one, two], ["a"])
    quick_store.forget(interaction_ids=[one.id])
    before = tainted(quick_store)
    assert quick_store.forget(interaction_ids=[two.id]).tainted_adapters == ("a",)
    assert tainted(quick_store) == before


def test_many_rows_are_forgotten_in_pieces(quick_store, monkeypatch):
    monkeypatch.setattr("nightschool.memory.rows.IDS_A_QUERY", 2)
    ids = [said(quick_store, f"message {n}").id for n in range(7)]
    learnt(quick_store, "s1", [quick_store.interaction(i) for i in ids])
    assert quick_store.forget(interaction_ids=ids[1:]).interactions == 6
    assert texts(quick_store) == ["message 0"]
    assert quick_store.verify() == []


def test_forgotten_conversation_can_be_told_anew(quick_store):
    gone = said(quick_store, "hi")
    quick_store.forget(user_id="ann")
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
            store.forget(user_id="ann")
        reader.close()
        assert store.counts()["interactions"] == 0
