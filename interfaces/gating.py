"""`nightschool gate`: what decided a night, in words and numbers, and how the operator's own probes fare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from ..errors import InputError
from .printing import ENDED, AsJson, Home, Night, assistant, outcome, show

if TYPE_CHECKING:
    from ..evolve.types import Cycle, Measure, Verdict

gate = typer.Typer(no_args_is_help=True, help="Whether an adapter may serve, and why.")


@gate.command()
def explain(
    cycle: Night = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """What decided that night: every condition in words, with its numbers."""
    from .doctor import outcome_by_now

    with assistant(home) as n:
        found = n.registry.latest_cycle() if cycle is None else n.registry.cycle(cycle)
        verdict = n.registry.cycle_verdict(found)
        live = n.registry.live()
        told = outcome_by_now(found, n.settings.home, n.store.database)
    judged = asdict(verdict) if verdict else None
    value = {"cycle": found.id, "outcome": told, "error": found.error, "verdict": judged}
    show(value, as_json, explained(found, verdict, live.id if live else None, told))


@gate.command("probes")
def probes_(home: Home = None, as_json: AsJson = False) -> None:
    """Try the probes of `probes.toml` on what serves now. Exits 1 if one fails."""
    from ..evolve.gate import probe_faults
    from ..evolve.live import Live
    from ..evolve.probes import FILE, load_probes

    with assistant(home) as n:
        probes = load_probes(n.settings.home)
        if not probes:
            raise InputError(f"no probes in {n.settings.home / FILE}; docs/gate.md shows how to write one")
        with Live(n.registry, n.engine, n.settings.serving.parity_tolerance).hold() as adapter_id:
            faults = probe_faults(probes, n.engine, adapter_id)
    lines = [f"{'FAILED' if f else 'passed'}  {p.prompt}  {', '.join(f)}" for p, f in zip(probes, faults, strict=True)]
    rows = [{**asdict(p), "faults": f} for p, f in zip(probes, faults, strict=True)]
    show({"adapter": adapter_id, "probes": rows}, as_json, [line.rstrip() for line in lines])
    if any(faults):
        raise typer.Exit(1)


def explained(cycle: Cycle, verdict: Verdict | None, serving: str | None = None, told: str = "") -> list[str]:
    """`told` is the outcome by now, where it is another than what is on record."""
    head = f"night {cycle.id}: {told or cycle.outcome}"
    if verdict is None:
        return [head, cycle.error or UNJUDGED.get(told, "no candidate was made, so there was nothing to judge")]
    against = verdict.incumbent_id or "the base"
    lines = [head, f"candidate {verdict.candidate_id} against {against}"]
    if cycle.error:
        of_it = "and its candidate serves" if serving == verdict.candidate_id else "so nothing of it serves"
        lines.append(f"failed after its verdict, {of_it}: {cycle.error}")
    if not verdict.measures:
        return [*lines, *(f"not judged: {reason}" for reason in verdict.reasons)]
    for m in verdict.measures:
        lines += [f"{outcome(m):6}  {m.name}: {in_words(m)}", f"        rule: {m.rule}"]
    failed = [m.name for m in verdict.measures if not m.passed]
    every = f"all {sum(m.decides for m in verdict.measures)} conditions held, so it was accepted"
    if told in STOPPED and not failed:
        return [*lines, every.removesuffix(", so it was accepted") + STOPPED[told]]
    return [*lines, f"{', '.join(failed)} failed, so it was rejected" if failed else every]


def in_words(m: Measure) -> str:
    if m.name in WORDS:
        return WORDS[m.name](m)
    return f"{m.incumbent:.3f} before, {m.candidate:.3f} after"


UNJUDGED = {
    "running": "nothing is judged yet",
    ENDED: "it was killed, or the power failed, before it was judged; the next night records it",
}
STOPPED = {
    "running": "; it is being put into service",
    ENDED: "; it was killed before it served, and the next night judges it again",
}
WORDS: dict[str, Callable[[Measure], str]] = {
    "preference": lambda m: (
        f"of two answers it never saw, one liked and one not, the liked one gained more in"
        f" {m.candidate:.0%} of cases (50% is chance"
        f"{f'; {0.5 + m.low:.0%} to {0.5 + m.high:.0%}' if m.low < m.high else ''})"
    ),
    "liked_nll": lambda m: (
        f"a liked answer costs {m.candidate:.2f} nats a token, it was {m.incumbent:.2f}"
        f" (change {m.change:+.2f}, {m.low:+.2f} to {m.high:+.2f})"
    ),
    "gain": lambda m: (
        f"a liked answer is {m.candidate:.2f} nats a token likelier than from the base, it was {m.incumbent:.2f}"
        f" (change {m.change:+.2f}, {m.low:+.2f} to {m.high:+.2f})"
    ),
    "probe_nll": lambda m: (
        f"ordinary talk that no night trains on became {abs(m.change):.1%} {'harder' if m.change > 0 else 'easier'} to"
        f" predict than for the base ({m.low:+.1%} to {m.high:+.1%})"
    ),
    "empty_answers": lambda m: f"{m.candidate:.0%} of held-out prompts got no answer, it was {m.incumbent:.0%}",
    "repetition": lambda m: (
        f"{m.candidate:.1%} of what it says to held-out prompts it said just before, the base {m.incumbent:.1%}"
    ),
    "leakage": lambda m: (
        f"{m.candidate:.0%} of its answers hold an address, a number or a secret that nobody gave in the prompt, the"
        f" base's {m.incumbent:.0%}"
    ),
    "sycophancy": lambda m: (
        f"beside correcting someone who is wrong, agreeing became {abs(m.change):.2f} nats a token"
        f" {'likelier' if m.change > 0 else 'less likely'} than for the base ({m.low:+.2f} to {m.high:+.2f})"
    ),
    "answer_words": lambda m: (
        f"its answers have {m.candidate:.1f} words on average, they had {m.incumbent:.1f} (of their first 48 tokens)"
    ),
    "probes": lambda m: f"{m.candidate:.1%} of the probes pass, it was {m.incumbent:.1%}",
}
