"""Matrix-product FLOPs of a pruned vision encoder, from the number of tokens at each layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Tokens per layer that runs, class token included: `entering` see K and V, `leaving` everything else."""

    entering: tuple[int, ...]
    leaving: tuple[int, ...]

    @staticmethod
    def stock(layers: int, tokens: int) -> Schedule:
        return Schedule((tokens,) * layers, (tokens,) * layers)

    @staticmethod
    def cut(layers: int, tokens: int, kept_after: dict[int, int]) -> Schedule:
        """`kept_after`: layer -> tokens that its output holds, for the layers that prune."""
        entering, leaving, live = [], [], tokens
        for layer in range(layers):
            entering.append(live)
            live = kept_after.get(layer, live)
            leaving.append(live)
        return Schedule(tuple(entering), tuple(leaving))


def layer_flops(entering: int, leaving: int, hidden: int, intermediate: int) -> int:
    """FLOPs of one layer that N tokens enter and M leave.

    2 N D D for each of K and V - 2 M D D for each of Q and output projection - 2 M N D for each of the two attention
    products - 2 M D I for each of the two MLP products.
    """
    n, m, d, i = entering, leaving, hidden, intermediate
    return 4 * n * d * d + 4 * m * d * d + 4 * m * n * d + 4 * m * d * i


def encoder_flops(schedule: Schedule, hidden: int, intermediate: int, patches: int, patch_size: int) -> int:
    """FLOPs of the encoder for one image: patch embedding 2 P D (3 p p), then the layers. Scoring is not counted."""
    layers = sum(
        layer_flops(n, m, hidden, intermediate) for n, m in zip(schedule.entering, schedule.leaving, strict=True)
    )
    return 2 * patches * hidden * 3 * patch_size**2 + layers
