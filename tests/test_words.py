from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.memory.words import stem, terms, time_terms


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


def test_day_is_named_as_people_name_it():
    assert time_terms(1_683_554_400.0) == ["8", "may", "2023"]
    assert time_terms(1_700_000_000.0) == ["14", stem("november"), "2023"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_day_that_no_calendar_has_is_not_named(created_utc):
    assert len(time_terms(created_utc)) in (0, 3)
