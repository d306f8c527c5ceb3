"""A whole run by the command, with rewards that hang, raise, crash and eat memory: it goes on, counts them, and writes for few eyes.

A rule, a function and a reward model share the reward.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mindspeed_mm_rl.sinks import read_records
from tests.tiny import make_tiny_classifier, make_tiny_text
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
FUNCTION = """
def brief(data_source, solution_str, ground_truth, extra_info):
    assert (data_source, ground_truth) == ("hiyouga/geometry3k", extra_info["answer"])
    return {"score": 1 / (1 + len(solution_str)), "characters": len(solution_str)}
"""
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
    (tmp_path / "mine.py").write_text(FUNCTION)
    make_tiny_classifier(tmp_path / "classifier", make_tiny_text(tmp_path / "text"))
    options = [
        f"actor_config.save={tmp_path}/save",
        "rl_config.verifier_timeout=1",
        "rl_config.n_samples_per_prompt=8",
        "rl_config.verifier_by_source.hiyouga/geometry3k={geo3k: 1, 'mine.py:brief': 0.1, reward_model: 0.01}",
        f"rl_config.reward_model={tmp_path}/classifier",
    ]
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
    assert all(0.0 < record["brief_rewards/mean"] < 1.0 < record["brief/characters_rewards/mean"] for record in records)
    assert all(record["reward_model_rewards/mean"] != 0.0 and record["timing/reward_model"] > 0.0 for record in records)
    assert "base_acc_rewards/mean" not in records[0]
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
