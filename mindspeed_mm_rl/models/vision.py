"""Qwen2.5-VL's vision encoder and projector out of megatron's parallel layers (arXiv:2502.13923, section 2.1).

Patches are put in window order once, so that every window is a run of the pack; layers attend within windows or within frames;
the projector merges 2 x 2 patches into one image token; the order is undone last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from mindspeed_mm_rl.models.attention import LayoutParams, PackedLayout, self_attention_spec, transformer_layer_spec
from mindspeed_mm_rl.models.families import VisionArchitecture
from mindspeed_mm_rl.models.gpt import ModelOptions, transformer_config
from mindspeed_mm_rl.models.mlp import mlp_spec
from mindspeed_mm_rl.models.norm import RMSNorm
from mindspeed_mm_rl.models.rope import vision_rotary
from mindspeed_mm_rl.platforms import device
from mindspeed_mm_rl.types import GridTHW

NORM_EPS = 1e-6


@dataclass(frozen=True)
class VisionLayout:
    order: torch.Tensor
    """int64 [image tokens]: which merged patch stands where in window order."""
    inverse: torch.Tensor
    windows: PackedLayout
    frames: PackedLayout


@lru_cache(maxsize=64)
def vision_layout(grids: tuple[GridTHW, ...], vision: VisionArchitecture, target: torch.device) -> VisionLayout:
    """Window order and attention layouts of the patches of pictures one behind the other; cached, as few sizes come back often."""
    merge = vision.merge_size
    windows_of = [_windows(grid, merge, vision.window_size // merge // vision.patch_size) for grid in grids]
    order, base = [], 0
    for windows, (time, height, width) in zip(windows_of, grids, strict=True):
        order += [window + base for window in windows]
        base += time * height * width // merge**2
    order_of_tokens = torch.cat(order)
    positions = torch.cat([_patch_positions(grid, merge) for grid in grids], dim=1)
    positions = positions.view(2, -1, merge**2)[:, order_of_tokens].flatten(1)
    cos, sin = (tensor.to(target) for tensor in vision_rotary(positions, vision))
    return VisionLayout(
        order=order_of_tokens.to(target),
        inverse=order_of_tokens.argsort().to(target),
        windows=PackedLayout.of([len(window) * merge**2 for window in order], cos, sin, causal=False),
        frames=PackedLayout.of([height * width for time, height, width in grids for _ in range(time)], cos, sin, causal=False),
    )


def _windows(grid: GridTHW, merge: int, side: int) -> list[torch.Tensor]:
    """Merged patches of each window, `side` by `side` but at the right and lower edges, row by row, frame by frame."""
    time, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    index = torch.arange(time * rows * columns).view(time, rows, columns)
    return [
        index[frame, top : top + side, left : left + side].flatten()
        for frame in range(time)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]


def _patch_positions(grid: GridTHW, merge: int) -> torch.Tensor:
    """(height, width) of each patch, int64 [2, P]; the patches of one merged patch stand side by side."""
    time, height, width = grid
    positions = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    blocks = positions.view(2, height // merge, merge, width // merge, merge).transpose(2, 3).reshape(2, -1)
    return blocks.repeat(1, time)


class PatchEmbed(torch.nn.Module):
    """A patch is as large as the convolution's stride, so the convolution is one matrix product over flattened patches."""

    def __init__(self, vision: VisionArchitecture, config: TransformerConfig) -> None:
        super().__init__()
        size = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.proj = torch.nn.Conv3d(
            vision.in_channels,
            vision.hidden_size,
            kernel_size=size,
            stride=size,
            bias=False,
            dtype=config.params_dtype,
            device=device.current(),
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[P, channels * time * side * side] -> [P, hidden]"""
        return F.linear(pixel_values.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class VisionEncoder(MegatronModule):
    def __init__(self, vision: VisionArchitecture, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.patch_embed = PatchEmbed(vision, config)
        names = ["frames" if layer in vision.full_attention_layers else "windows" for layer in range(vision.num_layers)]
        layers = [transformer_layer_spec(self_attention_spec(name), mlp_spec()) for name in names]
        submodules = TransformerBlockSubmodules(layer_specs=layers, layer_norm=None)
        self.blocks = TransformerBlock(config=config, spec=submodules, post_layer_norm=False)

    def forward(self, pixel_values: torch.Tensor, layout: VisionLayout, merge_size: int) -> torch.Tensor:
        """[P, patch values] -> [P, hidden], in window order."""
        patches = self.patch_embed(pixel_values)
        patches = patches.view(-1, merge_size**2, patches.shape[-1])[layout.order].flatten(0, 1)
        params = LayoutParams.of({"windows": layout.windows, "frames": layout.frames})
        return self.blocks(hidden_states=patches[:, None], attention_mask=None, packed_seq_params=params)[:, 0]


class ProjectorMLP(MegatronModule):
    def __init__(self, vision: VisionArchitecture, config: TransformerConfig) -> None:
        super().__init__(config=config)
        merged = vision.hidden_size * vision.merge_size**2
        shared = {"config": config, "init_method": config.init_method, "bias": True, "skip_bias_add": False}
        self.linear_fc1 = ColumnParallelLinear(merged, merged, gather_output=False, **shared)
        self.linear_fc2 = RowParallelLinear(merged, vision.out_hidden_size, input_is_parallel=True, **shared)

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(merged)[0]))[0]


class Projector(MegatronModule):
    def __init__(self, vision: VisionArchitecture, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.merged = vision.hidden_size * vision.merge_size**2
        self.layernorm = RMSNorm(config, vision.hidden_size, NORM_EPS)
        self.encoder = ProjectorMLP(vision, config)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[P, vision hidden] -> [P / merge_size ** 2, text hidden]"""
        return self.encoder(self.layernorm(patches).view(-1, 1, self.merged))[:, 0]


class ImageEncoder(MegatronModule):
    """Pixels to image tokens; `encoder` and `projector` can be frozen apart."""

    def __init__(self, vision: VisionArchitecture, options: ModelOptions, freeze_vision: bool, freeze_projector: bool) -> None:
        config = vision_config(vision, options)
        super().__init__(config=config)
        self.vision = vision
        self.encoder = VisionEncoder(vision, config)
        self.projector = Projector(vision, config)
        self.encoder.requires_grad_(not freeze_vision)
        self.projector.requires_grad_(not freeze_projector)

    def forward(self, pixel_values: torch.Tensor, grids: Sequence[GridTHW]) -> torch.Tensor:
        """[P, patch values] -> [P / merge_size ** 2, text hidden], in the order of the patches.

        Raises ValueError when the number or the size of the patches doesn't fit.
        """
        expected = (sum(time * height * width for time, height, width in grids), self.vision.patch_values)
        if tuple(pixel_values.shape) != expected:
            raise ValueError(f"pixel_values of grids {list(grids)} must have shape {expected}, got {tuple(pixel_values.shape)}")
        layout = vision_layout(tuple(tuple(grid) for grid in grids), self.vision, pixel_values.device)
        trained = bool(self._trained())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            patches = self.encoder(pixel_values, layout, self.vision.merge_size)
            return self.projector(patches)[layout.inverse]

    def no_features(self) -> torch.Tensor | None:
        """[0, text hidden] that depends on every trained parameter; None where none is trained.

        Megatron's overlap_grad_reduce waits for a gradient of each of them from every micro-batch, also from one without pictures.
        """
        trained = self._trained()
        if not trained:
            return None
        nothing = torch.stack([parameter.flatten()[:0].sum() for parameter in trained]).sum()
        return nothing.expand(0, self.vision.out_hidden_size)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def vision_config(vision: VisionArchitecture, options: ModelOptions) -> TransformerConfig:
    return transformer_config(
        options,
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        kv_channels=vision.hidden_size // vision.num_heads,
        layernorm_epsilon=NORM_EPS,
        add_bias_linear=True,
    )
