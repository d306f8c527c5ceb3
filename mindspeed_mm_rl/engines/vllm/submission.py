"""Prompts into a vLLM engine and out of it: a prompt is prepared once, pictures and all, and handed in once for each of its samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput

from mindspeed_mm_rl.platforms import compat


def prepare(llm: LLM, prompt: Mapping[str, Any]) -> tuple[Any, int]:
    """What `add` takes, and the number of tokens after pictures were expanded."""
    if compat.vllm_renders():
        (rendered,) = llm.llm_engine.renderer.render_cmpl([prompt])
        return rendered, len(rendered["prompt_token_ids"])
    _, request = llm.llm_engine.processor.process_inputs("", prompt, SamplingParams(max_tokens=1))
    return request, len(request.prompt_token_ids)


def add(llm: LLM, name: str, prepared: Any, parameters: SamplingParams) -> str:
    """The name by which `abort` knows it."""
    engine = llm.llm_engine
    if compat.vllm_renders():
        return engine.add_request(name, prepared, parameters)
    # What the engine itself does for several samples of a prompt, whose parameters would only differ by a seed of its own choice.
    request = copy.copy(prepared)
    request.request_id, request.sampling_params = name, parameters
    engine.output_processor.add_request(request, None, None, 0)
    engine.engine_core.add_request(request)
    return name


def abort(llm: LLM, names: list[str]) -> None:
    """Those that are done are left out."""
    llm.llm_engine.abort_request(names, **compat.supported_arguments(llm.llm_engine.abort_request, {"internal": True}))


def logprobs(completion: CompletionOutput) -> Sequence[float]:
    """Of the sampled tokens; none where none were asked for."""
    if not completion.logprobs:
        return []
    if compat.vllm_renders():
        return completion.logprobs.logprobs
    return [at[token].logprob for at, token in zip(completion.logprobs, completion.token_ids, strict=True)]
