"""What is packed is what is written: the package list, the wheel and the version."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nightschool
import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders_with_code() -> set[Path]:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    outside = {"tests", "bench", "docs"}
    return {Path(f).parent for f in tracked.split() if Path(f).parts[0] not in outside}


def test_package_list_names_every_folder_with_code() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {".".join(["nightschool", *f.parts]) for f in folders_with_code()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_wheel_holds_every_module_and_data_file(wheel: set[str]) -> None:
    modules = {f"nightschool/{p.relative_to(ROOT)}" for f in folders_with_code() for p in (ROOT / f).glob("*.py")}
    data = {f"nightschool/{p.relative_to(ROOT)}" for p in (ROOT / "serving" / "seedling").iterdir()}
    assert data
    probes = {"nightschool/evolve/probe.jsonl", "nightschool/evolve/sycophancy.jsonl"}
    assert modules | data | probes | {"nightschool/py.typed", "nightschool/migrations/script.py.mako"} <= wheel


def test_wheel_leaves_tests_and_benches_out(wheel: set[str]) -> None:
    assert not [n for n in wheel if n.startswith(("nightschool/tests/", "nightschool/bench/", "tests/", "bench/"))]


def test_version_is_the_newest_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line.split()[1] for line in changelog.splitlines() if line.startswith("## "))
    assert newest == nightschool.__version__ == PROJECT["project"]["version"]


def test_public_names_are_what_all_says() -> None:
    assert all(hasattr(nightschool, name) for name in nightschool.__all__)
