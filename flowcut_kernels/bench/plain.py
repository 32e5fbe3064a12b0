"""The opponents: what the operators do, as well as torch alone can do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._ops import Relevance
from ..policies import FlowCut


def dots_matmul(anchor: Tensor, x: Tensor) -> Tensor:
    return (anchor @ x.transpose(-1, -2))[:, :, 0]


def dots_block(anchor: Tensor, x: Tensor) -> Tensor:
    """[B, N, H d] as it lies in memory times a block-diagonal [H d, H]: no copy of x, H times the arithmetic."""
    blocks = torch.diag_embed(anchor[:, :, 0].transpose(1, 2)).transpose(1, 2).flatten(1, 2)
    return (x.transpose(1, 2).flatten(2) @ blocks).transpose(1, 2)


def dots_sum(anchor: Tensor, x: Tensor) -> Tensor:
    return (anchor * x).sum(-1)


# Forms of the dot products [B, H, N] of one anchor [B, H, 1, d] with every row of x [B, H, N, d].
DOTS = {"matmul": dots_matmul, "block matmul": dots_block, "multiply, sum": dots_sum}


def stats(query: Tensor, key: Tensor, value: Tensor, dots: Callable, relevance: Relevance) -> list[Tensor]:
    """What `anchor_stats` returns: one query row, no N x N, the reductions that measured fastest.

    ``vector_norm(ord=1)`` is five times slower than ``abs().sum()`` on a CPU; with ord=2 it is the fastest form.
    """
    attention = (dots(query, key).float() * query.shape[-1] ** -0.5).softmax(-1).mean(1)
    rows = value.transpose(1, 2)
    flat, anchor = rows.flatten(2), rows[:, :1].flatten(2)
    if relevance == Relevance.COSINE:
        length = torch.linalg.vector_norm(flat, dim=-1)
        product = (flat @ anchor.transpose(1, 2))[..., 0].float()
        related = (1 + product / length.float() / length[:, :1].float()) / 2
        norm = flat.abs().sum(-1)
    else:
        related = dots(value[:, :, :1], value).float().softmax(-1).mean(1)
        norm = rows.mean(2).abs().sum(-1)
    live = torch.ones_like(attention)
    live[:, 0] = 0
    attention, related = attention * live, related * live
    p = attention / attention.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(p, p).sum(-1, keepdim=True) / torch.tensor(p.shape[1] - 1.0).log()
    return [attention, related, norm.float() * live, entropy]


def stats_by_image(query: Tensor, key: Tensor, value: Tensor, dots: Callable, relevance: Relevance) -> list[Tensor]:
    """The same image by image: temporaries stay in cache, and strided heads of one image need no copy."""
    parts = [
        stats(q, k, v, dots, relevance) for q, k, v in zip(*(x.split(1) for x in (query, key, value)), strict=True)
    ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def stats_forms(query: Tensor, key: Tensor, value: Tensor, relevance: Relevance) -> dict[str, Callable]:
    """Every form, by name."""
    forms: dict[str, Callable] = {
        name: partial(stats, query, key, value, dots, relevance) for name, dots in DOTS.items()
    }
    if len(query) > 1:
        for name, dots in DOTS.items():
            forms[f"{name}, by image"] = partial(stats_by_image, query, key, value, dots, relevance)
    return forms


def received(query: Tensor, key: Tensor, rows: int) -> Tensor:
    """Column mean [B, N] of the attention map, which is formed `rows` rows at a time."""
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    for block in (query * query.shape[-1] ** -0.5).split(rows, 2):
        total += (block @ key.transpose(-1, -2)).float().softmax(-1).sum((1, 2))
    return total / (query.shape[1] * query.shape[2])


def received_by_image(query: Tensor, key: Tensor, rows: int) -> Tensor:
    """The same image by image."""
    return torch.cat([received(q, k, rows) for q, k in zip(query.split(1), key.split(1), strict=True)])


def fuse(attention: Tensor, relevance: Tensor, norm: Tensor, history: Tensor | None) -> Tensor:
    """The cumulative score [B, N] from criteria [B, N]; the class token's column is 0."""
    share = attention / attention[:, 1:].sum(-1, keepdim=True) + relevance / relevance[:, 1:].sum(-1, keepdim=True)
    score = share * norm
    score[:, 0] = 0
    return score if history is None else 0.5 * history + 0.5 * score


def choose(score: Tensor, entropy: Tensor, budget: int, divisor: float, protect: int = 1) -> Tensor:
    """topk, sort, cat with the class token (protect=1), the count read back, as released code does it: index [B, M]."""
    tokens = score.shape[1] - protect
    count = tokens - budget
    if divisor:
        count = int((count / divisor * (1 - entropy.square())).round().max().item())
    index = score[:, protect:].topk(max(tokens - count, budget)).indices.sort().values
    return torch.cat([index.new_zeros(len(index), 1), index + 1], 1) if protect else index


def select(criteria: Sequence[Tensor], entropy: Tensor, budget: int, divisor: float) -> tuple[Tensor, Tensor]:
    """(score, index) of a layer whose criteria are attention, relevance, norm and history."""
    attention, relevance, norm, history = criteria
    score = fuse(attention, relevance, norm, history)
    return score, choose(score, entropy, budget, divisor)


def score_by_mean(
    query: Tensor, key: Tensor, value: Tensor, anchor: Tensor, history: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cumulative score and attention [B, N] where an anchor [B, H, 1, d], none of the N tokens, looks at them all."""
    attention = (dots_block(query, key).float() * query.shape[-1] ** -0.5).softmax(-1).mean(1)
    flat, anchor = value.transpose(1, 2).flatten(2), anchor.transpose(1, 2).flatten(2)
    length = torch.linalg.vector_norm(flat, dim=-1).float() * torch.linalg.vector_norm(anchor, dim=-1).float()
    related = (1 + (flat @ anchor.transpose(1, 2))[..., 0].float() / length) / 2
    share = attention + related / related.sum(-1, keepdim=True)
    score = share * flat.abs().sum(-1).float()
    return (score if history is None else 0.5 * history + 0.5 * score), attention


def choose_groups(score: Tensor, budget: int, block: int) -> Tensor:
    """Rows [B, budget * block] of the groups of `block` whose mean score is highest."""
    group = score.unflatten(1, (-1, block)).mean(-1).topk(budget).indices.sort().values
    return (group[..., None] * block + torch.arange(block, device=score.device)).flatten(1)


def gather(rows: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    wide = [index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]) for x in rows]
    return [x.gather(1, i) for x, i in zip(rows, wide, strict=True)]


def gather_by_indexing(rows: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    batch = torch.arange(len(index), device=index.device)[:, None]
    return [x[batch, index] for x in rows]


def grey_levels(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Levels int32 [B, H, W] of three channels: uint8, or normalised with mean and std [3, 1, 1]; (n + 1) // 3."""
    if pixels.dtype == torch.uint8:
        total = pixels.sum(1, dtype=torch.int32)
    else:
        total = torch.addcmul(255 * mean, pixels.float(), 255 * std).round_().clamp_(0, 255).sum(1).to(torch.int32)
    return total.add_(1).mul_(21846).bitwise_right_shift_(16)  # division takes twice as long


def patch_entropy(pixels: Tensor, size: int, mean: Tensor, std: Tensor, count: Callable) -> Tensor:
    """What `patch_entropy` returns, from one `count` (see COUNTS) of patch * 256 + level over all patches."""
    batch, rows, columns = len(pixels), pixels.shape[2] // size, pixels.shape[3] // size
    level = grey_levels(pixels[:, :, : rows * size, : columns * size], mean, std)
    patch = torch.arange(batch * rows * columns, device=pixels.device).view(batch, rows, 1, columns, 1)
    bins = patch * 256 + level.view(batch, rows, size, columns, size)
    share = count(bins.flatten(), patch.numel() * 256).view(batch, rows * columns, 256).float().div_(size * size)
    # Faster than torch.special.entr.
    return -share.mul(share.clamp_min(1e-30).log2_()).sum(-1)


# Forms of the histogram of `bins`, integers below `size`.
COUNTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "scatter_add": lambda bins, size: bins.new_zeros(size, dtype=torch.float32).scatter_add_(
        0, bins, torch.ones(1, device=bins.device).expand(len(bins))
    ),
    "index_add": lambda bins, size: bins.new_zeros(size, dtype=torch.int32).index_add_(
        0, bins, torch.ones(1, dtype=torch.int32, device=bins.device).expand(len(bins))
    ),
    "bincount": lambda bins, size: torch.bincount(bins, minlength=size),
}


def recycle(tokens: Tensor, importance: Tensor, cell: Tensor, cells: int, add: Callable) -> list[Tensor]:
    """What `recycle_tokens` returns, the merged rows by one of SUMS; weights are positive."""
    member = (cell >= 0).nonzero()[:, 0]
    cell, weight = cell[member], importance[member]
    highest = weight.new_full((cells,), float("-inf")).scatter_reduce_(0, cell, weight, "amax")
    first = torch.where(weight == highest[cell], member, len(tokens))
    position = member.new_full((cells,), len(tokens)).scatter_reduce_(0, cell, first, "amin")
    position.masked_fill_(position == len(tokens), -1)
    total = weight.new_zeros(cells).index_add_(0, cell, weight).clamp_min_(torch.finfo(torch.float32).tiny)
    return [add(tokens, member, cell, weight / total[cell], cells), position]


def _index_add(tokens: Tensor, member: Tensor, cell: Tensor, share: Tensor, cells: int) -> Tensor:
    rows = tokens[member].float().mul_(share[:, None])
    return rows.new_zeros(cells, tokens.shape[1]).index_add_(0, cell, rows).to(tokens.dtype)


def _scatter_add(tokens: Tensor, member: Tensor, cell: Tensor, share: Tensor, cells: int) -> Tensor:
    rows = tokens[member].float().mul_(share[:, None])
    return rows.new_zeros(cells, tokens.shape[1]).scatter_add_(0, cell[:, None].expand_as(rows), rows).to(tokens.dtype)


def _embedding_bag(tokens: Tensor, member: Tensor, cell: Tensor, share: Tensor, cells: int) -> Tensor:
    """Shares rounded to the tokens' dtype: less exact than the others in low precision."""
    order = cell.argsort(stable=True)
    starts = torch.searchsorted(cell[order], torch.arange(cells, device=cell.device))
    share = share[order].to(tokens.dtype)
    return torch.nn.functional.embedding_bag(member[order], tokens, starts, mode="sum", per_sample_weights=share)


# Forms of sum_n share_n t_n over the members of each cell.
SUMS: dict[str, Callable] = {"index_add": _index_add, "scatter_add": _scatter_add}
BAG: dict[str, Callable] = {"embedding_bag": _embedding_bag}


def encoder(model: Any, pixels: Tensor, policy: FlowCut, attention: str) -> tuple[Tensor, Tensor]:
    """FlowCut's default as a careful user of torch writes it: features [B, T, D] of a LLaVA's tower, patches [B, T].

    Stock layers, statistics by the fastest vectorised form, pruning after the layer, one count for the batch. The
    anchor is CLIP's class token; SigLIP has none, and gets the mean token.

    Args:
        pixels: [B, 3, S, S] of images, or of tiles, each of which keeps the policy's budget.
        attention: "sdpa" keeps the stock attention; "eager", for CLIP, takes the class token's row from the N x N map
            of every scored layer, as the released code does.
    """
    tower = model.model.vision_tower
    hidden, protect = tower.embeddings(pixels), 0
    if hasattr(tower, "pre_layrnorm"):
        hidden, protect = tower.pre_layrnorm(hidden), 1
    layers = tower.encoder.layers
    patches, feature_layer = hidden.shape[1] - protect, len(layers) + model.config.vision_feature_layer
    heads, budget = layers[0].self_attn.num_heads, policy.budget(patches)
    where = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
    history: Tensor | None = None
    for number, layer in enumerate(layers[: feature_layer + 1]):
        step = policy.encoder_step(number, feature_layer, patches, budget)
        if step is None or hidden.shape[1] - protect <= budget:
            hidden = layer(hidden, None)
            continue
        normed, module = layer.layer_norm1(hidden), layer.self_attn

        def project(linear: Any, x: Tensor = normed) -> Tensor:
            return linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)

        query, key, value = project(module.q_proj), project(module.k_proj), project(module.v_proj)
        if attention == "eager":
            logits = (query @ key.transpose(-1, -2)) * module.scale
            weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
            mixed = weights @ value
        else:
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + module.out_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        if protect:
            row, related, norm, entropy = stats(query[:, :, :1], key, value, dots_block, Relevance.COSINE)
            if attention == "eager":
                row = weights[:, :, 0].float().mean(1)
            score = fuse(row, related, norm, history)
        else:
            mean = normed.mean(1, keepdim=True)
            score, row = score_by_mean(project(module.q_proj, mean), key, value, project(module.v_proj, mean), history)
            entropy = -torch.special.xlogy(row, row).sum(-1, keepdim=True) / math.log(row.shape[1])
        if step.prunes:
            index = choose(score, entropy[:, 0], step.budget, step.divisor, protect)
            hidden, score, where = gather((hidden, score, where), index)
        history = score
    return model.model.multi_modal_projector(hidden[:, protect:]), where[:, protect:] - protect
