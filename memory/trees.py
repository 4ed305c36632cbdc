"""Boosted regression trees: a sum of small trees, each fitted to what those before it left over.

The method is gradient boosting of the squared error (Friedman 2001, "Greedy function approximation: a gradient boosting
machine"), each tree on half of the rows (Friedman 2002, "Stochastic gradient boosting"). scikit-learn fits the trees;
here they are plain arrays, read with numpy alone. The invariant: a row ends at the leaves at which it ends in the
library, and their values are added in one order, whatever other rows are in the call. So inputs and thresholds are
float32, as the library compares them, and leaf values are rounded when they are fitted, not when they are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sklearn.ensemble import GradientBoostingRegressor
    from sklearn.tree._tree import Tree

Array = NDArray[np.float64]
Floats = NDArray[np.float32]
Nodes = NDArray[np.int32]

AXES = 24  # principal components of vectors that the trees look at
ROUNDS, LEAVES, RATE = 400, 8, 0.03
LEAST = 20  # rows in a leaf
ROWS, COLUMNS = 0.5, 0.3  # the shares drawn for a tree and for a split


@dataclass(frozen=True)
class Trees:
    """t trees of m nodes in all, in one table. A leaf is its own left and right child.

    `roots` (t,); `nodes` (3, m): feature, left child, right child; `cuts` (2, m): threshold, value.
    """

    roots: Nodes
    nodes: Nodes
    cuts: Floats

    def __call__(self, inputs: Array) -> Array:
        """The sums (n,) of the trees at rows (n, f)."""
        value = self.cuts[1].astype(np.float64)
        total: Array = value[self.leaves(inputs)].sum(axis=1)
        return total

    def leaves(self, inputs: Array) -> Nodes:
        """The nodes (n, t) at which the rows end, found level by level in all trees at once."""
        rows, at = inputs.astype(np.float32), np.tile(self.roots, (len(inputs), 1))
        (feature, left, right), threshold = self.nodes, self.cuts[0]
        while True:
            goes_left = np.take_along_axis(rows, feature[at], axis=1) <= threshold[at]
            below = np.where(goes_left, left[at], right[at])
            if np.array_equal(below, at):
                return at
            at = below

    def times(self, factor: float) -> Trees:
        threshold, value = self.cuts
        return replace(self, cuts=np.stack([threshold, value * np.float32(factor)]))


NO_TREES = Trees(np.zeros(0, np.int32), np.zeros((3, 0), np.int32), np.zeros((2, 0), np.float32))


def fit_trees(inputs: Array, target: Array) -> Trees:
    """Trees for how far `target` (n,) is from its mean; the same rows give the same trees."""
    from sklearn.ensemble import GradientBoostingRegressor

    model = GradientBoostingRegressor(
        n_estimators=ROUNDS,
        learning_rate=RATE,
        max_leaf_nodes=LEAVES,
        max_depth=None,
        min_samples_leaf=LEAST,
        subsample=ROWS,
        max_features=COLUMNS,
        init="zero",
        random_state=0,
    )
    return trees_of(model.fit(inputs, target - target.mean()))


def principal_axes(rows: Array) -> Array:
    """(AXES, m): the directions in which rows (n, m) differ most, rounded as they are kept."""
    centred = rows - rows.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1].T[::-1][:AXES]
    return axes.astype(np.float32).astype(np.float64)


def trees_of(model: GradientBoostingRegressor) -> Trees:
    """The trees of a fitted model of the library, without its first guess."""
    trees = [tree.tree_ for tree in model.estimators_[:, 0]]
    roots = np.cumsum([0, *(tree.node_count for tree in trees[:-1])]).astype(np.int32)
    nodes = np.concatenate([_nodes(tree, root) for tree, root in zip(trees, roots, strict=True)], axis=1)
    threshold = np.concatenate([tree.threshold for tree in trees])
    value = np.concatenate([model.learning_rate * tree.value[:, 0, 0] for tree in trees])
    return Trees(roots, nodes, np.stack([_rounded_down(threshold), value.astype(np.float32)]))


def _nodes(tree: Tree, root: int) -> Nodes:
    """(3, m): feature, left and right child of every node, the first being number `root`."""
    leaf, own = tree.children_left < 0, np.arange(tree.node_count)
    left, right = (root + np.where(leaf, own, child) for child in (tree.children_left, tree.children_right))
    return np.stack([np.where(leaf, 0, tree.feature), left, right]).astype(np.int32)


def _rounded_down(threshold: Array) -> Floats:
    """A float32 is at most `threshold` exactly if it is at most this."""
    near = threshold.astype(np.float32)
    return np.where(near > threshold, np.nextafter(near, np.float32(-np.inf)), near)
