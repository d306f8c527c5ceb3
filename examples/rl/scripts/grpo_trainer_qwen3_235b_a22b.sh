#!/usr/bin/env bash
# GRPO of Qwen3-MoE (235b, 22b active): bash examples/rl/scripts/grpo_trainer_qwen3_235b_a22b.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-grpo_trainer_qwen3_235b_a22b}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
