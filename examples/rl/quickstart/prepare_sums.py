"""Makes what the *_trainer_qwen25_tiny scripts start from, and skips what is there: sums, pairs of right and wrong ones, a tiny model, its
warm start, megatron weights.

The training configuration is checked first: a mistake in it is told in a second, not after a minute.

    python examples/rl/quickstart/prepare_sums.py --config examples/rl/configs/grpo_trainer_qwen25_tiny.yaml [section.key=value ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mindspeed_mm_rl.config.check import check
from mindspeed_mm_rl.config.load import load_config

MM_CONVERT = Path(__file__).resolve().parents[3] / "checkpoint" / "convert_cli.py"
WORK = Path("quickstart/text")
DATA, PAIRS = WORK / "data", WORK / "pairs"
RANDOM, WARM, MEGATRON = WORK / "model" / "random", WORK / "model" / "warm", WORK / "ckpt" / "mm"


def write_sums(seed: int) -> None:
    from sums import write_splits

    write_splits(DATA, seed)


def write_sum_pairs(seed: int) -> None:
    from sum_pairs import write_pairs

    write_pairs(DATA / "rl", PAIRS, seed)


def write_random_model(seed: int) -> None:
    from tiny_text_model import write_model

    write_model(RANDOM, seed)


def warm_up(seed: int) -> None:
    from sums_warm_start import warm_start

    warm_start(RANDOM, DATA / "warm_start", WARM, seed)


def to_megatron(seed: int) -> None:
    arguments = ["hf_to_mm", "--cfg.mm_dir", MEGATRON, "--cfg.hf_config.hf_dir", WARM, "--cfg.parallel_config.llm_pp_layers", "[[2]]"]
    if status := subprocess.run([sys.executable, MM_CONVERT, *arguments]).returncode:
        raise SystemExit(status)


STEPS: dict[Path, tuple[str, Callable[[int], None]]] = {
    DATA: ("write sums", write_sums),
    PAIRS: ("write pairs", write_sum_pairs),
    RANDOM: ("make a tiny model", write_random_model),
    WARM: ("warm start", warm_up),
    MEGATRON: ("convert to megatron", to_megatron),
}
"""What a step makes -> its name and itself. Each makes it whole or not at all."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML of the training that follows")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED", "0")), help="of sums and model (default: SEED, else 0)")
    args = parser.parse_args()
    try:
        check(load_config(args.config, args.overrides))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for made, (name, step) in STEPS.items():
        if made.exists():
            continue
        started = time.monotonic()
        step(args.seed)
        print(f"[prepare] {name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
