"""A base is found, named by its content, and loaded with the numbers that serve."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from nightschool.errors import ServingError, SettingsError
from nightschool.serving import base, blocks
from nightschool.serving.checking import check
from nightschool.serving.pretrain.export import quantise
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 32, "vocab_size": 64}


def copy_base(source: str, folder: Path) -> Path:
    folder.mkdir()
    for path in Path(source).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def fp8_base(toy_base: str, tmp_path: Path) -> Path:
    """The toy base in the block-FP8 layout; its experts are 2-D tensors on disk."""
    folder = copy_base(toy_base, tmp_path / "fp8")
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if value.ndim == 2 and "_proj" in name:
            tensors[name], tensors[name + "_scale_inv"] = quantise(value)
        else:
            tensors[name] = value if "bias" in name else value.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    kept = {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.gate"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization | kept}))
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10, 60)[None]).logits.float()


# -- finding ---


NOWHERE = ["/tmp/nowhere/at/all", "~nobody-of-that-name/base", "long" * 100]


@pytest.mark.parametrize("spec", [*NOWHERE, "Qwen/Qwen3--0.6B", "foo/bar.git", "a/..", "./x", "a/" + "b" * 97])
def test_unknown_folder_is_refused_by_name(spec: str) -> None:
    with pytest.raises(ServingError, match=rf"base {spec}: no such folder"):
        base.locate(spec)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="has no config"):
        base.locate(str(tmp_path))


def test_hub_id_that_is_not_cached_names_the_reason_when_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ServingError, match=r"nobody/nothing: not in the local cache .*HF_HUB_OFFLINE is set"):
        base.locate("nobody/nothing")


def test_base_id_follows_the_content_and_not_the_name(toy_base: str, tmp_path: Path) -> None:
    copy = copy_base(toy_base, tmp_path / "copy")
    before = base.base_id(str(copy))
    assert before == base.base_id(toy_base)
    assert re.fullmatch("b2:[0-9a-f]{32}", before)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert base.base_id(str(copy)) != before


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "merges.txt", "tokenizer.model"])
def test_base_id_follows_whatever_a_base_answers_by(toy_base: str, tmp_path: Path, name: str) -> None:
    copy = copy_base(toy_base, tmp_path / "copy")
    before = base.base_id(str(copy))
    (copy / "trainer_state.json").write_text("{}")
    assert base.base_id(str(copy)) == before
    with (copy / name).open("a") as file:
        file.write(" ")
    assert base.base_id(str(copy)) != before


def test_base_id_of_a_hub_snapshot_is_its_commit(
    toy_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snapshots").mkdir()
    folder = copy_base(toy_base, tmp_path / "snapshots" / "c0ffee")
    monkeypatch.setattr(base, "_from_hub", lambda spec, weights: folder)
    assert base.base_id("some/model") == "hub:some/model@c0ffee"


def test_a_folder_of_ones_own_is_named_by_its_content_whatever_it_lies_in(toy_base: str, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    folder = copy_base(toy_base, tmp_path / "snapshots" / "mine")
    assert base.base_id(str(folder)) == base.base_id(toy_base)


def test_the_commit_that_the_cache_holds_stays_and_what_it_lacks_is_fetched(
    toy_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snapshots").mkdir()
    held = copy_base(toy_base, tmp_path / "snapshots" / "c0ffee")
    asked: list[tuple[str, str | None, bool]] = []
    offline: list[bool] = []

    def download(repo_id: str, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        asked.append((repo_id, revision, local_files_only))
        if offline and not local_files_only:
            raise OSError("no network")
        return str(held)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    base._from_hub.cache_clear()
    assert base.base_id("some/model") == base.base_id("some/model@c0ffee") == "hub:some/model@c0ffee"
    first = [("some/model", None, True), ("some/model", "c0ffee", False)]  # and not what is newest by now
    assert asked == [*first, ("some/model", "c0ffee", True), ("some/model", "c0ffee", False)]
    base._from_hub.cache_clear()
    offline.append(True)
    assert base.locate("some/model") == held
    base._from_hub.cache_clear()


def test_weights_of_a_hub_base_are_fetched_when_it_is_loaded_and_not_to_describe_it(
    toy_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = copy_base(toy_base, tmp_path / "c0ffee")
    weights = (held / "model.safetensors").read_bytes()
    (held / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 12345}, "weight_map": {"a": "model.safetensors"}}
    (held / base.INDEX).write_text(json.dumps(index))
    full: list[bool] = [True]

    def download(repo_id: str, revision: str | None, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if base.WEIGHTS in allow_patterns and not local_files_only:
            if full:
                raise OSError("No space left on device")
            (held / "model.safetensors").write_bytes(weights)
        return str(held)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    base._from_hub.cache_clear()
    assert base.load_config("some/model").model_type == "deepseek_v3" and base.load_tokenizer("some/model")
    assert base.base_id("some/model") == "hub:some/model@c0ffee" and base.disk_bytes("some/model") == 12345
    assert not (held / "model.safetensors").exists()
    with pytest.raises(ServingError, match=r"its weights are not in the local cache .* No space left"):
        base.load_base("some/model", dtype=torch.float32, device="cpu")
    full.clear()
    assert base.load_base("some/model", dtype=torch.float32, device="cpu")
    assert base.disk_bytes("some/model") == len(weights)
    base._from_hub.cache_clear()


class Hub:
    """A repository of these files and a cache of it. A `*` goes across folders, and a commit in the cache that lacks
    something of what is asked for is not found there."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache, self.newest, self.known = files, cache, "c0ffee", ""

    def __call__(
        self, repo_id: str, revision: str | None, allow_patterns: Sequence[str], local_files_only: bool = False
    ) -> str:
        commit = revision or (self.known if local_files_only else self.newest)
        self.known = self.known if local_files_only or revision else commit
        names = [str(path.relative_to(self.files)) for path in self.files.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=list(allow_patterns)):
            held = self.cache / commit / name
            if local_files_only and not held.exists():
                raise LocalEntryNotFoundError("not found or incomplete")
            held.parent.mkdir(parents=True, exist_ok=True)
            held.write_bytes((self.files / name).read_bytes())
        return str(self.cache / commit)


@pytest.fixture
def hub(toy_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub(copy_base(toy_base, tmp_path / "hub"), tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", found)
    base._from_hub.cache_clear()
    yield found
    base._from_hub.cache_clear()


@pytest.mark.parametrize("indexed", [False, True])
def test_of_a_hub_base_only_the_weights_that_are_loaded_are_fetched_and_counted(hub: Hub, indexed: bool) -> None:
    loaded, others = "model.safetensors", ["consolidated.safetensors", "original/model.safetensors"]
    weights = (hub.files / loaded).read_bytes()
    if indexed:
        loaded = "model-00001-of-00001.safetensors"
        (hub.files / "model.safetensors").rename(hub.files / loaded)
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(hub.files / loaded), loaded)}
        (hub.files / base.INDEX).write_text(json.dumps(index))
    (hub.files / "original").mkdir()
    for name in others:
        (hub.files / name).write_bytes(weights)
    assert base.load_base("some/model", dtype=torch.float32, device="cpu")
    fetched = [str(path.relative_to(hub.cache / "c0ffee")) for path in hub.cache.rglob("*.safetensors")]
    assert fetched == [loaded] and base.disk_bytes("some/model") == len(weights)
    assert base.has_weights(hub.files) and base.disk_bytes(str(hub.files)) == len(weights)


def test_the_commit_that_is_held_without_its_weights_gets_its_own(hub: Hub) -> None:
    before = base.base_id("some/model")
    hub.newest = "decaf"
    assert base.locate("some/model", weights=True).name == "c0ffee" and base.base_id("some/model") == before


def test_an_index_alone_is_no_base(toy_base: str, tmp_path: Path) -> None:
    folder = copy_base(toy_base, tmp_path / "half")
    (folder / "model.safetensors").unlink()
    (folder / base.INDEX).write_text('{"metadata": {"total_size": 12345}}')
    assert base.disk_bytes(str(folder)) == 0
    (folder / base.INDEX).write_text("{")
    with pytest.raises(ServingError, match="is damaged"):
        base.disk_bytes(str(folder))


def test_a_folder_of_the_hubs_own_cache_is_named_by_its_commit(toy_base: str, tmp_path: Path) -> None:
    (tmp_path / "models--some--model" / "snapshots").mkdir(parents=True)
    folder = copy_base(toy_base, tmp_path / "models--some--model" / "snapshots" / "c0ffee")
    assert base.base_id(str(folder)) == f"hub:{folder}@c0ffee"


def test_device_that_torch_cannot_use_is_named() -> None:
    with pytest.raises(SettingsError, match=r"serving\.device is 'gpu', which torch cannot use here"):
        base.choose_device("gpu")


@pytest.mark.parametrize("rename", [lambda name: name.replace("layers.1.", "left.out."), lambda name: f"other.{name}"])
def test_weights_that_lack_tensors_are_neither_served_nor_passed(
    toy_base: str, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    """transformers draws what is missing at random."""
    folder = copy_base(toy_base, tmp_path / "lacking")
    tensors = {rename(name): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    lacking = rf"base {folder}: its weights lack .*, .* and \d+ more; "
    with pytest.raises(ServingError, match=lacking):
        base.load_base(str(folder), dtype=torch.float32, device="cpu")
    (problem,) = check(str(folder), rank=4).problems
    assert re.match(lacking, problem)


def test_weights_of_other_shapes_are_told_by_their_heads(toy_base: str, tmp_path: Path) -> None:
    folder = copy_base(toy_base, tmp_path / "narrow")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    (problem,) = check(str(folder), rank=4).problems
    assert problem.startswith(f"base {folder}: cannot be loaded from")


@pytest.mark.parametrize("spec", ["seedling", "fp8_base"])
def test_heads_of_a_whole_base_tell_nothing_missing(spec: str, fp8_base: Path) -> None:
    base.require_tensors(str(fp8_base) if spec == "fp8_base" else spec)


def test_code_that_comes_with_a_base_is_neither_run_nor_asked_about(
    toy_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = copy_base(toy_base, tmp_path / "coded"), tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')")
    for name, classes in (
        ("config.json", {"AutoConfig": "code.X"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "code.X"]}),
    ):
        data = json.loads((folder / name).read_text()) | {"auto_map": classes, "tokenizer_class": "Unknown"}
        (folder / name).write_text(json.dumps(data | ({"model_type": "unknown"} if name == "config.json" else {})))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (base.load_config, base.load_tokenizer):
        with pytest.raises(ServingError, match="trust_remote_code"):
            load(str(folder))
    assert not ran.exists()


def test_pickled_weights_are_not_read(toy_base: str, tmp_path: Path) -> None:
    folder = copy_base(toy_base, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ServingError, match=r"cannot be loaded from .*model\.safetensors"):
        base.load_base(str(folder), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "auto"])
def test_a_cpu_is_one_whatever_number_it_is_given(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On it float32 is both faster and exact, and so what is taken where the device is "cpu"."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert base.choose_device(device) == "cpu"


def test_truncated_weights_are_a_clear_error(toy_base: str, tmp_path: Path) -> None:
    folder = copy_base(toy_base, tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ServingError, match="cannot be loaded from"):
        base.load_base(str(folder), dtype=torch.float32, device="cpu")


# -- loading ---


def test_fp8_base_has_no_quantised_layer_left_and_is_close_to_its_source(toy_base: str, fp8_base: Path) -> None:
    model = base.load_base(str(fp8_base), dtype=torch.float32, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert getattr(model.config, "quantization_config", None) is None
    source = AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32).eval()
    a, b = logits(model), logits(source)
    assert (a - b).norm() / b.norm() < 0.2


def test_fp8_base_in_float32_equals_a_reload_of_its_dequantised_weights(fp8_base: Path, tmp_path: Path) -> None:
    model = base.load_base(str(fp8_base), dtype=torch.float32, device="cpu")
    model.save_pretrained(tmp_path / "plain")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    assert torch.equal(logits(model), logits(reloaded))


def test_loading_draws_no_random_numbers(fp8_base: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    base.load_base(str(fp8_base), dtype=torch.float32, device="cpu")
    assert torch.equal(torch.rand(1), expected)


def test_mxfp4_base_is_loaded_with_the_numbers_that_its_blocks_stand_for(tmp_path: Path) -> None:
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = GptOssConfig(**SMALL, num_local_experts=2, head_dim=16)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    tensors, packed = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.experts.down_proj"
    experts = [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]
    for name in experts:  # (experts, in, out), on disk by blocks of 32 along `in`, two numbers a byte
        count, ins, outs = tensors.pop(name).shape
        tensors[name + "_blocks"] = torch.full((count, outs, ins // 32, 16), 0x2F, dtype=torch.uint8)  # -6 and 1
        tensors[name + "_scales"] = torch.full((count, outs, ins // 32), 125, dtype=torch.uint8)  # a quarter
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(described))
    model = base.load_base(str(tmp_path), dtype=torch.float32, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_parameter(packed)[0, :4, 0].tolist() == [-1.5, 0.25, -1.5, 0.25]
    config = base._dequantising(str(tmp_path))  # also where what computes in it is installed
    assert config.quantization_config["dequantize"]


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "new"])
def test_base_that_is_quantised_otherwise_is_refused_by_its_method(toy_base: str, tmp_path: Path, method: str) -> None:
    folder = copy_base(toy_base, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServingError, match=f"weights are quantised by {method}, .*; take"):
        base.load_base(str(folder), dtype=torch.float32, device="cpu")
    assert [p for p in check(str(folder), rank=4).problems if f"quantised by {method}" in p]


def test_base_that_the_device_has_no_room_for_is_refused(toy_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(ServingError, match=r"cannot be loaded from .*CUDA out of memory"):
        base.load_base(toy_base, dtype=torch.float32, device="cpu")


def test_damaged_base_is_refused_with_its_folder(toy_base: str, tmp_path: Path) -> None:
    copy = copy_base(toy_base, tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    with pytest.raises(ServingError, match="copy"):
        base.load_base(str(copy), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[]")]
)
def test_damaged_tokenizer_is_a_clear_error(toy_base: str, tmp_path: Path, name: str, text: str) -> None:
    copy = copy_base(toy_base, tmp_path / "copy")
    (copy / name).write_text(text)
    with pytest.raises(ServingError, match="copy: its tokenizer cannot be loaded: "):
        base.load_tokenizer(str(copy))


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_act": "swish9000"},
        {"quantization_config": "fp8"},
        {"model_type": "llama", "num_attention_heads": 0},
        {"model_type": "reformer"},
        {"model_type": "prophetnet"},
    ],
)
def test_odd_config_is_a_clear_error(toy_base: str, tmp_path: Path, odd: dict[str, object]) -> None:
    copy = copy_base(toy_base, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | odd
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServingError, match=r"copy: (its config|no causal|cannot be loaded)"):
        check(str(copy), rank=4)
    with pytest.raises(ServingError, match=r"copy: (its config|cannot be loaded)"):
        base.load_base(str(copy), dtype=torch.float32, device="cpu")


def test_base_without_a_chat_template_is_refused(toy_base: str, tmp_path: Path) -> None:
    copy = copy_base(toy_base, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ServingError, match="no chat template"):
        base.load_tokenizer(str(copy))


@pytest.mark.parametrize("shape", [(290, 256), (160, 256), (256, 130), (160, 130)])
def test_blocks_at_the_end_of_a_matrix_are_read_with_their_own_scale(shape: tuple[int, int]) -> None:
    """290 rows are three blocks of 128, which transformers refuses; 160 are two, which it reads as two of 80."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[128:] *= 40
    packed, scale = quantise(weight)
    with blocks.of_size((128, 128)):
        read = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.float32)
    assert read.shape == weight.shape
    assert ((read - weight).norm(dim=1) / weight.norm(dim=1)).max() < 0.05


def test_seedling_is_served_with_the_numbers_of_its_file() -> None:
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 160 rows
    tensors = load_file(base.SEEDLING / "model.safetensors")
    scale = tensors[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    served = base.load_base("seedling", dtype=torch.float32, device="cpu").state_dict()[name]
    assert torch.allclose(served, tensors[name].float() * scale[: len(served)], rtol=5e-3)


def test_quantised_block_is_within_a_sixteenth_of_its_weights_also_at_odd_sizes() -> None:
    weight = torch.randn(160, 300, generator=torch.Generator().manual_seed(0))
    packed, scale = quantise(weight)
    assert packed.shape == weight.shape and packed.dtype == torch.float8_e4m3fn and scale.shape == (2, 3)
    back = packed.float() * scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :300]
    assert ((back - weight).abs() <= weight.abs() / 16 + scale.max() * 2**-9).all()


# -- where LoRA goes ---


def targeted(config: object, setting: str) -> set[str]:
    pattern = base.lora_targets(config, setting)
    return {name for name in base.modules_of(config).linear if re.fullmatch(pattern, name)}


def leaves(names: set[str]) -> set[str]:
    return {name.rsplit(".", 1)[1] for name in names}


def test_attention_of_deepseek_is_its_latent_projections(toy_base: str) -> None:
    names = targeted(AutoConfig.from_pretrained(toy_base), "attention")
    assert leaves(names) == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    low_rank = DeepseekV3Config(**SMALL, n_routed_experts=8, q_lora_rank=8, kv_lora_rank=8, moe_intermediate_size=16)
    assert {"q_a_proj", "q_b_proj"} <= leaves(targeted(low_rank, "attention"))


def test_what_a_vllm_server_passes_by_is_not_trained_for_one(toy_base: str) -> None:
    config = AutoConfig.from_pretrained(toy_base)
    pattern = base.lora_targets(config, "attention+mlp", "vllm")
    left_out = {name for name in targeted(config, "attention+mlp") if not re.fullmatch(pattern, name)}
    assert leaves(left_out) == {"kv_b_proj"}


def test_mlp_of_deepseek_is_the_dense_and_the_shared_one_and_never_a_routed_expert(toy_base: str) -> None:
    names = targeted(AutoConfig.from_pretrained(toy_base), "attention+mlp")
    assert "model.layers.0.mlp.gate_proj" in names
    assert "model.layers.1.mlp.shared_experts.down_proj" in names
    pattern = base.lora_targets(AutoConfig.from_pretrained(toy_base), "attention+mlp")
    forbidden = ("mlp.experts.gate_up_proj", "mlp.experts.0.gate_proj", "mlp.gate", "mlp.experts")
    assert not [name for name in forbidden if re.fullmatch(pattern, f"model.layers.1.{name}")]
    assert not re.fullmatch(pattern, "lm_head")


PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
LATENT_SIZES = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("config", "attention", "mlp"),
    [
        (Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, head_dim=16), PROJECTIONS, set()),
        (MixtralConfig(**SMALL), PROJECTIONS, set()),
        (OlmoeConfig(**SMALL, num_experts=4), PROJECTIONS, set()),
        (GptOssConfig(**SMALL, num_local_experts=4, head_dim=16), PROJECTIONS, set()),
        (DeepseekV2Config(**SMALL, **LATENT_SIZES, n_routed_experts=4, first_k_dense_replace=1), LATENT, MLP),
        (LlamaConfig(**SMALL), PROJECTIONS, MLP),
        (Qwen3Config(**SMALL, head_dim=16), PROJECTIONS, MLP),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_each_family_gets_its_attention_and_the_mlps_that_every_token_meets(
    config: PreTrainedConfig, attention: set[str], mlp: set[str]
) -> None:
    assert leaves(targeted(config, "attention")) == attention
    assert leaves(targeted(config, "attention+mlp")) == attention | mlp
