"""Phase 1 through its real entry point, on a random toy base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nightschool.errors import TrainingError
from nightschool.evolve import sft, trainer
from nightschool.evolve.trainer import checkpointing, replay_rows, suited
from nightschool.evolve.types import Adapter, Example, Snapshot, recipe
from nightschool.settings import NightSettings, Settings
from safetensors import SafetensorError
from transformers import BambaConfig, Lfm2Config, Llama4TextConfig, LlamaConfig, MistralConfig


@pytest.fixture
def settings(toy_base: str, tmp_path: Path) -> Settings:
    plain = Settings(home=tmp_path)
    night = replace(plain.night, max_tokens=96, batch_size=4, sft_lr=5e-3, sft_epochs=1.0, replay_share=0.0, few_rows=0)
    return replace(plain, night=night, serving=replace(plain.serving, base=toy_base, device="cpu", threads=1))


def example(i: int, completion: str = "", weight: float = 1.0) -> Example:
    return Example(({"role": "user", "content": f"what is {i}?"},), completion or f"it is {i}", weight, (f"b2:{i}",))


def run(rows: list[Example], settings: Settings, lines: list[str] | None = None) -> Adapter:
    folder = settings.home / "adapters" / f"new-{len(list(settings.home.glob('adapters/*')))}"
    report: Callable[[str], None] = (lines if lines is not None else []).append
    return sft.run(Snapshot(tuple(rows), (), (), ()), settings, folder=folder, progress=report)


def test_a_night_makes_a_sealed_adapter_that_says_what_was_done(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(variable, raising=False)
    told = "trl.trainer.base_trainer.send_telemetry"
    monkeypatch.setattr(told, lambda *_, **__: pytest.fail("somebody is told of a night"))
    lines: list[str] = []
    adapter = run([example(i) for i in range(40)], settings, lines)
    assert (adapter.phase, adapter.parent_id) == ("sft", None)
    assert {p.name for p in adapter.path.iterdir()} == {
        "adapter.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    details = adapter.details
    assert details["night"] == recipe(settings.night)
    assert details["rows"] == 40 and details["too_long"] == 0 and len(details["losses"]) == details["steps"]
    assert details["losses"][-1] < details["losses"][0]
    assert any("40 rows" in line for line in lines)


def test_no_path_of_the_machine_is_written_into_the_adapter(settings: Settings, toy_base: str) -> None:
    adapter = run([example(i) for i in range(8)], settings)
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == adapter.base_id
    assert not any(toy_base.encode() in p.read_bytes() for p in adapter.path.iterdir())


def test_lora_goes_where_the_setting_says_and_never_into_routed_experts(settings: Settings) -> None:
    from safetensors import safe_open

    def modules(targets: str, engine: str = "local") -> set[str]:
        night, serving = replace(settings.night, lora_targets=targets), replace(settings.serving, engine=engine)
        adapter = run([example(1)], replace(settings, night=night, serving=serving))
        with safe_open(adapter.path / "adapter_model.safetensors", "pt") as file:
            return {key.split(".layers.")[1].split(".", 1)[1].rsplit(".lora_", 1)[0] for key in file.keys()}  # noqa: SIM118

    attention, both = modules("attention"), modules("attention+mlp")
    assert {m.split(".")[0] for m in attention} == {"self_attn"}
    assert both > attention and {"mlp.gate_proj", "mlp.shared_experts.down_proj"} <= both
    assert not any(".experts" in m for m in both)
    assert attention - modules("attention", "vllm") == {"self_attn.kv_b_proj"}


def test_the_same_snapshot_settings_and_seed_give_the_same_adapter(settings: Settings) -> None:
    rows = [example(i) for i in range(12)]
    first = run(rows, settings)
    other = replace(settings, night=replace(settings.night, seed=1))
    assert run(rows, settings).id == first.id != run(rows, other).id


def test_activations_that_are_computed_again_teach_the_same_and_a_cpu_keeps_them(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def always(on: bool) -> dict[str, Any]:
        asked.append(on)
        return checkpointing(True)

    rows = [example(i) for i in range(6)]
    kept = run(rows, settings)
    monkeypatch.setattr(trainer, "checkpointing", always)
    again = run(rows, settings)
    assert asked == [False] and again.details["losses"] == pytest.approx(kept.details["losses"], rel=1e-4)


def test_recomputing_goes_by_the_name_that_transformers_has_for_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = trainer.SFTConfig(str(settings.home), use_cpu=True, bf16=False, **checkpointing(False))
    assert args.gradient_checkpointing is False  # trl's own default is True
    older = [field for field in fields(trainer.SFTConfig) if not field.name.startswith("activation_")]
    monkeypatch.setattr(trainer, "fields", lambda kind: older)
    name = "gradient_checkpointing"
    assert checkpointing(True) == {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def test_a_row_of_weight_zero_teaches_nothing_and_weights_are_relative(settings: Settings) -> None:
    rows = [example(i) for i in range(8)]
    plain = run(rows, settings).id
    assert run([*rows, example(9, "nonsense", weight=0.0)], settings).id == plain
    assert run([replace(row, weight=2.0) for row in rows], settings).id == plain
    assert run([replace(rows[0], weight=3.0), *rows[1:]], settings).id != plain


def test_answers_that_do_not_fit_are_counted(settings: Settings) -> None:
    adapter = run([*(example(i) for i in range(4)), example(5, "long " * 50)], settings)
    assert adapter.details["too_long"] == 1 and adapter.details["rows"] == 4


def test_nothing_that_fits_is_an_error(settings: Settings) -> None:
    with pytest.raises(TrainingError, match=r"max_tokens = 96"):
        run([example(1, "long " * 50)], settings)


@pytest.mark.parametrize(("rate", "reason"), [(0.0, "did not change"), (1e300, "not finite")])
def test_a_phase_that_teaches_nothing_fails_loudly(settings: Settings, rate: float, reason: str) -> None:
    with pytest.raises(TrainingError, match=reason):
        run([example(i) for i in range(4)], replace(settings, night=replace(settings.night, sft_lr=rate)))


def test_a_loss_that_is_not_finite_stops_the_night(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(logps: Any, batch: Any, totals: Any) -> Any:
        return logps.sum() * float("inf")

    monkeypatch.setattr(sft, "objective", broken)
    with pytest.raises(TrainingError, match="step 1: loss"):
        run([example(i) for i in range(4)], settings)


def test_accumulating_micro_batches_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    """Four steps of one passage each, accumulated, are one step of four."""
    from nightschool.evolve import trainer as t
    from nightschool.evolve.batches import collate
    from nightschool.evolve.lessons import lay_out

    def gradient(sizes: list[int]) -> torch.Tensor:
        pupil = t.student(settings)
        with torch.no_grad():
            for name, parameter in pupil.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        rows = tuple(example(i, f"it is {'really ' * i}{i}", 1.0 + i % 2) for i in range(4))
        lessons, _ = sft.lessons_of(rows, pupil.tokenizer, 96)
        passages = lay_out(lessons, 96, 8, merge=False)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]

        def batch(step: int) -> t.Batch:
            return collate(passages[starts[step] : starts[step] + sizes[step]], lessons, pupil.pad, pupil.merges)

        args = t._arguments(str(tmp_path), pupil, 1, 1e-30, seed=0)
        args.gradient_accumulation_steps, args.max_grad_norm = len(sizes), 0.0
        found: list[torch.Tensor] = []

        class Keep(t.TrainerCallback):  # type: ignore[misc]
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                found.append(torch.cat([p.grad.flatten() for p in pupil.model.parameters() if p.grad is not None]))

        trainer = t.NightTrainer(pupil, len(sizes), batch, sft.objective, args)
        trainer.add_callback(Keep())
        trainer.train()
        return found[0]

    assert torch.allclose(gradient([1, 1, 1, 1]), gradient([4]), atol=1e-6)
    assert torch.allclose(gradient([1, 3]), gradient([4]), atol=1e-6)


def test_loss_is_divided_by_the_tokens_there_are_and_no_more(settings: Settings, tmp_path: Path) -> None:
    from nightschool.evolve import trainer as t
    from nightschool.evolve.batches import collate, logps
    from nightschool.evolve.lessons import lay_out

    pupil = t.student(settings)
    lessons, _ = sft.lessons_of(tuple(example(i) for i in range(3)), pupil.tokenizer, 96)
    batch = collate(lay_out(lessons, 96, 8, merge=False), lessons, pupil.pad, pupil.merges)
    trainer = t.NightTrainer(
        pupil, 1, lambda _: batch, sft.objective, t._arguments(str(tmp_path), pupil, 1, 1e-30, seed=0)
    )
    said = sum(len(answer) for lesson in lessons for answer in lesson.answers)
    wanted = -(batch["weight"] * logps(pupil.model, batch)).sum().item() / said
    assert trainer.compute_loss(pupil.model, batch).item() == pytest.approx(wanted, rel=1e-6)


def test_few_rows_are_seen_more_often_and_many_as_it_is_set(settings: Settings) -> None:
    night = replace(settings.night, few_rows=40, replay_share=0.25)

    def night_of(rows: int) -> NightSettings:
        return suited(night, Snapshot(tuple(example(i) for i in range(rows)), (), (), ()))

    assert night_of(40) == night_of(400) == night
    assert night_of(20) == replace(night, sft_epochs=2**1.5)
    assert night_of(10) == replace(night, sft_epochs=8.0)
    assert night_of(1) == replace(night, sft_epochs=18.0)
    assert replay_rows(night, 10) == 5 and replay_rows(night, 400) == 100


def test_base_with_dropout_trains_as_it_serves(settings: Settings, toy_base: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(toy_base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    pupil = trainer.student(replace(settings, serving=replace(settings.serving, base=str(folder))))
    ids = torch.tensor([list(range(40))])
    with torch.no_grad():
        served, trained = (pupil.model.train(mode)(input_ids=ids).logits for mode in (False, True))
    assert torch.equal(served, trained)


@pytest.mark.parametrize(
    ("config", "merges"),
    [
        (LlamaConfig(), True),
        (MistralConfig(sliding_window=8), False),
        (Llama4TextConfig(attention_chunk_size=8), False),
        (Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2), False),
        (BambaConfig(attn_layer_indices=[1], num_hidden_layers=2), False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_passages_are_trees_where_every_layer_takes_their_mask(config: Any, merges: bool) -> None:
    config._attn_implementation = "sdpa"
    model: Any = SimpleNamespace(config=config)
    assert trainer.Student(model, None, "b2:base", "cpu").merges == merges


def test_adapter_that_cannot_be_saved_is_an_error_of_training(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(trainer, "save_file", full)
    monkeypatch.setattr(trainer, "adapter_weights", lambda _: {})
    with pytest.raises(TrainingError, match=r"cannot be saved in .*: No space left on device"):
        facts = {"snapshot_id": "b2:s", "phase": "sft", "parent_id": None, "details": {}}
        trainer.save(SimpleNamespace(model=None), tmp_path / "a", settings, **facts)
