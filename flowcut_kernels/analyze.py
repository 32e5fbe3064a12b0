"""How information flows through a vision encoder: whether FlowCut's premise holds for a model and its images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._library import resolve_backend
from ._ops import Relevance, accumulate_dtype
from .calibrate import encode_images
from .models import ADAPTERS, family_of, is_patched
from .models._packed import PackedTower
from .models._tower import Tower
from .models.qwen_vl import QwenVL
from .modules.encoder import PrunedEncoder
from .modules.packed_encoder import Segments
from .ops import anchor_stats, received_attention
from .policies.base import is_number

_TOWERS = {adapter.model_class: adapter for adapter in ADAPTERS if isinstance(adapter, Tower)}


@dataclass(frozen=True, eq=False)
class Flow:
    """Information flow in an encoder of L layers, on B tiles of N patches in raster order (FlowCut, section 3).

    With A [i, j] the attention of token i to token j, mean over heads, softmax over all tokens: where token i has its
    information from, its inflow in the paper's terms, is row i, and where that of token j goes, its outflow, column j.
    The anchor, which the paper calls a relay, is the class token, or a mean token whose query is the mean of all.

    Floats are float32, float64 for a model in float64. ``str`` is the table of :meth:`rows`.
    """

    anchor: Literal["cls", "mean"]
    grid: tuple[int, int]  # rows and columns of a tile's patches; of Qwen-VL, images of one size are the tiles
    hub_threshold: float  # times the mean
    inflow: Tensor  # [L, B, N] the anchor's from each patch, A [anchor, n]: FlowCut's attention
    outflow: Tensor  # [L, B, N] of each patch, mean over all tokens i of A [i, n]: the attention it receives
    anchor_outflow: Tensor | None  # [L, B] the same of the class token; None: the mean token is nobody's key
    hubs: Tensor  # bool [L, B, N] patches whose outflow is above hub_threshold times the mean of the tile's patches
    entropy: Tensor  # [L, B] of the inflow, over ln N: 1 where the anchor looks at all patches alike
    value_norm: Tensor  # [L, B, N] L1 norm of the value vector over all heads

    def rows(self) -> list[dict[str, Any]]:
        """Of each layer, means over the tiles.

        ``entropy``; ``class_token``, its outflow, None without one; ``hubs``, their number; ``hub_share`` of the
        outflow of all patches; and rank correlations over the patches: ``relay``, inflow and outflow (1: the anchor
        looks where all tokens look, so that it speaks for them), ``criteria``, inflow and value norm (low: what one of
        them calls redundant the other does not), ``previous``, inflow here and a layer earlier, None in the first.
        """
        share = (self.outflow * self.hubs).sum(2) / self.outflow.sum(2)
        relay, criteria = _rank_correlation(self.inflow, self.outflow), _rank_correlation(self.inflow, self.value_norm)
        previous = _rank_correlation(self.inflow[1:], self.inflow[:-1])
        columns: dict[str, list[float | None]] = dict(
            entropy=_means(self.entropy),
            class_token=[None] * len(self.entropy) if self.anchor_outflow is None else _means(self.anchor_outflow),
            hubs=_means(self.hubs.sum(2).float()),
            hub_share=_means(share),
            relay=_means(relay),
            criteria=_means(criteria),
            previous=[None, *_means(previous)],
        )
        values = zip(*columns.values(), strict=True)
        return [dict(zip(("layer", *columns), (layer, *row), strict=True)) for layer, row in enumerate(values)]

    def __str__(self) -> str:
        lines = ["layer  entropy  class token  hubs  of outflow  relay  criteria  previous"]
        for row in self.rows():
            shown = {key: "-" if value is None else f"{value:.2f}" for key, value in row.items()}
            percent = {key: "-" if row[key] is None else f"{row[key]:.1%}" for key in ("class_token", "hub_share")}
            lines.append(
                f"{row['layer']:5}  {shown['entropy']:>7}  {percent['class_token']:>11}  {row['hubs']:4.1f}  "
                f"{percent['hub_share']:>10}  {shown['relay']:>5}  {shown['criteria']:>8}  {shown['previous']:>8}"
            )
        return "\n".join(lines)


@torch.no_grad()
def analyze(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    hub_threshold: float = 3.0,
    backend: str | None = None,
) -> Flow:
    """Inflow, outflow, hubs and entropy of every encoder layer, of all tokens, without an attention map.

    Hooks in front of the attention modules look at what these are given, for the time of the call, and project queries,
    keys and values once more. Memory beyond the model's own is linear in N; so is the model's, unless its attention is
    "eager". The same call gives the same bits.

    Args:
        model: an instance of one of :func:`supported_models`: not patched, in ``eval()``. Where Qwen2.5-VL attends
            within windows, outflow is within them too; its anchor is the mean token of the image in every layer.
        inputs: one batch of processor output, or pixel values; only images are looked at. Tiles of an image (views,
            crops) are looked at one by one, in the order in which the encoder gets them.
        hub_threshold: patches whose outflow is more than that many times the mean are hubs; at least 0.
        backend: see docs/install.md; None: ``FLOWCUT_BACKEND`` or "auto".

    Raises:
        TypeError: an unsupported model class, or inputs of another type.
        RuntimeError: a requested backend that cannot serve the model's device and dtype.
        ValueError: no images, a model that is patched or in training, masked images, packed ones of different sizes.
    """
    adapter = family_of(model)
    resolve_backend(backend)
    if not is_number(hub_threshold) or hub_threshold < 0:
        raise ValueError(f"analyze: hub_threshold={hub_threshold!r} must be a finite number, at least 0")
    if is_patched(model):
        raise ValueError("analyze: the model is patched, but all tokens are to be looked at: call unpatch(model) first")
    watched: list[_Watched] = [_Watched(module, backend) for module in model.modules() if type(module) in _TOWERS]
    if isinstance(adapter, QwenVL):
        watched = [_WatchedPacked(model.get_submodule("model.visual"), adapter.tower, backend)]
    if any(tower.module.training for tower in watched):
        raise ValueError("analyze: the model is in training mode, where dropout is at work: call model.eval() first")
    with ExitStack() as hooks:
        for tower in watched:
            for module, hook in tower.hooks():
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        encode_images(model, inputs, "analyze: inputs")
    return next(tower for tower in watched if tower.seen[0]).flow(float(hub_threshold))  # videos may have their own


class _Watched:
    """What the layers of a tower were seen doing."""

    def __init__(self, module: Any, backend: str | None) -> None:
        self.module, self.facts, self.backend = module, _TOWERS[type(module)], backend
        self.layers, self.protect = getattr(module.encoder, self.facts.layers), self.facts.protect
        self.seen: list[list[tuple[Tensor, ...]]] = [[] for _ in self.layers]  # of each pass

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        """Modules, and what is to be called in front of them."""
        for number, layer in enumerate(self.layers):
            yield self.facts.parts(layer).attention, partial(self.look, number)

    def look(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """In front of the attention of layer `number`."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if (args[1] if len(args) > 1 else kwargs.get("attention_mask")) is not None:
            raise ValueError(
                "analyze: some patches of these images are masked, and nothing flows from them or to them: give images "
                "that fill their tiles"
            )
        parts: Any = self.facts.parts(self.layers[number])
        projections = (parts.q_proj, parts.k_proj, parts.v_proj)
        query, key, value = (
            project(hidden).unflatten(-1, (-1, parts.attention.head_dim)).transpose(1, 2) for project in projections
        )
        options = dict(scale=parts.attention.scale, backend=self.backend)
        self.note(number, query, key, value, received_attention(query, key, **options), **options)

    def note(self, number: int, query: Tensor, key: Tensor, value: Tensor, received: Tensor, **options: Any) -> None:
        """Of tiles' heads [B, H, N, d] and the attention [B, N] that their tokens receive."""
        protect, anchor = self.protect, query[:, :, :1]
        if not protect:
            anchor = query.mean(2, keepdim=True, dtype=accumulate_dtype(query.dtype)).to(query.dtype)
        inflow, _, norm, entropy = anchor_stats(
            anchor, key, value, protect=protect, relevance=Relevance.NONE, **options
        )
        self.seen[number].append((inflow[:, 0, protect:], received, entropy[:, 0], norm[:, protect:]))

    def grid(self, patches: int) -> tuple[int, int]:
        return PrunedEncoder.grid(patches)

    def flow(self, hub_threshold: float) -> Flow:
        columns = zip(*([torch.cat(x) for x in zip(*passes, strict=True)] for passes in self.seen), strict=True)
        inflow, received, entropy, norm = (torch.stack(column) for column in columns)
        protect = self.protect
        outflow = received[..., protect:]
        return Flow(
            anchor="cls" if protect else "mean",
            grid=self.grid(outflow.shape[-1]),
            hub_threshold=hub_threshold,
            inflow=inflow,
            outflow=outflow,
            anchor_outflow=received[..., 0] if protect else None,
            hubs=outflow > hub_threshold * outflow.mean(-1, keepdim=True),
            entropy=entropy,
            value_norm=norm,
        )


class _WatchedPacked(_Watched):
    """The same of blocks that are given the patches of several images, or frames, in one sequence."""

    def __init__(self, module: Any, tower: PackedTower, backend: str | None) -> None:
        self.module, self.tower, self.backend, self.protect = module, tower, backend, 0
        self.seen = [[] for _ in module.blocks]

    def hooks(self) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
        yield self.module, self.begin
        for number, block in enumerate(self.module.blocks):
            yield block.attn, partial(self.look, number)

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """In front of the encoder."""
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        sizes = {(height, width) for _, height, width in grids.tolist()}
        if len(sizes) > 1:
            shown = ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
            raise ValueError(f"analyze: images of {shown} patches have no grid in common: give those of one size")
        (self.size,), self.order = sizes, self.tower.raster(module, grids)

    def look(self, number: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        bounds = kwargs["cu_seqlens"] if "cu_seqlens" in kwargs else args[1]
        heads = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1))
        query, key, value = heads.unbind(1)
        query, key = self.tower.parts(self.module.blocks[number]).rotate(query, key, *kwargs["position_embeddings"])
        options = dict(scale=module.scaling, backend=self.backend)
        segments = Segments(tuple(bounds.diff().tolist()), hidden.device)  # images, frames or windows
        q, k = (segments.pad(x).transpose(1, 2) for x in (query, key))
        received = received_attention(q, k, lengths=None if segments.even else segments.tensor, **options)
        # The mean over the tokens of the image, of which those of other windows give nothing.
        received = segments.unpad(received * segments.tensor[:, None] / math.prod(self.size))
        q, k, v, received = (
            x[self.order].unflatten(0, (-1, math.prod(self.size))) for x in (query, key, value, received)
        )
        self.note(number, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), received, **options)

    def grid(self, patches: int) -> tuple[int, int]:
        return self.size


def _rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's of the last dimension, equal values in their order; NaN for a single token."""
    ranks = torch.stack((x, y)).argsort(dim=-1, stable=True).argsort(dim=-1).double()
    a, b = ranks - ranks.mean(-1, keepdim=True)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def _means(x: Tensor) -> list[float | None]:
    """Of every layer over the tiles."""
    return x.double().mean(1).tolist()
