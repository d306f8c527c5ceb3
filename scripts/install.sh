#!/usr/bin/env bash
# Makes .venv beside this checkout and installs a device's requirements and the package into it. Run it again at any time: what is done is skipped.
#
#   bash scripts/install.sh [cpu|cuda|npu]   default: what the environment was made for; a new one: cpu
#
# PYTHON          interpreter to build the environment with (default: the first suitable of python3.11, python3.12 ..., python3)
# VENV            where the environment goes (default: .venv)
# TORCH_INDEX     package index to take a CPU build of torch from (default: pip's own configuration, and PyTorch's CPU index where that has none)
# WITHOUT_DEVICE  1 installs for a device that is not there, as in the build of an image
# DRY_RUN         1 checks nothing, changes nothing and prints the commands
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
DRY_RUN="${DRY_RUN:-0}"
WITHOUT_DEVICE="${WITHOUT_DEVICE:-0}"
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ASCEND=/usr/local/Ascend
LEAST_DRIVER=580

say() { echo "[install] $*"; }
fail() { echo "[install] error: $*" >&2; exit 1; }

# run COMMAND...  with DRY_RUN only shown
run() {
    if [ "$DRY_RUN" = 1 ]; then printf '%q ' "$@"; echo; else "$@"; fi
}

device_here() {
    if [ -e /dev/davinci_manager ]; then echo npu; elif [ -e /dev/nvidiactl ]; then echo cuda; else echo cpu; fi
}

default_device() { cat "$VENV/.device" 2>/dev/null || echo cpu; }

describe() {
    LOCK=requirements/$DEVICE.txt BUILT=requirements/$DEVICE-built.txt
    MACHINES="Linux-x86_64" PYTHONS=(3.11 3.12 3.13)
    case "$DEVICE" in
        cpu) NEEDED_GIB=8 SIZE_GIB=3 ;;
        cuda) NEEDED_GIB=20 SIZE_GIB=9 ;;
        npu) NEEDED_GIB=12 SIZE_GIB=4 MACHINES="Linux-aarch64 Linux-x86_64" PYTHONS=(3.11 3.10) ;;
        *) fail "'$DEVICE' is no device; it is one of cpu, cuda, npu." ;;
    esac
}

suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' "${PYTHONS[@]}" 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        suitable "$PYTHON" || fail "PYTHON=$PYTHON must be Python ${PYTHONS[*]} with the venv module ($LOCK holds wheels for these)."
        echo "$PYTHON"
        return
    fi
    for candidate in "${PYTHONS[@]/#/python}" python3; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python of ${PYTHONS[*]} with the venv module found. Install one (on Debian: apt install python3 python3-venv) or set PYTHON."
}

check_machine() {
    [[ " $MACHINES " == *" $(uname -s)-$(uname -m) "* ]] || fail "$LOCK is for $MACHINES; this is $(uname -s)-$(uname -m)."
    local free_gib
    if [ -d "$VENV" ] && [ "$(default_device)" != "$DEVICE" ]; then
        fail "$VENV was made for $(default_device): remove it, or give this one another place (VENV=.venv-$DEVICE bash scripts/install.sh $DEVICE)."
    fi
    "check_$DEVICE"
    free_gib=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free_gib" -ge "$NEEDED_GIB" ] || fail "$free_gib GiB free in $PWD, $NEEDED_GIB GiB needed while packages are unpacked; $SIZE_GIB of them stay."
}

check_cpu() { :; }

check_cuda() {
    if [ "$WITHOUT_DEVICE" = 1 ]; then return; fi
    command -v nvidia-smi >/dev/null || fail "no nvidia-smi, so no NVIDIA driver: install one, or take scripts/install.sh cpu (docs/cuda.md)."
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader) || fail "nvidia-smi finds no GPU: $driver"
    driver=${driver%%$'\n'*}
    ((${driver%%.*} >= LEAST_DRIVER)) || fail "the NVIDIA driver is $driver; the CUDA 13 of this torch needs $LEAST_DRIVER or newer."
}

check_npu() {
    command -v git >/dev/null || fail "git is needed: vLLM and MindSpeed are built from their repositories."
    if [ "$WITHOUT_DEVICE" = 1 ]; then return; fi
    [ -e /dev/davinci_manager ] || fail "no /dev/davinci_manager, so no NPU driver: install it, or pass the devices to the container (docs/npu.md)."
    local script
    for script in ascend-toolkit nnal/atb; do
        script=$ASCEND/$script/set_env.sh
        [ -f "$script" ] || fail "$script is missing: CANN and its NNAL come first (docs/npu.md)."
        set +u  # these read unset variables
        # shellcheck disable=SC1090
        source "$script"
        set -u
    done
}

make_environment() {
    local python="${PYTHON:-python${PYTHONS[0]}}"
    if [ "$DRY_RUN" = 1 ]; then
        run "$python" -m venv "$VENV"
        return
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        python=$(find_python)
        say "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
        echo "$DEVICE" > "$VENV/.device"
    fi
    suitable "$VENV/bin/python" ||
        fail "$VENV holds $("$VENV/bin/python" --version 2>&1), not Python ${PYTHONS[*]}: remove it and run this again."
}

# Lines of the lock that this machine takes.
pins() { awk -v machine="$(uname -m)" '/^[^#].*==/ && (!/;/ || index($0, machine))' "$LOCK"; }

# A pip argument list: empty where the configured index offers the CPU build of torch, or none is wanted.
torch_index_arguments() {
    local torch
    torch=$(pins | awk '/^torch==/ { print $1 }')
    if [[ "$torch" != *+cpu ]]; then
        return
    elif [ -n "${TORCH_INDEX:-}" ]; then
        say "torch comes from TORCH_INDEX=$TORCH_INDEX" >&2
        echo "--extra-index-url $TORCH_INDEX"
    elif [ "$DRY_RUN" = 1 ] || ! "$VENV/bin/pip" install --quiet --dry-run --no-deps "$torch" >/dev/null 2>&1; then
        say "the configured package index has no $torch: using $PYTORCH_CPU_INDEX" >&2
        echo "--extra-index-url $PYTORCH_CPU_INDEX"
    fi
}

install_lock() {
    local index total
    index=$(torch_index_arguments)
    total=$(pins | wc -l)
    # shellcheck disable=SC2086  # words are wanted: an option and its value, or nothing
    run "$VENV/bin/pip" install --progress-bar off --no-deps -r "$LOCK" $index 2> >(grep -v '^WARNING: ' >&2) |
        awk -v total="$total" -v shown="$DRY_RUN" 'shown == 1 { print } /^(Collecting|Processing|Requirement already)/ && (++n % 20 == 0 || n == total) {
            print "[install] " n " of " total " packages fetched"; fflush() }'
}

# torch would load torch_npu, which fails without a driver; vLLM's kernels are vllm-ascend's.
install_built() {
    if [ ! -f "$BUILT" ]; then return; fi
    local requirement
    while read -r requirement; do
        if [ "$DRY_RUN" != 1 ] && "$VENV/bin/pip" freeze 2>/dev/null | grep -qxF "$requirement"; then continue; fi
        say "building ${requirement%% *}"
        run env TORCH_DEVICE_BACKEND_AUTOLOAD=0 VLLM_TARGET_DEVICE=empty \
            "$VENV/bin/pip" install --quiet --no-deps --no-build-isolation "$requirement" </dev/null
    done < <(grep ' @ ' "$BUILT")
}

check_imports() {
    local more=()
    if [ "$DEVICE" = npu ] && [ "$WITHOUT_DEVICE" = 1 ]; then export TORCH_DEVICE_BACKEND_AUTOLOAD=0 VLLM_PLUGINS=""; fi
    if [ "$DEVICE" = npu ] && [ "$WITHOUT_DEVICE" != 1 ]; then more=(torch_npu mindspeed vllm_ascend); fi
    OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR run "$VENV/bin/python" -W ignore - "${more[@]}" <<'PYTHON'
import importlib, sys
import mindspeed_mm_rl  # noqa: F401  first: it makes torchvision importable beside a CPU torch
import datasets, jsonargparse, math_verify, mathruler.grader, matplotlib, megatron.core, omegaconf, ray, tensorboard, torch
import torchvision, transformers, typer, vllm

for module in sys.argv[1:]:
    importlib.import_module(module)
print(f"[install] torch {torch.__version__}, vllm {vllm.__version__}, megatron-core {megatron.core.__version__}, ray {ray.__version__},",
      f"transformers {transformers.__version__}")
PYTHON
}

fingerprint() { cat requirements/"$DEVICE"*.txt setup.py scripts/install.sh | sha256sum | cut -d' ' -f1; }

is_up_to_date() { [ -f "$VENV/.installed" ] && [ "$(cat "$VENV/.installed")" = "$(fingerprint)" ]; }

main() {
    DEVICE="${1:-$(default_device)}"
    describe
    if [ "$DRY_RUN" != 1 ]; then
        if is_up_to_date; then
            say "$VENV is up to date."
            return
        fi
        check_machine
    fi
    make_environment
    say "installing $(pins | wc -l) pinned packages from $LOCK (about $SIZE_GIB GiB in $VENV; minutes)"
    install_lock
    install_built
    say "installing this checkout: commands mm-rl and mm-convert"
    run "$VENV/bin/pip" install --quiet --no-deps --no-build-isolation -e .
    say "checking that the engines import"
    check_imports
    if [ "$DRY_RUN" = 1 ]; then return; fi
    fingerprint > "$VENV/.installed"
    say "done: source $VENV/bin/activate, then: mm-rl env"
    local there
    there=$(device_here)
    if [ "$there" != cpu ] && [ "$DEVICE" = cpu ]; then
        say "this environment is for the CPU; for the ${there^^} of this machine: VENV=.venv-$there bash scripts/install.sh $there"
    fi
}

main "$@"
