"""Prompt templates by name: how each family of models writes a dialogue. A new template is a value in this table."""

from __future__ import annotations

from mindspeed_mm_rl.data.preprocess.templates import BOS, Template

_R1_INSTRUCTION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think><answer> answer here </answer>. Put your final answer within \\boxed{}."
)
"""The prompt of DeepSeek-R1-Zero (arXiv 2501.12948, table 1) and where the answer goes."""

_HELPFUL = "You are a helpful assistant."
_BOXED_ANSWER = "The answer format must be: \\boxed{'The final answer goes here.'}\n"
_CODE_TOOL = (
    '{"type": "function", "function": {"name": "code_interpreter", "description": "A tool for executing code.", "parameters": '
    '{"type": "object", "properties": {"code": {"type": "string", "description": "The code to execute."}}, "required": ["code"]}}}'
)
_SEARCH_TOOL = (
    '{"type": "function", "function": {"name": "search", "description": "Searches the web for relevant information based on the given '
    'query.", "parameters": {"type": "object", "properties": {"query_list": {"type": "array", "item": {"type": "string"}, '
    '"description": "A list of fully-formed semantic queries. The tool will return search results for each query."}}, '
    '"required": ["query_list"]}}}'
)


def _hermes_tools(signature: str) -> str:
    """The system message in which Qwen's chat template announces its tools."""
    return (
        f"{_HELPFUL}\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
        f"signatures within <tools></tools> XML tags:\n<tools>\n{signature}\n</tools>\n\nFor each function call, return a json object "
        "with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _chatml(default_system: str, before: str = "", after: str = "") -> Template:
    """Qwen's ChatML; `before` stands inside the user's turn, `after` behind it."""
    return Template(
        user=(f"<|im_start|>user\n{before}{{{{content}}}}<|im_end|>\n{after}<|im_start|>assistant\n",),
        system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
        separator=("\n",),
        default_system=default_system,
        stop_word="<|im_end|>",
    )


def _mistral() -> Template:
    return Template(prefix=(BOS,), user=("[INST] {{content}} [/INST]",))


def _deepseek2() -> Template:
    return Template(prefix=(BOS,), user=("User: {{content}}\n\nAssistant:",), system=("{{content}}\n\n",))


TEMPLATES: dict[str, Template] = {
    "default": Template(user=("Human: {{content}}\nAssistant:",), system=("{{content}}\n",), separator=("\n",)),
    "empty": Template(assistant=("{{content}}",)),
    "trl": Template(prefix=(BOS,), assistant=("{{content}}",)),
    "qwen": _chatml(_HELPFUL),
    "qwen_r1": _chatml(_HELPFUL, before=f"{_R1_INSTRUCTION}\n"),
    "qwen_math_r1": _chatml("Please reason step by step, and put your final answer within \\boxed{}."),
    "qwen_retool": _chatml(_hermes_tools(_CODE_TOOL), after=_BOXED_ANSWER),
    "qwen_search_tool": _chatml(_hermes_tools(_SEARCH_TOOL), after=_BOXED_ANSWER),
    "qwen3": Template(
        user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
        assistant=("{{content}}<|im_end|>\n",),
        system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
        stop_word="<|im_end|>",
        reasoning=True,
    ),
    "llama2": Template(user=(BOS, "[INST] {{content}} [/INST]"), system=("<<SYS>>\n{{content}}\n<</SYS>>\n\n",), system_in_user=True),
    "llama3": Template(
        prefix=(BOS,),
        user=("<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",),
        system=("<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",),
        stop_word="<|eot_id|>",
    ),
    "mistral": _mistral(),
    "mixtral": _mistral(),
    "gemma": Template(
        prefix=(BOS,),
        user=("<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
        assistant=("{{content}}",),
        separator=("<end_of_turn>\n",),
        eos_at_end=True,
    ),
    "alpaca": Template(
        user=("### Instruction:\n{{content}}\n\n### Response:\n",),
        separator=("\n\n",),
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    ),
    "deepseek2": _deepseek2(),
    "deepseek2-lite": _deepseek2(),
    "deepseek3": Template(prefix=(BOS,), user=("<｜User｜>{{content}}<｜Assistant｜>",)),
    "deepseek3_r1": Template(prefix=(BOS,), user=(f"{_R1_INSTRUCTION} <｜User｜>{{{{content}}}}<｜Assistant｜>",)),
    "minicpm3": _deepseek2(),
    "baichuan2": Template(user=("<reserved_106>{{content}}<reserved_107>",), assistant=("{{content}}",), eos_at_end=True),
}
