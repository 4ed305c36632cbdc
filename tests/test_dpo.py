"""Phase 2 through its real entry point, on a random toy base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nightschool.errors import TrainingError
from nightschool.evolve import dpo, sft
from nightschool.evolve.types import Adapter, Example, Pair, Snapshot, Thumb
from nightschool.serving.engine import WEIGHTS
from nightschool.settings import Settings
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def settings(toy_base: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    plain = Settings(home=tmp_path_factory.mktemp("home"))
    night = replace(plain.night, max_tokens=96, batch_size=4, sft_lr=5e-3, sft_epochs=1.0, replay_share=0.0, few_rows=0)
    night = replace(night, preference_lr=3e-3, preference_epochs=3.0)
    return replace(plain, night=night, serving=replace(plain.serving, base=toy_base, device="cpu", threads=1))


def asked(i: int) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": f"what is {i}?"},)


def snapshot(pairs: int = 0, thumbs: int = 0, weight: float = 1.0) -> Snapshot:
    """People like answers that begin with "it is" and dislike those that begin with "who"."""
    examples = tuple(Example(asked(i), f"it is {i}", 1.0, (f"b2:{i}",)) for i in range(16))
    made = tuple(Pair(asked(i), f"it is {i}", f"who {i}", weight, (f"b2:{i}",), "correction") for i in range(pairs))  # type: ignore[arg-type]
    said = (("it is", True), ("who", False))
    rated = tuple(
        Thumb(asked(i), f"{words} {i}", liked, weight, (f"b2:{i}",))  # type: ignore[arg-type]
        for i in range(thumbs)
        for words, liked in said
    )
    return Snapshot(examples, made, rated, ())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def grounded(settings: Settings) -> Adapter:
    return sft.run(snapshot(), settings, folder=settings.home / "adapters" / "building-sft", progress=lambda _: None)


def run(given: Snapshot, start: Adapter, settings: Settings) -> Adapter:
    folder = settings.home / "adapters" / f"building-{len(list(settings.home.glob('adapters/*')))}"
    return dpo.run(given, start, settings, folder=folder, progress=lambda _: None)


def test_adapter_lies_between_phase_1_and_what_phase_2_trained(grounded: Adapter, settings: Settings) -> None:
    found = []
    for share in (1.0, 0.25):
        night = replace(settings.night, interpolation=share)
        found.append(load_file(run(snapshot(pairs=4), grounded, replace(settings, night=night)).path / WEIGHTS))
    start, (trained, between) = load_file(grounded.path / WEIGHTS), found
    assert any(not torch.equal(start[name], weights) for name, weights in trained.items())
    for name, weights in between.items():
        assert torch.allclose(weights, 0.75 * start[name] + 0.25 * trained[name], atol=1e-6)


def rewards(settings: Settings, adapter: Adapter, start: Adapter, held_out: range) -> list[tuple[float, float]]:
    """log π − log π_ref of a good and a bad answer to prompts that were not trained on."""
    from nightschool.evolve import trainer as t
    from nightschool.evolve.batches import collate, logps
    from nightschool.evolve.lessons import lay_out

    def score(path: Path) -> torch.Tensor:
        pupil = t.student(settings, path)
        given = replace(
            snapshot(), pairs=tuple(Pair(asked(i), f"it is {i}", f"who {i}", 1.0, (), "contrast") for i in held_out)
        )  # type: ignore[arg-type]
        lessons, _ = dpo.lessons_of(given, pupil.tokenizer, 96)
        batch = collate(lay_out(lessons, 96, 8, merge=False), lessons, pupil.pad, pupil.merges)
        with torch.no_grad():
            values = logps(pupil.model, batch)
        return torch.stack([values[batch["chosen"]], values[batch["rejected"]]], 1)

    return [(float(a), float(b)) for a, b in score(adapter.path) - score(start.path)]


@pytest.mark.parametrize("given", [snapshot(pairs=16), snapshot(thumbs=16), snapshot(pairs=8, thumbs=8)])
def test_what_people_prefer_becomes_likelier_on_new_prompts(
    settings: Settings, grounded: Adapter, given: Snapshot
) -> None:
    adapter = run(given, grounded, settings)
    assert (adapter.phase, adapter.parent_id, adapter.base_id) == ("dpo", grounded.id, grounded.base_id)
    moved = rewards(settings, adapter, grounded, range(20, 30))
    assert all(good > bad for good, bad in moved)
    assert sum(good for good, _ in moved) > -1.0  # the NLL term: the good answers are not given up to bury the bad


def test_the_first_loss_is_that_of_an_untrained_policy(settings: Settings, grounded: Adapter) -> None:
    night = replace(settings.night, sft_term=0.0)
    given = replace(snapshot(pairs=8, thumbs=8), examples=())
    adapter = run(given, grounded, replace(settings, night=night))
    assert adapter.details["losses"][0] == pytest.approx(0.6931, abs=1e-3)  # Δ = 0, since π = π_ref


def test_what_is_too_long_and_what_is_replayed_is_counted(
    settings: Settings, grounded: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [Example(asked(i), "well now", 1.0, ()) for i in range(50, 53)]  # type: ignore[arg-type]
    monkeypatch.setattr("nightschool.evolve.replay.sample", lambda *_: own)
    long = Thumb(asked(40), "long " * 50, True, 1.0, ("b2:40",))  # type: ignore[arg-type]
    night = replace(settings.night, preference_epochs=1.0)
    given = replace(snapshot(pairs=2), thumbs=(long,))
    told = run(given, grounded, replace(settings, night=night)).details
    assert (told["too_long"], told["replay"], told["rows"]) == (1, 3, 2 + len(given.examples) + 3)


def test_weights_are_relative_and_zero_is_absence(settings: Settings, grounded: Adapter) -> None:
    plain = snapshot(pairs=4, thumbs=4)
    first = run(plain, grounded, settings).id
    assert run(snapshot(pairs=4, thumbs=4, weight=2.0), grounded, settings).id == first
    more = Thumb(asked(40), "never mind", True, 0.0, ("b2:40",))  # type: ignore[arg-type]
    assert run(replace(plain, thumbs=(*plain.thumbs, more)), grounded, settings).id == first


def test_loss_is_the_formula_over_the_whole_optimiser_batch(settings: Settings) -> None:
    from math import exp, log

    import torch

    night = replace(settings.night, beta=0.1, thumb_beta=0.2, sft_term=0.5)
    # a pair, a disliked thumb, an example and a replayed answer, in a batch of which this is a part
    batch = {
        "weight": torch.tensor([2.0, 2.0, 3.0, 1.5, 5.0]),
        "reference": torch.tensor([-10.0, -9.0, -8.0, float("nan"), float("nan")]),
        "chosen": torch.tensor([0]),
        "rejected": torch.tensor([1]),
        "thumb": torch.tensor([2]),
        "liked": torch.tensor([False]),
        "imitated": torch.tensor([False, False, False, True, False]),
        "replayed": torch.tensor([False, False, False, False, True]),
    }
    logps, totals = torch.tensor([-7.0, -12.0, -6.0, -8.0, -4.0]), torch.tensor([20.0, 4.0, 40.0])
    pair = 2 * log(1 + exp(-0.1 * (3 + 3))) / 4
    thumb = 3 * log(1 + exp(0.2 * 2)) / 4
    grounding = (1.5 * 8 + 5 * 4) / 60
    assert dpo.objective(night)(logps, batch, totals).item() == pytest.approx(pair + thumb + 0.5 * grounding, rel=1e-6)
    assert sft.objective(logps, batch, totals).item() == pytest.approx(grounding, rel=1e-6)


def test_another_base_than_the_start_was_trained_on_is_refused(settings: Settings, grounded: Adapter) -> None:
    with pytest.raises(TrainingError, match=r"serving\.base"):
        run(snapshot(pairs=2), replace(grounded, base_id="b2:other"), settings)


def test_no_preference_that_fits_is_an_error(settings: Settings, grounded: Adapter) -> None:
    with pytest.raises(TrainingError, match="no pair or thumb of 0 and 0"):
        run(snapshot(), grounded, settings)
