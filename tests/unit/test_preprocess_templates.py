"""Prompt templates: what each name writes, by hand."""

from __future__ import annotations

import json

import pytest

from mindspeed_mm_rl.data.preprocess.encoding import find_template
from mindspeed_mm_rl.data.preprocess.template_table import TEMPLATES
from mindspeed_mm_rl.data.preprocess.templates import ChatTemplateEncoder, TemplateEncoder, read_templates
from tests.data_files import VL_TEMPLATE, byte_tokenizer

NAMES = (
    "default empty trl qwen qwen_r1 qwen_math_r1 qwen_retool qwen_search_tool qwen3 llama2 llama3 mistral mixtral gemma alpaca deepseek2 "
    "deepseek2-lite deepseek3 deepseek3_r1 minicpm3 baichuan2"
)
HISTORY = [("a", "b")]
CHATML = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks about "
    "the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think><answer> answer here "
    "</answer>. Put "
    "your final answer within \\boxed{}."
)
# name -> (prompt for "c" after HISTORY without a system message, opening with the system message "S")
BY_HAND = {
    "default": ("Human: a\nAssistant:b<|im_end|>\nHuman: c\nAssistant:", "S\nHuman: c\nAssistant:"),
    "empty": ("abc", "Sc"),
    "trl": ("<s>abc", "<s>Sc"),
    "llama2": ("<s>[INST] a [/INST]b<|im_end|><s>[INST] c [/INST]", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nc [/INST]"),
    "mistral": ("<s>[INST] a [/INST]b<|im_end|>[INST] c [/INST]", "<s>S[INST] c [/INST]"),
    "gemma": (
        "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
        "<s>S<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
    ),
    "deepseek2": ("<s>User: a\n\nAssistant:b<|im_end|>User: c\n\nAssistant:", "<s>S\n\nUser: c\n\nAssistant:"),
    "deepseek3": ("<s><｜User｜>a<｜Assistant｜>b<|im_end|><｜User｜>c<｜Assistant｜>", "<s>S<｜User｜>c<｜Assistant｜>"),
    "deepseek3_r1": (
        f"<s>{R1} <｜User｜>a<｜Assistant｜>b<|im_end|>{R1} <｜User｜>c<｜Assistant｜>",
        f"<s>S{R1} <｜User｜>c<｜Assistant｜>",
    ),
    "baichuan2": ("<reserved_106>a<reserved_107>b<reserved_106>c<reserved_107>", "S<reserved_106>c<reserved_107>"),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\na\n\n### Response:\nb<|im_end|>\n\n### Instruction:\nc\n\n### Response:\n",
        "S### Instruction:\nc\n\n### Response:\n",
    ),
    "qwen": (
        CHATML.format("You are a helpful assistant.") + "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        CHATML.format("S").replace("\na<", "\nc<"),
    ),
    "qwen3": (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
        CHATML.format("S").replace("\na<", "\nc<") + "<think>\n\n</think>\n\n",
    ),
    "qwen_r1": (
        CHATML.format("You are a helpful assistant.").replace("\na<", f"\n{R1}\na<")
        + f"b<|im_end|>\n<|im_start|>user\n{R1}\nc<|im_end|>\n<|im_start|>assistant\n",
        CHATML.format("S").replace("\na<", f"\n{R1}\nc<"),
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|eot_id|>"]})
    return tokenizer


def test_every_name_is_there():
    assert set(TEMPLATES) == set(NAMES.split())


@pytest.mark.parametrize("name", BY_HAND)
def test_prompts_by_hand(tokenizer, name):
    encoder = TemplateEncoder(TEMPLATES[name], name, tokenizer, enable_thinking=False)
    after_a_turn, with_system = BY_HAND[name]
    assert tokenizer.decode(encoder.prompt("", HISTORY, "c")) == after_a_turn
    assert tokenizer.decode(encoder.prompt("S", [], "c")) == with_system


def test_variants_of_chatml(tokenizer):
    def prompt(name):
        return tokenizer.decode(TemplateEncoder(TEMPLATES[name], name, tokenizer, enable_thinking=False).prompt("", [], "a"))

    assert prompt("qwen_math_r1") == CHATML.format("Please reason step by step, and put your final answer within \\boxed{}.")
    for name, tool in (("qwen_retool", "code_interpreter"), ("qwen_search_tool", "search")):
        system, _, rest = prompt(name).removeprefix("<|im_start|>system\n").partition("<|im_end|>\n")
        signature = json.loads(system.split("<tools>\n")[1].partition("\n</tools>")[0])
        assert signature["function"]["name"] == tool
        assert rest == (
            "<|im_start|>user\na<|im_end|>\nThe answer format must be: \\boxed{'The final answer goes here.'}\n<|im_start|>assistant\n"
        )


def test_thoughts_of_reasoning_models(tokenizer):
    def last_turn(thinking, answer):
        turns = TemplateEncoder(TEMPLATES["qwen3"], "qwen3", tokenizer, thinking).turns("", [("a", "<think>x</think>\n\nb"), ("c", answer)])
        assert tokenizer.decode(turns[0][1]) == "b<|im_end|>\n"
        return tuple(tokenizer.decode(ids) for ids in turns[1])

    opened, empty = "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    assert last_turn(True, "<think>y</think>\n\nd") == (opened, "<think>y</think>\n\nd<|im_end|>\n")
    assert last_turn(True, "d") == (opened, f"{empty}d<|im_end|>\n")
    assert last_turn(False, "<think>y</think>\n\nd") == (opened + empty, "d<|im_end|>\n")


def test_content_that_spells_a_placeholder_stays_as_it_is(tokenizer):
    encoder = TemplateEncoder(TEMPLATES["default"], "default", tokenizer, enable_thinking=False)
    assert tokenizer.decode(encoder.prompt("", [], "{{content}} {{idx}}")) == "Human: {{content}} {{idx}}\nAssistant:"


def test_a_template_of_the_user(tokenizer, tmp_path):
    path = tmp_path / "templates.json"
    mine = {
        "name": "mine",
        "format_prefix": {"slots": [["bos_token"]]},
        "format_user": {"slots": ["[{{idx}}] {{content}} ", {"token": "<|eot_id|>"}]},
        "format_separator": {"slots": ["\n"]},
        "stop_words": ["<|eot_id|>"],
        "replace_eos": True,
    }
    path.write_text(json.dumps([mine]))
    encoder = TemplateEncoder(find_template("mine", str(path)), "mine", tokenizer, enable_thinking=False)
    assert tokenizer.decode(encoder.prompt("", HISTORY, "c")) == "<s>[0] a <|eot_id|>b<|eot_id|>\n[1] c <|eot_id|>"
    assert find_template("qwen", str(path)) is TEMPLATES["qwen"]
    path.write_text(json.dumps([mine | {"format_user": "{{content}}"}]))
    with pytest.raises(ValueError, match=r"templates.json, template mine: format_user must be {slots: ...."):
        read_templates(path)
    path.write_text(json.dumps([mine | {"format_user": {"slots": [7]}}]))
    with pytest.raises(ValueError, match="template mine: format_user: a slot is text, .* not 7"):
        read_templates(path)


def test_the_tokenizers_own_chat_template(tokenizer):
    tokenizer.chat_template = VL_TEMPLATE
    encoder = ChatTemplateEncoder(tokenizer, enable_thinking=None)
    assert tokenizer.decode(encoder.prompt("", HISTORY, "c")) == BY_HAND["qwen"][0]
    assert tokenizer.decode(encoder.prompt("S", [], "c")) == BY_HAND["qwen"][1]
    turns = encoder.turns("S", [*HISTORY, ("c", "d")])
    assert [tuple(map(tokenizer.decode, turn)) for turn in turns] == [
        (CHATML.format("S"), "b<|im_end|>\n"),
        ("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", "d<|im_end|>\n"),
    ]
    tokenizer.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier text of a dialogue; choose a named template"):
        encoder.turns("S", HISTORY)
