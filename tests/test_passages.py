from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.memory.passages import MOST_WINDOWS, index_row, of_note, of_turn, speaker, windows
from nightschool.memory.types import Interaction, Memory
from nightschool.memory.words import words

LONG = "The first sentence has exactly eight words here. " * 2 + "The second window starts with this sentence. "


def note(text: str) -> Memory:
    return Memory("m", "ann", "", "s", "note", text, 1_683_554_400.0)


def turn(*said: str, reply: str = "ok") -> Interaction:
    messages = tuple({"role": "user", "content": words} for words in said)
    return Interaction("i", "ann", "", "s", 3, messages, said[-1], reply, 0.0)


def test_short_text_is_its_own_window():
    assert windows("  I like tea. And you? ") == ["  I like tea. And you? "]
    assert windows(" ") == []


def test_window_ends_with_a_sentence_and_holds_no_more_than_it_may():
    first, second = windows(LONG)
    assert first == ("The first sentence has exactly eight words here. " * 2).strip()
    assert second.startswith("The second window")


def test_every_window_bears_the_name_of_who_speaks():
    assert [window[:5] for window in windows("Ann: " + LONG)] == ["Ann: ", "Ann: "]


@pytest.mark.parametrize(
    ("text", "name"), [("Ann: hi", "Ann"), ("Mary-Jane O'Neil: hi", "Mary-Jane O'Neil"), ("at 12:30", ""), ("a:b", "")]
)
def test_speaker_stands_before_a_colon(text, name):
    assert speaker(text) == name


def test_line_of_another_speaker_begins_a_window_also_in_a_long_talk():
    assert windows(
        "<Ann>: Where were you last night?\n<Bob>: At home, in bed. I was ill. What about you, my friend?"
    ) == [
        "Ann: Where were you last night?",
        "Bob: At home, in bed. I was ill. What about you, my friend?",
    ]
    assert len(windows("Ann: hi\nBob: ho\n" * 500)) <= 4 * MOST_WINDOWS


@given(st.text(st.sampled_from("aB :.\n<>[]é")))
def test_windows_are_few_and_together_hold_every_word(text):
    cut = windows(text)
    assert len(cut) <= 4 * MOST_WINDOWS
    assert set(words(text)) <= set(words(" ".join(cut)))


def test_turn_has_the_words_of_the_user_and_of_the_reply_in_windows_of_their_own():
    passages = of_turn(turn("Hello.", "Where is it?", reply="Over there."))
    assert (passages.whole, passages.own, passages.reply) == (
        "Where is it?",
        ("Hello.\nWhere is it?",),
        ("Over there.",),
    )
    assert passages.texts == ("Where is it?", "Hello.\nWhere is it?", "Over there.")


def test_text_that_is_its_own_window_is_embedded_once():
    assert of_note(note("I like tea")).texts == ("I like tea",)
    assert of_turn(turn("I like tea", reply="")).texts == ("I like tea",)


def test_note_of_what_the_assistant_said_is_no_word_of_the_user():
    assert (of_note(note("Assistant: hi")).own, of_note(note("Ann: hi")).own) == ((), ("Ann: hi",))


def test_row_holds_the_terms_and_the_day_of_every_window():
    passages = of_note(note(LONG))
    row = index_row(note(LONG), 0, passages, {text: np.ones(2) for text in passages.texts})
    assert (len(row.lines), row.own, row.vectors.shape) == (2, 2, (3, 2))
    assert all(line.endswith("8 may 2023") for line in row.lines)
