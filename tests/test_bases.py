"""`nightschool base` and `nightschool serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nightschool.interfaces import bases
from nightschool.interfaces.cli import app
from nightschool.settings import load_settings
from typer.testing import CliRunner

run = CliRunner().invoke


def test_base_in_use_is_marked(tmp_path: Path) -> None:
    assert "* seedling" in run(app, ["base", "list"]).output.splitlines()


def test_cache_that_is_a_file_holds_no_base(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "nightschool.interfaces.cli", "base", "list"]
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "file")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "* seedling\n"), done.stderr


def test_check_tells_what_a_base_takes(tmp_path: Path) -> None:
    found = json.loads(run(app, ["base", "check", "seedling", "--json"]).output)
    assert found["family"] == "deepseek_v3" and found["problems"] == []
    assert "problem" not in run(app, ["base", "check", "seedling"]).output


def test_use_changes_one_setting_and_keeps_the_rest_of_the_file(tmp_path: Path, toy_base: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("# mine\n[serving]\nthreads = 1  # few\n")
    assert run(app, ["base", "use", toy_base]).exit_code == 0
    assert load_settings(tmp_path).serving.base == str(Path(toy_base).resolve())
    assert file.read_text().startswith("# mine\n[serving]\nthreads = 1  # few\n")


def test_home_that_use_makes_is_its_owners_alone(tmp_path: Path) -> None:
    home = tmp_path / "new"
    assert run(app, ["base", "use", "seedling", "--home", str(home)]).exit_code == 0
    assert [p.stat().st_mode & 0o777 for p in (home, home / "settings.toml")] == [0o700, 0o600]


def test_nothing_is_written_where_the_environment_would_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_BASE", "some/other")
    done = run(app, ["base", "use", "seedling"])
    assert done.exit_code == 1 and "'some/other', which wins over settings.toml" in str(done.exception)
    assert not (tmp_path / "settings.toml").exists()
    monkeypatch.setenv("NIGHTSCHOOL_BASE", "seedling")
    assert "next: nightschool init, then nightschool night" in run(app, ["base", "use", "seedling"]).output


def test_base_that_cannot_be_used_is_not_written(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((bases_folder() / "config.json").read_bytes())
    result = run(app, ["base", "use", str(broken)])
    assert result.exit_code == 1 and not (tmp_path / "settings.toml").exists()
    assert "no *.safetensors" in str(result.exception)


@pytest.mark.parametrize("command", ["check", "use"])
def test_home_folder_of_nobody_is_a_clear_error(command: str) -> None:
    assert "no such folder" in str(run(app, ["base", command, "~nobody-of-that-name/base"]).exception)


def bases_folder() -> Path:
    from nightschool.serving.base import SEEDLING

    return SEEDLING


def test_serve_looks_for_adapters_in_a_home_that_is_there(tmp_path: Path) -> None:
    done = run(app, ["serve", "--dry-run", "--home", str(tmp_path / "typo")])
    assert done.exit_code == 1 and "no home at" in str(done.exception)


def test_server_that_others_reach_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("NIGHTSCHOOL_SERVING_URL", "http://0.0.0.0:8000")
    assert "set VLLM_API_KEY" in str(run(app, ["serve", "--dry-run"]).exception)
    for key in (["--api-key", "k"], ["--api-key=k"], ["--api_key", "k"]):
        assert run(app, ["serve", "--dry-run", "--", *key]).exit_code == 0
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert run(app, ["serve", "--dry-run"]).exit_code == 0
    monkeypatch.delenv("VLLM_API_KEY")
    for url in ("http://localhost:8000", "http://127.0.0.1:1", "http://[::1]:8000"):
        monkeypatch.setenv("NIGHTSCHOOL_SERVING_URL", url)
        assert run(app, ["serve", "--dry-run"]).exit_code == 0
    for host in (["--host", "0.0.0.0"], ["--host=0.0.0.0"]):  # what goes to vLLM wins
        assert "set VLLM_API_KEY" in str(run(app, ["serve", "--dry-run", "--", *host]).exception)


def test_use_writes_to_what_a_link_names_and_reads_a_mark_of_byte_order(tmp_path: Path, toy_base: str) -> None:
    real, home = tmp_path / "real.toml", tmp_path / "home"
    real.write_text("[night]\nseed = 3\n", encoding="utf-8-sig")
    home.mkdir()
    (home / "settings.toml").symlink_to(real)
    assert run(app, ["base", "use", toy_base, "--home", str(home)]).exit_code == 0
    assert (home / "settings.toml").is_symlink() and "seed = 3" in real.read_text() and toy_base in real.read_text()


def test_serve_prints_the_command_and_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases.os, "execvpe", lambda *_: pytest.fail("started"))
    result = run(app, ["serve", "--dry-run", "--", "--tensor-parallel-size", "2"])
    assert "VLLM_NO_USAGE_STATS=1" in result.output
    assert result.output.strip().endswith("--tensor-parallel-size 2")


def test_serve_passes_on_what_follows_two_dashes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases.os, "execvpe", lambda *_: pytest.fail("started"))
    for words in (["--dryrun"], ["--hoem", "x"], ["more"], ["--dry-run", "--seed", "1"], ["more", "--", "--seed", "1"]):
        assert run(app, ["serve", *words]).exit_code == 2, words
    passed = run(app, ["serve", "--dry-run", "--", "--home", "x", "--", "-O3"])
    assert passed.output.strip().endswith("--home x -- -O3")


def test_serve_takes_the_engine_by_name_and_no_other_than_vllm() -> None:
    named = run(app, ["serve", "--engine", "vllm", "--dry-run"])
    assert named.exit_code == 0 and "--engine" not in named.output
    other = run(app, ["serve", "--engine", "local", "--dry-run"])
    assert other.exit_code != 0 and "'local'" in str(other.exception)


def test_serve_without_vllm_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_SERVING_VLLM_COMMAND", "no-such-vllm")
    result = run(app, ["serve"])
    assert result.exit_code == 1 and "no-such-vllm is not installed" in str(result.exception)
