"""Every wrong input ends in one sentence and exit code 2, before any process is started."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from mindspeed_mm_rl.cli.main import app

CONFIG = """
megatron_training:
  stage: ray_dapo
  tokenizer_name_or_path: {model}
  data_path: {data}
  global_batch_size: 4
  train_iters: 2
  bf16: false
  min_pixels: 784
  max_pixels: 50176
rl_config:
  output: {folder}/logs
  n_samples_per_prompt: 2
  max_prompt_length: 64
generate_config:
  sampling_config: {{max_tokens: 8}}
"""


def row(index: int) -> dict:
    encoded = io.BytesIO()
    Image.new("RGB", (56, 84), (40 * index, 90, 10)).save(encoded, "PNG")
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": "<image>Find x."}],
        "images": [{"bytes": encoded.getvalue(), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": str(index)},
        "extra_info": {"index": index, "answer": str(index)},
    }


def write_rows(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


@pytest.fixture
def config(tmp_path, tiny_vl) -> Path:
    data = write_rows(tmp_path / "data", [row(index) for index in range(4)])
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(model=tiny_vl, data=data, folder=tmp_path))
    return path


def train(config: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output, and error line of `mm-rl train`; --dry-run, since only good input gets past the checks."""
    result = CliRunner().invoke(app, ["train", "--config", str(config), "--dry-run", *arguments])
    return result.exit_code, result.stdout, result.stderr


def refused(config: Path, *arguments: str) -> str:
    """The one line on stderr; the same command without --dry-run stops at the same check."""
    code, _, error = train(config, *arguments)
    assert code == 2
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


def test_good_input_gets_through(config):
    code, output, _ = train(config)
    assert code == 0
    assert "data: 4 of 4 rows usable" in output and "weights: Hugging Face weights" in output and "nothing trained" in output


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl_config.mini_batchsize=3", ["unknown key rl_config.mini_batchsize", "mini_batch_size"]),
        ("megatron_training.data_path=/nowhere/at/all", ["/nowhere/at/all", "does not exist"]),
        ("megatron_training.tokenizer_name_or_path=/nowhere/model", ["tokenizer_name_or_path", "/nowhere/model"]),
        ("actor_config.load=/nowhere/weights", ["actor_config.load", "/nowhere/weights"]),
        ("generate_config.max_model_len=71", ["max_model_len (71)", "max_prompt_length (64)", "max_tokens (8)"]),
        ("rl_config.verifier_function=[geo4k]", ["geo4k", "did you mean 'geo3k'"]),
        ("rl_config.max_prompt_length=3", ["max_prompt_length"]),
    ],
)
def test_one_wrong_value(config, override, words):
    line = refused(config, override)
    assert all(word in line for word in words), line


def test_a_folder_for_saves_that_is_a_file(config):
    line = refused(config, f"actor_config.save={config}/saves")
    assert "actor_config.save" in line and "can't be written to" in line and "is a file" in line


def test_a_reward_function_that_cannot_be_used(config):
    """Looked up beside the YAML; only a grading process runs the file."""
    (config.parent / "mine.py").write_text("score = 1\n\ndef reward(text):\n    return 1.0\n")
    assert refused(config, "rl_config.verifier_function=mine.py:missing").endswith(f"{config.parent}/mine.py has no function 'missing'")
    assert "mine.py:reward must take (data_source, solution_str" in refused(config, "rl_config.verifier_function=mine.py:reward")


def test_a_source_without_a_row(config):
    """Its rows would silently go by the verifiers of all others."""
    error = refused(config, "rl_config.verifier_by_source.hiyouga/geometry=geo3k")
    assert error.endswith("is of data_source 'hiyouga/geometry'; its sources are 'hiyouga/geometry3k' (4 rows)")
    code, output, _ = train(config, "rl_config.verifier_by_source.hiyouga/geometry3k=[geo3k,step]")
    assert code == 0 and "rows: 4 of hiyouga/geometry3k by geo3k, step" in output


def test_a_filter_metric_that_no_verifier_computes(config):
    line = refused(config, "rl_config.filter_groups_enable=true", "rl_config.filter_groups_metric=acc_for_dpo")
    assert "acc_for_dpo" in line and "acc_for_dapo" in line


def test_a_missing_config_file(tmp_path):
    assert "doesn't exist" in refused(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", "{}", "has no usable tokenizer"),
        ("preprocessor_config.json", "{", "preprocessor_config.json is not valid JSON"),
        ("preprocessor_config.json", "[]", "preprocessor_config.json holds a list"),
    ],
)
def test_a_damaged_file_of_the_model_folder_is_named(config, tmp_path, tiny_vl, file, content, words):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_vl, folder)
    (folder / file).write_text(content)
    line = refused(config, f"megatron_training.tokenizer_name_or_path={folder}")
    assert str(folder) in line and words in line, line


def test_parquet_without_images(config, tmp_path):
    write_rows(tmp_path / "data", [{key: value for key, value in row(0).items() if key != "images"}])
    line = refused(config)
    assert "train.parquet" in line and "images" in line


def corrupt(index: int) -> dict:
    return row(index) | {"images": [{"bytes": b"\x89PNG\r\n\x1a\nbroken", "path": None}]}


def test_a_corrupt_image_is_named_by_file_and_row(config, tmp_path):
    write_rows(tmp_path / "data", [row(0), row(1), corrupt(2), row(3)])
    line = refused(config)
    assert "train.parquet" in line and "row 2" in line and line.endswith("(megatron_training.skip_bad_rows: true leaves such rows out)")


def test_a_corrupt_image_is_skipped_and_counted_when_allowed(config, tmp_path):
    write_rows(tmp_path / "data", [row(0), row(1), corrupt(2), row(3)])
    code, output, _ = train(config, "megatron_training.skip_bad_rows=true")
    assert code == 0
    assert "3 of 4 rows usable" in output and "1 bad" in output and "row 2" in output


def test_a_row_without_an_answer(config, tmp_path):
    write_rows(tmp_path / "data", [row(0), row(1) | {"extra_info": {"index": 1}, "reward_model": {"style": "rule"}}])
    line = refused(config)
    assert "train.parquet" in line and "row 1" in line and "answer" in line


def test_a_checkpoint_of_another_shape(config, tmp_path, tiny_vl):
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_vl.iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    shape = json.loads((tiny_vl / "config.json").read_text())
    shape.get("text_config", shape)["intermediate_size"] *= 2
    (other / "config.json").write_text(json.dumps(shape))
    line = refused(config, f"megatron_training.tokenizer_name_or_path={other}", f"actor_config.load={tiny_vl}")
    assert "actor_config.load" in line and "mlp" in line


def test_the_command_itself_prints_one_line_and_exits_with_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("rl_config: {mini_batchsize: 3}\n")
    result = subprocess.run(
        [sys.executable, "-m", "mindspeed_mm_rl.cli.main", "train", "--config", str(path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert result.stderr == "error: unknown key rl_config.mini_batchsize; did you mean mini_batch_size?\n"


SCRIPTS = Path(__file__).parents[2] / "examples/rl/scripts"


def launch(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    python = str(Path(sys.executable).parent)
    environment = {"PATH": f"{python}:/usr/bin:/bin", "HOME": "/nonexistent", "VIRTUAL_ENV": sys.prefix} | variables
    return subprocess.run(["bash", str(SCRIPTS / script), *arguments], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("script", ["dapo_trainer_qwen25vl_tiny.sh", "grpo_trainer_qwen25_tiny.sh"])
def test_a_launch_script_hands_on_its_arguments_and_the_exit_code(script):
    result = launch(script, "rl_config.mini_batchsize=3")
    assert result.returncode == 2
    assert result.stderr.endswith("error: unknown key rl_config.mini_batchsize; did you mean mini_batch_size?\n")


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*_trainer_*.sh")), ids=lambda path: path.stem)
def test_every_launch_script_launches_its_own_yaml(script):
    lines = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    launcher = "tiny_text.sh" if script.stem.endswith("qwen25_tiny") else "launch.sh"
    source = f'source "$(dirname "${{BASH_SOURCE[0]}}")/{launcher}"'
    assert lines[:2] == [f'DEFAULT_YAML="${{DEFAULT_YAML:-{script.stem}}}"', source] and lines[-1] == 'launch "$@"'
    # Between them only what makes a tiny task's data first.
    assert lines[2:-1] == [] or script.stem.endswith("_tiny")
    assert (SCRIPTS.parent / "configs" / f"{script.stem}.yaml").is_file() and os.access(script, os.X_OK)


def test_a_launch_script_takes_another_config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rl_confg: {}\n")
    for result in (launch("dapo_trainer_qwen25vl_tiny.sh", str(path)), launch("dapo_trainer_qwen25vl_tiny.sh", DEFAULT_YAML=str(path))):
        assert (result.returncode, "unknown section rl_confg" in result.stderr) == (2, True)
    missing = launch("dapo_trainer_qwen25vl_tiny.sh", "dapo_trainer_qwen25vl_tny")
    assert (missing.returncode, "did you mean" in missing.stderr) == (2, True)


@pytest.mark.parametrize(("name", "value"), [("NNODES", "two"), ("NNODES", "0"), ("NPUS_PER_NODE", "-1"), ("WAIT_SECONDS", "5m")])
def test_a_variable_that_is_no_number(name, value):
    result = launch("dapo_trainer_qwen25vl_7b.sh", **({"NNODES": "2", "MASTER_ADDR": "10.0.0.1"} | {name: value}))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {name} is '{value}'; it must be a whole number")


def test_an_interface_that_does_not_exist():
    result = launch("dapo_trainer_qwen25vl_7b.sh", NNODES="2", MASTER_ADDR="10.0.0.1", SOCKET_IFNAME="nowhere0")
    assert result.returncode == 2
    assert "error: SOCKET_IFNAME is nowhere0, which has no IPv4 address" in result.stderr


def test_several_machines_need_an_address():
    result = launch("dapo_trainer_qwen25vl_7b.sh", NNODES="2")
    assert result.returncode == 2
    assert "MASTER_ADDR is localhost, but NNODES is 2" in result.stderr
