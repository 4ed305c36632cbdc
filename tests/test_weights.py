from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nightschool.evolve.weights import (
    balanced,
    example_weight,
    limit_marked,
    limit_share,
    limit_sum,
    normalise,
    pair_margin,
    pair_weight,
    thumb_weight,
)
from nightschool.memory.topics import DAY, recurrence

unit = st.floats(0, 1)
score = st.floats(-1, 1)
count = st.floats(0, 1e6)
CAP = 3.0


@given(unit, score, score, score, count)
def test_weight_grows_with_satisfaction(c: float, rejected: float, a: float, b: float, n: float):
    worse, better = sorted((a, b))
    assert pair_weight(c, pair_margin(worse, rejected), n) <= pair_weight(c, pair_margin(better, rejected), n)
    assert example_weight(c, worse, n) <= example_weight(c, better, n)


@given(unit, score, count, count)
def test_weight_grows_with_frequency(c: float, s: float, a: float, b: float):
    rare, frequent = sorted((a, b))
    for weight in (pair_weight, example_weight, thumb_weight):
        assert weight(c, s, rare) <= weight(c, s, frequent)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=20), st.floats(0, 300))
def test_weight_grows_with_recency(ages: list[float], older_by: float):
    def weight(extra: float) -> float:
        visits = [("t", i, -(age + extra) * DAY) for i, age in enumerate(ages)]
        return pair_weight(1.0, 1.0, recurrence(visits, 0.0, 30.0)["t"].value)

    assert weight(older_by) <= weight(0.0)


@given(unit, score, score, count)
def test_frequency_never_turns_a_sign(c: float, chosen: float, rejected: float, n: float):
    margin = pair_margin(chosen, rejected)
    assert pair_weight(c, margin, n) >= 0
    if margin <= 0:
        assert pair_weight(c, margin, n) == 0
    if chosen <= 0:
        assert example_weight(c, chosen, n) == 0


@given(score, count)
def test_no_confidence_no_weight(s: float, n: float):
    assert pair_weight(0.0, s, n) == example_weight(0.0, s, n) == thumb_weight(0.0, s, n) == 0


def test_the_formula_is_the_one_on_the_page():
    assert pair_weight(0.5, pair_margin(1.0, -0.5), 3.0) == pytest.approx(0.5 * 0.75 * 1.3862943611)
    assert thumb_weight(1.0, -0.5, 1.0) == pytest.approx(0.5 * 0.6931471806)


weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=60)


@given(weights)
def test_normalised_weights_are_capped_and_of_mean_one_where_that_is_possible(ws: list[float]):
    found = normalise(ws, CAP)
    assert all(0 <= w <= CAP for w in found)
    positive = sum(w > 0 for w in ws)
    assert sum(found) / len(ws) == pytest.approx(min(1.0, CAP * positive / len(ws)))


@given(weights)
def test_normalising_keeps_order_zeros_and_ratios_below_the_cap(ws: list[float]):
    found = normalise(ws, CAP)
    for w, f in zip(ws, found, strict=True):
        assert (w == 0) == (f == 0)
    free = [(w, f) for w, f in zip(ws, found, strict=True) if 0 < f < CAP]
    for (w1, f1), (w2, f2) in pairwise(free):
        assert f1 / f2 == pytest.approx(w1 / w2)
    order = sorted(range(len(ws)), key=lambda i: ws[i])
    assert all(found[a] <= found[b] for a, b in pairwise(order))


@given(weights, st.floats(1e-3, 1e3))
def test_the_unit_of_the_weights_does_not_matter(ws: list[float], unit_: float):
    assert normalise([unit_ * w for w in ws], CAP) == pytest.approx(normalise(ws, CAP))


def test_an_outlier_is_capped_and_the_others_share_what_is_left():
    assert normalise([100.0, 1.0, 1.0, 2.0], CAP) == pytest.approx([3.0, 0.25, 0.25, 0.5])


@pytest.mark.parametrize("largest", [0.021 + i / 1000 for i in range(200)])
def test_a_weight_beside_which_others_are_nothing_is_at_the_cap(largest: float):
    assert normalise([largest, 1e-30, 1e-30], CAP) == pytest.approx([3.0, 0.0, 0.0])


def test_nothing_to_normalise_stays_nothing():
    assert normalise([], CAP) == []
    assert normalise([0.0, 0.0], CAP) == [0.0, 0.0]


def test_a_cap_below_the_mean_is_refused():
    with pytest.raises(ValueError, match=r"dataset\.weight_cap"):
        normalise([1.0], 0.5)


rows = st.lists(st.tuples(st.just(0.0) | st.floats(1e-6, 3), st.sampled_from("abcdefgh")), max_size=40)


@given(rows, st.floats(0.1, 1))
@example([(3.0, "a"), (1.0, "b")], 0.5)  # as many owners as the share allows for
def test_no_owner_exceeds_the_share_where_there_are_enough_of_them(given_rows: list[tuple[float, str]], share: float):
    weights, owners = [w for w, _ in given_rows], [o for _, o in given_rows]
    limited = limit_share(weights, owners, share)
    assert all(0 <= after <= before for after, before in zip(limited, weights, strict=True))
    total = sum(limited)
    heard = {o for w, o in given_rows if w > 0}
    if len(heard) * share > 1:
        assert all(
            sum(w for w, o in zip(limited, owners, strict=True) if o == x) <= share * total + 1e-9 for x in heard
        )
    else:
        assert limited == weights


def test_only_who_exceeds_the_share_is_scaled_down():
    assert limit_share([3.0, 3.0, 1.0, 1.0, 1.0, 1.0], "aabcde", 0.25) == pytest.approx([2 / 3, 2 / 3, 1, 1, 1, 1])


def test_no_owner_exceeds_the_sum_and_who_does_not_is_left_alone():
    assert limit_sum([3.0, 1.0, 0.0, 0.5, 0.1], "aabbc", 1.0) == pytest.approx([0.75, 0.25, 0.0, 0.5, 0.1])
    assert limit_sum([3.0, 1.0, 0.0, 0.5, 0.1], "aabbc", 4.0) == [3.0, 1.0, 0.0, 0.5, 0.1]


def test_the_kind_of_thumb_that_is_rare_weighs_as_much_as_the_other():
    def weights(liked: int, disliked: int) -> list[float]:
        return balanced([1.0] * (liked + disliked), [True] * liked + [False] * disliked)

    assert weights(6, 2) == pytest.approx([*[2 / 3] * 6, *[2.0] * 2])
    assert weights(3, 3) == [1.0] * 6
    assert weights(5, 0) == [1.0] * 5  # nothing to balance with
    assert weights(99, 1)[-1] == 4.0  # one row is not made a hundred
    assert balanced([], []) == []


# -- what is marked ---


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=30), st.floats(0, 0.99))
def test_what_is_marked_weighs_no_more_than_its_share_and_nothing_else_changes(rows, share):
    weights, marked = [w for w, _ in rows], [m for _, m in rows]
    limited = limit_marked(weights, marked, share)
    held = sum(w for w, m in zip(limited, marked, strict=True) if m)
    assert held <= share * sum(limited) + 1e-9
    assert all(new == old for new, old, m in zip(limited, weights, marked, strict=True) if not m)
    assert all(new <= old for new, old in zip(limited, weights, strict=True))


def test_what_is_marked_and_within_its_share_is_left_as_it_is():
    assert limit_marked([1.0, 1.0, 0.5], [False, False, True], 0.3) == [1.0, 1.0, 0.5]
    assert limit_marked([1.0, 1.0], [False, False], 0.0) == [1.0, 1.0]


def test_what_is_marked_and_exceeds_its_share_is_scaled_down_to_it():
    assert limit_marked([3.0, 3.0], [False, True], 0.25) == pytest.approx([3.0, 1.0])
