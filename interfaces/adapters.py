"""`nightschool adapters`: what was trained, which adapter serves, and switching between them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from ..errors import NightschoolError
from .printing import AdapterId, AsJson, Home, assistant, at, err, out, show, show_done, when

if TYPE_CHECKING:
    from ..evolve.registry import Registry
    from ..evolve.types import Adapter

adapters = typer.Typer(no_args_is_help=True, help="What was trained, and which adapter serves.")


@adapters.command("list")
def adapters_list(home: Home = None, as_json: AsJson = False) -> None:
    """Every adapter, its verdict, and which one serves."""
    from ..evolve.sealing import is_held

    with assistant(home) as nightschool:
        registry = nightschool.registry
        live, tainted = registry.live(), registry.tainted()
        refused, serving = _serving(registry, nightschool.settings.serving.base)
        rows = []
        for adapter in registry.adapters():
            verdict = registry.verdict(adapter.id)
            state = "tainted" if adapter.id in tainted else ""
            state = state if is_held(adapter) else f"{state} weights gone".strip()
            if live and live.id == adapter.id:
                state = f"live, but refused: {refused}" if refused else "live"
            judged = "not judged" if verdict is None else "accepted" if verdict.accepted else "rejected"
            serves = serving is not None and serving.id == adapter.id
            rows.append({**asdict(adapter), "verdict": judged, "state": state, "serves": serves})
    if as_json:
        show(rows, True, [])
        return
    table = Table(Column("adapter", no_wrap=True), "phase", "made", "verdict", "state")
    for row in rows:
        table.add_row(row["id"], row["phase"], when(row["created_utc"]), row["verdict"], row["state"])
    out.print(table if rows else "no adapters yet; run `nightschool night`", highlight=False)
    out.print(f"serving: {serving.id if serving else 'the base'}", highlight=False)


def _serving(registry: Registry, base: str) -> tuple[str | None, Adapter | None]:
    """Why the live adapter is refused, if it is, and what serves, as `evolve.live` would find; None is the base."""
    used = _id_of(base) if registry.live() else None
    refused = None
    for found in registry.in_service():
        if (reason := _refusal(found, used)) is None:
            return refused, found
        refused = refused or reason
    return refused, None


def _refusal(adapter: Adapter, used: str | None) -> str | None:
    """Why an engine does not load it; where the base in use is not known, by its files alone."""
    from ..evolve.sealing import refusal
    from ..serving.engine import of_another_base

    if used not in (None, adapter.base_id):
        return of_another_base(adapter.id, adapter.base_id, str(used))
    return refusal(adapter.path)


def _id_of(base: str) -> str | None:
    """None of a base that is not there, which is `doctor`'s to tell."""
    from ..serving.base import base_id

    try:
        with err.status("reading the base"):  # its weights, where it is a folder
            return base_id(base)
    except (NightschoolError, OSError):
        return None


@adapters.command()
def promote(adapter: AdapterId, home: Home = None) -> None:
    """Put an adapter into service that the gate has accepted."""
    with assistant(home) as nightschool:
        now = nightschool.registry.promote(adapter)
    show_done(None, False, [f"serving: {now.id}"])


@adapters.command()
def rollback(home: Home = None) -> None:
    """Put back what served before the live adapter."""
    with assistant(home) as nightschool:
        now = nightschool.registry.rollback()
    show_done(None, False, [f"serving: {now.id if now else 'the base'}"])  # to go back once more is another step


@adapters.command()
def prune(
    home: Home = None,
    keep: Annotated[int, typer.Option(min=0, max=10**9, help="How many others that served last to keep.")] = 3,
    apply: Annotated[bool, typer.Option("--apply", help="Erase them; without it they are only listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase the weights of adapters that nothing needs any more. Where they came from stays on record."""
    from ..evolve.sealing import is_held
    from ..pipelines.lock import night_lock

    with assistant(home) as nightschool, ExitStack() as held:
        if apply:
            held.enter_context(night_lock(nightschool.settings.home, nightschool.store.database))
        found = nightschool.registry.prunable(keep)
        size = sum(file.stat().st_size for a in found for file in a.path.glob("*.safetensors"))
        lines = [f"{a.id}  {a.phase}  {when(a.created_utc)}{'' if is_held(a) else '  lost already'}" for a in found]
        erased = nightschool.registry.prune(keep) if apply else []
    command = f"nightschool adapters prune --keep {keep} --apply{at(home)}"
    still = f"{size / 2**20:.1f} MiB, still there; `{command}` erases them"
    last = f"{len(erased)} of {len(found)} erased" if apply else still
    value = {"adapters": [a.id for a in found], "bytes": size, "erased": erased}
    (show_done if apply else show)(value, as_json, [*lines, last] if found else ["nothing to prune"])
    if apply and len(erased) < len(found):
        raise typer.Exit(1)
