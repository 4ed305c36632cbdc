"""The direction of imports, and what the first import may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what each part may import from within the package, besides itself
ALLOWED = {
    "errors": set(),
    "content": set(),
    "settings": {"errors"},
    "loading": set(),
    "memory": {"errors", "content", "loading", "settings"},
    "serving": {"errors", "content", "loading", "settings"},
    "evolve": {"errors", "content", "settings", "memory", "serving"},
    "pipelines": {"errors", "content", "settings", "memory", "serving", "evolve"},
    "migrations": {"memory"},
    "replies": {"errors"},
    "sdk": {"errors", "content", "settings", "memory", "serving", "evolve", "replies"},
    "interfaces": set("errors content settings memory serving evolve pipelines replies sdk __init__".split()),
    "aio": {"errors", "memory", "replies", "sdk"},
    "__init__": {"aio", "content", "errors", "memory", "replies", "sdk", "settings"},
}
VENDORS = {
    "lancedb": {"memory/vectors.py"},
    "trl": {"evolve/trainer.py"},
    "sentence_transformers": {"memory/embed.py"},
    "sklearn": {"memory/trees.py"},
    "sqlalchemy": {"memory", "migrations", "evolve/registry.py"},
}


def modules() -> list[Path]:
    parts = [p for p in ROOT.iterdir() if p.name.split(".")[0] in ALLOWED]
    return [f for p in parts for f in ([p] if p.suffix == ".py" else p.rglob("*.py") if p.is_dir() else [])]


def imports(path: Path) -> set[tuple[str, str]]:
    """(package, first part below it) of every import in the file, relative ones resolved."""
    found: set[tuple[str, str]] = set()
    depth = len(path.relative_to(ROOT).parts) - 1
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(path.relative_to(ROOT).parts[: depth - node.level + 1])
            full = [*base, *((node.module or "").split(".") if node.module else [])]
            names = [full[0]] if full else [a.name for a in node.names]
            found |= {("nightschool", n) for n in names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            head, *rest = node.module.split(".")
            found.add((head, rest[0] if rest else "__init__"))
        elif isinstance(node, ast.Import):
            found |= {(a.name.split(".")[0], "") for a in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_one_direction(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    used = {part for package, part in imports(path) if package == "nightschool"}
    assert used <= ALLOWED[own] | {own}


def test_every_part_has_its_rule() -> None:
    assert {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} == set(ALLOWED)


@pytest.mark.parametrize("vendor", VENDORS)
def test_only_its_own_file_knows_a_vendor(vendor: str) -> None:
    users = {str(p.relative_to(ROOT)) for p in modules() if any(package == vendor for package, _ in imports(p))}
    strangers = {u for u in users if u not in VENDORS[vendor] and u.split("/")[0] not in VENDORS[vendor]}
    assert users
    assert not strangers


@pytest.mark.parametrize("command", ["import nightschool", "import nightschool.interfaces.cli as c; c.app(['--help'])"])
def test_first_import_and_help_load_neither_torch_nor_lancedb(command: str) -> None:
    watch = f"import sys\ntry:\n    {command}\nexcept SystemExit: pass\n"
    watch += "print('LOADED', sorted({'torch', 'lancedb', 'transformers', 'sqlalchemy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
