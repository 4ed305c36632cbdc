"""`nightschool demo`: the main job from start to end, on conversations with an invented bicycle workshop.

Nothing is staged: the conversations are imported as any user's would be, the night is the night, and if the gate
rejects the candidate the demo says so and exits with the night's code.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import which

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..evolve import lineage
from ..memory.importer import import_files
from ..pipelines import nightly
from ..sdk import Assistant
from ..settings import load_settings, make_home
from .demo_data import FACTS, QUESTIONS, conversations
from .printing import CONTROLS, NIGHT_EXIT, assistant, at

SEED = 0
INVENTED = ("rider-", "visitor-")  # who speaks in the demo


def run(home: Path | None, out: Console, err: Console) -> int:
    """Returns the exit code of the night. InputError where the memory would not be that of the demo's own home."""
    settings = load_settings(home or Path(tempfile.mkdtemp(prefix="nightschool-demo-")))
    folder = settings.home
    make_home(folder)
    if settings.memory.database_url or settings.memory.index_url:
        raise InputError(
            "the demo invents people, and memory.database_url or memory.index_url says that they would go where others"
            " are; unset NIGHTSCHOOL_DATABASE_URL and NIGHTSCHOOL_MEMORY_INDEX_URL for it"
        )
    with assistant(folder, make=True) as nightschool:
        if any(not user.startswith(INVENTED) for user in nightschool.store.users()):
            raise InputError(
                f"{folder} holds what others said, and the demo would mix invented people in; name another"
            )
        _import(nightschool, out)
        out.print("\n[bold]2  before the night[/]: the base answers questions that nobody asked in these words")
        before = _answers(nightschool)
        out.print("[bold]3  the night[/]")
        started = time.monotonic()
        n = nightschool
        cycle = nightly.run(
            n.store, n.registry, lambda: n.engine, n.settings, lambda line: _progress(err, started, line)
        )
        out.print(f"\n[bold]4  after the night[/]: {cycle.outcome}")
        _show_answers(out, before, _answers(nightschool))
        _audit(nightschool, out)
    go_on = ", ".join(f"{_program()} {command}{at(folder)}" for command in ("chat", "report"))
    out.print(f"\nhome: {folder}\ngo on: {go_on}", highlight=False, soft_wrap=True)
    return NIGHT_EXIT[cycle.outcome]


def _import(nightschool: Assistant, out: Console) -> None:
    now = nightschool.store.clock()
    with tempfile.TemporaryDirectory() as elsewhere:  # the home holds nothing that `forget` does not reach
        path = Path(elsewhere) / "demo.jsonl"
        path.write_text("".join(json.dumps(c) + "\n" for c in conversations(SEED, now)), encoding="utf-8")
        report, again = (import_files(nightschool.store, [path], now=now) for _ in range(2))
    out.print(
        f"[bold]1  conversations go in[/]: {report.conversations} with a bicycle workshop,"
        f" {report.interactions_new} turns, {report.feedback_new} ratings and corrections",
        highlight=False,
    )
    out.print(f"   once more: {again.interactions_new} new, {again.interactions_known} known", highlight=False)
    topics = sorted(nightschool.store.topics(now), key=lambda t: -t.recurrence)[:4]
    often = ", ".join(f"{t.label} ({t.recurrence:.1f})" for t in topics)
    out.print(f"   asked most, in sessions with half-life of 30 days: {often}", highlight=False)


def _answers(nightschool: Assistant) -> list[str]:
    """Each question from a visitor of its own, so that no earlier answer is remembered into the next."""
    return [nightschool.reply(q, user_id=_visitor(), session_id="visit").text for q in QUESTIONS]


def _visitor() -> str:
    return f"visitor-{time.time_ns()}"


def _progress(err: Console, started: float, line: str) -> None:
    err.print(f"{time.monotonic() - started:6.0f}s  {line}", markup=False, highlight=False)


def _show_answers(out: Console, before: Sequence[str], after: Sequence[str]) -> None:
    table = Table("question", "before", "after", show_lines=True)
    for row in zip(QUESTIONS, before, after, strict=True):
        table.add_row(*(Text(cell.translate(CONTROLS)) for cell in row))
    out.print(table)
    right = f"{_right(before)} before the night, {_right(after)} after it"
    out.print(f"   with the right fact, of {len(QUESTIONS)}: {right}", highlight=False)


def _right(answers: Sequence[str]) -> int:
    return sum(FACTS[question] in answer for question, answer in zip(QUESTIONS, answers, strict=True))


def _program() -> str:
    """How to call the command line from here: `make demo` runs it from an environment that no shell knows yet."""
    called = Path(sys.argv[0])
    return "nightschool" if which("nightschool") or called.name != "nightschool" else shlex.quote(str(called))


def _audit(nightschool: Assistant, out: Console) -> None:
    reply = nightschool.reply(QUESTIONS[0], user_id=_visitor(), session_id="visit")
    found = lineage.why(nightschool.store, nightschool.registry, reply.id)
    command = f"{_program()} audit why {reply.id}{at(nightschool.settings.home)}"
    out.print(f"[bold]5  why that answer[/]: {command}", highlight=False, soft_wrap=True)
    if found.lineage:
        taught = found.lineage.sources
        users, turns = {s.user_id for s in taught}, sum(len(s.interaction_ids) for s in taught)
        out.print(
            f"   adapter {found.lineage.adapter.id}, taught by {turns} turns of {len(users)} people", highlight=False
        )
        for reason in found.lineage.verdict.reasons if found.lineage.verdict else ():
            out.print(f"   {reason}", markup=False, highlight=False)
    else:
        out.print("   the base answered: nothing was promoted")
    disagreements = lineage.verify(nightschool.store, nightschool.registry)
    out.print(f"   audit verify: {disagreements or 'sound, every id re-derives'}", markup=False, highlight=False)
