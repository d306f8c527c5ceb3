"""The device's numbers beside others' for the same thing: `update.py --parity`. A line each: what, how far off, how far it may be."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mindspeed_mm_rl.engines.megatron import process_groups
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.qwen2_5_vl import build_policy
from mindspeed_mm_rl.models.weight_layout import to_megatron
from mindspeed_mm_rl.models.weight_sources import HuggingFaceSource
from mindspeed_mm_rl.platforms import device, plain
from mindspeed_mm_rl.platforms.packed_sdpa import Segments
from tests.hf_versions import picture_tokens
from tests.plans import train_plan
from tests.tiny import make_tiny_vl

EXACT, ROUNDED = 2e-4, 0.02
"""Root mean square of the difference over that of the value: float32 with its products in any order, bfloat16 (8 bits)."""
NOT_WORSE = 1.5
"""Times Hugging Face's own distance in bfloat16 from its float32."""
GRIDS = ((1, 4, 6), (1, 12, 10), (1, 8, 8))


@dataclass(frozen=True)
class Line:
    what: str
    off: float
    bound: float


def main(write_text_model: Callable[[Path], Any]) -> int:
    """0 when nothing is further off than it may be."""
    # cuDNN would round the numbers of Hugging Face's convolution over patches to 11 bits, and with it the truth.
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        text, vision = Path(folder) / "text", Path(folder) / "vision"
        write_text_model(text)
        make_tiny_vl(vision)
        process_groups.initialize(train_plan(text), 0, 1, torch.distributed.HashStore())
        lines = [*kernels(), *logits("text model", text, ()), *logits("tiny Qwen2.5-VL", vision, GRIDS)]
    process_groups.destroy()
    print(f"{'on ' + str(device.current()):60}{'off':>12}{'may be':>12}")
    for line in lines:
        print(f"{line.what:60}{line.off:12.2e}{line.bound:12.2e}{'' if line.off <= line.bound else '  WRONG'}")
    return int(any(not line.off <= line.bound for line in lines))


def off(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    difference, expected = value.double() - expected.double(), expected.double()
    return math.sqrt(float(difference.square().mean() / expected.square().mean()))


# ---------------------------------------------------------------------- logits


def logits(name: str, folder: Path, grids: tuple[tuple[int, int, int], ...]) -> Iterator[Line]:
    """Of packed sequences of ours, of one at a time at Hugging Face; that one's float32 is the truth."""
    rows, pixels = _sequences(folder, grids)
    truth, theirs = (_of_hugging_face(folder, rows, grids, pixels, dtype) for dtype in (torch.float32, torch.bfloat16))
    yield Line(f"{name}: logits, float32", off(_of_policy(folder, rows, grids, pixels, torch.float32), truth), EXACT)
    ours = off(_of_policy(folder, rows, grids, pixels, torch.bfloat16), truth)
    yield Line(f"{name}: logits, bfloat16, beside Hugging Face's own {off(theirs, truth):.1e}", ours, NOT_WORSE * off(theirs, truth))


def _sequences(folder: Path, grids: tuple[tuple[int, int, int], ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Token ids, of which the last ones have a picture each, and the pixels."""
    architecture, generator = read_architecture(folder), torch.Generator().manual_seed(0)
    rows = [torch.randint(40, min(400, architecture.text.vocab_size), (length,), generator=generator) for length in (5, 300, 1, 77)]
    for _, height, width in grids:
        picture = [
            architecture.vision_start_token_id,
            *[architecture.image_token_id] * (height * width // 4),
            architecture.vision_end_token_id,
        ]
        rows.append(torch.cat([rows[0], torch.tensor(picture), rows[3]]))
    patches = sum(time * height * width for time, height, width in grids)
    return [row.to(device.current()) for row in rows], torch.randn(patches, 3 * 2 * 14 * 14, generator=generator).to(device.current())


@torch.no_grad()
def _of_policy(
    folder: Path, rows: list[torch.Tensor], grids: tuple[tuple[int, int, int], ...], pixels: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    architecture = read_architecture(folder)
    policy = build_policy(architecture, dtype=dtype).eval()
    source = HuggingFaceSource(folder, architecture.raw)
    policy.load_weights(to_megatron({name: source[name] for name in source.shapes}, architecture.raw))
    features = policy.encode_images(pixels, grids) if grids else None
    per_row = [[]] * (len(rows) - len(grids)) + [[grid] for grid in grids]
    return policy.logits(policy(torch.cat(rows), policy.layout([row.cpu() for row in rows], per_row), features))


@torch.no_grad()
def _of_hugging_face(
    folder: Path, rows: list[torch.Tensor], grids: tuple[tuple[int, int, int], ...], pixels: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    kind = transformers.AutoModelForImageTextToText if grids else transformers.AutoModelForCausalLM
    hf = kind.from_pretrained(folder, dtype=dtype).eval().to(device.current())
    pictures = dict(
        zip(range(len(rows) - len(grids), len(rows)), zip(grids, pixels.split([h * w for _, h, w in grids]), strict=True), strict=True)
    )
    found = []
    for number, row in enumerate(rows):
        inputs = picture_tokens(row[None], hf.config.image_token_id) if grids else {}
        if number in pictures:
            grid, own = pictures[number]
            inputs |= {"pixel_values": own.to(dtype), "image_grid_thw": torch.tensor([grid], device=row.device)}
        found.append(hf(input_ids=row[None], **inputs).logits[0])
    return torch.cat(found)


# --------------------------------------------------------------------- kernels


def kernels() -> Iterator[Line]:
    for dtype, bound in ((torch.float32, EXACT), (torch.bfloat16, ROUNDED)):
        name = str(dtype).removeprefix("torch.")
        yield from (Line(f"{what}, {name}", found, bound) for what, found in _attentions(dtype))
        yield from (Line(f"{what}, {name}", found, bound) for what, found in _others(dtype))


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(device.current(), dtype).requires_grad_()


def _with_gradients(output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output)
    gradients = torch.autograd.grad((output * weight).sum(), inputs)
    return torch.cat([each.flatten().double() for each in (output, *gradients)])


def _attentions(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Output and gradients, against attention in float32 one sequence at a time."""
    cases = (
        ("causal, 8 heads of 64", (130, 1, 77, 512), None, True, 8, 8, 64),
        ("causal, 12 heads on 2 of 128", (130, 1, 77, 512), None, True, 12, 2, 128),
        ("causal, more keys than queries", (64, 1, 30), (100, 40, 30), True, 4, 2, 128),
        ("whole, 16 heads of 80", (64,) * 40 + (16, 8), None, False, 16, 16, 80),
    )
    for what, queries, keys, causal, heads, kv_heads, width in cases:
        segments = Segments.of(queries, keys or queries, device.current())
        shapes = ((sum(segments.queries), heads, width), *[(sum(segments.keys), kv_heads, width)] * 2)
        inputs = [_random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
        wide = [each.detach().float().requires_grad_() for each in inputs]
        output = device.packed_attention(*inputs, segments, causal, width**-0.5)
        expected = _one_by_one(*wide, segments, causal)
        yield f"packed attention, {what}", off(_with_gradients(output, *inputs), _with_gradients(expected, *wide))


def _one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, causal: bool) -> torch.Tensor:
    outputs = []
    for each in zip(query.split(segments.queries), key.split(segments.keys), value.split(segments.keys), strict=True):
        q, k, v = (part.transpose(0, 1) for part in each)
        k, v = (part.repeat_interleave(len(q) // len(k), dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
        outputs.append((scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1) @ v)
    return torch.cat([output.transpose(0, 1) for output in outputs])


def _others(dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The device's kernel beside the plain one in float32, output and gradients."""
    hidden, weight = _random(37, 1, 512, dtype=dtype, seed=0), _random(512, dtype=dtype, seed=1)
    yield "norm", _beside(lambda kernels, x, w: kernels.rms_norm(x, w, 1e-6), hidden, weight)
    yield "SwiGLU", _beside(lambda kernels, x: kernels.swiglu(x), hidden)
    angles = torch.rand(37, 64, generator=torch.Generator().manual_seed(2)).to(device.current()).repeat(1, 2)
    yield "rope", _beside(lambda kernels, x: kernels.rope(x, angles.cos(), angles.sin()), _random(37, 4, 128, dtype=dtype, seed=3))
    weights = [_random(256, 512, dtype=dtype, seed=seed) for seed in range(4, 8)]
    tokens = _random(301, 512, dtype=dtype, seed=8)
    yield "grouped product", _beside(lambda kernels, x, *w: kernels.grouped_matmul(x, w, (7, 0, 200, 94)), tokens, *weights)


def _beside(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> float:
    wide = [each.detach().float().requires_grad_() for each in inputs]
    return off(_with_gradients(call(device, *inputs), *inputs), _with_gradients(call(plain, *wide), *wide))
