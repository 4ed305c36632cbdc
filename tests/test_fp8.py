"""Products in FP8: the reference against full precision, the engine on it, and what torch's kernels ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nightschool.content import Message
from nightschool.errors import ServingError, SettingsError
from nightschool.serving import fp8, parity
from nightschool.serving.base import load_base, lora_targets
from nightschool.serving.engine import Sampling
from nightschool.serving.local import LocalEngine
from nightschool.settings import ServingSettings
from torch import Tensor, nn

# e4m3 keeps 3 bits behind the point: a weight and an input are each off by at most 1/16, by 1/40 in the mean square
PRODUCT = 0.05  # of the norm of what full precision gives
MOVED = 0.25  # nats a token of one short answer of so small a base; .151 was seen
LOGITS = 0.08  # the same after all layers of the seedling; .040 was seen
KL = 0.03  # nats a token; .009 was seen
PROMPTS: list[list[Message]] = [
    [{"role": "user", "content": "Hello, how was your day?"}],
    [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Who won?"},
    ],
]


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm().detach() / wanted.float().norm().detach())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_rounding_keeps_each_row_within_a_sixteenth_whatever_its_size() -> None:
    values = torch.randn(6, 64) * torch.tensor([1e-4, 1e-2, 1.0, 10.0, 1e4, 0.0])[:, None]
    values[2, 0] = 1e3  # an outlier takes the rest of its own row down with it, and no other
    kept = fp8.dequantised(*fp8.rounded(values))
    largest = values.abs().amax(-1, keepdim=True)
    assert ((kept - values).abs() <= values.abs() / 16 + largest / fp8.LARGEST / 512 * 1.01).all()
    assert kept[5].eq(0).all() and kept[4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layer_in_fp8_agrees_with_full_precision(dtype: torch.dtype) -> None:
    linear, inputs = nn.Linear(64, 48, dtype=dtype), torch.randn(2, 5, 64, dtype=dtype)
    made = fp8.RoundedLinear(linear, "cpu")(inputs)
    assert made.shape == (2, 5, 48) and made.dtype == dtype
    assert 0 < away(made, linear(inputs)) < PRODUCT


def test_grouped_product_takes_each_row_by_its_own_weight_and_skips_empty_groups() -> None:
    inputs, weight = torch.randn(7, 64), torch.randn(4, 32, 64)
    ends = torch.tensor([3, 3, 7, 7], dtype=torch.int32)
    made = fp8.grouped_product(inputs, *fp8.rounded(weight), ends)
    wanted = torch.cat([inputs[:3] @ weight[0].T, inputs[3:] @ weight[2].T])
    assert 0 < away(made, wanted) < PRODUCT


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_in_fp8_agrees_with_the_dequantised_one_within_the_stated_tolerance(dtype: torch.dtype) -> None:
    model, ids = load_base("seedling", dtype=dtype, device="cpu"), torch.randint(0, 4096, (2, 48))
    wanted = logits_of(model, ids)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model = fp8.convert(model, lora_targets(model.config, "attention+mlp"), "cpu")
    found = logits_of(model, ids)
    assert 0 < away(found, wanted) < LOGITS
    ours, theirs = found.float().log_softmax(-1), wanted.float().log_softmax(-1)
    assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) < KL
    held = [*model.parameters(), *model.buffers()]
    assert sum(t.numel() * t.element_size() for t in held) < size * (0.4 if dtype == torch.float32 else 0.7)


def test_experts_in_fp8_give_what_the_same_rounded_numbers_give_one_by_one() -> None:
    model = load_base("seedling", dtype=torch.float32, device="cpu")
    experts = model.model.layers[1].mlp.experts
    hidden, index, weights = torch.randn(5, 256), torch.randint(0, 8, (5, 2)), torch.rand(5, 2)
    fp8.convert(model, "nothing", "cpu")
    wanted = torch.zeros(5, 256)
    for row, (chosen, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            up = fp8.product(hidden[row : row + 1], experts.gate_up_proj[expert], experts.gate_up_proj_scale[expert])
            down = experts.down_proj[expert], experts.down_proj_scale[expert]
            wanted[row] += share * fp8.product(experts._apply_gate(up), *down)[0]
    assert away(experts(hidden, index, weights), wanted) < 1e-5


def test_sizes_that_the_kernels_refuse_stay_as_they_are_or_are_refused(toy_base: str) -> None:
    model = load_base(toy_base, dtype=torch.float32, device="cpu")
    attention = model.model.layers[0].self_attn
    assert attention.kv_a_proj_with_mqa.weight.shape[0] % 16  # the one that does not fit
    fp8.convert(model, lora_targets(model.config, "attention+mlp"), "cpu")
    assert isinstance(attention.o_proj, fp8.RoundedLinear) and type(attention.kv_a_proj_with_mqa) is nn.Linear
    odd = load_base(toy_base, dtype=torch.float32, device="cpu")
    experts = odd.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj[:, :, :20].clone())
    with pytest.raises(ServingError, match=r"layers.1.mlp.experts of a deepseek_v3 .* not multiples of 16.*to full"):
        fp8.convert(odd, "nothing", "cpu")


def test_fused_functions_compute_the_same(toy_base: str) -> None:
    """By the tracer alone: the compiler of the machine is not needed to see that nothing of it is lost."""
    model, ids = load_base(toy_base, dtype=torch.float32, device="cpu"), torch.randint(0, 256, (1, 8))
    model = fp8.convert(model, lora_targets(model.config, "attention+mlp"), "cpu")
    wanted = logits_of(model, ids)
    fp8.fuse(model, "eager")
    assert model.config._experts_implementation == fp8.FUSED_EXPERTS
    assert away(logits_of(model, ids), wanted) < 1e-5


def test_torch_accepts_the_calls_of_its_kernels() -> None:
    """On the meta device nothing is computed, but types, strides and scales are checked as on a card."""
    inputs = torch.empty(24, 64, dtype=torch.bfloat16, device="meta")
    weight, scale = torch.empty(4, 32, 64, dtype=fp8.FP8, device="meta"), torch.empty(4, 32, device="meta")
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    made = fp8.grouped_product(inputs, weight, scale, ends)
    assert made.shape == (24, 32) and made.dtype == torch.bfloat16
    made = fp8.product(inputs, weight[0], scale[0])
    assert made.shape == (24, 32) and made.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"scale|contraction"):
        fp8.grouped_product(inputs, weight, scale[:, :16], ends)


# -- the engine on it ---


@pytest.fixture(scope="module")
def engines(seedling_adapter: Path) -> list[LocalEngine]:
    """In full and in FP8, with an adapter."""
    made = [LocalEngine(ServingSettings(device="cpu", threads=1, weights=weights)) for weights in ("full", "fp8")]
    for engine in made:
        engine.load("b2:one", seedling_adapter)
    return made


def test_engine_in_fp8_answers_and_scores_as_the_full_one_within_tolerance_with_an_adapter_too(
    engines: list[LocalEngine],
) -> None:
    full, ours = engines
    answers = [
        "It was good, thank you. I went to see a movie with my sister.",
        "I do not know, but I can look it up for you.",
    ]
    for adapter in (None, "b2:one"):
        scores = [e.score(PROMPTS, answers, adapter=adapter) for e in (full, ours)]
        for wanted, found in zip(*scores, strict=True):
            assert found != wanted
            assert found.logprob / found.tokens == pytest.approx(wanted.logprob / wanted.tokens, abs=MOVED)
    assert all(ours.generate(PROMPTS, adapter="b2:one", sampling=Sampling(8)))
    moved = full.score(PROMPTS, answers)[0].logprob - full.score(PROMPTS, answers, adapter="b2:one")[0].logprob
    assert abs(moved) > 1  # so that the tolerance could not hide an adapter that is not applied


def test_adapter_passes_its_check_in_fp8_where_its_effect_is_not_lost(engines: list[LocalEngine]) -> None:
    """Nats per token at the default tolerance: the shortest answer alone is moved by more than that."""
    (full, ours), tolerance = engines, ServingSettings().parity_tolerance
    prompts, answers = zip(*parity.TALKS, strict=True)
    scores = {name or "base": full.score(prompts, answers, adapter=name) for name in (None, "b2:one")}
    found = ours.score(prompts, answers)
    assert max(abs(f.logprob - w.logprob) / w.tokens for f, w in zip(found, scores["base"], strict=True)) > tolerance
    recorded = {"base": [s.logprob for s in scores["base"]], "adapter": [s.logprob for s in scores["b2:one"]]}
    parity.check(ours, "b2:one", recorded, tolerance)
    for part, reason in (("adapter", "recorded of its effect"), ("base", "the engine's base is")):
        with pytest.raises(ServingError, match=reason):
            parity.check(ours, "b2:one", {**recorded, part: [value - 3.0 for value in recorded[part]]}, tolerance)


@pytest.fixture(scope="module")
def seedling_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nightschool.serving.lora import as_named
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    model = load_base("seedling", dtype=torch.float32, device="cpu")
    torch.manual_seed(1)
    targets = lora_targets(model.config, "attention+mlp")
    with as_named(model):
        lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    lora.save_pretrained(folder)
    return folder


def test_on_a_cpu_weights_are_dequantised_unless_asked_otherwise_and_unknown_values_are_refused() -> None:
    assert not fp8.supported("cpu")
    engine = LocalEngine(ServingSettings(device="cpu", threads=1))
    assert not any(isinstance(module, fp8.RoundedLinear) for module in engine._modules.values())
    with pytest.raises(SettingsError, match=r"serving.weights is 'half'; it is one of auto, fp8, full"):
        LocalEngine(ServingSettings(device="cpu", weights="half"))


@pytest.mark.parametrize(("capability", "has"), [((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_fp8_products_are_for_the_one_generation_that_torch_has_kernels_for(
    capability: tuple[int, int], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fp8.supported("cuda") == fp8.supported("cuda:0") == has


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_card_multiplies_as_the_reference_does() -> None:
    if not fp8.supported("cuda"):
        pytest.skip("this card is not of Hopper's generation: torch has no scaled grouped product by rows for it")
    inputs, weight = torch.randn(40, 256).bfloat16(), torch.randn(8, 128, 256)
    values, scale = fp8.rounded(weight)
    ends = torch.tensor([0, 5, 5, 20, 21, 40, 40, 40], dtype=torch.int32)
    wanted = fp8.grouped_product(inputs, values, scale, ends)
    found = fp8.grouped_product(inputs.cuda(), values.cuda(), scale.cuda(), ends.cuda())
    assert away(found.cpu(), wanted) < 0.01  # bfloat16 sums, and Hopper's short accumulator
    wanted = fp8.product(inputs, values[0], scale[0])
    assert away(fp8.product(inputs.cuda(), values[0].cuda(), scale[0].cuda()).cpu(), wanted) < 0.01
    one = load_base("seedling", dtype=torch.bfloat16, device="cpu")
    ids = torch.randint(0, 4096, (2, 48))
    one = fp8.convert(one, lora_targets(one.config, "attention+mlp"), "cpu")
    reference = logits_of(one, ids)
    assert away(logits_of(one.to("cuda"), ids.cuda()).cpu(), reference) < LOGITS
