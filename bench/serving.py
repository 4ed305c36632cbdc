"""The embedded engine against transformers' own `generate`, under swaps of adapters, and what its base can do.

    python bench/serving.py [--only speed,swap,prefix,parity,base] [--rounds 5] [--requests 1000] [--swaps 20]
                            [--data FOLDER] [--checkpoint FOLDER]

speed: 64 tokens an answer on the shipped seedling, greedily and to the last token. `generate` answers one prompt after
another with the same adapter (peft); the engine answers one, then eight callers at once of whom each two share the base
or one of three adapters. Rounds are interleaved and the ratio is the median over rounds: the machine may be shared.
swap: eight threads ask single questions, answered in 8 tokens, through an alias that moves between three adapters, each
loaded anew and unloaded after.
prefix: seconds to the first piece of the sixth turn of a session, with and without what was read before.
parity: largest difference of a token's log-probability from PEFT's model, over 64 prompts and every adapter.
base: what pretraining measures. The full weights, of which the shipped ones were rounded, are not shipped: without the
checkpoint of that run fp8_ppl_ratio is the quotient of the two perplexities in the base's card, and `perplexity`,
measured here on the same dialogues, shows whether the first of them still holds. fp8_products_ppl_ratio is measured:
products in FP8, weights by row and activations too, against the same weights dequantised, on a hundred dialogues.
Where to get the data: bench/sources.py. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import runs
import sources
import torch
from nightschool.errors import ServingError
from nightschool.evolve.live import Live
from nightschool.evolve.sealing import seal
from nightschool.evolve.types import Adapter
from nightschool.serving.base import SEEDLING, load_base, lora_targets
from nightschool.serving.batching import Prefixes
from nightschool.serving.chat import answer_ids, prompt_ids
from nightschool.serving.engine import Sampling
from nightschool.serving.local import LocalEngine
from nightschool.serving.lora import as_named
from nightschool.serving.parity import TALKS
from nightschool.serving.pretrain import corpus, measure
from nightschool.serving.pretrain.export import WEIGHTS, origin
from nightschool.settings import ServingSettings

TOKENS = 64
FEW = 100  # dialogues for what is slow on a CPU
CARD = SEEDLING / "README.md"
Messages = list[dict[str, str]]


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapters = {f"b2:{seed}": make_adapter(Path(folder) / str(seed), seed) for seed in (1, 2, 3)}
        for name in args.only.split(","):
            found = PARTS[name](adapters, args)
            print(f"| {name} | |\n| --- | --- |\n" + "\n".join(f"| {k} | {v} |" for k, v in found.items()), flush=True)
            result |= found
    print(json.dumps({**result, **runs.circumstances()}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--data", type=Path, default=sources.DATA)
    parser.add_argument("--checkpoint", type=Path, default=Path("seedling_checkpoint"))
    return parser.parse_args()


# -- what is asked, and of whom ---


def make_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of the default targets and rank with random weights."""
    model = load_base("seedling", dtype=torch.float32, device="cpu")
    torch.manual_seed(seed)
    targets = lora_targets(model.config, "attention+mlp")
    peft = in_peft(model, targets)
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    peft.save_pretrained(folder)
    return folder


def in_peft(model: Any, targets: str) -> Any:
    from peft import LoraConfig, get_peft_model

    with as_named(model):
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))


def from_peft(path: Path) -> Any:
    from peft import PeftModel

    model = load_base("seedling", dtype=torch.float32, device="cpu")
    with as_named(model):
        return PeftModel.from_pretrained(model, path).eval()


def engine_with(adapters: dict[str, Path]) -> LocalEngine:
    engine = LocalEngine(ServingSettings(device="cpu", threads=1))
    for name, path in adapters.items():
        engine.load(name, path)
    return engine


def questions(count: int) -> list[Messages]:
    rng = Random("bench:serving")
    talks = [corpus.conversation(rng) for _ in range(count)]
    return [talk[: 1 + max(i for i, t in enumerate(talk) if t["role"] == "user")] for talk in talks]


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


# -- speed ---


def speed(adapters: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    engine = engine_with(adapters)
    engine._ends = frozenset()  # every answer has its full length
    plain = {None: load_base("seedling", dtype=torch.float32, device="cpu")}
    plain |= {name: from_peft(path) for name, path in adapters.items()}
    names = [*plain, *plain]
    asked = questions(8 * (args.rounds + 1))
    rounds = [one_round(engine, plain, names, asked[8 * i : 8 * i + 8]) for i in range(args.rounds + 1)][1:]
    b1, b8 = ([row[key] for row in rounds] for key in ("b1", "b8"))
    return {
        "tokens_per_s_b1": round(statistics.median(TOKENS / ours for ours, _ in b1), 1),
        "tokens_per_s_b8": round(statistics.median(8 * TOKENS / ours for ours, _ in b8), 1),
        "ratio_vs_transformers_generate_b1": round(statistics.median(theirs / ours for ours, theirs in b1), 2),
        "ratio_vs_transformers_generate_b8": round(statistics.median(theirs / ours for ours, theirs in b8), 2),
        "ratio_b1_range": [round(f(theirs / ours for ours, theirs in b1), 2) for f in (min, max)],
        "ratio_b8_range": [round(f(theirs / ours for ours, theirs in b8), 2) for f in (min, max)],
    }


def one_round(
    engine: LocalEngine, plain: dict[str | None, Any], names: Sequence[str | None], asked: Sequence[Messages]
) -> dict[str, tuple[float, float]]:
    """Seconds of the engine and of `generate`, for one answer of an adapter and for eight of all; nothing is reused."""

    def ours(i: int) -> list[str]:
        return engine.generate([asked[i]], adapter=names[i], sampling=Sampling(TOKENS))

    def theirs(i: int) -> None:
        ids = torch.tensor([prompt_ids(engine._tokenizer, asked[i], 1000)])
        with torch.inference_mode():
            plain[names[i]].generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
            )

    engine._batcher._prefixes = Prefixes(0)
    one = seconds(lambda: theirs(1)), seconds(lambda: ours(1))
    with ThreadPoolExecutor(8) as pool:
        eight = seconds(lambda: list(pool.map(ours, range(8))))
    return {"b1": one[::-1], "b8": (eight, seconds(lambda: [theirs(i) for i in range(8)]))}


# -- swaps under load ---


class Alias:
    """What `Live` asks of a registry: which adapter serves. `at` is moved by whoever deploys."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters, self.at = adapters, 0

    def live(self) -> Adapter:
        return self.adapters[self.at % len(self.adapters)]

    def tainted(self) -> dict[str, str]:
        return {}


def swap(adapters: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Without and with swaps in turn, so that what else the machine does falls on both."""
    engine = engine_with({})
    parts = 4
    calm: list[float] = []
    moved: list[float] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        alias = Alias([sealed(path, Path(folder), engine) for path in adapters.values()])
        for part in range(parts):
            still, broken = under_load(engine, alias, args.requests // parts // 2, 0)
            times, broken_too = under_load(engine, alias, args.requests // parts, args.swaps // parts)
            calm, moved, failed = calm + still, moved + times, failed + broken + broken_too
            print(f"part {part + 1} of {parts}", flush=True)

    def p95(times: Sequence[float]) -> float:
        return 1000 * sorted(times)[int(0.95 * len(times))]

    return {
        "swap_requests": len(moved),
        "swap_failed": failed,
        "swap_count": alias.at,
        "swap_ms_p50": [round(1000 * statistics.median(times)) for times in (calm, moved)],
        "swap_ms_p95": [round(p95(times)) for times in (calm, moved)],
        "swap_ms_max": [round(1000 * max(times)) for times in (calm, moved)],
        "swap_added_ms_p95": round(p95(moved) - p95(calm)),
    }


def sealed(path: Path, folder: Path, engine: LocalEngine) -> Adapter:
    """As a night leaves it, with what the check after each load compares."""
    copy = Path(shutil.copytree(path, folder / path.name))
    engine.load(path.name, copy)
    recorded = {key: logprobs(engine, adapter) for key, adapter in (("base", None), ("adapter", path.name))}
    engine.unload(path.name)
    made = {"snapshot_id": "", "phase": "sft", "parent_id": None, "created_utc": 0.0}
    return seal(copy, base_id=engine.base_id, details={"parity": recorded}, **made)  # type: ignore[arg-type]


def logprobs(engine: LocalEngine, adapter: str | None) -> list[float]:
    prompts, answers = zip(*TALKS, strict=True)
    return [score.logprob for score in engine.score(prompts, answers, adapter=adapter)]


def under_load(engine: LocalEngine, alias: Alias, requests: int, swaps: int) -> tuple[list[float], int]:
    """Seconds of each request, and how many failed; each holds the adapter that it began with, as a reply does.

    A move that no request was answered by counts as a failure, too.
    """
    asked = [talk[-1:] for talk in questions(64)]
    live = Live(alias, engine, ServingSettings().parity_tolerance)  # type: ignore[arg-type]
    done: list[float] = []
    failed: list[str] = []
    held: list[tuple[int, str | None]] = []  # where the alias stood, and who answered
    first = alias.at

    def ask(i: int) -> None:
        start, at = time.perf_counter(), alias.at
        try:
            with live.hold() as adapter:
                engine.generate([asked[i % 64]], adapter=adapter, sampling=Sampling(8))
            held.append((at, adapter))
            done.append(time.perf_counter() - start)
        except ServingError as error:
            failed.append(str(error))

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, i) for i in range(requests)]
        for move in range(swaps):
            while len(done) + len(failed) < requests * (move + 1) // (swaps + 1):
                time.sleep(0.005)
            alias.at += 1
        for future in futures:
            future.result()
    wanted = {at: alias.adapters[at % len(alias.adapters)].id for at in range(first, first + swaps + 1)}
    failed += [f"move {at} was served by nobody" for at in wanted if (at, wanted[at]) not in held]
    print(*failed[:3], sep="\n", end="")
    return done, len(failed)


# -- a session's prefix ---


def prefix(adapters: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    engine = engine_with(adapters)
    ratios, shares = [], []
    for round_ in range(args.rounds):
        talk: Messages = []
        for question in questions(6 * (round_ + 1))[-6:]:
            talk = [*talk, question[-1]]
            if len(talk) < 11:
                answer = engine.generate([talk], adapter="b2:1", sampling=Sampling(TOKENS))[0]
                talk.append({"role": "assistant", "content": answer})
        reused = first_piece(engine, talk)
        engine._batcher._prefixes = Prefixes(0)
        ratios.append(first_piece(engine, talk) / reused)
        shares.append(len(prompt_ids(engine._tokenizer, talk, 1900)))
        engine._batcher._prefixes = Prefixes(8192)
    return {"prefix_speedup": round(statistics.median(ratios), 2), "prefix_prompt_tokens": statistics.median(shares)}


def first_piece(engine: LocalEngine, talk: Messages) -> float:
    return seconds(lambda: engine.generate([talk], adapter="b2:1", sampling=Sampling(1)))


# -- parity, and the base ---


def parity(adapters: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    engine = engine_with(adapters)
    rng = Random("bench:parity")
    talks = [talk for talk in (corpus.conversation(rng) for _ in range(200)) if talk[-1]["role"] == "assistant"][:64]
    prompts, answers = [talk[:-1] for talk in talks], [talk[-1]["content"] for talk in talks]
    worst = 0.0
    for name, path in adapters.items():
        model = from_peft(path)
        for prompt, answer, score in zip(prompts, answers, engine.score(prompts, answers, adapter=name), strict=True):
            theirs = peft_logprobs(model, engine, prompt, answer)
            worst = max(worst, *(abs(a - b) for a, b in zip(score.token_logprobs, theirs, strict=True)))
    return {"parity_max_abs": worst, "parity_prompts": len(prompts) * len(adapters)}


def peft_logprobs(model: Any, engine: LocalEngine, prompt: Messages, answer: str) -> list[float]:
    head, tail = prompt_ids(engine._tokenizer, prompt, 1000), answer_ids(engine._tokenizer, prompt, answer)
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return [float(logprobs[len(head) - 1 + i, token]) for i, token in enumerate(tail)]


def base(adapters: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    held_out = corpus.read_dialogues(args.data / "self_dialogue" / "dialogues.jsonl.gz")[1]
    engine, few = engine_with({}), held_out[:FEW]
    perplexity, tokens = measure.dialogue_perplexity(engine, held_out)
    load, load_talks = measure.expert_load(engine, held_out[:200])
    rounded = LocalEngine(ServingSettings(device="cpu", threads=1, weights="fp8"))
    products = measure.dialogue_perplexity(rounded, few)[0] / measure.dialogue_perplexity(engine, few)[0]
    return {
        "copy_exact": measure.facts_used(engine, 200)[0],
        "expert_load_max_over_mean": round(load, 3),
        "expert_load_equal_conversations": round(load_talks, 3),
        "perplexity": round(perplexity, 2),
        "perplexity_tokens": tokens,
        **against_full_weights(engine, args.checkpoint, held_out, perplexity),
        "fp8_products_ppl_ratio": round(products, 4),
        "fp8_products_dialogues": len(few),
    }


def against_full_weights(
    engine: LocalEngine, checkpoint: Path, held_out: Sequence[Any], perplexity: float
) -> dict[str, Any]:
    """Measured where the checkpoint of pretraining is at hand; else both perplexities are those in the base's card."""
    if (checkpoint / WEIGHTS).exists() and origin(checkpoint) == origin(SEEDLING):
        full = measure.perplexity_full(engine, checkpoint, held_out)
        return {"fp8_ppl_ratio": round(perplexity / full, 4), "fp8_ppl_ratio_from": "the checkpoint"}
    rows = re.findall(
        r"^\| (?:perplexity of held-out|the same before).* \| ([\d.]+) \|$", CARD.read_text(), re.MULTILINE
    )
    ours, full = map(float, rows)
    return {"fp8_ppl_ratio": round(ours / full, 4), "fp8_ppl_ratio_from": f"the card: {ours} and {full}"}


PARTS = {"speed": speed, "swap": swap, "prefix": prefix, "parity": parity, "base": base}

if __name__ == "__main__":
    main()
