"""What a night was: read back from what it left, printed, and written as one page."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
from nightschool.content import Message
from nightschool.errors import InputError, NotFound
from nightschool.evolve import dataset
from nightschool.evolve.registry import Registry
from nightschool.evolve.report import Compared, Report, report, side_by_side
from nightschool.evolve.sealing import seal
from nightschool.evolve.types import Cycle, Measure, PhaseCost, Verdict
from nightschool.interfaces import cli, reporting
from nightschool.interfaces.reporting import printed as print_report
from nightschool.interfaces.reporting import to_json, write_html
from nightschool.memory.store import MemoryStore
from nightschool.serving.engine import WEIGHTS
from rich.console import Console
from typer.testing import CliRunner

MEASURES = (
    Measure("preference", 0.5, 0.7, 0.2, 0.1, 0.3, True, "interval above .5"),
    Measure("probe_nll", 4.0, 4.4, 0.1, 0.05, 0.15, False, "at most 5% above the base on average"),
)


class NamingEngine:
    """Says which adapter it answers with."""

    base_id = "base"

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def adapters(self) -> list[str]:
        return self.loaded

    def load(self, adapter_id: str, path: Path) -> None:
        self.loaded.append(adapter_id)

    def discard(self, adapter_ids: Collection[str]) -> None:
        pass

    def unload(self, adapter_id: str) -> None:
        self.loaded.remove(adapter_id)

    def generate(
        self, prompts: Sequence[Sequence[Message]], *, adapter: str | None = None, sampling: object = None
    ) -> list[str]:
        return [f"<b>{adapter or 'base'}</b>" for _ in prompts]


@pytest.fixture
def registry(quick_store: MemoryStore) -> Iterator[Registry]:
    return Registry.of(quick_store)


@pytest.fixture
def night(quick_store: MemoryStore, registry: Registry) -> Cycle:
    """A night that was rejected, on ten rated turns of ten users."""
    for i in range(10):
        turn: list[Message] = [{"role": "user", "content": f"<i>wheel</i> number {i}"}]
        made = quick_store.record(turn, f"answer {i}", user_id=f"user {i}", session_id="s")
        quick_store.rate(made.id, rating=1 if i % 2 else -1)
    return rejected(quick_store, registry)


def rejected(store: MemoryStore, registry: Registry, weights: bytes = b"weights", trains: bool = True) -> Cycle:
    cycle_id = registry.open_cycle()
    snapshot = dataset.freeze(store, store.settings, now=store.clock())
    registry.add_snapshot(snapshot, dataset.to_rows(snapshot))
    folder = registry.building()
    (folder / WEIGHTS).write_bytes(weights)
    cost = {
        "rows": 5,
        "replay": 2,
        "plan": {"epochs": 0.5},
        "asked": 1.0,
        "steps": 3,
        "seconds": 1.5,
        "peak_mb": 700,
    }
    facts = {"base_id": "base", "snapshot_id": snapshot.id, "parent_id": None, "details": cost}
    adapter = seal(folder, phase="sft", created_utc=store.clock(), **facts)
    registry.add(adapter)
    registry.add_verdict(Verdict(adapter.id, None, snapshot.id, False, MEASURES, ("drifted",)), cycle_id)
    found = {"snapshot_id": snapshot.id, "excluded": [asdict(e) for e in snapshot.excluded]}
    trained = [asdict(PhaseCost.of(adapter))] if trains else []
    registry.update_cycle(cycle_id, finished_utc=store.clock() + 120, trained=trained, **found)
    return registry.cycle(cycle_id)


def test_a_night_tells_what_it_left_out_and_not_what_a_later_one_does_of_the_same_snapshot(
    quick_store: MemoryStore, registry: Registry
) -> None:
    assert report(quick_store, registry, rejected(quick_store, registry).id).excluded == ()
    made = quick_store.record([{"role": "user", "content": "And?"}], "So.", user_id="ada", session_id="s")
    quick_store.rate(made.id, rating=0)
    later = rejected(quick_store, registry)
    first, second = (report(quick_store, registry, night.id) for night in registry.cycles())
    assert second.cycle == later and second.cycle.snapshot_id == first.cycle.snapshot_id
    assert (first.excluded, second.excluded) == ((), (("rated neither good nor bad", 1),))


def test_report_says_what_came_in_what_was_taught_and_what_it_cost(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    found = report(quick_store, registry)
    assert (found.cycle, found.outcome, found.minutes) == (night, "rejected", 2.0)
    assert found.parts["held_out"] > 0 and found.parts["examples"] > 0
    assert sum(topic.share for topic in found.topics) == pytest.approx(1.0)
    assert sum(topic.rows for topic in found.topics) == sum(n for part, n in found.parts.items() if part != "held_out")
    assert found.measures == MEASURES
    assert found.phases == (PhaseCost(night.candidate_id, "sft", 5, 2, 0.5, 1.0, 3, 1.5, 700),)


def test_curve_has_every_night_up_to_this_one(quick_store: MemoryStore, registry: Registry, night: Cycle) -> None:
    quick_store.clock.now += 86_400
    later = rejected(quick_store, registry)
    assert [n.cycle_id for n in report(quick_store, registry, later.id).nights] == [night.id, later.id]
    assert [n.cycle_id for n in report(quick_store, registry, night.id).nights] == [night.id]


def test_a_night_tells_what_is_new_in_it_and_costs_what_it_trained(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    assert report(quick_store, registry).new_turns == 10
    quick_store.clock.now += 86_400
    again = report(quick_store, registry, rejected(quick_store, registry, trains=False).id)
    assert (again.new_turns, again.phases) == (0, ())
    made = quick_store.record([{"role": "user", "content": "a bell?"}], "yes", user_id="user 3", session_id="t")
    quick_store.rate(made.id, rating=1)
    quick_store.clock.now += 86_400
    other = report(quick_store, registry, rejected(quick_store, registry, b"others").id)
    assert (other.new_turns, len(other.phases)) == (1, 1)


@pytest.mark.parametrize(
    ("asked", "hidden"),
    [
        ("my email is ada.lovelace@example.org", "lovelace"),
        ("my password is correcthorse", "correcthorse"),
        ("card 4111 1111 1111 1111", "4111"),
    ],
)
def test_the_label_of_a_topic_is_masked_before_it_is_cut_into_words(
    quick_store: MemoryStore, registry: Registry, night: Cycle, asked: str, hidden: str
) -> None:
    made = quick_store.record([{"role": "user", "content": asked}], "hm", user_id="ann", session_id="s")
    quick_store.rate(made.id, rating=1)
    rejected(quick_store, registry)
    assert hidden not in json.dumps(to_json(report(quick_store, registry), []), default=str)


def test_a_night_that_taught_nothing_says_so_and_why(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    quick_store.clock.now += 86_400
    cycle_id = registry.open_cycle()
    registry.update_cycle(cycle_id, snapshot_id=night.snapshot_id)
    registry.update_cycle(cycle_id, error="nothing to learn: too few", finished_utc=quick_store.clock())
    found, out = report(quick_store, registry), Console(file=StringIO(), width=120)
    print_report(found, [], out)
    lines = out.file.getvalue().splitlines()
    assert (found.outcome, "nothing to learn: too few" in lines) == ("nothing to learn", True)
    assert "gathered, taught nothing" in map(str.strip, lines) and "taught" not in map(str.strip, lines)
    assert any(line.startswith("gathered: ") for line in lines)
    out = Console(file=StringIO(), width=120)
    print_report(report(quick_store, registry, night.id), [], out)
    assert "taught" in map(str.strip, out.file.getvalue().splitlines())


def test_how_long_an_interrupted_night_took_is_not_known(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    for step in (registry.open_cycle, registry.close_interrupted):
        quick_store.clock.now += 86_400
        step()
    assert report(quick_store, registry).minutes is None and report(quick_store, registry, night.id).minutes is not None


def test_no_examples_of_an_adapter_that_learnt_what_was_forgotten(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    registry.taint(night.candidate_id or "", "forgotten")
    with pytest.raises(NotFound, match="adapters list"):
        side_by_side(quick_store, registry, NamingEngine(), night, 2, 0.1)


def test_what_was_forgotten_since_is_named_so(quick_store: MemoryStore, registry: Registry, night: Cycle) -> None:
    assert "forgotten since" not in {topic.label for topic in report(quick_store, registry).topics}
    with quick_store.sql.begin() as connection:
        connection.exec_driver_sql("DELETE FROM feedback")
        connection.exec_driver_sql("DELETE FROM interactions")
    assert [topic.label for topic in report(quick_store, registry).topics] == ["forgotten since"]


def test_turns_without_a_request_are_named_so_and_not_as_forgotten(
    quick_store: MemoryStore, registry: Registry
) -> None:
    for i in range(10):
        turn: list[Message] = [{"role": "system", "content": f"Greet rider {i}."}]
        made = quick_store.record(turn, f"Welcome, rider {i}!", user_id=f"user {i}", session_id="s")
        quick_store.rate(made.id, rating=1)
    rejected(quick_store, registry)
    assert [topic.label for topic in report(quick_store, registry).topics] == ["no request"]


def test_examples_are_answered_by_both(quick_store: MemoryStore, registry: Registry, night: Cycle) -> None:
    found = side_by_side(quick_store, registry, NamingEngine(), night, 2, 0.1)
    assert [(c.before, c.after) for c in found] == [("<b>base</b>", f"<b>{night.candidate_id}</b>")] * len(found)
    assert 1 <= len(found) <= 2
    assert side_by_side(quick_store, registry, NamingEngine(), night, 0, 0.1) == []


def test_terminal_shows_failures_and_costs(quick_store: MemoryStore, registry: Registry, night: Cycle) -> None:
    written = StringIO()
    print_report(report(quick_store, registry), [], Console(file=written, width=200))
    text = written.getvalue()
    assert "rejected" in text and "FAILED" in text and "[+0.100, +0.300]" in text and "700" in text


def test_many_nights_fit_a_narrow_terminal(quick_store: MemoryStore, registry: Registry, night: Cycle) -> None:
    for _ in range(6):
        quick_store.clock.now += 86_400
        rejected(quick_store, registry)
    written = StringIO()
    print_report(report(quick_store, registry), [], Console(file=written, width=80))
    nights = written.getvalue().split("over the nights")[1].split("held-out prompts")[0]
    nights, earlier = nights.split("earlier nights")
    assert "preference" in nights and nights.count("rejected") == 4 and "…" not in nights
    assert night.id in earlier and earlier.count("rejected") == 3 and "more" not in earlier


def test_more_nights_than_a_terminal_holds_are_counted(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    found = report(quick_store, registry)
    many = tuple(replace(found.nights[0], cycle_id=f"night-{n:02}") for n in range(37))
    written = StringIO()
    print_report(replace(found, nights=many), [], Console(file=written, width=80))
    shown = written.getvalue()
    assert [n for n in range(37) if f"night-{n:02}" not in shown] == [0, 1, 2]
    assert "and 3 nights before these; --json and --html have all" in shown


def test_page_stands_alone_and_escapes_what_people_wrote(
    quick_store: MemoryStore, registry: Registry, night: Cycle, tmp_path: Path
) -> None:
    quick_store.clock.now += 86_400
    found = report(quick_store, registry, rejected(quick_store, registry).id)
    compared = side_by_side(quick_store, registry, NamingEngine(), found.cycle, 3, 0.1)
    write_html(found, compared, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o600  # it holds what people said
    write_html(found, compared, tmp_path / "page.html")  # a page of ours is made anew
    (tmp_path / "page.html").write_bytes(b"")  # as of a name that was made to be written to
    write_html(found, compared, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 and "&lt;i&gt;wheel" in page and "<i>wheel" not in page and "<b>base" not in page
    assert not re.search(r"<script|<link|src=|href=\"http", page)


def test_page_that_cannot_be_written_leaves_nothing_of_it(
    quick_store: MemoryStore, registry: Registry, night: Cycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"which is a folder; name a file in it, such as .*night.html"):
        write_html(report(quick_store, registry), [], tmp_path)
    (tmp_path / "precious.db").write_bytes(b"SQLite format 3")
    with pytest.raises(InputError, match="is no report; it was left as it is"):
        write_html(report(quick_store, registry), [], tmp_path / "precious.db")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no report"):
        write_html(report(quick_store, registry), [], tmp_path / "pipe")
    page = tmp_path / "pages" / "page.html"
    page.parent.mkdir()
    monkeypatch.setattr(os, "replace", lambda *_: os.stat("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError):
        write_html(report(quick_store, registry), [], page)
    assert list(page.parent.iterdir()) == []


def test_page_that_cannot_be_written_is_told_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "missing" / "page.html"
    asked = ["report", "--html", str(page), "--home", str(tmp_path / "no home")]
    told = str(CliRunner().invoke(cli.app, asked).exception)
    assert told == f"--html is {page}, and {page.parent} is no folder to write into; make it, or name another"
    monkeypatch.setattr(reporting, "find_spec", lambda _: None)
    told = str(CliRunner().invoke(cli.app, asked).exception)
    assert "--html needs matplotlib" in told and "nightschool[report]" in told


def test_page_of_a_night_that_was_not_judged_shows_the_curve_of_those_before(
    quick_store: MemoryStore, registry: Registry, night: Cycle, tmp_path: Path
) -> None:
    quick_store.clock.now += 86_400
    rejected(quick_store, registry)
    quick_store.clock.now += 86_400
    found = report(quick_store, registry, registry.open_cycle())
    write_html(found, [], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("<svg") == 1
    written = StringIO()
    print_report(found, [], Console(file=written, width=200))
    nights = written.getvalue().split("over the nights")[1]
    assert "preference" in nights and "probe_nll" in nights and nights.count("rejected") == 2


def test_what_was_loaded_for_the_examples_leaves_the_engine(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    engine = NamingEngine()
    assert side_by_side(quick_store, registry, engine, night, 3, 0.1)
    assert engine.loaded == []


def test_json_holds_all_of_it(quick_store: MemoryStore, registry: Registry, night: Cycle) -> None:
    found: Report = report(quick_store, registry)
    assert set(to_json(found, [])) == {*vars(found), "examples"}


def test_summary_tells_what_was_seen_what_judges_and_what_was_judged_against_what(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    found = report(quick_store, registry)
    lines = reporting.summary(found)
    assert f"candidate {night.candidate_id} against the base" in lines
    assert "turns in it that no night before learnt from: 10" in lines
    assert f"held out to judge on: {found.parts['held_out']} answers of {found.judges} users or sessions" in lines
    assert not any("held" in line for line in lines if line.startswith("learnt from"))
    assert "night.budget_minutes had room for 50% of the passes; raise it to learn all there is" in lines
    told = reporting.summary(replace(found, measures=(), reasons=("only 3 answers",), withdrawn=True))
    assert "not judged: only 3 answers" in told and any("withdrawn since" in line for line in told)


def test_night_that_only_judged_anew_and_one_of_which_nothing_is_known_cost_nothing(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    found = report(quick_store, registry)
    again = "made no new adapter: one of an earlier night was judged again"
    assert again in reporting.summary(replace(found, phases=()))
    assert again not in reporting.summary(replace(found, phases=None))
    early = registry.open_cycle()
    registry.update_cycle(early, finished_utc=quick_store.clock(), error="SettingsError: odd")
    lines = reporting.summary(report(quick_store, registry, early))
    assert lines[1] == "it ended before it read the memory" and not any("turns in it" in line for line in lines)


def test_share_of_a_few_answers_has_no_interval() -> None:
    empty = Measure("empty_answers", 0.0, 0.0, 0.0, 0.0, 0.0, True, "no more")
    assert reporting.measure_row(empty)[4] == ""
    assert reporting.measure_row(MEASURES[0])[4] == "[+0.100, +0.300]"


def test_no_night_and_an_unknown_night_are_clear_errors(quick_store: MemoryStore, registry: Registry) -> None:
    with pytest.raises(NotFound, match="run `nightschool night`"):
        report(quick_store, registry)
    with pytest.raises(NotFound, match="'abc' is too short to name a night"):
        report(quick_store, registry, "abc")


def test_what_people_write_is_no_markup_and_a_topic_is_masked(
    quick_store: MemoryStore, registry: Registry, night: Cycle
) -> None:
    found = report(quick_store, registry)
    topic = replace(found.topics[0], label="arr[i] and [name] here")
    compared = [Compared(({"role": "user", "content": "close with [/INST] please"},), "[bold]", "[/]")]
    out = Console(file=StringIO(), width=200)
    print_report(replace(found, topics=(topic,)), compared, out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert all(words in text for words in ("arr[i] and [name] here", "close with [/INST] please", "[bold]"))
    made = quick_store.record([{"role": "user", "content": "123-45-6789?"}], "hm", user_id="ann", session_id="s")
    quick_store.rate(made.id, rating=1)
    rejected(quick_store, registry)
    assert "123-45-6789" not in json.dumps(to_json(report(quick_store, registry), []), default=str)
