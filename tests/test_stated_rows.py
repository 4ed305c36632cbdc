"""What users state becomes memory of its own, current and past, and goes with the turns it came from."""

from __future__ import annotations

import pytest
from nightschool.interfaces.cli import app
from nightschool.memory.store import MemoryStore
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


def test_statement_whose_sources_do_not_say_it_is_named_by_verify(quick_store: MemoryStore) -> None:
    from sqlalchemy import text

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
    assert not any(
        "Oslo" in m.text for m in [*store.history(user_id="ada"), *store.history(user_id="ada", agent_id="cook")]
    )


def test_rebuild_takes_in_what_was_stated_before_there_were_statements(quick_store: MemoryStore) -> None:
    say(quick_store, "I live in Oslo.", 100.0)
    with quick_store.sql.begin() as connection:
        connection.exec_driver_sql("UPDATE memories SET subject = 'gone' WHERE kind = 'fact'")
    quick_store.rebuild_index()
    assert history(quick_store) == [("I live in Oslo.", 100.0, None, 1)]
    assert quick_store.verify() == []
