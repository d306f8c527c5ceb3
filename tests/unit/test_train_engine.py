"""The train engine on one process: exact gradients whatever the packing, and one update against the same in plain transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_mm_rl.algorithms.losses import PolicyLossSettings, clipped_policy_loss
from mindspeed_mm_rl.data.images import pixel_values, prepare, read_image_settings
from mindspeed_mm_rl.engines.base import UpdateRequest
from mindspeed_mm_rl.types import Batch, ImageInput, Ragged
from mindspeed_mm_rl.weights.host import open_views
from tests.hf_versions import picture_tokens
from tests.pictures import batch_of
from tests.plans import MAX_PIXELS, MIN_PIXELS, optimizer_plan, train_plan
from tests.tiny import make_tiny_vl

RELATIVE = 1e-5
GRPO = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.28))
SEQUENCE_LEVEL = functools.partial(clipped_policy_loss, settings=PolicyLossSettings(0.2, 0.2, token_level_loss=False, entropy_coeff=0.01))
MakeEngine = Callable[..., "object"]


@pytest.fixture(scope="module")
def make_engine(tiny_vl: Path, one_rank: None) -> Iterator[MakeEngine]:
    from mindspeed_mm_rl.engines.megatron.engine import MegatronTrainEngine

    def make(entropy_bonus: bool = False, with_reference: bool = False, **changes: object) -> MegatronTrainEngine:
        return MegatronTrainEngine(train_plan(tiny_vl, **changes), with_reference, entropy_bonus, publish_vision=True)

    yield make


@pytest.fixture(scope="module")
def images(tiny_vl: Path) -> dict[str, ImageInput]:
    settings = read_image_settings(tiny_vl, MIN_PIXELS, MAX_PIXELS)
    rng = np.random.default_rng(0)
    sizes = [(112, 84), (56, 56), (140, 196)]
    pictures = [prepare(Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)), settings) for w, h in sizes]
    return {picture.key: picture for picture in pictures}


@pytest.fixture(scope="module")
def batch(tiny_vl: Path, images: dict[str, ImageInput]) -> Batch:
    return batch_of(tiny_vl, images)


def request(batch: Batch) -> UpdateRequest:
    return UpdateRequest(batch, range(len(batch)), float(batch.loss_mask.values.sum()), float(len(batch)))


def gradients(
    engine: object, batch: Batch, images: dict[str, ImageInput], loss: object
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    features = engine.encode(images) if engine.vision_is_frozen else images
    metrics = engine.update(request(batch), features, loss)
    return {name: p.main_grad.clone() for name, p in engine.policy.named_parameters() if p.requires_grad}, metrics


@pytest.mark.parametrize("loss", [GRPO, SEQUENCE_LEVEL], ids=["token_level", "sequence_level_entropy"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen_vision", "trained_vision"])
def test_gradients_do_not_depend_on_the_micro_batches(
    make_engine: MakeEngine, batch: Batch, images: dict, loss: object, frozen: bool
) -> None:
    options = {
        "entropy_bonus": loss is SEQUENCE_LEVEL,
        "freeze_vision": frozen,
        "freeze_projector": frozen,
        "optimizer": optimizer_plan(clip_grad=0.0),
    }
    whole, metrics = gradients(make_engine(**options), batch, images, loss)
    assert len(whole) >= 17 and all(gradient.norm() > 0 for gradient in whole.values())
    for samples in (1, 3):
        parts, parts_metrics = gradients(make_engine(max_samples_per_micro_batch=samples, **options), batch, images, loss)
        for name, gradient in whole.items():
            assert (parts[name] - gradient).norm() <= RELATIVE * gradient.norm(), name
        assert parts_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_a_trained_vision_encoder_never_runs_with_parameters_that_are_still_on_their_way(
    make_engine: MakeEngine, batch: Batch, images: dict
) -> None:
    """Ranks without pictures leave it out, so what is collected when it is called would be collected in another order on each rank."""
    overlap = optimizer_plan(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    engine = make_engine(freeze_vision=False, freeze_projector=False, optimizer=overlap)
    are_whole: list[bool] = []
    groups = engine.models[0].bucket_groups
    engine.network.image_encoder.register_forward_pre_hook(
        lambda *_: are_whole.append(all(group.param_gather_dispatched and group.param_gather_handle is None for group in groups))
    )
    with_pictures = replace(request(batch), rows=[row for row, keys in enumerate(batch.image_keys) if keys])
    for _ in range(2):
        engine.update(with_pictures, images, GRPO)
    engine.logprobs(batch, with_pictures.rows, images)
    assert are_whole == [True] * 3


def test_a_parameter_that_begins_before_its_bucket_is_refused(make_engine: MakeEngine) -> None:
    """As megatron-core 0.12 has it; the table of layouts shows a real one."""
    from mindspeed_mm_rl.engines.megatron.optimizer import check_buckets

    models = make_engine().models
    check_buckets(models)
    models[0].buffers[0].buckets[0].offset += 64
    with pytest.raises(ValueError, match="it begins at 0, its bucket at 64. Set use_distributed_optimizer to false"):
        check_buckets(models)


def test_on_policy_update_equals_one_with_recomputed_old_logprobs(make_engine: MakeEngine, batch: Batch, images: dict) -> None:
    one, two = make_engine(), make_engine()
    with_old = batch.with_column("old_logprobs", two.logprobs(batch, range(len(batch)), two.encode(images)))
    left, _ = gradients(one, batch, images, GRPO)
    right, _ = gradients(two, with_old, images, GRPO)
    for name, gradient in left.items():
        assert (right[name] - gradient).norm() <= RELATIVE * gradient.norm(), name


def test_one_update_equals_the_same_in_plain_transformers(make_engine: MakeEngine, batch: Batch, images: dict, tiny_vl: Path) -> None:
    engine = make_engine()
    metrics = engine.update(request(batch), engine.encode(images), GRPO)
    loss, norm, weights = _update_in_transformers(tiny_vl, batch, images)
    assert metrics["pg_loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    published = dict(open_views(engine.publish_weights()))
    for name, expected in weights.items():
        # Adam's first step is lr * sign(gradient): where a gradient is about 0, the sign is noise.
        close = (published[name] - expected).abs() <= 2e-5
        assert close.float().mean() > 0.99, name


def _update_in_transformers(folder: Path, batch: Batch, images: dict) -> tuple[float, float, dict[str, torch.Tensor]]:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from mindspeed_mm_rl.models.names import canonical_hf_name

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).float().eval()
    settings = read_image_settings(folder, MIN_PIXELS, MAX_PIXELS)
    trained = [p.requires_grad_("visual" not in name) for name, p in model.named_parameters()]
    optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    banned = [
        model.config.image_token_id,
        model.config.video_token_id,
        model.config.vision_start_token_id,
        model.config.vision_end_token_id,
    ]
    total = torch.zeros(())
    for row in range(len(batch)):
        prompt, response = batch.prompts.rows()[row], batch.responses.rows()[row]
        ids = torch.cat([prompt, response])[None]
        inputs = picture_tokens(ids, model.config.image_token_id)
        if batch.image_keys[row]:
            pixels, grids = pixel_values([images[key] for key in batch.image_keys[row]], settings)
            inputs |= {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
        logits = model(input_ids=ids, **inputs).logits[0, len(prompt) - 1 : -1]
        logits = logits.index_fill(-1, torch.tensor(banned), float("-inf")) / 0.7
        logprobs = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        ratio = (logprobs - logprobs.detach()).exp()
        total = total - (ratio * batch.advantages.rows()[row]).sum() / len(batch.responses.values)
    total.backward()
    norm = float(torch.nn.utils.clip_grad_norm_([p for p in trained if p.requires_grad], 1.0))
    optimizer.step()
    return float(total), norm, {canonical_hf_name(name): p.detach() for name, p in model.named_parameters()}


def test_published_weights_are_those_of_the_checkpoint_bit_by_bit(make_engine: MakeEngine, tiny_vl: Path) -> None:
    from safetensors.torch import load_file

    from mindspeed_mm_rl.models.names import canonical_hf_name

    published = dict(open_views(make_engine().publish_weights()))
    on_disk = {canonical_hf_name(name): tensor for path in tiny_vl.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert published.keys() == on_disk.keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in on_disk.items())


def test_learning_rate_warms_up_from_the_first_update(make_engine: MakeEngine, batch: Batch, images: dict) -> None:
    engine = make_engine(optimizer=optimizer_plan(lr=1e-3, warmup_updates=4))
    features = engine.encode(images)
    assert [engine.update(request(batch), features, GRPO)["lr"] for _ in range(5)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def rates(engine: object, batch: Batch, features: dict, updates: int) -> list[float]:
    return [engine.update(request(batch), features, GRPO)["lr"] for _ in range(updates)]


def test_every_update_of_a_run_has_a_learning_rate(make_engine: MakeEngine, batch: Batch, images: dict) -> None:
    decaying = make_engine(optimizer=optimizer_plan(lr=1e-3, lr_decay_style="linear", decay_updates=3))
    features = decaying.encode(images)
    assert rates(decaying, batch, features, 3) == pytest.approx([7.5e-4, 5e-4, 2.5e-4])
    warming = make_engine(optimizer=optimizer_plan(lr=1e-3, lr_decay_style="linear", decay_updates=2, warmup_updates=2))
    assert rates(warming, batch, features, 2) == pytest.approx([5e-4, 1e-3])


def test_a_continued_run_has_the_learning_rate_of_its_own_plan(make_engine: MakeEngine, batch: Batch, images: dict, tmp_path: Path) -> None:
    engine = make_engine(optimizer=optimizer_plan(lr=1e-3, lr_decay_style="linear", decay_updates=2))
    features = engine.encode(images)
    rates(engine, batch, features, 2)
    engine.save(tmp_path)
    longer = make_engine(optimizer=optimizer_plan(lr=2e-3, adam_beta2=0.9, lr_decay_style="linear", decay_updates=4))
    longer.load(tmp_path)
    assert rates(longer, batch, features, 2) == pytest.approx([8e-4, 4e-4])
    assert all(group["betas"] == (0.9, 0.9) for group in longer.optimizer.param_groups)


def test_a_gap_over_the_bound_stops_before_anything_changes(make_engine: MakeEngine, batch: Batch, images: dict) -> None:
    engine = make_engine(logprob_gap_bound=0.05)
    features = engine.encode(images)
    before = {name: p.detach().clone() for name, p in engine.policy.named_parameters()}
    with pytest.raises(RuntimeError, match=r"largest log-prob gap .*logprob_gap_bound is 0.05; nothing was updated"):
        engine.update(request(batch), features, GRPO)
    assert all(torch.equal(before[name], p) for name, p in engine.policy.named_parameters())
    logprobs = engine.logprobs(batch, range(len(batch)), features)
    agreeing = replace(batch, rollout_logprobs=Ragged.from_rows([logprobs[i] for i in batch.sample_ids], torch.float32))
    assert engine.update(request(agreeing), features, GRPO)["logprob_gap_max"] < 1e-5


def test_log_probs_that_are_no_numbers_stop_without_a_bound_too(make_engine: MakeEngine, batch: Batch, images: dict) -> None:
    values = batch.rollout_logprobs.values.clone()
    values[3] = float("nan")
    engine = make_engine(logprob_gap_bound=0.0)
    with pytest.raises(RuntimeError, match=r"log-probs of the rollout engine are not finite; nothing was updated"):
        engine.update(request(replace(batch, rollout_logprobs=Ragged(values, batch.rollout_logprobs.lengths))), engine.encode(images), GRPO)


def test_a_save_continues_bit_by_bit(make_engine: MakeEngine, batch: Batch, images: dict, tmp_path: Path) -> None:
    engine, other = make_engine(), make_engine()
    features = engine.encode(images)
    engine.update(request(batch), features, GRPO)
    engine.save(tmp_path)
    straight = engine.update(request(batch), features, GRPO)
    other.load(tmp_path)
    assert other.update(request(batch), features, GRPO) == straight
    for (name, left), right in zip(engine.policy.named_parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_weights_alone_of_a_save_are_those_that_train_on(make_engine: MakeEngine, batch: Batch, images: dict, tmp_path: Path) -> None:
    """In bfloat16 the optimizer has a float32 copy of its own, which would put the old weights back."""
    engine = make_engine(dtype="bfloat16")
    features = engine.encode(images)
    engine.update(request(batch), features, GRPO)
    engine.save(tmp_path)
    other = make_engine(dtype="bfloat16", no_load_optim=True, optimizer=optimizer_plan(lr=0.0))
    other.load(tmp_path)
    other.update(request(batch), features, GRPO)
    for (name, left), right in zip(engine.policy.named_parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen_vision", "trained_vision"])
def test_reference_logprobs_stay_those_of_the_start(make_engine: MakeEngine, batch: Batch, images: dict, frozen: bool) -> None:
    engine = make_engine(with_reference=True, freeze_vision=frozen, freeze_projector=frozen)
    features = engine.encode(images) if frozen else images
    before = engine.logprobs(batch, range(len(batch)), features)
    engine.update(request(batch), features, GRPO)
    after, reference = engine.logprobs(batch, range(len(batch)), features), engine.ref_logprobs(batch, range(len(batch)), features)
    assert all(torch.equal(reference[i], before[i]) for i in batch.sample_ids)
    assert any((after[i] - before[i]).abs().max() > 1e-3 for i in batch.sample_ids)


def test_a_reference_with_another_frozen_vision_encoder_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    other = make_tiny_vl(tmp_path / "other", seed=1)
    wrong = r"vision encoder is frozen, but image_encoder\.\S+ of the reference .*other, megatron_training\.ref_model\) differs"
    with pytest.raises(ValueError, match=wrong):
        make_engine(with_reference=True, reference_load=str(other), reference_key="megatron_training.ref_model")
    make_engine(with_reference=True, reference_load=str(other), freeze_projector=False)
