#!/usr/bin/env bash
# Text data sets to the columns that training reads; paths are relative to the current folder.
#
#   bash examples/rl/data_preprocess/preprocess_data.sh math_17k|deepscaler|orca_rlhf|FILE.yaml [key=value ...]
#   bash examples/rl/data_preprocess/preprocess_data.sh deepscaler input=deepscaler.json tokenizer_name_or_path=~/Qwen2.5-7B output_prefix=data/math
set -euo pipefail

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
CONFIGS="$REPOSITORY/examples/rl/configs/datasets"
NAMES="$(cd "$CONFIGS" && printf '%s\n' *.yaml | sed 's/\.yaml$//' | paste -sd' ')"

if [[ $# -eq 0 || "$1" == *=* || "$1" == -* ]]; then
    echo "usage: preprocess_data.sh CONFIG [key=value ...]; CONFIG is a YAML file or one of: $NAMES" >&2
    exit 2
fi
config="$1"
shift
if [[ ! -f "$config" ]]; then config="$CONFIGS/${config%.yaml}.yaml"; fi
if [[ ! -f "$config" ]]; then
    echo "error: there is no configuration '$config'; choose one of: $NAMES, or give a YAML file" >&2
    exit 2
fi
if [[ -z "${VIRTUAL_ENV:-}" && -x "$REPOSITORY/.venv/bin/python" ]]; then
    PATH="$REPOSITORY/.venv/bin:$PATH"
fi
PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}" exec python -m mindspeed_mm_rl.cli.main preprocess --config "$config" "$@"
