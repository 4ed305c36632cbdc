"""The base that is shipped: it loads, talks in words, uses what stands in its prompt, and stops by itself."""

import math
from random import Random

import pytest
from nightschool.content import Message
from nightschool.serving.base import SEEDLING, base_id
from nightschool.serving.engine import Sampling
from nightschool.serving.local import LocalEngine
from nightschool.serving.pretrain import measure
from nightschool.serving.pretrain.scenes import turn
from nightschool.settings import ServingSettings

TALK: list[list[Message]] = [
    [{"role": "user", "content": text}]
    for text in ("Hello!", "Have you seen any good films lately?", "I went swimming with my brother.", "Thank you.")
]


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(ServingSettings(device="cpu", threads=1))


def asked(notes: list[str], question: str) -> list[Message]:
    lines = "\n".join(f"- {note}" for note in notes)
    system: Message = {"role": "system", "content": f"Notes from earlier conversations:\n{lines}"}
    return [system, {"role": "user", "content": question}]


def test_seedling_is_small_and_has_a_card() -> None:
    assert sum(p.stat().st_size for p in SEEDLING.iterdir()) < 16e6
    assert "## Sources" in (SEEDLING / "README.md").read_text(encoding="utf-8")
    assert base_id("seedling").startswith("b2:")


def test_seedling_answers_in_words_and_ends_by_itself(engine: LocalEngine) -> None:
    for answer in engine.generate(TALK, sampling=Sampling(max_tokens=80)):
        assert 1 <= len(answer.split()) <= 60
        assert sum(c.isalpha() or c in " '.,!?-" for c in answer) > 0.9 * len(answer)
    longer = engine.generate(TALK, sampling=Sampling(max_tokens=200))
    assert longer == engine.generate(TALK, sampling=Sampling(max_tokens=80))


def test_seedling_uses_a_fact_that_stands_in_its_notes(engine: LocalEngine) -> None:
    notes = ["My dog is called Brumpel.", "I live in Zarnov."]
    prompts = [asked(notes, "What is my dog called?"), asked(notes, "Where do I live?")]
    dog, home = engine.generate(prompts)
    assert "Brumpel" in dog and "Zarnov" in home


def test_seedling_reads_most_facts_that_were_never_seen(engine: LocalEngine) -> None:
    rng = Random("test")
    known = [measure.invented(rng, 2) for _ in range(24)]
    prompts = [asked([fact.said for fact in facts], chosen.question) for facts, chosen in known]
    answers = engine.generate(prompts, sampling=Sampling(max_tokens=48))
    right = [chosen.value in answer for (_, chosen), answer in zip(known, answers, strict=True)]
    assert sum(right) >= 18


def test_seedling_prefers_the_answer_that_fits_its_prompt(engine: LocalEngine) -> None:
    talk = [[turn("user", "What is my dog called?")], [turn("user", "How are you?")]]
    fitting = engine.score(talk, ["I don't know that yet.", "I am well, thank you. And you?"])  # type: ignore[arg-type]
    swapped = engine.score(talk, ["I am well, thank you. And you?", "I don't know that yet."])  # type: ignore[arg-type]
    assert sum(s.logprob for s in fitting) > sum(s.logprob for s in swapped) + 2
    assert all(math.isfinite(s.logprob) for s in (*fitting, *swapped))
