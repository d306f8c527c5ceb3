#!/usr/bin/env bash
# DPO of a tiny Qwen2.5 on sums: bash examples/rl/scripts/dpo_trainer_qwen25_tiny.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-dpo_trainer_qwen25_tiny}"
source "$(dirname "${BASH_SOURCE[0]}")/tiny_text.sh"
launch "$@"
