from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.memory.ranking import Candidate, rank, stem, terms
from nightschool.memory.types import Memory


def candidate(text: str, cosine: float = 0.0, created_utc: float = 0.0) -> Candidate:
    return Candidate(Memory(f"m:{text}", "ann", "", "", "note", text, created_utc), cosine)


def ranked(query: str, *candidates: Candidate, visible: int = 0) -> list[tuple[str, float]]:
    return [(r.memory.text, r.score) for r in rank(query, candidates, visible)]


def test_score_is_half_cosine_and_half_coverage():
    (found,) = rank("rex", [candidate("Rex is my dog", 0.6)], visible=1)
    assert (found.score, found.parts) == (pytest.approx(0.8), {"dense": 0.6, "words": 1.0})


def test_coverage_is_absolute_and_not_measured_against_the_best():
    ((_, score),) = ranked("garden bicycle mountain river", candidate("a bicycle"), visible=1000)
    assert score < 0.15


def test_rare_word_covers_more_than_a_common_one():
    common = [candidate(f"the garden {n}") for n in range(9)]
    found = dict(ranked("garden zeppelin", candidate("a zeppelin"), *common))
    assert found["a zeppelin"] > 2 * found["the garden 0"]


def test_query_of_stop_words_is_scored_by_cosine_alone():
    (found,) = rank("what is it", [candidate("Rex is my dog", 0.4)], visible=1)
    assert (found.score, found.parts) == (0.4, {"dense": 0.4})


def test_repeated_texts_are_folded_into_the_best_of_them():
    found = ranked("dog", candidate("My dog, Rex!", 0.5), candidate("my DOG rex", 0.7), candidate("my dog Max", 0.1))
    assert [text for text, _ in found] == ["my DOG rex", "my dog Max"]


def test_texts_that_differ_in_one_word_or_number_are_not_folded():
    assert len(ranked("room", candidate("my room is 12"), candidate("my room is 13"))) == 2


def test_texts_without_words_are_not_folded_together():
    assert len(ranked("dog", candidate("🐕"), candidate("🐈"))) == 2


def test_equal_scores_go_to_the_newer():
    found = ranked("dog", candidate("a dog", created_utc=1), candidate("the dog", created_utc=2))
    assert [text for text, _ in found] == ["the dog", "a dog"]


@given(
    st.text(),
    st.lists(st.tuples(st.text(), st.floats(-1.01, 1.01)), max_size=5),
    st.integers(0, 1000),
)
def test_scores_are_between_zero_and_one_and_sorted(query, candidates, visible):
    scores = [score for _, score in ranked(query, *(candidate(*c) for c in candidates), visible=visible)]
    assert all(0 <= score <= 1 for score in scores)
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    "forms",
    [
        ["like", "likes", "liked", "liking"],
        ["city", "cities"],
        ["dog", "dogs", "dog's", "dog’s"],
        ["run", "running", "runs"],
        ["plan", "planned", "planning"],
        ["pass", "passes", "passed"],
        ["call", "calls", "calling"],
        ["house", "houses"],
    ],
)
def test_forms_of_a_word_have_one_stem(forms):
    assert len({stem(form) for form in forms}) == 1


@pytest.mark.parametrize("word", ["bus", "this", "king", "red", "b2b", "1980s", "is", "glass", "thing"])
def test_short_and_odd_words_stay_as_they_are(word):
    assert stem(word) == word


def test_stop_words_are_no_terms():
    assert terms("What is the name of my dog?") == ["nam", "dog"]
