"""What is read from SQL alone, without the embedder and the index."""

from __future__ import annotations

import pytest
from nightschool.errors import NotFound
from nightschool.memory import reading
from nightschool.memory.database import Database
from nightschool.memory.facts import Facts
from nightschool.memory.reading import LEAST_OF_ID


def said(store, words, session="s", user="ann"):
    return store.record([{"role": "user", "content": words}], "ok", user_id=user, session_id=session)


def test_facts_are_read_without_an_embedder_and_without_an_index(quick_store, settings):
    made = said(quick_store, "the opening hours")
    facts = Facts(Database(settings.database_url), settings, quick_store.embedder.dimension)
    assert list(facts.interactions()) == [made]
    assert facts.counts() == quick_store.counts()
    assert facts.topics(0.0) == quick_store.topics(0.0)
    assert not hasattr(facts, "recall")


def test_session_of_a_turn_is_all_of_it_in_order_and_of_nobody_else(quick_store):
    made = [said(quick_store, words) for words in ("zebras", "lions")]
    said(quick_store, "zebras", user="bob")
    assert quick_store.session_of(made[1].id) == made
    with pytest.raises(NotFound, match="no interaction b2:gone"):
        quick_store.session_of("b2:gone")


def test_no_id_begins_with_nothing(quick_store):
    said(quick_store, "zebras")
    with pytest.raises(NotFound, match="'' is too short to name an interaction"):
        quick_store.id_of("")


def test_founding_requests_are_given_for_turns_that_exist_and_are_about_something(quick_store):
    about = said(quick_store, "the opening hours")
    greeting = quick_store.record([], "Hello!", user_id="bob", session_id="s")
    assert quick_store.topic_requests([about.id, greeting.id, "b2:gone"]) == {about.id: "the opening hours"}
    assert quick_store.topic_requests([]) == {}


def test_every_narrow_topic_belongs_to_a_group_that_is_shown(quick_store):
    narrow = {said(quick_store, words).topic_id for words in ("the opening hours", "zebras", "a bicycle")}
    of = quick_store.topic_groups()
    assert of.keys() == narrow
    assert set(of.values()) == {topic.id for topic in quick_store.topics(0.0)}


def test_ids_of_memories_are_told_from_those_of_turns_and_of_nothing(quick_store):
    turn, note = said(quick_store, "zebras"), quick_store.remember("a zebra", user_id="ann")
    assert quick_store.sort_ids([note.id, turn.id, "b2:gone"]) == ((turn.id, "b2:gone"), (note.id,))


def test_latest_answers_come_newest_first_of_all_or_of_one_user(quick_store):
    for at, user in ((3.0, "ada"), (1.0, "bob"), (2.0, "ada")):
        turn = [{"role": "user", "content": f"at {at}"}]
        quick_store.record(turn, "yes", user_id=user, session_id=str(at), created_utc=at)
    assert [i.created_utc for i in quick_store.newest(2)] == [3.0, 2.0]
    assert [i.created_utc for i in quick_store.newest(9, user_id="bob")] == [1.0]
    assert quick_store.newest(9, user_id="eve") == []


def test_start_of_an_id_names_its_interaction_if_no_other_begins_so(quick_store, monkeypatch):
    with pytest.raises(NotFound, match=r"no interactions have an id that begins with 'b2:000000'.*audit answers"):
        quick_store.id_of("b2:000000")
    first = said(quick_store, "hi").id
    assert quick_store.id_of(first[:LEAST_OF_ID]) == quick_store.id_of(first) == first
    for start in ("b2:", first[: LEAST_OF_ID - 1], "%", "_2:"):  # though there is but one
        with pytest.raises(NotFound, match="is too short to name an interaction"):
            quick_store.id_of(start)
    monkeypatch.setattr(reading, "LEAST_OF_ID", 1)
    said(quick_store, "ho")
    with pytest.raises(NotFound, match="several interactions have an id that begins with 'b2:'"):
        quick_store.id_of("b2:")
    for pattern in ("%", "_2:"):
        with pytest.raises(NotFound, match="no interactions have"):
            quick_store.id_of(pattern)
