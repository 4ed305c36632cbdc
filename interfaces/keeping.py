"""Verbs of the store itself, and forgetting. What a plan would erase is shown on the terminal, and nowhere else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from ..errors import InputError, NotFound, Unerased
from ..memory.types import MemoryKind, Selection
from .printing import (
    AsJson,
    Home,
    Limit,
    assistant,
    checked_files,
    err,
    latest,
    none_found,
    out,
    show,
    show_done,
    show_found,
    when,
)

if TYPE_CHECKING:
    from ..memory.types import ForgetPlan, ForgetReceipt, Memory
    from ..sdk import Assistant

memory = typer.Typer(no_args_is_help=True, help="The store itself.")

PLAN_LINES = 10
UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@memory.command("verify")
def memory_verify(home: Home = None, as_json: AsJson = False) -> None:
    """Compare the facts in SQL with their index. Exits 1 if anything disagrees."""
    with assistant(home) as nightschool:
        found = nightschool.store.verify()
    show(found, as_json, found or ["sound"])
    if found:
        raise typer.Exit(1)


@memory.command()
def rebuild(home: Home = None) -> None:
    """Make the vector and full-text index again from SQL, also with another embedder. Goes on where it stopped."""
    with assistant(home) as nightschool, err.status("embedding") as status:
        count = nightschool.store.rebuild_index(lambda n: status.update(f"{n} memories embedded"))
    out.print(f"{count} memories indexed")


@memory.command("list")
def memory_list(
    user: Annotated[str, typer.Option("--user", help="Whose memories.")] = "default",
    agent: Annotated[str | None, typer.Option("--agent", help="Of one agent; of all by default.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help=f"One of {', '.join(get_args(MemoryKind))}.")] = None,
    limit: Limit = 100,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """What is held of a user, newest first."""
    with assistant(home) as nightschool:
        of_kind = cast("MemoryKind | None", kind)
        held = nightschool.memories(user_id=user, agent_id=agent, kind=of_kind, limit=limit + 1)
        found = latest(held, limit)
        none = none_found("nothing is held", nightschool, user) if not found else ""
    lines = [f"{m.id}  {when(m.created_utc)}  {m.kind}{_ended(m)}: {' '.join(m.text.split())}" for m in found]
    show_found([asdict(m) for m in found], as_json, lines, none)


@memory.command()
def history(
    user: Annotated[str, typer.Option("--user", help="Whose statements.")] = "default",
    agent: Annotated[str, typer.Option("--agent", help="Made to which agent.")] = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """What a user stated of themselves, by subject: what holds now, and what held before."""
    with assistant(home) as nightschool:
        found = nightschool.store.history(user_id=user, agent_id=agent)
        none = none_found("nothing was stated", nightschool, user) if not found else ""
    lines = [f"{m.subject}: {m.text}  ({_held(m)}, said {len(m.source_ids)} times)" for m in found]
    show_found([asdict(m) for m in found], as_json, lines, none)


def _held(memory: Memory) -> str:
    return f"since {when(memory.created_utc)}{_ended(memory)}"


def _ended(memory: Memory) -> str:
    return "" if memory.valid_to is None else f" until {when(memory.valid_to)}"


@memory.command()
def compact(home: Home = None, as_json: AsJson = False) -> None:
    """Give back the space of what is gone, and make recall quick again."""
    with assistant(home) as nightschool:
        before, after = nightschool.store.compact()
    show({"before": before, "after": after}, as_json, [f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now"])


@memory.command()
def export(
    file: Annotated[Path | None, typer.Argument(help="Where to; one in exports/ of the home by default.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Every fact as lines of JSON (docs/export.md), by default into the home, where forgetting reaches it."""
    with assistant(home) as nightschool:
        path, lines = nightschool.store.export(file)
    show({"file": str(path), "lines": lines}, as_json, [f"{path}: {_counted(lines)}"])


@memory.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `memory export` wrote.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Bring an export in. Twice changes nothing; what was forgotten here stays out. Exits 1 if a line was refused."""
    from ..memory.restoring import check_head

    checked_files([file])
    check_head(file)  # before a home is made for it
    with assistant(home, make=True) as nightschool:
        report = nightschool.store.restore(file)
    lines = [f"new: {_counted(report.new)}", f"known: {_counted(report.known)}"]
    lines += [f"forgotten before: {report.forgotten} lines left out"] if report.forgotten else []
    lines += [f"{file}:{number}: {reason}" for number, reason in report.errors.items()]
    value = {"new": report.new, "known": report.known, "forgotten": report.forgotten, "errors": report.errors}
    show(value, as_json, lines)
    if report.errors:
        raise typer.Exit(1)


def _counted(lines: Counter[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in lines.items()) or "nothing"


QUERY = "All memories of --user, of any agent, that say it (memory.recall_threshold) and their turns; joins --id."


def forget(
    user: Annotated[
        str | None,
        typer.Option("--user", help="All that is this user's; with another option, what is theirs among it."),
    ] = None,
    session: Annotated[str | None, typer.Option("--session", help="Of every user, unless --user is given.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="A turn or a memory; may be repeated.")] = None,
    query: Annotated[str | None, typer.Option("--query", help=QUERY)] = None,
    older_than: Annotated[str | None, typer.Option("--older-than", help="Such as 90d or 12h.")] = None,
    apply: Annotated[str | None, typer.Option("--apply", metavar="TOKEN", help="Erase what the plan showed.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Erase without looking at the plan first.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Erase for good: shows what would go, with a token that erases just that, and weights that were trained on it."""
    if all(given is None for given in (user, session, ids or None, query, older_than)):
        raise InputError("forget what? give --user, --session, --id, --query or --older-than")
    if apply is not None and not apply.strip():
        raise InputError(f"--apply is {apply!r}, not a token; the same command without --apply shows one")
    age = None if older_than is None else _seconds(older_than)
    with assistant(home) as nightschool:
        turns, memories = nightschool.store.sort_ids(ids or [])
        named = {"interaction_ids": turns, "memory_ids": memories} if ids else {}
        before = None if age is None else nightschool.store.clock() - age
        plan = nightschool.forget(user_id=user, session_id=session, before_utc=before, query=query, **named)
        if _is_unknown(nightschool, plan):
            asked = {"--user": user, "--session": session, "--id": ids or None, "--query": query}
            given = ", ".join(f"{name} {value!r}" for name, value in asked.items() if value is not None)
            left = "; but bytes of what was forgotten before are not erased yet, see `nightschool memory verify`"
            none = f"nothing is held of {given}; nothing was erased{left if nightschool.store.unfinished() else ''}"
            if older_than is None:
                raise NotFound(none)
            err.print(none, markup=False, highlight=False)  # no failure: all that there was may have aged out
        if apply or yes:
            try:
                receipt = nightschool.forget_apply(replace(plan, token=apply or plan.token))
            except Unerased as error:
                show_done(asdict(error.receipt), as_json, _receipt_lines(error.receipt))
                raise
            show_done(asdict(receipt), as_json, _receipt_lines(receipt))
        else:
            show(asdict(plan), as_json, _plan_lines(nightschool, plan))


def _is_unknown(nightschool: Assistant, plan: ForgetPlan) -> bool:
    """Whether nothing is held of what was named, of whatever age."""
    named = replace(plan.selection, before_utc=None)
    if plan.interaction_ids or plan.memory_ids or named == Selection():
        return False
    at_any_age = nightschool.forget(**asdict(named))
    return not (at_any_age.interaction_ids or at_any_age.memory_ids)


def _plan_lines(nightschool: Assistant, plan: ForgetPlan) -> list[str]:
    lines = [
        f"would erase: {len(plan.interaction_ids)} turns, {len(plan.memory_ids)} memories,"
        f" {len(plan.feedback_ids)} ratings, {len(plan.exports)} exports"
    ]
    lines += [f"  users: {_few(plan.user_ids)}"] if plan.selection.user_id is None and plan.user_ids else []
    held = nightschool.store.memories(plan.memory_ids[:PLAN_LINES]).values()
    lines += [f"  {m.id}  {when(m.created_utc)}  {' '.join(m.text.split())[:60]}" for m in held]
    more = len(plan.memory_ids) - PLAN_LINES
    lines += [f"  and {more} more"] if more > 0 else []
    lines += [f"would erase: {name}" for name in plan.exports]
    live = nightschool.registry.live()
    ends = {live.id: "; it serves, and would no more"} if live else {}
    lines += [f"would taint: adapter {i}, and erase its weights{ends.get(i, '')}" for i in plan.tainted_adapters]
    lines += [f"would taint: snapshot {i}, which keeps its ids" for i in plan.tainted_snapshots]
    return [*lines, f"nothing was changed; the same command with --apply {plan.token} erases just this"]


def _few(names: Sequence[str]) -> str:
    more = len(names) - PLAN_LINES
    return ", ".join(names[:PLAN_LINES]) + (f" and {more} more" if more > 0 else "")


def _receipt_lines(receipt: ForgetReceipt) -> list[str]:
    r = receipt
    lines = [f"erased: {r.interactions} turns, {r.memories} memories, {r.feedback} ratings, {len(r.exports)} exports"]
    lines += [f"erased: {name}; `nightschool memory export` makes a new one" for name in r.exports]
    lines += [f"tainted: snapshot {i}, which keeps its ids" for i in r.tainted_snapshots]
    return lines + [
        f"tainted: adapter {i}, out of service; its weights are erased unless the log names them"
        for i in r.tainted_adapters
    ]


def _seconds(age: str) -> float:
    given = re.fullmatch(rf"(\d{{1,9}})([{''.join(UNITS)}])", age)
    if given is None:
        few = f"a number of at most nine digits with one of {', '.join(UNITS)}, such as 90d"
        raise InputError(f"--older-than is {age[:20]!r}, not {few}")
    return int(given[1]) * UNITS[given[2]]
