"""How many tokens per second does the train engine update, beside Hugging Face on the same tokens in the same run? A table, a JSON line.

A random model of the shape of a Qwen2.5, one process, no Ray. Ours: packed samples, policy loss, gradients summed in float32; then Adam's
step. Hugging Face: its own forward with labels and backward, rows of one length, so without padding and with its fastest attention; no
optimizer. Both take turns, medians are printed. Model FLOPs count every matrix product once, attention below the diagonal and the head at
response tokens; MFU is their share of what one large matrix product reaches here, or of --peak_tflops.

--parity compares instead: logits with Hugging Face, packed attention with plain attention one sequence at a time, fused kernels with plain
ones; exit code 1 where something is off.

Example:
    python benchmarks/update.py                                  (tiny, for a CPU)
    python benchmarks/update.py --preset 1.5b --peak_tflops 989  (about 80 GB; 7b: 110 GB)
    python benchmarks/update.py --preset 1.5b --parity
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
from mindspeed_mm_rl.engines.base import UpdateRequest
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import Batch, Ragged
from tests.plans import train_plan

if TYPE_CHECKING:
    import transformers

LOSS = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.2))
IGNORED = -100
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192, "npu": 8192}


@dataclass(frozen=True)
class Preset:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    dtype: str
    samples: int
    """Of a mini-batch."""
    prompt: int
    response: int
    micro_samples: int
    """Of a micro-batch, on either side."""

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def forward_flops(self) -> float:
        """Of a mini-batch; forward and backward are three times that."""
        width = self.hidden // self.heads
        projections = 2 * self.hidden * (self.heads + self.kv_heads) * width
        of_layers = 2 * self.layers * (projections + 3 * self.hidden * self.intermediate) * self.tokens
        attention = 2 * self.layers * self.hidden * self.length**2 * self.samples
        return of_layers + attention + 2 * self.hidden * self.vocab * self.samples * self.response


PRESETS = {
    "tiny": Preset(256, 1024, 4, 8, 4, 4096, True, "float32", samples=8, prompt=32, response=96, micro_samples=4),
    "1.5b": Preset(1536, 8960, 28, 12, 2, 151936, True, "bfloat16", samples=32, prompt=1024, response=1024, micro_samples=4),
    # A part of the layers: with Adam's state the whole model wants 140 GB.
    "7b": Preset(3584, 18944, 12, 28, 4, 152064, False, "bfloat16", samples=32, prompt=1024, response=1024, micro_samples=2),
}


def write_model(preset: Preset, folder: Path) -> transformers.PreTrainedModel:
    """Random weights, in the preset's dtype; the model that was written."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=preset.vocab,
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=preset.tied,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with device.current():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, preset.dtype))
    model.save_pretrained(folder)
    return model.train()


def draw_batch(preset: Preset) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def rows(length: int) -> Ragged:
        return Ragged.from_rows(
            [torch.randint(2, preset.vocab, (length,), generator=generator) for _ in range(preset.samples)], torch.int64
        )

    lengths = (preset.response,) * preset.samples
    ones = torch.ones(preset.samples * preset.response)
    return Batch(
        sample_ids=tuple(range(preset.samples)),
        prompts=rows(preset.prompt),
        responses=rows(preset.response),
        loss_mask=Ragged(ones, lengths),
        rollout_logprobs=Ragged(-ones, lengths),
        image_keys=((),) * preset.samples,
        rewards=(0.0,) * preset.samples,
        samples_per_prompt=1,
        advantages=Ragged(torch.randn(len(ones), generator=generator), lengths),
    )


class Ours:
    def __init__(self, preset: Preset, folder: Path, batch: Batch, recompute: str | None, threads: int) -> None:
        # Imported here: the platform must adapt megatron before it is first imported.
        from mindspeed_mm_rl.engines.megatron import process_groups
        from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

        tokens = preset.micro_samples * preset.length
        plan = train_plan(folder, dtype=preset.dtype, max_tokens_per_micro_batch=tokens, recompute=recompute, deterministic=False)
        plan = replace(plan, threads=threads, temperature=1.0, optimizer=replace(plan.optimizer, lr=1e-6))
        process_groups.initialize(plan, 0, 1, torch.distributed.HashStore())
        self.engine = MegatronTrainEngine(plan, with_reference=False, entropy_bonus=False, publish_vision=False)
        self.batch = batch
        self.request = UpdateRequest(batch, range(len(batch)), float(batch.loss_mask.values.sum()), float(len(batch)))
        self.norm = 0.0

    def forward(self) -> None:
        self.engine.logprobs(self.batch, range(len(self.batch)), {})

    def forward_backward(self) -> None:
        self.norm = self.engine.gradients(self.request, {}, LOSS)[0]["grad_norm"]

    def step(self) -> None:
        self.engine.step(self.norm)

    def end(self) -> None:
        from mindspeed_mm_rl.engines.megatron import process_groups

        process_groups.destroy()


class Theirs:
    def __init__(self, model: transformers.PreTrainedModel, batch: Batch, micro_samples: int) -> None:
        self.model = model
        pairs = list(zip(batch.prompts.rows(), batch.responses.rows(), strict=True))
        tokens = torch.stack([torch.cat(pair) for pair in pairs]).to(device.current())
        labels = torch.stack([torch.cat([torch.full_like(prompt, IGNORED), response]) for prompt, response in pairs]).to(tokens.device)
        self.micros = list(zip(tokens.split(micro_samples), labels.split(micro_samples), strict=True))

    @torch.no_grad()
    def forward(self) -> None:
        for tokens, labels in self.micros:
            self.model(input_ids=tokens, labels=labels, use_cache=False)

    def forward_backward(self) -> None:
        for tokens, labels in self.micros:
            self.model(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        self.model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], None]) -> float:
    device.synchronize()
    start = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - start


class LargeProduct:
    def __init__(self, dtype: torch.dtype) -> None:
        side = MATMUL_SIDE[device.kind()]
        self.left, self.right = (torch.randn(side, side, device=device.current(), dtype=dtype) for _ in range(2))
        self.flops = 2 * side**3

    def __call__(self) -> None:
        torch.matmul(self.left, self.right)


def measure(preset: Preset, repeats: int, recompute: str | None, threads: int) -> tuple[dict[str, float], float]:
    """Median seconds of each part, and what the device reaches in one large matrix product at its best, in FLOP per second."""
    product = LargeProduct(getattr(torch, preset.dtype))
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(preset, Path(folder))
        batch = draw_batch(preset)
        ours, theirs = Ours(preset, Path(folder), batch, recompute, threads), Theirs(model, batch, preset.micro_samples)
    works = {
        "forward": ours.forward,
        "forward HF": theirs.forward,
        "forward+backward": ours.forward_backward,
        "step": ours.step,
        "forward+backward HF": theirs.forward_backward,
        "large product": product,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + repeats):
        for name, work in works.items():
            times[name].append(seconds(work))
    ours.end()
    # The first round loads kernels.
    return {name: median(found[1:]) for name, found in times.items()}, product.flops / min(times["large product"])


def report(preset: Preset, times: dict[str, float], peak: float) -> None:
    update = times["forward+backward"] + times["step"]
    rows = [
        ("log-probs (forward)", times["forward"], times["forward HF"], 1),
        ("forward and backward", times["forward+backward"], times["forward+backward HF"], 3),
        ("update (with Adam's step)", update, None, 3),
    ]
    print(f"{'':28}{'tokens/s':>10}{'MFU':>8}{'HF tokens/s':>14}{'HF MFU':>8}{'ratio':>8}")
    for name, own, other, passes in rows:
        flops = passes * preset.forward_flops
        line = f"{name:28}{preset.tokens / own:10.0f}{flops / own / peak:8.1%}"
        print(line + (f"{preset.tokens / other:14.0f}{flops / other / peak:8.1%}{other / own:8.2f}" if other else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recompute", choices=("full", "selective"))
    parser.add_argument("--peak_tflops", type=float, help="of the device, by its data sheet; default: measured by a matrix product")
    parser.add_argument("--threads", type=int, default=1, help="on CPU")
    parser.add_argument("--parity", action="store_true")
    options = parser.parse_args()
    device.set_threads(options.threads)
    device.adapt_megatron()
    preset = PRESETS[options.preset]
    preset = replace(preset, layers=options.layers or preset.layers)
    if options.parity:
        from benchmarks import device_parity

        return device_parity.main(functools.partial(write_model, preset))
    times, measured = measure(preset, options.repeats, options.recompute, options.threads)
    peak = options.peak_tflops * 1e12 if options.peak_tflops else measured
    of = f"{preset.dtype}, {preset.samples} samples of {preset.prompt} + {preset.response} tokens"
    source = "given" if options.peak_tflops else "measured"
    print(f"{options.preset} on {device.current()}, {of}, peak {peak / 1e12:.4g} TFLOP/s ({source})")
    report(preset, times, peak)
    facts: dict[str, Any] = {"preset": asdict(preset), "seconds": times, "peak_flops": peak, "memory_bytes": device.peak_memory_bytes()}
    print(json.dumps(facts | {"torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
