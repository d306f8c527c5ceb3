"""Packed attention against a softmax written out in float64, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.platforms.packed_sdpa import Segments, packed_sdpa

LENGTHS = (5, 1, 40, 42, 41, 5, 130, 44)


def whole(*lengths: int) -> Segments:
    return Segments.of(lengths, lengths, torch.device("cpu"))


def heads(tokens: int, seed: int, kv_heads: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, count, 32, generator=generator, requires_grad=True) for count in (4, kv_heads, kv_heads))


def written_out(query, key, value, lengths: tuple[int, ...], causal: bool, scale: float) -> torch.Tensor:
    outputs = []
    repeat = query.shape[1] // key.shape[1]
    for q, k, v in zip(query.double().split(lengths), key.double().split(lengths), value.double().split(lengths), strict=True):
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, (40,) * 6, (7,)], ids=["mixed", "equal", "one"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_equals_the_written_out_softmax(lengths: tuple[int, ...], causal: bool, kv_heads: int):
    ours, theirs = heads(sum(lengths), 0, kv_heads), heads(sum(lengths), 0, kv_heads)
    weight = torch.randn(sum(lengths), 4, 32, generator=torch.Generator().manual_seed(1))
    output = packed_sdpa(*ours, whole(*lengths), causal, 0.2)
    expected = written_out(*theirs, lengths, causal, 0.2)
    torch.testing.assert_close(output, expected.float(), atol=2e-6, rtol=0)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-5, rtol=0)


def test_other_sequences_of_the_pack_do_not_matter():
    query, key, value = (tensor.detach() for tensor in heads(sum(LENGTHS), 0))
    before = packed_sdpa(query, key, value, whole(*LENGTHS), True, 0.2)
    changed = value.clone()
    changed[6:46] += 100.0
    after = packed_sdpa(query, key, changed, whole(*LENGTHS), True, 0.2)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[46:], after[46:])
    assert (before[6:46] - after[6:46]).abs().min() > 1.0


def test_later_tokens_do_not_matter_when_causal():
    query, key, value = (tensor.detach() for tensor in heads(9, 0))
    changed = value.clone()
    changed[5:] += 1.0
    before, after = (packed_sdpa(query, key, each, whole(9), True, 0.2) for each in (value, changed))
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])


@pytest.mark.parametrize("causal", [True, False])
def test_the_rear_of_a_sequence_attends_to_all_of_it(causal: bool):
    query, key, value = heads(16, 0)
    expected = written_out(query, key, value, (9, 7), causal, 0.2)
    segments = Segments.of((4, 7), (9, 7), torch.device("cpu"))
    output = packed_sdpa(query[5:], key, value, segments, causal, 0.2)
    torch.testing.assert_close(output, expected[5:].float(), atol=2e-6, rtol=0)


def test_runs_are_bit_identical():
    def run() -> list[torch.Tensor]:
        tensors = heads(sum(LENGTHS), 3)
        packed_sdpa(*tensors, whole(*LENGTHS), True, 0.2).square().sum().backward()
        return [tensor.grad for tensor in tensors]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_the_device_kernel_is_one_of_these():
    tensors = [tensor.detach().to(device.current()) for tensor in heads(sum(LENGTHS), 0)]
    output = device.packed_attention(*tensors, whole(*LENGTHS), True, 0.2)
    torch.testing.assert_close(output.cpu(), packed_sdpa(*heads(sum(LENGTHS), 0), whole(*LENGTHS), True, 0.2).detach(), atol=2e-6, rtol=0)


def test_layout_checks_its_lengths(one_rank):
    from mindspeed_mm_rl.models.attention import PackedLayout

    cos = torch.zeros(7, 32)
    assert PackedLayout.of([3, 4], cos, cos, causal=True).segments.cu_keys.tolist() == [0, 3, 7]
    with pytest.raises(ValueError, match="lengths sum to 8, but there are 7 positions"):
        PackedLayout.of([3, 5], cos, cos, causal=True)
