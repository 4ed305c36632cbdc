"""What a base is and takes, and the command that serves it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from nightschool.errors import ServingError, SettingsError
from nightschool.serving.base import load_base, load_config
from nightschool.serving.checking import check
from nightschool.serving.launch import vllm_command
from nightschool.settings import Settings


def test_shipped_base_is_fp8_and_needs_what_its_weights_need() -> None:
    report = check("seedling", rank=16)
    assert (report.family, report.fp8, report.problems) == ("deepseek_v3", "e4m3, blocks of 128×128", ())
    assert report.active_parameters < report.parameters
    assert report.serving_gib["vllm"] < report.serving_gib["local, cuda"] < report.serving_gib["local, cpu"]
    assert report.training_gib["cuda"] > report.serving_gib["local, cuda"]
    assert report.training_gib["cpu"] > report.serving_gib["local, cpu"]
    assert set(report.lora_modules["attention"]) < set(report.lora_modules["attention+mlp"])


def test_loading_takes_what_is_held_on_the_way(toy_base: str) -> None:
    for base, on_cpu in (("seedling", 6), (toy_base, 4)):  # FP8 is loaded in bfloat16, then made float32
        report = check(base, rank=4)
        wanted = {"cpu": on_cpu * report.parameters / (1 << 30), "cuda": 2 * report.parameters / (1 << 30)}
        assert report.loading_gib == pytest.approx(wanted)


def test_base_with_windows_is_told_what_it_does_not_get_here(toy_base: str, tmp_path: Path) -> None:
    from transformers import GptOssConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "sliding_window": 32}
    GptOssConfig(**sizes, **heads).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((Path(toy_base) / "tokenizer.json").read_bytes())
    (note,) = check(str(tmp_path), rank=4).notes
    assert "windows" in note and "do not join a running batch" in note and "CUDA graphs" in note
    assert check(toy_base, rank=4).notes == check("seedling", rank=4).notes == ()


def test_family_with_a_cache_of_its_own_is_told_of_too(toy_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(**_: object) -> None:
        raise KeyError("heavily_compressed_attention")

    monkeypatch.setattr("transformers.DynamicCache", unknown)
    assert check(toy_base, rank=4).notes


def test_latents_take_less_room_than_keys_and_values_of_all_heads(toy_base: str) -> None:
    report = check(toy_base, rank=4)
    assert report.cache_kib_a_token == 2 * 2 * (32 + 8) / 1024 and report.fp8 == ""


def test_base_without_weights_or_chat_template_has_problems(toy_base: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(toy_base) / name).read_bytes())
    problems = check(str(tmp_path), rank=4).problems
    assert any("no *.safetensors" in p for p in problems) and any("no chat template" in p for p in problems)


def test_base_with_a_file_that_was_cut_or_an_odd_config_is_told(toy_base: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(toy_base, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert any("model.safetensors is damaged" in problem for problem in check(str(base), rank=4).problems)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": "x"}))
    for load in (load_config, partial(load_base, dtype=torch.float32)):
        with pytest.raises(ServingError, match=r"its config\.json cannot be used: .*hidden_size"):
            load(str(base))


def test_served_command_names_the_base_the_address_and_the_modules(settings: Settings) -> None:
    serving = replace(settings.serving, url="http://127.0.0.1:9000", vllm_command="/opt/vllm")
    night = replace(settings.night, lora_rank=24, lora_targets="attention")
    command = vllm_command(replace(settings, serving=serving, night=night), ["--tensor-parallel-size", "2"])
    text = " ".join(command)
    assert text.startswith("/opt/vllm serve ") and text.endswith(" --tensor-parallel-size 2")
    assert "--host 127.0.0.1 --port 9000" in text and "--max-lora-rank 32" in text
    assert "--lora-target-modules kv_a_proj_with_mqa o_proj q_proj" in text  # kv_b_proj is passed by


def test_server_has_room_for_what_was_trained_by_other_settings(settings: Settings) -> None:
    night = replace(settings.night, lora_rank=8, lora_targets="attention")
    text = " ".join(vllm_command(replace(settings, night=night), (), [(32, "attention+mlp")]))
    assert "--max-lora-rank 32" in text and "down_proj" in text and text.count("o_proj") == 1


def test_server_adds_nothing_of_the_checkpoints_own_to_how_answers_are_drawn(settings: Settings) -> None:
    assert "--generation-config vllm" in " ".join(vllm_command(settings))


@pytest.mark.parametrize("url", ["http://127.0.0.1", "https://127.0.0.1:8443", "http://127.0.0.1:99999"])
def test_address_at_which_no_server_of_ours_can_listen_is_an_error(settings: Settings, url: str) -> None:
    with pytest.raises(SettingsError, match="cannot listen; give http://HOST:PORT"):
        vllm_command(replace(settings, serving=replace(settings.serving, url=url)))


def test_rank_that_no_server_takes_is_an_error(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="lora_rank is 1024"):
        vllm_command(replace(settings, night=replace(settings.night, lora_rank=1024)))
