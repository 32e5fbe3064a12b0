"""A vision tower: what a family adds to the shared encoder blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.encoder import EncoderPass, LayerParts, PrunedEncoder, PrunedEncoderLayer, SkippedEncoderLayer
from ..ops import gather_tokens
from ..policies.base import Pixels, Policy
from ._bound import Bound, Replacement


@dataclass(frozen=True)
class Tower:
    """The facts of a family of bare vision towers (``model.encoder`` with a list of pre-norm layers)."""

    model_class: type[nn.Module]
    protect: int  # leading tokens that are not patches
    feature_layer: int  # hidden_states index that is read by default
    parts: Callable[[nn.Module], LayerParts]
    pixel_mean: Sequence[float]  # of the usual image processor, on a scale of 0..1
    pixel_std: Sequence[float]
    layers: str = "layers"  # the list's name
    hands_on: bool = True  # keyword arguments of its forward to the encoder

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        """A bare tower: all layers run, hidden states after the cuts hold fewer tokens."""
        patches = self.patches(model)
        elsewhere = policy.prunes_features or policy.encoder_budget(patches) != policy.budget(patches)
        if compact_cache or elsewhere:
            raise ValueError(
                f"compact_cache={compact_cache} with {policy}: {type(model).__name__} has no projector and no language "
                "model; patch the whole model, or prune in the encoder alone without compact_cache"
            )
        index = getattr(policy, "feature_layer", None)
        index = self.feature_layer if index is None else index
        return self.build(model, policy, index, runs_rest=True, record=record, backend=backend)

    def build(
        self,
        model: Any,
        policy: Policy,
        index: int | Sequence[int],
        *,
        runs_rest: bool,
        record: bool,
        backend: str | None,
        side: int = 1,
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        """Replacements that prune before the layer whose output is ``hidden_states[index]``.

        Of several indices, before the last of these layers; the other hidden states then hold the same tokens. Where
        the model merges squares of side x side patches, what a pruned tower puts out is an image of these for every
        token, one after another: pixel shuffle then sees each token's own patches.
        """
        layers = getattr(model.encoder, self.layers)
        states = len(layers) + 1
        several = () if isinstance(index, int) else tuple(i if i >= 0 else states + i for i in index)
        index = index if isinstance(index, int) else max(several)
        feature_layer = (index if index >= 0 else states + index) - 1
        if not 1 <= feature_layer < len(layers):
            raise ValueError(
                f"feature_layer={index} of {len(layers)} layers leaves no layer to prune before it: use "
                f"2..{states - 1} or {2 - states}..-1"
            )
        if not self.protect:
            check_anchor(policy, model)
        if len(several) > 1 and policy.merges_features:
            raise ValueError(
                f"{type(policy).__name__} merges tokens of one layer's output, but of {type(model).__name__} the "
                f"layers {several} are read: use another policy, such as FlowCut"
            )
        check_squares(policy, model, side)
        policy.check_encoder(feature_layer, self.patches(model) // side**2)
        encoder = PrunedEncoder(
            model.encoder, layers, policy, self.protect, feature_layer, record=record, backend=backend
        )
        replacements: list[Replacement] = [(model.encoder, "forward", encoder)]
        align = tuple(i for i in several if i <= feature_layer)
        if policy.wants_pixels or align or side > 1 or not self.hands_on:
            replacements.append((model, "forward", _WatchedTower(model, self, encoder, align)))
        for i, layer in enumerate(layers):
            skip = i > feature_layer and not runs_rest
            forward = SkippedEncoderLayer() if skip else PrunedEncoderLayer(layer, self.parts, i)
            replacements.append((layer, "forward", forward))
        return encoder, replacements

    def patches(self, model: Any) -> int:
        """Patches per image at the configured size."""
        return (edge(model.config.image_size) // edge(model.config.patch_size)) ** 2


def check_anchor(policy: Policy, model: Any) -> None:
    """ValueError where a policy asks for a class token, which `model` lacks."""
    name = type(model).__name__
    if getattr(policy, "anchor", None) == "cls":
        raise ValueError(f"anchor='cls' but {name} has no class token: use anchor='auto' or 'mean'")
    if policy.needs_class_token:
        raise ValueError(
            f"{type(policy).__name__} asks for a class token, which {name} lacks: use another policy, such as FlowCut"
        )


def check_squares(policy: Policy, model: Any, side: int) -> None:
    """ValueError where a policy cannot keep squares of side x side patches, which are merged later."""
    if side > 1 and not policy.keeps_blocks:
        raise ValueError(
            f"{type(policy).__name__} keeps single patches, but {type(model).__name__} is read in squares of "
            f"{side} x {side} patches, which are merged: use another policy, such as FlowCut"
        )


def edge(size: int | Sequence[int]) -> int:
    """The edge of a square, which some configurations give as height and width.

    Raises:
        ValueError: two different numbers.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"{height} x {width} in the vision tower's configuration: only squares are supported")
    return height


class _WatchedTower(Bound):
    """Replacement ``forward`` of a tower whose policy looks at the pixels, that is read at several layers, whose
    patches are merged later, or that stands between its encoder and what is asked of it."""

    method = "forward"

    def __init__(self, model: Any, tower: Tower, encoder: PrunedEncoder, align: tuple[int, ...]) -> None:
        super().__init__(model)
        self.tower, self.encoder, self.align = tower, encoder, align
        self.names = tuple(self.__signature__.parameters)  # here, as a compiler cannot trace how they are found out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = kwargs | dict(zip(self.names[: len(args)], args, strict=True))
        tower, encoder = self.tower, self.encoder
        known = arguments.pop("encoder_pass", None) or EncoderPass()
        known.align = self.align
        if known.masked is None and arguments.get("patch_attention_mask") is None:
            known.masked = False
        if encoder.policy.wants_pixels:
            size = edge(self.model.config.patch_size)
            known.pixels = Pixels(arguments["pixel_values"], tower.pixel_mean, tower.pixel_std, size)
        as_tuple = arguments.get("return_dict") is False
        if tower.hands_on:
            arguments["encoder_pass"] = known
        encoder.asked = None if tower.hands_on else known
        try:
            output = self.original(**arguments | dict(return_dict=True))
        finally:
            encoder.asked = None
        states = output.get("hidden_states")
        if states is not None and known.rows:
            output.hidden_states = states = tuple(
                x if i not in known.rows or x is None else gather_tokens([x], known.rows[i], backend=encoder.backend)[0]
                for i, x in enumerate(states)
            )
        if known.side > 1 and known.left is not None:
            last = output.last_hidden_state
            output.last_hidden_state = squares = _squares(last, tower.protect, known.side)
            if states is not None:
                before, read = states[: encoder.feature_layer + 1], states[encoder.feature_layer + 1 :]
                read = (
                    x if x is None else squares if x is last else _squares(x, tower.protect, known.side) for x in read
                )
                output.hidden_states = (*before, *read)
        return output.to_tuple() if as_tuple else output


def _squares(x: Tensor, protect: int, side: int) -> Tensor:
    """Rows [B, protect + n * side^2, C], token by token, as one image for each: [B * n, protect + side^2, C]."""
    if not protect:
        return x.reshape(-1, side**2, x.shape[2])
    tokens = x[:, protect:].unflatten(1, (-1, side**2))
    lead = x[:, None, :protect].expand(-1, tokens.shape[1], -1, -1)
    return torch.cat([lead, tokens], 2).flatten(0, 1)
