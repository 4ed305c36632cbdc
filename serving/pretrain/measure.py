"""What an exported seedling can do, measured through the engine that serves it, and its card.

Perplexity is over dialogues that no run trains on; a fact counts as used when its value stands in the answer letter by
letter, and only values that are invented anew count, since a name from a list could have been learnt by heart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...content import Message
from ...settings import ServingSettings
from ..chat import prompt_ids
from ..engine import Sampling
from ..local import LocalEngine
from . import words
from .corpus import conversation
from .export import origin
from .facts import Fact, facts
from .model import Balancer
from .run import Plan
from .scenes import UNKNOWN, Conversation, notes, turn
from .toolscenes import with_tools

SAMPLING = Sampling(max_tokens=64)
KNOWN = {word for values in vars(words).values() if isinstance(values, list | tuple) for word in values}

# Written by somebody who has seen neither the training text nor an answer: a system message, then what the user or a
# tool says, turn by turn.
CONVERSATIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "",
        (
            ("user", "Hi there, how are you today?"),
            ("user", "I'm a bit tired. I slept badly because the neighbours were loud."),
            ("user", "I think I'll go for a walk in the park later. Do you think that will help?"),
            ("user", "Good idea. Talk to you later!"),
        ),
    ),
    (
        "Notes from earlier conversations:\n- My sister is called Maribel.\n- My dog is called Tolvo.\n"
        "- My home town is Harnwick.",
        (
            ("user", "Hello, it's me again."),
            ("user", "Do you remember what my dog is called?"),
            ("user", "And where am I from?"),
            ("user", "What is my favourite colour?"),
        ),
    ),
    (
        "",
        (
            ("user", "Hi! My name is Jorren and I work as a gardener."),
            ("user", "It has been raining here all week."),
            ("user", "Can you tell me my name and what my job is?"),
        ),
    ),
    (
        "You answer for Pellworth Books. The shop is open from 9 am to 6 pm, Monday to Saturday. "
        "Returns are accepted within 30 days.",
        (
            ("user", "Good morning."),
            ("user", "When are you open?"),
            ("user", "I bought something last week and I don't like it. How long do I have to return it?"),
            ("user", "Great, thanks for your help."),
        ),
    ),
    (
        'You can call these functions:\n{"find_lamp": {"name": "string"}}\n{"reserve_lamp": {"id": "string"}}',
        (
            ("user", "Hi, I'm looking for a lamp called Velora. Do you have it?"),
            ("tool", '[{"id": "L482", "name": "Velora", "price": 39}]'),
            ("user", "Yes, please reserve it for me."),
            ("tool", '{"status": "reserved", "code": "K7315"}'),
            ("user", "Thank you. What was the code again?"),
        ),
    ),
)


@dataclass(frozen=True)
class Report:
    perplexity: float  # per token of held-out dialogue, both speakers
    perplexity_full: float | None  # the same before the weights became FP8
    tokens: int
    from_notes: float  # shares of answers that hold the invented value
    from_turns: float
    among: dict[int, float]  # by the number of notes
    tool_calls: float  # share of second calls that are right to the letter, where the functions were listed
    says_unknown: float  # of questions that the notes do not answer
    expert_load: float  # busiest over mean, worst layer, over the mix that it was trained on
    expert_load_talks: float  # the same over as many real as written conversations
    ended: float  # share of answers that ended by themselves
    conversations: tuple[Conversation, ...]


def measure(folder: Path, held_out: Sequence[Conversation], checkpoint: Path | None, count: int = 200) -> Report:
    engine = LocalEngine(ServingSettings(base=str(folder), device="cpu"))
    perplexity, tokens = dialogue_perplexity(engine, held_out)
    from_notes, among, ended = facts_used(engine, count)
    by_tokens, by_talks = expert_load(engine, held_out[:count], _real_share(folder))
    return Report(
        perplexity=perplexity,
        perplexity_full=perplexity_full(engine, checkpoint, held_out) if checkpoint else None,
        tokens=tokens,
        from_notes=from_notes,
        from_turns=turns_used(engine, count),
        among=among,
        tool_calls=calls_copied(engine, count // 2),
        says_unknown=unknown_said(engine, count // 2),
        expert_load=by_tokens,
        expert_load_talks=by_talks,
        ended=ended,
        conversations=tuple(hold(engine, system, said) for system, said in CONVERSATIONS),
    )


def dialogue_perplexity(engine: LocalEngine, talks: Sequence[Conversation]) -> tuple[float, int]:
    """Each assistant turn is scored after all that was said before it. Half the turns; the speakers are alike."""
    prompts, answers = [], []
    for talk in talks:
        for i in range(1, len(talk), 2):
            prompts.append(_messages(talk[:i]))
            answers.append(talk[i]["content"])
    scores = engine.score(prompts, answers)
    tokens = sum(score.tokens for score in scores)
    return math.exp(-sum(score.logprob for score in scores) / tokens), tokens


def perplexity_full(engine: LocalEngine, checkpoint: Path, talks: Sequence[Conversation]) -> float:
    served = {name: value.clone() for name, value in engine._model.state_dict().items()}
    engine._model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    try:
        return dialogue_perplexity(engine, talks)[0]
    finally:
        engine._model.load_state_dict(served)


def _real_share(folder: Path) -> float:
    """Of the tokens that it was trained on, those of real dialogue; runs that do not say had half."""
    state = json.loads(origin(folder) or "{}")
    return float(state.get("plan", {}).get("real", 0.5))


def expert_load(engine: LocalEngine, talks: Sequence[Conversation], real_share: float = 0.5) -> tuple[float, float]:
    """Over tokens of real dialogue and of written, shared as it was trained, and over as many conversations of each.

    Each conversation is read alone, so that no padding is counted.
    """
    rng = Random("measure:load")
    counts = Balancer(engine._model)
    real = _loads(engine, counts, talks)
    written = _loads(engine, counts, [conversation(rng) for _ in talks])
    real_part, written_part = (loads / loads.sum(1, keepdim=True) for loads in (real, written))
    by_tokens = real_share * real_part + (1 - real_share) * written_part
    return _worst(by_tokens), _worst(real + written)


def _loads(engine: LocalEngine, counts: Balancer, talks: Sequence[Conversation]) -> Tensor:
    """How often each expert of each layer is picked: (layers, experts)."""
    before = torch.stack(counts.loads)
    for talk in talks:
        ids = torch.tensor([prompt_ids(engine._tokenizer, _messages(talk), 512)])
        with torch.inference_mode():
            engine._model(ids, use_cache=False, logits_to_keep=1)
    return torch.stack(counts.loads) - before


def _worst(loads: Tensor) -> float:
    return float((loads.max(1).values / loads.mean(1)).max())


# -- facts ---


def invented(rng: Random, count: int) -> tuple[list[Fact], Fact]:
    """Facts of which one, the second value, is about something that was never seen."""
    while True:
        known = facts(rng, count)
        fresh = [f for f in known if _is_fresh(f.value)]
        if fresh:
            return known, rng.choice(fresh)


def _is_fresh(value: str) -> bool:
    parts = value.split()
    return value not in KNOWN and any(p not in KNOWN and p.lower() not in KNOWN and p.isalpha() for p in parts)


def facts_used(engine: LocalEngine, count: int) -> tuple[float, dict[int, float], float]:
    rng = Random("measure:notes")
    prompts, values, sizes = [], [], []
    for i in range(count):
        size = (1, 2, 4, 8)[i % 4]
        known, asked = invented(rng, size)
        prompts.append(_messages([notes(rng, known), turn("user", asked.question)]))
        values.append(asked.value)
        sizes.append(size)
    answers = engine.generate(prompts, sampling=SAMPLING)
    right = [value in answer for value, answer in zip(values, answers, strict=True)]
    among = {n: _share([r for r, size in zip(right, sizes, strict=True) if size == n]) for n in sorted(set(sizes))}
    scores = engine.score(prompts, answers)
    ended = [score.tokens < SAMPLING.max_tokens for score in scores]
    return _share(right), among, _share(ended)


def turns_used(engine: LocalEngine, count: int) -> float:
    rng = Random("measure:turns")
    prompts, values = [], []
    for _ in range(count):
        known, asked = invented(rng, 2)
        talk: Conversation = []
        for one in known:
            talk += [turn("user", one.said), turn("assistant", "Noted.")]
        prompts.append(_messages([*talk, turn("user", asked.question)]))
        values.append(asked.value)
    answers = engine.generate(prompts, sampling=SAMPLING)
    return _share([value in answer for value, answer in zip(values, answers, strict=True)])


def unknown_said(engine: LocalEngine, count: int) -> float:
    rng = Random("measure:unknown")
    prompts: list[list[Message]] = []
    for _ in range(count):
        *known, asked = facts(rng, 4)
        prompts.append(_messages([notes(rng, known), turn("user", asked.question)]))
    return _share([answer.startswith(UNKNOWN) for answer in engine.generate(prompts, sampling=SAMPLING)])


def calls_copied(engine: LocalEngine, count: int) -> float:
    """The call after the first result, whose id stands in that result. Without a list its name cannot be known."""
    rng = Random("measure:tools")
    prompts: list[list[Message]] = []
    calls: list[str] = []
    while len(prompts) < count:
        talk = with_tools(rng)
        said = [i for i, t in enumerate(talk) if t["role"] == "assistant" and t["content"].startswith("{")]
        if len(said) == 2 and talk[0]["role"] == "system":
            prompts.append(_messages(talk[: said[1]]))
            calls.append(talk[said[1]]["content"])
    answers = engine.generate(prompts, sampling=SAMPLING)
    return _share([call == answer for call, answer in zip(calls, answers, strict=True)])


def hold(engine: LocalEngine, system: str, said: Sequence[tuple[str, str]]) -> Conversation:
    """A conversation in which the engine answers each line of `said`."""
    talk: Conversation = [turn("system", system)] if system else []
    for role, content in said:
        talk.append(turn(role, content))
        (answer,) = engine.generate([_messages(talk)], sampling=SAMPLING)
        talk.append(turn("assistant", answer))
    return talk


def _messages(talk: Conversation) -> list[Message]:
    return cast(list[Message], talk)


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


# -- the card ---


def card(report: Report, state: dict[str, Any], parameters: int, bytes_on_disk: int) -> str:
    plan = state["plan"]
    full = f"{report.perplexity_full:.2f}" if report.perplexity_full else "not measured"
    among = ", ".join(f"{share:.0%} among {n}" for n, share in report.among.items())
    torch_version = torch.__version__.split("+")[0]
    return CARD.format(
        parameters=f"{parameters / 1e6:.1f}",
        megabytes=f"{bytes_on_disk / 1e6:.1f}",
        tokens=f"{state['tokens'] / 1e6:.1f}",
        step=state["step"],
        minutes=f"{state['elapsed_s'] / 60:.0f}",
        command=_command(state),
        before=_before(state),
        real=f"{plan.get('real', 0.5):.0%}",
        products="float32 products" if plan.get("float32") else "bfloat16 products over float32 weights",
        seed=plan["seed"],
        decay=f"{plan['decay_share']:.0%}",
        where=f"{plan['workers']} CPU cores" if _device(state) == "cpu" else _device(state),
        torch=torch_version,
        perplexity=f"{report.perplexity:.2f}",
        scored=f"{report.tokens:,}",
        full=full,
        notes=f"{report.from_notes:.0%}",
        among=among,
        turns=f"{report.from_turns:.0%}",
        calls=f"{report.tool_calls:.0%}",
        unknown=f"{report.says_unknown:.0%}",
        load=f"{report.expert_load:.2f}",
        load_talks=f"{report.expert_load_talks:.2f}",
        ended=f"{report.ended:.0%}",
        conversations="\n\n".join(_quoted(talk) for talk in report.conversations),
    )


def _command(state: dict[str, Any]) -> str:
    start = " --start EARLIER" if state.get("before") else ""
    return f"python -m nightschool.serving.pretrain --dialogues dialogues.jsonl.gz{start} --out DIR {_options(state)}"


def _before(state: dict[str, Any]) -> str:
    """What is said of the run that this one began with, a paragraph a run."""
    before = state.get("before")
    if not before:
        return ""
    size, minutes = f"{before['tokens'] / 1e6:.1f} M tokens", f"{before['elapsed_s'] / 60:.0f} minutes"
    told = f"EARLIER is what `{_command(before)}` gave: {before['step']} steps, {size} in {minutes}."
    return f"\n{told}\n{_before(before)}"


def _options(state: dict[str, Any]) -> str:
    """What makes the run from the script's defaults."""
    plan, usual = state["plan"], asdict(Plan())
    given = {"steps": state["step"]} if plan["steps"] else {"minutes": f"{plan['minutes']:g}"}
    given |= {name: plan[name] for name in ("tokens", "seed") if plan[name] != usual[name]}
    given |= {"peak": f"{plan['peak']:g}"} if plan.get("peak", 1.0) != usual["peak"] else {}
    given |= {"threads": plan["workers"]} if plan["workers"] != usual["workers"] else {}
    given |= {"device": _device(state)} if _device(state) != "cpu" else {}
    given |= {"float32": ""} if plan.get("float32") else {}
    return " ".join(f"--{name} {value}".rstrip() for name, value in given.items())


def _device(state: dict[str, Any]) -> str:
    return str(state.get("device", "cpu"))


def _quoted(talk: Conversation) -> str:
    return "\n".join(["```", *(f"{t['role']}: {t['content']}" for t in talk), "```"])


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# Seedling

The base that Nightschool ships, so that a night can be run on any machine without a download. It holds small talk and
reads facts off its prompt; it knows next to nothing, and is meant to be taught or replaced.

{parameters} M parameters in DeepSeek-V3's shape: six layers with multi-head latent attention, the first dense, five
with 8 routed experts (two a token, sigmoid routing balanced by biases, no auxiliary loss) and a shared one. Block-FP8
weights, {megabytes} MB with the tokenizer (byte-level BPE of 4,096 tokens, single digits). Positions go up to 2,048,
but it was trained on rows of 256 and 512 tokens: keep prompts within that.

## Sources

| share of tokens | text | licence |
| --- | --- | --- |
| {real} | self_dialogue corpus (github jfainberg/self_dialogue_corpus) | BSD-3-Clause |
| the rest | conversations written for it one by one (serving/pretrain/talks) and by the script | Apache-2.0, as here |

The first are dialogues that people wrote with themselves; 2 % are held out by hash. Written one by one is small talk of
every kind, talk that uses notes and what was told, and a help desk, each with words to choose from. The script's own
hold facts in notes and earlier turns, records, tool calls and small instructions; names and ids are made of syllables.
Nothing about a workshop for bicycles was written: the domain of the demonstration has to be learnt at night.

## How

    {command}

Seed {seed}, torch {torch}: {step} steps, {tokens} M tokens in {minutes} minutes on {where}; {products}.
{before}
While the rate falls, over the last {decay}, and throughout what goes on from another run, the script's conversations
say in one way alone that something is not known.
Batched Muon for hidden matrices, AdamW for the rest; warm-up, stable rate, linear decay. `--steps {step}` instead of
minutes makes a run of the same length; on a CPU it repeats exactly.

## Measured

By the same command with `--evaluate DIR`, greedily, through the engine that serves.

| measure | value |
| --- | --- |
| perplexity of held-out self_dialogue, per token ({scored} tokens) | {perplexity} |
| the same before the weights became FP8 | {full} |
| answers with the right fact from notes, values invented anew | {notes} ({among}) |
| the same from earlier turns | {turns} |
| second tool call right to the letter, its id read off a result, functions listed | {calls} |
| says that it does not know, asked for what the notes do not hold | {unknown} |
| load of the busiest expert over the mean, worst layer, over the shares of tokens it was trained on | {load} |
| the same over as many conversations of each, so two thirds real dialogue | {load_talks} |
| answers that end by themselves within 64 tokens | {ended} |

## Five conversations

Unedited; what is said to it was chosen before looking.

{conversations}

## Limits

It states wrong things fluently, and asked for what it was not told it mostly makes something up instead of saying so.
It copies long or rare names with slips, also into tool calls, mixes up facts when there are many, drifts to films and
sport (the dialogues are full of them), cannot reckon, and speaks English only.
"""
