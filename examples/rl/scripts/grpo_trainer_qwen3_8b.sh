#!/usr/bin/env bash
# GRPO of Qwen3 (8b): bash examples/rl/scripts/grpo_trainer_qwen3_8b.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-grpo_trainer_qwen3_8b}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
