"""Writers that are killed lose nothing that was acknowledged; the long run is bench/durability.py."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench" / "durability.py"


def test_killed_writers_lose_and_double_nothing_and_the_index_agrees() -> None:
    ran = subprocess.run([sys.executable, str(BENCH), "--kills", "4"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert (found["lost"], found["doubled"], found["disagreements"]) == (0, 0, 0)
    assert found["acknowledged"] >= found["kills"] == 4
