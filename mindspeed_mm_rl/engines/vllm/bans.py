"""Token ids that are never sampled, as one logits processor for the whole batch.

vLLM's own `logit_bias` does the same sum per request, but rebuilds its index lists in Python whenever a request comes or goes.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from mindspeed_mm_rl.types import BAN_BIAS

BANNED_KEY = "mindspeed_mm_rl_banned_token_ids"
"""Where the ids stand in vLLM's `additional_config`."""


class BannedTokens(LogitsProcessor):
    """Adds BAN_BIAS to the banned columns before the division by temperature: the same policy that the trainer computes."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._columns = torch.tensor(vllm_config.additional_config[BANNED_KEY], dtype=torch.long, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, self._columns] += BAN_BIAS
        return logits

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass
