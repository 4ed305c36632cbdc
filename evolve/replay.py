"""The base's own words, drawn from it, to mix into both phases so that a night does not make it forget how it spoke.

A user turn is sampled after the header that the chat template puts before one, then the reply to it, both at
temperature 1, so that the rows are drawn from what the base itself finds likely and no text need be kept or shipped.
The invariant: a pure function of (base, count, seed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..serving.chat import Ids, on_day, prompt_ids, templated_text
from ..serving.parity import DAY
from .types import Example, Prompt

if TYPE_CHECKING:
    from .trainer import Student

MOST = 800  # rows
TURN_TOKENS, REPLY_TOKENS = 40, 48
BATCH = 128
ROUNDS = 3  # a base may often ramble or say nothing; it is not asked for ever
MARK = "⟨turn⟩"


def sample(student: Student, count: int, seed: int, progress: Callable[[str], None]) -> list[Example]:
    """At most `count` and `MOST` conversations of one turn, as rows of weight 1; fewer if the base rambles."""
    wanted, count = count, min(count, MOST)
    if count:
        progress(f"replay: the base writes {count} rows" + (f", the most; {wanted} wanted" if wanted > MOST else ""))
    found: dict[tuple[str, str], None] = {}  # a set that keeps its order
    student.model.eval()
    with student.model.disable_adapter(), on_day(DAY):  # as lessons are encoded
        for round_ in range(ROUNDS):
            if (missing := count - len(found)) <= 0:
                break
            found |= dict.fromkeys(_conversations(student, missing + missing // 4 + 4, seed * ROUNDS + round_))
    rows = list(found)[:count]
    if count:
        progress(f"replay: {len(rows)} rows of {count} that were wanted")
    return [Example(_asked(turn), reply, 1.0, ()) for turn, reply in rows]


def _asked(turn: str) -> Prompt:
    return ({"role": "user", "content": turn},)


def turn_headers(tokenizer: Any) -> tuple[Ids, Ids]:
    """Ids of what the chat template puts before a user's text, and between it and the reply."""
    parts = templated_text(tokenizer, _asked(MARK), add_generation_prompt=True).split(MARK, 1)
    before, between = (tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)
    return before, between


def _conversations(student: Student, count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of turn and reply that both say something and come to their end."""
    from ..serving.base import end_tokens

    before, between = turn_headers(student.tokenizer)
    opened = _continue(student, [before] * count, TURN_TOKENS, frozenset({between[0]}), 2 * seed)
    turns = [t for t in opened if _says_something(t)]
    prompts = [prompt_ids(student.tokenizer, _asked(turn), TURN_TOKENS + len(before + between)) for turn in turns]
    ends = end_tokens(student.model, student.tokenizer)
    replies = _continue(student, prompts, REPLY_TOKENS, ends, 2 * seed + 1)  # else by the numbers that drew the turns
    return [(turn, reply) for turn, reply in zip(turns, replies, strict=True) if _says_something(reply)]


def _continue(student: Student, prompts: Sequence[Ids], tokens: int, ends: frozenset[int], seed: int) -> list[str]:
    """A sampled continuation of each prompt; empty if it did not come to its end."""
    import torch

    from ..serving.decoding import Answer, Row, decode
    from ..serving.engine import Sampling

    def forward(**inputs: Any) -> tuple[torch.Tensor, Any]:
        with torch.inference_mode():
            out = student.model(**inputs, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    sampling = Sampling(max_tokens=tokens, temperature=1.0, seed=seed)
    answers = [Answer(student.tokenizer, sampling, row, ends) for row in range(len(prompts))]
    rows = [Row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for start in range(0, len(rows), BATCH):
        for _ in decode(forward, rows[start : start + BATCH], student.device):
            pass
    return [answer.text.strip() if answer.ended else "" for answer in answers]


def _says_something(text: str) -> bool:
    """Two words or more, and not one of them over and over."""
    words = text.split()
    return len(words) >= 2 and 2 * len(set(words)) >= len(words)
