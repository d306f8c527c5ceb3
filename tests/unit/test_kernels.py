"""Kernels of the platforms against plain torch and numbers worked by hand, and what a device wants of its processes.

Grouped products and norms of CUDA are torch functions that have a CPU implementation, so that their use is tested here.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mindspeed_mm_rl.platforms import cuda, device, npu, plain, resources
from mindspeed_mm_rl.platforms.compat import installed_version
from mindspeed_mm_rl.platforms.grouped import grouped_product
from mindspeed_mm_rl.platforms.packed_sdpa import Segments

needs_grouped_mm = pytest.mark.skipif("grouped_mm" not in dir(F), reason=f"torch {torch.__version__} has no grouped_mm")

COUNTS = (3, 0, 1, 5)


def random_groups(dtype: torch.dtype, inputs: int = 16, outputs: int = 8) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(sum(COUNTS), inputs, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weights = [torch.randn(outputs, inputs, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in COUNTS]
    return tokens, weights


def one_by_one(tokens: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Each row's product with the weight of its group."""
    owners = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS)).tolist()
    return torch.stack([weights[owner] @ row for row, owner in zip(tokens, owners, strict=True)])


def results(output: torch.Tensor, tokens: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and every gradient of a weighted sum of it; a weight without a gradient counts as zeros."""
    scale = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * scale).sum(), [tokens, *weights], allow_unused=True, materialize_grads=True)
    return [output.detach(), *gradients]


def test_grouped_matmul_by_hand():
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weights = [torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0, 5.0]]), torch.tensor([[0.0, 2.0]])]
    assert device.grouped_matmul(tokens, weights, [1, 0, 1]).tolist() == [[3.0], [8.0]]


def test_grouped_matmul_equals_every_row_by_itself():
    tokens, weights = random_groups(torch.float64)
    expected = results(one_by_one(tokens, weights), tokens, weights)
    torch.testing.assert_close(results(plain.grouped_matmul(tokens, weights, COUNTS), tokens, weights), expected, atol=1e-12, rtol=0)


@needs_grouped_mm
def test_a_group_without_tokens_has_a_gradient_of_zeros():
    """None would keep megatron waiting for it where gradients are reduced as they come."""
    for grouped in (plain.grouped_matmul, cuda.grouped_matmul):
        tokens, weights = random_groups(torch.bfloat16)
        grouped(tokens, weights, COUNTS).float().sum().backward()
        assert [bool(weight.grad.any()) for weight in weights] == [count > 0 for count in COUNTS]


@needs_grouped_mm
def test_the_grouped_product_of_cuda_equals_one_group_after_the_other():
    tokens, weights = random_groups(torch.float32)
    expected = results(plain.grouped_matmul(tokens, weights, COUNTS), tokens, weights)
    got = results(grouped_product(cuda.GROUPED, tokens, weights, COUNTS), tokens, weights)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@needs_grouped_mm
@pytest.mark.parametrize(
    ("dtype", "inputs", "is_one_kernel"), [(torch.bfloat16, 16, True), (torch.bfloat16, 12, False), (torch.float32, 16, False)]
)
def test_cuda_takes_one_kernel_where_it_can(dtype: torch.dtype, inputs: int, is_one_kernel: bool):
    tokens, weights = random_groups(dtype, inputs)
    output = cuda.grouped_matmul(tokens, weights, COUNTS)
    assert (output.grad_fn.name() == "_GroupedProductBackward") == is_one_kernel
    # 8 bits of a number, sums of 16 products of about 1.
    torch.testing.assert_close(output.float(), one_by_one(tokens.double(), [w.double() for w in weights]).float(), atol=0.05, rtol=0.01)
    nothing = cuda.grouped_matmul(tokens[:0], weights, (0,) * len(COUNTS))
    assert nothing.shape == (0, 8) and nothing.requires_grad


def test_the_weights_gradient_of_an_npu_equals_every_row_by_itself():
    tokens, weights = random_groups(torch.float64)
    output = one_by_one(tokens, weights)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    got = npu.GROUPED.weights(gradient, tokens.detach(), torch.tensor([3, 3, 4, 9]))
    expected = torch.stack([torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@needs_grouped_mm
def test_only_what_is_trained_gets_a_gradient():
    tokens, weights = random_groups(torch.float32)
    for weight in weights:
        weight.requires_grad_(False)
    grouped_product(cuda.GROUPED, tokens, weights, COUNTS).sum().backward()
    assert tokens.grad is not None and all(weight.grad is None for weight in weights)


def test_swiglu_by_hand():
    """silu(1) = 1 / (1 + e^-1) = 0.731059; silu(-2) = -2 / (1 + e^2) = -0.238406."""
    torch.testing.assert_close(device.swiglu(torch.tensor([1.0, -2.0, 10.0, 100.0])), torch.tensor([7.31059, -23.8406]), atol=1e-4, rtol=0)


def test_norms_agree():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((5, 1, 3, 16), (16,)))
    for norm in (plain.rms_norm, cuda.rms_norm):
        expected = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        torch.testing.assert_close(
            results(norm(hidden, weight, 1e-6), hidden, [weight]), results(expected, hidden, [weight]), atol=2e-6, rtol=0
        )


@pytest.mark.skipif(installed_version("torch") < (2, 11), reason=f"torch {torch.__version__} has no such attention over packed sequences")
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_the_packed_attention_of_cuda_fits_its_kernel(kv_heads: int):
    """The kernel itself needs a GPU; what torch declares of it, forward and backward, goes without numbers."""
    with FakeTensorMode():
        segments = Segments.of((3, 1), (3, 1), torch.device("cpu"))
        heads = [torch.empty(4, count, 64, dtype=torch.bfloat16, requires_grad=True) for count in (8, kv_heads, kv_heads)]
        output = cuda.packed_attention(*heads, segments, causal=True, scale=0.125)
        output.sum().backward()
    assert output.shape == heads[0].shape and output.dtype == torch.bfloat16
    assert [each.grad.shape for each in heads] == [each.shape for each in heads]


def test_the_fused_attention_of_an_npu_gets_no_empty_sequence_and_no_more_than_it_takes():
    lengths = [1, 0, 2] * 1000
    calls = npu.attention_calls(Segments.of(lengths, lengths, torch.device("cpu")))
    assert [len(call) for call in calls] == [2000] and sum(queries for queries, _ in calls[0]) == 3000
    calls = npu.attention_calls(Segments.of([1] * 5000, [2] * 5000, torch.device("cpu")))
    assert [len(call) for call in calls] == [2048, 2048, 904] and calls[0][0] == (1, 2)


def test_mindspeed_never_sees_the_command_line_of_a_worker(monkeypatch: pytest.MonkeyPatch):
    given = ["default_worker.py", "--node-ip-address=10.0.0.1"]
    monkeypatch.setattr(sys, "argv", given)
    with npu.mindspeed_arguments():
        assert sys.argv == ["default_worker.py", "--optimization-level", "0"]
    assert sys.argv is given


def test_deterministic_means_an_error_where_there_is_no_such_kernel():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        device.make_deterministic()
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            F.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 1]]]), 2)
    finally:
        torch.use_deterministic_algorithms(before)


def test_resources_of_a_device():
    assert resources.bundle("npu") == {"CPU": 2, "NPU": 1} and resources.bundle("cpu") == {"CPU": 2}
    assert resources.share("npu", 0.25) == {"resources": {"NPU": 0.25}}
    assert resources.share("cuda", 0.25) == {"num_gpus": 0.25} and resources.share("cpu", 0.25) == {}


def test_the_environment_of_a_worker(monkeypatch: pytest.MonkeyPatch):
    """What the user says comes first, in the file as in the shell, except that a worker has to see its own device alone."""
    monkeypatch.delenv("HCCL_NPU_SOCKET_PORT_RANGE", raising=False)
    monkeypatch.setenv("HCCL_HOST_SOCKET_PORT_RANGE", "60000-60050")
    noset = "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"
    given = {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:512", noset: "true", "LCCL_DETERMINISTIC": "0"}
    variables = resources.worker_environment("npu", True, given)
    # Workers on other machines, and of a cluster that was there before, inherit nothing from this shell.
    assert (variables["HCCL_HOST_SOCKET_PORT_RANGE"], variables["HCCL_NPU_SOCKET_PORT_RANGE"]) == ("60000-60050", "auto")
    # Empty: older Ray asks only whether there is a value, and 0 is one.
    assert (variables["PYTORCH_NPU_ALLOC_CONF"], variables[noset]) == ("max_split_size_mb:512", "")
    assert (variables["HCCL_DETERMINISTIC"], variables["LCCL_DETERMINISTIC"]) == ("true", "0")
    assert "HCCL_DETERMINISTIC" not in resources.worker_environment("npu", False, {})
    assert resources.worker_environment("cuda", True, {})["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert resources.worker_environment("cpu", True, {"A": "1"}) == {"A": "1"}
