#!/usr/bin/env bash
# Makes .venv beside this checkout and installs the CPU requirements and the package into it. Run it again at any time: what is done is skipped.
#
#   bash scripts/install.sh
#
# PYTHON       interpreter to build the environment with (default: the first suitable of python3.11 ... python3.13, python3)
# VENV         where the environment goes (default: .venv)
# TORCH_INDEX  package index to take the CPU build of torch from (default: pip's own configuration, and PyTorch's CPU index where that has none)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
LOCK=requirements/cpu.txt
NEEDED_GIB=8
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { echo "[install] $*"; }
fail() { echo "[install] error: $*" >&2; exit 1; }

suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" || fail "PYTHON=$PYTHON must be Python 3.11, 3.12 or 3.13 with the venv module (the CPU lock holds wheels for these)."
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 with the venv module found. Install one (on Debian: apt install python3 python3-venv) or set PYTHON."
}

check_machine() {
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the CPU requirements are for x86-64 Linux; this is $(uname -s)-$(uname -m)."
    local free_gib
    free_gib=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free_gib" -ge "$NEEDED_GIB" ] || fail "$free_gib GiB free in $PWD, $NEEDED_GIB GiB needed (about 4 of them while packages are unpacked)."
}

# A pip argument list: empty where the configured index offers the CPU build of torch.
torch_index_arguments() {
    local torch
    torch=$(grep -E '^torch==' "$LOCK")
    if [ -n "${TORCH_INDEX:-}" ]; then
        say "torch comes from TORCH_INDEX=$TORCH_INDEX" >&2
        echo "--extra-index-url $TORCH_INDEX"
    elif ! "$VENV/bin/pip" install --quiet --dry-run --no-deps "$torch" >/dev/null 2>&1; then
        say "the configured package index has no $torch: using $PYTORCH_CPU_INDEX" >&2
        echo "--extra-index-url $PYTORCH_CPU_INDEX"
    fi
}

install_lock() {
    local index total
    index=$(torch_index_arguments)
    total=$(grep -c == "$LOCK")
    # shellcheck disable=SC2086  # words are wanted: an option and its value, or nothing
    "$VENV/bin/pip" install --progress-bar off --no-deps -r "$LOCK" $index 2> >(grep -v '^WARNING: ' >&2) |
        awk -v total="$total" '/^(Collecting|Requirement already)/ && (++n % 20 == 0 || n == total) {
            print "[install] " n " of " total " packages fetched"; fflush() }'
}

fingerprint() { cat "$LOCK" setup.py scripts/install.sh | sha256sum | cut -d' ' -f1; }

main() {
    if [ -f "$VENV/.installed" ] && [ "$(cat "$VENV/.installed")" = "$(fingerprint)" ]; then
        say "$VENV is up to date."
        return
    fi
    check_machine
    if [ ! -x "$VENV/bin/python" ]; then
        local python
        python=$(find_python)
        say "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    suitable "$VENV/bin/python" || fail "$VENV holds $("$VENV/bin/python" --version 2>&1), not Python 3.11 - 3.13: remove it and run this again."
    say "installing $(grep -c == "$LOCK") pinned packages from $LOCK (about 3 GiB in $VENV; minutes)"
    install_lock
    say "installing this checkout: commands mm-rl and mm-convert"
    "$VENV/bin/pip" install --quiet --no-deps --no-build-isolation -e .
    say "checking that the engines import"
    OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR "$VENV/bin/python" -W ignore - <<'PYTHON'
import mindspeed_mm_rl  # noqa: F401  first: it makes torchvision importable beside a CPU torch
import datasets, jsonargparse, math_verify, mathruler.grader, matplotlib, megatron.core, omegaconf, ray, tensorboard, torch
import torchvision, transformers, typer, vllm

print(f"[install] torch {torch.__version__}, vllm {vllm.__version__}, megatron-core {megatron.core.__version__}, ray {ray.__version__},",
      f"transformers {transformers.__version__}")
PYTHON
    fingerprint > "$VENV/.installed"
    say "done: source $VENV/bin/activate"
}

main "$@"
