#!/usr/bin/env bash
# PPO of Qwen2.5-VL (tiny): bash examples/rl/scripts/ppo_trainer_qwen25vl_tiny.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-ppo_trainer_qwen25vl_tiny}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
