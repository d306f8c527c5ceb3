#!/usr/bin/env bash
# DAPO of Qwen2.5-VL (32b): bash examples/rl/scripts/dapo_trainer_qwen25vl_32b.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-dapo_trainer_qwen25vl_32b}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
