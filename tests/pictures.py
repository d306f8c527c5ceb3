"""Random pictures as the loader hands them out, a batch that looks at them, and what transformers makes of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mindspeed_mm_rl.data.images import expand_image_tokens, pixel_values, prepare, read_image_settings
from mindspeed_mm_rl.engines.base import UpdateRequest
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.names import canonical_hf_name
from mindspeed_mm_rl.types import Batch, ImageInput, Ragged
from tests.hf_versions import features_of, picture_tokens
from tests.plans import MAX_PIXELS, MIN_PIXELS


def pictures(model: Path, sizes: tuple[tuple[int, int], ...] = ((112, 84), (56, 56), (140, 196)), seed: int = 0) -> dict[str, ImageInput]:
    """sizes: (width, height), all multiples of 28."""
    settings, rng = read_image_settings(model, MIN_PIXELS, MAX_PIXELS), np.random.default_rng(seed)
    prepared = [prepare(Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)), settings) for w, h in sizes]
    return {picture.key: picture for picture in prepared}


def features_by_hugging_face(model: Path, images: dict[str, ImageInput]) -> dict[str, torch.Tensor]:
    """Each picture alone through transformers' own vision encoder."""
    import transformers

    hf = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(model).float().eval()
    settings, features = read_image_settings(model, MIN_PIXELS, MAX_PIXELS), {}
    for key, image in images.items():
        pixels, grids = pixel_values([image], settings)
        with torch.no_grad():
            features[key] = features_of(hf.model.visual(pixels, grid_thw=torch.tensor(grids)))
    return features


def batch_of(model: Path, images: dict[str, ImageInput]) -> Batch:
    """Six on-policy samples of three prompts: two pictures, one picture, none. images: three."""
    config, keys = read_architecture(model).raw, list(images)
    start, token = config["vision_start_token_id"], config["image_token_id"]
    plain = [[13, start, token, 20, start, token, 21], [30, start, token, 31, 32], [40, 41, 42]]
    keys_of = [(keys[0], keys[2]), (keys[1],), ()]
    prompts = [expand_image_tokens(ids, [images[k].grid_thw for k in chosen], token, 2) for ids, chosen in zip(plain, keys_of, strict=True)]
    generator, lengths = torch.Generator().manual_seed(3), (3, 11, 5, 4, 7, 9)
    responses = [torch.randint(10, 200, (length,), generator=generator) for length in lengths]
    advantages = [torch.full((n,), a) for n, a in zip(lengths, (1.0, -1.0, 0.5, -0.5, 2.0, -2.0), strict=True)]
    return Batch(
        sample_ids=tuple(range(6)),
        prompts=Ragged.from_rows([prompts[i // 2] for i in range(6)], torch.int64),
        responses=Ragged.from_rows(responses, torch.int64),
        loss_mask=Ragged(torch.ones(sum(lengths)), lengths),
        rollout_logprobs=Ragged(torch.randn(sum(lengths), generator=generator) - 4, lengths),
        image_keys=tuple(keys_of[i // 2] for i in range(6)),
        rewards=(1.0, 0.0) * 3,
        samples_per_prompt=2,
        advantages=Ragged.from_rows(advantages, torch.float32),
    )


def request_of(batch: Batch) -> UpdateRequest:
    """The whole batch on one rank."""
    return UpdateRequest(batch, range(len(batch)), float(batch.loss_mask.values.sum()), float(len(batch)))


def gradients_by_hugging_face(model: Path, batch: Batch, images: dict[str, ImageInput]) -> dict[str, torch.Tensor]:
    """By classic Hugging Face name, of the token-level policy gradient -sum(advantage * logprob) / tokens at temperature 0.7."""
    import transformers

    hf = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(model).float().eval()
    architecture, settings = read_architecture(model), read_image_settings(model, MIN_PIXELS, MAX_PIXELS)
    for row, keys in enumerate(batch.image_keys):
        prompt, response = batch.prompts.rows()[row], batch.responses.rows()[row]
        ids = torch.cat([prompt, response])[None]
        inputs = picture_tokens(ids, architecture.image_token_id)
        if keys:
            pixels, grids = pixel_values([images[key] for key in keys], settings)
            inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
        logits = hf(input_ids=ids, **inputs).logits[0, len(prompt) - 1 : -1]
        logits = logits.index_fill(-1, torch.tensor(architecture.banned_token_ids), float("-inf")) / 0.7
        logprobs = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        (-(logprobs * batch.advantages.rows()[row]).sum() / len(batch.responses.values)).backward()
    return {canonical_hf_name(name): parameter.grad for name, parameter in hf.named_parameters()}
