# Sourced by the *_trainer_*.sh scripts. One machine: mm-rl train. Several: run the same script on each; the one whose CURRENT_IP is
# MASTER_ADDR starts Ray's head, waits for the others and trains, the others lend their devices until it is done.
#
#   NNODES          machines (1)
#   NPUS_PER_NODE   devices that a machine lends to Ray when NNODES > 1 (8; on CPU machines 0)
#   MASTER_ADDR     address of the head (localhost; a real address when NNODES > 1)
#   CURRENT_IP      address of this machine (of SOCKET_IFNAME, else the first one)
#   SOCKET_IFNAME   network interface between the machines (chosen by the libraries)
#   DEFAULT_YAML    name below examples/rl/configs, or a file
#   WAIT_SECONDS    how long machines wait for each other (600)
#   MAX_RESTARTS    how often a run that failed is brought back from its newest save (0); never after an error of the user's (exit
#                   code 2), Ctrl-C or SIGTERM
#   RAY_AUTH_MODE   token: machines that join hold the same token (`ray get-auth-token --generate` on one, then copy ~/.ray/auth_token);
#                   disabled: anyone who reaches MASTER_ADDR can run code on the machines, so only on a network of your own

set -euo pipefail
# New files are 640 and folders 750, those of Ray too; a stricter umask stays.
umask "$(printf '%04o' $((0$(umask) | 0027)))"

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"
RAY_PORT=6766

launch() {
    NNODES="${NNODES:-1}" NPUS_PER_NODE="${NPUS_PER_NODE:-8}" MASTER_ADDR="${MASTER_ADDR:-localhost}" WAIT_SECONDS="${WAIT_SECONDS:-600}"
    MAX_RESTARTS="${MAX_RESTARTS:-0}"
    if [[ $# -gt 0 && "$1" != *=* && "$1" != -* ]]; then
        DEFAULT_YAML="$1"
        shift
    fi
    check_number NNODES 1
    check_number NPUS_PER_NODE 0
    check_number WAIT_SECONDS 1
    check_number MAX_RESTARTS 0
    use_environment
    preload_jemalloc
    if [[ "$NNODES" == 1 ]]; then
        train "$@"
    else
        launch_on_several "$@"
    fi
}

# check_number NAME LEAST
check_number() {
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
    if command -v mm-rl >/dev/null; then
        command=(mm-rl)
    else
        export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
        command=(python -m mindspeed_mm_rl.cli.main)
    fi
    command+=(train --config "$config" "$@")
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

launch_on_several() {
    if [[ "$MASTER_ADDR" == localhost || "$MASTER_ADDR" == 127.* ]]; then
        echo "error: MASTER_ADDR is $MASTER_ADDR, but NNODES is $NNODES: give the address of the first machine as the others see it" >&2
        return 2
    fi
    CURRENT_IP="${CURRENT_IP:-$(own_address)}"
    if [[ -z "$CURRENT_IP" ]]; then
        echo "error: SOCKET_IFNAME is ${SOCKET_IFNAME:-not set}, which has no IPv4 address here: correct it, or set CURRENT_IP" >&2
        return 2
    fi
    export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" RAY_USAGE_STATS_ENABLED=0
    local resources='{}'
    if [[ -e /dev/davinci_manager ]]; then resources="{\"NPU\": $NPUS_PER_NODE}"; fi
    if [[ "$CURRENT_IP" == "$MASTER_ADDR" ]]; then
        ray start --head --block --port "$RAY_PORT" --node-ip-address "$CURRENT_IP" --include-dashboard false --resources "$resources" &
        stop_at_exit $!
        export RAY_ADDRESS="$MASTER_ADDR:$RAY_PORT"
        wait_for_nodes
        train "$@"
    else
        join_head "$resources"
    fi
}

own_address() {
    if [[ -n "${SOCKET_IFNAME:-}" ]]; then
        { ip -4 -o addr show "$SOCKET_IFNAME" 2>/dev/null || true; } | awk '{ sub("/.*", "", $4); print $4; exit }'
    else
        hostname -I | awk '{ print $1 }'
    fi
}

stop_at_exit() {
    # shellcheck disable=SC2064  (the id of now)
    trap "kill $1 2>/dev/null || true; wait $1 2>/dev/null || true" EXIT
}

wait_for_nodes() {
    NNODES="$NNODES" WAIT_SECONDS="$WAIT_SECONDS" python - <<'PYTHON'
import os
import sys
import time

import ray

wanted, deadline, alive = int(os.environ["NNODES"]), time.monotonic() + float(os.environ["WAIT_SECONDS"]), 0
while time.monotonic() < deadline:
    try:
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        alive = sum(node["Alive"] for node in ray.nodes())
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
        print(f"the head doesn't answer yet: {reason[:200]}", file=sys.stderr)
    if alive >= wanted:
        sys.exit(0)
    print(f"waiting for machines: {alive} of {wanted}", file=sys.stderr)
    time.sleep(5)
sys.exit(f"error: {alive} of {wanted} machines joined within WAIT_SECONDS={os.environ['WAIT_SECONDS']}; is the script running on all of them?")
PYTHON
}

# Lends this machine until the head is gone.
join_head() {
    local deadline=$((SECONDS + WAIT_SECONDS))
    until timeout 30 ray health-check --address "$MASTER_ADDR:$RAY_PORT" >/dev/null 2>&1; do
        if ((SECONDS >= deadline)); then
            echo "error: no Ray head answers at $MASTER_ADDR:$RAY_PORT within WAIT_SECONDS=$WAIT_SECONDS; is the script running there," \
                "and do both machines hold the same Ray token (RAY_AUTH_MODE=$RAY_AUTH_MODE)?" >&2
            return 2
        fi
        sleep 5
    done
    local began=$SECONDS
    # A joined machine ends with an error code when the head goes away, which is how every run ends; one that never joined ends at once.
    if ! ray start --address "$MASTER_ADDR:$RAY_PORT" --node-ip-address "$CURRENT_IP" --resources "$1" --block && ((SECONDS - began < 20)); then
        echo "error: this machine ($CURRENT_IP) could not join $MASTER_ADDR:$RAY_PORT; Ray's reason is above" >&2
        return 1
    fi
    echo "the run at $MASTER_ADDR is over"
}
