"""The command line: parse, call, print. Every read takes `--json`; the exit code is the answer.

`night` exits 0 promoted, 3 nothing to learn, 4 rejected, 1 failed. Progress and errors go to standard error.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, NightschoolError, SettingsError, StoreError
from ..memory.types import FeedbackEvent, MemoryKind
from ..settings import load_settings
from .adapters import adapters
from .auditing import audit
from .bases import PassingOn, bases, serve
from .chat import chat
from .gating import gate
from .keeping import forget, memory
from .printing import (
    ENDED,
    NIGHT_EXIT,
    Agent,
    AsJson,
    Home,
    Limit,
    Night,
    ReplyId,
    User,
    assistant,
    at,
    checked_files,
    err,
    named,
    none_found,
    out,
    show,
    show_done,
    show_found,
    when,
)

if TYPE_CHECKING:
    from ..evolve.types import Excluded
    from ..memory.types import Recall

app = typer.Typer(no_args_is_help=True, add_completion=False)
topics = typer.Typer(no_args_is_help=True, help="What people keep asking.")
snapshots = typer.Typer(no_args_is_help=True, help="What each night learnt from, and what it left out.")
app.add_typer(adapters, name="adapters")
app.add_typer(topics, name="topics")
app.add_typer(snapshots, name="snapshots")
app.add_typer(audit, name="audit")
app.add_typer(gate, name="gate")
app.add_typer(memory, name="memory")
app.add_typer(bases, name="base")
app.command()(chat)
app.command()(forget)
app.command(cls=PassingOn)(serve)


DEMO_HOME = "Where it is kept (default: a new temporary folder)."
TIMES = [f"%Y-%m-%d{time}" for time in ("", *(f"{t}%H:%M:%S{zone}" for t in "T " for zone in ("", "%z")))]


def main() -> None:
    """Entry point: errors that we raise on purpose become one line and exit code 1."""
    if isinstance(sys.stdout, TextIOWrapper):  # not every terminal has the letters of what people said
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except (NightschoolError, OSError) as error:  # the latter says of which file
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(1)
    except UnicodeEncodeError as error:
        err.print(f"error: {error.object!r} is no text in UTF-8", style="red", markup=False)
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nightschool {version_of('nightschool')}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """An assistant that goes to school at night."""


def seconds(time: datetime | None) -> float | None:
    """Since 1970, of a time in UTC unless it names another zone."""
    return None if time is None else (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


# -- the day ---


@app.command()
def init(home: Home = None) -> None:
    """Make a home: the database, the index and a settings file to edit."""
    with assistant(home, make=True, begin=True) as nightschool:
        folder = nightschool.settings.home
    path = folder / "settings.toml"
    if not path.exists():
        path.touch(mode=0o600)  # it may come to hold a password
        path.write_text(
            "# Sections and fields: nightschool doctor --json shows them with their values.\n", encoding="utf-8"
        )
    next_ = f"next: nightschool import FILE{at(home)}, or nightschool chat{at(home)}"
    out.print(f"ready: {folder}\n{next_}", markup=False, highlight=False)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="Files to read.")],
    home: Home = None,
    user: Annotated[str, typer.Option("--user", help="Whose the conversations are that name no user.")] = "default",
    agent: Annotated[str, typer.Option("--agent", help="With which agent, where they name none.")] = "",
    as_json: AsJson = False,
) -> None:
    """Read conversations: OpenAI chat lines (with ratings), ShareGPT, or a ChatGPT export. Twice changes nothing."""
    from ..memory.importer import import_files

    checked_files(files)
    kept = 0

    def progress(conversations: int) -> None:
        nonlocal kept
        kept = conversations
        status.update(f"{kept} conversations")

    with assistant(home, make=True) as nightschool, err.status("reading") as status:
        store, owner = nightschool.store, {"user_id": user, "agent_id": agent}
        try:
            report = import_files(store, files, now=store.clock(), **owner, progress=progress)
        except (KeyboardInterrupt, StoreError):
            err.print(f"interrupted: {kept} conversations are in, and the same command brings the others in")
            raise
    lines = [
        f"{report.conversations} conversations: {report.interactions_new} turns new,"
        f" {report.interactions_known} known, {report.feedback_new} new ratings and corrections"
    ]
    lines += [f"forgotten before: {report.forgotten} turns left out"] if report.forgotten else []
    lines += [f"{e.file}:{e.line}: {e.reason}" for e in report.errors]
    show(asdict(report), as_json, lines)
    if report.errors:
        raise typer.Exit(1)


def _rating(given: float | None) -> float | None:
    if given is not None and not -1 <= given <= 1:  # nothing is true of NaN
        raise typer.BadParameter(f"{given:g} is not a number from -1 to 1")
    return given


@app.command(context_settings={"ignore_unknown_options": True})  # -1 is a rating and no option
def rate(
    reply: ReplyId,
    rating: Annotated[float | None, typer.Argument(callback=_rating, help="From -1 to 1.")] = None,
    correction: Annotated[str | None, typer.Option(help="What should have been said.")] = None,
    comment: Annotated[str | None, typer.Option(help="Words about it.")] = None,
    event: Annotated[
        FeedbackEvent | None, typer.Option(help="What was done with it; edited needs --correction.")
    ] = None,
    home: Home = None,
) -> None:
    """What you think of a reply: a rating from -1 to 1, the answer you wanted, a comment; or what was done with it."""
    with assistant(home) as nightschool:
        reply = nightschool.store.id_of(reply)
        nightschool.rate(reply, rating, correction=correction, comment=comment, event=event)
    out.print("noted")


@app.command()
def remember(
    text: Annotated[str, typer.Argument(help="What to keep.")],
    home: Home = None,
    user: User = "default",
    agent: Agent = "",
    shared: Annotated[bool, typer.Option("--shared", help="Found for every user and agent.")] = False,
    replaces: Annotated[str | None, typer.Option("--replaces", metavar="ID", help="The note that it corrects.")] = None,
) -> None:
    """Keep a note, in place of another if it is given."""
    with assistant(home, make=True) as nightschool:
        kept = nightschool.remember(text, user_id=user, agent_id=agent, shared=shared, replaces=replaces)
    out.print(kept.id, highlight=False)


@app.command()
def recall(
    query: Annotated[str, typer.Argument(help="What to look for, in any words.")],
    home: Home = None,
    user: User = "default",
    agent: Agent = "",
    session: Annotated[str | None, typer.Option("--session", help="Only of this session.")] = None,
    kind: Annotated[MemoryKind | None, typer.Option(help="Only memories of this kind.")] = None,
    since: Annotated[datetime | None, typer.Option(formats=TIMES, help="Only from this time on (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(formats=TIMES, help="Only from before this time (UTC).")] = None,
    as_of: Annotated[datetime | None, typer.Option(formats=TIMES, help="As if it were this time (UTC).")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many (default: recall_limit of the settings).")] = None,
    threshold: Annotated[float | None, typer.Option(help="None that scores less (default: recall_threshold).")] = None,
    as_json: AsJson = False,
) -> None:
    """What memory holds on something, and why it was found."""
    since_utc, until_utc, as_of_utc = map(seconds, (since, until, as_of))
    with assistant(home) as nightschool:
        found = nightschool.store.recall(
            query,
            user_id=user,
            agent_id=agent,
            session_id=session,
            kind=kind,
            since=since_utc,
            until=until_utc,
            as_of=as_of_utc,
            limit=limit,
            threshold=threshold,
        )
        none = none_found("nothing relevant", nightschool, user) if not found else ""
    show_found([asdict(r) for r in found], as_json, list(map(_recall_line, found)), none)


def _recall_line(found: Recall) -> str:
    why = ", ".join(f"{name} {value:.2f}" for name, value in found.parts.items())
    memory = found.memory
    return f"{found.score:.2f}  {memory.text}  ({when(memory.created_utc)}, {memory.kind}; {why})"


# -- the night ---


@app.command()
def night(home: Home = None, as_json: AsJson = False) -> None:
    """Learn from what was heard. Exits 0 promoted, 3 nothing to learn, 4 rejected, 1 failed."""
    from ..pipelines import nightly

    started = time.monotonic()

    def progress(line: str) -> None:
        typer.echo(f"{time.monotonic() - started:6.0f}s  {line}", err=True)  # rich would close stdout too

    try:
        with assistant(home) as n:
            cycle = nightly.run(n.store, n.registry, lambda: n.engine, n.settings, progress)
            verdict = n.registry.cycle_verdict(cycle)
    except Exception as error:  # whatever it was, as the night records it
        if as_json:
            show_done({"outcome": "failed", "error": f"{type(error).__name__}: {error}"}, True, [])
        raise
    value = {**asdict(cycle), "outcome": cycle.outcome, "verdict": asdict(verdict) if verdict else None}
    show_done(value, as_json, [f"night {cycle.id}: {cycle.outcome}"])  # the exit says what the night was
    raise typer.Exit(NIGHT_EXIT[cycle.outcome])


# -- what is learnt from ---


@topics.command("list")
def topics_list(home: Home = None, limit: Limit = 30, as_json: AsJson = False) -> None:
    """What people keep asking, most recurrent first: the decayed count of sessions, and its words."""
    with assistant(home) as nightschool:
        known = nightschool.store.topics(nightschool.store.clock())
    found = known[:limit]
    lines = [f"{t.id}  {t.recurrence:6.1f}  {t.sessions:5} sessions  {when(t.last_seen_utc)}  {t.label}" for t in found]
    show([asdict(topic) for topic in found], as_json, lines or ["no topics yet"])
    if len(found) < len(known):
        err.print(f"{len(found)} of {len(known)} topics; --limit shows more", highlight=False)


@topics.command("show")
def topics_show(
    topic: Annotated[str, typer.Argument(help="Its id, see `topics list`.")],
    home: Home = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """One topic: how often it comes back, and the latest requests in it."""
    with assistant(home) as nightschool:
        store = nightschool.store
        known = next((t for t in store.topics(store.clock()) if t.id == topic), None)
        if known is None:
            raise InputError(f"no topic {topic}; see `nightschool topics list`")
        groups = store.topic_groups()
        members = (i for i in store.interactions() if i.topic_id and groups.get(i.topic_id) == topic)
        asked = sorted(members, key=lambda i: -i.created_utc)
    users = len({i.user_id for i in asked})
    requests = [{"id": i.id, "user_id": i.user_id, "text": i.text, "created_utc": i.created_utc} for i in asked]
    lines = [f"{known.label}: asked in {known.sessions} sessions by {users} users, recurrence {known.recurrence:.1f}"]
    lines += [f"  {when(i.created_utc)}  {i.id}  {i.text}" for i in asked[:limit]]
    show({**asdict(known), "users": users, "requests": requests[:limit]}, as_json, lines)


@snapshots.command("list")
def snapshots_list(home: Home = None, as_json: AsJson = False) -> None:
    """Every snapshot, oldest first: how many rows of each part, and how many interactions were left out."""
    with assistant(home) as nightschool:
        registry = nightschool.registry
        found: list[dict[str, Any]] = [
            {
                "id": i,
                "censor": registry.censor_of(i),
                "rows": _parts(registry.snapshot_rows(i)),
                "excluded": _left_out(excluded),
                "left_out": len({named for e in excluded for named in e.interaction_ids}),  # some for two reasons
            }
            for i, excluded in ((i, registry.excluded(i)) for i in registry.snapshot_ids())
        ]
    lines = [f"{s['id']}  {_counted(s['rows'])}; left out: {s['left_out']}" for s in found]
    show(found, as_json, lines or ["no snapshot yet; run `nightschool night`"])


@snapshots.command("show")
def snapshots_show(
    snapshot: Annotated[str, typer.Argument(help="Its id, see `snapshots list`.")],
    excluded: Annotated[bool, typer.Option("--excluded", help="Name every interaction that was left out.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """One snapshot: its rows by part and origin, and what was left out, counted by reason."""
    with assistant(home) as nightschool:
        rows = nightschool.registry.snapshot_rows(snapshot)
        out_of_it, censor = nightschool.registry.excluded(snapshot), nightschool.registry.censor_of(snapshot)
    how = Counter(row["how"] for row in rows if row["part"] == "pairs")
    counts = {"rows": _parts(rows), "pairs": how, "excluded": [asdict(e) for e in out_of_it]}
    value = {"id": snapshot, "censor": censor, **counts}
    lines = [f"scored:   by the Censor {censor or 'without a version'}"]
    lines += [f"rows:     {_counted(_parts(rows))}", f"pairs:    {_counted(how) or 'none'}"]
    for e in out_of_it:
        lines.append(f"left out: {len(e.interaction_ids)}, {e.reason}")
        lines += [f"  {i}" for i in e.interaction_ids] if excluded else []
    show(value, as_json, lines)


def _parts(rows: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["part"] for row in rows)


def _left_out(excluded: tuple[Excluded, ...]) -> dict[str, int]:
    return {e.reason: len(e.interaction_ids) for e in excluded}


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items())


# -- what came of it ---


@app.command()
def report(
    cycle: Night = None,
    home: Home = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page there.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Held-out prompts to answer before and after.")] = 3,
    as_json: AsJson = False,
) -> None:
    """What a night was: what it was taught, what the gate measured, answers before and after, what it cost."""
    from ..evolve.report import Compared, side_by_side
    from ..evolve.report import report as gather
    from . import reporting
    from .doctor import outcome_by_now

    if html:
        reporting.check_page(html)  # before the base answers
    with assistant(home) as n:
        found = gather(n.store, n.registry, cycle)
        if outcome_by_now(found.cycle, n.settings.home, n.store.database) == ENDED:
            found = reporting.as_ended(found)
        tolerance = n.settings.serving.parity_tolerance
        compared: list[Compared] = []
        try:
            if examples and found.cycle.candidate_id:
                compared = side_by_side(n.store, n.registry, n.engine, found.cycle, examples, tolerance)
        except (NightschoolError, RuntimeError) as error:  # forgotten since, of another base, or a card that is full
            err.print(f"no answers side by side: {error}", markup=False, highlight=False)
    if html:
        reporting.write_html(found, compared, html)
        err.print(f"written: {html}", markup=False, highlight=False)
    if as_json:
        show(reporting.to_json(found, compared), True, [])
    elif not html:
        reporting.printed(found, compared, out)


@app.command()
def doctor(home: Home = None, as_json: AsJson = False) -> None:
    """Versions, counts, and whether base and adapter in service are there and fit; settings with --json."""
    from .doctor import examine

    try:
        found = examine(load_settings(home))
    except SettingsError as error:  # of which whoever watches this command shall hear as of any other problem
        found = {"problems": [str(error)]}
    show(found, as_json, [f"{key}: {value}" for key, value in found.items() if key != "settings"])
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def demo(home: Annotated[Path | None, typer.Option(parser=named, metavar="PATH", help=DEMO_HOME)] = None) -> None:
    """The main job in a few minutes: conversations with feedback go in, one night, a better adapter answers."""
    from .demo import run

    raise typer.Exit(run(home, out, err))


if __name__ == "__main__":
    main()
