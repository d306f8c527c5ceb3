"""MindSpeed-RL: memory for pictures given back before vLLM generates."""

from __future__ import annotations

import re

from patches.trees.edits import Edit, Kind, Read, Release, Replacement

EXPECTED = "MindSpeed-RL d9212e12aec839af47f007b971a3e1454519c458 (GRPO and DAPO, text and VL), or the branch 2.2.0 or 2.3.0"


def identify(read: Read) -> Release:
    pictures = read("trainer/utils/mm_transfer_dock.py")
    if not pictures:
        return Release("2.0.0 or older, text only", "0.8", refusal="it is for core 0.8 and has no multimodal workers")
    if re.search(r"def get_experience\(\s*self,\s*consumer\b", pictures):
        refusal = "its multimodal dock asks for a consumer that its own rule reward does not pass, so rewards of VL models fail"
        return Release("newer than 2.3.0", refusal=refusal)
    if not read("trainer/dapo_trainer_hybrid.py"):
        return Release("2.1.0, GRPO only", "0.8")
    if "def get_experience_dict" not in pictures:
        return Release("before d9212e1 (as 85d1477), VL: GRPO only")
    if read("workers/reference_woker.py"):
        return Release("as d9212e1")
    return Release("2.2.0 or 2.3.0")


MEMORY = Edit(
    path="workers/actor_hybrid_worker.py",
    title="empty_cache before vLLM generates",
    reason="Pixel values of the last batch stay in the allocator's cache; vLLM sizes its buffers by free memory and runs out of it.",
    contained="gc.collect()",
    replacements=(
        Replacement(
            "            if batch_data and index:\n                if self.rl_config.async_engine:\n",
            "            if is_multimodal():\n"
            "                gc.collect()\n"
            "                torch.cuda.empty_cache()\n"
            "\n"
            "            if batch_data and index:\n                if self.rl_config.async_engine:\n",
        ),
    ),
)

MINDSPEED_RL = Kind("MindSpeed-RL", "mindspeed_rl", "workers/actor_hybrid_worker.py", identify, EXPECTED, (MEMORY,))
