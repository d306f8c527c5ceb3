"""Other names under which users have a key, section by section: {section: {their name: the schema's name}}."""

from __future__ import annotations

SPELLINGS: dict[str, dict[str, str]] = {
    "megatron_training": {"use_deter_comp": "npu_deterministic"},
    "rl_config": {"update_max_packing_token_size": "max_packing_token_size"},
}
