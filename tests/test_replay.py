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
    rows = sample(talker, 20, 0, lines.append)
    assert 5 <= len(rows) <= 20 and f"{len(rows)} rows" in lines[-1]
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


def test_turns_and_replies_of_both_phases_are_drawn_by_numbers_of_their_own(
    talker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def silent(student: Any, prompts: list[Any], tokens: int, ends: frozenset[int], seed: int) -> list[str]:
        seeds.append(seed)
        return [""] * len(prompts)

    monkeypatch.setattr(replay, "_continue", silent)
    assert [sample(talker, 5, phase, lambda _: None) for phase in (0, 1)] == [[], []]
    assert len(seeds) == len(set(seeds)) == 2 * 2 * replay.ROUNDS


def test_template_that_tells_the_date_begins_what_is_drawn_the_same_on_any_day(
    talker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def talking(student: Any, prompts: list[Any], *_: object) -> list[str]:
        begun.append(talker.tokenizer.decode(prompts[0]))
        return ["well now"] * len(prompts)

    monkeypatch.setattr(replay, "_continue", talking)
    monkeypatch.setattr(
        talker.tokenizer, "chat_template", "{{ strftime_now('%Y-%m-%d') }}" + talker.tokenizer.chat_template
    )
    sample(talker, 1, 0, lambda _: None)
    assert begun[:2] == ["2026-01-05<|user|>", "2026-01-05<|user|>well now<|end|><|assistant|>"]


def test_the_count_is_capped_and_may_be_zero(talker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    assert sample(talker, 0, 0, lambda _: None) == []
    assert len(sample(talker, 50, 0, lambda _: None)) <= 4
