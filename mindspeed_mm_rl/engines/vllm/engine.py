"""The rollout engine on vLLM: prompts with pictures in, finished groups of samples out.

One policy on both sides: logits + BAN_BIAS at the banned ids, then / temperature, then log-softmax in float32. The engine returns the
log-probs of exactly this distribution ("processed"), and the trainer's head computes the same in the same order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from mindspeed_mm_rl.config.plan import RolloutPlan
from mindspeed_mm_rl.engines.vllm import ranks, submission, weights
from mindspeed_mm_rl.engines.vllm.completeness import check_complete, holds_vision
from mindspeed_mm_rl.engines.vllm.model_class import import_model_class, with_text_keys
from mindspeed_mm_rl.models.families import Architecture, read_architecture
from mindspeed_mm_rl.models.names import PARTS
from mindspeed_mm_rl.platforms import compat, device, patching
from mindspeed_mm_rl.types import BAN_BIAS, ImageFeatures, ImageInput, Images, Rollout, RolloutGroup, RolloutRequest, Sampling
from mindspeed_mm_rl.weights.device import Arrivals
from mindspeed_mm_rl.weights.host import WeightHandle


class VllmRolloutEngine:
    """Implements engines.base.RolloutEngine inside the calling process, which must have been started with `rollout_env`.

    There are no weights until the first `receive_weights`: the folder may hold only configuration, tokenizer and processor.
    With RolloutPlan.num_ranks > 1 it is one of as many ranks (ranks.join comes first): every call must be made on all of them, with equal
    arguments, and every stream that is read on the first rank of a tensor-parallel group must be read to its end on the others. Requests
    are those of the group; where there are several groups, one may have none.
    """

    def __init__(self, plan: RolloutPlan, seed: int) -> None:
        """seed: of the run; the noise of a sample depends on it and on its sample id alone."""
        self._plan = plan
        self._seed = seed
        self._version: int | None = None
        self._pushes = 0
        self._architecture = read_architecture(plan.hf_path)
        if plan.threads:
            # vLLM turns later calls into a warning.
            torch.set_num_threads(plan.threads)
        import_model_class(plan.hf_path)
        patching.apply("rollout", device.kind())
        self._llm: LLM | None = LLM(**_engine_arguments(plan, seed, self._architecture))
        weights.open_receiver(self._llm)
        self._is_asleep = False
        self._seconds: dict[str, float] = {}
        self._pace = ranks.Pace(plan)

    def sleep(self) -> None:
        """Weights go to the host, keys and values are forgotten; on CPU nothing moves. The next call wakes the engine."""
        start = time.perf_counter()
        self._idle().sleep(level=1)
        self._is_asleep = True
        self._count("offload", start)

    def _awake(self) -> LLM:
        llm, start = self._idle(), time.perf_counter()
        if self._is_asleep:
            llm.wake_up()
            self._is_asleep = False
            self._count("onload", start)
        return llm

    def _count(self, what: str, start: float) -> None:
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - start

    def take_seconds(self) -> dict[str, float]:
        """Of sleeping and waking since this was last asked."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def receive_weights(self, source: WeightHandle | Arrivals, policy_version: int) -> None:
        """Copies the weights and drops every cache that the old ones filled.

        A frozen vision tower may stay out of every push but the first; with image_embeds the engine has none and ignores it.
        Raises ValueError, with the engine as it was, when tensors are missing, unknown or of another shape.
        """
        llm = self._awake()
        has_tower = self._architecture.vision is not None and not self._plan.image_embeds
        needs_tower = has_tower and (self._version is None or holds_vision(source))
        check_complete(source, self._architecture.raw, PARTS if needs_tower else ("text",))
        weights.receive(llm, source, policy_version)
        self._version = policy_version
        self._pushes += 1

    def generate(self, requests: list[RolloutRequest], images: Images, sampling: Sampling) -> Iterator[RolloutGroup]:
        """Yields each group as soon as its last sample is finished; a closed or failed stream leaves nothing in the engine.

        Raises ValueError (naming the prompt) for a prompt that doesn't fit, an image that is missing, or image tokens that the
        engine counts differently from the loader.
        """
        llm = self._awake()
        engine, version, num_samples = llm.llm_engine, self._version, sampling.num_samples
        if version is None:
            raise ValueError("rollout: no weights have been received yet; call receive_weights before generate")
        added: list[str] = []
        finished: dict[int, list[Rollout]] = {request.prompt_id: [] for request in requests}
        lengths: dict[int, int] = {}
        refusal = None
        try:
            try:
                self._add(requests, images, sampling, added, lengths)
            except ValueError as error:
                refusal = error
            self._pace.agree(refusal)
            while engine.has_unfinished_requests():
                groups = []
                for output in engine.step():
                    rollout = _rollout(output, version)
                    prompt_id = rollout.sample_id // num_samples
                    group = finished[prompt_id]
                    group.append(rollout)
                    if len(group) == num_samples:
                        samples = tuple(sorted(group, key=lambda sample: sample.sample_id))
                        groups.append(RolloutGroup(prompt_id, lengths[prompt_id], samples))
                if not (yield from self._pace.kept(groups)):
                    return
            if sampling.stream:
                # Training goes on as if nobody had asked anything in between.
                weights.drop_caches(llm)
        finally:
            submission.abort(llm, added)

    def _add(self, requests: list[RolloutRequest], images: Images, sampling: Sampling, added: list[str], lengths: dict[int, int]) -> None:
        """Every sample as a request of the engine's. Writes their names, and the tokens of each prompt, into the last two arguments."""
        if len({request.prompt_id for request in requests}) != len(requests):
            raise ValueError("rollout: two requests have the same prompt_id, so their samples could not be told apart")
        for request in requests:
            prepared = self._prepare(request, images)
            lengths[request.prompt_id] = request.expanded_length
            for sample_id in range(request.prompt_id * sampling.num_samples, (request.prompt_id + 1) * sampling.num_samples):
                added.append(submission.add(self._open(), str(sample_id), prepared, self._parameters(sample_id, sampling)))

    def close(self) -> None:
        """Gives the engine's memory back; the engine can't be used afterwards."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    def _open(self) -> LLM:
        if self._llm is None:
            raise ValueError("rollout: the engine has been closed")
        return self._llm

    def _idle(self) -> LLM:
        llm = self._open()
        if llm.llm_engine.get_num_unfinished_requests():
            raise ValueError("rollout: a stream of generate is still open; read it to its end or close it first")
        return llm

    def _parameters(self, sample_id: int, sampling: Sampling) -> SamplingParams:
        return SamplingParams(
            temperature=self._plan.temperature if sampling.temperature is None else sampling.temperature,
            max_tokens=self._plan.max_tokens,
            seed=_sample_seed(self._seed, sample_id, sampling.stream),
            stop_token_ids=list(self._architecture.eos_token_ids),
            logit_bias=dict.fromkeys(self._architecture.banned_token_ids, BAN_BIAS) or None,
            # 0 = the sampled token's log-prob and no other.
            logprobs=0 if sampling.with_logprobs else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # Made for this one request: no copy needed.
            **compat.supported_arguments(SamplingParams, {"flat_logprobs": True, "skip_clone": True}),
        )

    def _prepare(self, request: RolloutRequest, images: Images) -> Any:
        """The prompt as the engine takes it, images expanded: once for all samples."""
        self._check_fits(request)
        prompt: dict[str, Any] = {"prompt_token_ids": request.token_ids}
        if request.image_keys:
            prompt |= self._picture_inputs(request, images)
        prepared, found = submission.prepare(self._open(), prompt)
        if found != request.expanded_length:
            raise ValueError(
                f"prompt {request.prompt_id}: the rollout engine counts {found} tokens after image expansion but the loader counted "
                f"{request.expanded_length}; both must size pictures by the same min_pixels, max_pixels and preprocessor_config.json"
            )
        return prepared

    def _check_fits(self, request: RolloutRequest) -> None:
        plan = self._plan
        if request.expanded_length + plan.max_tokens > plan.max_model_len:
            raise ValueError(
                f"prompt {request.prompt_id}: {request.expanded_length} prompt tokens + max_tokens {plan.max_tokens} exceed "
                f"max_model_len {plan.max_model_len}"
            )
        if len(request.image_keys) > plan.max_images_per_prompt:
            raise ValueError(
                f"prompt {request.prompt_id}: it has {len(request.image_keys)} pictures but max_images_per_prompt is "
                f"{plan.max_images_per_prompt}"
            )

    def _check_features(self, request: RolloutRequest, pictures: list[ImageFeatures]) -> None:
        """vLLM cuts the rows by the grids and would silently leave rows over."""
        merge_size = self._architecture.vision.merge_size
        for key, picture in zip(request.image_keys, pictures, strict=True):
            time, height, width = picture.grid_thw
            tokens = time * height * width // merge_size**2
            if picture.embeddings.shape[0] != tokens:
                raise ValueError(
                    f"prompt {request.prompt_id}: picture {key} has {picture.embeddings.shape[0]} embeddings but its grid "
                    f"{picture.grid_thw} asks for {tokens}"
                )

    def _picture_inputs(self, request: RolloutRequest, images: Images) -> dict[str, Any]:
        missing = [key for key in request.image_keys if key not in images]
        if missing:
            raise ValueError(f"prompt {request.prompt_id}: picture {missing[0]} was not handed to the rollout engine")
        pictures = [images[key] for key in request.image_keys]
        expected = ImageFeatures if self._plan.image_embeds else ImageInput
        if not all(isinstance(picture, expected) for picture in pictures):
            raise ValueError(
                f"prompt {request.prompt_id}: image_embeds is {self._plan.image_embeds}, so pictures must come as {expected.__name__}"
            )
        if self._plan.image_embeds:
            self._check_features(request, pictures)
            value: Any = {
                "image_embeds": torch.cat([picture.embeddings for picture in pictures]),
                "image_grid_thw": torch.tensor([picture.grid_thw for picture in pictures]),
            }
        else:
            value = [Image.fromarray(picture.pixels) for picture in pictures]
        if self._plan.image_embeds and not compat.vllm_renders():
            # These take a name for all of them together, and have one for the embeddings themselves.
            return {"multi_modal_data": {"image": value}}
        # The key names the pixels; with other weights the same pixels have other features.
        names = [f"{key}-{self._pushes}" for key in request.image_keys]
        return {"multi_modal_data": {"image": value}, "multi_modal_uuids": {"image": names}}


def _rollout(output: RequestOutput, policy_version: int) -> Rollout:
    completion = output.outputs[0]
    return Rollout(
        sample_id=int(output.request_id),
        token_ids=list(completion.token_ids),
        logprobs=list(submission.logprobs(completion)),
        finish="stop" if completion.finish_reason == "stop" else "length",
        policy_version=policy_version,
    )


def _engine_arguments(plan: RolloutPlan, seed: int, architecture: Architecture) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": plan.hf_path,
        "dtype": plan.dtype,
        "seed": seed,
        # Weights come from the trainer alone, the first ones too.
        **weights.engine_arguments(),
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": plan.max_num_batched_tokens,
        "gpu_memory_utilization": plan.gpu_memory_utilization,
        "enforce_eager": plan.enforce_eager,
        "enable_prefix_caching": plan.enable_prefix_caching,
        "trust_remote_code": plan.trust_remote_code,
        # After bans and temperature, as the trainer computes them; versions without the argument are made to do so.
        **compat.supported_arguments(EngineArgs, {"logprobs_mode": "processed_logprobs"}),
        "disable_log_stats": True,
        "enable_sleep_mode": current_platform.is_sleep_mode_available(),
    }
    arguments |= ranks.engine_arguments(plan)
    if current_platform.is_cpu():
        arguments |= _cpu_arguments(plan, architecture)
    if compat.vllm_is_0_9():
        arguments["hf_overrides"] = with_text_keys
    return arguments | (_picture_arguments(plan) if architecture.vision else {})


def _cpu_arguments(plan: RolloutPlan, architecture: Architecture) -> dict[str, Any]:
    # The CPU kernel of rope takes the queries of latent attention, [T, heads, dim], for [T, dim]: silently wrong with several heads.
    rope = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}} if architecture.text.latent else {}
    # Old versions split them whatever they are told, unless everything has room in one step.
    longest = plan.max_model_len * (1 if compat.vllm_renders() else plan.max_num_seqs)
    return rope | {
        # A prefill that is split over two steps asks the CPU generator of a seeded request for an offset, which it doesn't have.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(plan.max_num_batched_tokens, longest),
        **compat.supported_arguments(EngineArgs, {"kv_cache_memory_bytes": plan.kv_cache_bytes}),
    }


def _picture_arguments(plan: RolloutPlan) -> dict[str, Any]:
    # A prompt is rendered once per iteration, so a cache of rendered pictures would only hold memory.
    caches = {"mm_processor_cache_gb": 0, "disable_mm_preprocessor_cache": True}
    arguments = compat.supported_arguments(EngineArgs, caches)
    if plan.image_embeds:
        # No picture is ever given as pixels: vLLM then leaves the vision tower out.
        if compat.vllm_renders():
            return arguments | {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0, "video": 0}}
        return arguments | {"limit_mm_per_prompt": {"image": plan.max_images_per_prompt, "video": 0}}
    return arguments | {
        "limit_mm_per_prompt": {"image": plan.max_images_per_prompt, "video": 0},
        "mm_processor_kwargs": {"size": {"shortest_edge": plan.min_pixels, "longest_edge": plan.max_pixels}},
    }


def _sample_seed(run_seed: int, sample_id: int, stream: str) -> int:
    """63 bits without any state: a resumed run, another replica or another order draws the same noise."""
    digest = hashlib.blake2b(f"{stream}{run_seed}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
