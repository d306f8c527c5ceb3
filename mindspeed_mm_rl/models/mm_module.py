"""A network whose parameters have the names of the MM checkpoint layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from mindspeed_mm_rl.models.families import Architecture


class MMModule(MegatronModule):
    architecture: Architecture

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters, and what else a checkpoint holds, by their names in this stage's own files; a tied head has none."""
        return {name: value for name, value in self.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copies tensors by the names of `weights` to their places, cast to their dtype.

        Raises ValueError naming what is missing, unexpected, or of another shape; nothing is copied then.
        """
        own = self.weights()
        missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        if missing or unexpected:
            raise ValueError(
                f"weights don't fit the {self.architecture.model_type} model: missing {missing[:5]}, unexpected {unexpected[:5]}"
            )
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(f"{name}: the model wants shape {tuple(parameter.shape)}, the weights have {tuple(weights[name].shape)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """For megatron's dist_checkpointing; one entry per layer, so that the names in the file are the MM names."""
        return super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), "non_homogeneous_layers": True})
