"""The critic's engine on one process: values and updates against plain transformers, exact gradients, where its weights may come from."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoint.convert import hf_to_mm
from checkpoint.options import FormatOptions, HfConfig, HfToMmOptions, ParallelConfig
from mindspeed_mm_rl.algorithms.losses import ValueLossSettings, clipped_value_loss
from mindspeed_mm_rl.data.images import expand_image_tokens, pixel_values, prepare, read_image_settings
from mindspeed_mm_rl.engines.base import UpdateRequest
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.models.names import canonical_hf_name
from mindspeed_mm_rl.models.value_weights import check_same_vision, check_value_weights, read_value_weights
from mindspeed_mm_rl.models.weight_files import read_config, read_megatron_weights
from mindspeed_mm_rl.models.weight_layout import to_hf
from mindspeed_mm_rl.types import Batch, ImageInput, Ragged
from tests.hf_versions import picture_tokens
from tests.plans import MAX_PIXELS, MIN_PIXELS, optimizer_plan, train_plan
from tests.tiny import make_tiny_vl

HEAD = "text_decoder.output_layer.weight"
LOSS = functools.partial(clipped_value_loss, settings=ValueLossSettings(cliprange_value=0.3))
MakeEngine = Callable[..., "object"]


@pytest.fixture(scope="module")
def make_engine(one_rank: None) -> Iterator[MakeEngine]:
    from mindspeed_mm_rl.engines.megatron.critic import MegatronCriticEngine

    def make(folder: Path, **changes: object) -> MegatronCriticEngine:
        return MegatronCriticEngine(train_plan(folder, **changes))

    yield make


@pytest.fixture(scope="module")
def reward_model(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier with one score, of the same sizes as tiny_text, whose embeddings are tied."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tiny_text, num_labels=1))
    torch.nn.init.normal_(model.score.weight, std=0.08)
    folder = tmp_path_factory.mktemp("reward_model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tiny_vl: Path) -> dict[str, ImageInput]:
    settings = read_image_settings(tiny_vl, MIN_PIXELS, MAX_PIXELS)
    rng = np.random.default_rng(0)
    pictures = [prepare(Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)), settings) for w, h in ((112, 84), (56, 56))]
    return {picture.key: picture for picture in pictures}


def make_batch(prompts: list[list[int]], keys: list[tuple[str, ...]]) -> Batch:
    """A response each of 3, 9, 5, ... tokens, with random old values and returns; the last response is masked in part."""
    generator = torch.Generator().manual_seed(5)
    responses = [torch.randint(10, 200, ((3, 9, 5, 7)[i],), generator=generator) for i in range(len(prompts))]
    lengths = tuple(map(len, responses))
    old, noise = torch.randn(2, sum(lengths), generator=generator)
    mask = torch.ones(sum(lengths))
    mask[-2:] = 0.0
    return Batch(
        sample_ids=tuple(range(10, 10 + len(prompts))),
        prompts=Ragged.from_rows(prompts, torch.int64),
        responses=Ragged.from_rows(responses, torch.int64),
        loss_mask=Ragged(mask, lengths),
        rollout_logprobs=Ragged(torch.zeros(sum(lengths)), lengths),
        image_keys=tuple(keys),
        rewards=(1.0,) * len(prompts),
        samples_per_prompt=1,
        values=Ragged(old, lengths),
        returns=Ragged(old + noise, lengths),
    )


@pytest.fixture(scope="module")
def text_batch() -> Batch:
    return make_batch([[20, 21, 22], [23, 24], [25, 26, 27, 28], [29]], [()] * 4)


@pytest.fixture(scope="module")
def vl_batch(tiny_vl: Path, images: dict[str, ImageInput]) -> Batch:
    """Two pictures, one picture, none."""
    config, keys = read_architecture(tiny_vl).raw, list(images)
    start, token = config["vision_start_token_id"], config["image_token_id"]
    chosen = [(keys[0], keys[1]), (keys[1],), ()]
    plain = [[13, start, token, 20, start, token, 21], [30, start, token, 31], [40, 41, 42]]
    prompts = [expand_image_tokens(ids, [images[k].grid_thw for k in own], token, 2) for ids, own in zip(plain, chosen, strict=True)]
    return make_batch(prompts, chosen)


def request(batch: Batch) -> UpdateRequest:
    return UpdateRequest(batch, range(len(batch)), float(batch.loss_mask.values.sum()), float(len(batch)))


def hf_values(backbone: Callable[..., object], head: torch.Tensor, batch: Batch, inputs: list[dict]) -> list[torch.Tensor]:
    """head . hidden state of the token before each response token, row by row, unpacked."""
    answer = []
    for prompt, response, extra in zip(batch.prompts.rows(), batch.responses.rows(), inputs, strict=True):
        hidden = backbone(input_ids=torch.cat([prompt, response])[None], **extra).last_hidden_state[0]
        answer.append((hidden @ head.T)[len(prompt) - 1 : -1, 0])
    return answer


def test_values_are_the_scores_of_a_reward_model(make_engine: MakeEngine, tiny_text: Path, reward_model: Path, text_batch: Batch) -> None:
    from transformers import AutoModelForSequenceClassification

    found = make_engine(tiny_text, load=str(reward_model)).values(text_batch, range(len(text_batch)), {})
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).float().eval()
    with torch.no_grad():
        expected = hf_values(model.model, model.score.weight, text_batch, [{}] * 4)
    assert list(found) == list(text_batch.sample_ids)
    for sample_id, row in zip(text_batch.sample_ids, expected, strict=True):
        assert found[sample_id].dtype == torch.float32
        assert (found[sample_id] - row).abs().max() <= 1e-5 < row.abs().max()


def test_values_of_pictures_equal_those_of_transformers(make_engine: MakeEngine, tiny_vl: Path, vl_batch: Batch, images: dict) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    engine = make_engine(tiny_vl)
    assert all(not row.any() for row in engine.values(vl_batch, range(len(vl_batch)), images).values()), "a new head says 0"
    torch.nn.init.normal_(engine.network.weights()[HEAD], std=0.3, generator=torch.Generator().manual_seed(1))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vl).float().eval()
    settings, inputs = read_image_settings(tiny_vl, MIN_PIXELS, MAX_PIXELS), []
    for prompt, response, keys in zip(vl_batch.prompts.rows(), vl_batch.responses.rows(), vl_batch.image_keys, strict=True):
        extra = picture_tokens(torch.cat([prompt, response])[None], model.config.image_token_id)
        if keys:
            pixels, grids = pixel_values([images[key] for key in keys], settings)
            extra |= {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
        inputs.append(extra)
    with torch.no_grad():
        expected = hf_values(model.model, engine.network.weights()[HEAD], vl_batch, inputs)
    found = engine.values(vl_batch, range(len(vl_batch)), images)
    for sample_id, row in zip(vl_batch.sample_ids, expected, strict=True):
        assert (found[sample_id] - row).abs().max() <= 1e-4 < row.abs().max()


def test_one_update_equals_the_same_in_plain_transformers(
    make_engine: MakeEngine, tiny_text: Path, reward_model: Path, text_batch: Batch
) -> None:
    from transformers import AutoModelForSequenceClassification

    engine = make_engine(tiny_text, load=str(reward_model))
    metrics = engine.update(request(text_batch), {}, LOSS)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).float().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    values = torch.cat(hf_values(model.model, model.score.weight, text_batch, [{}] * 4))
    old, returns, mask = (column.values for column in (text_batch.values, text_batch.returns, text_batch.loss_mask))
    clipped = old + (values - old).clamp(-0.3, 0.3)
    loss = 0.5 * (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / mask.sum()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    assert metrics["vf_loss"] == pytest.approx(float(loss), rel=1e-4)
    assert metrics["values_mean"] == pytest.approx(float((values * mask).sum() / mask.sum()), rel=1e-4)
    assert 0 < metrics["vf_clipfrac"] < 1
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4) and metrics["lr"] == pytest.approx(1e-3)
    config = read_config(reward_model)
    found = dict(to_hf(engine.network.weights(), config))
    for name, parameter in model.named_parameters():
        # Adam's first step is lr * sign(gradient): where a gradient is about 0, the sign is noise.
        assert ((found[canonical_hf_name(name)] - parameter).abs() <= 2e-5).float().mean() > 0.99, name


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen_vision", "trained_vision"])
def test_gradients_do_not_depend_on_the_micro_batches(
    make_engine: MakeEngine, tiny_vl: Path, vl_batch: Batch, images: dict, frozen: bool
) -> None:
    def gradients(samples: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        options = {"freeze_vision": frozen, "freeze_projector": frozen, "optimizer": optimizer_plan(clip_grad=0.0)}
        engine = make_engine(tiny_vl, max_samples_per_micro_batch=samples, **options)
        torch.nn.init.normal_(engine.network.weights()[HEAD], std=0.3, generator=torch.Generator().manual_seed(1))
        metrics = engine.update(request(vl_batch), images, LOSS)
        return {name: p.main_grad.clone() for name, p in engine.network.named_parameters() if p.requires_grad}, metrics

    whole, metrics = gradients(0)
    assert whole[HEAD].shape == (1, 128) and any("image_encoder" in name for name in whole) is not frozen
    assert all(gradient.norm() > 0 for gradient in whole.values())
    parts, parts_metrics = gradients(1)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert parts_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_a_save_continues_bit_by_bit_and_gives_its_weights(
    make_engine: MakeEngine, tiny_text: Path, reward_model: Path, text_batch: Batch, tmp_path: Path
) -> None:
    engine, other = make_engine(tiny_text, load=str(reward_model)), make_engine(tiny_text)
    engine.update(request(text_batch), {}, LOSS)
    critic = tmp_path / "iter_0000001" / "critic"
    critic.mkdir(parents=True)
    engine.save(critic)
    saved = {name: tensor.detach().clone() for name, tensor in engine.network.weights().items()}
    straight = engine.update(request(text_batch), {}, LOSS)
    other.load(critic)
    assert other.update(request(text_batch), {}, LOSS) == straight
    for name, tensor in engine.network.weights().items():
        assert torch.equal(tensor, other.network.weights()[name]), name
    weights = read_value_weights(critic, read_config(tiny_text))
    assert weights.keys() == saved.keys() and all(torch.equal(weights[name], tensor) for name, tensor in saved.items())


def test_where_the_weights_may_come_from(tiny_text: Path, tiny_vl: Path, reward_model: Path, tmp_path: Path) -> None:
    for folder, tied in ((tiny_text, True), (tiny_vl, False)):
        config = read_config(folder)
        language_model, value_model = read_megatron_weights(folder, config), read_value_weights(folder, config)
        assert (HEAD in language_model) is not tied
        hidden = language_model["text_decoder.decoder.final_layernorm.weight"].shape[0]
        assert value_model.pop(HEAD).equal(torch.zeros(1, hidden))
        assert value_model.keys() == language_model.keys() - {HEAD}
        assert all(torch.equal(value_model[name], language_model[name]) for name in value_model)
    config = read_config(tiny_text)
    weights = read_value_weights(reward_model, config)
    converted = tmp_path / "converted" / "release" / "mp_rank_00"
    converted.mkdir(parents=True)
    torch.save({"model": weights, "checkpoint_version": 3.0}, converted / "model_optim_rng.pt")
    (tmp_path / "converted" / "latest_checkpointed_iteration.txt").write_text("release\n")
    again = read_value_weights(tmp_path / "converted", config)
    assert weights[HEAD].abs().sum() > 0 and all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    for folder in (tiny_text, reward_model, tmp_path / "converted"):
        check_value_weights(folder, config)
    with pytest.raises(ValueError, match="take weights and config.json of one model"):
        check_value_weights(reward_model, read_config(tiny_vl))


def test_a_frozen_vision_encoder_is_the_actors(tiny_vl: Path, tmp_path: Path) -> None:
    config = read_config(tiny_vl)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_vl, copy)
    check_same_vision(copy, tiny_vl, config)
    other = make_tiny_vl(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"vision encoder is frozen, but image_encoder\.\S+ in .*other differs .*freeze: false"):
        check_same_vision(other, tiny_vl, config)


@pytest.mark.parametrize("style", ["mm", "mcore"])
def test_weights_split_over_ranks_are_put_together(
    make_engine: MakeEngine, tiny_text: Path, reward_model: Path, text_batch: Batch, tmp_path: Path, style: str
) -> None:
    config = read_config(tiny_text)
    for source in (tiny_text, reward_model):
        ranks = in_ranks(source, tmp_path / source.name, style)
        assert check_value_weights(ranks, config).kind == "ranks"
        whole, found = read_value_weights(source, config), read_value_weights(ranks, config)
        assert whole.keys() == found.keys() and all(torch.equal(whole[name], tensor) for name, tensor in found.items())
    engines = [make_engine(tiny_text, load=str(folder)) for folder in (reward_model, ranks)]
    expected, values = (engine.values(text_batch, range(len(text_batch)), {}) for engine in engines)
    assert all(row.any() and torch.equal(row, values[sample_id]) for sample_id, row in expected.items())


def test_a_frozen_vision_encoder_is_compared_across_ranks(tiny_vl: Path, tmp_path: Path) -> None:
    config = read_config(tiny_vl)
    ranks = in_ranks(tiny_vl, tmp_path / "ranks")
    check_same_vision(ranks, tiny_vl, config)
    check_same_vision(tiny_vl, ranks, config)
    with pytest.raises(ValueError, match="vision encoder is frozen"):
        check_same_vision(ranks, make_tiny_vl(tmp_path / "other", seed=1), config)


def in_ranks(source: Path, target: Path, style: str = "mm") -> Path:
    """The model split over two tensor and two pipeline ranks."""
    layout = ParallelConfig(tp_size=2, llm_pp_layers=[1, 1])
    hf_to_mm(HfToMmOptions(str(target), HfConfig(str(source)), layout, format=FormatOptions(style)))
    return target
