#!/usr/bin/env bash
# DPO of Qwen2.5-VL (tiny): bash examples/rl/scripts/dpo_trainer_qwen25vl_tiny.sh [config name or file] [section.key=value ...]
DEFAULT_YAML="${DEFAULT_YAML:-dpo_trainer_qwen25vl_tiny}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

before_training() {
    if [[ -e quickstart/pairs/test_blank.parquet ]]; then return; fi
    if [[ ! -e quickstart/data/geo3k/test.parquet ]]; then
        echo "error: quickstart/data/geo3k is not there: bash scripts/quickstart.sh makes pictures and model" >&2
        return 2
    fi
    PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}" python "$REPOSITORY/examples/rl/quickstart/picture_pairs.py" \
        --data quickstart/data/geo3k --out quickstart/pairs
}

launch "$@"
