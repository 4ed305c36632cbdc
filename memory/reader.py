"""The learned part of the Censor: how satisfied people were with answers like this one, from MiniLM vectors and cues.

A `Reader` turns an exchange into the log-odds that the answer satisfied. Its input is the numbers of `cues.scalars`,
cosines between the request, the reply, the reaction and what was said before, three values of a learned coherence
("does this follow from that?": cosines after two projections, trained to find the next turn of a dialogue among
others), and the three vectors themselves. On it stand a ridge regression and, where there is enough to fit them on,
boosted `trees`, calibrated together by Platt's logistic on scores of folds that they were not fitted on. There are two
heads, since the last answer of a session has no reaction.

The invariant: a row is scored by itself, sum by sum in one order, so the same exchange has the same log-odds whatever
else is in the call. The coefficients that ship are in `censor.safetensors`, and `censor.md` beside it says what they
were fitted on and how far to trust them; `bench/fit_censor.py` fits them again.

Not covered: languages other than English, the time between turns (no open set has both times and ratings).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from .cues import Exchange, scalars
from .trees import NO_TREES, Floats, Nodes, Trees, fit_trees, principal_axes

Array = NDArray[np.float64]
VectorOf = Mapping[str, NDArray[np.float32]]  # unit vectors by text

SHIPPED = Path(__file__).with_name("censor.safetensors")
PENALTY = 1000.0  # of the ridge, for features of the sizes below
CLIP = 4.0  # standard deviations
SCALAR_SIZE, COSINE_SIZE, VECTOR_SIZE = 1.0, 2.0, 6.0  # how much a part counts, relative to the penalty
TREES_FROM = 500  # rows; with fewer the ridge alone is as good or better
FOLDS = 5
PARTIAL = ".partial"  # in the name of coefficients that are being written
LOOK_BACK = 20  # earlier turns that an exchange is compared with
SCALARS = tuple(scalars(Exchange("", "", None)))
COSINES = (
    "request_reply",
    "reply_reaction",
    "request_reaction",
    "reply_earlier_reply",
    "reply_earlier_replies",
    "reply_last_reply",
    "reply_earlier_request",
    "request_last_reply",
    "reaction_earlier_request",
    "reaction_earlier_requests",
    "reaction_earlier_reply",
    "sameness_of_earlier_replies",
    "coherence_request_reply",
    "coherence_reply_reaction",
    "coherence_request_reaction",
)
NUMBERS = len(SCALARS) + len(COSINES)  # the columns before the vectors


@dataclass(frozen=True)
class Coherence:
    """Two affine maps to one space, for what comes before and what comes after: (k, d) and (k,) each."""

    before: Array
    before_bias: Array
    after: Array
    after_bias: Array

    def __call__(self, first: Array, then: Array) -> Array:
        """Cosines (n,) of rows (n, d) that follow each other; 0 where either row is."""
        left = _unit(_rows_times(first, self.before) + self.before_bias)
        right = _unit(_rows_times(then, self.after) + self.after_bias)
        cosines: Array = (left * right).sum(axis=1) * first.any(axis=1) * then.any(axis=1)
        return cosines


@dataclass(frozen=True)
class Head:
    """A ridge regression on standardised features (f,), trees, and the two numbers that make log-odds of their sum.

    The trees look at the numbers, the cosines and the vectors along `axes` (k, 3 d).
    """

    mean: Array
    deviation: Array
    weights: Array
    slope: float
    offset: float
    axes: Array
    trees: Trees = NO_TREES

    def score(self, features: Array) -> Array:
        standard = np.clip((features - self.mean) / self.deviation, -CLIP, CLIP)
        score: Array = (standard * self.weights).sum(axis=1) + self.trees(along(features, self.axes))
        return score

    def log_odds(self, features: Array) -> Array:
        return self.slope * self.score(features) + self.offset


@dataclass(frozen=True)
class Reader:
    """`at_home`: fitted on ratings of the installation that it reads, and so calibrated for it.

    `usual` are the log-odds that an answer satisfied those who were read: 0 for the one that ships.
    """

    embedder: str
    coherence: Coherence
    with_reaction: Head
    without: Head
    at_home: bool
    usual: float = 0.0

    def log_odds(self, exchanges: Sequence[Exchange], vector_of: VectorOf) -> Array:
        """(n,) log-odds that each answer satisfied. A text without a vector counts as having nothing in common."""
        found = features(exchanges, vector_of, self.coherence)
        heard, odds = np.array([bool(e.reaction) for e in exchanges], dtype=bool), np.zeros(len(exchanges))
        for head, rows in ((self.with_reaction, heard), (self.without, ~heard)):
            odds[rows] = head.log_odds(found[rows])
        return odds

    @cached_property
    def id(self) -> str:
        """Named by its coefficients."""
        digest = blake2b(digest_size=8)
        for name, value in sorted(_arrays(self).items()):
            digest.update(name.encode() + value.tobytes())
        return f"b2:{digest.hexdigest()}"


# -- features ---


def features(exchanges: Sequence[Exchange], vector_of: VectorOf, coherence: Coherence) -> Array:
    """(n, len(SCALARS) + len(COSINES) + 3 d) float64."""
    width = coherence.before.shape[1]
    numbers = np.array([list(scalars(_recent(e)).values()) for e in exchanges]).reshape(len(exchanges), len(SCALARS))
    own = np.zeros((3, len(exchanges), width))
    for i, e in enumerate(exchanges):
        own[:, i] = _vectors((e.request, e.reply, e.reaction or ""), vector_of, width)
    earlier = [_earlier(_recent(e), own[:, i], vector_of, width) for i, e in enumerate(exchanges)]
    request, reply, reaction = own
    between = [(request * reply), (reply * reaction), (request * reaction)]
    follows = [coherence(request, reply), coherence(reply, reaction), coherence(request, reaction)]
    cosines = [*(b.sum(axis=1) for b in between), *np.array(earlier).reshape(-1, 9).T, *follows]
    return np.concatenate([numbers, np.stack(cosines, axis=1), request, reply, reaction], axis=1)


def along(features: Array, axes: Array) -> Array:
    """(n, len(SCALARS) + len(COSINES) + k): the vectors by their coordinates along axes (k, 3 d)."""
    return np.concatenate([features[:, :NUMBERS], _rows_times(features[:, NUMBERS:], axes)], axis=1)


def _earlier(exchange: Exchange, own: Array, vector_of: VectorOf, width: int) -> list[float]:
    request, reply, reaction = own
    replies = _vectors(exchange.earlier_replies or ("",), vector_of, width)
    requests = _vectors(exchange.earlier_requests or ("",), vector_of, width)
    usual_reply, usual_request = replies.mean(axis=0), requests.mean(axis=0)
    pairs = [
        (replies * reply).sum(axis=1).max(),
        (usual_reply * reply).sum(),
        (replies[-1] * reply).sum(),
        (requests * reply).sum(axis=1).max(),
        (replies[-1] * request).sum(),
        (requests * reaction).sum(axis=1).max(),
        (usual_request * reaction).sum(),
        (replies * reaction).sum(axis=1).max(),
        np.sqrt((usual_reply**2).sum()),
    ]
    return [float(value) for value in pairs]


def _recent(e: Exchange) -> Exchange:
    if max(len(e.earlier_requests), len(e.earlier_replies)) <= LOOK_BACK:
        return e
    return Exchange(e.request, e.reply, e.reaction, e.earlier_requests[-LOOK_BACK:], e.earlier_replies[-LOOK_BACK:])


def _vectors(texts: Sequence[str], vector_of: VectorOf, width: int) -> Array:
    missing = np.zeros(width, dtype=np.float32)
    return np.stack([vector_of.get(text, missing) for text in texts]).astype(np.float64)


def _rows_times(rows: Array, matrix: Array) -> Array:
    """rows (n, d) times matrixᵀ (d, k), row by row: BLAS may add in another order for another n."""
    return np.stack([(matrix * row).sum(axis=1) for row in rows]) if len(rows) else np.zeros((0, len(matrix)))


def _unit(rows: Array) -> Array:
    return np.asarray(rows / np.maximum(np.sqrt((rows**2).sum(axis=1, keepdims=True)), 1e-12), dtype=np.float64)


# -- fitting ---


def fit_reader(
    found: Array, target: Array, satisfied: Array, groups: Sequence[str], coherence: Coherence, embedder: str
) -> Reader:
    """Both heads on features (n, f). `target` is what the ridge aims at, `satisfied` in [0, 1] what is calibrated to;
    `groups` (people or dialogues) are never on both sides of a fold. ValueError for fewer than FOLDS groups."""
    heads = [fit_head(found, keep, target, satisfied, groups) for keep in (heard(found), unheard(found))]
    return Reader(embedder, coherence, heads[0], heads[1], at_home=True)


def fit_head(found: Array, keep: NDArray[np.bool_], target: Array, satisfied: Array, groups: Sequence[str]) -> Head:
    """A head that looks at the columns in `keep`."""
    fit, score = ridge if len(found) < TREES_FROM else ridge_and_trees, np.zeros(len(found))
    for fold in split(groups):
        score[fold] = fit(found[~fold], keep, target[~fold]).score(found[fold])
    slope, offset = platt(score, satisfied)
    return replace(fit(found, keep, target), slope=slope, offset=offset)


def ridge_and_trees(found: Array, keep: NDArray[np.bool_], target: Array) -> Head:
    """Both fitted to the same target, the trees spread as wide as the ridge on these rows; uncalibrated."""
    head, seen = ridge(found, keep, target), found * keep
    axes = principal_axes(seen[:, NUMBERS:]) * keep[NUMBERS:]
    trees = fit_trees(along(seen, axes), target)
    spread = trees(along(seen, axes)).std()
    return replace(head, axes=axes, trees=trees.times(head.score(found).std() / spread if spread > 1e-6 else 0.0))


def ridge(found: Array, keep: NDArray[np.bool_], target: Array) -> Head:
    """argmin Σ (z·w + m − t)² + PENALTY |w|², with z the standardised features and m the mean of t; uncalibrated."""
    size = _sizes(found.shape[1]) * keep
    mean, deviation = found.mean(axis=0), found.std(axis=0)
    own_scale = np.arange(found.shape[1]) >= NUMBERS  # vectors keep theirs
    deviation = np.where(own_scale, 1.0, np.where(deviation > 1e-6, deviation, 1.0))
    z = np.clip((found - mean) / deviation, -CLIP, CLIP) * size
    centred = z - z.mean(axis=0)
    solved = np.linalg.solve(centred.T @ centred + PENALTY * np.eye(len(size)), centred.T @ (target - target.mean()))
    return Head(mean, deviation, solved * size, 1.0, 0.0, np.zeros((0, len(size) - NUMBERS)))


def platt(score: Array, satisfied: Array) -> tuple[float, float]:
    """Slope and offset of the logistic regression of `satisfied` on `score` (Platt 1999), by Newton's method."""
    design = np.stack([score, np.ones(len(score))], axis=1)
    solved = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ solved))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (satisfied - p))
        solved = solved + np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-9:
            break
    return float(solved[0]), float(solved[1])


def split(groups: Sequence[str]) -> list[NDArray[np.bool_]]:
    """FOLDS masks; a group is in one of them, by the hash of its name."""
    names = sorted(set(groups), key=lambda name: blake2b(name.encode(), digest_size=8).digest())
    if len(names) < FOLDS:
        raise ValueError(f"{len(names)} groups cannot be split into {FOLDS} folds")
    place = {name: n % FOLDS for n, name in enumerate(names)}
    placed = np.array([place[group] for group in groups])
    return [placed == fold for fold in range(FOLDS)]


def heard(found: Array) -> NDArray[np.bool_]:
    return np.ones(found.shape[1], dtype=bool)


def unheard(found: Array) -> NDArray[np.bool_]:
    """The columns that the reaction has no part in."""
    width = (found.shape[1] - NUMBERS) // 3
    return np.array(["reaction" not in name for name in (*SCALARS, *COSINES)] + [True] * (2 * width) + [False] * width)


def _sizes(columns: int) -> Array:
    parts = [(SCALAR_SIZE, len(SCALARS)), (COSINE_SIZE, len(COSINES)), (VECTOR_SIZE, columns - NUMBERS)]
    return np.concatenate([np.full(count, size) for size, count in parts])


# -- files ---


def save_reader(reader: Reader, path: Path) -> None:
    from safetensors.numpy import save_file

    about = {"embedder": reader.embedder, "at_home": str(reader.at_home).lower(), "scalars": ",".join(SCALARS)}
    about |= {"usual": repr(reader.usual)}
    save_file(_arrays(reader), path, metadata=about)


def load_reader(path: Path) -> Reader:
    """StoreError if the file is not of this version's features."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            about, held = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: the Censor's coefficients cannot be read: {error}") from error
    if about.get("scalars") != ",".join(SCALARS):
        raise StoreError(f"{path}: coefficients for other features than this version's; delete the file")
    before_and_after = ("before", "before_bias", "after", "after_bias")
    coherence = Coherence(*(held[name].astype(np.float64) for name in before_and_after))
    heads = [_head(held, name) for name in ("with_reaction", "without")]
    at_home, usual = about["at_home"] == "true", float(about.get("usual", 0))
    return Reader(about["embedder"], coherence, heads[0], heads[1], at_home, usual)


def keep_reader(reader: Reader, home: Path) -> None:
    """Its coefficients in the home, in place of those of the night before."""
    path = home / f"censor-{reader.id.removeprefix('b2:')}.safetensors"
    partial = path.with_name(f"{path.stem}{PARTIAL}.safetensors")  # by a name that is erased as well
    save_reader(reader, partial)
    os.replace(partial, path)
    for old in set(readers_in(home)) - {path}:
        old.unlink(missing_ok=True)  # who forgets erases it, too


def readers_in(home: Path) -> list[Path]:
    """What was fitted on the ratings given here: to be erased with any of them."""
    return sorted(home.glob("censor-*.safetensors"))


@cache
def shipped_reader() -> Reader:
    return load_reader(SHIPPED)


def _head(held: Mapping[str, Floats | Nodes], name: str) -> Head:
    """One that was kept before there were trees has none."""
    slope, offset = held[f"{name}.calibration"]
    mean, deviation, weights = (held[f"{name}.{part}"].astype(np.float64) for part in ("mean", "deviation", "weights"))
    ridge = Head(mean, deviation, weights, float(slope), float(offset), np.zeros((0, len(mean) - NUMBERS)))
    if f"{name}.axes" not in held:
        return ridge
    roots, nodes = (held[f"{name}.{part}"].astype(np.int32) for part in ("roots", "nodes"))
    trees = Trees(roots, nodes, held[f"{name}.cuts"].astype(np.float32))
    return replace(ridge, axes=held[f"{name}.axes"].astype(np.float64), trees=trees)


def _arrays(reader: Reader) -> dict[str, Floats | Nodes]:
    """What is empty is left out, so that a head without trees keeps the name that it had before there were any."""
    floats: dict[str, Array | Floats] = dict(vars(reader.coherence))
    nodes: dict[str, Nodes] = {}
    for name, head in (("with_reaction", reader.with_reaction), ("without", reader.without)):
        floats |= {f"{name}.{part}": getattr(head, part) for part in ("mean", "deviation", "weights", "axes")}
        floats |= {f"{name}.calibration": np.array([head.slope, head.offset]), f"{name}.cuts": head.trees.cuts}
        nodes |= {f"{name}.roots": head.trees.roots, f"{name}.nodes": head.trees.nodes}
    rounded = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in floats.items()}
    return {name: value for name, value in (rounded | nodes).items() if value.size}
