#!/usr/bin/env bash
# GRPO of Qwen2.5-VL (3b): bash examples/rl/scripts/grpo_trainer_qwen25vl_3b.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-grpo_trainer_qwen25vl_3b}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
