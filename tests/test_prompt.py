from __future__ import annotations

from nightschool.memory.prompt import with_notes

USER = {"role": "user", "content": "hi"}


def test_notes_are_a_first_message_of_the_system_one_line_each():
    assert with_notes([USER], ["a  zebra\nruns", "b"]) == [
        {"role": "system", "content": "Notes from earlier conversations:\n- a zebra runs\n- b"},
        USER,
    ]


def test_notes_stand_at_the_end_of_the_system_message_that_opens_the_talk_and_of_no_other():
    system = {"role": "system", "content": "Be brief."}
    joined, *rest = with_notes([system, USER, system], ["a zebra"])
    assert joined == {"role": "system", "content": "Be brief.\n\nNotes from earlier conversations:\n- a zebra"}
    assert rest == [USER, system]
    notes, *rest = with_notes([USER, system], ["a zebra"])
    assert "a zebra" in notes["content"] and rest == [USER, system]


def test_without_notes_the_messages_are_as_they_were():
    given = [USER]
    assert with_notes(given, []) == given
    assert with_notes(given, []) is not given
