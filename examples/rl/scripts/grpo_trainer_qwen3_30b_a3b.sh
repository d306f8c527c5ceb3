#!/usr/bin/env bash
# GRPO of Qwen3-MoE (30b, 3b active): bash examples/rl/scripts/grpo_trainer_qwen3_30b_a3b.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-grpo_trainer_qwen3_30b_a3b}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
