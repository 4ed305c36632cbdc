from dataclasses import replace

import numpy as np
import pytest
from nightschool.memory.trees import LEAVES, NO_TREES, ROUNDS, Trees, fit_trees, principal_axes, trees_of
from sklearn.ensemble import GradientBoostingRegressor

STEP = 2.0**-14  # between neighbours in float32 from 512 to 1024


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Small numbers, and a column of float32 neighbours: between every second two of them a threshold is rounded up."""
    random = np.random.default_rng(seed)
    neighbours = 1000 + STEP * random.integers(0, 12, size=count)
    return np.column_stack([random.normal(size=(count, 3)), neighbours, np.zeros(count)])


def target(inputs: np.ndarray) -> np.ndarray:
    """What no line can say: whether two of the columns go together, and where the neighbours are odd."""
    odd = (inputs[:, 3] - 1000) / STEP % 2
    return np.sign(inputs[:, 0] * inputs[:, 1]) + odd


@pytest.fixture(scope="module")
def trees() -> Trees:
    return fit_trees(rows(600), target(rows(600)))


def test_rows_end_at_the_leaves_of_the_library_and_sum_to_its_scores():
    model = GradientBoostingRegressor(n_estimators=60, max_leaf_nodes=8, max_depth=None, init="zero", random_state=0)
    model.fit(rows(600), target(rows(600)))
    unseen = np.concatenate([rows(2000, seed=1), rows(2000, seed=2) + 1e-9])
    kept = trees_of(model)
    assert {1000 + STEP * (k + 0.5) for k in range(1, 11, 2)} & set(model.estimators_[0, 0].tree_.threshold.tolist())
    assert np.array_equal(kept.leaves(unseen) - kept.roots, model.apply(unseen))
    assert np.allclose(kept(unseen), model.predict(unseen), rtol=0, atol=1e-5)


def test_trees_see_what_no_line_can_say(trees: Trees):
    unseen = rows(500, seed=1)
    assert len(trees.roots) == ROUNDS
    assert np.corrcoef(trees(unseen), target(unseen))[0, 1] > 0.9


def test_a_row_has_the_same_sum_alone_and_among_others(trees: Trees):
    unseen = rows(300, seed=3)
    together = trees(unseen)
    assert together.tolist() == [trees(row[None])[0] for row in unseen] == trees(unseen[::-1])[::-1].tolist()
    assert trees(unseen[:0]).shape == (0,)


def test_the_same_rows_give_the_same_trees_whatever_was_drawn_before(trees: Trees):
    np.random.seed(7)
    again = fit_trees(rows(600), target(rows(600)))
    assert all(
        np.array_equal(one, other) for one, other in zip(vars(trees).values(), vars(again).values(), strict=True)
    )


def test_a_tree_has_no_more_leaves_than_allowed(trees: Trees):
    own = np.arange(trees.nodes.shape[1])
    leaves_of = np.add.reduceat(trees.nodes[1] == own, trees.roots)
    assert leaves_of.max() == LEAVES


def test_what_all_have_in_common_is_not_learnt():
    inputs = rows(600)
    assert np.allclose(
        fit_trees(inputs, target(inputs))(inputs), fit_trees(inputs, target(inputs) + 8)(inputs), atol=1e-4
    )


def test_trees_can_count_more_or_less_and_none_count_nothing(trees: Trees):
    unseen = rows(50, seed=4)
    assert np.allclose(trees.times(0.5)(unseen), trees(unseen) / 2)
    assert np.array_equal(trees.times(0.5).leaves(unseen), trees.leaves(unseen))
    assert NO_TREES(unseen).tolist() == [0.0] * 50


def test_a_tree_of_one_leaf_gives_every_row_its_value():
    stump = replace(NO_TREES, roots=np.zeros(1, np.int32), nodes=np.zeros((3, 1), np.int32))
    stump = replace(stump, cuts=np.array([[-2.0], [0.25]], np.float32))
    assert stump(rows(3)).tolist() == [0.25] * 3


def test_principal_axes_are_where_rows_differ_most_and_are_kept_without_loss():
    random = np.random.default_rng(0)
    spread = np.zeros(40)
    spread[[7, 3]] = 9.0, 5.0
    axes = principal_axes(random.normal(size=(500, 40)) * (spread + 0.1) + 3)
    assert axes.shape == (24, 40)
    assert [int(np.abs(axis).argmax()) for axis in axes[:2]] == [7, 3]
    assert np.array_equal(axes, axes.astype(np.float32))
