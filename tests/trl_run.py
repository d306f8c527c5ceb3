"""What TRL makes of a model, its reference and pairs: losses and gradients by loss type, and the weights after one training step.

A process of its own: the train engine changes torch process-wide.

    python -m tests.trl_run POLICY REFERENCE PAIRS.json OUT.pt
    -> {"gradients": {loss type: (loss, {parameter: gradient})}, "step": (gradients, weights)}
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import mindspeed_mm_rl  # noqa: F401  TRL imports torchvision, which the package makes importable on CPU

# isort: split
import torch
import transformers
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

BETA, SMOOTHING, GAMMA, SUPERVISED = 0.3, 0.2, 0.4, 0.25
LEARNING_RATE, WEIGHT_DECAY, BETAS = 1e-3, 0.01, (0.9, 0.999)
_NO_TEXT = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
"""The trainers ask for texts; the pairs come as token ids."""
Tensors = dict[str, torch.Tensor]
Differentiated = tuple[float, Tensors]
"""A loss and its gradients by parameter."""


def model_of(folder: str) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).float()


def settings(output: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "max_length": None,
    } | more


def differentiated(loss: torch.Tensor, model: transformers.PreTrainedModel) -> Differentiated:
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def dpo_trainer(policy: str, reference: str, output: str, **more: Any) -> DPOTrainer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    config = DPOConfig(**settings(output, beta=BETA, **more))
    return DPOTrainer(
        model=model_of(policy),
        ref_model=model_of(reference),
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(_NO_TEXT),
    )


def with_reference(policy: str, reference: str, pairs: list[dict[str, Any]], output: str) -> dict[str, Differentiated]:
    """sft is the supervised term alone."""
    trainer = dpo_trainer(policy, reference, output)
    inputs, found = trainer.data_collator(pairs), {}
    trainer.label_smoothing = SMOOTHING
    for loss_type in ("sigmoid", "hinge", "ipo", "robust", "sft"):
        trainer.loss_types = [loss_type]
        found[loss_type] = differentiated(trainer._compute_loss(trainer.model, inputs, False), trainer.model)
    return found


def without_reference(policy: str, pairs: list[dict[str, Any]], output: str) -> dict[str, Differentiated]:
    """orpo is its odds ratio alone: the supervised term of TRL's ORPOTrainer is over the prompt too."""
    tokenizer, data = transformers.AutoTokenizer.from_pretrained(policy), Dataset.from_list(_NO_TEXT)
    batch = {
        f"{side}_{name}": rows for side in ("chosen", "rejected") for name, rows in padded(pairs, side, tokenizer.pad_token_id).items()
    }
    of_cpo = settings(output, loss_type="simpo", simpo_gamma=GAMMA, beta=BETA, cpo_alpha=0.0)
    cpo = CPOTrainer(model=model_of(policy), args=CPOConfig(**of_cpo), processing_class=tokenizer, train_dataset=data)
    orpo = ORPOTrainer(
        model=model_of(policy), args=ORPOConfig(**settings(output, beta=BETA)), processing_class=tokenizer, train_dataset=data
    )
    simpo_loss, _ = cpo.get_batch_loss_metrics(cpo.model, batch)
    chosen, rejected, *_ = orpo.concatenated_forward(orpo.model, batch)
    orpo_loss = -orpo.odds_ratio_loss(chosen, rejected)[0].mean()
    return {"simpo": differentiated(simpo_loss, cpo.model), "orpo": differentiated(orpo_loss, orpo.model)}


def plus(loss: Differentiated, weight: float, more: Differentiated) -> Differentiated:
    return loss[0] + weight * more[0], {name: gradient + weight * more[1][name] for name, gradient in loss[1].items()}


def padded(pairs: list[dict[str, Any]], side: str, padding: int) -> Tensors:
    whole = [torch.tensor(pair["prompt_ids"] + pair[f"{side}_ids"]) for pair in pairs]
    labels = [torch.tensor([-100] * len(pair["prompt_ids"]) + pair[f"{side}_ids"]) for pair in pairs]
    return {
        "input_ids": pad_sequence(whole, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in whole], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


class Gradients(transformers.TrainerCallback):
    """What the optimizer is about to use."""

    def __init__(self) -> None:
        self.found: Tensors = {}

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def one_step(policy: str, reference: str, pairs: list[dict[str, Any]], output: str) -> tuple[Tensors, Tensors]:
    trainer = dpo_trainer(
        policy,
        reference,
        output,
        per_device_train_batch_size=len(pairs),
        max_steps=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=0.0,
        save_strategy="no",
    )
    trainer.train_dataset = Dataset.from_list(pairs)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.found, {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def main(policy: str, reference: str, pairs_file: str, out: str) -> None:
    pairs = json.loads(Path(pairs_file).read_text())
    with tempfile.TemporaryDirectory() as output:
        gradients = with_reference(policy, reference, pairs, output) | without_reference(policy, pairs, output)
        supervised = gradients.pop("sft")
        gradients["orpo"] = plus(gradients["orpo"], 1.0, supervised)
        gradients["sigmoid_ftx"] = plus(gradients["sigmoid"], SUPERVISED, supervised)
        torch.save({"gradients": gradients, "step": one_step(policy, reference, pairs, output)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
