"""Encoding, truncation, passages and the plan; and that an answer has the same log-probability in any passage."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from nightschool.evolve.batches import collate, logps
from nightschool.evolve.lessons import Lesson, Passage, chains, encode, lay_out, plan


@pytest.fixture(scope="module")
def tokenizer(toy_base: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(toy_base)


def random_lessons(count: int, seed: int = 0) -> list[Lesson]:
    """Prompts over three tokens, so that many share a beginning, with a pair now and then."""
    random = Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(random.randint(5, 6) for _ in range(length))

    made = []
    for _ in range(count):
        prompt, kind = ids(random.randint(1, 12)), random.choice(["imitate", "liked", "disliked", "pair"])
        answers = tuple(ids(random.randint(1, 6)) for _ in range(2 if kind == "pair" else 1))
        made.append(Lesson(prompt, answers, kind, 1.0))  # type: ignore[arg-type]
    return made


def unlike(*sizes: int) -> list[Lesson]:
    """One of each size, alike in their first token alone."""
    return [Lesson((5, *[100 + n] * (size - 2)), ((7,),), "imitate", 1.0) for n, size in enumerate(sizes)]


def test_prompt_and_answer_are_what_the_template_says_with_the_end_of_turn(tokenizer: Any) -> None:
    found = encode(tokenizer, [{"role": "user", "content": "hi"}], ["yes"], 100)
    assert found is not None
    prompt, (answer,) = found
    assert tokenizer.decode(prompt) == "<|user|>hi<|end|><|assistant|>"
    assert tokenizer.decode(answer) == "yes<|end|>"


def test_template_that_tells_the_date_tells_the_same_on_any_day(toy_base: str) -> None:
    from transformers import AutoTokenizer

    dated = AutoTokenizer.from_pretrained(toy_base)
    dated.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + dated.chat_template
    found = encode(dated, [{"role": "user", "content": "hi"}], ["yes"], 100)
    assert found and dated.decode(found[0]) == "2026-01-05<|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize("answers", [["y" * 90], ["  "], ["yes", "y" * 90], ["yes", "  "]])
def test_an_answer_that_does_not_fit_or_says_nothing_is_refused(tokenizer: Any, answers: list[str]) -> None:
    assert encode(tokenizer, [{"role": "user", "content": "hi"}], answers, 100) is None


def test_every_lesson_stands_in_exactly_one_passage_within_the_limit() -> None:
    lessons = random_lessons(150)
    passages = lay_out(lessons, 40, 8, merge=True)
    placed = [(p.lesson, p.answer) for passage in passages for p in passage.placed]
    assert sorted(placed) == [(i, n) for i, lesson in enumerate(lessons) for n in range(len(lesson.answers))]
    assert all(len(passage.tokens) <= 40 and len(passage.lessons) <= 8 for passage in passages)
    assert sum(len(p.tokens) for p in passages) < 0.8 * sum(lesson.size for lesson in lessons)


def test_without_merging_each_lesson_stands_alone_and_chains_never_branch() -> None:
    lessons = random_lessons(20)
    passages = lay_out(lessons, 40, 8, merge=False)
    assert len(passages) == len(lessons)
    assert not any(chain.branches for p in passages for chain in chains(p, lessons))


def test_lessons_that_hardly_begin_alike_share_no_passage() -> None:
    assert len(lay_out(unlike(20, 20), 512, 8, merge=True)) == 2


def test_log_probabilities_do_not_depend_on_the_passage(toy_base: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32).eval()
    lessons = random_lessons(30, seed=1)

    def values(passages: list[Passage], tree: bool) -> dict[tuple[int, ...], float]:
        batch = collate(passages, lessons, 0, tree)
        with torch.no_grad():
            return dict(zip(map(tuple, batch["answer"].tolist()), logps(model, batch).tolist(), strict=True))

    packed = lay_out(lessons, 64, 8, merge=True)
    together, apart = values(packed, True), values(packed, False)
    alone = {k: v for i, lesson in enumerate(lessons) for k, v in values([Passage().add(i, lesson)], False).items()}
    assert any(p.branches for p in packed)
    assert together == pytest.approx(apart, abs=1e-4)
    assert together == pytest.approx(alone, abs=1e-4)


def test_the_plan_is_seeded_and_shows_every_lesson_as_often_as_asked() -> None:
    passages = lay_out(random_lessons(50), 40, 8, merge=True)
    made = plan(passages, 2.0, 4, 1e9, 10.0, seed=3)
    shown = [i for batch in made.batches for i in batch]
    assert sorted(shown) == sorted([*range(len(passages))] * 2)
    assert made == plan(passages, 2.0, 4, 1e9, 10.0, seed=3) != plan(passages, 2.0, 4, 1e9, 10.0, seed=4)
    assert made.rows == 50 and made.epochs == 2.0
    assert all(sum(len(passages[i].lessons) for i in batch[:-1]) < 4 for batch in made.batches)


def test_batch_that_has_room_for_more_holds_no_passage_twice() -> None:
    made = plan(lay_out(unlike(9, 9, 9), 512, 8, merge=False), 3.0, 8, 1e9, 10.0, seed=0)
    assert all(len(set(batch)) == len(batch) for batch in made.batches)


def test_passages_of_one_batch_are_of_like_length() -> None:
    passages = lay_out(unlike(*[5, 50] * 8), 512, 8, merge=False)
    made = plan(passages, 1.0, 4, 1e9, 10.0, seed=0)
    assert all(len({len(passages[i].tokens) for i in batch}) == 1 for batch in made.batches)


def test_part_of_an_epoch_shows_that_part() -> None:
    made = plan(lay_out(unlike(*[9] * 8), 512, 8, merge=False), 1.5, 4, 1e9, 10.0, seed=0)
    assert (made.epochs, sum(map(len, made.batches))) == (1.5, 12)


@pytest.mark.parametrize("epochs,replayed", [(1.0, 1), (2.0, 2), (3.0, 2), (8.0, 2)])
def test_the_bases_own_text_is_seen_twice_at_most_beside_what_begins_like_it(epochs: float, replayed: int) -> None:
    begins = tuple(range(100, 130))
    lessons = [
        replace(
            lesson, prompt=begins + lesson.prompt, kind="replay" if i >= 20 and len(lesson.answers) == 1 else "pair"
        )
        for i, lesson in enumerate(random_lessons(60))
    ]
    passages = lay_out(lessons, 200, 8, merge=True)
    assert any(passage.branches for passage in passages)
    made = plan(passages, epochs, 4, 1e9, 10.0, seed=3)
    shown = Counter(lesson for batch in made.batches for i in batch for lesson in passages[i].lessons)
    assert {shown[i] for i, lesson in enumerate(lessons) if lesson.kind == "pair"} == {epochs}
    assert {shown[i] for i, lesson in enumerate(lessons) if lesson.kind == "replay"} == {replayed}
    assert made.rows == 60 and made.epochs == epochs


def test_the_budget_bounds_the_tokens_and_says_how_many_rows_were_seen() -> None:
    passages = lay_out(random_lessons(200), 40, 8, merge=True)
    total = sum(len(p.tokens) for p in passages)
    made = plan(passages, 2.0, 4, total / 10, 5.0, seed=0)
    assert total / 2 - 40 <= made.tokens <= total / 2
    assert made.minutes <= 5 and 60 < made.rows < 140 and "rows" in str(made)


def test_budget_that_is_too_small_for_any_passage_is_spent_on_one() -> None:
    made = plan(lay_out(unlike(9, 9), 512, 8, merge=False), 1.0, 4, 1.0, 1.0, seed=0)
    assert [len(batch) for batch in made.batches] == [1]
