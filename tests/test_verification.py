from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from nightschool.errors import StoreError
from nightschool.memory import verification
from nightschool.memory.conversations import draft_id
from nightschool.memory.types import Draft
from nightschool.memory.vectors import VectorIndex
from sqlalchemy import text


@pytest.fixture
def told(quick_store):
    asked = quick_store.record([{"role": "user", "content": "the zebra"}], "ok", user_id="ann", session_id="s")
    quick_store.record([{"role": "tool", "content": "x"}], "done", user_id="ann", session_id="s")
    quick_store.record([], "Hello!", user_id="bob", session_id="s")
    quick_store.rate(asked.id, rating=1)
    quick_store.remember("a zebra", user_id="ann", source_ids=[asked.id])
    draft = Draft(draft_id(asked.id, "base", "well"), asked.id, "well", "base", (asked.id,), 1.0)
    assert quick_store.keep_drafts([draft]) == 1
    assert quick_store.verify() == []
    return quick_store


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("UPDATE interactions SET reply = 'no' WHERE reply = 'done'", "interaction .*: its content has the id"),
        ("UPDATE interactions SET position = 7 WHERE reply = 'done'", "interaction .*: its content has the id"),
        ("UPDATE interactions SET text = 'else' WHERE reply = 'done'", "its text is not the latest request"),
        ("UPDATE interactions SET topic_id = NULL WHERE reply = 'done'", "its topic None is not that of its request"),
        ("UPDATE interactions SET topic_id = NULL", "its topic None is not that of its request"),
        ("UPDATE interactions SET topic_id = NULL", "topic .*: its size is 1, it has 0 turns"),
        ("UPDATE interactions SET topic_id = 't:gone'", "topic t:gone: it has turns and no row"),
        ("UPDATE topics SET size = 3", "topic .*: its size is 3, it has 1 turns"),
        ("UPDATE feedback SET rating = -1", "feedback .*: its content has the id"),
        ("UPDATE feedback SET event = 'copied'", "feedback .*: its content has the id"),
        ("UPDATE feedback SET interaction_id = 'b2:gone'", "feedback .*: its interaction b2:gone does not exist"),
        ("UPDATE drafts SET text = 'else'", "draft .*: its content has the id"),
        ("UPDATE drafts SET interaction_id = 'b2:gone'", "draft .*: its interaction b2:gone does not exist"),
        ("UPDATE memories SET text = 'else' WHERE kind = 'note'", "memory .*: its content has another id"),
        ("UPDATE memories SET text = 'else' WHERE kind = 'turn'", "memory .*: it is not the memory of its turn"),
        ("UPDATE memories SET source_ids = '[\"b2:gone\"]'", "memory .*: its source b2:gone does not exist"),
        ("DELETE FROM memories WHERE kind = 'turn'", "memory .*: it is missing, and its turn is there"),
        ("DELETE FROM memories WHERE kind = 'note'", "memory .*: the index has it and SQL does not"),
        ("DELETE FROM interactions WHERE reply = 'ok'", "memory .*: its source .* does not exist"),
    ],
)
def test_damage_in_sql_is_named(told, damage, found):
    with told.sql.connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.exec_driver_sql(damage)
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        connection.exec_driver_sql("BEGIN")
    disagreements = "\n".join(told.verify())
    import re

    assert re.search(found, disagreements), disagreements


def test_memory_that_is_missing_is_there_again_after_a_rebuild(told):
    with told.sql.connect() as connection:
        connection.exec_driver_sql("DELETE FROM memories WHERE kind = 'turn'")
        connection.commit()
    assert any("run `nightschool memory rebuild`" in line for line in told.verify())
    told.rebuild_index()
    assert told.verify() == []


def test_what_is_written_while_the_store_is_verified_is_no_disagreement(told, monkeypatch):
    receipts = verification.unfinished

    def meanwhile(session):
        told.record([{"role": "user", "content": "I live in Oslo"}], "ok", user_id="ann", session_id="live")
        return receipts(session)

    monkeypatch.setattr(verification, "unfinished", meanwhile)
    assert told.verify() == []


def test_index_that_follows_what_was_committed_agrees(told, monkeypatch):
    index = told._indexing.index
    (memory_id, *_) = index.ids()
    rows = index.rows(f"id = '{memory_id}'", 1)
    index.delete([memory_id])
    with monkeypatch.context() as patch:
        patch.setattr(verification.time, "sleep", lambda _: index.add(rows))
        assert told.verify() == []
    index.delete([memory_id])
    with told.database.writing() as session:
        session.execute(text("UPDATE memories SET indexed = false WHERE id = :id"), {"id": memory_id})
    assert told.verify() == []  # it waits to be indexed


def test_bytes_that_are_being_erased_are_waited_for(told, monkeypatch):
    begun, looked, erase, sleep = Event(), Event(), VectorIndex.erase, time.sleep

    def slowly(index):
        begun.set()
        assert looked.wait(60)
        sleep(3 * verification.PAUSE_S)
        erase(index)

    def pause(seconds):
        looked.set()
        sleep(seconds)

    monkeypatch.setattr(VectorIndex, "erase", slowly)
    with ThreadPoolExecutor(1) as pool:
        erasing = pool.submit(told.forget_apply, told.forget(user_id="ann"))
        assert begun.wait(60)
        monkeypatch.setattr(verification.time, "sleep", pause)
        found = told.verify()
        assert erasing.result().interactions == 2 and found == []


def test_index_that_cannot_be_written_is_named_each_time(told, monkeypatch):
    def fail(*_):
        raise StoreError("Permission denied")

    monkeypatch.setattr(VectorIndex, "add", fail)
    told.remember("another zebra", user_id="ann")
    for _ in range(2):
        assert told.verify() == ["Permission denied"]
    monkeypatch.undo()
    assert told.verify() == []


def test_memory_that_the_index_lost_or_doubled_is_named(told):
    with told.sql.connect() as connection:
        ids = list(connection.scalars(text("SELECT id FROM memories ORDER BY id")))
    index = told._indexing.index
    index.delete(ids[:1])
    index.add(index.rows(f"id = '{ids[1]}'", 1))
    assert told.verify() == [
        f"memory {ids[0]}: it is not in the index; run `nightschool memory rebuild`",
        f"memory {ids[1]}: the index has it 2 times",
    ]
    told.rebuild_index()
    assert told.verify() == []
