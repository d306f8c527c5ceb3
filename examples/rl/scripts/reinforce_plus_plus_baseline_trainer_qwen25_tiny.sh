#!/usr/bin/env bash
# REINFORCE++ with a baseline of a tiny Qwen2.5 on sums: bash examples/rl/scripts/reinforce_plus_plus_baseline_trainer_qwen25_tiny.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-reinforce_plus_plus_baseline_trainer_qwen25_tiny}"
source "$(dirname "${BASH_SOURCE[0]}")/tiny_text.sh"
launch "$@"
