"""The examples of docs/ run as they stand and print what the page says."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from nightschool.settings import MemorySettings, Settings

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = [path for path in sorted(DOCS.glob("*.md")) if "```python" in path.read_text(encoding="utf-8")]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def test_there_is_an_example_of_several_agents() -> None:
    assert DOCS / "agents.md" in EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_prints_what_the_page_says(path: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(path, "python")), path.name, "exec"), {})
    assert capsys.readouterr().out == "".join(blocks(path, "text"))


def test_page_on_object_storage_names_a_setting_that_exists() -> None:
    (named,) = re.findall(r"\[memory\]\n(\w+) = ", blocks(DOCS / "object-storage.md", "toml")[0])
    assert named in {field.name for field in fields(MemorySettings)}


def test_page_on_settings_names_every_one_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+\.\w+)` \| `(.+?)` \|", (DOCS / "settings.md").read_text(encoding="utf-8"), re.M)
    held = Settings(home=Path()).to_json()
    known = {f"{section}.{name}": value for section, values in held.items() for name, value in values.items()}
    assert {name: json.loads(default) for name, default in rows} == known
    assert [name for name, _ in rows] == list(known)
