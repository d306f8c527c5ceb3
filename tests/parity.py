"""A policy of the trainer beside the same model at Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.names import entries
from mindspeed_mm_rl.models.weight_layout import to_hf, to_megatron


def hugging_face(folder: Path) -> transformers.PreTrainedModel:
    """Experts one by one: the grouped kernel that transformers prefers adds up in another order."""
    config = transformers.AutoConfig.from_pretrained(folder, experts_implementation="eager")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).float().eval()


def megatron(folder: Path, **options: Any) -> Any:
    """Needs the fixture one_rank."""
    from mindspeed_mm_rl.models.qwen2_5_vl import build_policy

    policy = build_policy(read_architecture(folder), **options)
    policy.load_weights(to_megatron(load_file(folder / "model.safetensors"), policy.architecture.raw))
    return policy


def random_rows(lengths: Sequence[int], vocabulary: int = 512) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, vocabulary, (length,), generator=generator) for length in lengths]


def packed_logits(policy: Any, rows: list[torch.Tensor]) -> torch.Tensor:
    return policy.logits(policy(torch.cat(rows), policy.layout(rows, [[]] * len(rows))))


def hf_logits(hf: transformers.PreTrainedModel, rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([hf(row[None]).logits[0] for row in rows])


def check_logits(policy: Any, hf: transformers.PreTrainedModel, rows: list[torch.Tensor]) -> None:
    with torch.no_grad():
        together = packed_logits(policy, rows)
        alone = torch.cat([packed_logits(policy, [row]) for row in rows])
        expected = hf_logits(hf, rows)
    assert expected.std() > 0.5
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def check_gradients(policy: Any, hf: transformers.PreTrainedModel, rows: list[torch.Tensor]) -> None:
    """Of every parameter that is trained, under a loss that all logits are in."""
    weight = torch.randn(sum(map(len, rows)), policy.architecture.text.vocab_size, generator=torch.Generator().manual_seed(2))
    policy.zero_grad(set_to_none=True)
    (packed_logits(policy, rows) * weight).sum().backward()
    hf.zero_grad(set_to_none=True)
    (hf_logits(hf, rows) * weight).sum().backward()
    buffers = ((name, torch.zeros_like(buffer)) for name, buffer in hf.named_buffers() if name.endswith("e_score_correction_bias"))
    # transformers 4 calls no expert without tokens: its gradient is None.
    written = ((name, torch.zeros_like(each) if each.grad is None else each.grad) for name, each in hf.named_parameters())
    gradients = dict(_apart(written)) | dict(buffers)
    expected = to_megatron(gradients, policy.architecture.raw)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
    assert {name for name, parameter in policy.named_parameters() if not parameter.requires_grad} == {
        name for name in expected if name.endswith("expert_bias")
    }


def check_names_and_round_trip(policy: Any, folder: Path) -> None:
    """What the rollout engine is sent is what Hugging Face wrote, bit by bit, under its names; a save has every name of the table."""
    on_disk = load_file(folder / "model.safetensors")
    sent = dict(to_hf(policy.weights(), policy.architecture.raw))
    assert sent.keys() == on_disk.keys()
    assert all(torch.equal(sent[name], on_disk[name]) for name in on_disk)
    table = {entry.mm for entry in entries(policy.architecture.raw)}
    assert policy.weights().keys() == table
    saved = {shard.key for name, shard in policy.sharded_state_dict().items() if not name.endswith("_extra_state")}
    assert saved == table


def _apart(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers 5 keeps the experts of a layer in two tensors, gates before ups; on disk they are apart."""
    for name, tensor in tensors:
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for number, (gate, up) in enumerate(expert.chunk(2) for expert in tensor):
                yield f"{prefix}.experts.{number}.gate_proj.weight", gate
                yield f"{prefix}.experts.{number}.up_proj.weight", up
        elif kind == "down_proj":
            yield from ((f"{prefix}.experts.{number}.down_proj.weight", down) for number, down in enumerate(tensor))
        else:
            yield name, tensor
