import json
from collections import Counter

import pytest
from nightschool.interfaces.demo_data import FACTS, MATTERS, QUESTIONS, USERS, conversations

NOW = 1_800_000_000.0
TALK = list(conversations(0, NOW))
REPLIES = [m for c in TALK for m in c["messages"] if m["role"] == "assistant"]


def test_the_same_seed_and_time_give_the_same_conversations_and_another_seed_others():
    assert list(conversations(0, NOW)) == TALK
    assert list(conversations(1, NOW)) != TALK


def test_they_lie_in_the_month_before_now_in_order_under_distinct_sessions():
    times = [c["created_utc"] for c in TALK]
    assert times == sorted(times)
    assert NOW - 31 * 86400 < times[0] < times[-1] < NOW
    assert len({c["session_id"] for c in TALK}) == len(TALK) == 500
    assert len({c["user_id"] for c in TALK}) == USERS


def test_they_are_json_with_turns_that_alternate():
    for conversation in TALK:
        assert json.loads(json.dumps(conversation)) == conversation
        assert [m["role"] for m in conversation["messages"]] == ["user", "assistant"] * (
            len(conversation["messages"]) // 2
        )


@pytest.mark.parametrize("matter", MATTERS, ids=lambda m: m.fact)
def test_good_answers_hold_the_fact_and_bad_ones_do_not(matter):
    assert all(matter.fact in answer for answer in matter.good)
    assert not any(matter.fact in answer for answer in matter.wrong)


def test_no_held_out_question_is_asked():
    asked = " ".join(m["content"].lower() for c in TALK for m in c["messages"] if m["role"] == "user")
    assert not [q for q in QUESTIONS if q.lower() in asked]
    assert set(FACTS) == set(QUESTIONS)
    assert len(QUESTIONS) == len(MATTERS)


def test_thumbs_are_on_about_half_and_mostly_right():
    good = {answer for matter in MATTERS for answer in matter.good}
    rated = [r for r in REPLIES if "rating" in r]
    assert 0.35 < len(rated) / len(REPLIES) < 0.6
    right = sum((r["rating"] > 0) == (r["content"] in good) for r in rated)
    assert 0.92 < right / len(rated) < 0.99
    assert sum("correction" in r for r in REPLIES) >= 10


def test_some_matters_come_up_far_more_often_than_others():
    of = {question: matter.fact for matter in MATTERS for question in matter.asked}
    turns = [m["content"] for c in TALK for m in c["messages"] if m["role"] == "user"]
    counts = Counter(fact for turn in turns for question, fact in of.items() if question in turn)
    assert len(counts) == len(MATTERS)
    assert max(counts.values()) > 3 * min(counts.values())
