# Sourced by the *_trainer_qwen25_tiny.sh scripts: sums, a tiny Qwen2.5 and its warm start are made when they are not there.
#
#   SEED   of sums and model (0)

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1

before_training() {
    local config="$1"
    shift
    PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}" python "$REPOSITORY/examples/rl/quickstart/prepare_sums.py" --config "$config" "$@"
}
