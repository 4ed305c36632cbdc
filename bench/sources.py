"""Public data sets as conversations in the import format. None of them is part of this repository.

Taskmaster-4 (CC BY 4.0): github.com/google-research-datasets/Taskmaster, folder TM-4-2024/reward.
ConvAI2 (Apache-2.0 by its site): github.com/DeepPavlov/convai, file data/data_volunteers.json.
Self-dialogue corpus (BSD-3): github.com/jfainberg/self_dialogue_corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
CLOCK = datetime(2024, 6, 1, tzinfo=UTC).timestamp()  # Taskmaster-4 has no times: one moment for all


def taskmaster4(data: Path) -> list[dict[str, Any]]:
    """One conversation a judged turn: its context, then the generated turn with its reward as a rating of ±1.

    `user_id` is the opening, the first two turns: contexts recur, so whatever splits by user does not leak.
    """
    rows = [r for f in sorted((data / "taskmaster4" / "reward").glob("*.json")) for r in json.loads(f.read_text())]
    return [_taskmaster_conversation(n, row) for n, row in enumerate(rows)]


def _taskmaster_conversation(n: int, row: dict[str, Any]) -> dict[str, Any]:
    context = json.loads(row["context"])
    answer = _taskmaster_message(json.loads(row["generation"]))
    answer["rating"] = 1 if row["reward"] else -1
    opening = blake2b(json.dumps(context[:2], sort_keys=True).encode(), digest_size=8).hexdigest()
    return {
        "messages": [*map(_taskmaster_message, context), answer],
        "user_id": f"opening-{opening}",
        "session_id": f"{n}-{row['conversation_id']}",
        "created_utc": CLOCK,
    }


def _taskmaster_message(turn: dict[str, Any]) -> dict[str, Any]:
    if "response" in turn:
        return {"role": "tool", "content": json.dumps(turn["response"])}
    role = "user" if turn["role"] == "user" else "assistant"
    return {"role": role, "content": turn["text"] if "text" in turn else json.dumps(turn["api"])}


def convai2(data: Path) -> list[dict[str, Any]]:
    """People talking to bots; a thumb on a bot's message is a rating, users and times are kept."""
    dialogues = json.loads((data / "convai2" / "data_volunteers.json").read_text())
    return [c for n, d in enumerate(dialogues) if (c := _convai_conversation(n, d))["messages"]]


def _convai_conversation(n: int, dialogue: dict[str, Any]) -> dict[str, Any]:
    people = [dialogue["participant1_id"], dialogue["participant2_id"]]
    user = next((p["user_id"] for p in people if p["class"] != "Bot"), "unknown")
    started = datetime.fromisoformat(dialogue["start_time"]).replace(tzinfo=UTC).timestamp()
    messages = list(map(_convai_message, dialogue["dialog"]))
    return {"messages": messages, "user_id": user, "session_id": f"convai2-{n}", "created_utc": started}


def _convai_message(turn: dict[str, Any]) -> dict[str, Any]:
    if turn["sender_class"] == "Human":
        return {"role": "user", "content": turn["text"]}
    message: dict[str, Any] = {"role": "assistant", "content": turn["text"]}
    if str(turn["evaluation_score"]) in ("0", "1"):
        message["rating"] = 1 if int(turn["evaluation_score"]) else -1
    return message


def folds(groups: Sequence[str], count: int, seed: int = 0) -> list[set[str]]:
    """The distinct groups in `count` random parts."""
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names))
    return [{names[i] for i in order[k::count]} for k in range(count)]


def shuffled_ratings(conversations: Sequence[dict[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """The same conversations with the ratings of their last turns dealt out anew: feedback that means nothing."""
    ratings = np.random.default_rng(seed).permutation([c["messages"][-1]["rating"] for c in conversations])
    for conversation, rating in zip(conversations, ratings, strict=True):
        *context, answer = conversation["messages"]
        yield {**conversation, "messages": [*context, {**answer, "rating": int(rating)}]}
