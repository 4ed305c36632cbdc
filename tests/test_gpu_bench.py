"""The bench of a card starts with torch, transformers and peft alone, and says why it does nothing without a card."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
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


def test_what_fails_is_named_and_the_rest_is_measured_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_from_file_location("nightschool_bench_gpu", BENCH)
    assert spec and spec.loader
    gpu = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, gpu)  # dataclasses look it up there
    spec.loader.exec_module(gpu)

    def refuse(*_: object) -> None:
        raise RuntimeError("the card says no")

    monkeypatch.setattr(gpu.fp8, "convert", refuse)
    monkeypatch.setattr(gpu.Bench, "tidy", refuse)
    monkeypatch.setattr(gpu.Bench, "training", lambda self: None)
    monkeypatch.setattr(gpu, "TOY", replace(gpu.TOY, batches=(1,), steps=3))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--minutes", "5"])
    gpu.main()
    told = capsys.readouterr().out
    found = json.loads(told.splitlines()[-1])
    assert found["left_out"]["weights, for fp8_steps"] == "RuntimeError: the card says no"
    assert found["left_out"]["tidying after copy"] == "RuntimeError: the card says no"
    assert found["tokens_per_s"]["bf16"]["1"] > 0 and "| bf16 |" in told
