"""An engine that does not answer as the trainer did is found out when it loads the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from nightschool.errors import ServingError
from nightschool.evolve import sft
from nightschool.evolve.registry import ensure_loaded
from nightschool.evolve.types import Adapter, Example, Snapshot
from nightschool.serving import parity
from nightschool.serving.engine import Prompt, Score
from nightschool.serving.local import LocalEngine
from nightschool.settings import Settings


class FixedEngine:
    """Answers of three tokens with given log-probabilities, by adapter."""

    def __init__(self, **logprobs: float) -> None:
        self.logprobs = logprobs

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str], *, adapter: str | None = None) -> list[Score]:
        return [Score((self.logprobs[adapter or "base"] / 3,) * 3) for _ in answers]


RECORDED = {"base": [-9.0] * 3, "adapter": [-6.0] * 3}


def test_engine_that_agrees_within_the_tolerance_passes() -> None:
    parity.check(FixedEngine(base=-9.1, one=-6.1), "one", RECORDED, 0.1)


def test_what_rounding_does_to_the_base_is_not_the_adapters() -> None:
    parity.check(FixedEngine(base=-9.25, one=-6.4), "one", RECORDED, 0.1)  # as it gains 2.85 where 3 were recorded


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (FixedEngine(base=-9.4, one=-6.0), "base is 0.133 nats per token away"),
        (FixedEngine(base=-9.0, one=-9.0), "took up no module of adapter one"),
        (FixedEngine(base=-9.0, one=-6.4), "adapter one is 0.133 nats per token away"),
        (FixedEngine(base=-9.0, one=float("nan")), "adapter one is inf nats"),
    ],
)
def test_engine_that_differs_is_named_with_the_figure(engine: FixedEngine, reason: str) -> None:
    with pytest.raises(ServingError, match=reason):
        parity.check(engine, "one", RECORDED, 0.1)


@pytest.fixture
def trained(toy_base: str, tmp_path: Path) -> tuple[Settings, Adapter]:
    plain = Settings(home=tmp_path)
    night = replace(plain.night, max_tokens=96, batch_size=4, sft_lr=2e-2, replay_share=0.0, few_rows=0)
    settings = replace(plain, night=night, serving=replace(plain.serving, base=toy_base, device="cpu", threads=1))
    rows = [Example(({"role": "user", "content": f"what is {i}?"},), f"it is {i}", 1.0, (f"b2:{i}",)) for i in range(8)]
    snapshot = Snapshot(tuple(rows), (), (), ())
    return settings, sft.run(snapshot, settings, folder=tmp_path / "adapters" / "new", progress=lambda _: None)


def test_what_the_trainer_recorded_is_what_the_engine_answers(trained: tuple[Settings, Adapter]) -> None:
    settings, adapter = trained
    engine = LocalEngine(settings.serving)
    ensure_loaded(engine, adapter, tolerance=1e-4)
    assert engine.adapters() == [adapter.id]


def test_adapter_whose_answers_are_not_those_recorded_is_unloaded_again(trained: tuple[Settings, Adapter]) -> None:
    settings, adapter = trained
    recorded = adapter.details["parity"]
    other = replace(adapter, details={"parity": {**recorded, "adapter": [v - 3.0 for v in recorded["adapter"]]}})
    engine = LocalEngine(settings.serving)
    with pytest.raises(ServingError, match="away from what its trainer recorded"):
        ensure_loaded(engine, other, tolerance=0.01)
    assert engine.adapters() == []
