"""Stage A: the vision tower learns what every patch shows, and its CLS token what the whole scene shows."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .model import WIDTH, pixels
from .scenes import COLOURS, GRID, PATCH, SIZE, Scenes, generate

INK, TRACE = (
    0.08,
    0.02,
)  # a patch with more ink than INK shows the digit, with less than TRACE shows none, between is not scored
NONE, IGNORE = 10, -100
CROWDED = dict(
    digits=(10, 17), clutter=(3, 6), distinct=False
)  # many lessons per image, for the first part of the stage
NATURAL = dict(digits=(1, 6), clutter=(8, 14), distinct=False)
NEIGHBOURS = [
    [(0, 1), (0, -1), (1, 0), (-1, 0)],
    [(1, 1), (1, -1), (-1, 1), (-1, -1)],
    [(0, 2), (0, -2), (2, 0), (-2, 0)],
]


class VisionTask(nn.Module):
    """The tower with the heads of stage A.

    Per patch: digit or none, colour, centre of a digit. Per scene: which digits, and in which corners.
    """

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower
        self.patch_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11 + len(COLOURS) + 1))
        self.scene_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 50))  # at the layer that LLaVA reads
        self.final_head = nn.Linear(WIDTH, 50)  # the same task at the pooled output, as CLIP's own

    def forward(self, scenes: Scenes) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss and running figures for one batch."""
        output = self.tower(pixels(scenes.images), output_hidden_states=True)
        features = output.hidden_states[-2]
        patch = self.patch_head(features[:, 1:]).float().flatten(0, 1)
        scene = self.scene_head(features[:, 0]).float()
        final = self.final_head(output.pooler_output).float()

        digit, colour, centre, present = targets(scenes)
        on = (digit >= 0) & (digit < NONE)
        per_patch = F.cross_entropy(patch[:, :11], digit, reduction="none", ignore_index=IGNORE)
        tint = F.cross_entropy(patch[on, 11:-1], colour[on])
        middle = F.binary_cross_entropy_with_logits(patch[:, -1], centre, pos_weight=torch.tensor(5.0))
        whole = F.binary_cross_entropy_with_logits(scene, present) + 0.3 * F.binary_cross_entropy_with_logits(
            final, present
        )
        loss = per_patch[on].mean() + per_patch[digit == NONE].mean() + 0.5 * tint + 2 * middle + 4 * whole
        right = patch[:, :11].argmax(-1) == digit
        seen = ((scene > 0) == (present > 0))[:, :10]
        return loss, {
            "digit patches": right[on].float().mean().item(),
            "other patches": right[digit == NONE].float().mean().item(),
            "scene": seen.float().mean().item(),
        }


def targets(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per patch [B*N]: digit (or NONE, IGNORE), colour, is-centre. Per scene [B, 50]: digits present, and by corner."""
    count, used = len(scenes.images), scenes.digits >= 0
    ink, slot = torch.from_numpy(scenes.coverage).max(-1)
    digit = torch.from_numpy(scenes.digits).gather(1, slot)
    digit = torch.where(ink >= INK, digit, torch.where(ink <= TRACE, NONE, IGNORE))
    colour = torch.from_numpy(scenes.colours).gather(1, slot)
    x, y = np.moveaxis(scenes.centres, -1, 0)
    row = np.nonzero(used)[0]
    centre = np.zeros((count, GRID * GRID), np.float32)
    centre[row, ((y // PATCH) * GRID + x // PATCH).astype(int)[used]] = 1
    corner = (2 * (y > SIZE / 2) + (x > SIZE / 2))[used]
    present = np.zeros((count, 50), np.float32)
    present[row, scenes.digits[used]] = 1
    present[row, 10 + 10 * corner + scenes.digits[used]] = 1
    return digit.flatten(), colour.flatten(), torch.from_numpy(centre).flatten(), torch.from_numpy(present)


def batch(seed: int, step: int, size: int, crowded: bool) -> Scenes:
    """The training scenes of one step."""
    return generate("train", size, (seed, 1, step), **(CROWDED if crowded else NATURAL))


def initialise(tower: nn.Module) -> None:
    """Start as a convolution would: sine positions, and the heads of the first three layers look at fixed neighbours.

    Later layers start with query = key, so that a token first looks at tokens like itself. Only the start is unusual.
    """
    with torch.no_grad():
        position = tower.embeddings.position_embedding.weight
        position.zero_()[1:] = sine_positions(GRID)
        anchor = tower.embeddings.class_embedding.normal_()
        anchor -= anchor.mean()
        plain = torch.eye(WIDTH) - torch.outer(anchor, anchor) / anchor.square().sum()  # CLS is nobody's neighbour
        nn.init.normal_(tower.embeddings.patch_embedding.weight, std=0.06)
        for layer in tower.encoder.layers:
            layer.self_attn.q_proj.weight.copy_(layer.self_attn.k_proj.weight)
        for layer, offsets in zip(tower.encoder.layers, NEIGHBOURS, strict=False):
            heads = len(offsets)
            select = torch.cat(
                [2 * plain[head::heads] for head in range(heads)]
            )  # each head takes every fourth channel
            turned = torch.cat([2 * (rotation(*offset) @ plain)[head::heads] for head, offset in enumerate(offsets)])
            layer.self_attn.k_proj.weight.copy_(select)
            layer.self_attn.q_proj.weight.copy_(turned)


def frequencies() -> torch.Tensor:
    """Angular frequencies of the position code in radians per patch, [WIDTH / 4]."""
    return torch.pi / GRID * 2 ** torch.linspace(0, 4, WIDTH // 4)


def sine_positions(side: int) -> torch.Tensor:
    """Sines and cosines of the row, then of the column: [side * side, WIDTH]."""
    angle = torch.outer(torch.arange(side) + 0.5, frequencies())
    code = torch.cat([angle.sin(), angle.cos()], 1)  # [side, WIDTH / 2]
    return torch.cat([code[:, None].expand(-1, side, -1), code[None].expand(side, -1, -1)], 2).reshape(
        side * side, WIDTH
    )


def rotation(rows: float, columns: float) -> torch.Tensor:
    """The matrix [WIDTH, WIDTH] that turns the code of one position into the code of the position that far away."""
    blocks = []
    for offset in (rows, columns):
        cos, sin = (torch.diag(g(frequencies() * offset)) for g in (torch.cos, torch.sin))
        blocks.append(torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)]))
    return torch.block_diag(*blocks)
