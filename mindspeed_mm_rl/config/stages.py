"""`megatron_training.stage`: the algorithms that it names, and the values that their papers use where the user gives none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mindspeed_mm_rl.config.schema import Config


@dataclass(frozen=True)
class Stage:
    """What the configuration needs to know of an algorithm."""

    algorithm: str
    """Its name among the recipes and in metric names."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """rl_config keys that have another default here."""
    source: str = ""
    """Of these defaults."""
    decides: tuple[str, ...] = ()
    """rl_config keys that have no say here."""
    compares_samples: bool = True
    """True: the advantage of a sample depends on the others of its prompt, so there must be others."""
    has_critic: bool = False
    on_pairs: bool = False
    """True: trains on pairs of responses that are given, not on prompts."""


_NO_KL = {"init_kl_coef": 0.0}
_KL_OF_REWARD = {"kl_penalty": "kl"}
_LOSS_MEAN, _KL_PLACE = ("token_level_loss",), ("use_kl_in_reward",)

STAGES: dict[str, Stage] = {
    "ray_grpo": Stage("grpo"),
    "ray_dapo": Stage("dapo"),
    "ray_ppo": Stage("ppo", _NO_KL, "arXiv 1707.06347", compares_samples=False, has_critic=True),
    "ray_dr_grpo": Stage("dr_grpo", _NO_KL, "arXiv 2503.20783", _LOSS_MEAN),
    "ray_rloo": Stage("rloo", _KL_OF_REWARD, "arXiv 2402.14740", _KL_PLACE),
    "ray_reinforce_plus_plus": Stage("reinforce_plus_plus", _KL_OF_REWARD, "arXiv 2501.03262", _KL_PLACE, compares_samples=False),
    "ray_reinforce_plus_plus_baseline": Stage("reinforce_plus_plus_baseline", {"kl_penalty": "mse"}, "arXiv 2501.03262"),
    "ray_gspo": Stage(
        "gspo",
        _NO_KL | {"clip_higher_enable": True, "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
        "arXiv 2507.18071, section 5.1",
        _LOSS_MEAN,
    ),
    # The weight is capped from above alone; of the cap, the algorithm's own paper gives no number.
    "ray_cispo": Stage(
        "cispo",
        _NO_KL | {"clip_higher_enable": True, "clip_ratio_low": 1.0, "clip_ratio_high": 4.0},
        "arXiv 2506.13585; cap 5 of arXiv 2510.13786",
    ),
    "dpo": Stage("dpo", compares_samples=False, on_pairs=True),
}

_CLIP = frozenset({"clip_ratio", "clip_higher_enable", "clip_ratio_low", "clip_ratio_high"})


def has_critic(stage: str | None) -> bool:
    return stage in STAGES and STAGES[stage].has_critic


def on_pairs(stage: str | None) -> bool:
    return stage in STAGES and STAGES[stage].on_pairs


def with_stage_defaults(config: Config) -> Config:
    """The stage's defaults for the keys that the user left alone, told in a note; clip bounds are taken together or not at all."""
    name, given = config.actor_config.stage or "", config.rl_config.model_fields_set
    if name not in STAGES:
        return config
    stage, taken = STAGES[name], given | (_CLIP if given & _CLIP else set())
    values = {key: value for key, value in stage.defaults.items() if key not in taken}
    told = ", ".join(f"{key}: {value}" for key, value in values.items())
    notes = [f"rl_config: {told} (defaults of {name}, {stage.source})"] if values else []
    notes += [f"rl_config: {key} isn't used: {name} decides it ({stage.source})" for key in stage.decides if key in given]
    return config.model_copy(update={"rl_config": config.rl_config.model_copy(update=values), "notes": (*config.notes, *notes)})
