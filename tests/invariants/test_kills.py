"""Ranks that are killed at random instants end, resumed, with the bytes of a run that nobody killed.

A hundred of them are `benchmarks/kills.py`; these are its first five.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.launches import ROOT

KILLS = 5


def test_runs_killed_five_times_end_with_the_same_bytes_when_resumed(tmp_path: Path) -> None:
    out = tmp_path / "kills.json"
    command = [sys.executable, "benchmarks/kills.py", "--kills", str(KILLS), "--world", "1,2", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["kills"]) == KILLS
    assert all(kill["same"] for kill in found["kills"])
    assert [found["by_world"][world]["same_bytes"] for world in ("1", "2")] == [3, 2]
    assert found["by_world"]["2"]["of_one_rank_alone"] == 1
    assert 0 < found["by_world"]["2"]["longest_survivor_seconds"] < 30
    assert sum(kill["verified"] for kill in found["kills"]) > 0
