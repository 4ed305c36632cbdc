from __future__ import annotations

import sqlite3
import subprocess
import sys
import traceback
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from string import ascii_letters
from threading import Event, Thread
from time import sleep
from uuid import uuid4

import numpy as np
import pytest
from nightschool.errors import InputError, NotFound, Overtaken, SettingsError, StoreError
from nightschool.memory import database
from nightschool.memory.conversations import Conversation, Owner, Review, draft_id, turn_memory_id
from nightschool.memory.database import Database, file_of, open_engine
from nightschool.memory.rows import IDS_A_QUERY
from nightschool.memory.store import MemoryStore
from nightschool.memory.tables import SnapshotRow, SnapshotSourceRow
from nightschool.memory.topic_rows import states
from nightschool.memory.types import Draft
from nightschool.pipelines.lock import NIGHT_LOCK, NightRunning, night_lock
from nightschool.settings import DatasetSettings, MemorySettings, Settings
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import OperationalError

POSTGRES = "postgresql+psycopg://127.0.0.1:5432/test"
ANN = {"user_id": "ann", "session_id": "s"}
OWNER = Owner("ann", "", "s")


def user(words):
    return {"role": "user", "content": words}


def said(store, words, reply="ok", **owner):
    return store.record([user(words)], reply, **(ANN | owner))


def conversation(*words, owner=OWNER, reviews=None):
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": w} for n, w in enumerate(words))
    return Conversation(owner, messages, tuple(float(n) for n in range(len(words))), reviews or {})


# -- recording ---


def test_recorded_turn_is_read_back_as_it_was(quick_store):
    turn = [{"role": "system", "content": "be kind"}, user("it's \"odd\" \u202e🧑 '; --")]
    made = quick_store.record(turn, "réply", **ANN, agent_id="a", adapter_id="b2:1", memory_ids=["m"], created_utc=12.5)
    assert quick_store.interaction(made.id) == made
    assert (made.turn, made.text, made.reply) == (tuple(turn), turn[1]["content"], "réply")
    assert (made.adapter_id, made.memory_ids, made.created_utc, made.position) == ("b2:1", ("m",), 12.5, 0)


def test_turns_of_a_session_follow_each_other_and_sessions_are_apart(quick_store, clock):
    positions = [said(quick_store, "one").position, said(quick_store, "two").position]
    assert positions == [0, 1]
    assert said(quick_store, "one", session_id="other").position == 0
    assert said(quick_store, "one", agent_id="a").position == 0
    assert said(quick_store, "three").created_utc == clock.now


def test_same_turn_twice_is_two_interactions(quick_store):
    assert said(quick_store, "yes").id != said(quick_store, "yes").id


def test_what_is_said_later_is_later_where_a_clock_was_set_back(quick_store, clock):
    said(quick_store, "I live in Oslo.")
    clock.now -= 10
    moved = said(quick_store, "I moved to Rome.")
    assert moved.created_utc == clock.now + 10
    assert [m.text for m in quick_store.history(user_id="ann") if m.valid_to is None] == ["I moved to Rome."]
    assert said(quick_store, "hi", created_utc=clock.now - 5).created_utc == clock.now - 5  # as it was given


def test_latest_interactions_are_of_that_session_in_order(quick_store):
    assert quick_store.latest_interactions("ann", "", "s", 2) == []
    said(quick_store, "hi", "hello")
    second = said(quick_store, "weather?", "rain")
    said(quick_store, "bye", "bye")
    said(quick_store, "three", session_id="other")
    assert [i.text for i in quick_store.session_of(second.id)] == ["hi", "weather?", "bye"]
    assert [i.text for i in quick_store.latest_interactions("ann", "", "s", 2)] == ["weather?", "bye"]
    assert [i.text for i in quick_store.latest_interactions("ann", "", "s", 9)] == ["hi", "weather?", "bye"]


def test_turn_of_tools_has_text_topic_and_vector_of_its_request_and_a_memory_of_its_reply(quick_store):
    asked = said(quick_store, "weather in Leeds?", "[calls]")
    answer = quick_store.record([{"role": "tool", "content": "rain"}], "It rains.", **ANN)
    assert (answer.text, answer.topic_id) == (asked.text, asked.topic_id)
    quick_store.record([], " ", **ANN)
    quick_store.record([{"role": "tool", "content": "7 degrees"}], '{"tool_calls":[{"id":"1"}]}', **ANN)
    assert quick_store.counts()["memories"] == 2
    assert "It rains." in [found.memory.text for found in quick_store.recall("It rains.", user_id="ann")]
    vectors = quick_store.request_vectors([asked.id, answer.id])
    np.testing.assert_array_equal(vectors[asked.id], vectors[answer.id])
    assert quick_store.verify() == []


def test_turns_of_tools_in_a_batch_inherit_from_the_batch_and_from_before_it(quick_store):
    def told(*roles):
        messages = tuple({"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles))
        return Conversation(OWNER, messages, (0.0,) * len(messages))

    start = ("user", "assistant", "tool", "assistant", "tool", "assistant")
    quick_store.record_many([told(*start)])
    quick_store.record_many([told(*start, "tool", "assistant", "tool", "assistant")])
    assert len({(i.text, i.topic_id) for i in quick_store.interactions()}) == 1
    assert quick_store.counts()["interactions"] == 5
    assert quick_store.verify() == []


def test_requests_of_a_long_session_of_tools_are_looked_up_in_one_pass(quick_store, executed):
    asked = said(quick_store, "weather in Leeds?", "[calls]")
    answers = [quick_store.record([{"role": "tool", "content": f"{n}"}], f"It is {n}.", **ANN) for n in range(8)]
    with executed(quick_store) as of_one:
        quick_store.request_vectors([answers[0].id])
    with executed(quick_store) as of_all:
        vectors = quick_store.request_vectors([i.id for i in answers])
    assert vectors.keys() == {i.id for i in answers} and {i.topic_id for i in answers} == {asked.topic_id}
    assert len(of_all) == len(of_one)


def test_greeting_has_neither_topic_nor_vector(quick_store):
    greeting = quick_store.record([], "How can I help?", **ANN)
    assert (greeting.text, greeting.topic_id) == ("", None)
    assert quick_store.request_vectors([greeting.id]) == {}
    assert quick_store.verify() == []


def test_vector_is_of_the_request_and_not_of_the_reply(quick_store, hash_embedder):
    made = said(quick_store, "weather in Leeds", "a long reply with other words")
    (vector,) = quick_store.request_vectors([made.id]).values()
    np.testing.assert_allclose(vector, hash_embedder.embed(["weather in Leeds"])[0], atol=1e-6)


def test_interactions_of_everybody_come_in_order_also_over_pages(quick_store, monkeypatch):
    monkeypatch.setattr("nightschool.memory.reading.ROWS_A_PAGE", 2)
    for name, session in [("bob", "2"), ("ann", "2"), ("ann", "1"), ("bob", "2"), ("ann", "1")]:
        said(quick_store, "hi", user_id=name, session_id=session)
    places = [(i.user_id, i.session_id, i.position) for i in quick_store.interactions()]
    assert places == [("ann", "1", 0), ("ann", "1", 1), ("ann", "2", 0), ("bob", "2", 0), ("bob", "2", 1)]


def test_missing_interaction_is_named(quick_store):
    with pytest.raises(NotFound, match="b2:gone"):
        quick_store.interaction("b2:gone")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"turn": [user("a\ud800")]}, "message 0: content holds half of a surrogate pair"),
        ({"reply": "\0"}, "reply holds a NUL"),
        ({"user_id": ""}, "user_id is empty"),
        ({"created_utc": float("nan")}, "created_utc is not a finite number"),
    ],
)
def test_refused_turn_names_the_field_and_leaves_nothing(quick_store, change, reason):
    given = {"turn": [user("hi")], "reply": "ok", **ANN} | change
    with pytest.raises(InputError, match=reason):
        quick_store.record(given.pop("turn"), given.pop("reply"), **given)
    assert quick_store.counts()["interactions"] == 0


def test_enormous_message_is_stored_recalled_and_given_back(quick_store):
    enormous = "zebra " + "word " * 70_000
    made = said(quick_store, enormous)
    assert quick_store.interaction(made.id).text == enormous
    assert quick_store.recall("zebra", user_id="ann", threshold=0)[0].memory.source_ids == (made.id,)


# -- whole conversations ---


def test_conversation_kept_twice_is_known_the_second_time(quick_store):
    first = quick_store.record_many([conversation("hi", "hello", "bye", "bye")])
    again = quick_store.record_many([conversation("hi", "hello", "bye", "bye")])
    assert (first.new, first.known, again.new, again.known) == (2, 0, 0, 2)
    assert quick_store.verify() == []


def test_kept_conversation_has_the_ids_that_live_turns_have(quick_store):
    quick_store.record_many([conversation("hi", "hello", "bye", "good bye")])
    kept = [i.id for i in quick_store.interactions()]
    live = [
        said(quick_store, "hi", "hello", session_id="t").id,
        said(quick_store, "bye", "good bye", session_id="t").id,
    ]
    quick_store.forget_apply(quick_store.forget(session_id="s"))
    quick_store.forget_apply(quick_store.forget(session_id="t"))
    assert kept == [said(quick_store, "hi", "hello").id, said(quick_store, "bye", "good bye").id] != live


def test_grown_conversation_replaces_its_unanswered_end(quick_store):
    quick_store.record_many([conversation("hi", "hello", "dogs?")])
    note = quick_store.remember("Ann asks about dogs", user_id="ann", source_ids=[_last(quick_store).id])
    quick_store.remember("free", user_id="ann")
    recorded = quick_store.record_many([conversation("hi", "hello", "dogs?", "yes, two", "cats?")])
    assert (recorded.new, recorded.known) == (2, 1)
    assert [i.reply for i in quick_store.interactions()] == ["hello", "yes, two", ""]
    dogs = next(i for i in quick_store.interactions() if i.text == "dogs?")
    assert quick_store.memories([note.id])[note.id].source_ids == (dogs.id,)
    assert quick_store.verify() == []


def test_older_copy_after_the_grown_one_changes_nothing(quick_store):
    quick_store.record_many([conversation("hi", "hello", "dogs?", "yes")])
    assert quick_store.record_many([conversation("hi", "hello", "dogs?")]).new == 0
    assert quick_store.counts()["interactions"] == 2


def test_conversation_that_grows_twice_within_a_batch_is_kept_once(quick_store):
    versions = [conversation("hi"), conversation("hi", "hello", "bye"), conversation("hi", "hello", "bye", "bye")]
    quick_store.record_many(versions[:1])
    recorded = quick_store.record_many([*versions[1:2], *versions, *versions[1:]])
    assert [i.reply for i in quick_store.interactions()] == ["hello", "bye"]
    assert (recorded.new, recorded.errors) == (2, {})
    assert quick_store.verify() == []


def test_unanswered_turn_that_grows_twice_in_a_batch_is_replaced_by_the_last(quick_store):
    def ending(*words):
        messages = tuple(user(w) for w in words)
        return Conversation(Owner("ann", "", "s"), messages, (0.0,) * len(words))

    quick_store.record_many([ending("one")])
    quick_store.record_many([ending("one", "two"), ending("one", "two", "three")])
    assert [i.text for i in quick_store.interactions()] == ["three"]
    assert quick_store.verify() == []


def test_replies_that_were_shown_an_unanswered_turn_and_snapshots_made_of_it_follow_its_successor(quick_store):
    quick_store.record_many([conversation("hi", "hello", "dogs?")])
    asked = _last(quick_store)
    (shown,) = (m for m in quick_store.memories([turn_memory_id(asked.id)]))
    told = quick_store.record([user("bye")], "good bye", user_id="ann", session_id="t", memory_ids=[shown])
    with quick_store.database.writing() as session:
        session.add(SnapshotRow(id="b2:s", rows=[], excluded=[], created_utc=0.0))
        session.flush()
        session.add(SnapshotSourceRow(snapshot_id="b2:s", interaction_id=asked.id))
    quick_store.record_many([conversation("hi", "hello", "dogs?", "yes, two")])
    dogs = next(i for i in quick_store.interactions() if i.text == "dogs?")
    assert quick_store.interaction(told.id).memory_ids == (turn_memory_id(dogs.id),)
    assert quick_store.forget(interaction_ids=[dogs.id]).tainted_snapshots == ("b2:s",)


def test_unanswered_turn_that_is_told_once_more_is_one_and_what_was_made_of_it_still_names_it(quick_store):
    said(quick_store, "hi")
    asked = said(quick_store, "dogs?", reply="")
    with quick_store.database.writing() as session:
        session.add(SnapshotRow(id="b2:s", rows=[], excluded=[], created_utc=0.0))
        session.flush()
        session.add(SnapshotSourceRow(snapshot_id="b2:s", interaction_id=asked.id))
    assert said(quick_store, "dogs?", reply="") == asked
    assert quick_store.forget(interaction_ids=[asked.id]).tainted_snapshots == ("b2:s",)
    more = said(quick_store, "or cats?", reply="")
    assert said(quick_store, "or cats?", reply="") == more and len(more.turn) == 2
    assert quick_store.verify() == []


def test_many_unanswered_turns_are_answered_in_as_many_statements_of_sql_as_a_few(quick_store, executed):
    def answered(user_id, count):
        places = [Owner(user_id, "", str(n)) for n in range(count)]
        asked, reply = user("Is it open?"), {"role": "assistant", "content": "Yes."}
        quick_store.record_many([Conversation(place, (asked,), (0.0,)) for place in places])
        first = next(i for i in quick_store.newest(1, user_id=user_id))
        note = quick_store.remember(f"{user_id} asks", user_id=user_id, source_ids=[first.id])
        with executed(quick_store) as statements:
            quick_store.record_many([Conversation(place, (asked, reply), (0.0, 0.0)) for place in places])
        (source,) = quick_store.memories([note.id])[note.id].source_ids
        assert quick_store.interaction(source).reply == "Yes."
        return len(statements)

    assert answered("ann", 5) == answered("bo", 60)
    assert quick_store.verify() == []


def test_time_that_lies_ahead_is_refused_since_no_night_would_teach_it(quick_store, clock):
    ahead = {"created_utc": clock.now * 1000}
    made = said(quick_store, "hi", created_utc=clock.now + 3600)
    messages = [user("hi"), {"role": "assistant", "content": "hello"}]
    for keep in (
        lambda: quick_store.record([user("hi")], "hello", **ANN, **ahead),
        lambda: quick_store.record_conversation(messages, user_id="ann", session_id="t", **ahead),
        lambda: quick_store.remember("a note", user_id="ann", **ahead),
        lambda: quick_store.rate(made.id, rating=1, **ahead),
    ):
        with pytest.raises(InputError, match=r"created_utc is 17\d+.*more than a day ahead.*milliseconds"):
            keep()
    assert quick_store.counts()["interactions"] == 1 and quick_store.feedback() == {}


def test_turn_that_left_and_one_that_came_are_seen_by_a_process_that_had_loaded_the_topics(settings, embedder, clock):
    given = {"embedder": embedder, "clock": clock}
    with MemoryStore(settings, **given) as one, MemoryStore(settings, **given) as other:
        founder = said(one, "When do you open the shop on Monday?")
        said(one, "When do you open the shop on Monday, please?")
        said(one, "My bicycle has a flat tyre.")
        one.forget_apply(one.forget(interaction_ids=[founder.id]))
        said(other, "My bicycle has a flat tyre again.")
        said(one, "When do you open the shop on Mondays?")
        assert one.verify() == other.verify() == []
        assert sorted(t.label for t in one.topics(0)) == sorted(t.label for t in other.topics(0))


def test_processes_that_record_in_turns_load_what_the_other_moved_and_no_other_topic(
    settings, hash_embedder, clock, monkeypatch
):
    loaded = []
    monkeypatch.setattr(
        "nightschool.memory.topic_rows.states", lambda *given: loaded.append(len(found := states(*given))) or found
    )
    given = {"embedder": hash_embedder, "clock": clock}
    with MemoryStore(settings, **given) as one, MemoryStore(settings, **given) as other:
        for n in range(30):
            said(one, f"apple{n} pear{n} plum{n}", session_id=str(n))
        said(other, "apple0 pear0 plum0")
        assert loaded == [0, 30]
        said(one, "apple1 pear1 plum1 fig1", session_id="x")
        said(other, "a new thing", session_id="y")
        said(one, "a new thing", session_id="z")
        assert loaded == [0, 30, 1, 1, 1]
        assert one.verify() == other.verify() == []
        one.forget_apply(one.forget(user_id="ann", session_id="1"))
        said(other, "apple2 pear2 plum2", session_id="u")
        assert loaded[-1] == 31
        assert one.verify() == other.verify() == []


def test_reply_names_no_memory_of_the_unanswered_turn_whose_place_it_takes(quick_store):
    unanswered, note = said(quick_store, "the long story", reply=""), quick_store.remember("a note", user_id="ann")
    shown = {"memory_ids": [turn_memory_id(unanswered.id), note.id], "after": [unanswered.id]}
    made = quick_store.record([user("and now?")], "ok", **ANN, **shown)
    assert made.memory_ids == quick_store.interaction(made.id).memory_ids == (note.id,)
    assert [m["content"] for m in made.turn] == ["the long story", "and now?"]


@pytest.mark.parametrize("shared", [1, 0, "no", None])
def test_note_is_shared_by_a_bool_alone(quick_store, shared):
    with pytest.raises(InputError, match=f"shared is {shared!r}; give True or False"):
        quick_store.remember("a note", user_id="ann", shared=shared)


def test_live_turn_after_an_unanswered_one_takes_it_in(quick_store):
    quick_store.record_many([conversation("hi", "hello", "thanks")])
    made = quick_store.record([{"role": "tool", "content": "clock: 12"}], "It is noon.", **ANN)
    assert (made.position, made.text, made.turn[0]) == (1, "thanks", user("thanks"))
    assert quick_store.counts()["interactions"] == 2
    assert quick_store.verify() == []


def test_empty_reply_with_feedback_is_not_taken_in(quick_store):
    empty = said(quick_store, "hi", "")
    quick_store.rate(empty.id, rating=-1)
    assert said(quick_store, "hello?").position == 1
    recorded = quick_store.record_many([conversation("hi", "hello")])
    assert "position 0" in str(recorded.errors[0])


def test_empty_reply_rated_in_the_same_batch_is_not_replaced(quick_store):
    rated = conversation("hi", "", reviews={1: Review(rating=-1)})
    recorded = quick_store.record_many([rated, conversation("hi", "hello")])
    assert (recorded.new, recorded.feedback_new, list(recorded.errors)) == (1, 1, [1])


def test_contradicting_conversation_is_left_out_whole_and_the_others_go_in(quick_store):
    quick_store.record_many([conversation("hi", "hello")])
    other = Owner("bob", "", "s")
    reviews = {3: Review(rating=1)}
    recorded = quick_store.record_many(
        [
            conversation("hi", "something else", "and", "more", reviews=reviews),
            conversation("hi", "hello", owner=other, reviews={1: Review(rating=1, correction="hello Bob")}),
            conversation("hi", "a\0b", owner=other._replace(session_id="t")),
        ]
    )
    assert (recorded.new, recorded.feedback_new, sorted(recorded.errors)) == (1, 1, [0, 2])
    assert "session 's' of user 'ann' has something else at position 0" in str(recorded.errors[0])
    assert "message 1: content holds a NUL" in str(recorded.errors[2])
    assert [i.user_id for i in quick_store.interactions()] == ["ann", "bob"]


def test_reviews_of_a_conversation_are_kept_once(quick_store):
    given = [conversation("hi", "hello", reviews={1: Review(rating=1)})]
    counted = [quick_store.record_many(given).feedback_new, quick_store.record_many(given).feedback_new]
    assert counted == [1, 0]
    given = [conversation("hi", "hello", reviews={1: Review(rating=-1)})]
    assert quick_store.record_many(given).feedback_new == 1


def test_one_conversation_can_be_kept_with_one_time_or_many(quick_store, clock):
    messages = [user("hi"), {"role": "assistant", "content": "hello"}]
    quick_store.record_conversation(messages, **ANN)
    quick_store.record_conversation(messages, **ANN | {"session_id": "t"}, created_utc=5.0)
    quick_store.record_conversation(messages, **ANN | {"session_id": "u"}, created_utc=[6, 7])
    assert [i.created_utc for i in quick_store.interactions()] == [clock.now, 5.0, 7.0]
    with pytest.raises(InputError, match="created_utc has 1 times for 2 messages"):
        quick_store.record_conversation(messages, **ANN, created_utc=[1])
    with pytest.raises(InputError, match="something else at position 0"):
        quick_store.record_conversation([user("ho")], **ANN)


def test_batch_embeds_each_text_once(settings, hash_embedder):
    with MemoryStore(settings, embedder=hash_embedder) as store:
        store.record_many([conversation("hi", "a", "hi", "b", "bye", "c")])
        store.record_many([conversation("hi", "a", "hi", "b", "bye", "c")])
    assert sorted(hash_embedder.embedded) == ["a", "b", "bye", "c", "hi"]


def test_many_sessions_in_one_batch(quick_store, monkeypatch):
    monkeypatch.setattr("nightschool.memory.writing.SESSIONS_A_QUERY", 3)
    given = [conversation("hi", "hello", owner=Owner("ann", "", str(n))) for n in range(10)]
    assert [quick_store.record_many(given).new, quick_store.record_many(given).known] == [10, 10]


def test_failed_write_leaves_neither_rows_nor_topics(quick_store, monkeypatch):
    said(quick_store, "dogs")
    monkeypatch.setattr("nightschool.memory.store.insert_reviews", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quick_store.record_many([conversation("cats", "yes", owner=Owner("bob", "", "s"))])
    monkeypatch.undo()
    assert (quick_store.counts()["interactions"], quick_store.counts()["topics"]) == (1, 1)
    said(quick_store, "cats", user_id="bob")
    assert quick_store.verify() == []


# -- feedback ---


def test_feedback_is_kept_by_interaction_oldest_first(quick_store, clock):
    made = said(quick_store, "hi")
    first = quick_store.rate(made.id, rating=1, comment="good")
    clock.now += 1
    second = quick_store.rate(made.id, correction="hello")
    assert quick_store.feedback() == {made.id: [first, second]}
    assert (first.rating, first.correction, first.comment, first.created_utc) == (1.0, None, "good", clock.now - 1)


def test_same_feedback_again_is_one_row_and_the_latest(quick_store, clock):
    made = said(quick_store, "hi")
    up = quick_store.rate(made.id, rating=1)
    clock.now += 1
    down = quick_store.rate(made.id, rating=-1)
    clock.now += 1
    assert quick_store.rate(made.id, rating=1).id == up.id
    assert [f.id for f in quick_store.feedback()[made.id]] == [down.id, up.id]


def test_feedback_with_its_own_time_changes_nothing_when_it_is_known(quick_store):
    made = said(quick_store, "hi")
    first = quick_store.rate(made.id, rating=1, created_utc=5)
    assert quick_store.rate(made.id, rating=1, created_utc=9) == first


def test_last_word_counts_also_where_the_clock_was_set_back(quick_store, clock):
    reply = said(quick_store, "hi", "hello")
    quick_store.rate(reply.id, rating=1)
    clock.now -= 1000
    quick_store.rate(reply.id, rating=-1)
    assert [f.rating for f in quick_store.feedback()[reply.id]] == [1, -1]
    quick_store.rate(reply.id, rating=1)
    assert [f.rating for f in quick_store.feedback()[reply.id]] == [-1, 1]


def test_reply_is_rated_by_whom_it_was_given_to(quick_store):
    reply = said(quick_store, "hi", "hello")
    with pytest.raises(NotFound, match="of user 'bob'; nothing was rated"):
        quick_store.rate(reply.id, rating=1, user_id="bob")
    assert quick_store.rate(reply.id, rating=1, user_id="ann").rating == 1


def test_conversation_without_a_session_is_refused(quick_store):
    with pytest.raises(InputError, match="session_id is empty"):
        quick_store.record_conversation([user("hi")], user_id="ann", session_id="")


def test_reply_is_not_kept_where_any_turn_that_it_was_shown_is_forgotten(quick_store):
    first, second = said(quick_store, "hi"), said(quick_store, "and?")
    quick_store.forget_apply(quick_store.forget(interaction_ids=[first.id]))
    with pytest.raises(Overtaken, match="forgotten meanwhile"):
        quick_store.record([user("so?")], "yes", **ANN, after=[first.id, second.id])
    assert quick_store.record([user("so?")], "yes", **ANN, after=[second.id]).position == 2


def test_error_of_the_database_shows_nothing_that_was_said(quick_store):
    secret, reply = "".join(["47", "11"]), said(quick_store, "hi")  # the source is a part of what is shown
    full = "CREATE TRIGGER full BEFORE INSERT ON feedback BEGIN SELECT RAISE(ABORT, 'no room'); END"
    with quick_store.sql.begin() as connection:
        connection.execute(text(full))
    with pytest.raises(StoreError) as error:
        quick_store.rate(reply.id, comment=secret)
    shown = "".join(traceback.format_exception(error.value))
    assert secret not in shown and "no room" in shown


def test_what_was_done_with_a_reply_is_feedback_of_its_own(quick_store, clock):
    made = said(quick_store, "hi")
    thumb, copied = quick_store.rate(made.id, rating=1), quick_store.rate(made.id, event="copied")
    edited = quick_store.rate(made.id, correction="hello", event="edited")
    assert sorted(quick_store.feedback()[made.id], key=lambda f: f.event or "") == [thumb, copied, edited]
    assert quick_store.rate(made.id, event="copied").id == copied.id
    assert quick_store.verify() == []


def test_feedback_on_nothing_or_with_nothing_in_it_is_refused(quick_store):
    with pytest.raises(NotFound, match="b2:gone"):
        quick_store.rate("b2:gone", rating=1)
    with pytest.raises(InputError, match="rating is 2"):
        quick_store.rate(said(quick_store, "hi").id, rating=2)
    assert quick_store.feedback() == {}


# -- notes ---


def test_note_that_is_replaced_is_recalled_as_of_before_alone(quick_store, clock):
    old = quick_store.remember("the bakery closes on Monday", user_id="ann")
    between = clock.now = clock.now + 1
    clock.now += 1
    new = quick_store.remember("the bakery closes on Friday", user_id="ann", replaces=old.id)

    def recalled(**when):
        return [r.memory.id for r in quick_store.recall("bakery", user_id="ann", threshold=0, **when)]

    assert recalled() == [new.id] and recalled(as_of=between) == [old.id]
    assert quick_store.memories([old.id])[old.id].valid_to == new.created_utc
    assert quick_store.verify() == []
    clock.now += 1
    again = quick_store.remember("the bakery closes on Monday", user_id="ann", replaces=new.id)
    assert (again.id, again.valid_to) == (old.id, None) and recalled() == [old.id]
    assert recalled(as_of=new.created_utc) == [new.id] and quick_store.verify() == []
    ended = quick_store.memories([new.id])[new.id].valid_to
    clock.now += 1
    quick_store.remember("the bakery closes on Sunday", user_id="ann", replaces=new.id)  # which was replaced before
    assert quick_store.memories([new.id])[new.id].valid_to == ended


def test_only_another_note_of_the_same_user_is_replaced(quick_store):
    note = quick_store.remember("the bakery closes on Monday", user_id="ann", shared=True)
    turn = turn_memory_id(said(quick_store, "hi").id)
    for user_id, replaces in (("bob", note.id), ("ann", turn), ("ann", "m:none")):
        with pytest.raises(NotFound, match=f"user '{user_id}' has no note {replaces}; the note was not kept"):
            quick_store.remember("on Friday", user_id=user_id, replaces=replaces)
    with pytest.raises(InputError, match="says the same"):
        quick_store.remember("the bakery closes on Monday", user_id="ann", shared=True, replaces=note.id)
    for how in ({"shared": False}, {"shared": True, "agent_id": "a"}):  # whoever else sees it would lose it
        with pytest.raises(InputError, match=f"the note {note.id} is shared; only one that is, too, replaces it"):
            quick_store.remember("on Friday", user_id="ann", replaces=note.id, **how)
    assert quick_store.memories([note.id])[note.id].valid_to is None and quick_store.counts()["memories"] == 2


def draft(interaction, text, *sources):
    named = draft_id(interaction.id, "base", text)
    return Draft(named, interaction.id, text, "base", (interaction.id, *(s.id for s in sources)), 5.0)


def test_drafts_are_kept_once_and_read_by_the_prompt_they_were_written_to(quick_store):
    first, second = said(quick_store, "hi"), said(quick_store, "and?")
    drafts = [draft(first, "one"), draft(first, "two"), draft(first, "one"), draft(second, "three", first)]
    assert quick_store.keep_drafts(drafts) == 3
    assert quick_store.keep_drafts(drafts) == 0
    held = quick_store.drafts([first.id, second.id, "b2:gone"])
    assert {i: {d.text for d in found} for i, found in held.items()} == {first.id: {"one", "two"}, second.id: {"three"}}
    assert held[second.id] == [drafts[-1]]
    assert quick_store.verify() == []


def test_draft_to_a_prompt_with_an_unanswered_turn_falls_with_it_once_it_is_answered(quick_store):
    quick_store.record_many([conversation("my PIN is 4711", "", "and?", "so")])
    first, second = quick_store.interactions()
    another = said(quick_store, "hello", session_id="t")
    assert quick_store.keep_drafts([draft(second, "your PIN is 4711", first), draft(another, "hello")]) == 2
    quick_store.record_many([conversation("my PIN is 4711", "noted", "and?", "so")])
    first = next(i for i in quick_store.interactions() if i.text == "my PIN is 4711")
    quick_store.forget_apply(quick_store.forget(interaction_ids=[first.id]))
    assert quick_store.drafts([second.id]) == {} and quick_store.verify() == []


def test_draft_to_a_prompt_of_which_anything_is_forgotten_is_not_kept(quick_store):
    first, second = said(quick_store, "hi"), said(quick_store, "and?")
    note = quick_store.remember("a zebra", user_id="ann")
    shown = quick_store.record(
        [{"role": "user", "content": "what?"}], "ok", user_id="ann", session_id="t", memory_ids=[note.id]
    )
    assert quick_store.keep_drafts([draft(shown, "a zebra is striped")]) == 1
    quick_store.forget_apply(quick_store.forget(interaction_ids=[first.id], memory_ids=[note.id]))
    assert quick_store.drafts([shown.id]) == {}
    gone = [draft(first, "one"), draft(second, "two", first), draft(shown, "a zebra is striped")]
    assert quick_store.keep_drafts(gone) == 0


def test_note_is_kept_once_by_owner_and_text(quick_store, clock):
    note = quick_store.remember("I like tea", user_id="ann", session_id="s")
    clock.now += 1
    assert quick_store.remember("I like tea", user_id="ann", session_id="t") == note
    others = [
        quick_store.remember("I like tea", user_id="bob"),
        quick_store.remember("I like tea", user_id="ann", agent_id="a"),
        quick_store.remember("I like tea", user_id="ann", shared=True),
    ]
    assert len({note.id, *(o.id for o in others)}) == 4
    assert quick_store.memories([note.id, "b2:gone"]) == {note.id: note}


def test_note_that_is_kept_again_has_the_sources_of_both_and_falls_with_either(quick_store):
    first, second = said(quick_store, "tea please"), said(quick_store, "tea again")
    quick_store.remember("likes tea", user_id="ann", source_ids=[first.id])
    note = quick_store.remember("likes tea", user_id="ann", source_ids=[first.id, second.id])
    assert note.source_ids == (first.id, second.id)
    with pytest.raises(NotFound, match="has no interaction b2:gone; the note was not kept"):
        quick_store.remember("likes tea", user_id="ann", source_ids=["b2:gone"])
    assert quick_store.verify() == []
    assert note.id in quick_store.forget(interaction_ids=[second.id]).memory_ids


def test_note_names_its_sources_which_must_be_of_its_user(quick_store):
    made = said(quick_store, "I like tea")
    assert quick_store.remember("tea", user_id="ann", source_ids=[made.id]).source_ids == (made.id,)
    for user_id, source in (("bob", made.id), ("ann", "b2:gone")):
        with pytest.raises(NotFound, match=f"user '{user_id}' has no interaction {source}"):
            quick_store.remember("something", user_id=user_id, source_ids=[source])
    with pytest.raises(InputError, match="text is blank"):
        quick_store.remember(" \n", user_id="ann")
    assert quick_store.verify() == []


# -- recall ---


def test_recall_finds_by_meaning_and_says_why(store):
    made = said(store, "My dog is called Rex and he is two years old", "What a lovely age!")
    said(store, "When does the swimming pool open on Mondays?", "At seven.")
    best, *rest = store.recall("how old is my puppy?", user_id="ann", threshold=0)
    assert best.memory.source_ids == (made.id,)
    assert best.memory.text == "My dog is called Rex and he is two years old\nWhat a lovely age!"
    assert best.score == pytest.approx(sum(best.parts.values()))
    assert best.score > rest[0].score


def test_recall_may_find_nothing(store):
    said(store, "My dog is called Rex")
    assert store.recall("quantum chromodynamics", user_id="ann") == []
    assert store.recall("  ", user_id="ann") == []


def test_recall_keeps_to_its_limit_and_folds_repeats(quick_store):
    for n in range(7):
        said(quick_store, f"zebra number {n}")
    for _ in range(3):
        said(quick_store, "Zebra!", session_id="t")
    assert len(quick_store.recall("zebra", user_id="ann", threshold=0)) == 5
    found = quick_store.recall("zebra", user_id="ann", threshold=0, limit=100)
    assert [r.memory.text.lower() for r in found].count("zebra!\nok") == 1
    assert len(found) == 8


def test_note_is_recalled_at_once_and_by_an_unusual_word(quick_store):
    filler = [word for n in range(300) for word in (f"filler {n}", "ok")]
    quick_store.record_many([conversation(*filler)])
    note = quick_store.remember("the code of the shed is xyzzy", user_id="ann")
    assert quick_store.recall("xyzzy", user_id="ann")[0].memory == note


# -- topics and counts ---


def test_topics_count_sessions_and_forget_with_time(quick_store, clock):
    for session in ("a", "b"):
        said(quick_store, "the opening hours", session_id=session)
        said(quick_store, "the opening hours", session_id=session)
    said(quick_store, "zebras", session_id="a")
    hours, zebras = quick_store.topics(clock.now)
    assert (hours.label, hours.sessions, hours.recurrence) == ("opening hours", 2, 2.0)
    assert (zebras.sessions, zebras.last_seen_utc) == (1, clock.now)
    later = clock.now + 30 * 86400
    assert quick_store.topics(later)[0].recurrence == pytest.approx(1.0)


def test_topics_are_counted_with_the_bound_on_one_user(settings, hash_embedder, clock):
    bounded = replace(settings, dataset=DatasetSettings(max_user_recurrence=2.0))
    with MemoryStore(bounded, embedder=hash_embedder, clock=clock) as store:
        for n in range(5):
            said(store, "the opening hours", session_id=f"s{n}", created_utc=clock.now)
        (topic,) = store.topics(clock.now)
    assert (topic.recurrence, topic.sessions) == (2.0, 5)


def test_topics_follow_what_another_process_wrote(quick_store, settings, hash_embedder):
    first = said(quick_store, "the opening hours")
    with MemoryStore(settings, embedder=hash_embedder) as other:
        second = said(other, "the opening hours", session_id="t")
        fresh = said(other, "zebras", session_id="t")
    third = said(quick_store, "zebras")
    assert (second.topic_id, third.topic_id) == (first.topic_id, fresh.topic_id)
    assert quick_store.verify() == []


def test_counts_are_of_everything(quick_store):
    quick_store.rate(said(quick_store, "hi").id, rating=1)
    said(quick_store, "hi", user_id="bob")
    said(quick_store, "hi", session_id="t")
    quick_store.remember("note", user_id="eve")
    assert quick_store.counts() == {
        "users": 2,
        "sessions": 3,
        "interactions": 3,
        "feedback": 1,
        "memories": 4,
        "topics": 1,
        "snapshots": 0,
        "adapters": 0,
    }


# -- several at once, and other databases ---


def test_threads_write_to_one_store_without_loss(quick_store):
    def talk(name):
        for n in range(5):
            said(quick_store, f"message {n}", user_id=name)

    threads = [Thread(target=talk, args=(name,)) for name in ("ann", "bob", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quick_store.counts()["interactions"] == 15
    assert quick_store.verify() == []


def test_processes_write_to_one_session_without_loss(settings, quick_store, make_embedder, tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(
        f"""
import sys; sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
from pathlib import Path
from conftest import HashEmbedder
from nightschool.memory.store import MemoryStore
from nightschool.settings import Settings
with MemoryStore(Settings(home=Path({str(tmp_path)!r})), embedder=HashEmbedder()) as store:
    for n in range(6):
        store.record([{{"role": "user", "content": f"message {{n}}"}}], sys.argv[1], user_id="ann", session_id="s")
"""
    )
    running = [subprocess.Popen([sys.executable, str(script), name]) for name in ("one", "two")]
    assert [process.wait(120) for process in running] == [0, 0]
    assert [i.position for i in quick_store.interactions()] == list(range(12))
    assert quick_store.verify() == []


def test_file_that_is_no_database_is_a_store_error(settings, hash_embedder):
    (settings.home / "nightschool.db").write_text("not a database, " * 100)
    with pytest.raises(StoreError, match=r"cannot open the database sqlite:.*nightschool.db: file is not a database"):
        MemoryStore(settings, embedder=hash_embedder)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://ann:cr%40et@127.0.0.1:1/none", "postgresql+psycopg://ann:***@127.0.0.1:1/none"),
        (
            "postgresql+psycopg://127.0.0.1:1/none?password=cr%26et&sslpassword=cr%2Bet&user=ann",
            "postgresql+psycopg://127.0.0.1:1/none?password=***&sslpassword=***&user=ann",
        ),
    ],
    ids=["of the user", "among the options"],
)
def test_password_of_the_database_is_not_shown(tmp_path, hash_embedder, url, shown):
    with pytest.raises(StoreError) as raised:
        MemoryStore(Settings(home=tmp_path, memory=MemorySettings(database_url=url)), embedder=hash_embedder)
    assert f"cannot open the database {shown}: " in str(raised.value) and "cr%" not in str(raised.value)


@pytest.mark.parametrize("url", ["mysql://ann:secret@h/d", "postgres://ann:secret@h/d", "nosuch+driver://h/d"])
def test_database_of_another_kind_is_refused_by_its_name(tmp_path, hash_embedder, url):
    with pytest.raises(SettingsError) as raised:
        MemoryStore(Settings(home=tmp_path, memory=MemorySettings(database_url=url)), embedder=hash_embedder)
    kind = url.split("://")[0].split("+")[0]
    assert str(raised.value) == f"memory.database_url is of {kind!r}; only sqlite and postgresql hold a memory"


@pytest.mark.parametrize(
    ("kind", "driver", "advice"),
    [
        ("postgresql", "psycopg", "pip install 'nightschool[postgres]'"),
        ("postgresql", "nosuch", "begin the URL with postgresql+psycopg://"),
        ("sqlite", "nosuch", "begin the URL with sqlite:///"),
    ],
)
def test_missing_driver_is_named_with_what_brings_one(tmp_path, monkeypatch, kind, driver, advice):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SettingsError) as raised:
        Database(f"{kind}+{driver}://ann:secret@h/d")
    assert driver in str(raised.value) and advice in str(raised.value) and "secret" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_home_is_made_and_is_for_its_owner_only(tmp_path, hash_embedder):
    home = tmp_path / "new" / "home"
    with MemoryStore(Settings(home=home), embedder=hash_embedder) as store:
        said(store, "hi")
        made = [home, *home.glob("nightschool.db*")]
        assert len(made) == 4 and not any(path.stat().st_mode & 0o077 for path in made)  # with the log and its index


def test_folder_and_database_that_were_there_keep_their_modes(tmp_path, hash_embedder):
    home, database = tmp_path / "shared", tmp_path / "shared" / "nightschool.db"
    home.mkdir(mode=0o750)
    database.touch(mode=0o640)
    with MemoryStore(Settings(home=home), embedder=hash_embedder):
        assert [path.stat().st_mode & 0o777 for path in (home, database)] == [0o750, 0o640]


def test_database_without_a_file_is_looked_for_in_no_folder():
    for url in ("sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true", "postgresql+psycopg://h/d"):
        assert file_of(url) is None
    assert file_of("sqlite:////var/x.db") == Path("/var/x.db")


@contextmanager
def postgres_schema():
    name = "nightschool_" + uuid4().hex
    engine = create_engine(POSTGRES, connect_args={"connect_timeout": 3})
    try:
        with engine.begin() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
    except OperationalError as error:
        pytest.skip(f"no PostgreSQL answers at {POSTGRES}: {str(error.orig).splitlines()[0]}")
    try:
        yield f"{POSTGRES}?options=-csearch_path%3D{name}"
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
        engine.dispose()


@pytest.mark.postgres
def test_server_that_is_cut_off_is_not_waited_for_by_the_hour():
    with postgres_schema() as url:
        engine = open_engine(f"{url}&connect_timeout=7")
        with engine.connect() as connection:
            given = connection.connection.dbapi_connection.info.get_parameters()
        engine.dispose()
    assert (given["connect_timeout"], given["tcp_user_timeout"]) == ("7", "60000")  # what the URL names stands


@pytest.mark.postgres
def test_everything_works_on_postgresql_by_url_alone(tmp_path, hash_embedder, clock):
    with postgres_schema() as url:
        settings = Settings(home=tmp_path, memory=MemorySettings(database_url=url))
        for _ in range(2):
            with MemoryStore(settings, embedder=hash_embedder, clock=clock) as store:
                recorded = store.record_many(
                    [
                        conversation("the dog", "ok", "the cat", reviews={1: Review(rating=1)}),
                        conversation("the dog", "ok", "the cat", "yes", owner=Owner("bob", "", "s")),
                    ]
                )
        assert (recorded.new, recorded.known, recorded.feedback_new) == (0, 4, 0)
        with MemoryStore(settings, embedder=hash_embedder, clock=clock) as store:
            live = said(store, "the bird 🐦", "it sings")
            store.rate(live.id, rating=-1)
            store.remember("Ann has a dog", user_id="ann", source_ids=[live.id])
            assert [i.position for i in store.interactions()] == [0, 1, 0, 1]
            assert store.recall("bird", user_id="ann")[0].memory.source_ids == (live.id,)
            assert store.request_vectors([live.id]).keys() == {live.id}
            assert sorted(topic.sessions for topic in store.topics(clock.now)) == [1, 1, 2]
            assert store.verify() == []
            assert store.rebuild_index() == 5
            path, _ = store.export()
            carried = path.rename(tmp_path / "mine.jsonl")
            assert store.restore(carried).known["interaction"] == 4
            store.compact()
            receipt = store.forget_apply(store.forget(user_id="ann"))
            assert (receipt.interactions, receipt.memories, receipt.feedback) == (2, 3, 2)
            assert store.restore(carried).forgotten == 5
            assert store.counts()["interactions"] == 2
            assert store.verify() == []
            assert not (tmp_path / "nightschool.db").exists()


@pytest.mark.postgres
def test_who_cannot_write_for_long_is_told_so_on_postgresql_too(tmp_path, hash_embedder, monkeypatch):
    monkeypatch.setattr(database, "WAIT_S", 0.5)
    with postgres_schema() as url:
        settings = Settings(home=tmp_path, memory=MemorySettings(database_url=url))
        with MemoryStore(settings, embedder=hash_embedder) as store:
            other = Database(url)
            with other.writing() as session:
                session.execute(text("SELECT 1"))  # a transaction begins with what it does first
                with pytest.raises(StoreError, match="lock timeout"):
                    said(store, "the dog")
            other.close()
            said(store, "the cat")
            assert [i.text for i in store.interactions()] == ["the cat"]


def _last(store):
    return list(store.interactions())[-1]


@pytest.mark.postgres
def test_one_night_at_a_time_in_a_database_that_two_homes_share(tmp_path):
    with postgres_schema() as url:
        one, two = Database(url), Database(url)
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        with (
            night_lock(tmp_path / "one", one),
            pytest.raises(NightRunning, match="another home runs a night"),
            night_lock(tmp_path / "two", two),
        ):
            pass
        with night_lock(tmp_path / "two", two):
            pass
        one.close()
        two.close()


@pytest.mark.parametrize(
    "other", ["sqlite:///{}", "sqlite:///file:{}?uri=true", "sqlite:///file://localhost{}?mode=rw&uri=true"]
)
def test_one_night_at_a_time_in_an_sqlite_database_that_two_homes_share(tmp_path, other):
    one, two = (Database(url.format(tmp_path / "shared.db")) for url in ("sqlite:///{}", other))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with night_lock(tmp_path / "one", one) as still_alone:
        with pytest.raises(NightRunning, match="another home runs a night"), night_lock(tmp_path / "two", two):
            pass
        still_alone()
    with night_lock(tmp_path / "two", two):
        pass
    one.close()
    two.close()


@contextmanager
def looking(home, url):
    """Another home of the database asks whether a night runs, which takes it half a second."""
    begun = Event()

    def look():
        database = Database(url)
        with night_lock(home, database):
            begun.set()
            sleep(0.5)
        database.close()

    looks = Thread(target=look)
    looks.start()
    assert begun.wait(60)
    yield
    looks.join()


def test_night_waits_for_another_home_of_its_sqlite_database_that_only_looks(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    _wait_for_the_other(tmp_path, url)


@pytest.mark.postgres
def test_night_waits_for_another_home_of_its_postgresql_that_only_looks(tmp_path):
    with postgres_schema() as url:
        _wait_for_the_other(tmp_path, url)


def _wait_for_the_other(tmp_path, url):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    database = Database(url)
    with looking(tmp_path / "one", url), night_lock(tmp_path / "two", database) as still_alone:
        still_alone()
    database.close()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///file::memory:?uri=true",
        "sqlite:///file:/one?vfs=memdb&uri=true",
    ],
)
def test_database_in_working_memory_has_no_lock_beside_it(tmp_path, url):
    one = Database(url)
    with night_lock(tmp_path, one) as still_alone:
        still_alone()
        assert not [*tmp_path.glob("*.night.lock"), *Path().glob("*.night.lock"), *Path("/").glob("*.night.lock")]
    one.close()


def _cut_the_night(database):
    held = f"SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = {NIGHT_LOCK}"
    with database.writing() as session:
        cut = session.scalars(text(f"SELECT pg_terminate_backend(pid, 30000) FROM ({held}) AS held"))
        assert list(cut) == [True]


@pytest.mark.postgres
def test_night_whose_lock_was_lost_has_it_again_if_nobody_else_took_it(tmp_path):
    with postgres_schema() as url:
        one, two = Database(url), Database(url)
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        with night_lock(tmp_path / "one", one) as still_alone:
            for _ in range(2):
                _cut_the_night(two)
                still_alone()
            with pytest.raises(NightRunning, match="another home runs a night"), night_lock(tmp_path / "two", two):
                pass
        with night_lock(tmp_path / "two", two):
            pass
        one.close()
        two.close()


@pytest.mark.postgres
def test_lock_that_was_lost_with_the_whole_server_is_not_had_again(tmp_path, monkeypatch):
    def refused(_):
        raise OperationalError("", {}, Exception("connection refused"))

    with postgres_schema() as url:
        one, two = Database(url), Database(url)
        with night_lock(tmp_path, one) as still_alone:
            _cut_the_night(two)
            with monkeypatch.context() as patch:
                patch.setattr(Engine, "connect", refused)
                with pytest.raises(NightRunning, match="was lost"):
                    still_alone()
            with pytest.raises(NightRunning, match="was lost"):  # another may have begun and ended meanwhile
                still_alone()
        one.close()
        two.close()


@pytest.mark.postgres
def test_night_whose_lock_was_lost_with_its_connection_is_told(tmp_path):
    with postgres_schema() as url:
        one, two = Database(url), Database(url)
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        with night_lock(tmp_path / "one", one) as still_alone:
            still_alone()
            _cut_the_night(two)
            with night_lock(tmp_path / "two", two):
                for _ in range(2):
                    with pytest.raises(NightRunning, match="was lost"):
                        still_alone()
        one.close()
        two.close()


def test_turn_that_comes_back_in_front_of_tools_is_their_request_again(quick_store):
    first = said(quick_store, "weather in Leeds?", "[calls]")
    quick_store.record([{"role": "tool", "content": "rain"}], "It rains.", **ANN)
    quick_store.forget_apply(quick_store.forget(interaction_ids=[first.id]))
    messages = [("user", "weather in York?"), ("assistant", "[calls]"), ("tool", "rain"), ("assistant", "It rains.")]
    given = [{"role": role, "content": content} for role, content in messages]
    assert quick_store.record_conversation(given, **ANN).new == 1
    assert [i.text for i in quick_store.interactions()] == ["weather in York?"] * 2
    assert quick_store.verify() == []


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///:memory:?key=hidden"])
def test_database_that_every_thread_would_have_of_its_own_is_refused(tmp_path, hash_embedder, url):
    settings = Settings(home=tmp_path, memory=MemorySettings(database_url=url))
    with pytest.raises(SettingsError, match="name a file") as raised:
        MemoryStore(settings, embedder=hash_embedder)
    assert "hidden" not in str(raised.value)


def test_feedback_of_many_is_asked_for_in_parts(quick_store, executed):
    rated = said(quick_store, "a")
    quick_store.rate(rated.id, rating=1)
    with executed(quick_store) as statements:
        assert quick_store.feedback([*(f"b2:{n}" for n in range(IDS_A_QUERY)), rated.id]).keys() == {rated.id}
    assert sum("feedback" in statement for statement in statements) == 2


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"turn": [], "reply": ""}, "turn and reply are both empty"),
        ({"turn": [], "reply": "a", "adapter_id": "b" * 65}, "adapter_id has 65 characters; at most 64"),
    ],
)
def test_what_is_no_turn_is_refused(quick_store, given, reason):
    with pytest.raises(InputError, match=reason):
        quick_store.record(given.pop("turn"), given.pop("reply"), **given, **ANN)
    assert quick_store.counts()["interactions"] == 0


@pytest.mark.postgres
def test_long_names_have_room_on_postgresql_and_its_isolation_is_ours(tmp_path, hash_embedder):
    with postgres_schema() as url:
        loose = url + "%20-cdefault_transaction_isolation%3Drepeatable%5C%20read"
        settings = Settings(home=tmp_path, memory=MemorySettings(database_url=loose))
        with MemoryStore(settings, embedder=hash_embedder) as store:
            names = ["".join(Random(n).choices(ascii_letters, k=255)) for n in range(3)]  # nothing makes them smaller
            store.record([{"role": "user", "content": "a"}], "b", **dict(zip(OWNER._fields, names, strict=True)))
            with store.database.reading() as session:
                assert session.scalars(text("SHOW transaction_isolation")).one() == "read committed"
        with pytest.raises(InputError, match="user_id has 256 bytes"), MemoryStore(settings) as store:
            store.record([], "b", user_id="🐦" * 64, session_id="s")


def test_url_that_is_none_is_refused_without_showing_it(tmp_path):
    with pytest.raises(SettingsError, match="not one that SQLAlchemy can read") as raised:
        Database("ann:secret")
    assert "secret" not in str(raised.value)


def test_store_of_another_process_is_refused(quick_store, monkeypatch):
    monkeypatch.setattr(quick_store.database, "_process", -1)
    with pytest.raises(StoreError, match="before this process was forked"):
        said(quick_store, "a")
    monkeypatch.undo()


class Locked:
    """A connection to a file that another process is making."""

    def __init__(self, *errors: str) -> None:
        self.errors, self.asked = list(errors), 0

    def execute(self, statement: str) -> None:
        self.asked += 1
        if self.errors:
            raise sqlite3.OperationalError(self.errors.pop(0))


def test_file_that_another_process_is_making_is_waited_for(monkeypatch):
    connection = Locked("database is locked", "database is locked")
    database._use_wal(connection)
    assert connection.asked == 3
    with pytest.raises(sqlite3.OperationalError, match="no space"):
        database._use_wal(Locked("no space left"))
    monkeypatch.setattr(database, "WAIT_S", 0.0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        database._use_wal(Locked("database is locked"))


def test_database_of_a_store_that_cannot_be_opened_is_closed(settings, hash_embedder, monkeypatch):
    closed, close = [], Database.close
    monkeypatch.setattr(Database, "close", lambda held: (closed.append(held), close(held)))
    monkeypatch.setattr(MemoryStore, "_finish", lambda held: held.sql.connect().exec_driver_sql("SELECT nothing"))
    with pytest.raises(OperationalError, match="nothing"):
        MemoryStore(settings, embedder=hash_embedder)
    assert len(closed) == 1
