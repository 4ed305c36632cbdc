"""What replayed text does to an adapter: it holds it to the base's whole distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nightschool.evolve import sft
from nightschool.evolve import trainer as t
from nightschool.evolve.batches import Batch, anchored_logps, collate, logps
from nightschool.evolve.lessons import Lesson, lay_out
from nightschool.evolve.types import Example
from nightschool.settings import Settings


@pytest.fixture(scope="module")
def pupil(toy_base: str, tmp_path_factory: pytest.TempPathFactory) -> t.Student:
    plain = Settings(home=tmp_path_factory.mktemp("home"))
    return t.student(replace(plain, serving=replace(plain.serving, base=toy_base, device="cpu", threads=1)))


@pytest.fixture
def moved(pupil: t.Student) -> t.Student:
    with torch.no_grad():
        for name, parameter in pupil.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return pupil


def batch(pupil: t.Student, replayed: bool) -> tuple[Batch, list[Lesson]]:
    """Three answers of its own and one to imitate, two of them in one passage."""
    texts = [("where is it?", "over there"), ("where is it?", "over the hill and far"), ("why?", "it is late")]
    rows = [Example(({"role": "user", "content": q},), a, 1.0, ()) for q, a in texts]
    own = sft.lessons_of(rows, pupil.tokenizer, 96)[0]
    own = [replace(lesson, kind="replay") for lesson in own] if replayed else own
    taught = sft.lessons_of(
        [Example(({"role": "user", "content": "who?"},), "nobody at all", 1.0, ())], pupil.tokenizer, 96
    )
    lessons = [*own, *taught[0]]
    return collate(lay_out(lessons, 96, 4, pupil.merges), lessons, pupil.pad, pupil.merges), lessons


def test_an_untrained_adapter_is_not_moved_by_the_base_s_own_text(pupil: t.Student) -> None:
    made, _ = batch(pupil, replayed=True)
    kept = anchored_logps(pupil.model, made)[made["replayed"]]
    kept.sum().backward()
    assert kept.tolist() == pytest.approx([0.0] * len(kept), abs=1e-4)  # so that its loss is 0 as well
    steps = [p.grad for p in pupil.model.parameters() if p.grad is not None]
    pupil.model.zero_grad()
    assert steps and all(step.abs().max() < 1e-5 for step in steps)


def test_replayed_answers_are_held_to_the_whole_distribution_of_the_base(moved: t.Student) -> None:
    made, lessons = batch(moved, replayed=True)
    with torch.no_grad():
        anchored = anchored_logps(moved.model, made)
    for (index, _), replayed, value in zip(made["answer"].tolist(), made["replayed"], anchored, strict=True):
        lesson = lessons[index]
        ids = torch.tensor([lesson.prompt + lesson.answers[0]])
        with torch.no_grad():
            mine = moved.model(input_ids=ids).logits.log_softmax(-1)[0, len(lesson.prompt) - 1 : -1]
            with moved.model.disable_adapter():
                base = moved.model(input_ids=ids).logits.softmax(-1)[0, len(lesson.prompt) - 1 : -1]
        drawn = mine.gather(1, torch.tensor(lesson.answers[0])[:, None]).sum()
        divergence = (base * (base.log() - mine)).sum()
        assert float(value) == pytest.approx(float(-divergence if replayed else drawn), rel=1e-3, abs=1e-4)
        assert float(divergence) > 0.01
        assert abs(float((base * mine).sum() - drawn)) > 0.01  # else the two could not be told apart


def test_answers_that_are_imitated_are_scored_as_they_were_said(moved: t.Student) -> None:
    made, _ = batch(moved, replayed=False)
    with torch.no_grad():
        assert torch.equal(anchored_logps(moved.model, made), logps(moved.model, made))


def test_tokens_of_replay_are_counted_apart(pupil: t.Student) -> None:
    made, lessons = batch(pupil, replayed=True)
    imitated, rows, replayed = made["totals"].tolist()
    sizes = [len(lesson.answers[0]) for lesson in lessons]
    assert (imitated, rows, replayed) == (sizes[-1], 0, sum(sizes[:-1]))
    assert not (made["imitated"] & made["replayed"]).any()


def test_what_is_taught_beside_replay_is_learnt_as_it_would_be_alone(moved: t.Student) -> None:
    made, _ = batch(moved, replayed=True)

    def steps(values: torch.Tensor) -> list[torch.Tensor]:
        moved.model.zero_grad()
        values[made["imitated"]].sum().backward()
        return [p.grad.clone() for p in moved.model.parameters() if p.grad is not None]

    alone, beside = steps(logps(moved.model, made)), steps(anchored_logps(moved.model, made))
    assert len(alone) == len(beside) and max(float(step.abs().max()) for step in alone) > 1e-3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, beside, strict=True))
