# Sourced by the *_trainer_*.sh scripts. One machine: mm-rl train. Several: run the same script on each (docs/clusters.md). One of them, the
# head, starts Ray, waits for the others and trains; the others lend their devices until it is done, and end with its exit code.
#
#   DEFAULT_YAML    name below examples/rl/configs, or a file
#   NNODES          machines (1)
#   NPUS_PER_NODE   devices that a machine lends when NNODES > 1 (as many as it has)
#   MASTER_ADDR     address or name of the head, as the others see it
#   NODE_RANK       0 for the head (the machine whose address MASTER_ADDR is)
#   CURRENT_IP      address of this machine (of SOCKET_IFNAME, else the one towards MASTER_ADDR)
#   SOCKET_IFNAME   network interface between the machines (chosen by the libraries)
#   RAY_PORT        port of the head (6766); runs that share a machine have different ones
#   RAY_ADDRESS     a Ray cluster that is there already: the script only trains on it, on one machine, whatever NNODES is
#   WAIT_SECONDS    how long machines wait for each other (the head for the others 600, they for the head 40)
#   MAX_RESTARTS    how often a run that failed is brought back from its newest save (0); never after an error of the user's (exit
#                   code 2), Ctrl-C or SIGTERM
#   RAY_AUTH_MODE   token: machines that join hold the same token (`ray get-auth-token --generate` on one, then copy ~/.ray/auth_token);
#                   disabled: anyone who reaches MASTER_ADDR can run code on the machines, so only on a network of your own

set -euo pipefail
# New files are 640 and folders 750, those of Ray too; a stricter umask stays.
umask "$(printf '%04o' $((0$(umask) | 0027)))"

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"

launch() {
    NNODES="${NNODES:-1}" MASTER_ADDR="${MASTER_ADDR:-localhost}" MAX_RESTARTS="${MAX_RESTARTS:-0}"
    if [[ $# -gt 0 && "$1" != *=* && "$1" != -* ]]; then
        DEFAULT_YAML="$1"
        shift
    fi
    check_number NNODES 1
    check_number MAX_RESTARTS 0
    check_number NPUS_PER_NODE 0
    check_number WAIT_SECONDS 1
    check_number RAY_PORT 1024
    check_number NODE_RANK 0
    use_environment
    preload_jemalloc
    if command -v mm-rl >/dev/null; then
        MM_RL=(mm-rl)
    else
        export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
        MM_RL=(python -m mindspeed_mm_rl.cli.main)
    fi
    if ((10#$NNODES == 1)) || [[ -n "${RAY_ADDRESS:-}" ]]; then
        train "$@"
    else
        launch_on_several "$@"
    fi
}

# check_number NAME LEAST; one that is not set has a default elsewhere.
check_number() {
    if [[ -z "${!1:-}" ]]; then return; fi
    if [[ ! "${!1}" =~ ^[0-9]{1,9}$ ]] || ((10#${!1} < $2)); then
        echo "error: $1 is '${!1}'; it must be a whole number, at least $2" >&2
        exit 2
    fi
}

use_environment() {
    if [[ -z "${VIRTUAL_ENV:-}" && -x "$REPOSITORY/.venv/bin/python" ]]; then
        PATH="$REPOSITORY/.venv/bin:$PATH"
    fi
    local script
    for script in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
        # shellcheck disable=SC1090  (their scripts read unset variables)
        if [[ -f "$script" ]]; then set +u; source "$script"; set -u; fi
    done
    if [[ -n "${SOCKET_IFNAME:-}" ]]; then
        export GLOO_SOCKET_IFNAME="$SOCKET_IFNAME" TP_SOCKET_IFNAME="$SOCKET_IFNAME"
        export HCCL_SOCKET_IFNAME="$SOCKET_IFNAME" NCCL_SOCKET_IFNAME="$SOCKET_IFNAME"
    fi
    ulimit -n 32768 2>/dev/null || true
}

# Ray's processes don't give memory back to the system with the C library's allocator.
preload_jemalloc() {
    if [[ "${LD_PRELOAD:-}" == *jemalloc* ]]; then return; fi
    local library
    library="$({ ldconfig -p 2>/dev/null || true; } | awk '/libjemalloc\.so/ { print $NF; exit }')"
    if [[ -z "$library" ]]; then
        library="$(compgen -G '/usr/lib*/libjemalloc.so*' || compgen -G '/usr/lib/*/libjemalloc.so*' || compgen -G '/usr/local/lib/libjemalloc.so*' || true)"
        library="${library%%$'\n'*}"
    fi
    if [[ -n "$library" ]]; then
        export LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
    else
        echo "jemalloc not found: long runs use less memory with it (apt install libjemalloc2, or yum install jemalloc)" >&2
    fi
}

train() {
    local config="$DEFAULT_YAML" command restarts=0 status
    if [[ ! -f "$config" ]]; then config="$REPOSITORY/examples/rl/configs/${DEFAULT_YAML%.yaml}.yaml"; fi
    # Scripts whose task makes its own data and weights define it.
    if declare -F before_training >/dev/null; then before_training "$config" "$@" || return; fi
    command=("${MM_RL[@]}" train --config "$config" "$@")
    STOPPED=0
    while true; do
        status=0
        passing_signals_on "${command[@]}" || status=$?
        # Told to stop while Python was still starting, it ends with some other code.
        if ((STOPPED && status)); then return "$STOPPED"; fi
        if [[ "$status" =~ ^(0|2|129|130|143)$ ]]; then return "$status"; fi
        if ((restarts >= MAX_RESTARTS)); then
            if ((restarts > 0)); then echo "the run failed again, exit code $status: MAX_RESTARTS=$MAX_RESTARTS is used up" >&2; fi
            return "$status"
        fi
        restarts=$((restarts + 1))
        echo "restart $restarts of $MAX_RESTARTS after exit code $status: the run goes on from its newest save" >&2
        # The last one counts.
        if ((restarts == 1)); then command+=(rl_config.resume=auto); fi
    done
}

# Runs a command; what the script is told (Ctrl-C, SIGTERM, SIGHUP) reaches it at once. With the command in the foreground bash would
# first wait for its end. In a process group of its own the command doesn't get the terminal's Ctrl-C a second time.
passing_signals_on() {
    local status child again=1 name
    set -m
    "$@" &
    child=$!
    set +m
    for name in INT TERM HUP; do
        # shellcheck disable=SC2064  (the id of now)
        trap "STOPPED=$((128 + $(kill -l "$name"))) again=1; kill -$name $child 2>/dev/null || true" "$name"
    done
    while ((again)); do
        again=0 status=0
        wait "$child" || status=$?
    done
    trap - INT TERM HUP
    return "$status"
}

# The head runs this script once more, with RAY_ADDRESS set.
launch_on_several() {
    local name
    for name in NNODES NODE_RANK NPUS_PER_NODE MASTER_ADDR CURRENT_IP SOCKET_IFNAME RAY_PORT WAIT_SECONDS RAY_AUTH_MODE MAX_RESTARTS DEFAULT_YAML; do
        export "${name?}"
    done
    STOPPED=0
    passing_signals_on "${MM_RL[@]}" node -- bash "${BASH_SOURCE[-1]}" "$@"
}
