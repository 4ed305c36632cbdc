"""What was forgotten does not come back with a file, and what is said anew does."""

from __future__ import annotations

import pytest
from nightschool.memory.tables import TombstoneRow
from sqlalchemy import func, select
from sqlalchemy.orm import Session

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "my code is 8842"}]
REPLY = {"role": "assistant", "content": "Noted."}
MORE = [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "Done."}]
LATER = [{"role": "user", "content": "and the weather?"}, {"role": "assistant", "content": "Fine."}]


def brought(store, messages, session="s", user="ann", **more):
    return store.record_conversation(messages, user_id=user, session_id=session, created_utc=1.0, **more)


def said(store):
    return [(i.position, i.text) for i in store.interactions()]


def erase(store, **selection):
    return store.forget_apply(store.forget(**selection))


def tombstones(store):
    with Session(store.sql) as session:
        return session.scalars(select(func.count()).select_from(TombstoneRow)).one()


def test_forgotten_turn_is_left_out_counted_and_the_rest_comes_in(quick_store):
    brought(quick_store, [*ASKED, REPLY])
    erase(quick_store, user_id="ann")
    again = brought(quick_store, [*ASKED, REPLY, *LATER])
    assert (again.new, again.known, again.forgotten, again.errors) == (1, 0, 1, {})
    assert said(quick_store) == [(1, "and the weather?")]
    assert quick_store.verify() == []


@pytest.mark.parametrize(
    ("held", "again"),
    [
        ([*ASKED], [*ASKED, REPLY]),
        ([*ASKED, REPLY], [*ASKED]),
        ([*ASKED, REPLY], [*ASKED, {"role": "assistant", "content": "Another answer."}]),
        ([*ASKED], [*ASKED, {"role": "user", "content": "hello?"}, REPLY]),
        ([*ASKED, {"role": "user", "content": "hello?"}, REPLY], [*ASKED]),
    ],
)
def test_other_copy_of_a_forgotten_turn_stays_out_too(quick_store, held, again):
    brought(quick_store, held)
    erase(quick_store, user_id="ann")
    assert brought(quick_store, again).forgotten == 1
    assert said(quick_store) == []


@pytest.mark.parametrize("elsewhere", [{"session": "t"}, {"user": "bob"}, {"agent_id": "x"}])
def test_same_words_elsewhere_and_other_words_there_come_in(quick_store, elsewhere):
    brought(quick_store, [*ASKED, REPLY])
    erase(quick_store, user_id="ann")
    assert brought(quick_store, [*ASKED, REPLY], **elsewhere).new == 1
    assert brought(quick_store, [ASKED[0], *LATER]).new == 1
    assert quick_store.verify() == []


def test_same_words_later_in_the_session_come_in(quick_store):
    brought(quick_store, [*ASKED, REPLY])
    erase(quick_store, user_id="ann")
    assert brought(quick_store, [*LATER, *ASKED, REPLY]).new == 2


def test_turn_without_words_of_the_user_is_known_by_its_id(quick_store):
    brought(quick_store, [REPLY, *LATER])
    greeting = next(quick_store.interactions())
    erase(quick_store, interaction_ids=[greeting.id])
    assert brought(quick_store, [REPLY, *LATER]).forgotten == 1
    assert brought(quick_store, [{"role": "assistant", "content": "Hello!"}, *LATER]).new == 1


def test_turn_of_tools_does_not_bring_the_forgotten_request_back(quick_store, bytes_in_home):
    brought(quick_store, [*ASKED, REPLY])
    erase(quick_store, user_id="ann")
    assert brought(quick_store, [*ASKED, REPLY, *MORE, *LATER]).new == 2
    assert said(quick_store) == [(1, ""), (2, "and the weather?")]
    assert bytes_in_home(b"8842") == []
    assert quick_store.verify() == []


def test_review_of_a_forgotten_turn_is_left_out_with_it(quick_store):
    from nightschool.memory.conversations import Review

    reviews = {2: Review(rating=1)}
    brought(quick_store, [*ASKED, REPLY], reviews=reviews)
    erase(quick_store, user_id="ann")
    assert brought(quick_store, [*ASKED, REPLY], reviews=reviews).feedback_new == 0


def test_said_anew_it_is_kept_and_the_tombstone_lifted(quick_store):
    owner = {"user_id": "ann", "session_id": "s"}
    first = quick_store.record(ASKED, "Noted.", **owner)
    erase(quick_store, user_id="ann")
    assert tombstones(quick_store) == 1
    assert quick_store.record(ASKED, "Noted.", **owner).id == first.id
    assert tombstones(quick_store) == 0
    assert brought(quick_store, [*ASKED, REPLY]).known == 1


def test_note_made_anew_is_kept_and_the_tombstone_lifted(quick_store):
    note = quick_store.remember("a zebra", user_id="ann")
    erase(quick_store, memory_ids=[note.id])
    assert tombstones(quick_store) == 1
    assert quick_store.remember("a zebra", user_id="ann").id == note.id
    assert tombstones(quick_store) == 0


def test_tombstones_of_two_stores_have_nothing_in_common(settings, tmp_path, hash_embedder):
    from dataclasses import replace

    from nightschool.memory.store import MemoryStore

    keys = []
    for name in ("one", "two"):
        with MemoryStore(replace(settings, home=tmp_path / name), embedder=hash_embedder) as store:
            brought(store, [*ASKED, REPLY])
            erase(store, user_id="ann")
            with Session(store.sql) as session:
                keys.append(set(session.scalars(select(TombstoneRow.key))))
    assert len(keys[0]) == len(keys[1]) == 1
    assert keys[0].isdisjoint(keys[1])
