"""`benchmarks/update.py` runs, and what it compares agrees on this device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "benchmarks/update.py", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_update_throughput_is_measured():
    *_, table, line = run("--repeats", "1").strip().splitlines()
    assert table.startswith("update (with Adam's step)")
    seconds = json.loads(line)["seconds"]
    assert seconds["forward+backward"] > seconds["forward"] > 0 and seconds["step"] > 0


def test_logits_and_kernels_agree():
    output = run("--parity")
    assert "tiny Qwen2.5-VL: logits, bfloat16" in output and "packed attention, whole" in output and "WRONG" not in output
