"""What the edited code does: it is run from small trees; the NPU's kernel is computed sequence by sequence in plain torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from patches.trees import command
from tests.vendored_trees import make_trees

ATTENTION = "mindspeed.core.transformer.flash_attention.flash_attention.adaptor"
CONTEXT_PARALLEL = "mindspeed.core.context_parallel.dot_product_attention"

# What the kernel's documentation says of layout TND with sparse_mode 3, one sequence and one head at a time.
KERNEL = """
import torch


def npu_fusion_attention(query, key, value, head_num, input_layout, *, atten_mask, scale, keep_prob, sparse_mode, actual_seq_qlen,
                         actual_seq_kvlen):
    assert (input_layout, sparse_mode, keep_prob, head_num) == ("TND", 3, 1.0, query.shape[1])
    assert atten_mask.shape == (2048, 2048) and atten_mask[0, 1] and not atten_mask[1, 1]
    output = torch.zeros(*query.shape[:2], value.shape[2], dtype=query.dtype)
    start = 0
    for end in actual_seq_qlen:
        for head in range(head_num):
            of_key = head * key.shape[1] // head_num
            for token in range(start, end):
                weights = (key[start : token + 1, of_key] @ query[token, head] * scale).softmax(0)
                output[token, head] = weights @ value[start : token + 1, of_key]
        start = end
    return (output,)
"""


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Edited trees, first in the import path."""
    trees = make_trees(tmp_path)
    (trees / "torch_npu.py").write_text(KERNEL)
    assert command.main([str(trees)]) == 0
    monkeypatch.syspath_prepend(str(trees))
    yield trees
    for name in [name for name in sys.modules if name.split(".")[0] in ("mindspeed", "torch_npu")]:
        del sys.modules[name]


def recompute_of(trees: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("edited_random", trees / "megatron/core/tensor_parallel/random.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configuration(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "use_remove_padding": True,
            "context_parallel_size": 1,
            "context_parallel_algo": "ulysses_cp_algo",
            "context_parallel_kv_cache_policy": None,
            **changes,
        }
    )


def packed(sequence: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key, value [S, B, N, D] with 4 heads for queries and 2 for keys, which the values exceed in size."""
    torch.manual_seed(0)
    return tuple(torch.randn(sequence, batch, heads, size, dtype=torch.float64) for heads, size in ((4, 8), (2, 8), (2, 6)))


@pytest.mark.parametrize(("sequence", "batch", "ends"), [(7, 1, (3, 4, 7)), (5, 2, [3, 5, 10]), (4, 1, torch.tensor([4]))])
def test_packed_attention_is_causal_attention_of_each_sequence(edited, sequence, batch, ends):
    importlib.import_module("mindspeed.utils").set_actual_seq_len(ends)
    attention = importlib.import_module(ATTENTION).dot_product_attention_forward_impl
    tensors = packed(sequence, batch)
    output = attention(SimpleNamespace(config=configuration(), softmax_scale=0.3), *tensors)

    # The tokens of a batch, one row after the other, cut at the ends.
    tokens = [tensor.transpose(0, 1).flatten(0, 1) for tensor in tensors]
    pieces = [tensor.tensor_split([int(end) for end in ends][:-1]) for tensor in tokens]
    expected = [
        torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True, scale=0.3, enable_gqa=True
        ).transpose(0, 1)
        for query, key, value in zip(*pieces, strict=True)
    ]
    torch.testing.assert_close(output, torch.cat(expected).unflatten(0, (batch, sequence)).transpose(0, 1).flatten(2))


def test_padded_batches_and_explicit_boundaries_keep_their_path(edited):
    attention = importlib.import_module(ATTENTION).dot_product_attention_forward_impl
    tensors = packed(4, 1)
    module = SimpleNamespace(config=configuration(use_remove_padding=False), softmax_scale=1.0)
    assert attention(module, *tensors) == "padded"
    assert attention(SimpleNamespace(config=SimpleNamespace(), softmax_scale=1.0), *tensors) == "padded"
    assert attention(SimpleNamespace(config=configuration(), softmax_scale=1.0), *tensors, packed_seq_params=object()) == "padded"


@pytest.mark.parametrize(("ends", "words"), [(None, "set_actual_seq_len was not called"), ((3, 6), "ends at 6 and the packed batch has 7")])
def test_wrong_boundaries_are_an_error(edited, ends, words):
    importlib.import_module("mindspeed.utils").set_actual_seq_len(ends)
    attention = importlib.import_module(ATTENTION).dot_product_attention_forward_impl
    with pytest.raises(ValueError, match=words):
        attention(SimpleNamespace(config=configuration(), softmax_scale=1.0), *packed(7, 1))


@pytest.mark.parametrize(
    ("changes", "is_packed"),
    [
        ({}, True),
        ({"context_parallel_size": 2}, True),
        ({"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}, False),
        ({"context_parallel_size": 2, "context_parallel_kv_cache_policy": "full"}, False),
        ({"tp_2d": True}, False),
        ({"use_remove_padding": False}, False),
    ],
)
def test_with_context_parallelism_only_whole_sequences_are_packed(edited, changes, is_packed):
    importlib.import_module("mindspeed.utils").set_actual_seq_len((4,))
    attention = importlib.import_module(CONTEXT_PARALLEL).CPDotProductAttentionImpl(configuration(**changes), softmax_scale=1.0)
    output = attention.forward(*packed(4, 1))
    assert isinstance(output, torch.Tensor) == is_packed


def test_recomputation_sees_the_boundaries_of_its_own_batch(edited):
    boundaries = importlib.import_module("mindspeed.utils")
    checkpoint = recompute_of(edited).CheckpointFunction
    x = torch.tensor(3.0, requires_grad=True)
    boundaries.set_actual_seq_len((2,))
    first = checkpoint.apply(lambda x: x * boundaries.get_actual_seq_len()[0], x)
    boundaries.set_actual_seq_len((5,))
    first.backward()
    # Of the other batch the gradient would be 5.
    assert x.grad == 2
    assert boundaries.get_actual_seq_len() == (5,)


def test_the_tokenizer_is_chosen_when_it_is_built(edited):
    feature = importlib.import_module("mindspeed.features_manager.tokenizer.build_tokenizer").BuildTokenizerFeature()
    registered = {}
    arguments_not_known_yet = SimpleNamespace()
    assert feature.is_need_apply(arguments_not_known_yet)
    feature.register_patches(SimpleNamespace(register_patch=registered.__setitem__), arguments_not_known_yet)
    ((name, wrapper),) = registered.items()
    # MindSpeed wraps with functions of such names and replaces with others.
    assert name == "megatron.training.tokenizer.tokenizer.build_tokenizer" and wrapper.__name__.endswith("wrapper")
    build = wrapper(lambda args: "Megatron's own")
    assert build(SimpleNamespace(tokenizer_type="PretrainedFromHF")) == "from Hugging Face"
    assert build(SimpleNamespace(tokenizer_type="NullTokenizer")) == "Megatron's own"
