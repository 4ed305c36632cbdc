from __future__ import annotations

import re
import sys
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st
from nightschool.errors import InputError
from nightschool.memory.conversations import MOST_ASKED
from nightschool.memory.recalling import Filters
from nightschool.memory.store import MemoryStore
from nightschool.settings import MemorySettings, Settings

MODULE = "nightschool.memory.recalling"
DAY = 86400.0


def said(store, words, reply="ok", session="s", utc=None, user="ann"):
    turn = [{"role": "user", "content": words}]
    return store.record(turn, reply, user_id=user, session_id=session, created_utc=utc)


def texts(store, query="zebra", **asked):
    return [
        r.memory.text.removesuffix("\nok")
        for r in store.recall(query, **{"user_id": "ann", "threshold": 0.0, "limit": 99} | asked)
    ]


@pytest.fixture(params=[2000, 3], ids=["ranked whole", "larger than that"])
def either_store(request, quick_store, monkeypatch):
    """Both ways of looking: all of a small store, and the best of a large one."""
    monkeypatch.setattr(f"{MODULE}.RANKED_WHOLE", request.param)
    return quick_store


@pytest.fixture
def large_store(quick_store, monkeypatch):
    """Too large to be ranked whole: the best by cosine and the best by words are looked at, and what is around."""
    monkeypatch.setattr(f"{MODULE}.RANKED_WHOLE", 0)
    monkeypatch.setattr("nightschool.memory.store.CANDIDATES", 1)
    return quick_store


def test_what_the_assistant_said_is_found_too(store):
    for n in range(5):
        said(store, f"tell me about number {n}", f"Number {n} is nice.", session=f"t{n}")
    made = said(store, "and where do I eat", "The best ramen is at Ichiran in Shibuya.")
    assert store.recall("which ramen restaurant was it?", user_id="ann")[0].memory.source_ids == (made.id,)


def test_short_answer_is_found_by_its_question(store):
    said(store, "Which town does your sister live in now?", session="s")
    answer = said(store, "Leeds, since May.", session="s")
    for n in range(20):
        said(store, f"The weather was fine on day {n}.", session=f"t{n}")
    best = store.recall("Where does the sister live?", user_id="ann", limit=2, threshold=0.0)
    assert best[1].memory.source_ids == (answer.id,)
    assert best[1].parts["neighbours"] > 0


def test_day_is_found_by_its_name(quick_store):
    for n in range(8):
        said(quick_store, f"walk {n}", session=str(n), utc=1_683_554_400.0 - n * 400 * DAY)
    assert texts(quick_store, "which walk in May 2023", limit=1) == ["walk 0"]


def test_recall_is_narrowed_to_session_kind_and_time(either_store):
    for n in range(6):
        said(either_store, f"zebra {n}", session="s" if n < 3 else "t", utc=float(n))
    either_store.remember("zebra note", user_id="ann", session_id="t", created_utc=9.0)
    assert set(texts(either_store, session_id="t")) == {"zebra 3", "zebra 4", "zebra 5", "zebra note"}
    assert texts(either_store, kind="note") == ["zebra note"]
    assert set(texts(either_store, since=2.0, until=4.0)) == {"zebra 2", "zebra 3"}
    assert set(texts(either_store, as_of=1.0)) == {"zebra 0", "zebra 1"}
    assert texts(either_store, session_id="s", kind="note") == []


def test_as_of_a_time_is_what_recall_gave_then(either_store, clock):
    for n in range(4):
        said(either_store, f"the zebra number {n}", utc=clock.now + n)
    then = [(r.memory.id, r.score) for r in either_store.recall("zebra number 2", user_id="ann", threshold=0.0)]
    said(either_store, "zebra number two has stripes", utc=clock.now + 100)
    found = either_store.recall("zebra number 2", user_id="ann", threshold=0.0, as_of=clock.now + 4)
    assert [(r.memory.id, r.score) for r in found] == then


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"kind": "dream"}, "kind is 'dream'; give one of turn, note"),
        ({"since": float("nan")}, "since is not a finite number"),
        ({"as_of": "today"}, "as_of is not a finite number"),
        ({"since": 2.0, "until": 2.0}, r"since \(2.0\) is not before until \(2.0\)"),
        ({"since": 2.0, "as_of": 1.0}, r"since \(2.0\) is after as_of \(1.0\)"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "x"}, "threshold is of type str, not a number"),
        ({"limit": 0}, "limit is 0; give a whole number from 1 to 1000000000"),
        ({"limit": 2**63}, f"limit is {2**63}; give a whole number from 1 to 1000000000"),
        ({"session_id": "a\0"}, "session_id holds a NUL"),
    ],
)
def test_filter_that_cannot_be_met_is_refused_by_name(quick_store, asked, reason):
    with pytest.raises(InputError, match=reason):
        quick_store.recall("zebra", user_id="ann", **asked)


def test_large_store_gives_the_same_best_as_when_ranked_whole(store, monkeypatch):
    for n, words in enumerate(["my dog is called Rex", "I work at the harbour", "tea is better than coffee"] * 4):
        said(store, f"{words}, and that is true on day {n}", session=str(n % 4))
    query = "what is the dog called"
    whole = store.recall(query, user_id="ann", threshold=0.0, limit=3)
    monkeypatch.setattr(f"{MODULE}.RANKED_WHOLE", 3)
    monkeypatch.setattr("nightschool.memory.store.CANDIDATES", 4)
    assert [r.memory.id for r in store.recall(query, user_id="ann", threshold=0.0, limit=3)] == [
        r.memory.id for r in whole
    ]


def test_large_store_gives_what_else_there_is_where_one_thing_was_said_very_often(large_store, monkeypatch):
    monkeypatch.setattr("nightschool.memory.store.CANDIDATES", 4)
    for n in range(9):
        said(large_store, "zebra", session=f"s{n}")
    for n in range(3):
        said(large_store, f"zebra number {n} of many", session=f"t{n}")
    assert sorted(texts(large_store)) == ["zebra", *(f"zebra number {n} of many" for n in range(3))]


def test_large_store_looks_at_the_turns_around_the_best(large_store):
    said(large_store, "any zebra at home")
    said(large_store, "yes two")
    for n in range(5):
        said(large_store, f"filler {n}", session=str(n))
    assert texts(large_store, limit=2) == ["any zebra at home", "yes two"]


@pytest.mark.parametrize("narrower", [{"session_id": "t"}, {"kind": "note"}, {"since": 8.0, "until": 10.0}])
def test_large_store_is_narrowed_before_the_best_are_taken(large_store, narrower):
    for n in (0, 1, 20, 21):
        said(large_store, "zebra", session=f"s{n}", utc=float(n))
    note = "a note on one zebra that is far away and quite long"
    large_store.remember(note, user_id="ann", session_id="t", created_utc=9.0)
    assert texts(large_store, limit=1, **narrower) == [note]


def test_question_before_or_after_what_was_pasted_is_what_a_large_store_is_searched_for(large_store, monkeypatch):
    monkeypatch.setattr(f"{MODULE}.MOST_TERMS", 4)
    lines = [f"filler{n}" for n in range(50)]
    pasted = " ".join(lines)
    for note in ("zebra", " ".join(lines[10:20]), "nothing"):  # the second is nearest to the whole
        large_store.remember(note, user_id="ann")
    for query in (f"zebra\n{pasted}", f"{pasted}\nzebra"):
        assert texts(large_store, query, limit=1) == ["zebra"]


def test_memory_that_sql_does_not_know_is_not_given(quick_store):
    note = quick_store.remember("the zebra", user_id="ann")
    row = quick_store._indexing.index.rows(f"id = '{note.id}'", 1)
    quick_store.forget_apply(quick_store.forget(memory_ids=[note.id]))
    quick_store._indexing.index.add(row)
    assert texts(quick_store) == []


def test_repeats_beyond_the_limit_do_not_crowd_out_what_is_different(quick_store):
    for n in range(12):
        said(quick_store, "zebra", session=f"s{n}")
    said(quick_store, "zebra crossing", session="t")
    assert set(texts(quick_store, limit=2)) == {"zebra", "zebra crossing"}


OWNERS = ["ann", "o'neil", '["ann", ""]', "shared", "ann\\", "' OR 1=1 --"]
AGENTS = ["", "x", "y'; DROP--"]
KINDS = {"note", "shared", "turn", "stated"}  # what a row of the property below is; one that states leaves a turn, too
FILTERS = [
    ({}, KINDS),
    ({"kind": "note"}, {"note", "shared"}),
    ({"kind": "turn"}, {"turn", "stated"}),
    ({"kind": "preference"}, {"stated"}),
    ({"session_id": "s"}, KINDS),
    ({"session_id": "t"}, set()),
    ({"since": 0.0, "until": 2e9}, KINDS),
    ({"as_of": 2e9}, KINDS),
    ({"as_of": 1.0}, set()),
]


@how(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(OWNERS), st.sampled_from(AGENTS), st.sampled_from(sorted(KINDS))),
        min_size=1,
        max_size=12,
    ),
    st.lists(
        st.tuples(
            st.sampled_from([*OWNERS, "nobody"]),
            st.sampled_from(AGENTS),
            st.sampled_from(FILTERS),
            st.sampled_from(["zebra", "zebra 3", "I like", "' OR scope IN ('shared"]),
        ),
        min_size=3,
        max_size=6,
    ),
    st.sampled_from([0, 2000]),
)
def test_private_row_of_another_user_is_never_given_however_it_is_asked_for(
    settings, hash_embedder, clock, rows, questions, whole
):
    def numbers(memories):
        return {int(re.search(r"zebra (\d+)", memory.text)[1]) for memory in memories}

    def may_see(asker, agent, kinds):
        return {
            n for n, (owner, of, kind) in enumerate(rows)
            if kind in kinds and (kind == "shared" or (owner == asker and of in ("", agent)))
        }  # fmt: skip

    home = settings.home / uuid4().hex
    with pytest.MonkeyPatch.context() as patch, MemoryStore(Settings(home=home), embedder=hash_embedder) as store:
        patch.setattr(f"{MODULE}.RANKED_WHOLE", whole)
        for n, (owner, of, kind) in enumerate(rows):
            place = {"user_id": owner, "agent_id": of, "session_id": "s", "created_utc": clock.now + n}
            if kind in ("note", "shared"):
                store.remember(f"zebra {n}", shared=kind == "shared", **place)
            else:
                words = f"I like zebra {n}." if kind == "stated" else f"zebra {n}"
                store.record([{"role": "user", "content": words}], "ok", **place)
        for asker, agent, (narrower, kinds), query in questions:
            found = store.recall(query, user_id=asker, agent_id=agent, threshold=-9.0, limit=99, **narrower)
            assert numbers(r.memory for r in found) == may_see(asker, agent, kinds)
            stated = {n for n, (owner, of, kind) in enumerate(rows) if (owner, of, kind) == (asker, agent, "stated")}
            assert numbers(store.history(user_id=asker, agent_id=agent)) == stated
            going = store.memories(store.forget(user_id=asker, query=query).memory_ids)
            assert {memory.user_id for memory in going.values()} <= {asker}


@pytest.mark.parametrize("until", [np.float64(5.0), 10**30])
def test_time_of_another_kind_of_number_narrows_as_well(either_store, until):
    for n in range(5):
        said(either_store, f"zebra {n}", session=str(n), utc=float(n))
    assert sorted(texts(either_store, since=np.float64(3.0), until=until)) == ["zebra 3", "zebra 4"]


def test_large_store_lifts_the_neighbours_of_what_fits_and_no_others(quick_store, monkeypatch):
    """In one session of many turns and some notes, of which a few fit: as where all of it is ranked."""
    for n in range(0, 120, 2):
        said(quick_store, {24: "any zebra at home", 80: "a zebra"}.get(n, f"filler {n}"), utc=float(n))
    for time, note in ((51.0, "one zebra seen"), (101.0, "nothing seen")):
        quick_store.remember(note, user_id="ann", session_id="s", created_utc=time)
    found = []
    for whole in (2000, 0):
        monkeypatch.setattr(f"{MODULE}.RANKED_WHOLE", whole)
        fits = quick_store._fits("zebra", "ann", "", Filters(), most=4)
        found.append({fit.row.created_utc for fit in fits if fit.parts["neighbours"] > 0.05})
    assert found[0] == found[1] == {t + d for t in (24.0, 80.0) for d in (-4, -2, 2, 4)} | {48.0, 50.0, 52.0, 54.0}


def test_second_reply_to_the_same_is_found_beside_the_first(quick_store):
    said(quick_store, "Do you repair wheels?", "No.")
    second = quick_store.record([], "Yes, in two days.", user_id="ann", session_id="s")
    found = quick_store.recall("Do you repair wheels?", user_id="ann", threshold=0.1)
    assert [r.memory.text for r in found] == ["Do you repair wheels?\nNo.", "Yes, in two days."]
    assert found[1].memory.source_ids == (second.id,)
    assert quick_store.verify() == []
    quick_store.forget_apply(quick_store.forget(interaction_ids=[second.id]))
    assert texts(quick_store, query="Yes, in two days.") == ["Do you repair wheels?\nNo."]


def test_most_that_can_be_asked_for_is_given_all_there_is(large_store):
    for n in range(5):
        said(large_store, f"zebra {n}")
    assert len(texts(large_store, limit=MOST_ASKED)) == 5


def test_latest_moment_that_can_be_named_is_asked_like_any_other(large_store):
    said(large_store, "zebra")
    assert texts(large_store, as_of=sys.float_info.max) == ["zebra"]


def test_large_store_looks_around_the_best_of_very_many_sessions(large_store, monkeypatch):
    monkeypatch.setattr(f"{MODULE}.SESSIONS", 2)
    monkeypatch.setattr("nightschool.memory.store.CANDIDATES", 8)
    for n in range(4):
        said(large_store, "zebra" + " filler" * n, session=f"s{n}", utc=float(n))
        said(large_store, f"another {n}", session=f"s{n}", utc=float(n))
    found = {fit.row.session_id for fit in large_store._fits("zebra", "ann", "", Filters(), most=4) if fit.row.position}
    assert found == {"s0", "s1"}


def test_nothing_is_recalled_without_a_limit_where_the_setting_says_so(tmp_path, hash_embedder):
    settings = Settings(home=tmp_path, memory=MemorySettings(recall_limit=0))
    with MemoryStore(settings, embedder=hash_embedder) as store:
        said(store, "zebra")
        with pytest.raises(InputError, match=r"memory\.recall_limit is 0"):
            store.recall("zebra", user_id="ann")
        assert texts(store) == ["zebra"]
