"""Our three losses against trl's own trainers on the same model and rows, and against the meaning of a weight."""

from __future__ import annotations

import pytest
import torch
from nightschool.evolve.loss import (
    answer_logps,
    unit_mean,
    weighted_bco_loss,
    weighted_dpo_loss,
    weighted_sft_loss,
)
from nightschool.evolve.trainer import checkpointing


def numbers(count: int, seed: int) -> torch.Tensor:
    made = -20 * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


def sft(logps: torch.Tensor, weights: list[float]) -> torch.Tensor:
    return weighted_sft_loss(logps, torch.tensor(unit_mean(weights)).double(), sum(w > 0 for w in weights))


def dpo(logps: torch.Tensor, weights: list[float]) -> torch.Tensor:
    other, reference = torch.arange(len(logps)) * -3.0, torch.arange(len(logps)) * -1.5 - 2
    scaled = torch.tensor(unit_mean(weights)).double()
    return weighted_dpo_loss(logps, other, reference, reference * 0.9, scaled, 0.1, sum(w > 0 for w in weights))


def bco(logps: torch.Tensor, weights: list[float]) -> torch.Tensor:
    liked = torch.arange(len(logps)) % 2 == 0
    scaled = torch.tensor(unit_mean(weights)).double()
    return weighted_bco_loss(logps, logps.detach() - 3, liked, scaled, 0.2, sum(w > 0 for w in weights))


@pytest.mark.parametrize("loss", [sft, dpo, bco])
def test_a_row_of_weight_zero_equals_its_absence(loss) -> None:  # type: ignore[no-untyped-def]
    logps = numbers(4, 1)
    assert loss(logps, [1, 1, 1, 0]).item() == pytest.approx(loss(logps[:3], [1, 1, 1]).item())
    (gradient,) = torch.autograd.grad(loss(logps, [1, 1, 1, 0]), logps)
    assert gradient[3] == 0 and gradient[:3].abs().min() > 0


@pytest.mark.parametrize("loss", [weighted_sft_loss, weighted_dpo_loss, weighted_bco_loss])
def test_a_row_of_weight_two_equals_the_row_twice(loss) -> None:  # type: ignore[no-untyped-def]
    def call(rows: list[int], weights: list[float]) -> torch.Tensor:
        a, b, c, d = (numbers(3, seed)[rows] for seed in range(4))
        w, total = torch.tensor(weights).double(), sum(weights)
        if loss is weighted_sft_loss:
            return weighted_sft_loss(a, w, total)
        if loss is weighted_dpo_loss:
            return weighted_dpo_loss(a, b, c, d, w, 0.1, total)
        return weighted_bco_loss(a, b, torch.tensor([True, False, True])[rows], w, 0.2, total)

    assert call([0, 1, 2], [1, 2, 1]).item() == pytest.approx(call([0, 1, 1, 2], [1, 1, 1, 1]).item(), rel=1e-12)


def test_accumulated_micro_batches_equal_one_batch() -> None:
    logps, weights = numbers(6, 3), torch.tensor([0.5, 2, 1, 1, 0.5, 1]).double()
    whole = weighted_sft_loss(logps, weights, 6)
    parts = [weighted_sft_loss(logps[i : i + 1], weights[i : i + 1], 6) for i in range(6)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


def test_a_liked_answer_is_pushed_up_and_a_disliked_one_down() -> None:
    logps = numbers(2, 5)
    loss = weighted_bco_loss(logps, logps.detach(), torch.tensor([True, False]), torch.ones(2), 0.2, 2)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert gradient[0] < 0 < gradient[1]


def test_tokens_are_summed_into_the_answer_that_owns_them() -> None:
    sums = answer_logps(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 2]), 3)
    assert sums.tolist() == [-1, 0, -6]


# -- parity with trl, through its real trainers ---

PROMPTS = ["say one", "and now something longer, please", "hm"]
CHOSEN = ["one", "a longer answer", "yes"]
REJECTED = ["two, or three", "no", "maybe so"]


def config(kind: type, folder: object, **more: object) -> object:
    common = {"output_dir": str(folder), "use_cpu": True, "bf16": False, **checkpointing(False)}
    return kind(**common, report_to="none", router_aux_loss_coef=0.0, per_device_train_batch_size=3, **more)


def models(toy_base: str) -> tuple[object, object, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, reference = (AutoModelForCausalLM.from_pretrained(toy_base, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return policy, reference, AutoTokenizer.from_pretrained(toy_base)


def ours(model: object, tokenizer: object, answers: list[str]) -> tuple[torch.Tensor, int]:
    """(A,) log-probabilities of `answers` to PROMPTS by our encoding, passages and forward pass; and their tokens."""
    from nightschool.evolve.batches import collate, logps
    from nightschool.evolve.lessons import Lesson, encode, lay_out

    encoded = [
        encode(tokenizer, [{"role": "user", "content": prompt}], [answer], 200)
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    lessons = [Lesson(*ids, "imitate", 1.0) for ids in encoded if ids]
    batch = collate(lay_out(lessons, 512, 8, merge=True), lessons, tokenizer.pad_token_id, tree=True)  # type: ignore[attr-defined]
    order = [lesson for lesson, _ in batch["answer"].tolist()]
    return logps(model, batch)[torch.tensor(order).argsort()], int(batch["totals"][0])  # type: ignore[arg-type]


def rows(**columns: list[str]) -> object:
    from datasets import Dataset

    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    table = {"prompt": [message("user", p) for p in PROMPTS]}
    return Dataset.from_dict(table | {k: [message("assistant", v) for v in vs] for k, vs in columns.items()})


def trl_loss(trainer: object) -> float:
    trainer.model.train()  # type: ignore[attr-defined]
    (batch,) = list(trainer.get_train_dataloader())  # type: ignore[attr-defined]
    return trainer.compute_loss(trainer.model, batch).item()  # type: ignore[attr-defined,no-any-return]


def test_with_all_weights_one_sft_equals_trl(toy_base: str, tmp_path: object) -> None:
    from trl import SFTConfig, SFTTrainer

    policy, _, tokenizer = models(toy_base)
    args = config(SFTConfig, tmp_path, completion_only_loss=True, max_length=None)
    trainer = SFTTrainer(policy, args, train_dataset=rows(completion=CHOSEN), processing_class=tokenizer)
    logps, tokens = ours(policy, tokenizer, CHOSEN)
    assert weighted_sft_loss(logps, torch.ones(3), tokens).item() == pytest.approx(trl_loss(trainer), rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "bco_pair"])
def test_with_all_weights_one_preference_losses_equal_trl(toy_base: str, tmp_path: object, kind: str) -> None:
    from trl import DPOConfig, DPOTrainer

    policy, reference, tokenizer = models(toy_base)
    args = config(DPOConfig, tmp_path, beta=0.2, loss_type=[kind], max_length=None)
    data = rows(chosen=CHOSEN, rejected=REJECTED)
    trainer = DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer)
    chosen, rejected = (ours(policy, tokenizer, a)[0] for a in (CHOSEN, REJECTED))
    ref_chosen, ref_rejected = (ours(reference, tokenizer, a)[0].detach() for a in (CHOSEN, REJECTED))
    if kind == "sigmoid":
        loss = weighted_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, torch.ones(3), 0.2, 3)
    else:
        both, both_ref = torch.cat([chosen, rejected]), torch.cat([ref_chosen, ref_rejected])
        loss = weighted_bco_loss(both, both_ref, torch.arange(6) < 3, torch.ones(6), 0.2, 3)
    assert loss.item() == pytest.approx(trl_loss(trainer), rel=1e-5)
    assert abs((chosen - ref_chosen).mean().item()) > 0.01  # else every preference loss is log 2
