"""Small trees with the anchors of every edit, made from the definitions, and what a test asks of a tree."""

from __future__ import annotations

import hashlib
from pathlib import Path

from patches.trees.edits import Edit
from patches.trees.finding import KINDS
from patches.trees.megatron import RECOMPUTE
from patches.trees.mindspeed import CONTEXT_PARALLEL, PLAIN, TOKENIZER
from patches.trees.mindspeed_rl import MEMORY

# What stands before each anchor and, last, after all of them: files that can be imported before and after.
AROUND = {
    RECOMPUTE: (
        "import contextlib\nimport torch\n\n\ndef _get_all_rng_states():\n    return torch.get_rng_state()\n\n\n",
        "    @staticmethod\n    def forward(ctx, run_function, *args):\n",
        "        ctx.run_function = run_function\n        ctx.save_for_backward(*args)\n        return run_function(*args)\n\n"
        "    @staticmethod\n    def backward(ctx, gradient):\n"
        "        detached_inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]\n"
        "        with torch.random.fork_rng():\n",
        "        outputs.backward(gradient)\n        return (None, *(x.grad for x in detached_inputs))\n",
    ),
    PLAIN: (
        "import torch_npu\nfrom einops import rearrange\n\n\n",
        "    self, query, key, value, packed_seq_params=None\n):\n    assert self, \\\n",
        "    return 'padded'\n",
    ),
    CONTEXT_PARALLEL: (
        "import torch_npu\nfrom einops import rearrange\n\n\n",
        "    def __init__(self, config, softmax_scale, cp_comm_type: str = None):\n"
        "        self.config, self.softmax_scale = config, softmax_scale\n\n"
        "    def forward(self, query, key, value, packed_seq_params=None, attention_bias=None):\n",
        "        return 'padded'\n",
    ),
    TOKENIZER: ("class MindSpeedFeature: ...\n\n\n", "    def register_patches(self, patch_manager, args):\n", "\n"),
    MEMORY: (
        "class Worker:\n    def generate_sequences(self):\n        while True:\n",
        "                    return 'async'\n",
    ),
}
OTHER_FILES = {
    "megatron/core/package_info.py": "MAJOR = 0\nMINOR = 12\nPATCH = 1\n",
    "mindspeed/megatron_adaptor.py": "",
    "mindspeed/args_utils.py": "ARGUMENTS = None\n",
    "mindspeed/utils.py": "boundaries = [None]\nget_actual_seq_len = lambda: boundaries[0]\n"
    "def set_actual_seq_len(ends):\n    boundaries[0] = ends\n",
    "mindspeed/tokenizer/build_tokenizer/adaptor.py": "def build_tokenizer_HF(args, **kwargs):\n    return 'from Hugging Face'\n",
    "mindspeed_rl/trainer/dapo_trainer_hybrid.py": "class Trainer: ...\n",
    "mindspeed_rl/trainer/utils/mm_transfer_dock.py": "def get_experience_dict(self): ...\n",
    "mindspeed_rl/workers/reference_woker.py": "class Worker: ...\n",
}


def source(edit: Edit) -> str:
    anchors = [*(replacement.anchor for replacement in edit.replacements), ""]
    return "".join(before + anchor for before, anchor in zip(AROUND[edit], anchors, strict=True))


def make_trees(folder: Path) -> Path:
    """One folder with the three packages, as users of MindSpeed-MM have them."""
    files = dict(OTHER_FILES)
    for kind in KINDS:
        files |= {f"{kind.package}/{edit.path}": source(edit) for edit in kind.edits}
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def edited_files(folder: Path) -> list[Path]:
    return [folder / kind.package / edit.path for kind in KINDS for edit in kind.edits]


def content_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder: sha256 and mode."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mode) for path in files}


def times_of(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
