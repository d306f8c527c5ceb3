"""The file of rl_config.runtime_env_path: what is handed on, what is left out and told, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm_rl.config.runtime_env import RuntimeEnv, read_runtime_env
from mindspeed_mm_rl.engines.vllm.environment import ROLLOUT_ENV
from mindspeed_mm_rl.platforms import processes

USERS = """
env_vars:
  VLLM_DP_SIZE: '1'
  HCCL_SOCKET_IFNAME: eth0
  HCCL_HOST_SOCKET_PORT_RANGE: "60000-60050"
  HCCL_NPU_SOCKET_PORT_RANGE: "61000-61050"
"""


def read(folder: Path, text: str, kind: str = "npu") -> RuntimeEnv:
    (folder / "env.yaml").write_text(text)
    return read_runtime_env("env.yaml", str(folder), kind)


def test_a_file_that_users_have_is_handed_on_unchanged(tmp_path: Path) -> None:
    assert read(tmp_path, USERS) == RuntimeEnv(
        {
            "HCCL_HOST_SOCKET_PORT_RANGE": "60000-60050",
            "HCCL_NPU_SOCKET_PORT_RANGE": "61000-61050",
            "HCCL_SOCKET_IFNAME": "eth0",
            "VLLM_DP_SIZE": "1",
        }
    )


def test_values_stay_as_they_are_written(tmp_path: Path) -> None:
    text = "env_vars: {A: 5, B: 010, C: 1e3, D: 12:30, E: true, F: '', G: ' a ', H: '${HOME}/x', I: 127.0.0.1:27001}"
    found = read(tmp_path, text).variables
    assert list(found.values()) == ["5", "010", "1e3", "12:30", "true", "", " a ", "${HOME}/x", "127.0.0.1:27001"]
    assert read(tmp_path, "") == read(tmp_path, "env_vars:\n") == RuntimeEnv({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "the file must hold env_vars: with lines NAME: value"),
        ("env_vars: [a]", "env_vars must be a map of names to plain values"),
        ("env_vars: {A: [1]}", "env_vars.A must be one plain value"),
        ("env_vars: {A: }", "env_vars.A has no value: write one, or remove the line"),
        ("env_vars: {A: 1, A: 2}", "env_vars.A stands there twice, as 1 and as 2"),
        ("env_vars: {1A: 1}", "env_vars.1A: a variable's name has letters"),
        ("env_vars: {A: !!python/object/apply:os.getcwd []}", "env_vars.A must be one plain value"),
        ("env_vars: {A: 1", "can't be read as YAML"),
        ("env_var: {A: 1}", "unknown key env_var; did you mean env_vars?"),
        ("A: 1", "unknown key A: give env_vars alone"),
        ("pip: [numpy]", "pip isn't offered: workers run what is installed on their machine"),
        ("env_vars: {RANK: 0}", "env_vars.RANK: it differs from process to process"),
        ("env_vars: {ASCEND_RT_VISIBLE_DEVICES: '0,1'}", "env_vars.ASCEND_RT_VISIBLE_DEVICES: it differs from process to process"),
        ("env_vars: {MM_RL_RUN: a}", "env_vars.MM_RL_RUN: by it the run knows its own processes"),
        ("env_vars: {VLLM_USE_V1: 0}", "env_vars.VLLM_USE_V1 is 0, but the rollout engine needs 1"),
        ("env_vars: {GLOO_SOCKET_IFNAME: Your SOCKET IFNAME}", "'Your SOCKET IFNAME', which is no name of a network interface"),
        ("env_vars: {HCCL_IF_BASE_PORT: 80}", "HCCL_IF_BASE_PORT is '80'; give a port from 1024 to 65535"),
        ("env_vars: {HCCL_HOST_SOCKET_PORT_RANGE: 60050-60000}", "is '60050-60000'; give ports from 1024 to 65535 as first-last, or auto"),
        ("env_vars: {HCCL_NPU_SOCKET_PORT_RANGE: all}", "HCCL_NPU_SOCKET_PORT_RANGE is 'all'; give ports"),
        (
            "env_vars: {HCCL_HOST_SOCKET_PORT_RANGE: '1024,60000-60050', HCCL_NPU_SOCKET_PORT_RANGE: 60050-60100}",
            "HCCL_HOST_SOCKET_PORT_RANGE (1024,60000-60050) and HCCL_NPU_SOCKET_PORT_RANGE (60050-60100) share port 60050",
        ),
    ],
)
def test_what_can_not_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        read(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'env.yaml'}") and message in str(refused.value)


def test_what_is_of_no_use_here_is_left_out_and_told(tmp_path: Path) -> None:
    text = "env_vars: {VLLM_DP_SIZE: 8, OMP_NUM_THREADS: 4, RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES: 'true', A: 1}"
    on_cpu, on_npu = read(tmp_path, text, "cpu"), read(tmp_path, text)
    assert (on_cpu.variables, on_npu.variables) == ({"A": "1"}, {"A": "1", "OMP_NUM_THREADS": "4"})
    assert [note.split(" is left out: ")[0] for note in on_cpu.notes] == [
        "env.yaml: VLLM_DP_SIZE=8",
        "env.yaml: OMP_NUM_THREADS=4",
        "env.yaml: RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES=true",
    ]
    assert len(on_npu.notes) == 2
    assert "generate_config.infer_expert_parallel_size" in on_cpu.notes[0]


@pytest.mark.parametrize("name", [processes.RUN_MARKER, processes.NODE_MARKER, *processes.PROCESS_ENV])
def test_nobody_can_hide_processes_of_a_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="knows its own processes"):
        read(tmp_path, f"env_vars: {{{name}: x}}")


def test_what_the_rollout_engine_is_built_on_can_not_be_changed(tmp_path: Path) -> None:
    assert ROLLOUT_ENV["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING is 1, but the rollout engine needs 0"):
        read(tmp_path, "env_vars: {VLLM_ENABLE_V1_MULTIPROCESSING: 1}")
