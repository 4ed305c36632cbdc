"""Rated answers, and how likely each is liked by what needs no model: its words, or its length and place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Conversation = dict[str, Any]
Rows = list[dict[str, Any]]  # prompt (messages), answer, liked, cluster


def rated(conversations: Sequence[Conversation]) -> Rows:
    """Every answer to something that somebody rated, in its context; the opening of a talk answers nothing."""
    return [
        {"prompt": _plain(c["messages"][:i]), "answer": m["content"], "liked": m["rating"] > 0, "cluster": c["user_id"]}
        for c in conversations
        for i, m in enumerate(c["messages"])
        if "rating" in m and i
    ]


def _plain(messages: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def by_words(rows: Rows) -> Callable[[Rows], Any]:
    """The chance that an answer in its context is liked, by TF-IDF and logistic regression on the ratings of `rows`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=3, max_iter=500, class_weight="balanced"),
    )
    return _fitted(model, _in_context, rows)


def by_counts(rows: Rows) -> Callable[[Rows], Any]:
    """The same by the lengths of answer and prompt and by how many turns came before."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    return _fitted(model, _counts, rows)


def _fitted(model: Any, of: Callable[[dict[str, Any]], Any], rows: Rows) -> Callable[[Rows], Any]:
    model.fit([of(r) for r in rows], [r["liked"] for r in rows])
    return lambda others: model.predict_proba([of(r) for r in others])[:, 1]


def _in_context(row: dict[str, Any]) -> str:
    return " ".join(m["content"] for m in row["prompt"][-4:]) + " || " + str(row["answer"])


def _counts(row: dict[str, Any]) -> list[float]:
    said = [m["content"] for m in row["prompt"]]
    return [float(np.log1p(n)) for n in (len(row["answer"].split()), len(" ".join(said).split()), len(said))]


BASELINES = {"counts": by_counts, "tfidf": by_words}
