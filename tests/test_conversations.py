from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.content import Message, content_id
from nightschool.errors import InputError
from nightschool.memory.conversations import (
    Conversation,
    Owner,
    Review,
    answered_since,
    checked_conversation,
    checked_messages,
    checked_new_owner,
    checked_review,
    checked_text,
    checked_time,
    continued,
    feedback_id,
    interactions_of,
    made_interaction,
    messages_of,
    plan,
    user_words,
)
from nightschool.memory.types import Interaction

OWNER = Owner("ann", "", "s")
ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def chat(*lines: str) -> tuple[Message, ...]:
    """`u:hello` is a user message."""
    return tuple({"role": ROLES[line[0]], "content": line[2:]} for line in lines)  # type: ignore[typeddict-item]


def conversation(*lines: str, reviews: dict[int, Review] | None = None) -> Conversation:
    return Conversation(OWNER, chat(*lines), tuple(float(i) for i in range(len(lines))), reviews or {})


def cut(*lines: str) -> list[Interaction]:
    return [made for made, _ in interactions_of(conversation(*lines))]


def held(*lines: str) -> dict[int, Interaction]:
    return {made.position: made for made in cut(*lines)}


def test_every_reply_closes_an_interaction_with_what_was_said_since_the_reply_before():
    first, second = cut("s:be kind", "u:hi", "a:hello", "u:one", "u:two", "a:three")
    assert (first.position, first.turn, first.text, first.reply) == (0, chat("s:be kind", "u:hi"), "hi", "hello")
    assert (second.position, second.turn, second.text, second.reply) == (1, chat("u:one", "u:two"), "two", "three")
    assert (first.created_utc, second.created_utc) == (2.0, 5.0)


def test_turn_of_tools_answers_the_request_before_it():
    asked, looked_up = cut("u:weather?", "a:[calls]", "t:rain", "a:It rains.")
    assert (looked_up.turn, looked_up.text) == (chat("t:rain"), "weather?")
    assert user_words(looked_up.turn) == ""
    assert asked.text == "weather?"


def test_greeting_before_any_request_has_no_text():
    (greeting,) = cut("a:How can I help?")
    assert (greeting.turn, greeting.text, greeting.reply) == ((), "", "How can I help?")


def test_last_words_of_the_user_are_kept_without_a_reply():
    _, last = cut("u:hi", "a:hello", "u:thanks")
    assert (last.text, last.reply, last.position) == ("thanks", "", 1)


@pytest.mark.parametrize("ending", ["s:the end", "t:a result", "u: \n"])
def test_ending_without_words_of_the_user_is_left_out(ending):
    assert len(cut("u:hi", "a:hello", ending)) == 1


def test_blank_message_is_not_the_request():
    (only,) = cut("u:what is it?", "u:  ", "a:this")
    assert (only.text, user_words(only.turn)) == ("what is it?", "what is it?")


@given(st.lists(st.tuples(st.sampled_from("suat"), st.text(max_size=5)).map(":".join)))
def test_cutting_keeps_every_message_up_to_the_last_reply_or_request(lines):
    made = cut(*lines)
    said = [m for m in chat(*lines) if m["role"] != "assistant" or m["content"]]
    put_together = messages_of(made)
    assert put_together == said[: len(put_together)]
    assert not any(m["role"] == "user" and m["content"].strip() for m in said[len(put_together) :])
    assert all(b.position == a.position + 1 for a, b in pairwise(made))
    assert len({m.id for m in made}) == len(made)


def test_id_depends_on_owner_place_turn_and_reply_and_on_nothing_else():
    def named(owner=OWNER, position=0, turn="u:hi", reply="hello", time=0.0):
        return made_interaction(owner, position, chat(turn), "hi", reply, time).id

    others = [
        named(owner=Owner("bob", "", "s")),
        named(owner=Owner("ann", "a", "s")),
        named(owner=Owner("ann", "", "t")),
        named(position=1),
        named(turn="u:ho"),
        named(turn="t:hi"),
        named(reply="hello!"),
    ]
    assert named() not in others
    assert len(set(others)) == len(others)
    assert named(time=9.0) == named()


# -- growing ---


def test_same_conversation_again_adds_nothing():
    planned = plan(conversation("u:hi", "a:hello", "u:thanks"), held("u:hi", "a:hello", "u:thanks"), frozenset())
    assert (planned.new, planned.replaced, planned.known) == ((), {}, 2)


def test_longer_conversation_adds_what_is_new():
    planned = plan(conversation("u:hi", "a:hello", "u:bye", "a:bye"), held("u:hi", "a:hello"), frozenset())
    assert ([i.reply for i in planned.new], planned.known) == (["bye"], 1)


@pytest.mark.parametrize("rest", [["a:welcome"], ["u:bye", "a:welcome"], ["u:and bye"]])
def test_unanswered_turn_is_replaced_when_it_is_answered_or_grows(rest):
    before = held("u:hi", "a:hello", "u:thanks")
    planned = plan(conversation("u:hi", "a:hello", "u:thanks", *rest), before, frozenset())
    (new,) = planned.new
    assert planned.replaced == {before[1].id: new.id}
    assert new.position == 1


def test_older_copy_of_a_conversation_that_has_grown_adds_nothing():
    before = held("u:hi", "a:hello", "u:thanks", "a:welcome")
    planned = plan(conversation("u:hi", "a:hello", "u:thanks"), before, frozenset())
    assert (planned.new, planned.replaced, planned.known) == ((), {}, 2)


@pytest.mark.parametrize("lines", [["u:hi", "a:other"], ["u:other", "a:hello"], ["u:other"]])
def test_contradiction_is_refused_with_session_and_position(lines):
    with pytest.raises(InputError, match="session 's' of user 'ann' has something else at position 0"):
        plan(conversation(*lines), held("u:hi", "a:hello"), frozenset())


def test_empty_reply_that_was_rated_stands():
    before = held("u:hi", "a:")
    with pytest.raises(InputError, match="position 0"):
        plan(conversation("u:hi", "a:hello"), before, frozenset([before[0].id]))


def test_reviews_go_to_the_interaction_of_their_message():
    thumb, fix = Review(rating=1.0), Review(correction="no, hello")
    planned = plan(conversation("u:hi", "a:hello", "u:so", "a:what", reviews={1: thumb, 3: fix}), {}, frozenset())
    first, second = planned.new
    assert planned.reviews == ((first.id, thumb, 1.0), (second.id, fix, 3.0))


def test_review_of_an_empty_reply_that_has_been_replaced_is_dropped():
    planned = plan(conversation("u:hi", "a:", reviews={1: Review(rating=-1.0)}), held("u:hi", "a:hello"), frozenset())
    assert (planned.reviews, planned.known) == ((), 1)


def made(*turn: str, reply: str = "r") -> Interaction:
    said = chat(*turn)
    return made_interaction(OWNER, 0, said, user_words(said), reply, 0.0)


def test_next_turn_follows_the_last_one():
    (last,) = cut("u:hi", "a:hello")
    after = continued(last, False, OWNER, made("t:result"))
    assert (after.position, after.text) == (1, "hi")
    assert after.id == made_interaction(OWNER, 1, chat("t:result"), "", "r", 0.0).id


@pytest.mark.parametrize("turn", [["u:question"], ["u:thanks", "u:question"]])
def test_turn_after_an_unanswered_one_takes_its_words_in_once(turn):
    unanswered = cut("u:hi", "a:hello", "u:thanks")[1]
    after = continued(unanswered, True, OWNER, made(*turn))
    assert (after.position, after.turn, after.text) == (1, chat("u:thanks", "u:question"), "question")


def test_first_turn_of_a_session_stays_as_it_is():
    assert continued(None, False, OWNER, made("u:hi")) == made("u:hi")


# -- what is refused ---


@pytest.mark.parametrize(
    ("owner", "reason"),
    [
        (("", "", "s"), "user_id is empty"),
        (("u" * 256, "", "s"), "user_id has 256 bytes"),
        (("u", "a" * 256, "s"), "agent_id has 256 bytes"),
        (("u", "", 5), "session_id is of type int"),
        (("u\0", "", "s"), "user_id holds a NUL"),
    ],
)
def test_owner_that_cannot_be_kept_is_refused_by_field(owner, reason):
    with pytest.raises(InputError, match=reason):
        checked_new_owner(*owner)


def test_role_and_content_are_checked_by_message():
    with pytest.raises(InputError, match="message 1: role is not one of system, user, assistant, tool"):
        checked_messages([*chat("u:hi"), {"role": "robot", "content": "x"}])  # type: ignore[typeddict-item]
    with pytest.raises(InputError, match="message 0: content is of type NoneType"):
        checked_messages([{"role": "user", "content": None}])  # type: ignore[typeddict-item]


def test_other_keys_of_a_message_are_left_out():
    said = {"role": "user", "content": "hi", "name": "Ann"}
    assert checked_messages([said]) == chat("u:hi")  # type: ignore[list-item]


@pytest.mark.parametrize(("text", "reason"), [("a\0b", "NUL character at 1"), ("ab\ud800", "surrogate pair at 2")])
def test_text_that_some_database_cannot_hold_is_refused_with_its_place(text, reason):
    with pytest.raises(InputError, match=f"reply holds .*{reason}"):
        checked_text("reply", text)


@pytest.mark.parametrize(
    "text", ["", "\u202eright to left", "zero\u200bwidth", 'it\'s "quoted" -- ; DROP', "\U0010ffff", "x" * 400_000]
)
def test_odd_text_is_taken_as_it_is(text):
    assert checked_text("reply", text) == text


@pytest.mark.parametrize("time", [float("nan"), float("inf"), True, "2024-01-01", None])
def test_time_that_is_no_finite_number_is_refused(time):
    with pytest.raises(InputError, match="created_utc"):
        checked_time("created_utc", time)


@pytest.mark.parametrize("time", [-6e10, 0, 4e9])
def test_ancient_and_future_times_are_taken(time):
    assert checked_time("created_utc", time) == time


@pytest.mark.parametrize(
    ("review", "reason"),
    [
        (Review(rating=5), "rating is 5, not"),
        (Review(rating=float("nan")), "rating is nan"),
        (Review(rating=True), "rating is of type bool"),
        (Review(rating="up"), "rating is of type str"),  # type: ignore[arg-type]
        (Review(correction=" "), "correction is blank"),
        (Review(rating=1, comment=""), "comment is blank"),
        (Review(correction=3), "correction is of type int"),  # type: ignore[arg-type]
        (Review(), "nothing to keep"),
        (Review(event="liked"), "event is 'liked'; give one of copied, accepted, regenerated, edited"),  # type: ignore[arg-type]
        (Review(rating=1, event=[]), "give one of copied"),  # type: ignore[arg-type]
        (Review(event="edited"), "event is edited, but there is no correction"),
        (Review(correction=" ", event="edited"), "correction is blank"),
    ],
)
def test_review_that_says_nothing_usable_is_refused(review, reason):
    with pytest.raises(InputError, match=reason):
        checked_review(review)


@pytest.mark.parametrize(
    "review", [Review(event="copied"), Review(event="edited", correction="hello"), Review(-1.0, event="regenerated")]
)
def test_what_was_done_with_a_reply_is_kept_with_and_without_words(review):
    assert checked_review(review) == review


def test_feedback_without_an_event_has_the_id_that_it_had_before_there_were_events():
    assert feedback_id("b2:1", Review(1.0, "hello", None)) == content_id(["feedback", "b2:1", 1.0, "hello", None])
    events = [Review(1.0), *(Review(1.0, event=event) for event in ("copied", "accepted", "regenerated"))]
    assert len({feedback_id("b2:1", review) for review in events}) == 4


def test_minus_zero_is_the_same_rating_as_zero():
    assert str(checked_review(Review(rating=-0.0)).rating) == "0.0"


@pytest.mark.parametrize("index", [0, 2, -1])
def test_only_a_reply_can_be_reviewed(index):
    with pytest.raises(InputError, match=f"message {index}: only a message of the assistant"):
        checked_conversation(conversation("u:hi", "a:hello", reviews={index: Review(rating=1)}))


def test_turn_is_known_by_every_id_that_it_had_before_it_was_answered(quick_store):
    owner = {"user_id": "ann", "session_id": "s"}
    opened = [quick_store.record([{"role": "user", "content": words}], "", **owner).id for words in ("hi", "and?")]
    answered = quick_store.record([{"role": "user", "content": "well?"}], "yes", **owner)
    assert answered_since({*opened, "b2:gone"}, [answered]) == dict.fromkeys(opened, answered.id)
    assert answered_since({answered.id}, [answered]) == {}
