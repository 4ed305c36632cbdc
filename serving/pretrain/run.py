"""The run: warm-up, a stable rate, linear decay; resumable at any checkpoint.

What a step does follows from (seed, step) and the share of the budget that is spent. The budget is minutes of wall
clock, or steps: then the run repeats exactly on one machine. Checkpoints hold safetensors and one JSON file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base import load_base
from . import corpus
from .export import WEIGHTS, origin
from .model import Balancer, TiedCrossEntropy, apart, build_model
from .muon import Muon, split_parameters
from .tokens import Batches, Weights

SHOWN_EVERY = 20
LAST_SHARE = 0.1  # of the budget, for the last stage
Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    seed: int = 7
    minutes: float = 70.0
    steps: int = 0  # 0: the minutes decide
    tokens: int = 4096  # per step
    real: float = 0.3  # share of tokens that are real dialogue
    float32: bool = False  # products in float32: some CPUs multiply bfloat16 no faster, or not in hardware
    workers: int = 2  # parts of a batch that are computed side by side
    # rates at their peak, and their course
    peak: float = 1.0  # what all of them are multiplied by
    warm_up_steps: int = 100
    decay_share: float = 0.28  # of the budget, at the end
    muon_lr: float = 0.01
    attention_lr: float = 0.006
    decay: float = 0.1  # of Muon's matrices, times the learning rate
    adam_lr: float = 1e-3
    router_lr: float = 1e-3
    balance: float = 3e-3  # how far an expert's bias moves in a step
    # of the tokens in written conversations, against 1 in real dialogue
    answer_weight: float = 2.5
    context_weight: float = 0.25
    checkpoint_minutes: float = 5.0

    @property
    def weights(self) -> Weights:
        return Weights(self.answer_weight, self.context_weight)

    @property
    def kind(self) -> torch.dtype:
        return torch.float32 if self.float32 else torch.bfloat16


class Trainer:
    def __init__(self, plan: Plan, batches: Batches, folder: Path, report: Report = print, device: str = "cpu") -> None:
        self.plan, self.batches, self.folder, self.report = plan, batches, folder, report
        self.device = torch.device(device)
        self.model = build_model(plan.seed).to(self.device)
        hidden, looking, rest, routers = split_parameters(list(self.model.named_parameters()))
        self.muon, self.attention = Muon(hidden, kind=plan.kind), Muon(looking, kind=plan.kind)
        groups = [{"params": rest, "peak": plan.adam_lr}, {"params": routers, "peak": plan.router_lr}]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.balancer = Balancer(self.model, plan.balance)
        # One thread a part of the batch: two threads within every operation wait for each other on a busy machine.
        self.parts = plan.workers if self.device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.parts, initializer=partial(torch.set_num_threads, 1))
        self.done, self.tokens, self.elapsed_s = 0, 0, 0.0
        self.before: dict[str, Any] = {}  # the state of the run that made what this one began with

    def progress(self) -> float:
        """The share of the budget that is spent."""
        if self.plan.steps:
            return self.done / self.plan.steps
        return self.elapsed_s / (60 * self.plan.minutes)

    def stage(self) -> int:
        """Of `corpus.STAGES`; what goes on from another run is in the last one."""
        if self.before:
            return len(corpus.STAGES) - 1
        return sum(self.progress() >= 1 - share for share in (self.plan.decay_share, LAST_SHARE))

    def rate(self) -> float:
        """The factor on every learning rate."""
        left = max(0.0, 1 - self.progress())
        course = min(1.0, (self.done + 1) / self.plan.warm_up_steps, max(0.02, left / self.plan.decay_share))
        return self.plan.peak * course

    def gradients(
        self, inputs: Tensor, targets: Tensor, shares: Tensor, talks: Tensor
    ) -> tuple[float, tuple[Tensor, ...]]:
        mask, positions = (each.to(self.device) for each in apart(talks))
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=not self.plan.float32, cache_enabled=False
        ):  # the cache is shared by all threads
            hidden = self.model.model(
                input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        flat = hidden.float().view(-1, hidden.shape[-1])
        embedding = self.model.get_input_embeddings().weight
        loss = TiedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            flat, embedding, targets.reshape(-1), shares.reshape(-1), self.plan.kind
        )
        return float(loss.detach()), torch.autograd.grad(loss, list(self.model.parameters()))

    def step(self) -> tuple[float, float]:
        """One step; returns its loss and the worst expert load."""
        batch = self.batches.at(self.done, self.stage())
        inputs, targets, weights = (block.to(self.device) for block in batch[:3])
        shares = weights / weights.sum()
        parts = zip(*(block.chunk(self.parts) for block in (inputs, targets, shares, batch.talks)), strict=True)
        results = [job.result() for job in [self.pool.submit(self.gradients, *part) for part in parts]]
        for p, *grads in zip(self.model.parameters(), *(grads for _, grads in results), strict=True):
            p.grad = torch.stack(grads).sum(0) if len(grads) > 1 else grads[0]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.rate()
        self._update(rate)
        self.done += 1
        self.tokens += inputs.numel()
        # as the weights come to rest, so do the biases: they settle on the mean of many steps
        return sum(loss for loss, _ in results), self.balancer.step(min(1.0, 10 * rate))

    def _update(self, rate: float) -> None:
        self.muon.step(self.plan.muon_lr * rate, self.plan.decay)
        self.attention.step(self.plan.attention_lr * rate, self.plan.decay)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * rate
        self.adam.step()
        self.model.zero_grad(set_to_none=True)

    def run(self) -> None:
        started, before = time.monotonic(), self.elapsed_s
        saved = shown = started
        recent: list[tuple[float, float]] = []
        tokens = self.tokens
        while self.progress() < 1:
            recent.append(self.step())
            now = time.monotonic()
            self.elapsed_s = before + now - started
            if len(recent) == SHOWN_EVERY:
                self._show(recent, (self.tokens - tokens) / (now - shown))
                recent, shown, tokens = [], now, self.tokens
            if now - saved > 60 * self.plan.checkpoint_minutes:
                self.save()
                saved = now
        self.save()

    def _show(self, recent: list[tuple[float, float]], speed: float) -> None:
        loss, load = (sum(values) / len(recent) for values in zip(*recent, strict=True))
        self.report(
            f"step {self.done} tokens {self.tokens / 1e6:.2f}M loss {loss:.3f} tokens/s {speed:.0f} "
            f"load max/mean {load:.2f} rate {self.rate():.2f} minutes {self.elapsed_s / 60:.1f}"
        )

    # -- checkpoints ---

    def _momenta(self) -> list[tuple[str, Tensor]]:
        return [*self.muon.buffers.items(), *self.attention.buffers.items()]

    def _adam_parameters(self) -> list[Tensor]:
        return [p for group in self.adam.param_groups for p in group["params"]]

    def save(self) -> None:
        """The weights are put in place last and say which moments are theirs, so a stop in between loses one save."""
        self.folder.mkdir(parents=True, exist_ok=True)
        moments = {f"muon.{name}": buffer for name, buffer in self._momenta()}
        for i, p in enumerate(self._adam_parameters()):
            moments |= {f"adam.{i}.{key}": value for key, value in self.adam.state[p].items()}
        weights = {k: v.contiguous() for k, v in self.model.state_dict().items() if k != "lm_head.weight"}
        made = {"step": self.done, "tokens": self.tokens, "elapsed_s": self.elapsed_s, "plan": asdict(self.plan)}
        made |= {"device": str(self.device), "before": self.before}
        state = json.dumps(made)
        kept = self.folder / f"moments-{self.done}.safetensors"
        save_file(moments, kept)
        save_file(weights, self.folder / "model.tmp", metadata={"state": state})
        (self.folder / "model.tmp").replace(self.folder / WEIGHTS)
        (self.folder / "state.json").write_text(state, encoding="utf-8")  # for people and for the card
        for old in set(self.folder.glob("moments-*.safetensors")) - {kept}:
            old.unlink()

    def begin_from(self, folder: Path) -> None:
        """Take the weights of an exported model, and of the optimisers nothing."""
        self.model.load_state_dict(load_base(str(folder), dtype=torch.float32, device="cpu").state_dict())
        self.before = json.loads(origin(folder))

    def load(self) -> None:
        with safe_open(self.folder / WEIGHTS, "pt") as weights:
            metadata = weights.metadata() or {}
        if "state" not in metadata:
            raise ValueError(f"{self.folder / WEIGHTS} is no checkpoint of this version: it holds no state; start anew")
        state = json.loads(metadata["state"])
        self.done, self.tokens, self.elapsed_s = state["step"], state["tokens"], state["elapsed_s"]
        self.before = state.get("before", {})
        if changed := [name for name, value in asdict(self.plan).items() if state["plan"].get(name) != value]:
            self.report(f"goes on with another plan than it began with: {', '.join(changed)}")
        self.model.load_state_dict(load_file(self.folder / WEIGHTS), strict=False)
        moments = load_file(self.folder / f"moments-{self.done}.safetensors", device=str(self.device))
        for name, buffer in self._momenta():
            buffer.copy_(moments[f"muon.{name}"])
        for i, p in enumerate(self._adam_parameters()):
            found = {key: moments[f"adam.{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.adam.state[p] = found | {"step": found["step"].cpu()}  # where AdamW keeps it
