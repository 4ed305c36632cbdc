import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.memory import signals
from nightschool.memory.cues import sentiment, vocabulary
from nightschool.memory.signals import (
    COEFFICIENTS,
    LONGEST_DELAY,
    SESSION_OVER,
    asked_anew,
    assess,
    censor_id,
    changed_share,
    combine,
    correction_of,
    label,
    label_of,
    learned_signal,
    rephrasing,
)
from nightschool.memory.types import Feedback, FeedbackEvent, Interaction, Satisfaction, Signal
from nightschool.settings import CensorSettings

SETTINGS = CensorSettings()


def turn(text: str, reply: str = "We open at eight.", at: float = 0.0) -> Interaction:
    return Interaction("i", "u", "", "s", 0, ({"role": "user", "content": text},), text, reply, at)


def said(
    rating: float | None = None,
    correction: str | None = None,
    comment: str | None = None,
    at: float = 0.0,
    event: FeedbackEvent | None = None,
) -> Feedback:
    return Feedback(f"f{at}", "i", rating, correction, comment, at, event)


def after(reaction: str | None, cosine: float | None = None, reply: str = "We open at eight.") -> Satisfaction:
    return assess(turn("when do you open", reply), [], turn(reaction) if reaction is not None else None, cosine)


# -- what was said outright ---


def test_a_thumb_decides_alone_whatever_the_next_turn_says():
    satisfaction = assess(turn("hi"), [said(1.0)], turn("no, that's wrong, useless"), 1.0)
    assert (satisfaction.score, satisfaction.confidence, satisfaction.explicit) == (1.0, 1.0, True)
    assert satisfaction.signals == (Signal("rating", 1.0),)


def test_the_latest_rating_counts():
    assert assess(turn("hi"), [said(-1.0, at=2.0), said(1.0, at=1.0)], None, None).score == -1.0


def test_a_rating_of_zero_takes_the_opinion_back():
    satisfaction = assess(turn("hi"), [said(1.0, at=1.0), said(0.0, at=2.0)], turn("thanks, perfect"), None)
    assert satisfaction.score == 0.0
    assert label(satisfaction, SETTINGS) is None


@pytest.mark.parametrize(("rating", "score"), [(None, -1.0), (-1.0, -1.0), (1.0, 0.0)])
def test_a_correction_says_the_answer_was_wrong_unless_praised_as_well(rating: float | None, score: float):
    assert assess(turn("hi"), [said(rating, "We open at nine.")], None, None).score == score


def test_a_correction_that_repeats_the_answer_or_is_blank_is_none():
    interaction = turn("when", reply="At eight.")
    assert correction_of(interaction, [said(correction=" At eight. "), said(correction="  ", at=1.0)]) is None
    assert assess(interaction, [said(correction="At eight.")], None, None).explicit is False


def test_the_latest_real_correction_is_taken():
    feedback = [said(correction="At nine.", at=1.0), said(correction="At ten.", at=2.0), said(correction="", at=3.0)]
    found = correction_of(turn("when"), feedback)
    assert found is not None and found.correction == "At ten."


def test_a_correction_that_was_taken_back_is_none():
    feedback = [said(correction="Sydney.", at=1.0), said(correction="Canberra.", at=2.0)]
    assert correction_of(turn("the capital?", reply="Canberra."), feedback) is None


def test_a_comment_without_a_thumb_is_read():
    assert label(assess(turn("hi"), [said(comment="great, very helpful")], None, None), SETTINGS) == "liked"
    assert assess(turn("hi"), [said(comment="so so")], None, None).confidence == 0.0


# -- what was done with the reply ---


def done(*events: FeedbackEvent, reaction: str | None = None) -> Satisfaction:
    return assess(turn("when do you open"), [said(event=e) for e in events], turn(reaction) if reaction else None, None)


@pytest.mark.parametrize(("event", "value"), [("copied", 1.0), ("accepted", 1.0), ("regenerated", -1.0)])
def test_what_the_app_saw_is_evidence_that_labels_nothing_alone(event: FeedbackEvent, value: float):
    satisfaction = done(event)
    assert (satisfaction.signals, satisfaction.explicit) == ((Signal(event, value),), False)
    assert satisfaction.score * value > 0
    assert label(satisfaction, SETTINGS) is None


def test_an_event_counts_once_however_often_and_adds_up_with_other_cues():
    assert done("copied", "copied") == done("copied")
    assert label(done("copied", reaction="thanks, great"), SETTINGS) == "liked"
    assert done("copied", "regenerated").confidence < done("copied").confidence


def test_a_thumb_overrules_what_was_done():
    satisfaction = assess(turn("hi"), [said(-1.0), said(event="accepted", at=1.0)], None, None)
    assert satisfaction.signals == (Signal("rating", -1.0),)


def test_a_regenerated_request_that_is_sent_again_is_one_act_and_no_rephrasing():
    assert [s.name for s in done("regenerated", reaction="when do  you open").signals] == ["regenerated"]
    assert {s.name for s in done("copied", reaction="when do you open").signals} == {"copied", "rephrasing"}
    asked = turn("when do you open")
    assert asked_anew(asked, [said(event="regenerated")], turn("When do you open"))
    assert not asked_anew(asked, [said(event="regenerated")], turn("what?"))
    assert not asked_anew(asked, [said(event="regenerated")], None)
    assert not asked_anew(asked, [said(event="copied")], asked)


@pytest.mark.parametrize(
    ("edited", "share"),
    [("We open at eight.", 0.0), ("We open at nine.", 0.25), ("We open at eight. Or nine.", 0.2), ("Closed", 1.0)],
)
def test_an_edit_says_how_much_of_the_reply_was_wrong(edited: str, share: float):
    assert changed_share("We open at eight.", edited) == share
    satisfaction = assess(turn("when"), [said(correction=edited, event="edited")], None, None)
    assert satisfaction.signals == ((Signal("edit", -share),) if share else ())
    assert satisfaction.explicit is bool(share)


def test_an_edit_of_a_reply_that_repeats_itself_is_compared_as_soon_as_any():
    start = time.process_time()
    assert changed_share("a " * 4000, "a b " * 2000) == 0.5
    assert time.process_time() - start < 5  # a comparison of all blocks took minutes


def test_an_edit_of_a_praised_reply_is_their_mean():
    given = [said(1.0), said(correction="We open at nine.", event="edited", at=1.0)]
    assert assess(turn("when"), given, None, None).score == 0.375


# -- when it was met ---


def test_times_are_evidence_that_is_shown_and_does_not_count():
    late = assess(turn("when do you open"), [], turn("and on Sunday?", at=60.0), None)
    ended = assess(turn("when do you open"), [], None, None, silence=SESSION_OVER)
    left = assess(turn("when do you open", "Which shop?"), [], None, None, silence=SESSION_OVER)
    assert [s.name for s in late.signals] == ["delay"]
    assert ended.signals == (Signal("session_end", 1.0),)
    assert left.signals == (Signal("session_end", 1.0), Signal("abandoned", -1.0))
    assert {(s.score, s.confidence) for s in (late, ended, left)} == {(0.0, 0.0)}
    assert assess(turn("when", ""), [], None, None, silence=SESSION_OVER).score == after(None, reply="").score


def test_delay_grows_to_one_and_a_clock_that_goes_back_or_stands_still_says_nothing():
    delays = [
        assess(turn("hi"), [], turn("hello", at=at), None).signals for at in (-5.0, 0.0, 10.0, LONGEST_DELAY, 1e9)
    ]
    assert delays[:2] == [(), ()]
    assert [s.value for (s,) in delays[2:]] == [0.293, 1.0, 1.0]


def test_a_session_that_may_go_on_has_not_ended():
    assert assess(turn("hi"), [], None, None, silence=SESSION_OVER - 1).signals == ()


# -- what the next turn shows ---


@pytest.mark.parametrize(
    "reaction",
    [
        "no, I meant on Sunday",
        "That's wrong.",
        "that’s not what I asked",
        "You didn't answer my question",
        "Nope. The other shop",
        "as I said, the rear wheel",
        "No, that's not right",
        "nope, still broken",
        "I already told you",
        "I just told you that",
        "Please try again.",
        "You gave me the wrong one",
        "No, that is all wrong.",
        "No, that's fine but I asked for the other file.",
    ],
)
def test_a_correcting_turn_is_dislike(reaction: str):
    satisfaction = after(reaction)
    assert Signal("correction_cue", -1.0) in satisfaction.signals
    assert label(satisfaction, SETTINGS) == "disliked"


@pytest.mark.parametrize("reaction", ["No, I asked about the nice hotel in Oslo.", "No, I wanted the good one."])
def test_praise_of_something_else_takes_no_denial_back(reaction: str):
    satisfaction = after(reaction)
    assert Signal("correction_cue", -1.0) in satisfaction.signals and satisfaction.score < 0


@pytest.mark.parametrize("reaction", ["no", "No, the front one", "nothing else", "I know that already, thanks"])
def test_no_as_the_answer_to_a_question_corrects_nothing(reaction: str):
    satisfaction = after(reaction, reply="Is it the rear wheel?")
    assert "correction_cue" not in {s.name for s in satisfaction.signals}


@pytest.mark.parametrize(
    "reaction",
    [
        "No, that's exactly what I needed.",
        "No, that's perfect",
        "No, it works now!",
        "No, thanks.",
        "No, that's all.",
        "No it's great",
        "no i love it",
        "Nope, that's all I need today",
        "I just told my boss and he loved it!",
        "Let me try again later.",
        "I bought the wrong one, what now?",
        "Sorry, I meant Tuesday.",
    ],
)
def test_thanks_and_small_talk_with_a_no_in_it_are_no_dislike(reaction: str):
    satisfaction = after(reaction)
    assert "correction_cue" not in {s.name for s in satisfaction.signals}
    assert label(satisfaction, SETTINGS) != "disliked"


@pytest.mark.parametrize(
    "comment",
    [
        "I would like the right answer.",
        "Please be more clear and correct",
        "Should be more like the good one yesterday",
        "would have been nice to get it right",
    ],
)
def test_what_a_comment_wishes_for_is_no_praise(comment: str):
    assert label(assess(turn("hi"), [said(comment=comment)], None, None), SETTINGS) is None


@pytest.mark.parametrize("reaction", ["thanks!", "ok", "great", "what?", "and on Sunday?"])
def test_one_weak_cue_leaves_the_turn_unlabelled(reaction: str):
    assert label(after(reaction), SETTINGS) is None


@pytest.mark.parametrize(
    ("reaction", "cosine", "expected"),
    [
        ("thanks, that's perfect, great", None, "liked"),
        ("what? when do you open the shop", 0.96, "disliked"),
        ("thanks for nothing, useless, awful", None, None),
        ("what? that makes no sense, this is useless, terrible", None, "disliked"),
    ],
)
def test_cues_that_agree_add_up(reaction: str, cosine: float | None, expected: str | None):
    assert label(after(reaction, cosine), SETTINGS) == expected


def test_cues_that_disagree_lower_the_confidence():
    assert after("thanks, but that's wrong").confidence > after("thank you! that's wrong, great").confidence


def test_no_cue_no_opinion():
    for satisfaction in (after("and on Sunday?", 0.3), after(None)):
        assert (satisfaction.score, satisfaction.confidence, satisfaction.signals) == (0.0, 0.0, ())


def test_rephrasing_grows_with_the_cosine_and_needs_more_than_a_word_or_two():
    values = [rephrasing("when do you open", "what are your hours", c) for c in (0.5, 0.8, 0.9, 0.99)]
    assert values == sorted(values, reverse=True)
    assert (values[0], values[-1]) == (0.0, -1.0)
    for request, again in (("ok", "ok"), ("when do you open", "open"), ("open", "when do you open")):
        assert rephrasing(request, again, 1.0) == 0.0
    assert rephrasing("when do you open", "when do you open", None) == -1.0
    assert rephrasing("when do you open", "what are your hours", None) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("good", 0.5),
        ("not good", -0.5),
        ("really great, love it", 1.0),
        ("a wheel", 0.0),
        ("no, great", 0.5),
        ("it should be great", 0.0),
    ],
)
def test_sentiment_counts_praise_and_blame_and_minds_negation(text: str, value: float):
    assert sentiment(text) == value


# -- what the reply shows ---


def test_an_empty_reply_is_disliked():
    assert label(after(None, reply="  "), SETTINGS) == "disliked"


def test_refusals_and_repetitions_are_noticed_and_label_only_together():
    interaction = turn("when do you open", "I'm sorry, I cannot help with that.")
    once = assess(interaction, [], None, None)
    again = assess(interaction, [], None, None, earlier_replies=["I'm sorry, I  cannot help with that."])
    assert [s.name for s in once.signals] == ["refusal"]
    assert [s.name for s in again.signals] == ["refusal", "repeated"]
    assert (label(once, SETTINGS), label(again, SETTINGS)) == (None, "disliked")


def test_a_reply_that_only_says_the_request_again_is_noticed():
    assert assess(turn("say it", "Say  it"), [], None, None).signals == (Signal("repeated", -1.0),)


# -- the version ---


def test_satisfaction_names_the_version_that_scored_it():
    assert after("thanks!").censor == censor_id() == assess(turn("hi"), [said(1.0)], None, None).censor
    assert assess(turn("hi"), [], None, None, reader_id="b2:7").censor == censor_id("b2:7") != censor_id()


def test_another_coefficient_or_word_or_rule_is_another_version(monkeypatch: pytest.MonkeyPatch):
    def version(change: str, value: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(signals, change, value)
            return signals.censor_id.__wrapped__()

    changes = {
        "COEFFICIENTS": COEFFICIENTS | {"gratitude": 1.4},
        "vocabulary": lambda: vocabulary() | {"PRAISE": ["good"]},
        "RULES": signals.RULES + 1,
        "INFERRED_CEILING": 0.7,
    }
    assert len({censor_id(), *(version(*change) for change in changes.items())}) == 5


def test_vocabulary_holds_every_pattern_and_list_of_words_as_plain_text():
    assert {"CORRECTION", "GRATITUDE", "PRAISE", "NEGATIONS"} <= vocabulary().keys()
    assert "thx" in vocabulary()["GRATITUDE"][0]


# -- the arithmetic ---


@pytest.mark.parametrize("name", [n for n, a in COEFFICIENTS.items() if a < 1.96])
def test_no_weak_cue_labels_alone(name: str):
    assert label_of(*combine([Signal(name, -1.0)]), SETTINGS) is None


@given(st.lists(st.tuples(st.sampled_from(sorted(COEFFICIENTS)), st.floats(-1, 1)), max_size=8))
def test_inferred_scores_stay_in_range_and_never_outrank_a_thumb(signals: list[tuple[str, float]]):
    score, confidence = combine([Signal(n, v) for n, v in signals])
    assert -1 <= score <= 1
    assert 0 <= confidence <= 0.8


@given(st.text(), st.text(), st.text(), st.floats(-1, 1))
def test_any_text_can_be_assessed(text: str, reply: str, reaction: str, cosine: float):
    satisfaction = assess(turn(text, reply), [], turn(reaction), cosine, earlier_replies=[text])
    assert -1 <= satisfaction.score <= 1


@pytest.mark.parametrize(
    ("score", "confidence", "expected"),
    [(0.2, 0.5, "liked"), (-0.2, 0.5, "disliked"), (0.1, 1.0, None), (1.0, 0.49, None)],
)
def test_labels_need_confidence_and_a_clear_score(score: float, confidence: float, expected: str | None):
    assert label_of(score, confidence, SETTINGS) == expected


def test_odds_of_a_reader_are_a_signal_within_bounds_and_none_without_an_opinion():
    assert learned_signal(0.0, at_home=False) is None
    assert learned_signal(-1e9, at_home=False) == Signal("learned", -1.0)
    assert learned_signal(1e9, at_home=True) == Signal("learned_at_home", 1.0)
    mild = learned_signal(0.5 * COEFFICIENTS["learned"], at_home=False)
    assert mild == Signal("learned", 0.5)


@pytest.mark.parametrize(("reply", "edited", "share"), [("", "yes", 1.0), ("yes", " ", 1.0), (" ", "", 0.0)])
def test_all_of_what_was_empty_is_changed(reply, edited, share):
    assert changed_share(reply, edited) == share
