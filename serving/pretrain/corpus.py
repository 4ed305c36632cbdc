"""The text that the seedling is pretrained on: real small talk, and conversations that the scenes write.

`conversation` is a pure function of the random generator that it is given. The invariant: which real dialogue is
held out depends on its words alone, so no run ever trains on one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

from .scenes import (
    Conversation,
    at_the_desk,
    everyday,
    from_earlier_turns,
    from_notes,
    from_records,
    greeting,
    on_style,
    turn,
    written_out,
)
from .toolscenes import with_tools

HELD_OUT_PERCENT = 2

Scene = Callable[[Random], Conversation]

# in shares of conversations; what copies from the context has the largest
SCENES: dict[Scene, int] = {
    written_out: 60,
    from_notes: 28,
    from_earlier_turns: 14,
    from_records: 8,
    with_tools: 16,
    everyday: 4,
    at_the_desk: 3,
    on_style: 5,
    greeting: 1,
}
OTHERS = {scene: share for scene, share in SCENES.items() if scene not in (from_notes, from_earlier_turns)}


def _settled(unknown: float) -> dict[Scene, int]:
    notes = partial(from_notes, settled=True, unknown=unknown)
    return {notes: 32, partial(from_earlier_turns, settled=True): 16, **OTHERS}


# at first, while the rate falls, and at the end: what is learnt of the unknown in between makes it doubt what it knows
STAGES: tuple[dict[Scene, int], ...] = (SCENES, _settled(0.4), _settled(0.22))


def conversation(rng: Random, stage: int = 0) -> Conversation:
    scenes = STAGES[stage]
    (scene,) = rng.choices(list(scenes), list(scenes.values()))
    return scene(rng)


def is_held_out(turns: Sequence[str]) -> bool:
    digest = hashlib.blake2b("\n".join(turns).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def read_dialogues(path: Path) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out dialogues of the self_dialogue corpus; turns alternate between user and assistant."""
    train: list[Conversation] = []
    held_out: list[Conversation] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            turns = [" ".join(said.split()) for said in json.loads(line)["turns"]]
            turns = turns[: len(turns) // 2 * 2]
            if turns:
                talk = [turn(("user", "assistant")[i % 2], said) for i, said in enumerate(turns)]
                (held_out if is_held_out(turns) else train).append(talk)
    return train, held_out
