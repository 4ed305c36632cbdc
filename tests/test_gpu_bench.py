"""The bench of a card starts with torch, transformers and peft alone, and says why it does nothing without a card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench" / "gpu.py"
ABSENT = ("trl", "lancedb", "sqlalchemy", "alembic", "datasets", "pyarrow", "sentence_transformers", "tomlkit", "httpx")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, and the bench would run")
def test_without_a_card_it_skips_with_its_reason_and_needs_nothing_of_the_rest() -> None:
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.argv = ['gpu.py']\n"
    code += f"runpy.run_path({str(BENCH)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("skipped: torch finds no CUDA device; `--toy`")
