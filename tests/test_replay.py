"""The base's own text, drawn from a toy base whose stop tokens are made likely."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from nightschool.evolve import replay
from nightschool.evolve.replay import sample, turn_headers
from nightschool.settings import Settings


@pytest.fixture(scope="module")
def talker(toy_base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A student whose base says letters, spaces and the end of turn, so that some of what it samples is words."""
    from nightschool.evolve.trainer import student

    plain = Settings(home=tmp_path_factory.mktemp("home"))
    pupil = student(replace(plain, serving=replace(plain.serving, base=toy_base, device="cpu", threads=1)))
    said = pupil.tokenizer("abcdefgh        <|end|><|end|>", add_special_tokens=False)["input_ids"]
    bias = torch.full((len(pupil.tokenizer),), -100.0)
    for token in said:
        bias[token] = torch.log(torch.tensor(float(said.count(token)))) + 3
    head = pupil.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: 0 * logits + bias)
    return pupil


def test_headers_are_those_of_the_chat_template(talker: Any) -> None:
    before, between = turn_headers(talker.tokenizer)
    assert talker.tokenizer.decode(before) == "<|user|>"
    assert talker.tokenizer.decode(between) == "<|end|><|assistant|>"


def test_rows_are_whole_conversations_that_say_something(talker: Any) -> None:
    lines: list[str] = []
    rows = sample(talker, 10, 0, lines.append)
    assert 5 <= len(rows) <= 10 and f"{len(rows)} rows" in lines[-1]
    for row in rows:
        (turn,) = row.prompt
        assert turn["role"] == "user" and row.weight == 1.0 and row.interaction_ids == ()
        assert all(len(text.split()) >= 2 and "<|" not in text for text in (turn["content"], row.completion))


def test_the_same_seed_gives_the_same_rows_and_leaves_the_callers_randomness_alone(talker: Any) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = sample(talker, 5, 0, lambda _: None)
    assert torch.equal(torch.rand(1), expected)
    assert sample(talker, 5, 0, lambda _: None) == first != sample(talker, 5, 1, lambda _: None)


def test_the_count_is_capped_and_may_be_zero(talker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    assert sample(talker, 0, 0, lambda _: None) == []
    assert len(sample(talker, 50, 0, lambda _: None)) <= 4
