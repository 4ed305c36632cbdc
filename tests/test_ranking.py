from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.memory.passages import IndexRow
from nightschool.memory.ranking import WEIGHTS, Query, folded, rank
from nightschool.memory.types import Memory, Recall
from nightschool.memory.words import terms

NO_NEIGHBOURS = replace(WEIGHTS, next=0.0, after_next=0.0)


def at(*cosines: float) -> np.ndarray:
    """Unit vectors with these cosines to the query, which is (1, 0, 0)."""
    return np.array([[c, np.sqrt(1 - c * c), 0] for c in cosines], dtype=np.float32)


QUERY = at(1.0)


def row(
    text: str, *cosines: float, id: str = "", session: str = "", position: int = 0, own: int | None = None, utc=0.0
):
    """A note whose windows are the parts of `text` between slashes."""
    lines = tuple(" ".join(terms(part)) for part in text.split("/"))
    own = len(lines) if own is None else own
    return IndexRow(id or text, "ann", "", session, "note", False, utc, position, lines, own, at(*(cosines or (0.0,))))


def ranked(query: str, *rows: IndexRow, visible: int = 0, weights=WEIGHTS) -> dict[str, float]:
    return {fit.row.id: fit.score for fit in rank(Query(query, QUERY), rows, visible, weights)}


def test_score_is_cosine_and_coverage_over_the_most_that_they_can_be():
    (fit,) = rank(Query("rex", QUERY), [row("Rex is my dog", 0.6)], visible=1)
    assert fit.parts == {
        "dense": pytest.approx(0.6 / 1.5),
        "words": pytest.approx(0.5 / 1.5),
        "neighbours": 0.0,
    }
    assert fit.score == pytest.approx(sum(fit.parts.values()))
    assert ranked("rex", row("Rex", 1.0))["Rex"] == pytest.approx(1.0)


def test_coverage_is_absolute_and_not_measured_against_the_best():
    assert ranked("garden bicycle mountain river", row("a bicycle"), visible=1000)["a bicycle"] < 0.1


def test_rare_word_covers_more_than_a_common_one():
    found = ranked("garden zeppelin", row("a zeppelin"), *(row(f"the garden {n}") for n in range(9)))
    assert found["a zeppelin"] > 2 * found["the garden 0"]


def test_query_of_stop_words_is_scored_by_cosine_alone():
    (fit,) = rank(Query("what is it", QUERY), [row("Rex is my dog", 0.4)], visible=1)
    assert (fit.score, fit.parts["words"]) == (pytest.approx(0.4), 0.0)


WORDS = st.lists(st.sampled_from("red green blue garden gardens o'neil ring rings 12 1 the".split()), max_size=8)


@given(WORDS.map(" ".join), st.lists(WORDS.map(" ".join), min_size=1, max_size=6), st.integers(0, 50))
def test_words_are_the_idf_of_the_terms_of_the_query_that_stand_in_the_best_line(query, given, visible):
    rows = [row(text, 0.0, id=str(n)) for n, text in enumerate(given)]
    asked, total = set(terms(query)), max(visible, len(rows))
    held = {term: sum(f" {term} " in f" {r.lines[0]} " for r in rows) for term in asked}
    idf = {term: np.log(1 + (total - n + 0.5) / (n + 0.5)) for term, n in held.items()}
    for fit in rank(Query(query, QUERY), rows, visible):
        there = sum(weight for term, weight in idf.items() if f" {term} " in f" {fit.row.lines[0]} ")
        assert fit.parts["words"] == pytest.approx(there / sum(idf.values()) / 3 if asked else 0.0)


def test_words_count_where_they_stand_together_in_one_window():
    found = ranked("red house", row("red house/a dog", 0, 0, 0), row("red dog/a house", 0, 0, 0))
    assert found["red house/a dog"] > found["red dog/a house"]


def test_sentence_that_fits_lifts_the_page_around_it():
    found = ranked("rex", row("a/b", 0.2, 0.9, 0.1), row("c", 0.4))
    assert found["a/b"] == pytest.approx((0.2 + 0.9) / 2 / 1.5)
    assert found["a/b"] > found["c"]


def test_whole_is_no_window_where_there_are_windows():
    assert ranked("rex", row("a/b", 0.8, 0.2, 0.2))["a/b"] == pytest.approx((0.8 + 0.2) / 2 / 1.5)


def test_part_of_a_long_query_finds_what_the_whole_of_it_is_far_from():
    query = Query("a long story", np.array([[1, 0, 0], [0, 0, 1]], dtype=np.float32))
    far = replace(row("x"), vectors=np.array([[0, 0, 1]], dtype=np.float32))
    (fit,) = rank(query, [far], 1)
    assert fit.parts["dense"] == pytest.approx(0.5 / 1.5)


def test_short_answer_is_found_by_its_question():
    answer = row("yes, two", 0.1, session="s", position=1)
    question = row("do you have dogs", 0.8, session="s", position=0)
    alone = ranked("dogs", question, answer, weights=NO_NEIGHBOURS)
    lifted = ranked("dogs", question, answer)
    assert lifted["yes, two"] == pytest.approx(
        alone["yes, two"] + 0.3 * (alone["do you have dogs"] - alone["yes, two"])
    )
    assert lifted["do you have dogs"] == alone["do you have dogs"]


def test_turn_after_next_is_lifted_less_and_the_one_beyond_not_at_all():
    rows = [row(str(n), 0.8 if n == 0 else 0.0, session="s", position=n) for n in range(4)]
    found = ranked("what", *rows)
    assert [found[str(n)] for n in range(4)] == pytest.approx([0.8, 0.24, 0.2, 0.0])


@pytest.mark.parametrize(("mine", "theirs", "user"), [("s", "t", "ann"), ("s", "s", "bob"), ("", "", "ann")])
def test_other_sessions_those_of_others_and_notes_of_none_lift_nothing(mine, theirs, user):
    other = replace(row("b", 0.8, session=theirs), user_id=user)
    assert ranked("what", row("a", 0.0, session=mine), other)["a"] == 0.0


def test_statement_or_correction_of_a_session_lifts_nothing_and_does_not_stand_between_its_turns():
    turns = [row("question", 0.8, session="s", position=0), row("answer", 0.0, session="s", position=1)]
    kinds = ("fact", "preference", "correction")
    stated = [replace(row(kind, 0.9, session="s", position=0), kind=kind) for kind in kinds]
    alone, among = ranked("what", *turns), ranked("what", *turns, *stated)
    assert among["answer"] == alone["answer"] > 0
    assert (among["question"], among["fact"]) == (pytest.approx(0.8), pytest.approx(0.9))


def test_neighbours_go_by_time_then_by_position_whatever_order_they_come_in():
    rows = [row("first", 0.8, session="s", utc=1.0, position=2), row("second", session="s", utc=2.0, position=0)]
    rows += [row("third", session="s", utc=2.0, position=1), row("fourth", session="s", utc=2.0, position=2)]
    found = ranked("what", *reversed(rows))
    assert [round(found[name], 3) for name in ("second", "third", "fourth")] == [0.24, 0.2, 0.0]


def test_what_the_assistant_said_counts_less_unless_it_is_asked_for():
    mine, reply = row("mine/x", 0.5, 0.5, 0.0, own=1), row("x/reply", 0.5, 0.0, 0.5, own=1)
    found = ranked("where did I go", mine, reply)
    assert found["mine/x"] > found["x/reply"]
    found = ranked("where did you tell me to go", mine, reply)
    assert found["mine/x"] == found["x/reply"]


def test_equal_scores_go_to_the_newer():
    assert list(ranked("dog", row("a dog", utc=1.0), row("the dog", utc=2.0))) == ["the dog", "a dog"]


def test_nothing_is_ranked_as_nothing():
    assert rank(Query("dog", QUERY), [], 0) == []


def texts(*given: str) -> list[str]:
    recalls = [Recall(Memory(str(n), "ann", "", "", "note", text, 0.0), 0.5, {}) for n, text in enumerate(given)]
    return [recall.memory.text for recall in folded(recalls)]


def test_repeated_texts_are_folded_into_the_best_of_them():
    assert texts("my DOG rex", "My dogs, Rex!", "Hello, my dog Rex please", "my dog Max") == [
        "my DOG rex",
        "my dog Max",
    ]


@pytest.mark.parametrize(
    "given",
    [
        ("tea - and cake", "tea and cake"),
        ("well-known", "well known"),
        ("Rome 😀", "Rome ❤️"),
        ("set it to −5", "set it to -5"),
        ("café", "cafe\u0301"),
        ("Anna – my sister", "Anna, my sister"),
        ("open 9-5", "open 9 - 5"),
    ],
)
def test_signs_that_say_nothing_tell_no_texts_apart(given):
    assert len(texts(*given)) == 1


@pytest.mark.parametrize(
    "given",
    [
        ("my room is 12", "my room is 13"),
        ("I like it", "I do not like it"),
        ("his name is Max", "my name is Max"),
        ("tea before coffee", "coffee before tea"),
        ("I know C++", "I know C#"),
        ("set it to -5", "set it to 5"),
        ("it costs $5", "it costs €5"),
        ("x < 5", "x > 5"),
        ("x = 5 * 3", "x = 5 / 3"),
        ("a ratio of 3:4", "a ratio of 3.4"),
        ("Oslo → Bergen", "Oslo ← Bergen"),
        ("lunch at Gino's 👍", "lunch at Gino's 👎"),
        ("मेरा बेटा दिल्ली में है", "मेरी बेटी दिल्ली में है"),
        ("🐕", "🐈"),
    ],
)
def test_texts_that_say_something_else_are_not_folded(given):
    assert len(texts(*given)) == 2


@given(
    st.text(),
    st.lists(st.tuples(st.text(), st.floats(-1, 1), st.sampled_from(["", "s", "t"]), st.integers(0, 9)), max_size=6),
    st.integers(0, 1000),
)
def test_scores_are_between_zero_and_one_and_sorted(query, given, visible):
    rows = [
        row(text.replace("/", " "), cosine, id=str(n), session=session, position=position)
        for n, (text, cosine, session, position) in enumerate(given)
    ]
    scores = list(ranked(query, *rows, visible=visible).values())
    assert len(scores) == len(given)
    assert all(0 <= score <= 1 + 1e-6 for score in scores)
    assert scores == sorted(scores, reverse=True)


def test_what_stood_far_off_is_no_neighbour_where_nothing_between_is_looked_at():
    near, gap = row("zebra", 1.0, session="s", position=4), replace(row("a", session="s", position=6), kind="turn")
    far = replace(row("b", session="s", position=7, utc=1.0), kind="turn")
    turns = [replace(near, kind="turn"), gap]
    assert ranked("zebra", *turns)["a"] > 0.2  # the turn between may be forgotten
    assert ranked("zebra", turns[0], far)["b"] == 0.0
    assert ranked("zebra", turns[0], replace(far, kind="note", position=4))["b"] > 0.2  # it was made after the turn
