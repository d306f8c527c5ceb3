"""Megatron-LM: recomputed layers see the sequence boundaries of their own batch."""

from __future__ import annotations

import re

from patches.trees.edits import CORE, Edit, Kind, Read, Release, Replacement

VERSIONS = ("0.12.0", "0.12.1", "0.12.2", "0.12.3")
EXPECTED = "Megatron-LM core 0.12.0 to 0.12.3 (git checkout core_v0.12.1)"


def identify(read: Read) -> Release:
    numbers = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", read("package_info.py"), re.MULTILINE))
    if len(numbers) < 3:
        return Release("unknown", core="", refusal="package_info.py does not say the version")
    version = "{MAJOR}.{MINOR}.{PATCH}".format(**numbers)
    core = "{MAJOR}.{MINOR}".format(**numbers)
    if version in VERSIONS:
        return Release(f"core {version}")
    return Release(f"core {version}", core, refusal=f"the edits are for core {CORE}")


BOUNDARIES = '''@contextlib.contextmanager
def _sequence_boundaries(actual_seq_len):
    """Run with the packed sequences' boundaries that the first forward pass had."""
    from mindspeed.utils import get_actual_seq_len, set_actual_seq_len

    current = get_actual_seq_len()
    set_actual_seq_len(actual_seq_len)
    try:
        yield
    finally:
        set_actual_seq_len(current)


'''

RECOMPUTE = Edit(
    path="tensor_parallel/random.py",
    title="recompute restores actual_seq_len",
    reason="MindSpeed keeps the boundaries of packed sequences in one global. When a layer is recomputed in the backward pass, another "
    "micro-batch may have set it: attention would mix sequences. They are saved with the batch, set for the recomputation, and put back.",
    contained="actual_seq_len",
    replacements=(
        Replacement(
            "class CheckpointFunction(torch.autograd.Function):\n", f"{BOUNDARIES}class CheckpointFunction(torch.autograd.Function):\n"
        ),
        Replacement(
            "        ctx.rng_states = _get_all_rng_states()\n",
            "        ctx.rng_states = _get_all_rng_states()\n"
            "        from mindspeed.utils import get_actual_seq_len\n"
            "\n"
            "        ctx.actual_seq_len = get_actual_seq_len()\n",
        ),
        Replacement(
            "            with torch.enable_grad():\n                outputs = ctx.run_function(*detached_inputs)\n",
            "            with torch.enable_grad(), _sequence_boundaries(ctx.actual_seq_len):\n"
            "                outputs = ctx.run_function(*detached_inputs)\n",
        ),
    ),
)

MEGATRON = Kind("Megatron-LM", "megatron/core", "package_info.py", identify, EXPECTED, (RECOMPUTE,))
