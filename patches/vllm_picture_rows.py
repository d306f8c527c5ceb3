"""vLLM 0.9 cuts the embeddings of several pictures at their numbers of patches, of which a token is four: the first picture gets rows of
the others, which is wrong, or an error, where pictures of a prompt are not taken in the same step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_mm_rl.platforms.patching import Patch


def _apply() -> None:
    import functools

    from vllm.model_executor.models import qwen2_vl
    from vllm.multimodal.inputs import MultiModalFieldConfig

    fields = qwen2_vl._qwen2vl_field_config

    @functools.wraps(fields)
    def fields_with_rows(inputs: Mapping[str, Any]) -> Mapping[str, MultiModalFieldConfig]:
        found = dict(fields(inputs))
        if "image_embeds" in inputs:
            patches = inputs["image_grid_thw"].prod(-1)
            patches_per_row = int(patches.sum()) // len(inputs["image_embeds"])
            found["image_embeds"] = MultiModalFieldConfig.flat_from_sizes("image", patches // patches_per_row)
        return found

    qwen2_vl._qwen2vl_field_config = fields_with_rows


PATCH = Patch(
    package="vllm",
    versions="<0.10",
    process="rollout",
    changes=("vllm.model_executor.models.qwen2_vl._qwen2vl_field_config",),
    until="vLLM 0.9 is no longer supported",
    apply=_apply,
)
