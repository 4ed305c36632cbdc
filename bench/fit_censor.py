"""Fit the coefficients of the Censor that ship: memory/censor.safetensors.

    python bench/fit_censor.py [--data FOLDER] [--cache FOLDER] [--out FILE]

Only training parts are read: of ConvAI2 the half of the dialogues that is not held out, of DBDC3 what is not its own
evaluation set, and dialogues of the self-dialogue corpus for the coherence. The table shows what five folds of the
training parts say; bench/signals.py scores the test parts. Where to get the data: bench/rated.py.
The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import rated
from nightschool.memory import reader as fitting
from nightschool.memory.reader import Coherence, Reader
from numpy.typing import NDArray

Array = NDArray[np.float64]
Vectors = Mapping[str, NDArray[np.float32]]

SOURCES = {"convai2": rated.convai2, "dbdc3": rated.dbdc3}
COHERENCE_TURNS, COHERENCE_SIZE, COHERENCE_EPOCHS = 36_000, 64, 4
CONVAI2_WEIGHT = 2  # its thumbs are real people's own, and there are five times fewer of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent.parent / "shared" / "data")
    parser.add_argument("--cache", type=Path, help="keep the vectors here, for the next run")
    parser.add_argument("--out", type=Path, default=fitting.SHIPPED)
    args = parser.parse_args()
    dialogues = rated.self_dialogue(args.data, COHERENCE_TURNS)
    parts = {name: read(args.data) for name, read in SOURCES.items()}
    parts = {name: part.at(~part.test) for name, part in parts.items()}
    texts = [t for d in dialogues for t in d] + [t for part in parts.values() for t in part.texts]
    vectors = rated.embedded([t for t in texts if t.strip()], args.cache)
    coherence = fit_coherence([[vectors[t] for t in d if t.strip()] for d in dialogues])
    figures = {f"{name}_cv_auc": cross_validated(part, vectors, coherence) for name, part in parts.items()}
    reader = shipped(parts, vectors, coherence)
    fitting.save_reader(reader, args.out)
    slopes = {"slope": round(reader.with_reaction.slope, 3), "slope_without": round(reader.without.slope, 3)}
    print(json.dumps({**figures, **slopes, "id": fitting.load_reader(args.out).id}))


def fit_coherence(dialogues: Sequence[Sequence[NDArray[np.float32]]], seed: int = 0) -> Coherence:
    """Two projections that tell the next turn from the others of a batch (InfoNCE), started at principal axes."""
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    first = torch.tensor(np.stack([v for d in dialogues for v in d[:-1]]))
    then = torch.tensor(np.stack([v for d in dialogues for v in d[1:]]))
    axes = torch.linalg.svd(first.T @ first)[0][:, :COHERENCE_SIZE].T
    maps = [torch.nn.Linear(first.shape[1], COHERENCE_SIZE) for _ in range(2)]
    for each in maps:
        each.weight.data.copy_(axes)
        each.bias.data.zero_()
    sharpness = torch.nn.Parameter(torch.tensor(2.5))
    optimiser = torch.optim.AdamW([*maps[0].parameters(), *maps[1].parameters(), sharpness], 1e-3, weight_decay=0.05)
    for _ in range(COHERENCE_EPOCHS):
        for rows in torch.randperm(len(first)).split(512):
            left, right = (torch.nn.functional.normalize(m(x[rows])) for m, x in zip(maps, (first, then), strict=True))
            likeness, own = left @ right.T * sharpness.exp(), torch.arange(len(rows))
            loss = sum(torch.nn.functional.cross_entropy(side, own) for side in (likeness, likeness.T))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    before, after = maps
    arrays = (before.weight, before.bias, after.weight, after.bias)
    # float32 on disk: rounded now, so that what is measured is what ships
    return Coherence(*(a.detach().numpy().astype(np.float32).astype(np.float64) for a in arrays))


def fit_one(part: rated.Rated, vectors: Vectors, coherence: Coherence) -> Reader:
    """A reader of one source, calibrated on it."""
    found = fitting.features(part.exchanges, vectors, coherence)
    target = rated.standardised(part)
    return fitting.fit_reader(found, target, part.satisfied, part.dialogues.tolist(), coherence, "all-MiniLM-L6-v2")


def shipped(parts: Mapping[str, rated.Rated], vectors: Vectors, coherence: Coherence) -> Reader:
    """Fitted on both; its log-odds are 0 at the average answer and as steep as they were on a source not fitted on."""
    rows = [np.repeat(np.arange(len(p.exchanges)), CONVAI2_WEIGHT if n == "convai2" else 1) for n, p in parts.items()]
    repeated = [part.at(r) for part, r in zip(parts.values(), rows, strict=True)]
    found = np.concatenate([fitting.features(p.exchanges, vectors, coherence) for p in repeated])
    target = np.concatenate([rated.standardised(p) for p in repeated])
    satisfied = np.concatenate([p.satisfied for p in repeated])
    groups = [group for p in repeated for group in p.dialogues.tolist()]
    reader = fitting.fit_reader(found, target, satisfied, groups, coherence, "all-MiniLM-L6-v2")
    slopes = [
        slope_abroad(parts[a], parts[b], vectors, coherence) for a, b in (("convai2", "dbdc3"), ("dbdc3", "convai2"))
    ]
    print("slopes on the source not fitted on (with a reaction, without):", slopes)
    with_reaction, without = (min(pair) for pair in zip(*slopes, strict=True))
    return replace(
        reader,
        with_reaction=replace(reader.with_reaction, slope=with_reaction, offset=0.0),
        without=replace(reader.without, slope=without, offset=0.0),
        at_home=False,
    )


def slope_abroad(home: rated.Rated, abroad: rated.Rated, vectors: Vectors, coherence: Coherence) -> tuple[float, float]:
    reader = fit_one(home, vectors, coherence)
    found = fitting.features(abroad.exchanges, vectors, coherence)
    scores = [head.score(found) for head in (reader.with_reaction, reader.without)]
    return fitting.platt(scores[0], abroad.satisfied)[0], fitting.platt(scores[1], abroad.satisfied)[0]


def cross_validated(part: rated.Rated, vectors: Vectors, coherence: Coherence) -> float:
    """Area under the ROC curve of scores of folds not fitted on, all bots pooled; prints it by bot as well."""
    found = fitting.features(part.exchanges, vectors, coherence)
    for name, keep in (("all", fitting.heard(found)), ("without the reaction", fitting.unheard(found))):
        score = np.zeros(len(found))
        for fold in fitting.split(part.dialogues.tolist()):
            head = fitting.ridge_and_trees(found[~fold], keep, rated.standardised(part.at(~fold)))
            score[fold] = head.score(found[fold])
        by_bot = {str(b): auc(part.disliked[part.bots == b], score[part.bots == b]) for b in np.unique(part.bots)}
        print(f"{len(found)} rows, {name}: pooled {auc(part.disliked, score):.4f}, by bot {by_bot}")
        if name == "all":
            pooled = auc(part.disliked, score)
    return round(pooled, 4)


def auc(disliked: NDArray[np.bool_], score: Array) -> float:
    """P(a disliked answer scores below another), ties a half."""
    from sklearn.metrics import roc_auc_score

    return round(float(roc_auc_score(disliked, -score)), 4)


if __name__ == "__main__":
    main()
