from __future__ import annotations

import pytest
from nightschool.memory.conversations import Conversation, Owner, Review
from nightschool.memory.store import MemoryStore
from nightschool.memory.tables import FeedbackRow, MemoryRow, StateRow
from nightschool.memory.types import Interaction
from sqlalchemy import delete, update

ASKED, WRONG, RIGHT = "How much is a puncture repair?", "A puncture is 90 euros.", "A puncture repair is 15 euros."


def said(store: MemoryStore, reply: str = WRONG, words: str = ASKED, **owner: str) -> Interaction:
    turn = [{"role": "user", "content": words}]
    return store.record(turn, reply, **{"user_id": "ann", "session_id": "s"} | owner)


def found(store: MemoryStore, **asked: object) -> list[tuple[str, str]]:
    given = {"user_id": "ann", "threshold": 0.0, "limit": 9} | asked
    return [(r.memory.kind, r.memory.text) for r in store.recall("price of a puncture repair", **given)]


def corrected(*replies: str) -> list[tuple[str, str]]:
    return [("correction", f"{ASKED}\n{reply}") for reply in replies]


def test_correction_is_recalled_at_once_in_place_of_the_reply(store):
    turn = said(store)
    assert found(store) == [("turn", f"{ASKED}\n{WRONG}")]
    store.rate(turn.id, rating=-1, correction=RIGHT)
    assert found(store) == corrected(RIGHT)
    assert found(store, user_id="bob") == []
    assert found(store, kind="turn") == [("turn", f"{ASKED}\n{WRONG}")]
    assert found(store, kind="correction") == corrected(RIGHT)
    assert store.verify() == []


def test_correction_is_found_by_the_request_as_the_turn_was(store):
    turn = said(store, words="I came by train.\nAnd where do I leave my bicycle over night?", reply="In the river.")
    (before,) = store.recall("a place for my bicycle at night", user_id="ann", threshold=0.0)
    store.rate(turn.id, correction="In the shed.")
    (after,) = store.recall("a place for my bicycle at night", user_id="ann", threshold=0.0)
    assert (before.memory.kind, after.memory.kind) == ("turn", "correction")
    assert after.score == pytest.approx(before.score, abs=0.1)


def test_latest_correction_holds_and_each_did_in_its_time(store, clock):
    turn = said(store)
    moments = []
    for euros in (14, 15, 14):
        moments.append(clock.now)
        clock.now += 10
        store.rate(turn.id, correction=f"{euros} euros.")
    assert found(store) == corrected("14 euros.")
    clock.now += 10
    assert found(store, as_of=moments[0]) == [("turn", f"{ASKED}\n{WRONG}")]
    assert found(store, as_of=clock.now) == corrected("14 euros.")
    assert found(store, as_of=moments[2] + 5) == corrected("15 euros.")
    assert store.verify() == []


def test_correction_is_shown_wherever_the_turn_was_found(store, clock):
    """By its neighbours, by the words of the reply that it corrects, and by when it was said."""
    first = said(store, words="How much is a puncture repair for my city bicycle?", reply="Which tyre do you have?")
    turn = said(store, words="A Schwalbe city one.", reply="That makes 90 guilders then.")
    clock.now += 40 * 86400
    said(store, words="What are your opening hours?", reply="Nine to five.", session_id="another")
    queries = {
        "price of a puncture repair for my city bicycle": {},
        "guilders": {},
        "what did I ask in November 2023?": {"threshold": 0.0},
        "a Schwalbe tyre": {"until": clock.now - 86400, "threshold": 0.0},
    }

    def sources() -> list[set[str]]:
        return [
            {i for r in store.recall(query, **{"user_id": "ann"} | asked) for i in r.memory.source_ids}
            for query, asked in queries.items()
        ]

    before = sources()
    assert all(turn.id in one for one in before) and first.id in before[0]
    store.rate(turn.id, correction="It is 15 euros then.")
    assert sources() == before
    for query, asked in queries.items():
        shown = [r.memory for r in store.recall(query, **{"user_id": "ann"} | asked) if turn.id in r.memory.source_ids]
        assert [memory.text for memory in shown] == ["A Schwalbe city one.\nIt is 15 euros then."]


def test_correction_of_what_does_not_hold_any_more_stays_away(quick_store, clock):
    turn = said(quick_store, words="I live in Oslo.", reply="Oslo is in Sweden.")
    clock.now += 10
    quick_store.rate(turn.id, correction="Oslo, in Norway, then.")
    clock.now += 10
    said(quick_store, words="I live in Rome.", reply="Noted.")
    between, texts = clock.now, lambda **asked: {text for _, text in found(quick_store, **asked)}
    assert texts() == {"I live in Rome.\nNoted."}
    assert texts(as_of=between - 5) == {"I live in Oslo.\nOslo, in Norway, then."}
    clock.now += 10
    quick_store.rate(turn.id, correction="Norway.")
    assert texts(as_of=between) == texts() == {"I live in Rome.\nNoted."}


def test_no_statement_stands_after_its_own_corrected_turn(quick_store):
    turn = said(quick_store, words="My dog is called Rex.", reply="Nice cat.")
    quick_store.rate(turn.id, correction="Nice dog.")
    assert [r.memory.kind for r in quick_store.recall("My dog is called Rex.", user_id="ann", threshold=0.0)] == [
        "correction"
    ]


def test_of_many_corrected_alike_the_first_are_found_without_looking_at_all(quick_store, executed):
    for n in range(60):
        turn = said(quick_store, words=f"Question {n}", reply="Sorry, I cannot help.", session_id=f"s{n}")
        quick_store.rate(turn.id, correction=f"Answer {n}")
    quick_store.recall("Sorry, I cannot help.", user_id="ann", limit=5, threshold=0.0)
    with executed(quick_store) as statements:
        recalled = quick_store.recall("Sorry, I cannot help.", user_id="ann", limit=5, threshold=0.0)
    assert len(recalled) == 5
    assert len(statements) < 20


def test_calls_as_a_correction_leave_the_one_before_in_place(quick_store, clock):
    called = '{"tool_calls": [{"name": "price", "arguments": {}}]}'
    quick_store.record([{"role": "user", "content": ASKED}], called, user_id="ann", session_id="s")
    turn = quick_store.record([{"role": "tool", "content": "15"}], "It is 90.", user_id="ann", session_id="s")
    for correction in ("  It is 15.\n", called):
        clock.now += 10
        quick_store.rate(turn.id, correction=correction)
    assert ("correction", "It is 15.") in found(quick_store)
    assert quick_store.verify() == []


def test_of_two_at_the_same_moment_the_latter_holds(quick_store):
    turn = said(quick_store)
    for euros in range(10, 16):
        quick_store.rate(turn.id, correction=f"{euros} euros.")
        assert found(quick_store) == corrected(f"{euros} euros.")


def test_beside_the_turn_itself_its_correction_is_shown(store):
    turn = said(store)
    store.rate(turn.id, correction=RIGHT)
    assert found(store, beside=[turn.id]) == corrected(RIGHT)


def test_rating_and_comment_leave_the_turn_as_it_is(quick_store):
    turn = said(quick_store)
    quick_store.rate(turn.id, rating=-1, comment="No.")
    assert found(quick_store) == [("turn", f"{ASKED}\n{WRONG}")]


def test_imported_correction_is_remembered_too_and_an_export_restores_it(quick_store, make_embedder, tmp_path):
    messages = ({"role": "user", "content": ASKED}, {"role": "assistant", "content": WRONG})
    talk = Conversation(Owner("ann", "", "s"), messages, (5.0, 5.0), {1: Review(-1.0, RIGHT)})
    for _ in range(2):
        assert not quick_store.record_many([talk]).errors
        assert found(quick_store) == corrected(RIGHT)
    path, _ = quick_store.export(tmp_path / "all.jsonl")
    with MemoryStore(type(quick_store.settings)(tmp_path / "other"), embedder=make_embedder()) as other:
        assert not other.restore(path).errors
        assert found(other) == corrected(RIGHT)
        assert other.verify() == []


@pytest.mark.parametrize("by", ["the turn", "the correction", "the user", "what it says"])
def test_correction_goes_with_its_turn_and_takes_it_along(quick_store, by, bytes_in_home):
    turn = said(quick_store)
    quick_store.rate(turn.id, correction=RIGHT)
    (recall,) = quick_store.recall(ASKED, user_id="ann", threshold=0.0)
    chosen = {
        "the turn": {"interaction_ids": [turn.id]},
        "the correction": {"memory_ids": [recall.memory.id]},
        "the user": {"user_id": "ann"},
        "what it says": {"user_id": "ann", "query": f"{ASKED} {RIGHT}"},
    }[by]
    receipt = quick_store.forget_apply(quick_store.forget(**chosen))
    assert (receipt.interactions, receipt.memories, receipt.feedback) == (1, 2, 1)
    assert found(quick_store) == [] == quick_store.verify()
    assert bytes_in_home(RIGHT.encode()) == []


def test_no_correction_is_older_than_its_turn(quick_store):
    """Where clocks differ, too: nothing is forgotten or recalled before there was anything to correct."""
    turn = said(quick_store)
    quick_store.rate(turn.id, correction=RIGHT, created_utc=turn.created_utc - 100)
    assert not quick_store.forget(before_utc=turn.created_utc - 50).memory_ids
    assert found(quick_store, as_of=turn.created_utc - 50) == []
    assert found(quick_store) == corrected(RIGHT)


def test_reply_that_was_shown_a_correction_is_tied_to_it(quick_store):
    turn = said(quick_store)
    quick_store.rate(turn.id, correction=RIGHT)
    (recall,) = quick_store.recall(ASKED, user_id="ann", threshold=0.0)
    later = quick_store.record(
        [{"role": "user", "content": "Once more, how much?"}],
        RIGHT,
        user_id="ann",
        session_id="later",
        memory_ids=[recall.memory.id],
    )
    quick_store.rate(turn.id, correction="16 euros.")
    assert quick_store.memories(later.memory_ids)[recall.memory.id].text == f"{ASKED}\n{RIGHT}"


def test_what_verify_finds_missing_rebuild_makes_again(quick_store):
    turn = said(quick_store)
    quick_store.rate(turn.id, correction=RIGHT)
    with quick_store.database.writing() as session:
        session.execute(delete(MemoryRow).where(MemoryRow.kind == "correction"))
    assert any("memory rebuild" in line for line in quick_store.verify())
    quick_store.rebuild_index()
    assert quick_store.verify() == []
    with quick_store.database.writing() as session:
        session.execute(update(MemoryRow).where(MemoryRow.kind == "correction").values(valid_to=5.0))
    assert any("corrected" in line for line in quick_store.verify())
    quick_store.rebuild_index()
    assert quick_store.verify() == []
    assert found(quick_store) == corrected(RIGHT)
    with quick_store.database.writing() as session:  # as a server of another version may leave it
        session.execute(delete(FeedbackRow))
    assert any("corrected" in line for line in quick_store.verify())
    quick_store.rebuild_index()
    assert quick_store.verify() == []
    assert found(quick_store) == [("turn", f"{ASKED}\n{WRONG}")]


def test_corrections_of_before_they_were_remembered_are_taken_in_when_the_store_is_opened(
    quick_store, hash_embedder, settings
):
    turn = said(quick_store)
    quick_store.rate(turn.id, correction=RIGHT)
    with quick_store.database.writing() as session:  # as the migration finds and leaves it
        session.execute(delete(MemoryRow).where(MemoryRow.kind == "correction"))
        assert session.query(FeedbackRow).count() == 1
        session.add(StateRow(name="corrections", value="due"))
    quick_store.close()
    with MemoryStore(settings, embedder=hash_embedder) as again:
        assert found(again) == corrected(RIGHT)
        assert again.verify() == []
        with again.database.reading() as session:
            assert session.get(StateRow, "corrections") is None


def test_correcting_costs_the_same_however_much_is_held(quick_store, executed):
    turns = [said(quick_store, session_id=f"s{n}") for n in range(3)]
    counts = []
    for turn in turns:
        with executed(quick_store) as statements:
            quick_store.rate(turn.id, correction=RIGHT)
        counts.append(len(statements))
    assert counts[1] == counts[2]


@pytest.mark.parametrize("due", [False, True])
def test_correction_of_what_nobody_asked_is_kept_and_leaves_no_memory(quick_store, hash_embedder, settings, due):
    messages = ({"role": "assistant", "content": "Hello there."}, {"role": "user", "content": ASKED})
    talk = Conversation(Owner("ann", "", "s"), messages, (5.0, 5.0), {0: Review(correction="Good morning.")})
    assert quick_store.record_many([talk]).feedback_new == 1
    (greeting, *_) = quick_store.interactions()
    quick_store.rate(greeting.id, correction="Good evening.")
    with quick_store.database.writing() as session:
        session.add_all([StateRow(name="corrections", value="due")] * due)
    quick_store.close()
    with MemoryStore(settings, embedder=hash_embedder) as again:
        assert found(again, kind="correction") == []
        assert again.rebuild_index() == 1
        assert again.verify() == []


def test_of_two_corrections_of_a_turn_dated_ahead_the_later_holds(quick_store, clock):
    turn = [{"role": "user", "content": ASKED}]
    for n in range(6):  # their ids are in an order of chance
        owner = {"user_id": f"u{n}", "session_id": "s"}
        ahead = quick_store.record(turn, WRONG, created_utc=clock.now + 600, **owner)
        for reply in ("It is 14 euros.", RIGHT):
            clock.now += 1
            quick_store.rate(ahead.id, correction=reply)
        assert found(quick_store, user_id=f"u{n}") == corrected(RIGHT)
