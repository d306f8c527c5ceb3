"""A whole run by the command, with rewards that hang, raise, crash and eat memory: it goes on, counts them, and writes for few eyes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mindspeed_mm_rl.sinks import read_records
from tests.unit.test_bad_input import CONFIG, row, write_rows

REPOSITORY = Path(__file__).parents[2]
FAULTS = """
import itertools, os, zlib
from mindspeed_mm_rl.rewards import worker
grade = worker.score_sample

def fault(text, *rest):
    match -1 if "boxed" in text else zlib.crc32(text.encode()) % 16:
        case 0:
            sum(0 for _ in itertools.count())
        case 1:
            raise KeyError(text)
        case 2:
            os.abort()
        case 3:
            [bytearray(1 << 24) for _ in itertools.count()]
    return grade(text, *rest)

worker.score_sample = fault
"""
"""By the text of a response, one in sixteen each; the workers' self-check grades examples with a box."""
COMMAND = """
import os, sys
os.umask(0o022)
from mindspeed_mm_rl.rewards import pool
boot, main = pool._BOOT.rsplit("; ", 1)
pool._BOOT = f"{boot}; exec(open({sys.argv.pop(1)!r}).read()); {main}"
from mindspeed_mm_rl.cli.main import main
main()
"""


def test_the_run_goes_on_and_counts(tiny_vl: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", [row(index) for index in range(4)])
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=tiny_vl, data=data, folder=tmp_path))
    options = [f"actor_config.save={tmp_path}/save", "rl_config.verifier_timeout=1", "rl_config.n_samples_per_prompt=8"]
    (tmp_path / "faults.py").write_text(FAULTS)
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "faults.py"), "train", "--config", str(tmp_path / "run.yaml"), *options]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    records = read_records(tmp_path / "logs" / "metrics.jsonl")
    assert len(records) == 2
    # 64 samples, a quarter of them faulty: about 4 that hang and 12 that end otherwise.
    timeouts, crashes = (sum(record[f"rewards/{name}"] for record in records) for name in ("timeouts", "crashes"))
    assert 1 <= timeouts <= 12 and 4 <= crashes <= 24
    assert f"rewards/timeouts : {records[0]['rewards/timeouts']:.0f}" in result.stdout
    assert result.stderr.count("The sample gets the lowest score") == 1
    check_modes(tmp_path / "logs", tmp_path / "save")


def check_modes(*folders: Path) -> None:
    written = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    names = {path.name for path in written}
    assert {"metrics.jsonl", "tensorboard", "table.txt", "curves.png", "state.json", "common.pt"} <= names
    wrong = {
        str(path): oct(path.stat().st_mode & 0o777)
        for path in written
        if path.stat().st_mode & 0o777 != (0o750 if path.is_dir() else 0o640)
    }
    assert not wrong
