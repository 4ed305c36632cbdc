"""A night's report on the terminal, and as one HTML file that needs nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.resources import files
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..errors import InputError
from ..evolve.report import Compared, Report
from ..evolve.types import Measure
from .printing import CONTROLS, ENDED, outcome, when

MARK = b'content="nightschool report"'

TOPICS = 12  # the rest are one line
NIGHTS = 4  # side by side on a terminal; the page has all
EARLIER = 30  # nights before those, one a line


def to_json(report: Report, compared: Sequence[Compared]) -> dict[str, Any]:
    return {**asdict(report), "examples": [asdict(c) for c in compared]}


def as_ended(report: Report) -> Report:
    """The same of a night that ended without a word."""
    *earlier, last = report.nights
    return replace(report, outcome=ENDED, nights=(*earlier, replace(last, outcome=ENDED)))


def printed(report: Report, compared: Sequence[Compared], out: Console) -> None:
    for line in summary(report):
        out.print(line.translate(CONTROLS), markup=False, highlight=False)
    _table(
        out,
        "taught" if report.taught else "gathered, taught nothing",
        ("topic", "share of the weight", "rows"),
        [(t.label, f"{t.share:.1%}", t.rows) for t in topics(report)],
    )
    _table(out, "measured", MEASURE_HEAD, [measure_row(m) for m in report.measures])
    _table(out, "left out", ("why", "turns"), report.excluded)
    _table(out, "cost", PHASE_HEAD, phase_rows(report))
    (name, *nights), *rows = zip(night_head(report), *night_rows(report)[-NIGHTS:], strict=True)
    _table(out, "over the nights", (Column(name, no_wrap=True), *nights), rows)
    _earlier_nights(report, out)
    _table(out, "held-out prompts", ("prompt", "before", "after"), [(last(c), c.before, c.after) for c in compared])


def _earlier_nights(report: Report, out: Console) -> None:
    """Those for which there was no room beside the last, by the ids that `report` and `gate explain` take."""
    earlier = [row[:3] for row in night_rows(report)[:-NIGHTS]]
    _table(out, "earlier nights", night_head(report)[:3], earlier[-EARLIER:])
    if more := len(earlier[:-EARLIER]):
        out.print(f"and {more} nights before these; --json and --html have all", highlight=False)


def _table(out: Console, title: str, head: Sequence[str | Column], rows: Sequence[Sequence[Any]]) -> None:
    if rows:
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(Text(str(cell).translate(CONTROLS)) for cell in row))  # what people write is no markup
        out.print(table)


# -- the same for both ---

PHASE_HEAD = ("phase", "rows", "of them the base's own", "passes", "steps", "seconds", "peak MB")
MEASURE_HEAD = ("measure", "before", "after", "change", "interval", "rule", "")


def summary(report: Report) -> list[str]:
    cycle = report.cycle
    lines = [f"night {cycle.id} of {when(cycle.started_utc)}: {report.outcome}", *_gathered(report)]
    if cycle.candidate_id:
        lines.append(f"candidate {cycle.candidate_id} against {report.incumbent_id or 'the base'}")
    if report.withdrawn:
        lines.append("its candidate was withdrawn since: what taught it was forgotten")
    if report.minutes is not None:
        lines.append(f"took {report.minutes:.1f} minutes")
    if cycle.candidate_id and report.phases == ():
        lines.append("made no new adapter: one of an earlier night was judged again")
    if (least := min((p.epochs / p.asked for p in report.phases or ()), default=1.0)) < 1:
        lines.append(f"night.budget_minutes had room for {least:.0%} of the passes; raise it to learn all there is")
    if not report.measures:
        lines += [f"not judged: {reason}" for reason in report.reasons]
    if cycle.error:
        lines.append(f"failed: {cycle.error}" if report.outcome == "failed" else cycle.error)
    return lines


def _gathered(report: Report) -> list[str]:
    if report.new_turns is None:
        runs = report.outcome == "running"
        return ["it has not read the memory yet" if runs else "it ended before it read the memory"]
    taught = ", ".join(f"{n} {part}" for part, n in report.parts.items() if part != "held_out") or "nothing"
    held_out = report.parts.get("held_out", 0)
    return [
        f"turns in it that no night before learnt from: {report.new_turns}",
        f"{'learnt from' if report.taught else 'gathered'}: {taught}",
        f"held out to judge on: {held_out} answers of {report.judges} users or sessions",
    ]


def topics(report: Report) -> Sequence[Any]:
    from ..evolve.report import TaughtTopic

    head, rest = report.topics[:TOPICS], report.topics[TOPICS:]
    if not rest:
        return head
    return [*head, TaughtTopic(f"{len(rest)} more", sum(t.share for t in rest), sum(t.rows for t in rest))]


def measure_row(m: Measure) -> tuple[str, ...]:
    change, low, high = m.worded
    interval = f"[{low}, {high}]" if m.low < m.high else ""  # of a share of a few answers none is drawn
    numbers = (f"{m.incumbent:.3f}", f"{m.candidate:.3f}", change, interval)
    return (m.name, *numbers, m.rule, outcome(m))


def phase_rows(report: Report) -> list[tuple[Any, ...]]:
    return [
        (p.phase, p.rows, p.replayed, f"{p.epochs:.2g}", p.steps, round(p.seconds), p.peak_mb)
        for p in report.phases or ()
    ]


def measured(report: Report) -> list[str]:
    """What was measured on any of the nights; rules come and go."""
    return list(dict.fromkeys(name for night in report.nights for name in night.measures))


def night_head(report: Report) -> tuple[str, ...]:
    return ("night", "id", "outcome", *measured(report))


def night_rows(report: Report) -> list[tuple[str, ...]]:
    names = measured(report)
    return [
        (
            when(n.started_utc),
            n.cycle_id,
            n.outcome,
            *(f"{n.measures[k]:.3f}" if k in n.measures else "" for k in names),
        )
        for n in report.nights
    ]


def last(compared: Compared) -> str:
    return compared.prompt[-1]["content"]


# -- HTML ---


def write_html(report: Report, compared: Sequence[Compared], path: Path) -> None:
    """One file without a script or a link; every text in it is escaped."""
    from jinja2 import Environment

    check_page(path)
    template = files("nightschool.interfaces").joinpath("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    values = {
        "report": report,
        "summary": summary(report),
        "topics": topics(report),
        "measure_head": MEASURE_HEAD,
        "measures": [measure_row(m) for m in report.measures],
        "phases": phase_rows(report),
        "phase_head": PHASE_HEAD,
        "night_head": night_head(report),
        "nights": night_rows(report),
        "compared": [(last(c), c.before, c.after) for c in compared],
        "pictures": pictures(report),
    }
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # for its owner alone
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(page.render(**values))
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)  # it holds what people said
        raise


def check_page(path: Path) -> None:
    """InputError if it cannot be drawn or written, or what stands there is no page of ours, which alone is replaced."""
    if not find_spec("matplotlib"):
        raise InputError("--html needs matplotlib for its pictures; run `pip install 'nightschool[report]'`")
    if path.is_dir():
        raise InputError(f"--html is {path}, which is a folder; name a file in it, such as {path / 'night.html'}")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise InputError(f"--html is {path}, and {path.parent} is no folder to write into; make it, or name another")
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if not (head := file.read(1000)) or MARK in head:
                return
    raise InputError(f"--html is {path}, which is there and is no report; it was left as it is, so give another name")


def pictures(report: Report) -> list[str]:
    """SVG: each measure's change with its interval, and each measure over the nights."""
    import matplotlib

    matplotlib.use("svg")
    drawn = [_intervals([m for m in report.measures if m.decides])] if report.measures else []
    if sum(bool(night.measures) for night in report.nights) > 1:
        drawn.append(_curve(report))
    return drawn


def _intervals(measures: Sequence[Measure]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.45 * len(measures)), layout="constrained")
    axes = figure.subplots()
    for at, m in enumerate(reversed(measures)):
        colour = "tab:green" if m.passed else "tab:red"
        axes.plot([m.low, m.high], [at, at], color=colour, linewidth=3, alpha=0.5)
        axes.plot([m.change], [at], marker="o", color=colour)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(measures)), [m.name for m in reversed(measures)])
    axes.set_xlabel("change, with its interval; the rules say against whom")
    return _svg(figure)


def _curve(report: Report) -> str:
    from matplotlib.figure import Figure

    names = measured(report)
    figure = Figure(figsize=(7, 1.6 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        for promoted, style in ((True, "o-"), (False, "x")):
            nights = [n for n in report.nights if name in n.measures and (n.outcome == "promoted") is promoted]
            days = [datetime.fromtimestamp(n.started_utc, UTC) for n in nights]
            axes.plot(days, [n.measures[name] for n in nights], style, label="promoted" if promoted else "not")
        axes.set_ylabel(name)
    figure.axes[0].legend(loc="upper left", fontsize="small")
    return _svg(figure)


def _svg(figure: Any) -> str:
    written = StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue().split("?>", 1)[-1].split('.dtd">', 1)[-1]
