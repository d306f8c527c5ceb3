"""What a user may pass to mm-convert."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

# typing's spelling: the command line is built from these annotations, also on Python 3.10.
Layers = Optional[Union[list[list[int]], list[int]]]  # noqa: UP007, UP045


@dataclass
class HfConfig:
    """The Hugging Face side."""

    hf_dir: str
    """Hugging Face folder: config.json, tokenizer, processor; for hf_to_mm also *.safetensors."""


@dataclass
class ParallelConfig:
    """How the megatron side is split. Of a folder that is read all of it is seen in the files; what is passed is compared."""

    llm_pp_layers: Layers = None
    """Text layers per pipeline stage, [14, 14], or of each virtual stage, [[7, 7], [7, 7]]; left out: all in the first stage."""
    vit_pp_layers: Layers = None
    """Vision layers per pipeline stage, [32, 0]; left out: all in the first stage."""
    audio_pp_layers: Layers = None
    tp_size: int = 1
    vit_tp_size: int = 0
    """0 = as tp_size."""
    audio_tp_size: int = 0
    ep_size: int = 1


@dataclass
class CommonModelConfig:
    """Switches of the reference converter; the numbers are read from config.json and compared when they are passed."""

    enable_canonical_hf_struct: bool = False
    """q, k, v and gate, up stand alone, as at Hugging Face (for LoRA)."""
    new_transformers_weight_key: bool = False
    """mm_to_hf: write the names of transformers 5 (model.language_model.*, model.visual.*). Both are read."""
    num_experts: int = 0
    num_key_value_heads: int = 0
    llm_num_layers: int = 0
    vit_num_layers: int = 0
    audio_num_layers: int = 0
    tie_word_embeddings: bool = False
    llm_hf_dir: str = ""
    model_prefix: str = ""
    """Of LoRA weights; nothing else has one."""


@dataclass
class FormatOptions:
    """How weights are named and joined in the files of the ranks."""

    style: Literal["mm", "mcore"] = "mm"
    """mm: MindSpeed-MM. mcore: MindSpeed-LLM and megatron-core, without text_decoder. in front."""
    vit_qkv: Literal["per_head", "concatenated"] = "per_head"
    """per_head: the rows of the vision linear_qkv are grouped by head, as megatron reads them. concatenated: [Q | K | V], which
    branch 2.3.0 of MindSpeed-MM wrote; it can't be seen in the files, so say it when you read one of those."""
    expert_names: Literal["local", "grouped", "te_grouped"] = "local"
    """local: experts.local_experts.N. grouped: experts.weight1 and weight2 (--moe-grouped-gemm). te_grouped: Transformer Engine's,
    with its norms inside the linear layers."""
    moe_tp_extend_ep: Optional[bool] = None  # noqa: UP045
    """Experts are dealt to the tensor ranks too, instead of cut by them; left out: cut. --moe-tp-extend-ep for short. With several tensor
    ranks and grouped experts it can't be seen in the files, so say it when you read those."""
    make_vocab_size_divisible_by: int = 0
    """mcore: the vocabulary is padded to a multiple of this x tp_size, with copies of its last row; 0: not padded."""


@dataclass
class HfToMmOptions:
    """Hugging Face folder -> files of the ranks."""

    mm_dir: str
    """Folder to write; must not exist or be empty."""
    hf_config: HfConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    format: FormatOptions = field(default_factory=FormatOptions)
    orm: bool = False
    """The model is a critic or a reward model: score.weight [1, hidden] becomes the output layer. --orm for short; needs no setting where
    config.json names a ForSequenceClassification class."""
    orm_head: Literal["score", "first_logit"] = "score"
    """Where the score of a critic or reward model comes from. first_logit: the first row of lm_head.weight, as in Nemotron reward models,
    whose reward is the first logit of the next token; a language model's first row means nothing of the kind."""
    save_vit_only: bool = False
    """Only the vision encoder and its projector."""
    training_yaml: str = ""
    """The YAML of the training that will load it: its parallel sizes are compared."""
    workers: int = 2
    """Files written at a time."""
    trust_remote_code: bool = False
    """Needs no setting: no code of the model folder is ever run."""


@dataclass
class HfToDcpOptions:
    """Hugging Face folder -> torch_dist folder."""

    mm_dir: str
    """Folder to write; must not exist or be empty."""
    hf_config: HfConfig
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    orm: bool = False
    trust_remote_code: bool = False
    """Needs no setting: no code of the model folder is ever run."""


@dataclass
class MmToHfOptions:
    """Files of the ranks, or a training save -> Hugging Face folder."""

    save_hf_dir: str
    """Folder to write; must not exist or be empty."""
    mm_dir: str
    """Output of hf_to_mm, a folder of megatron or MindSpeed-LLM, or a training save (its text file picks the iteration)."""
    hf_config: HfConfig
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    format: FormatOptions = field(default_factory=FormatOptions)
    orm: bool = False
    """Write a sequence classification model: of a training save its critic, of the files of the ranks what hf_to_mm --orm wrote."""
    workers: int = 2
    """Files written at a time."""
    trust_remote_code: bool = False
    """Needs no setting: no code of the model folder is ever run."""


@dataclass
class ResplitOptions:
    """Files of the ranks -> files of other ranks."""

    source_dir: str
    """Folder to read."""
    target_dir: str
    """Folder to write; must not exist or be empty."""
    target_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    source_parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    hf_config: Optional[HfConfig] = None  # noqa: UP045
    """Where config.json is; without it the sizes of a Qwen2.5-VL are read from the weights, with heads of 128."""
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    source_format: FormatOptions = field(default_factory=FormatOptions)
    """Only vit_qkv and moe_tp_extend_ep are asked: the rest is seen in the files."""
    target_format: FormatOptions = field(default_factory=FormatOptions)
    orm: bool = False
    workers: int = 2
    """Files written at a time."""


@dataclass
class InspectOptions:
    """Files, names, shapes and types of a folder of weights."""

    path: str
    """Any folder of weights, or one file of it."""


@dataclass
class VerifyOptions:
    """Two folders of weights, tensor by tensor."""

    first: str
    second: str
    hf_config: Optional[HfConfig] = None  # noqa: UP045
    """Where config.json is; needed when neither folder has one."""
    first_format: FormatOptions = field(default_factory=FormatOptions)
    second_format: FormatOptions = field(default_factory=FormatOptions)
    orm: bool = False
