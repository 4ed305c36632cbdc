"""What users state of themselves, and what only looks like it."""

from __future__ import annotations

import time
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.memory.statements import Said, Statement, periods, stated


@pytest.mark.parametrize(
    ("text", "subject", "value"),
    [
        ("My name is Ada Lovelace.", "name", "ada lovelace"),
        ("my name is ada", "name", "ada"),
        ("My name is Vincent van Gogh", "name", "vincent van gogh"),
        ("My name is Élodie de la Tour", "name", "élodie de la tour"),
        ("My name is April", "name", "april"),
        ("MY NAME IS BOB", "name", "bob"),
        ("Please call me Al", "name", "al"),
        ("Call me AJ.", "name", "aj"),
        ("I live in Oslo now", "home", "oslo"),
        ("Well, I've just moved to New York last year.", "home", "new york"),
        ("I work for Home Depot.", "employer", "home depot"),
        ("I am 42 years old", "age", "42"),
        ("I'm originally from São Paulo", "origin", "são paulo"),
        ("I work as a nurse.", "work", "nurse"),
        ("I work at Acme Corp", "employer", "acme corp"),
        ("I'm allergic to peanuts!", "allergy: peanuts", "yes"),
        ("I am not allergic to peanuts", "allergy: peanuts", "no"),
        ("I'm a vegetarian", "diet", "vegetarian"),
        ("My dog is called Rex", "my dog's name", "rex"),
        ("my email address is ada@example.com", "my email address", "ada@example.com"),
        ("My email is now ada@example.com.", "my email", "ada@example.com"),
        ("My phone number is +47 22 33 44 55", "my phone number", "+47 22 33 44 55"),
        ("My birthday is 5 May.", "my birthday", "5 may"),
        ("My birthday is on May 5th, 1990", "my birthday", "may 5th, 1990"),
        ("My birthday is the 5th of May", "my birthday", "5th of may"),
        ("My wedding anniversary is 05.06.2010.", "my wedding anniversary", "05.06.2010"),
        ("My shoe size is 42", "my shoe size", "42"),
        ("My blood type is AB negative", "my blood type", "ab negative"),
        ("My hometown is São Paulo", "my hometown", "são paulo"),
        ("My time zone is Europe/Oslo.", "my time zone", "europe/oslo"),
        ("My occupation is nurse", "my occupation", "nurse"),
        ("My native language is norwegian", "my native language", "norwegian"),
        ("My favorite color is navy blue", "favourite color", "navy blue"),
        ("I really love hiking a lot!", "taste: hiking", "likes"),
        ("I don't like olives either.", "taste: olives", "dislikes"),
        ("But I can't stand the Beatles", "taste: beatles", "dislikes"),
        ("From now on, please answer in French.", "answers: language", "french"),
        ("Always use metric units.", "answers: use metric units", "wanted"),
        ("I'm gluten-free", "gluten-free", "yes"),
        ("Never use emoji.", "answers: use emoji", "unwanted"),
    ],
)
def test_plain_statement_is_found_with_its_subject_and_value(text: str, subject: str, value: str) -> None:
    (found,) = stated(text)
    assert (found.subject, found.value, found.text) == (subject, value, text.strip())


@pytest.mark.parametrize(
    "text",
    [
        "Do I live in Oslo?",
        "I live in Oslo, right?",
        "If I lived in Oslo I would ski.",
        "I would like a coffee",
        "I'd love to",
        "I like it",
        "I love that song",
        "I love the ending",
        "I like their chances",
        "I enjoy his voice",
        'She wrote: "I live in Rome"',
        "> I live in Rome",
        "```\nI like tabs\n```",
        "I think I like jazz",
        "My friend says I like jazz",
        "My favourite part is the end",
        "Never give up!",
        "Please call me tomorrow.",
        "Call me Monday.",
        "Call me Friday morning.",
        "Call me ASAP.",
        "Call me in May.",
        "My name is not Bob.",
        "My name is Not Bob.",
        "My name is misspelled on the invoice.",
        "My name is spelled wrong.",
        "My name is on the list.",
        "My name is hard to pronounce.",
        "My dog is called away.",
        "My dog's name is not Rex.",
        "My email is not working.",
        "My email is not ada@example.org.",
        "My email is full of letters from bo@example.org.",
        "My phone is dead.",
        "My phone is an iPhone 12.",
        "My phone is 4 years old.",
        "My birthday is coming up.",
        "My birthday is in 3 days.",
        "My birthday is not 5 May.",
        "My shoe size is not in stock.",
        "My blood type is rare.",
        "My hometown is flooded.",
        "My time zone is wrong.",
        "My job is killing me.",
        "My profession is dying.",
        "My native language is hard to learn.",
        "My favourite colour is not blue.",
        "My favourite restaurant is closed.",
        "I live in a small house",
        "I moved to Plan B.",
        "I just moved to Linux.",
        "I moved to Home.",
        "I am from HR.",
        "I'm from Accounting.",
        "I work at Home.",
        "Always keep the faith.",
        "Never keep secrets!",
        "Never call the police.",
        "I like " + "very " * 12 + "long walks",
        "",
        "\ud800",
        "I like   !",
    ],
)
def test_what_only_looks_like_a_statement_is_passed_over(text: str) -> None:
    assert stated(text) == []


def test_last_word_on_a_subject_counts_and_order_is_kept() -> None:
    found = stated("I like tea. My name is Bo. Actually I hate tea.")
    assert [(s.subject, s.value) for s in found] == [("taste: tea", "dislikes"), ("name", "bo")]


def test_pasted_text_is_not_read_to_its_end_and_takes_no_time() -> None:
    assert stated("x " * 2000 + "I live in Oslo.") == []


@pytest.mark.parametrize(
    "before",
    [
        "Thanks~~~",
        "```foo```",
        "~~~ hi ~~~",
        "Ich las „Faust“.",
        "use ``` to open a fence.",
        "```\na ~~~\n```",
        "“Open\n",
    ],
)
def test_what_is_said_after_a_quotation_or_what_looks_like_one_is_read(before: str) -> None:
    assert [s.value for s in stated(f"{before}\nMy name is Mei.")] == ["mei"]


def test_a_quotation_over_paragraphs_is_opened_anew_in_each() -> None:
    assert stated("“My name is Bo.\n\n“I live in Lima.”") == []


@pytest.mark.parametrize("piece", ["\n", " ", "> ", "``` ", "“", '"', "~~~\n", " \n>", "„\n\n", "“\n\n"])
def test_quotations_of_any_kind_take_no_long_time(piece: str) -> None:
    start = time.process_time()
    stated(piece * (400_000 // len(piece)))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("fence", [("```", "```"), ("~~~", "~~~"), ("```", ""), ("“", "”"), ("“", "")])
def test_what_is_quoted_at_length_is_nothing_that_the_user_states(fence: tuple[str, str]) -> None:
    before = " " if fence[0] == "```" else "\n"
    quoted = "My name is Bo. I live in Lima. " + "And so on. " * 300
    text = f"Correct this:{before}{fence[0]}\n{quoted}\n{fence[1]}"
    assert stated(text) == []
    assert [s.value for s in stated(f"{text}\nI live in Oslo.")] == ([] if fence == ("```", "") else ["oslo"])


def said(value: str, source: str, time: float) -> Said:
    return Said(Statement("fact", "home", value, f"I live in {value}."), source, time)


def test_newer_value_ends_the_older_and_a_repetition_adds_a_source() -> None:
    found = periods([said("oslo", "a", 1.0), said("oslo", "b", 2.0), said("rome", "c", 3.0), said("oslo", "d", 4.0)])
    assert [(p.statement.value, p.sources, p.valid_from, p.valid_to) for p in found] == [
        ("oslo", ("a", "b"), 1.0, 3.0),
        ("rome", ("c",), 3.0, 4.0),
        ("oslo", ("d",), 4.0, None),
    ]


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 9)), max_size=12), st.randoms())
def test_periods_do_not_depend_on_the_order_of_arrival_and_lose_no_source(
    values: list[tuple[str, int]], random: Random
) -> None:
    given_ = [said(value, str(i), float(time)) for i, (value, time) in enumerate(values)]
    found = periods(given_)
    mixed = random.sample(given_, len(given_))
    assert periods(mixed) == found
    assert sorted(s for p in found for s in p.sources) == sorted(s.source_id for s in given_)
    assert all(a.valid_to == b.valid_from for a, b in pairwise(found)) and (not found or found[-1].valid_to is None)
    assert all(a.statement.value != b.statement.value for a, b in pairwise(found))


def test_long_gap_between_words_is_one_space() -> None:
    (found,) = stated("I like" + " " * 1900 + "zebras .")  # a pattern that tried every part of it would take a minute
    assert (found.subject, found.value) == ("taste: zebras", "likes") and stated("I like x" + " " * 1900 + "(") == []


def test_what_is_liked_no_more_is_about_the_same() -> None:
    said = ("I like olives.", "I don't like olives anymore.", "I don't like olives at all.")
    assert len({stated(text)[0].subject for text in said}) == 1


def test_words_around_a_quotation_within_another_are_quoted_too():
    assert stated("Please translate “Hello. My name is Bob. He said “hi” to me.” into German.") == []
    assert stated("“One.” My name is Ada. “Two.”")[0].value == "ada"


def test_quotes_that_never_close_cost_no_more_than_the_text_is_long():
    """Ten times the signs took a hundred times as long."""
    text = "“" * 20_000 + "„"
    started = time.perf_counter()
    assert stated(f"{text} my name is Ada.") == []
    assert time.perf_counter() - started < 5  # it was 9 s and more, and .05 s now
