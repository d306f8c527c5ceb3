"""The reward model's scores against transformers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from mindspeed_mm_rl.rewards.model import RewardModel, check_folder
from tests.tiny import make_tiny_classifier

MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
RESPONSES = ["5", "The answer is 5, since 2 + 3 = 5.", "", "no", *(f"{k} " * k for k in range(1, 8))]


@pytest.fixture(scope="module")
def classifier(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_classifier(tmp_path_factory.mktemp("reward_model"), tiny_text)


def direct(folder: Path) -> list[float]:
    """One conversation at a time, without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    conversations = [[*MESSAGES, {"role": "assistant", "content": response}] for response in RESPONSES]
    texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
    with torch.no_grad():
        return [model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids).logits.item() for text in texts]


def test_batches_score_as_transformers_does_one_by_one(classifier):
    expected = direct(classifier)
    assert max(expected) - min(expected) > 0.1
    assert RewardModel(str(classifier)).score(MESSAGES, RESPONSES) == pytest.approx(expected, abs=1e-5)


def test_a_model_without_padding_token_scores_too(classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    assert RewardModel(str(folder)).score(MESSAGES, RESPONSES) == pytest.approx(direct(folder), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "is a Qwen2ForCausalLM, not a sequence classifier"),
        ({"id2label": {"0": "a", "1": "b"}}, "tells 2 labels apart"),
        (None, "holds no config.json"),
    ],
)
def test_other_folders_are_refused(classifier, tmp_path, changes, words):
    if changes is not None:
        (tmp_path / "config.json").write_text(json.dumps(json.loads((classifier / "config.json").read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        check_folder(str(tmp_path))
