"""One card, one large mixture of experts: FP8 by our engine against bfloat16 by transformers, and LoRA training.

    python bench/gpu.py [--minutes 9.5] [--toy]

Qwen3-30B-A3B's shape with random weights, never more than 75 GiB of the card. Needs torch (2.11 or later),
transformers (5.17 or later), peft, safetensors and accelerate; nothing is downloaded. Without CUDA it says so and ends
with 0; `--toy` runs every part at toy size on a CPU, which proves the script and measures nothing.

decode: tokens/s after prompts of 128 tokens, greedily, at batch 1, 8, 32 and 64. Ours is the engine's own step: experts
and attention in FP8, static buffers, recorded as a CUDA graph; `fused` with its small kernels compiled; with and
without an adapter (rank 16, attention). 64 rows are the most that the engine steps together on a card. transformers'
is `generate`: growing cache, its experts as it decodes them by itself (`batched_mm`) and by `grouped_mm`, and static
cache, which it compiles; the fastest of these is what ours is compared with, and is named.
limit: the bytes that a step has to read (active weights, keys and values) at the bandwidth of a copy, measured here;
random routers spread tokens evenly, so a batch of b meets a share of 1 - (1 - k/E)^b of the experts.
train: LoRA on the bfloat16 weights, activations computed again as a night does on a card, but by a loop of its own and
on rows of 2,048 random tokens, which are none of a night's; a pair of DPO is two rows, and its reference, the base, is
part of its time.
agree: logits of the same weights in FP8 and in bfloat16. Random weights are a hard case: nothing is decided clearly.
peak: the most of the card that tensors took while a row of the table was decoded, weights and prompt included.
Parts that fail or for which no time is left are named and left out. After each part a line of JSON tells what is found
so far, and the last line printed is one in any case, after SIGTERM or Ctrl-C too.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# the package without its first import, which may need what this machine does not have
package = types.ModuleType("nightschool")
package.__path__ = [str(Path(__file__).resolve().parent.parent)]
sys.modules.setdefault("nightschool", package)

from nightschool.serving import fp8  # noqa: E402
from nightschool.serving.adapters import BASE, Deltas, Lora, applied  # noqa: E402
from nightschool.serving.base import lora_targets  # noqa: E402
from nightschool.serving.batching import CARD  # noqa: E402
from nightschool.serving.decoding import Answer, Batch, Row  # noqa: E402
from nightschool.serving.engine import Sampling  # noqa: E402
from nightschool.serving.graphs import Graphs, is_plain, use_attention  # noqa: E402
from nightschool.serving.lora import as_named  # noqa: E402

GIB = 1 << 30
MOST_GIB = 75
RANK = 16
GROUPED = "nightschool_bench_grouped_mm"
THEIRS = ("bf16", "bf16_grouped", "bf16_static")
Found = dict[str, Any]


@dataclass(frozen=True)
class Size:
    shape: dict[str, int]
    batches: tuple[int, ...]
    prompt: int
    steps: int
    train: int  # tokens a row
    copied: int  # bytes
    fuse: str  # backend


BIG = Size(
    shape={
        **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
        **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960},
    },
    batches=(1, 8, 32, CARD.rows),
    prompt=128,
    steps=100,
    train=2048,
    copied=4 * GIB,
    fuse="inductor",
)
TOY = Size(
    shape={
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        **{"num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512},
    },
    batches=(1, 2),
    prompt=8,
    steps=6,
    train=32,
    copied=1 << 22,
    fuse="eager",
)


def main() -> None:
    args = parse()
    if not args.toy and not torch.cuda.is_available():
        print("skipped: torch finds no CUDA device; `--toy` runs every part at toy size on the CPU")
        return
    if not args.toy and not fp8.supported("cuda"):
        print(
            f"skipped: {torch.cuda.get_device_name()} is not of Hopper's generation, for which alone torch has a scaled"
            " grouped product by rows"
        )
        return
    bench = Bench(TOY if args.toy else BIG, "cpu" if args.toy else "cuda", args.minutes)
    before = {asked: signal.getsignal(asked) for asked in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, end)
    try:
        bench.run()
    except (KeyboardInterrupt, SystemExit) as stop:
        bench.found["left_out"]["what was to come"] = f"stopped by a signal: {stop!r}"
        raise
    finally:
        for asked in before:  # what was measured is told, whoever asks again
            signal.signal(asked, signal.SIG_IGN)
        bench.guarded("compare", 30, bench.compare)
        try:
            print(bench.table())
        finally:
            print(json.dumps(bench.found), flush=True)
            for asked, handler in before.items():
                signal.signal(asked, handler)


def end(number: int, _: object) -> None:
    """In order, as an error that no part takes for its own."""
    raise SystemExit(128 + number)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args()


def circumstances(toy: bool) -> Found:
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "safetensors")},
        "card": "none, toy size on the CPU" if toy else torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
    }


class OutOfTime(Exception):
    pass


class Bench:
    def __init__(self, size: Size, device: str, minutes: float) -> None:
        from transformers import Qwen3MoeConfig

        self.size, self.device = size, device
        self.ends = time.monotonic() + 60 * minutes
        self.config = Qwen3MoeConfig(**size.shape, norm_topk_prob=True, tie_word_embeddings=False)
        self.speeds: dict[str, dict[int, float]] = {}
        self.peaks: dict[str, dict[int, float]] = {}
        self.bytes: dict[str, dict[int, float]] = {}
        self.recorded = device == "cuda"  # whether our steps were CUDA graphs to the end
        self.found: Found = {"left_out": {}, **circumstances(device == "cpu")}
        self.model: Any = None  # one at a time fits
        self.kind, self.lora = "", BASE
        self.numbers: dict[str, Tensor] = {}  # logits by kind

    def run(self) -> None:
        """The parts, the surest and most wanted first; whatever measures or may fail goes through `attempt`."""
        if self.device == "cuda":
            torch.cuda.set_per_process_memory_fraction(MOST_GIB * GIB / torch.cuda.mem_get_info()[1])
        torch.manual_seed(1)
        rows, width = max(self.size.batches), self.size.prompt
        self.prompts = torch.randint(self.config.vocab_size, (rows, width)).tolist()
        self.attempt("copy", 5, 30, self.copy_bandwidth)
        for kind, part in (
            *(("fp8", self.fp8_steps), ("bf16", self.bf16_generate), ("bf16", self.training)),
            *(("bf16", self.bf16_static), ("fp8", self.fp8_fused)),
        ):
            if kind == self.kind or self.loaded(kind, part.__name__):
                part()
            self.guarded("compare", 30, self.compare)
            print(json.dumps(self.found), flush=True)

    # -- the two models ---

    def loaded(self, kind: str, part: str) -> bool:
        self.kind, self.model, self.lora = "", None, BASE
        self.guarded(f"tidying before {part}", 30, self.tidy)
        return self.attempt(f"weights, for {part}", 30, 180, lambda: self.load(kind))

    def load(self, kind: str) -> None:
        """The same weights every time, in FP8 or as they are."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device(self.device):
            # a copy: a model's config remembers how its experts are computed
            model = AutoModelForCausalLM.from_config(deepcopy(self.config), dtype=torch.bfloat16).eval()
        if kind == "fp8":
            pattern = lora_targets(self.config, "attention")
            model = fp8.convert(model, pattern, self.device)
            use_attention(model)
            self.lora = adapter(model, pattern)
        self.kind, self.model = kind, model
        self.note_memory(kind, model)

    def fp8_steps(self) -> None:
        self.attempt("logits, fp8", 5, 30, self.logits)
        self.steps("fp8", 30, 90)
        self.found["recorded"] = self.recorded

    def steps(self, name: str, least: float, most: float) -> None:
        for one, lora in ((name, BASE), (f"{name}_adapter", self.lora)):
            for rows in self.size.batches:
                self.attempt(f"{one}, batch {rows}", least, most, lambda n=one, o=lora, r=rows: self.ours(n, o, r))

    def fp8_fused(self) -> None:
        torch._dynamo.config.recompile_limit = 64  # shapes of layers times batches
        if self.attempt("fuse", 20, 60, lambda: fp8.fuse(self.model, self.size.fuse)):
            self.steps("fp8_fused", 40, 75)

    def bf16_generate(self) -> None:
        self.attempt("logits, bf16", 5, 30, self.logits)
        for rows in self.size.batches:
            self.attempt(f"bf16, batch {rows}", 20, 60, lambda r=rows: self.theirs("bf16", r))
            self.attempt(f"bf16_grouped, batch {rows}", 20, 60, lambda r=rows: self.grouped(r))

    def grouped(self, rows: int) -> None:
        """`generate` decodes by `batched_mm` where a card was to use `grouped_mm`, unless that has another name."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

        ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_mm_experts_forward)
        before = self.model.config._experts_implementation
        self.model.set_experts_implementation(GROUPED)
        try:
            self.theirs("bf16_grouped", rows)
        finally:
            self.model.set_experts_implementation(before)

    def bf16_static(self) -> None:
        for rows in reversed(self.size.batches):
            self.attempt(
                f"bf16_static, batch {rows}",
                *(60, 300, lambda r=rows: self.theirs("bf16_static", r, cache_implementation="static")),
            )

    def training(self) -> None:
        for name, step in (("sft", sft_loss), ("dpo", dpo_loss)):
            self.attempt(name, 30, 90, lambda n=name, s=step: self.train(n, s))

    def tidy(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def note_memory(self, name: str, model: Any) -> None:
        held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        self.found[f"weights_gib_{name}"] = round(held / GIB, 3)
        self.bytes[name] = {rows: self.bytes_a_step(model, rows) for rows in self.size.batches}

    # -- decoding ---

    def ours(self, name: str, lora: Lora, rows: int) -> None:
        """The engine's own batch and step, without a tokenizer."""
        self.reset_peak()
        step = self.stepper(self.model)
        answers = [Answer(Mute(), Sampling(max_tokens=1 << 20)) for _ in range(rows)]
        batch = Batch([Row(self.prompts[i], answers[i], lora) for i in range(rows)], self.device)
        for _ in range(3):  # the prompt, the step that is recorded, one more
            batch.step(step)
        self.note_speed(name, rows, self.seconds(lambda: [batch.step(step) for _ in range(self.size.steps)]))

    def stepper(self, model: Any) -> Callable[..., tuple[Tensor, Any]]:
        modules = dict(model.named_modules())
        graphs = Graphs(model, modules, record=self.device == "cuda")

        def step(deltas: Deltas, **inputs: Any) -> tuple[Tensor, Any]:
            past = inputs["past_key_values"]
            if past is not None and is_plain(past):
                made = graphs.step(deltas, **inputs)
                self.recorded &= graphs.recording
                return made
            with applied(modules, deltas), torch.inference_mode():
                out = model(**inputs, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1], out.past_key_values

        return step

    def theirs(self, name: str, rows: int, **more: str) -> None:
        """`generate`, timed from its second token on; compiled by a first run where it compiles."""
        self.reset_peak()
        ids = torch.tensor(self.prompts[:rows], device=self.device)
        tokens = self.size.steps + 2
        for _ in range(2):
            clock = Clock()
            with torch.inference_mode():
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                    stopping_criteria=[clock],
                    **more,
                )
        seconds = (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2)
        self.note_speed(name, rows, seconds * self.size.steps)

    def note_speed(self, name: str, rows: int, seconds: float) -> None:
        speed = rows * self.size.steps / seconds
        self.speeds.setdefault(name, {})[rows] = round(speed, 1)
        if (peak := self.peak_gib()) is not None:
            self.peaks.setdefault(name, {})[rows] = peak
        print(f"{name}, batch {rows}: {speed:.1f} tokens/s", flush=True)

    def reset_peak(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / GIB, 2) if self.device == "cuda" else None

    def seconds(self, act: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        act()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    # -- what a step has to read ---

    def copy_bandwidth(self) -> None:
        source = torch.ones(self.size.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        seconds = self.seconds(lambda: [target.copy_(source) for _ in range(10)])
        self.found["copy_gb_per_s"] = round(2 * 10 * self.size.copied / seconds / 1e9, 1)

    def bytes_a_step(self, model: Any, rows: int) -> float:
        share = 1 - (1 - self.config.num_experts_per_tok / self.config.num_experts) ** rows
        held = dict([*model.named_parameters(), *model.named_buffers()])
        sizes = {name: t.numel() * t.element_size() for name, t in held.items() if "embed_tokens" not in name}
        weights = sum(size * (share if ".experts." in name else 1) for name, size in sizes.items())
        a_token = 2 * 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim
        return weights + rows * (self.size.prompt + self.size.steps / 2) * a_token

    # -- numbers ---

    def logits(self) -> None:
        """Of the model at hand; compared as soon as there are those of both."""
        ids = torch.tensor(self.prompts[: min(4, len(self.prompts))], device=self.device)
        with torch.inference_mode():
            self.numbers[self.kind] = self.model(ids, use_cache=False).logits.float().cpu()
        if {"fp8", "bf16"} <= self.numbers.keys():
            self.found["agree"] = agreement(self.numbers["bf16"], self.numbers["fp8"])

    # -- training ---

    def train(self, name: str, loss_of: Callable[[Any, Tensor], Tensor]) -> None:
        from peft import LoraConfig, get_peft_model

        model = self.model
        pattern = lora_targets(self.config, "attention")
        with as_named(model):
            tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=pattern))
        try:
            tuned.train()
            tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.note_training(name, tuned, loss_of)
        finally:
            tuned.gradient_checkpointing_disable()
            tuned.unload()
            model.eval()

    def note_training(self, name: str, tuned: Any, loss_of: Callable[[Any, Tensor], Tensor]) -> None:
        trained = [p for p in tuned.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-4)
        torch.manual_seed(2)
        rows = torch.randint(self.config.vocab_size, (2, self.size.train), device=self.device)

        def step() -> None:
            loss = loss_of(tuned, rows)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))

        losses: list[float] = []
        step()
        self.reset_peak()
        seconds = self.seconds(lambda: [step() for _ in range(3)])
        tokens = self.size.train * (2 if name == "dpo" else 1)
        self.found[name] = {
            "tokens_per_s": round(3 * tokens / seconds, 1),
            "peak_gib": self.peak_gib(),
            "loss_first": round(losses[0], 4),
            "loss_last": round(losses[-1], 4),
        }
        print(f"{name}: {self.found[name]}", flush=True)

    # -- time ---

    def attempt(self, name: str, least: float, most: float, act: Callable[[], object]) -> bool:
        """Run a part if `least` seconds are left, for `most` at most; one that fails leaves the others alone."""
        left = self.ends - time.monotonic()
        if left < least:
            self.found["left_out"][name] = f"{left:.0f} s left, {least:.0f} wanted"
            return False
        done = self.guarded(name, min(left, most), act)
        self.guarded(f"tidying after {name}", 30, self.tidy)  # out of reach of what holds on to a failed part
        return done

    def guarded(self, name: str, seconds: float, act: Callable[[], object]) -> bool:
        try:
            with limited(seconds):
                act()
        except Exception as error:  # an unattended run reports what it has
            self.found["left_out"][name] = f"{type(error).__name__}: {error}"[:300]
            print(f"{name} failed: {error}", flush=True)
            return False
        return True

    # -- the answer ---

    def compare(self) -> None:
        best = {name: self.speeds.get(name, {}) for name in ("fp8", "fp8_adapter")}  # as the engine steps: not fused
        theirs = self.best_of_theirs()
        self.found["bf16_fastest"] = theirs
        self.found["tokens_per_s"] = self.speeds
        self.found["decode_peak_gib"] = self.peaks
        self.found["gb_a_step"] = {n: {r: round(b / 1e9, 4) for r, b in of.items()} for n, of in self.bytes.items()}
        self.found["share_of_limit"] = {
            name: {rows: self.limit_share(name, rows, speed) for rows, speed in of.items()}
            for name, of in self.speeds.items()
        }
        last = self.size.batches[-1]
        self.found["fp8_over_bf16_last_batch"] = ratio(
            best["fp8"].get(last), self.speeds[theirs[last]][last] if last in theirs else None
        )
        self.found["share_of_limit_b1"] = self.limit_share("fp8", 1, best["fp8"].get(1))
        self.found["adapter_overhead"] = {
            r: round(1 - best["fp8_adapter"][r] / s, 4) for r, s in best["fp8"].items() if r in best["fp8_adapter"]
        }

    def limit_share(self, name: str, rows: int, speed: float | None) -> float | None:
        bandwidth = self.found.get("copy_gb_per_s")
        if speed is None or bandwidth is None:
            return None
        return round(speed * self.bytes[name.split("_")[0]][rows] / rows / (1e9 * float(bandwidth)), 4)

    def best_of_theirs(self) -> dict[int, str]:
        """By batch, which of transformers' settings is the fastest."""
        speeds = {
            rows: {n: of[rows] for n, of in self.speeds.items() if n in THEIRS and rows in of}
            for rows in self.size.batches
        }
        return {rows: max(of, key=of.__getitem__) for rows, of in speeds.items() if of}

    def table(self) -> str:
        head = ["| tokens/s (share of the limit) |", *(f" batch {rows} |" for rows in self.size.batches)]
        lines = ["".join(head), "| --- |" + " --- |" * len(self.size.batches)]
        for name, of in self.speeds.items():
            share = self.found.get("share_of_limit", {}).get(name, {})
            cells = [f"{of[r]:,.1f} ({share.get(r) or 0:.1%})" if r in of else "-" for r in self.size.batches]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        rest = {k: v for k, v in self.found.items() if k not in ("tokens_per_s", "share_of_limit")}
        return "\n".join(
            [*lines, "", "| figure | value |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rest.items())]
        )


class Mute:
    """A tokenizer that says nothing."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return ""


class Clock:
    """When each token came; it ends nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def adapter(model: Any, pattern: str) -> Lora:
    import re

    weights: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if re.fullmatch(pattern, name):
            down = torch.randn(module.in_features, RANK, dtype=torch.bfloat16, device=model.device)
            up = torch.randn(RANK, module.out_features, dtype=torch.bfloat16, device=model.device)
            weights[name] = down / module.in_features**0.5, 0.01 * up
    return Lora(weights)


def agreement(wanted: Tensor, found: Tensor) -> dict[str, float]:
    ours, theirs = found.log_softmax(-1), wanted.log_softmax(-1)
    return {
        "logits_relative": round(float((found - wanted).norm() / wanted.norm()), 4),
        "kl_nats": round(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), 5),
        "same_first_choice": round(float((found.argmax(-1) == wanted.argmax(-1)).float().mean()), 4),
    }


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one / other, 3)


def nll(model: nn.Module, rows: Tensor) -> Tensor:
    """Of each row, summed over its tokens."""
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    targets = rows[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).sum(1)


def sft_loss(model: Any, rows: Tensor) -> Tensor:
    return nll(model, rows[:1]).sum() / (rows.shape[1] - 1)


def dpo_loss(model: Any, rows: Tensor) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = nll(model, rows)
    chosen, rejected = reference - nll(model, rows)
    return -F.logsigmoid(0.1 * (chosen - rejected))


if __name__ == "__main__":
    main()
