"""What users state becomes memory of its own, current and past, and goes with the turns it came from."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st
from nightschool.content import Message
from nightschool.interfaces.cli import app
from nightschool.memory.conversations import Conversation, Owner, turn_memory_id
from nightschool.memory.rows import from_memory
from nightschool.memory.store import MemoryStore
from nightschool.memory.tables import MemoryRow
from nightschool.memory.types import Memory
from sqlalchemy import insert, text
from typer.testing import CliRunner


def say(store: MemoryStore, text: str, time: float, user_id: str = "ada", session_id: str = "s") -> str:
    made = store.record(
        [{"role": "user", "content": text}], "Noted.", user_id=user_id, session_id=session_id, created_utc=time
    )
    return made.id


def history(store: MemoryStore, user_id: str = "ada") -> list[tuple[str, float, float | None, int]]:
    return [(m.text, m.created_utc, m.valid_to, len(m.source_ids)) for m in store.history(user_id=user_id)]


def test_newer_statement_supersedes_and_both_stay_in_the_history(quick_store: MemoryStore) -> None:
    say(quick_store, "I live in Oslo.", 100.0)
    say(quick_store, "I moved to Rome.", 200.0)
    assert history(quick_store) == [("I live in Oslo.", 100.0, 200.0, 1), ("I moved to Rome.", 200.0, None, 1)]


@pytest.mark.parametrize(
    ("true", "ordinary", "asked"),
    [
        ("My birthday is 5 May.", "My birthday is coming up.", "When is my birthday?"),
        ("My email is ada@x.org", "My email is not working.", "What is my email?"),
        ("My name is Ada.", "My name is misspelled on the invoice.", "What is my name?"),
    ],
)
def test_ordinary_sentence_about_the_same_does_not_end_what_is_true(
    store: MemoryStore, true: str, ordinary: str, asked: str
) -> None:
    say(store, true, 1.0)
    say(store, ordinary, 2.0, session_id="later")
    assert history(store) == [(true, 1.0, None, 1)]
    assert any(true in r.memory.text for r in store.recall(asked, user_id="ada"))


def test_repetition_raises_a_count_and_makes_no_row(quick_store: MemoryStore) -> None:
    for time in (1.0, 2.0, 3.0):
        say(quick_store, "I like tea.", time, session_id=f"s{time}")
    assert history(quick_store) == [("I like tea.", 1.0, None, 3)]


def test_statement_that_comes_in_late_takes_its_place_in_time(quick_store: MemoryStore) -> None:
    say(quick_store, "I moved to Rome.", 200.0)
    say(quick_store, "I live in Oslo.", 100.0, session_id="older")
    assert history(quick_store) == [("I live in Oslo.", 100.0, 200.0, 1), ("I moved to Rome.", 200.0, None, 1)]
    say(quick_store, "I live in Rome.", 50.0, session_id="oldest")
    assert [h[0] for h in history(quick_store)] == ["I live in Rome.", "I live in Oslo.", "I moved to Rome."]
    assert quick_store.verify() == []


def test_recall_gives_the_current_value_and_as_of_the_older(store: MemoryStore) -> None:
    say(store, "I live in Oslo.", 100.0)
    say(store, "I live in Rome.", 200.0, session_id="later")

    def found(**filters: float) -> list[str]:
        return [r.memory.text for r in store.recall("Where do I live?", user_id="ada", kind="fact", **filters)]

    assert found() == ["I live in Rome."]
    assert found(as_of=150.0) == ["I live in Oslo."]
    assert found(as_of=50.0) == []


def test_turn_that_only_says_what_is_superseded_is_not_recalled_either(store: MemoryStore) -> None:
    say(store, "I live in Oslo.", 100.0)
    say(store, "I live in Rome.", 200.0, session_id="later")
    texts = [r.memory.text for r in store.recall("Where do I live?", user_id="ada", threshold=0.0, limit=10)]
    assert any("Rome" in text for text in texts) and not any("Oslo" in text for text in texts)


def chat(store: MemoryStore) -> None:
    """In which the turn of Oslo gets more by its neighbours than its statement, which has none."""
    words = ("In which city do you think my flat is?", "I live in Oslo.", "My flat is in which city, guess again?")
    for n, said in enumerate(words):
        say(store, said, float(n), session_id="m")
    say(store, "I live in Rome.", 200.0, session_id="later")


@pytest.mark.parametrize("threshold", [None, 0.2, 0.0])
@pytest.mark.parametrize("whole", [2000, 3])
def test_superseded_turn_stays_out_though_its_statement_is_not_among_what_fits(
    store: MemoryStore, monkeypatch, threshold: float | None, whole: int
) -> None:
    monkeypatch.setattr("nightschool.memory.recalling.RANKED_WHOLE", whole)
    monkeypatch.setattr("nightschool.memory.store.CANDIDATES", 3)
    chat(store)
    found = store.recall("In which city is my flat?", user_id="ada", threshold=threshold, limit=3)
    assert found and not any("Oslo" in r.memory.text for r in found)
    then = store.recall("In which city is my flat?", user_id="ada", threshold=threshold, limit=3, as_of=100.0)
    assert any("Oslo" in r.memory.text for r in then)


def test_repetition_of_what_is_superseded_is_not_recalled_either(store: MemoryStore) -> None:
    say(store, "I live in Oslo.", 100.0)
    say(store, "I live in Oslo now!", 150.0, session_id="again")
    say(store, "I live in Rome.", 200.0, session_id="later")
    found = store.recall("Where do I live?", user_id="ada", threshold=0.0, limit=10)
    assert found and not any("Oslo" in r.memory.text for r in found)


def test_what_is_superseded_is_looked_up_at_once_however_many_fit(quick_store: MemoryStore, executed) -> None:
    def asked(sessions: range) -> int:
        for n in sessions:
            say(quick_store, f"I live in {'Oslo' if n % 2 else 'Rome'}.", float(n), session_id=str(n))
        with executed(quick_store) as statements:
            quick_store.recall("I live in", user_id="ada", threshold=0.0, limit=200)
        return len(statements)

    assert asked(range(4)) == asked(range(4, 40))


def test_turn_is_a_record_of_what_was_said_and_shown_when_turns_are_asked_for(store: MemoryStore) -> None:
    say(store, "I live in Oslo.", 100.0)
    say(store, "I live in Rome.", 200.0, session_id="later")

    def places(**filters: str) -> set[str]:
        found = store.recall("Where do I live?", user_id="ada", threshold=0.0, limit=10, **filters)
        return {place for place in ("Oslo", "Rome") for r in found if place in r.memory.text}

    assert places(kind="turn") == {"Oslo", "Rome"}
    assert places() == places(kind="fact") == {"Rome"}


@pytest.mark.parametrize("whole", [2000, 0])
def test_statement_is_recalled_within_its_session_until_it_is_superseded(
    store: MemoryStore, monkeypatch, whole: int
) -> None:
    monkeypatch.setattr("nightschool.memory.recalling.RANKED_WHOLE", whole)

    def found(session_id: str, **filters: str) -> list[str]:
        recalled = store.recall("Where do I live?", user_id="ada", session_id=session_id, **filters)
        return [r.memory.text for r in recalled]

    say(store, "I live in Oslo.", 100.0, session_id="q")
    assert found("q", kind="fact") == ["I live in Oslo."]
    say(store, "I live in Rome.", 200.0, session_id="later")
    assert found("q") == found("q", kind="fact") == []
    assert found("later", kind="fact") == ["I live in Rome."]


def test_statement_falls_with_its_turn_and_the_one_before_holds_again(quick_store: MemoryStore) -> None:
    say(quick_store, "I live in Oslo.", 100.0)
    rome = say(quick_store, "I live in Rome.", 200.0, session_id="later")
    plan = quick_store.forget(interaction_ids=[rome])
    quick_store.forget_apply(plan)
    assert history(quick_store) == [("I live in Oslo.", 100.0, None, 1)]
    assert quick_store.verify() == []


def test_repetition_that_is_forgotten_leaves_the_statement(quick_store: MemoryStore) -> None:
    first = say(quick_store, "I like tea.", 1.0)
    say(quick_store, "I like tea!", 2.0, session_id="again")
    quick_store.forget_apply(quick_store.forget(interaction_ids=[first]))
    assert history(quick_store) == [("I like tea!", 2.0, None, 1)]


def test_statements_are_private_to_their_user(quick_store: MemoryStore) -> None:
    say(quick_store, "I like tea.", 1.0)
    say(quick_store, "I hate tea.", 2.0, user_id="bo")
    assert history(quick_store) == [("I like tea.", 1.0, None, 1)]
    assert history(quick_store, "bo") == [("I hate tea.", 2.0, None, 1)]


def test_what_memory_put_into_the_prompt_is_not_stated_again(quick_store: MemoryStore) -> None:
    turn = [
        {"role": "system", "content": "Notes from earlier conversations:\n- I live in Oslo."},
        {"role": "user", "content": "Good morning"},
    ]
    quick_store.record(turn, "I live in Paris.", user_id="ada", session_id="s")
    assert history(quick_store) == []


def test_replaced_unanswered_turn_leaves_no_statement_twice(quick_store: MemoryStore) -> None:
    quick_store.record([{"role": "user", "content": "I live in Oslo."}], "", user_id="ada", session_id="s")
    quick_store.record([{"role": "user", "content": "Hello?"}], "Hi.", user_id="ada", session_id="s")
    assert [h[0] for h in history(quick_store)] in (["I live in Oslo."], [])
    assert quick_store.verify() == []


def test_replaced_turn_takes_its_own_statement_along_and_no_other(quick_store: MemoryStore) -> None:
    say(quick_store, "My name is Ada.", 1.0, session_id="earlier")
    asked: tuple[Message, ...] = ({"role": "user", "content": "I live in Oslo."},)
    grown: tuple[Message, ...] = (
        *asked,
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "Noted."},
    )
    for messages in (asked, grown):
        quick_store.record_many([Conversation(Owner("ada", "", "s"), messages, (2.0,) * len(messages))])
    assert [said for said, *_ in history(quick_store)] == ["My name is Ada."]
    assert quick_store.verify() == []


def test_statement_whose_sources_do_not_say_it_is_named_by_verify(quick_store: MemoryStore) -> None:
    say(quick_store, "I live in Oslo.", 100.0)
    with quick_store.sql.begin() as connection:
        connection.execute(text("UPDATE memories SET valid_to = 7 WHERE kind = 'fact'"))
    assert any("is not what its turns state" in line for line in quick_store.verify())


@pytest.mark.parametrize("kind", ["fact", "preference"])
def test_kinds_are_told_apart(quick_store: MemoryStore, kind: str) -> None:
    say(quick_store, "I live in Oslo. I like tea.", 1.0)
    assert [m.text for m in quick_store.history(user_id="ada") if m.kind == kind] == [
        {"fact": "I live in Oslo.", "preference": "I like tea."}[kind]
    ]


def test_history_is_shown_on_the_command_line(quick_store: MemoryStore) -> None:
    say(quick_store, "I live in Oslo.", 100.0)
    say(quick_store, "I moved to Rome.", 200.0)
    shown = CliRunner().invoke(app, ["memory", "history", "--user", "ada"]).output.splitlines()
    assert shown == [
        "home: I live in Oslo.  (since 1970-01-01 00:01:40Z until 1970-01-01 00:03:20Z, said 1 times)",
        "home: I moved to Rome.  (since 1970-01-01 00:03:20Z, said 1 times)",
    ]
    assert CliRunner().invoke(app, ["memory", "history"]).output.strip() == "nothing is held of user 'default'"
    quick_store.record([{"role": "user", "content": "hi"}], "hello", user_id="default", session_id="s")
    assert CliRunner().invoke(app, ["memory", "history"]).output.strip() == "nothing was stated"


def test_conversation_of_one_time_is_stated_in_its_order(quick_store: MemoryStore) -> None:
    said = ["I live in Oslo.", "Yes?", "I moved to Rome.", "Yes?", "I live in Bonn.", "Yes?"]
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
    quick_store.record_conversation(messages, user_id="ada", session_id="s", created_utc=5.0)
    assert [(text, ended) for text, _, ended, _ in history(quick_store)][-1] == ("I live in Bonn.", None)


def test_turn_that_says_more_than_what_is_superseded_is_recalled(store: MemoryStore) -> None:
    say(store, "I live in Oslo.\nMy doctor is Berg of the clinic.", 100.0)
    say(store, "I live in Rome.", 200.0, session_id="later")
    found = store.recall("Who is my doctor?", user_id="ada", threshold=0.0, limit=10)
    assert any("Berg" in r.memory.text for r in found)


def test_forgetting_within_one_session_leaves_what_was_said_in_another(store: MemoryStore) -> None:
    say(store, "I like tea.", 1.0, session_id="one")
    say(store, "I like tea.", 2.0, session_id="two")
    store.forget_apply(store.forget(user_id="ada", session_id="one", query="I like tea."))
    assert history(store) == [("I like tea.", 2.0, None, 1)]


def test_forgetting_by_words_reaches_what_is_superseded_and_what_was_said_to_an_agent(store: MemoryStore) -> None:
    say(store, "I live in Oslo.", 100.0)
    say(store, "I live in Rome.", 200.0, session_id="later")
    turn = [{"role": "user", "content": "I live in Oslo."}]
    store.record(turn, "Noted.", user_id="ada", agent_id="cook", session_id="s", created_utc=50.0)
    plan = store.forget(user_id="ada", query="I live in Oslo.")
    store.forget_apply(plan)
    assert [m.text for m in store.history(user_id="ada")] == ["I live in Rome."]
    assert store.history(user_id="ada", agent_id="cook") == []


def test_rebuild_takes_in_what_was_stated_before_there_were_statements(quick_store: MemoryStore) -> None:
    say(quick_store, "I live in Oslo.", 100.0)
    with quick_store.sql.begin() as connection:
        connection.exec_driver_sql("UPDATE memories SET subject = 'gone' WHERE kind = 'fact'")
    quick_store.rebuild_index()
    assert history(quick_store) == [("I live in Oslo.", 100.0, None, 1)]
    assert quick_store.verify() == []


def test_reply_that_was_shown_what_earlier_rules_took_for_a_statement_names_the_turn(quick_store: MemoryStore) -> None:
    turn = say(quick_store, "My birthday is coming up.", 1.0)
    reply = answer(quick_store, "b2:junk")
    junk = Memory("b2:junk", "ada", "", "s", "fact", "My birthday is coming up.", 1.0, (turn,), subject="my birthday")
    with quick_store.database.writing() as session:
        session.execute(insert(MemoryRow), [from_memory(junk)])
    quick_store.rebuild_index()
    assert history(quick_store) == [] and quick_store.verify() == []
    assert quick_store.interaction(reply).memory_ids == (turn_memory_id(turn),)


def test_history_of_one_subject_leaves_out_the_others(quick_store: MemoryStore) -> None:
    say(quick_store, "I live in Oslo. I like tea.", 1.0)
    assert [m.text for m in quick_store.history(user_id="ada", subject="home")] == ["I live in Oslo."]
    assert quick_store.history(user_id="ada", subject="nothing") == []


# -- ids ---


def ids(store: MemoryStore) -> dict[str, str]:
    return {m.id: m.text for m in store.history(user_id="ada")}


def answer(store: MemoryStore, shown: str, session_id: str = "shown") -> str:
    """A reply that was shown this memory; returns its id."""
    turn = [{"role": "user", "content": "Where do I live?"}]
    return store.record(turn, "Oslo.", user_id="ada", session_id=session_id, memory_ids=[shown]).id


CITIES = st.sampled_from(["Oslo", "Rome", "Bonn"])


@how(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CITIES, st.integers(0, 6)), min_size=1, max_size=7))
def test_no_id_of_a_statement_goes_whatever_comes_in_later_and_from_whenever(
    settings, hash_embedder, said: list[tuple[str, int]]
) -> None:
    with MemoryStore(replace(settings, home=settings.home / uuid4().hex), embedder=hash_embedder) as store:
        seen: set[str] = set()
        for n, (city, time) in enumerate(said):
            say(store, f"I live in {city}.", float(time), session_id=f"s{n}")
            assert seen <= ids(store).keys()
            seen = set(ids(store))
        assert store.verify() == []
        held = {m.id: m for m in store.history(user_id="ada")}
        in_one_go = [
            Conversation(Owner("ada", "", f"s{n}"), messages(c), (float(t),) * 2) for n, (c, t) in enumerate(said)
        ]
        with MemoryStore(replace(settings, home=settings.home / uuid4().hex), embedder=hash_embedder) as other:
            other.record_many(in_one_go)
            assert {m.id: m for m in other.history(user_id="ada")} == held


def messages(city: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": f"I live in {city}."}, {"role": "assistant", "content": "Noted."})


def test_older_chat_that_says_the_same_otherwise_keeps_the_id_and_is_found_in_its_words(store: MemoryStore) -> None:
    say(store, "I moved to Rome.", 200.0)
    (named,) = ids(store)
    say(store, "I live in Rome.", 100.0, session_id="older")
    assert ids(store) == {named: "I live in Rome."}
    (found,) = store.recall("Where do I live?", user_id="ada", kind="fact", threshold=0.0)
    assert (found.memory.id, found.memory.created_utc) == (named, 100.0)
    (row,) = store._indexing.index.rows(f"id = '{named}'", 9)
    assert row.lines[0].startswith("liv rom") and row.created_utc == 100.0
    assert store.verify() == []


def test_reply_that_was_shown_forgotten_words_counts_as_such_though_others_say_the_same(
    quick_store: MemoryStore, bytes_in_home
) -> None:
    first = say(quick_store, "I moved to Oslo last summer.", 1.0, session_id="first")
    (named,) = ids(quick_store)
    reply = answer(quick_store, named)
    say(quick_store, "I live in Oslo.", 2.0, session_id="again")
    plan = quick_store.forget(interaction_ids=[first])
    assert named in plan.memory_ids
    quick_store.forget_apply(plan)
    assert bytes_in_home(b"last summer") == []
    assert ids(quick_store) == {named: "I live in Oslo."}
    (shown,) = quick_store.interaction(reply).memory_ids
    assert quick_store.memories([shown]) == {}
    say(quick_store, "I moved to Oslo last summer.", 0.0, session_id="anew")
    assert quick_store.memories([shown]) == {}
    assert quick_store.verify() == []


def test_forgetting_a_repeat_leaves_the_reply_with_the_turn_whose_words_it_was_shown(quick_store: MemoryStore) -> None:
    first = say(quick_store, "I moved to Oslo last summer.", 1.0, session_id="first")
    (named,) = ids(quick_store)
    reply = answer(quick_store, named)
    repeat = say(quick_store, "I live in Oslo.", 2.0, session_id="again")
    quick_store.forget_apply(quick_store.forget(interaction_ids=[repeat]))
    assert quick_store.interaction(reply).memory_ids == (named,)
    assert named in quick_store.forget(interaction_ids=[first]).memory_ids
    assert quick_store.verify() == []


@pytest.mark.parametrize("page", [2, 4, 500])
def test_import_leaves_replies_with_what_they_were_shown_however_it_is_cut(
    quick_store: MemoryStore, settings, hash_embedder, monkeypatch, page: int
) -> None:
    for session_id, city, time in (("a", "Oslo", 30.0), ("m", "Rome", 20.0), ("z", "Oslo", 10.0)):
        say(quick_store, f"I live in {city}.", time, session_id=session_id)
    early = next(m.id for m in quick_store.history(user_id="ada") if m.created_utc == 10.0)
    reply = answer(quick_store, early, session_id="b")
    path, _ = quick_store.export()
    monkeypatch.setattr("nightschool.memory.restoring.ROWS_A_PAGE", page)
    with MemoryStore(replace(settings, home=settings.home / "other"), embedder=hash_embedder) as other:
        assert other.restore(path).errors == {}
        (shown,) = other.interaction(reply).memory_ids
        assert other.memories([shown])[shown].created_utc == 10.0
        assert other.verify() == []


def test_reply_that_was_shown_what_stays_follows_it_to_its_new_id(quick_store: MemoryStore) -> None:
    first = say(quick_store, "I live in Oslo.", 1.0, session_id="1")
    say(quick_store, "I live in Rome.", 2.0, session_id="2")
    say(quick_store, "I live in Oslo.", 3.0, session_id="3")
    early, _, late = (m.id for m in quick_store.history(user_id="ada"))
    reply = answer(quick_store, late)
    quick_store.forget_apply(quick_store.forget(interaction_ids=[first]))
    (shown,) = quick_store.interaction(reply).memory_ids
    assert (shown, quick_store.memories([shown])[shown].created_utc) == (early, 3.0)
    assert quick_store.verify() == []


def test_reply_follows_what_it_was_shown_when_an_older_chat_comes_in(quick_store: MemoryStore) -> None:
    shown_turn = say(quick_store, "I live in Oslo.", 50.0, session_id="1")
    (named,) = ids(quick_store)
    reply = answer(quick_store, named)
    say(quick_store, "I live in Rome.", 20.0, session_id="2")
    say(quick_store, "I live in Oslo.", 10.0, session_id="3")
    (shown,) = quick_store.interaction(reply).memory_ids
    assert quick_store.memories([shown])[shown].source_ids == (shown_turn,)
    assert shown != named and named in ids(quick_store)
    quick_store.forget_apply(quick_store.forget(interaction_ids=[shown_turn]))
    (shown,) = quick_store.interaction(reply).memory_ids
    assert quick_store.memories([shown]) == {}
    assert quick_store.verify() == []


CYCLES = ("number", "verdict_id", "deployment_id", "excluded", "trained")  # columns that 0010 and later add


def test_statements_of_an_older_version_are_named_again_and_replies_keep_what_they_were_shown(
    settings, hash_embedder
) -> None:
    with MemoryStore(settings, embedder=hash_embedder) as store:
        say(store, "I live in Oslo.", 1.0)
        say(store, "I live in Rome.", 2.0, session_id="2")
        now = list(ids(store))
        reply, other = answer(store, now[1]), say(store, "Good morning", 3.0, session_id="3")
        store.recall("Rome", user_id="ada")
        with store.sql.begin() as connection:  # as revision 0003 left it
            for n, named in enumerate(now):
                old = {"old": f"b2:old{n}", "new": named, "shown": f'["b2:old{n}"]', "asked": f'["{named}"]'}
                connection.execute(text("UPDATE memories SET id = :old WHERE id = :new"), old)
                connection.execute(text("UPDATE interactions SET memory_ids = :shown WHERE memory_ids = :asked"), old)
            for later in (
                "ALTER TABLE snapshots DROP COLUMN censor",
                "ALTER TABLE feedback DROP COLUMN event",
                "ALTER TABLE verdicts DROP COLUMN criteria",
                "ALTER TABLE snapshots DROP COLUMN reader_ids",
                *(f"ALTER TABLE cycles DROP COLUMN {c}" for c in CYCLES),
            ):
                connection.execute(text(later))
            connection.execute(text("DROP TABLE drafts"))
            connection.execute(text("UPDATE nightschool_version SET version_num = '0003'"))
        index = store._indexing.index
        rows = [index.rows(f"id = '{named}'", 1)[0] for named in now]
        index.delete(now)
        index.add([replace(row, id=f"b2:old{n}") for n, row in enumerate(rows)])
    for _ in range(2):
        with MemoryStore(settings, embedder=hash_embedder) as store:
            assert list(ids(store)) == now
            assert store.interaction(reply).memory_ids == (now[1],)
            assert store.interaction(other).memory_ids == ()
            assert store.verify() == []


def test_what_was_stated_by_other_rules_is_stated_again_after_the_migration(settings, hash_embedder):
    with MemoryStore(settings, embedder=hash_embedder) as store:
        say(store, "I live in Rome.", 1.0)
        (row,) = (m for m in store.history(user_id="ada") if m.subject == "home")
        with store.sql.begin() as connection:
            connection.execute(text("UPDATE memories SET text = 'I live in Lima.' WHERE id = :id"), {"id": row.id})
            connection.execute(text("INSERT INTO store_state (name, value) VALUES ('statements', 'due')"))
        assert store.verify()
    with MemoryStore(settings, embedder=hash_embedder) as store:
        assert [m.text for m in store.history(user_id="ada")] == ["I live in Rome."] and store.verify() == []
