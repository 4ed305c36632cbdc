"""An engine that does not answer as the trainer did is found out when it loads the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, tzinfo
from pathlib import Path
from random import Random

import pytest
from nightschool.errors import ServingError
from nightschool.evolve import sft, trainer
from nightschool.evolve.sealing import ensure_loaded
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


class NoisyEngine:
    """A server of answers of twelve tokens that moves each of them by `applied` nats under an adapter, whose base is
    `offset` away; scorings differ by 1e-3 a token, and by `flips` under an adapter, as rounding does in FP8."""

    def __init__(self, applied: float, offset: float = 0.0, flips: float = 0.0, seed: int = 0) -> None:
        self.applied, self.offset, self.flips, self.drawn = applied, offset, flips, Random(seed)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str], *, adapter: str | None = None) -> list[Score]:
        moved, noise = (self.applied, self.flips) if adapter else (0.0, 0.0)
        means = [-3.0 + self.offset + moved * sign for sign in SIGNS]
        return [Score(tuple(self.drawn.gauss(mean, noise + 1e-3) for _ in range(12))) for mean in means]


SIGNS = (1, -1, 1)  # of the effect, by answer


def recorded(effect: float) -> dict[str, list[float]]:
    """By the trainer of an adapter that moves each token by so much."""
    return {"base": [-36.0] * 3, "adapter": [-36.0 + 12 * effect * sign for sign in SIGNS]}


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


@pytest.mark.parametrize("offset", [0.0, 0.081])
@pytest.mark.parametrize("effect", [0.02, 0.05, 0.099, 0.115, 0.17, 0.186])
def test_adapter_that_a_noisy_server_does_not_apply_is_refused_with_its_share(effect: float, offset: float) -> None:
    told = r"applies -?0\.0\d of adapter one.* recorded of its effect \(0\.\d+ nats"
    for seed in range(20):
        with pytest.raises(ServingError, match=told):
            parity.check(NoisyEngine(0.0, offset, seed=seed), "one", recorded(effect), 0.1)


@pytest.mark.parametrize(("offset", "flips"), [(0.0, 0.0), (0.014, 0.03), (0.081, 0.08)])
@pytest.mark.parametrize("effect", [1e-3, 6e-3, 0.02, 0.05, 0.099, 0.115, 0.17, 0.186, 0.5])
def test_adapter_that_a_noisy_server_applies_passes_in_fp8_too(effect: float, offset: float, flips: float) -> None:
    for seed in range(20):
        parity.check(NoisyEngine(effect, offset, flips, seed), "one", recorded(effect), 0.1)


@pytest.mark.parametrize("share", [-1.0, 0.4])
def test_adapter_of_which_a_server_that_does_not_round_applies_too_little_is_refused(share: float) -> None:
    with pytest.raises(ServingError, match=rf"applies {share:.1f}\d of adapter one"):
        parity.check(NoisyEngine(share * 0.05, offset=1e-3), "one", recorded(0.05), 0.1)


@pytest.mark.parametrize(("effect", "applied"), [(1e-3, 0.0), (0.05, -0.05)])
def test_effect_that_noise_or_rounding_may_turn_about_passes(effect: float, applied: float) -> None:
    parity.check(NoisyEngine(applied, offset=0.081, flips=0.08), "one", recorded(effect), 0.1)


@pytest.mark.parametrize("damaged", [{"adapter": [-6.0] * 2}, {"base": None}, {"adapter": ["x"] * 3}, {"base": []}])
def test_record_that_is_damaged_or_of_other_talks_names_its_adapter(damaged: dict[str, list[float]]) -> None:
    with pytest.raises(ServingError, match=r"adapter one: what its trainer recorded .* run `nightschool night`"):
        parity.check(FixedEngine(base=-9.0, one=-6.0), "one", {**RECORDED, **damaged}, 0.1)


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


def test_record_holds_on_other_days_where_the_template_tells_the_date(
    trained: tuple[Settings, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates as that of gpt-oss begin with the current date."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            return cls(2031, 12, 24, tzinfo=tz)

    settings, _ = trained
    pupil, engine = trainer.student(settings), LocalEngine(settings.serving)
    for tokenizer in (pupil.tokenizer, engine._tokenizer):
        tokenizer.chat_template = "{{ strftime_now('%A %d %B %Y') }} " + tokenizer.chat_template
    record = trainer.parity_record(pupil)["base"]
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert "December" in str(engine._tokenizer.apply_chat_template(parity.TALKS[0][0], tokenize=False))
    assert [score.logprob for score in parity._scored(engine, None)] == pytest.approx(record, abs=1e-3)
    with pytest.raises(AssertionError):
        said = engine.score([prompt for prompt, _ in parity.TALKS], [answer for _, answer in parity.TALKS])
        assert [score.logprob for score in said] == pytest.approx(record, abs=1e-3)


def test_adapter_whose_answers_are_not_those_recorded_is_unloaded_again(trained: tuple[Settings, Adapter]) -> None:
    settings, adapter = trained
    recorded = adapter.details["parity"]
    other = replace(adapter, details={"parity": {**recorded, "adapter": [v - 3.0 for v in recorded["adapter"]]}})
    engine = LocalEngine(settings.serving)
    with pytest.raises(ServingError, match="what its trainer recorded of its effect"):
        ensure_loaded(engine, other, tolerance=0.01)
    assert engine.adapters() == []
