#!/usr/bin/env bash
# GRPO of DeepSeek-V3/R1 (671b): bash examples/rl/scripts/grpo_trainer_deepseek_r1_671b.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-grpo_trainer_deepseek_r1_671b}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
