"""The people of bench/learning.py: what one seed fixes, and that their judge is fair."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def simulated() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    try:
        return import_module("simulated")
    finally:
        sys.path.pop(0)


def test_hostile_people_are_the_same_people_but_for_their_mind(simulated: ModuleType) -> None:
    kind, mixed = (simulated.people(0, 40, hostile) for hostile in (False, True))
    assert sum(p.hostile for p in mixed) == 4
    assert [(p.voice, p.minds, p.rates) for p in kind] == [(p.voice, p.minds, p.rates) for p in mixed]


def test_an_answer_in_the_manner_that_somebody_minds_satisfies(simulated: ModuleType) -> None:
    for person in simulated.people(0, 40, False):
        for topic in simulated.TOPICS:
            assert simulated.faults(simulated.written(topic, person.minds), person, topic) == []
            assert simulated.faults(simulated.written(topic, person.minds, topic.wrong), person, topic) == ["wrong"]


def test_no_day_has_the_words_of_the_exam(simulated: ModuleType) -> None:
    crowd = simulated.people(0, 40, False)
    asked = {a.text for day in range(8) for a in simulated.questions(0, day, crowd, 500)}
    assert not asked & {a.text for a in simulated.exam(0, crowd, 4, usual=False)}


def test_every_topic_is_examined_alike(simulated: ModuleType) -> None:
    asked = simulated.exam(0, simulated.people(0, 40, False), 4, usual=True)
    assert {sum(a.topic is topic for a in asked) for topic in simulated.TOPICS} == {20}


def test_the_same_reply_meets_the_same_reaction(simulated: ModuleType) -> None:
    crowd = simulated.people(0, 40, False)
    (asked,) = simulated.questions(0, 1, crowd, 1)
    assert simulated.met(0, 1, 0, asked, "No.") == simulated.met(0, 1, 0, asked, "No.")
