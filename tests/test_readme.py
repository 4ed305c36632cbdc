"""The README's example runs, its map is the tree, and its commands exist."""

import re
from datetime import UTC, datetime
from pathlib import Path

from nightschool.interfaces.cli import app
from nightschool.memory.importer import import_files
from nightschool.memory.store import MemoryStore
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.S)
    assert found
    return found.group(1)


def test_example_runs_as_it_stands(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "README.md", "exec"), {})
    assert "My bicycle is called Rosinante." in capsys.readouterr().out


def test_line_to_import_is_taken(store: MemoryStore, tmp_path: Path) -> None:
    line = " ".join(block("json").split("\n"))
    (tmp_path / "in.jsonl").write_text(line + "\n")
    store.clock = datetime(2026, 1, 6, tzinfo=UTC).timestamp
    report = import_files(store, [tmp_path / "in.jsonl"], now=store.clock())
    assert (report.errors, report.interactions_new, report.feedback_new) == ((), 1, 1)


def test_map_names_every_folder_and_no_other() -> None:
    named = set(re.findall(r"^\| `(\w+)/` \|", README, re.M))
    tracked = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.py"))} - {"tests", "build", "docs"}
    assert named == tracked


def test_commands_named_exist() -> None:
    for line in re.findall(r"^nightschool (.+?)\s+#", README, re.M):
        words = [w for w in line.split() if w.islower() and "." not in w and not w.startswith("-")]
        command = words[:2] if words[0] in ("adapters", "audit", "memory") else words[:1]
        assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0, line
