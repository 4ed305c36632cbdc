"""`nightschool gate`: what decided, in words, and the operator's probes on what serves."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from nightschool.evolve.gate import judge
from nightschool.evolve.probes import load_probes
from nightschool.evolve.sealing import seal
from nightschool.evolve.types import TOLD, Cycle, Measure, Snapshot, Verdict
from nightschool.interfaces import cli
from nightschool.interfaces.gating import WORDS, explained
from nightschool.interfaces.printing import ENDED
from nightschool.serving.engine import WEIGHTS
from typer.testing import CliRunner

DOCS = Path(__file__).parent.parent / "docs" / "gate.md"
NIGHT = Cycle("c1", 0.0, 60.0, "b2:s", "b2:a", False, None)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    return lambda *words: CliRunner().invoke(cli.app, ["gate", *words, "--home", str(tmp_path)])


def test_explanation_says_every_condition_and_what_decided() -> None:
    learnt = Measure("preference", 0.5, 0.7, 0.2, 0.1, 0.3, True, "interval above .5")
    drift = Measure("probe_nll", 4.0, 4.4, 0.1, 0.05, 0.15, False, "at most 5% above the base on average")
    lines = explained(NIGHT, Verdict("b2:a", None, "b2:s", False, (learnt, drift), ("drifted",)))
    assert lines[:2] == ["night c1: rejected", "candidate b2:a against the base"]
    assert "the liked one gained more in 70% of cases (50% is chance; 60% to 80%)" in lines[2]
    assert lines[4].startswith("FAILED  probe_nll") and "10.0% harder to predict than for the base" in lines[4]
    assert lines[5].strip() == "rule: at most 5% above the base on average"
    assert lines[-1] == "probe_nll failed, so it was rejected"


def test_night_that_was_killed_after_its_verdict_is_not_told_as_accepted() -> None:
    sure = Measure("preference", 0.5, 1.0, 0.5, 0.5, 0.5, True, "interval above .5")
    verdict = Verdict("b2:a", None, "b2:s", True, (sure,), ())
    assert "100% of cases (50% is chance)" in explained(NIGHT, verdict)[2]
    assert explained(NIGHT, verdict, None, ENDED)[-1] == (
        "all 1 conditions held; it was killed before it served, and the next night judges it again"
    )


def test_acceptance_names_how_many_conditions_held() -> None:
    good = Measure("a new measure", 0.0, 0.25, 0.25, 0.1, 0.3, True, "rises")
    length = Measure("answer_words", 9.0, 11.5, 2.5, 1.0, 4.0, True, TOLD)
    lines = explained(NIGHT, Verdict("b2:a", "b2:old", "b2:s", True, (good, length), ()))
    assert (
        "told    answer_words: its answers have 11.5 words on average, they had 9.0 (of their first 48 tokens)" in lines
    )
    assert "passed  a new measure: 0.000 before, 0.250 after" in lines
    assert lines[1].endswith("against b2:old") and lines[-1] == "all 1 conditions held, so it was accepted"


def test_nights_that_were_not_judged_say_why() -> None:
    assert explained(NIGHT, Verdict("b2:a", None, "b2:s", False, (), ("only 3 held-out",)))[-1].endswith(
        "only 3 held-out"
    )
    assert "nothing to judge" in explained(NIGHT, None)[-1]
    failed = Cycle("c1", 0.0, 60.0, "b2:s", None, None, "TrainingError: too hot")
    assert explained(failed, None) == ["night c1: failed", "TrainingError: too hot"]


def test_failure_after_a_verdict_says_what_serves() -> None:
    failed = Cycle("c1", 0.0, 60.0, "b2:s", "b2:a", True, "StoreError: full")
    verdict = Verdict("b2:a", None, "b2:s", True, (), ())
    assert "failed after its verdict, so nothing of it serves: StoreError: full" in explained(failed, verdict)
    assert "failed after its verdict, and its candidate serves: StoreError: full" in explained(failed, verdict, "b2:a")


def test_every_measure_of_the_gate_has_words() -> None:
    documented = set(re.findall(r"^- `(\w+)`:", judge.__globals__["__doc__"], re.M))
    assert documented == WORDS.keys()


def test_no_night_and_no_probes_are_errors_that_say_what_to_do(run: Callable[..., Result]) -> None:
    CliRunner().invoke(cli.app, ["init"])
    assert "nightschool night" in str(run("explain").exception)
    assert "docs/gate.md" in str(run("probes").exception)


def test_probes_are_tried_on_what_serves_and_a_failure_is_the_exit_code(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    CliRunner().invoke(cli.app, ["init"])
    path = tmp_path / "probes.toml"
    path.write_text('[[probe]]\nprompt = "How are you?"\nmust_not = ["xylophone"]\n')
    passed = run("probes", "--json")
    assert passed.exit_code == 0 and json.loads(passed.stdout)["probes"][0]["faults"] == []
    path.write_text('[[probe]]\nprompt = "How are you?"\nmust = ["xylophone"]\n')
    failed = run("probes")
    assert failed.exit_code == 1 and "FAILED  How are you?  lacks 'xylophone'" in failed.stdout


def test_probes_are_tried_on_the_base_where_the_live_adapter_is_of_another(
    run: Callable[..., Result], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with cli.assistant(tmp_path, make=True) as n:
        snapshot, folder = Snapshot((), (), (), ()), n.registry.building()
        n.registry.add_snapshot(snapshot, [])
        (folder / WEIGHTS).write_bytes(b"weights")
        facts = {"snapshot_id": snapshot.id, "parent_id": None, "created_utc": 0.0, "details": {}}
        adapter = seal(folder, base_id="b2:other", phase="sft", **facts)
        n.registry.add(adapter)
        n.registry.add_verdict(Verdict(adapter.id, None, snapshot.id, True, (), ("better",)))
        n.registry.promote(adapter.id)
    (tmp_path / "probes.toml").write_text('[[probe]]\nprompt = "How are you?"\nmust_not = ["xylophone"]\n')
    done = run("probes", "--json")
    assert (done.exit_code, json.loads(done.stdout)["adapter"]) == (0, None), done.exception
    assert f"the base answers, since the live adapter is refused: adapter {adapter.id} was trained" in caplog.text


def test_failed_night_says_why_in_json(run: Callable[..., Result], tmp_path: Path) -> None:
    with cli.assistant(tmp_path, make=True) as n:
        n.registry.update_cycle(n.registry.open_cycle(), finished_utc=1.0, error="TrainingError: too hot")
    assert json.loads(run("explain", "--json").stdout)["error"] == "TrainingError: too hot"


def test_the_documented_probes_are_probes(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "probes.toml").write_text(example)
    assert len(load_probes(tmp_path)) == 2
