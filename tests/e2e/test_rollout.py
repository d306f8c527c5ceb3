"""The rollout engine against Hugging Face: the same policy before and after weight pushes, exact replay, clean streams, named mistakes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mindspeed_mm_rl.config.plan import RolloutPlan
from mindspeed_mm_rl.models.families import read_architecture
from mindspeed_mm_rl.types import BAN_BIAS, ImageFeatures, ImageInput, Images, RolloutGroup, RolloutRequest
from mindspeed_mm_rl.weights.host import HostBuffer, WeightHandle
from tests.e2e.rollout_process import RolloutProcess
from tests.hf_versions import features_of, picture_tokens
from tests.host_weights import fill, new_buffer
from tests.tiny import make_tiny_text

TEMPERATURE = 0.7
SIZES = [(112, 84), (56, 56), (224, 112), (140, 196)]
"""Width and height of the test pictures, in pixels."""
PICTURES_OF_PROMPT = [(), (0,), (1,), (2, 3), (0,), (3, 1)]
PIXELS, EMBEDS, TEXT = "pixels", "embeds", "text"


def _plan(folder: Path, image_embeds: bool = False, dtype: str = "float32") -> RolloutPlan:
    return RolloutPlan(
        hf_path=str(folder),
        dtype=dtype,
        seed=7,
        temperature=TEMPERATURE,
        max_tokens=24,
        max_model_len=256,
        max_num_seqs=64,
        max_num_batched_tokens=1024,
        gpu_memory_utilization=0.5,
        kv_cache_bytes=32 << 20,
        enforce_eager=True,
        enable_prefix_caching=True,
        max_images_per_prompt=2,
        image_embeds=image_embeds,
        min_pixels=28 * 28,
        max_pixels=64 * 28 * 28,
        tensor_parallel_size=1,
        trust_remote_code=False,
        threads=1,
        timeout_seconds=60.0,
    )


def _picture(index: int) -> ImageInput:
    width, height = SIZES[index]
    pixels = np.random.RandomState(index).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return ImageInput(hashlib.sha256(pixels.tobytes()).hexdigest(), pixels, (1, height // 14, width // 14))


@dataclass
class Trainer:
    """Hugging Face in the trainer's place: same prompts, same weights, log-probs computed independently."""

    folder: Path
    model: transformers.PreTrainedModel
    pictures: list[ImageInput]

    @staticmethod
    def load(folder: Path) -> Trainer:
        auto = transformers.AutoModelForImageTextToText if read_architecture(folder).vision else transformers.AutoModelForCausalLM
        return Trainer(folder, auto.from_pretrained(folder).float().eval(), [_picture(i) for i in range(len(SIZES))])

    def requests(self, first_prompt_id: int = 10, with_pictures: bool = True) -> list[RolloutRequest]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder)
        requests = []
        for index, pictures in enumerate(PICTURES_OF_PROMPT):
            shown = [self.pictures[i] for i in pictures] if with_pictures else []
            marks = "<|vision_start|><|image_pad|><|vision_end|>" * len(shown)
            # Some prompts fill a KV block of 128 tokens: only such blocks are shared by samples and must be dropped after a push.
            question = f"What is {index} + {index * 7}? " * (24 if index in (0, 4) else 1)
            text = f"<|im_start|>user\n{marks}{question}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer(text)["input_ids"]
            expanded = len(ids) + sum(picture.num_tokens(2) - 1 for picture in shown)
            requests.append(RolloutRequest(first_prompt_id + index, ids, tuple(picture.key for picture in shown), expanded))
        return requests

    def pixels(self) -> dict[str, ImageInput]:
        return {picture.key: picture for picture in self.pictures}

    @torch.no_grad()
    def features(self) -> dict[str, ImageFeatures]:
        processor = transformers.AutoImageProcessor.from_pretrained(self.folder)
        found = {}
        for picture in self.pictures:
            batch = processor(images=[picture.pixels], return_tensors="pt")
            embeddings = features_of(self.model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]))
            found[picture.key] = ImageFeatures(embeddings, picture.grid_thw)
        return found

    def tensors(self, vision: bool = True) -> list[tuple[str, torch.Tensor]]:
        return [(name, tensor) for name, tensor in self.model.state_dict().items() if vision or "visual" not in name]

    def take_a_step(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)

    def gap(self, requests: list[RolloutRequest], groups: list[RolloutGroup]) -> float:
        """Largest |rollout - Hugging Face| log-prob over all sampled tokens."""
        by_id = {request.prompt_id: request for request in requests}
        return max(self._gap(by_id[group.prompt_id], group) for group in groups)

    @torch.no_grad()
    def _gap(self, request: RolloutRequest, group: RolloutGroup) -> float:
        prompt, inputs = self._hf_inputs(request)
        assert group.prompt_length == len(prompt) == request.expanded_length
        banned = list(read_architecture(self.folder).banned_token_ids)
        worst = 0.0
        for rollout in group.rollouts:
            ids = torch.tensor([prompt + rollout.token_ids])
            kinds = picture_tokens(ids, read_architecture(self.folder).image_token_id) if inputs else {}
            logits = self.model(input_ids=ids, **inputs, **kinds).logits[0, len(prompt) - 1 : -1].float()
            logits[:, banned] += BAN_BIAS
            expected = (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            worst = max(worst, float((expected - torch.tensor(rollout.logprobs)).abs().max()))
        return worst

    def _hf_inputs(self, request: RolloutRequest) -> tuple[list[int], dict[str, torch.Tensor]]:
        shown = [picture for key in request.image_keys for picture in self.pictures if picture.key == key]
        if not shown:
            return request.token_ids, {}
        processor = transformers.AutoImageProcessor.from_pretrained(self.folder)
        batch = processor(images=[picture.pixels for picture in shown], return_tensors="pt")
        counts = iter(picture.num_tokens(2) for picture in shown)
        image = read_architecture(self.folder).image_token_id
        prompt = [token for token in request.token_ids for _ in range(next(counts) if token == image else 1)]
        return prompt, {"pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}


_kept_buffers: list[HostBuffer] = []
"""A handle is only as good as its buffer."""


def _handle(tensors: list[tuple[str, torch.Tensor]]) -> WeightHandle:
    _kept_buffers.append(new_buffer(tensors))
    return fill(_kept_buffers[-1], tensors)


@pytest.fixture(scope="module")
def process(tiny_vl: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutProcess]:
    with RolloutProcess(cache=tmp_path_factory.mktemp("vllm_cache")) as started:
        started.build(PIXELS, _plan(tiny_vl), seed=7)
        started.build(EMBEDS, _plan(tiny_vl, image_embeds=True), seed=7)
        started.build(TEXT, _plan(tiny_text), seed=7)
        yield started
        for name in (PIXELS, EMBEDS, TEXT):
            started.close(name)


@pytest.fixture
def trainer(tiny_vl: Path) -> Trainer:
    return Trainer.load(tiny_vl)


def _pictures(trainer: Trainer, engine: str) -> Images:
    return trainer.features() if engine == EMBEDS else trainer.pixels()


@pytest.mark.parametrize("engine", [PIXELS, EMBEDS])
def test_logprobs_equal_hugging_face_at_the_start_and_after_each_of_three_pushes(
    process: RolloutProcess, trainer: Trainer, engine: str
) -> None:
    requests = trainer.requests()
    assert [request.expanded_length > 128 for request in requests] == [True, False, False, False, True, False]
    tensors = trainer.tensors(vision=engine == PIXELS)
    buffer = new_buffer(tensors)
    for version in range(4):
        process.receive(engine, fill(buffer, tensors), version)
        # A reader that kept an alias of the shared memory would now sample nonsense.
        fill(buffer, [(name, torch.full_like(tensor, 9.0)) for name, tensor in tensors])
        groups = process.generate(engine, requests, _pictures(trainer, engine), num_samples=2)
        assert trainer.gap(requests, groups) < 1e-4
        assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {version}
        trainer.take_a_step(seed=version)
        tensors = trainer.tensors(vision=engine == PIXELS)
    assert trainer.gap(requests, groups) > 1e-2, "the check must see a policy that is one step old"


def test_pixels_and_embeddings_sample_the_same_tokens(process: RolloutProcess, trainer: Trainer) -> None:
    for engine in (PIXELS, EMBEDS):
        process.receive(engine, _handle(trainer.tensors(vision=engine == PIXELS)), 1)
    seen = {engine: _by_sample(process.generate(engine, trainer.requests(), _pictures(trainer, engine), 2)) for engine in (PIXELS, EMBEDS)}
    assert {i: tokens for i, (tokens, _) in seen[PIXELS].items()} == {i: tokens for i, (tokens, _) in seen[EMBEDS].items()}


def test_a_push_without_the_frozen_vision_tower_keeps_it(process: RolloutProcess, trainer: Trainer) -> None:
    requests = trainer.requests()
    process.receive(PIXELS, _handle(trainer.tensors()), 1)
    process.receive(PIXELS, _handle(trainer.tensors(vision=False)), 2)
    assert trainer.gap(requests, process.generate(PIXELS, requests, trainer.pixels(), 2)) < 1e-4


@pytest.mark.parametrize("engine", [PIXELS, EMBEDS])
def test_the_check_sees_wrong_pictures(process: RolloutProcess, trainer: Trainer, engine: str) -> None:
    process.receive(engine, _handle(trainer.tensors(vision=engine == PIXELS)), 1)
    requests = [request for request in trainer.requests() if len(request.image_keys) == 1]
    right = _pictures(trainer, engine)
    # The sizes differ, so no picture can stand for another: each is mirrored, its features reversed.
    wrong = {key: _mirrored(picture) for key, picture in right.items()}
    assert trainer.gap(requests, process.generate(engine, requests, wrong, 2)) > 1e-2


def _mirrored(picture: ImageInput | ImageFeatures) -> ImageInput | ImageFeatures:
    if isinstance(picture, ImageFeatures):
        return replace(picture, embeddings=picture.embeddings.flip(0))
    return replace(picture, pixels=picture.pixels[:, ::-1].copy())


def test_text_model_with_tied_embeddings_equals_hugging_face(process: RolloutProcess, tiny_text: Path) -> None:
    """Whether the head is sent as a copy of the embedding or, as the trainer does, not at all."""
    trainer = Trainer.load(tiny_text)
    requests = trainer.requests(with_pictures=False)
    for version in range(4):
        tensors = [(name, tensor) for name, tensor in trainer.tensors() if version < 2 or name != "lm_head.weight"]
        process.receive(TEXT, _handle(tensors), version)
        assert trainer.gap(requests, process.generate(TEXT, requests, {}, 2)) < 1e-4
        trainer.take_a_step(seed=version)


def test_experts_are_those_of_the_last_push(tmp_path: Path) -> None:
    """Some versions pack them when the engine is built. Their groups are made with the first engine of a process."""
    folders = [make_tiny_text(tmp_path / str(seed), seed, "qwen3_moe", hidden=64, head_dim=32, weight_std=0.15) for seed in range(2)]
    with RolloutProcess(cache=tmp_path / "vllm_cache") as process:
        process.build(TEXT, _plan(folders[0]), seed=7)
        for version, folder in enumerate([*folders, folders[0]]):
            trainer = Trainer.load(folder)
            process.receive(TEXT, _handle(list(load_file(folder / "model.safetensors").items())), version)
            requests = trainer.requests(with_pictures=False)
            assert trainer.gap(requests, process.generate(TEXT, requests, {}, 2)) < 1e-4
        process.close(TEXT)


def _by_sample(groups: list[RolloutGroup]) -> dict[int, tuple[list[int], list[float]]]:
    return {rollout.sample_id: (rollout.token_ids, rollout.logprobs) for group in groups for rollout in group.rollouts}


def test_replay_is_bit_identical_over_order_and_batch_split(process: RolloutProcess, trainer: Trainer) -> None:
    process.receive(EMBEDS, _handle(trainer.tensors(vision=False)), 1)
    requests, pictures = trainer.requests(), trainer.features()
    once = _by_sample(process.generate(EMBEDS, requests, pictures, 4))
    assert len({tuple(tokens) for tokens, _ in once.values()}) == len(once), "samples of one prompt must differ"
    assert _by_sample(process.generate(EMBEDS, requests[::-1], pictures, 4)) == once
    halves = [process.generate(EMBEDS, part, pictures, 4) for part in (requests[:2], requests[2:])]
    assert _by_sample(halves[0] + halves[1]) == once


def test_an_engine_that_slept_is_what_it_was(process: RolloutProcess, trainer: Trainer) -> None:
    tensors = trainer.tensors(vision=False)
    process.receive(EMBEDS, _handle(tensors), 1)
    requests, pictures = trainer.requests(), trainer.features()
    once = _by_sample(process.generate(EMBEDS, requests, pictures, 2))
    process.take_seconds(EMBEDS)
    process.sleep(EMBEDS)
    assert process.take_seconds(EMBEDS).keys() == {"offload"}
    assert _by_sample(process.generate(EMBEDS, requests, pictures, 2)) == once
    assert process.take_seconds(EMBEDS).keys() == {"onload"}
    process.sleep(EMBEDS)
    process.receive(EMBEDS, _handle(tensors), 2)
    assert _by_sample(process.generate(EMBEDS, requests, pictures, 2)) == once


def test_samples_are_in_id_order_and_never_banned(process: RolloutProcess, trainer: Trainer) -> None:
    process.receive(EMBEDS, _handle(trainer.tensors(vision=False)), 1)
    groups = process.generate(EMBEDS, trainer.requests(first_prompt_id=100), trainer.features(), 4)
    architecture = read_architecture(trainer.folder)
    for group in groups:
        assert [rollout.sample_id for rollout in group.rollouts] == [group.prompt_id * 4 + k for k in range(4)]
        for rollout in group.rollouts:
            assert len(rollout.logprobs) == len(rollout.token_ids) <= 24
            assert not set(rollout.token_ids) & set(architecture.banned_token_ids)
            assert (rollout.token_ids[-1] in architecture.eos_token_ids) == (rollout.finish == "stop")


def test_a_closed_stream_leaves_nothing_behind(process: RolloutProcess, trainer: Trainer) -> None:
    process.receive(EMBEDS, _handle(trainer.tensors(vision=False)), 1)
    requests, pictures = trainer.requests(), trainer.features()
    # 96 samples for 64 places: the first group is done long before the last.
    whole = _by_sample(process.generate(EMBEDS, requests, pictures, 16))
    refusals, groups = process.generate_while_open(EMBEDS, requests, pictures, 16)
    assert refusals == ["rollout: a stream of generate is still open; read it to its end or close it first"] * 2
    assert _by_sample(groups) == whole


def test_a_refused_prompt_leaves_nothing_behind(process: RolloutProcess, trainer: Trainer) -> None:
    process.receive(EMBEDS, _handle(trainer.tensors(vision=False)), 1)
    requests, pictures = trainer.requests(), trainer.features()
    miscounted = replace(requests[3], expanded_length=requests[3].expanded_length + 1)
    with pytest.raises(ValueError, match="prompt 13: the rollout engine counts .* tokens after image expansion but the loader counted"):
        process.generate(EMBEDS, [*requests[:3], miscounted], pictures, 2)
    assert len(process.generate(EMBEDS, requests, pictures, 2)) == len(requests)


def test_bad_requests_are_named(process: RolloutProcess, trainer: Trainer) -> None:
    process.receive(EMBEDS, _handle(trainer.tensors(vision=False)), 1)
    requests, pictures = trainer.requests(), trainer.features()
    with pytest.raises(ValueError, match="prompt 10: 240 prompt tokens \\+ max_tokens 24 exceed max_model_len 256"):
        process.generate(EMBEDS, [replace(requests[0], expanded_length=240)], pictures, 2)
    with pytest.raises(ValueError, match="prompt 11: picture .* was not handed"):
        process.generate(EMBEDS, [requests[1]], {}, 2)
    with pytest.raises(ValueError, match="prompt 11: image_embeds is True, so pictures must come as ImageFeatures"):
        process.generate(EMBEDS, [requests[1]], trainer.pixels(), 2)
    with pytest.raises(ValueError, match="prompt 11: it has 3 pictures but max_images_per_prompt is 2"):
        process.generate(EMBEDS, [replace(requests[1], image_keys=requests[1].image_keys * 3)], pictures, 2)
    short = {key: replace(picture, embeddings=picture.embeddings[1:]) for key, picture in pictures.items()}
    with pytest.raises(ValueError, match="prompt 11: picture .* has 11 embeddings but its grid \\(1, 6, 8\\) asks for 12"):
        process.generate(EMBEDS, [requests[1]], short, 2)
    with pytest.raises(ValueError, match="same prompt_id"):
        process.generate(EMBEDS, [requests[0], requests[0]], pictures, 2)


@pytest.mark.parametrize("engine", [PIXELS, EMBEDS])
def test_an_incomplete_push_is_refused_and_leaves_the_engine_as_it_was(process: RolloutProcess, trainer: Trainer, engine: str) -> None:
    tensors = trainer.tensors(vision=engine == PIXELS)
    process.receive(engine, _handle(tensors), 5)
    for absent in ("layers.0.self_attn.k_proj.weight", "layers.1.input_layernorm.weight", "lm_head.weight"):
        others = [(name, torch.zeros_like(tensor)) for name, tensor in tensors if not name.endswith(absent)]
        with pytest.raises(ValueError, match=f"1 tensors of the rollout model are missing, such as \\['.*{absent}'\\]"):
            process.receive(engine, _handle(others), 6)
    with pytest.raises(ValueError, match="the rollout model has no model.layers.9.mlp.weight"):
        process.receive(engine, _handle([*tensors, ("model.layers.9.mlp.weight", torch.zeros(2))]), 6)
    turned = [(name, tensor.T.contiguous() if name.endswith("lm_head.weight") else tensor) for name, tensor in tensors]
    with pytest.raises(
        ValueError, match="lm_head.weight has shape \\(128, 512\\) but the rollout model's config.json asks for \\(512, 128\\)"
    ):
        process.receive(engine, _handle(turned), 6)
    requests = trainer.requests()
    groups = process.generate(engine, requests, _pictures(trainer, engine), 1)
    assert trainer.gap(requests, groups) < 1e-4
    assert groups[0].rollouts[0].policy_version == 5


def test_generating_before_the_first_push_is_refused(process: RolloutProcess, trainer: Trainer) -> None:
    process.build("fresh", _plan(trainer.folder), seed=7)
    with pytest.raises(ValueError, match="no weights have been received yet"):
        process.generate("fresh", trainer.requests(), trainer.pixels(), 1)
    with pytest.raises(ValueError, match="tensors of the rollout model are missing, such as \\['visual"):
        process.receive("fresh", _handle(trainer.tensors(vision=False)), 0)
    process.close("fresh")
