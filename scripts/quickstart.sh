#!/usr/bin/env bash
# From an empty checkout to a Qwen2.5-VL that reads geometry pictures better than before, on the CPU, in about ten minutes:
# installs, draws pictures, makes a tiny model, warms it up, trains it by DAPO on Ray, megatron-core and vLLM, and measures what it learned.
#
#   bash scripts/quickstart.sh
#
# Everything is written below quickstart/. Steps that are done are skipped; remove the folder to start anew.
# SEED   of pictures and model (default: 0)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
SEED="${SEED:-0}"
WORK=quickstart
TOOLS=examples/rl/quickstart
LAYOUT=(--cfg.parallel_config.tp_size 1)

say() { echo "[quickstart] $*"; }

# step NAME OUTPUTS COMMAND...: runs the command once; what an interrupted one left behind is removed before the next try.
step() {
    local name=$1 outputs=$2 started=$SECONDS
    shift 2
    if [ -e "$WORK/.done/$name" ]; then
        say "$name: done before"
        return
    fi
    say "$name"
    # shellcheck disable=SC2086  # several outputs, and none of them has blanks
    rm -rf $outputs
    if ! "$@"; then
        say "error: the step '$name' failed; the command was: $*" >&2
        exit 1
    fi
    touch "$WORK/.done/$name"
    say "$name: $((SECONDS - started)) s"
}

preprocess() {
    python examples/rl/data_preprocess/geo3k.py --local_data "$WORK/pictures/warm_start" --local_dir "$WORK/data/warm_start"
    python examples/rl/data_preprocess/geo3k.py --local_data "$WORK/pictures/rl" --local_dir "$WORK/data/geo3k"
}

tiny_model() { python $TOOLS/tiny_model.py --data $WORK/data/geo3k/train.parquet --out $WORK/model/random --seed "$SEED"; }

warm_start() { python $TOOLS/warm_start.py --model $WORK/model/random --data $WORK/data/warm_start --out $WORK/model/warm --seed "$SEED"; }

to_megatron() {
    mm-convert Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir $WORK/ckpt/mm --cfg.hf_config.hf_dir $WORK/model/warm \
        --cfg.parallel_config.llm_pp_layers '[[2]]' --cfg.parallel_config.vit_pp_layers '[[3]]' "${LAYOUT[@]}"
}

train() { bash examples/rl/scripts/dapo_trainer_qwen25vl_tiny.sh; }

to_huggingface() {
    mm-convert Qwen2_5_VLConverter mm_to_hf --cfg.save_hf_dir $WORK/model/trained --cfg.mm_dir $WORK/ckpt/dapo \
        --cfg.hf_config.hf_dir $WORK/model/warm \
        --cfg.parallel_config.llm_pp_layers '[2]' --cfg.parallel_config.vit_pp_layers '[3]' "${LAYOUT[@]}"
}

evaluate() {
    python $TOOLS/evaluate.py --model before=$WORK/model/warm after=$WORK/model/trained \
        --data $WORK/data/geo3k/test.parquet --out $WORK/evaluation.json
}

main() {
    bash scripts/install.sh
    export PATH="$PWD/$VENV/bin:$PATH" VIRTUAL_ENV="$PWD/$VENV" OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
    mkdir -p $WORK/.done
    SECONDS=0
    step "draw pictures" "$WORK/pictures" python $TOOLS/pictures.py --out $WORK/pictures --seed "$SEED"
    step "make training rows" "$WORK/data" preprocess
    step "make a tiny model" "$WORK/model/random" tiny_model
    step "warm start" "$WORK/model/warm" warm_start
    step "convert to megatron" "$WORK/ckpt/mm" to_megatron
    step "train by DAPO" "$WORK/ckpt/dapo $WORK/logs/dapo" train
    step "convert to Hugging Face" "$WORK/model/trained" to_huggingface
    step "evaluate" "$WORK/evaluation.json" evaluate
    say "$SECONDS s after installing; curves: $WORK/logs/dapo/curves.png, metrics: $WORK/logs/dapo/metrics.jsonl"
    python $TOOLS/verdict.py $WORK/evaluation.json
}

main "$@"
