"""The base's own words, drawn from it, to mix into phase 1 so that a night does not make it forget how it spoke.

A user turn is sampled after the header that the chat template puts before one, then the reply to it, both at
temperature 1, so that the rows are drawn from what the base itself finds likely and no text need be kept or shipped.
The invariant: a pure function of (base, count, seed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..serving.chat import Ids
    from .lessons import Lesson
    from .trainer import Student

MOST = 300  # rows
TURN_TOKENS, REPLY_TOKENS = 40, 48
BATCH = 256
ROUNDS = 3  # a base may often ramble or say nothing; it is not asked for ever
PLACEHOLDERS = ("\u2060one\u2060", "\u2060two\u2060")


def sample(student: Student, count: int, seed: int, progress: Callable[[str], None]) -> list[Lesson]:
    """At most `count` and `MOST` conversations of one turn, as lessons of weight 1; fewer if the base rambles."""
    import torch

    from .lessons import Lesson

    count = min(count, MOST)
    if count <= 0:
        return []
    before, between = turn_headers(student.tokenizer)
    found: dict[tuple[Ids, Ids], None] = {}  # a set that keeps its order
    device = torch.device(student.device)
    student.model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), student.model.disable_adapter():
        torch.manual_seed(seed)
        for _ in range(ROUNDS):
            if len(found) < count:
                wanted = min(BATCH * -(-(count - len(found)) // BATCH), 2 * count + 8)
                found |= dict.fromkeys(_conversations(student, before, between, wanted))
    progress(f"replay: {min(count, len(found))} rows of the base's own text, {count} wanted")
    return [Lesson(prompt, (answer,), "imitate", 1.0) for prompt, answer in list(found)[:count]]


def turn_headers(tokenizer: Any) -> tuple[Ids, Ids]:
    """Ids of what the chat template puts before a user's text, and between it and the reply."""
    user, reply = PLACEHOLDERS
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    before, rest = text.split(user, 1)
    between = rest.split(reply, 1)[0]
    before, between = (tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (before, between))
    return before, between


def _conversations(student: Student, before: Ids, between: Ids, count: int) -> list[tuple[Ids, Ids]]:
    stops = [between[0]]
    turns = [ids[:-1] for ids in _continue(student, [before] * count, TURN_TOKENS, stops) if ids[-1] in stops]
    prompts = [before + turn + between for turn in turns if _says_something(student.tokenizer, turn)]
    end = student.tokenizer.eos_token_id
    replies = _continue(student, prompts, REPLY_TOKENS, [end])
    return [
        (prompt, reply)
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply[-1] == end and _says_something(student.tokenizer, reply[:-1])
    ]


def _continue(student: Student, prompts: Sequence[Ids], tokens: int, stops: Sequence[int]) -> list[Ids]:
    """One sampled continuation of each prompt, with its stop token if it came to one."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Ids] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        width = max(len(prompts[i]) for i in part)
        ids = torch.full((len(part), width), student.pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.no_grad():
            made = student.model.generate(
                input_ids=ids.to(student.device),
                attention_mask=mask.to(student.device),
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=list(stops),
                pad_token_id=student.pad,
                use_cache=True,
            )
        found |= {i: _until(row, stops) for i, row in zip(part, made[:, width:].tolist(), strict=True)}
    return [found[i] for i in range(len(prompts))]


def _until(ids: Sequence[int], stops: Sequence[int]) -> Ids:
    for i, token in enumerate(ids):
        if token in stops:
            return tuple(ids[: i + 1])
    return tuple(ids)


def _says_something(tokenizer: Any, ids: Ids) -> bool:
    """Two words or more, not one word over and over, and no control token inside."""
    words = tokenizer.decode(ids, skip_special_tokens=True).split()
    special = set(tokenizer.all_special_ids)
    return len(words) >= 2 and 2 * len(set(words)) >= len(words) and not special.intersection(ids)
