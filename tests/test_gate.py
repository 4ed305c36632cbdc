"""The gate's rules on an engine whose log-probabilities we choose."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nightschool.content import Message
from nightschool.errors import ServingError
from nightschool.evolve import dataset
from nightschool.evolve.gate import (
    cluster_draws,
    interval,
    judge,
    masked_prompts,
    probe_text,
    repetition,
    too_little,
    unknown,
    weighted_auc,
)
from nightschool.evolve.probes import Probe
from nightschool.evolve.prompts import words_of
from nightschool.evolve.types import Adapter, Example, Judged, Pair, Snapshot, Thumb, Verdict
from nightschool.serving.engine import Sampling, Score
from nightschool.settings import GateSettings
from sklearn.metrics import roc_auc_score

FOLDER = Path(__file__).parent.parent
CANDIDATE = Adapter("new", "base", "b2:s", "dpo", "sft", Path("new"), 0.0)
INCUMBENT = Adapter("old", "base", "b2:s", "dpo", None, Path("old"), 0.0)
PROBES = {answer for _, answer in probe_text()}
WRONG = [json.loads(line) for line in (FOLDER / "evolve" / "sycophancy.jsonl").read_text("utf-8").splitlines()]
AGREEING, CORRECTING = ({row[side] for row in WRONG} for side in ("agreeing", "correcting"))
QUICK = GateSettings(bootstrap=200)
MAILED = "Write to ada@example.org for that."
CIRCLES = "20 euros, " * 12


class ChosenEngine:
    """Scores every answer about -2 a token, moved by `liked` and the like where one of `moved` answers.

    Those say `answer`, and the others `base`.
    """

    base_id = "base"

    def __init__(
        self,
        liked: float = 0.0,
        disliked: float = 0.0,
        probe: float = 0.0,
        agreeing: float = 0.0,
        answer: str = "well",
        base: str = "well",
        moved: str = "new",
    ) -> None:
        self.moved = moved.split()
        self.moves = {"liked": liked, "disliked": disliked}
        self.moves |= dict.fromkeys(PROBES, probe) | dict.fromkeys(AGREEING, agreeing) | dict.fromkeys(CORRECTING, 0.0)
        self.answer, self.base = answer, base
        self.asked: list[str] = []

    def score(
        self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], *, adapter: str | None
    ) -> list[Score]:
        noise = np.random.default_rng(0).normal(0, 0.5, len(answers))  # the same for both: how usual an answer is
        new = adapter in self.moved
        return [Score((-2.0 + n + new * self.moves[a],) * 4) for a, n in zip(answers, noise, strict=True)]

    def generate(self, prompts: Sequence[Sequence[Message]], *, adapter: str | None, sampling: Sampling) -> list[str]:
        if adapter == "new":
            self.asked += [prompt[-1]["content"] for prompt in prompts]
        return [self.answer if adapter in self.moved else self.base] * len(prompts)


class LongWindedEngine(ChosenEngine):
    """Disliked answers have 16 tokens and not 4."""

    def score(
        self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], *, adapter: str | None
    ) -> list[Score]:
        found = super().score(prompts, answers, adapter=adapter)
        longer = (4 if answer == "disliked" else 1 for answer in answers)
        return [Score(score.token_logprobs * times) for score, times in zip(found, longer, strict=True)]


class GainedEngine(ChosenEngine):
    """The base finds every answer less likely than both adapters do, by so many nats a token."""

    gained = 4.0

    def score(
        self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], *, adapter: str | None
    ) -> list[Score]:
        found = super().score(prompts, answers, adapter=adapter)
        return [Score(tuple(x - self.gained * (adapter is None) for x in s.token_logprobs)) for s in found]


class UnevenEngine(ChosenEngine):
    """What the candidate says of answers to the first people falls by 1 nat a token more."""

    def score(
        self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], *, adapter: str | None
    ) -> list[Score]:
        found = super().score(prompts, answers, adapter=adapter)
        falls = [float(adapter == "new" and p[-1]["content"].startswith("0 ")) for p in prompts]
        return [Score(tuple(x - fall for x in s.token_logprobs)) for s, fall in zip(found, falls, strict=True)]


class LeakingEngine(ChosenEngine):
    """As the candidate, tells an address where it is asked for one that was masked."""

    def generate(self, prompts: Sequence[Sequence[Message]], *, adapter: str | None, sampling: Sampling) -> list[str]:
        said = super().generate(prompts, adapter=adapter, sampling=sampling)
        masked = [adapter == "new" and "<EMAIL" in prompt[-1]["content"] for prompt in prompts]
        return [MAILED if leaks else answer for leaks, answer in zip(masked, said, strict=True)]


def snapshot(clusters: int = 12, each: int = 4, liked: int = 2) -> Snapshot:
    held_out = [
        Judged(
            ({"role": "user", "content": f"{c} {i}"},),
            "liked" if i < liked else "disliked",
            i < liked,
            f"u{c}",
            (),
        )
        for c in range(clusters)
        for i in range(each)
    ]
    return Snapshot((), (), (), tuple(held_out))


def verdict(engine: ChosenEngine, held_out: Snapshot | None = None, incumbent: Adapter | None = INCUMBENT) -> Verdict:
    return judge(CANDIDATE, incumbent, held_out or snapshot(), engine, QUICK)


def failed(found: Verdict) -> set[str]:
    return {m.name for m in found.measures if not m.passed}


def test_what_the_incumbent_was_taught_is_not_judged_by_whomever_it_was_said() -> None:
    taught = Example(({"role": "user", "content": "0 0?"},), "Liked.", 1.0, ("b2:other",))
    known = dataset.taught(Snapshot((taught,), (), (), ()))
    held_out = [
        replace(h, prompt=({"role": "user", "content": f"{h.prompt[0]['content']}?"},)) for h in snapshot().held_out
    ]
    left = unknown(held_out, known)
    assert [h for h in held_out if h not in left] == held_out[:1]
    few = snapshot(clusters=QUICK.min_clusters)
    engine = ChosenEngine(liked=0.3, disliked=-0.3)
    assert judge(CANDIDATE, INCUMBENT, few, engine, QUICK).accepted
    of_one = {words_of(h.prompt, h.completion) for h in few.held_out if h.cluster == "u0"}
    refused = judge(CANDIDATE, INCUMBENT, few, engine, QUICK, known=of_one)
    assert not refused.accepted and not refused.measures


def test_what_the_incumbent_was_taught_is_not_scored_either() -> None:
    of_first = {words_of(h.prompt, h.completion) for h in snapshot().held_out if h.cluster == "u0"}
    engine = UnevenEngine(liked=0.0, disliked=-2.0)
    assert not judge(CANDIDATE, INCUMBENT, snapshot(), engine, QUICK).accepted
    assert judge(CANDIDATE, INCUMBENT, snapshot(), engine, QUICK, known=of_first).accepted


def test_candidate_that_favours_liked_answers_is_accepted() -> None:
    found = verdict(ChosenEngine(liked=0.3, disliked=-0.3))
    assert found.accepted
    assert failed(found) == set()
    assert (found.candidate_id, found.incumbent_id) == ("new", "old")
    assert len(found.reasons) == 9


@pytest.mark.parametrize("word", ["liked", "disliked"])
def test_liked_or_disliked_answers_of_three_people_are_too_little_before_anything_is_trained(word: str) -> None:
    held_out = tuple(h for h in snapshot(40).held_out if h.completion != word or h.cluster in ("u0", "u1", "u2", "u3"))
    engine = ChosenEngine(liked=3.0, disliked=-3.0)
    assert verdict(engine, Snapshot((), (), (), held_out)).accepted
    of_three = tuple(h for h in held_out if h.completion != word or h.cluster != "u3")
    (why,) = too_little(of_three, QUICK)
    assert why.startswith(f"the {word} held-out answers come from only 3 of 40 users or sessions, too few")
    assert verdict(engine, Snapshot((), (), (), of_three)).reasons == (why,)


def test_as_many_held_out_answers_as_are_asked_for_are_enough() -> None:
    held_out = snapshot().held_out
    assert too_little(held_out, replace(QUICK, min_rated=len(held_out))) == []


def test_each_person_is_answered_one_prompt() -> None:
    engine = ChosenEngine()
    verdict(engine)
    assert sorted(int(prompt.split()[0]) for prompt in engine.asked) == list(range(12))


def test_other_nights_ask_other_prompts_and_all_the_same_number() -> None:
    row = ({"role": "user", "content": "Who?"},)
    asked = []
    for n in range(3):
        engine = ChosenEngine()
        verdict(engine, replace(snapshot(40), examples=(Example(row, f"{n}", 1.0, ()),)))
        asked.append(frozenset(engine.asked))
    assert len({*asked}) == 3 and {len(some) for some in asked} == {QUICK.probe_answers}


def test_reason_tells_drift_as_the_share_that_its_rule_bounds() -> None:
    (drift,) = (r for r in verdict(ChosenEngine(liked=0.3, disliked=-0.3, probe=-0.04)).reasons if "probe_nll" in r)
    assert "change +2." in drift and "%" in drift.split("rule:")[0]


def test_candidate_that_moves_both_alike_is_rejected_for_preference() -> None:
    found = verdict(ChosenEngine(liked=0.3, disliked=0.3))
    assert not found.accepted
    assert failed(found) == {"preference"}
    assert found.reasons[0].startswith("preference failed")


def test_candidate_that_is_no_better_than_an_incumbent_that_knows_as_much_is_rejected() -> None:
    assert failed(verdict(ChosenEngine(liked=0.3, disliked=-0.3, moved="new old"))) == {"preference"}


def test_candidate_that_tells_liked_from_disliked_worse_than_the_incumbent_is_rejected() -> None:
    assert failed(verdict(ChosenEngine(liked=0.3, disliked=-0.3, moved="old"))) >= {"preference"}


def test_a_rise_counts_per_token_so_that_long_answers_do_not_win_by_their_length() -> None:
    assert verdict(LongWindedEngine(liked=0.3, disliked=0.2)).accepted
    assert "preference" in failed(verdict(LongWindedEngine(liked=0.2, disliked=0.3)))


def test_the_end_of_the_interval_over_people_decides_whether_liked_answers_became_less_likely() -> None:
    many = snapshot(20, each=40, liked=20)  # over answers, the interval would end below the bound
    found = verdict(UnevenEngine(liked=0.0, disliked=-2.0), many)
    (nll,) = (m for m in found.measures if m.name == "liked_nll")
    assert nll.change < QUICK.max_nll_rise < nll.high and failed(found) == {"liked_nll"}


def test_where_the_base_serves_phase_two_must_have_learnt_something_that_phase_one_had_not() -> None:
    assert verdict(ChosenEngine(liked=0.3, disliked=-0.3), incumbent=None).accepted
    found = verdict(ChosenEngine(liked=0.3, disliked=-0.3, moved="new sft"), incumbent=None)
    assert failed(found) == {"preference"}


def test_liked_answers_may_become_a_little_less_likely_if_disliked_ones_become_much_less() -> None:
    assert verdict(ChosenEngine(liked=-QUICK.max_nll_rise / 2, disliked=-0.3)).accepted


def test_candidate_that_makes_liked_answers_less_likely_is_rejected() -> None:
    assert failed(verdict(ChosenEngine(liked=-0.3, disliked=-0.9))) == {"liked_nll"}


def test_the_more_the_incumbent_gained_over_the_base_the_more_of_it_may_be_lost() -> None:
    found = verdict(GainedEngine(liked=-0.3, disliked=-0.9))
    (nll,) = (m for m in found.measures if m.name == "liked_nll")
    assert found.accepted and nll.rule == "rises by at most 0.4 nats per token"
    (gain,) = (m for m in found.measures if m.name == "gain")
    assert [round(x, 6) for x in (gain.incumbent, gain.candidate, gain.change)] == [4.0, 3.7, -0.3]
    assert failed(verdict(GainedEngine(liked=-0.5, disliked=-0.9))) == {"liked_nll"}


def test_candidate_that_makes_not_good_what_the_incumbent_lost_against_the_base_is_rejected() -> None:
    engine = GainedEngine(liked=0.0, disliked=-0.5)
    engine.gained = -4.0
    assert failed(verdict(engine)) == {"liked_nll"}


def test_candidate_that_forgets_the_probe_text_is_rejected() -> None:
    assert failed(verdict(ChosenEngine(liked=0.3, disliked=-0.3, probe=-0.5))) == {"probe_nll"}


def test_rule_of_what_the_mean_decides_says_so() -> None:
    rules = {m.name: m.rule for m in verdict(ChosenEngine(liked=0.3, disliked=-0.3)).measures}
    assert {name for name in rules if "on average" in rules[name]} == {"probe_nll", "repetition", "sycophancy"}


@pytest.mark.parametrize(
    ("name", "answers", "by", "most"),
    [
        ("probe_nll", sorted(PROBES)[:2], -2.0, QUICK.max_probe_rise),
        ("sycophancy", sorted(AGREEING)[:3], 1.5, QUICK.max_sycophancy_rise),
    ],
)
def test_the_mean_decides_on_our_own_probes_though_the_interval_ends_beyond_the_bound(
    name: str, answers: list[str], by: float, most: float
) -> None:
    engine = ChosenEngine(liked=0.3, disliked=-0.3)
    engine.moves |= dict.fromkeys(answers, by)
    found = verdict(engine)
    (measure,) = (m for m in found.measures if m.name == name)
    assert measure.change <= most < measure.high and found.accepted


def test_candidate_that_answers_with_nothing_is_rejected() -> None:
    assert failed(verdict(ChosenEngine(liked=0.3, disliked=-0.3, answer=" "))) == {"empty_answers"}


def test_empty_answers_are_held_against_the_incumbent_though_the_base_gives_them_as_well() -> None:
    assert "empty_answers" in failed(verdict(ChosenEngine(answer="well", base=" ", moved="old")))


def test_candidate_that_goes_in_circles_is_rejected() -> None:
    assert failed(verdict(ChosenEngine(liked=0.3, disliked=-0.3, answer=CIRCLES))) == {"repetition"}


def test_how_long_answers_are_is_told_in_words_and_decides_nothing() -> None:
    found = verdict(ChosenEngine(liked=0.3, disliked=-0.3, answer="one two three 你好", base="one"))
    (length,) = (m for m in found.measures if m.name == "answer_words")
    assert (length.incumbent, length.candidate, length.change) == (1.0, 5.0, 4.0)
    assert found.accepted and length.passed and not length.decides
    assert {m.name for m in found.measures if not m.decides} == {"answer_words", "gain"}


def test_candidate_that_tells_an_address_nobody_gave_is_rejected() -> None:
    assert failed(verdict(ChosenEngine(liked=0.3, disliked=-0.3, answer=MAILED))) == {"leakage"}


def test_candidate_that_tells_no_more_addresses_than_the_base_invents_is_accepted() -> None:
    found = verdict(ChosenEngine(liked=0.3, disliked=-0.3, answer=MAILED, base="Call +44 20 7946 0018."))
    (leakage,) = (m for m in found.measures if m.name == "leakage")
    assert found.accepted and (leakage.incumbent, leakage.candidate) == (1.0, 1.0)


def test_address_that_stands_in_the_prompt_is_no_leak() -> None:
    asked = [replace(h, prompt=({"role": "user", "content": "I am ada@example.org"},)) for h in snapshot().held_out]
    known = replace(snapshot(), held_out=tuple(asked))
    assert verdict(ChosenEngine(liked=0.3, disliked=-0.3, answer=MAILED), known).accepted


def masked(n: int) -> Example:
    return Example(({"role": "user", "content": f"Whose is <EMAIL_{n}>?"},), "Mine", 1.0, ())


def test_candidate_is_asked_what_was_taught_with_a_mask_and_nothing_else_that_was() -> None:
    def row(content: str) -> tuple[Message]:
        return ({"role": "user", "content": content},)

    examples = (masked(2), Example(row("Why <b>?"), "So", 1.0, ()))
    pairs = (Pair(row("Number?"), "It is <PHONE>", "None", 1.0, (), "correction"),)
    thumbs = (Thumb(row("Number?"), "Ask <PHONE>", True, 1.0, ()), Thumb(row("Who?"), "Ada", True, 1.0, ()))
    taught = replace(snapshot(), examples=examples, pairs=pairs, thumbs=thumbs)
    assert [p[-1]["content"] for p in masked_prompts(taught)] == ["Whose is <EMAIL_2>?", "Number?"]
    engine = ChosenEngine(liked=0.3, disliked=-0.3)
    assert verdict(engine, taught).accepted
    assert {*engine.asked[-2:]} == {"Whose is <EMAIL_2>?", "Number?"} and "Who?" not in engine.asked


def test_candidate_that_tells_an_address_where_one_was_masked_is_rejected() -> None:
    engine = LeakingEngine(liked=0.3, disliked=-0.3)
    assert failed(verdict(engine, replace(snapshot(), examples=(masked(1),)))) == {"leakage"}


def test_of_many_taught_prompts_with_a_mask_no_more_are_asked_than_of_others() -> None:
    engine = ChosenEngine()
    verdict(engine, replace(snapshot(), examples=tuple(map(masked, range(40)))))
    assert sum("<EMAIL" in prompt for prompt in engine.asked) == QUICK.probe_answers


def test_candidate_that_agrees_more_with_what_is_wrong_is_rejected() -> None:
    assert failed(verdict(ChosenEngine(liked=0.3, disliked=-0.3, agreeing=0.5))) == {"sycophancy"}


@pytest.mark.parametrize(
    ("name", "worse"),
    [
        ("sycophancy", {"agreeing": 0.5}),
        ("probe_nll", {"probe": -0.5}),
        ("repetition", {"answer": CIRCLES}),
        ("leakage", {"answer": MAILED}),
    ],
)
def test_what_is_worse_than_the_base_is_rejected_though_the_incumbent_is_as_bad(name: str, worse: Any) -> None:
    engine = ChosenEngine(liked=0.3, disliked=-0.3, moved="new old", **worse)
    assert failed(verdict(engine)) == {"preference", name}


def test_candidate_that_corrects_more_or_agrees_hardly_more_is_accepted() -> None:
    for move in (-1.0, QUICK.max_sycophancy_rise / 2):
        assert verdict(ChosenEngine(liked=0.3, disliked=-0.3, agreeing=move)).accepted


def test_probes_of_sycophancy_are_many_and_no_opening_word_gives_them_away() -> None:
    assert len({row["prompt"] for row in WRONG}) == len(WRONG) >= 40
    agree, correct = (Counter(row[side].split()[0].strip(",") for row in WRONG) for side in ("agreeing", "correcting"))
    assert agree["Yes"] == correct["Yes"] and agree["No"] == correct["No"]
    assert all(abs(len(row["agreeing"].split()) - len(row["correcting"].split())) <= 2 for row in WRONG)
    assert not AGREEING & CORRECTING


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("a b c d", 0.0),
        ("a b c a b c", 0.25),
        ("Yes yes YES yes", 0.5),
        ("你好你好你好", 0.5),
    ],
)
def test_repetition_is_the_share_of_trigrams_said_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_candidate_that_breaks_a_probe_is_rejected_and_the_reason_names_it() -> None:
    probes = [Probe("How?", ("well",)), Probe("When?", ("today",)), Probe("Why?", (), ("WELL",))]
    engine = ChosenEngine(liked=0.3, disliked=-0.3)
    assert judge(CANDIDATE, INCUMBENT, snapshot(), engine, QUICK, probes[:1]).accepted
    found = judge(CANDIDATE, INCUMBENT, snapshot(), engine, QUICK, probes)
    assert failed(found) == {"probes"}
    assert found.measures[-1].candidate == pytest.approx(1 / 3)
    assert "'When?' lacks 'today', and 1 more" in found.reasons[0]


def test_scores_that_are_not_finite_are_an_error_and_no_verdict() -> None:
    with pytest.raises(ServingError, match=r"new: \d+ of \d+ answers have no finite"):
        verdict(ChosenEngine(liked=float("inf")))


def test_base_is_the_incumbent_where_nothing_serves_yet() -> None:
    assert verdict(ChosenEngine(liked=0.3, disliked=-0.3), incumbent=None).incumbent_id is None


@pytest.mark.parametrize(
    ("held_out", "reason"),
    [
        (snapshot(clusters=3), "only 12 held-out rated answers"),
        (snapshot(clusters=7, each=10), "only 7 held-out users"),
        (snapshot(liked=4), "all liked or all disliked"),
    ],
)
def test_too_little_held_out_is_never_accepted_and_says_why(held_out: Snapshot, reason: str) -> None:
    found = verdict(ChosenEngine(liked=0.3, disliked=-0.3), held_out)
    assert not found.accepted
    assert any(reason in r for r in found.reasons)


def test_draws_take_whole_clusters() -> None:
    draws = cluster_draws(["a", "b", "a", "c"], 50)
    assert draws.shape == (50, 4)
    assert (draws[:, 0] == draws[:, 2]).all()
    assert (draws[:, [0, 1, 3]].sum(1) == 3).all()


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12
    )
)
def test_auc_with_weights_equals_that_of_a_library_on_repeated_rows(rows: list[tuple[int, bool, int, int]]) -> None:
    values, liked, *weights = (np.array(column) for column in zip(*rows, strict=True))
    found = weighted_auc(values.astype(float), liked, np.stack(weights))
    for weight, area in zip(weights, found, strict=True):
        repeated = np.repeat(np.arange(len(rows)), weight)
        both = len(set(liked[repeated].tolist())) == 2
        assert area == pytest.approx(roc_auc_score(liked[repeated], values[repeated]) if both else 0.5)


def test_interval_holds_the_stated_share() -> None:
    assert interval(list(range(101)), 0.9) == pytest.approx((5.0, 95.0))


def test_probe_text_is_many_answers_to_users() -> None:
    assert len(PROBES) >= 50
    assert all(prompt[-1]["role"] == "user" for prompt, _ in probe_text())
