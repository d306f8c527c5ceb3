"""The value model: the decoder of a policy with one number per position behind it instead of a vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_mm_rl.models.families import TextArchitecture
from mindspeed_mm_rl.models.gpt import ModelOptions, Stage, TextDecoder
from mindspeed_mm_rl.models.qwen2_5_vl import Network
from mindspeed_mm_rl.platforms import device


class ValueHead(MegatronModule):
    """weight [1, hidden], whole on every tensor-parallel rank: what they multiply it with is the same everywhere."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device.current()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> float32 [N]"""
        # bfloat16 has 8 bits for a value near 1, and advantages are differences of values.
        return F.linear(hidden.float(), self.weight.float())[:, 0]


class ValueDecoder(TextDecoder):
    """The head never is a copy of the embedding, also where the policy's is."""

    def __init__(self, text: TextArchitecture, config: TransformerConfig, options: ModelOptions, stage: Stage) -> None:
        super().__init__(replace(text, tie_word_embeddings=False), config, options, stage)
        if stage.is_last:
            self.output_layer = ValueHead(config)


class ValueModel(Network):
    decoder_class = ValueDecoder

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, hidden] -> float32 [N]"""
        return self.text_decoder.output_layer(hidden)
