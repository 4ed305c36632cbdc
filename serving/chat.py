"""A conversation as token ids, the one way for training, scoring and answering.

The invariant: the ids of a prompt followed by the ids of an answer are what the model meets when it serves, up to and
with the end of its turn. A control token that somebody wrote into a message is only text: nobody ends a turn or opens
one of the system by typing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..content import Message

Ids = tuple[int, ...]


def prompt_ids(tokenizer: Any, prompt: Sequence[Message], room: int) -> Ids:
    """The templated prompt in at most `room` ids: the oldest messages go first, the system message last."""
    system = [m for m in prompt[:1] if m["role"] == "system"]
    turns = list(prompt[len(system) :])
    low, high = 0, max(0, len(turns) - 1)  # how many turns to leave out
    while low < high:
        middle = (low + high) // 2
        if len(_templated(tokenizer, [*system, *turns[middle:]])) <= room:
            high = middle
        else:
            low = middle + 1
    ids = _templated(tokenizer, [*system, *turns[low:]])
    if len(ids) <= room:
        return ids
    kept = _common_prefix(ids, _templated(tokenizer, [*system, {"role": "user", "content": ""}])) if system else 0
    kept = kept if kept <= room // 2 else 0
    return ids[:kept] + ids[len(ids) - (room - kept) :]


def answer_ids(tokenizer: Any, prompt: Sequence[Message], answer: str) -> Ids:
    """What follows the generation prompt, up to the first end of turn."""
    prompt, answer = _inert_messages(tokenizer, prompt), _inert(tokenizer, answer)
    head = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    turn: Message = {"role": "assistant", "content": answer}
    whole = tokenizer.apply_chat_template([*prompt, turn], tokenize=False)
    text = whole[len(head) :] if whole.startswith(head) else answer + tokenizer.eos_token
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
    return tuple(ids)


def _templated(tokenizer: Any, messages: Sequence[Message]) -> Ids:
    text = tokenizer.apply_chat_template(
        _inert_messages(tokenizer, messages), tokenize=False, add_generation_prompt=True
    )
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _inert_messages(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """`messages` with a space after the first character of every control token in their text."""
    return [{"role": m["role"], "content": _inert(tokenizer, m["content"])} for m in messages]


def _inert(tokenizer: Any, text: str) -> str:
    controls = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for control in controls:
        if control in text:
            text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
