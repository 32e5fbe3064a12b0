"""What a pruned model must answer, from the stock model in fp64: slow, and by other means than the package's.

The stock model runs on whole images and whole prompts. Its attention is replaced by one that writes the map out, sees
every layer's queries, keys and values, decides by the formulas what is dropped, and from then on masks the keys that
are gone. What a dropped token goes on to compute reaches nobody. Which features are left of the tokens is found by
sending marks, in the projected tokens' place, through the model's own assembly. The prompt keeps its length too:
columns that are gone are masked, and the others get their positions from outside.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from test_feature_stage import Item, bits_of, pruned_by_hand, staged
from test_llm_baselines import clusters_of
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from zoo import Family, Tile

import flowcut_kernels as fk

LOWEST = -1e30  # of a logit that counts for nothing; finite, so that rows without any key stay finite


def attend(module, query, key, value, attention_mask=None, scaling=None, **_):
    """transformers' attention function, written out; a module's ``watch`` looks on and says which keys are left."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    watch = vars(module).get("watch")
    live = None if watch is None else watch.see(module, query, key, value, scaling, attention_mask)
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).mT * scaling
    if attention_mask is not None:
        flags = attention_mask.dtype == torch.bool
        logits = logits.masked_fill(~attention_mask, LOWEST) if flags else logits + attention_mask
    if live is not None:
        logits = logits.masked_fill(~live[:, None, None], LOWEST)
    mixed = logits.softmax(-1) @ value.repeat_interleave(groups, 1)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("oracle", attend)
AttentionMaskInterface.register("oracle", eager_mask)


def shares(budget: int, room: list[int]) -> list[int]:
    """A budget dealt out one by one, the first tile first, to those that have room."""
    dealt = [0] * len(room)
    while budget > 0 and dealt != room:
        for i, most in enumerate(room):
            if dealt[i] < most and budget > 0:
                dealt[i], budget = dealt[i] + 1, budget - 1
    return dealt


def attention_of(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[n] of a query [H, d] to keys [n, G, d], head mean."""
    key = key.repeat_interleave(query.shape[0] // key.shape[1], 1)
    return (torch.einsum("hd,nhd->hn", query, key) * scaling).softmax(-1).mean(0)


def flow_score(query: Tensor, key: Tensor, value: Tensor, anchor: Tensor, first: int, scaling: float) -> tuple:
    """FlowCut's s of the rows behind the `first` ones, and the entropy ratio of the anchor's attention.

    Args:
        query, anchor: [H, d] the anchor's query and [G, d] value.
        key, value: [n, G, d].
    """
    attention = attention_of(query, key, scaling)[first:]
    relevance = (1 + torch.cosine_similarity(value.flatten(1)[first:], anchor.flatten()[None], dim=1)) / 2
    norm = value.flatten(1)[first:].abs().sum(1)
    share = attention / attention.sum()
    entropy = -(share * share.clamp_min(1e-300).log()).sum() / math.log(max(len(share), 2))
    return (share + relevance / relevance.sum()) * norm, entropy.item()


def entropy_of(patches: Tensor) -> Tensor:
    """[n] of the grey levels of patches [3, n, p, p] that were normalised with a mean and a deviation of one half."""
    levels = (127.5 * patches + 127.5).round().clamp(0, 255).mean(0).round()
    return torch.tensor([bits_of(patch) for patch in levels.numpy()], dtype=torch.float64)


class Tower:
    """One pass of a vision tower: which tokens of its tiles are left, and their importance."""

    def __init__(
        self,
        policy: fk.policies.base.Policy,
        tiles: list[Tile],
        voids: list[Tensor],
        budgets: list[int],
        layers: int,
    ) -> None:
        self.policy, self.tiles, self.voids, self.layers = policy, tiles, voids, layers
        self.budgets = [max(budget, 1) for budget in budgets]  # nothing attends to nothing
        self.layer = 0  # that is running
        count = 1 + max(int(max(tile.rows.max(), *tile.protected.tolist(), 0)) for tile in tiles)
        self.live = torch.ones(count, dtype=torch.bool)
        self.alive = [torch.ones(len(tile.tokens), dtype=torch.bool) for tile in tiles]
        self.history: list[Tensor | None] = [None] * len(tiles)
        self.importance: list[Tensor] = []
        self.bits: list[Tensor] = []  # entropy of every tile's patches [n, block], where the policy asks for it
        self.merged: dict[int, list[Tensor]] = {}  # place in what the projector puts out -> rows, of which means add up
        self.seen: list[list[Tensor]] = []
        last = layers - 2  # the layer of the first cut:
        self.first = last % 2 if isinstance(policy, fk.FlowCut) else last + isinstance(policy, fk.VisionZip)

    def see(self, module, query, key, value, scaling, mask) -> Tensor:
        """bool [B, N]: keys that are left."""
        start = sum(len(x[0]) for x in self.seen)
        if not start and self.layer == self.first:
            for i, (tile, void) in enumerate(zip(self.tiles, self.voids, strict=True)):
                if self.history[i] is not None:
                    self.history[i] = self.history[i][~void[self.alive[i]]]
                self.alive[i] &= ~void
                self.live[tile.rows[void].flatten()] = False
        self.seen.append([x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)])
        self.scaling = scaling
        return self.live[start : start + len(self.seen[-1][0])].view(len(query), -1)

    def end(self, layer: int) -> None:
        """All rows of a layer have been seen."""
        query, key, value = (torch.cat(x) for x in zip(*self.seen, strict=True))
        self.seen, self.layer = [], layer + 1
        last = layer == self.layers - 1
        for i, tile in enumerate(self.tiles):
            if isinstance(self.policy, fk.VFlowOpt):
                if last:
                    self.importance.append(self._importance(i, tile, query, key))
            elif isinstance(self.policy, fk.FlowCut):
                self._flow(i, tile, query, key, value, layer)
            elif isinstance(self.policy, fk.VisionZip):
                if last:
                    self._zip(i, tile, query, key)
            elif layer == self.layers - 2 and self.budgets[i] < self.alive[i].sum():
                tokens = self.alive[i].nonzero().flatten()
                if isinstance(self.policy, fk.AttentionTokens):
                    rows, first = torch.cat([tile.protected, tile.rows[tokens].flatten()]), len(tile.protected)
                    anchor = query[rows[:1] if first else rows].mean(0)
                    score = attention_of(anchor, key[rows], self.scaling)[first:].view(len(tokens), -1).mean(1)
                    chosen = score.argsort(descending=True, stable=True)[: self.budgets[i]].sort().values
                    self.history[i] = score[chosen]
                else:
                    alive = self.alive[i].view(tile.grid)  # a rectangle
                    chosen = self.policy._tokens((int(alive.any(1).sum()), int(alive.any(0).sum())), self.budgets[i])
                self.alive[i] = torch.zeros_like(self.alive[i]).index_fill(0, tokens[chosen], True)
            self.live[tile.rows[~self.alive[i]].flatten()] = False

    def read(self, module, args, out: Tensor) -> None:
        self.output = out.flatten(0, 1)

    def merge(self, module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The input of the projector with the tokens that were made of several."""
        features = args[0].clone()
        for place, parts in self.merged.items():
            features.view(-1, features.shape[-1])[place] = sum(self.output[rows].mean(0) for rows in parts)
        return features, *args[1:]

    def _flow(self, i: int, tile: Tile, query: Tensor, key: Tensor, value: Tensor, layer: int) -> None:
        remaining = self.layers - 2 - layer
        tokens = self.alive[i].nonzero().flatten()
        if remaining < 0 or len(tokens) <= self.budgets[i]:
            return
        patches = tile.rows[tokens].flatten()
        rows = torch.cat([tile.protected, patches])
        anchor = tile.protected if len(tile.protected) else patches
        score, entropy = flow_score(
            query[anchor].mean(0), key[rows], value[rows], value[anchor].mean(0), len(tile.protected), self.scaling
        )
        score = score.view(len(tokens), -1).mean(1)
        before = self.history[i]
        score = score if before is None else 0.5 * before + 0.5 * score
        if remaining % 2 == 0:
            surplus = len(tokens) - self.budgets[i]
            count = round(surplus / math.sqrt(remaining) * (1 - entropy**2)) if remaining else surplus
            kept = score.argsort(descending=True, stable=True)[: len(tokens) - min(count, surplus)].sort().values
            self.alive[i] = torch.zeros_like(self.alive[i]).index_fill(0, tokens[kept], True)
            score = score[kept]
        self.history[i] = score

    def _zip(self, i: int, tile: Tile, query: Tensor, key: Tensor) -> None:
        tokens, budget, own = self.alive[i].nonzero().flatten(), self.budgets[i], self.policy.class_token
        if budget >= len(tokens):
            return
        rows = tile.rows[:, 0]
        most = min(round(self.policy.contextual_share * budget), budget - own)
        seen = torch.cat([tile.protected, rows[tokens]])
        score = attention_of(query[tile.protected[0]], key[seen], self.scaling)[len(tile.protected) :]
        order = tokens[score.argsort(descending=True, stable=True)].tolist()
        kept, rest = order[: budget - most - own], sorted(order[budget - most - own :])
        targets = rest[:: max(len(rest) // max(most, 1), 1)][:most]
        others = [n for n in rest if n not in targets]
        members: dict[int, list[int]] = {target: [] for target in targets}
        for n in others if targets else []:
            means = key[rows[[n, *targets]]].mean(1)
            members[targets[int(torch.cosine_similarity(means[:1], means[1:]).argmax())]].append(n)
        for target, part in members.items():
            self.merged[int(tile.tokens[target])] = [rows[[target]], *([rows[part]] if part else [])]
        if own:
            self.merged[int(tile.tokens[others[0]])] = [tile.protected]
        left = torch.tensor([*kept, *targets, *others[:own]])
        self.alive[i] = torch.zeros_like(self.alive[i]).index_fill(0, left, True)

    def look(self, convolution: nn.Module, args: tuple[Tensor]) -> None:
        """The entropy of what makes patches of images [V, 3, H, W], or is given patches [R, 3, 1, p, p] by token."""
        x, size = args[0].detach(), convolution.kernel_size[-1]
        if x.dim() == 4:
            bits = [entropy_of(image.unfold(1, size, size).unfold(2, size, size).flatten(1, 2)) for image in x]
            self.bits = [own[tile.rows - tile.rows.min()] for own, tile in zip(bits, self.tiles, strict=True)]
        else:
            bits = entropy_of(x[:, :, 0].transpose(0, 1)).split([tile.rows.numel() for tile in self.tiles])
            self.bits = [own.view_as(tile.rows) for own, tile in zip(bits, self.tiles, strict=True)]

    def _importance(self, i: int, tile: Tile, query: Tensor, key: Tensor) -> Tensor:
        """VFlowOpt's, of every token: attention of the hubs' mean row, or what is received where there is none."""
        rows, first = torch.cat([tile.protected, tile.rows.flatten()]), len(tile.protected)
        attention = (torch.einsum("qhd,khd->hqk", query[rows], key[rows]) * self.scaling).softmax(-1).mean(0)
        received = attention.mean(0)[first:]
        hubs = (received > self.policy.hub_threshold * received.mean()).nonzero().flatten() + first
        hubs = torch.cat([torch.arange(first), hubs])
        found = attention[hubs, first:].mean(0) if len(hubs) else received
        if self.policy.entropy_weight:
            found = found + self.policy.entropy_weight * self.bits[i].flatten().softmax(0)
        return found.view(len(tile.tokens), -1).mean(1)


@dataclass
class Shown:
    """An image or a video in the language model."""

    columns: Tensor  # int64 [n] that enter
    full: int  # tokens before pruning
    importance: Tensor | None  # [n]
    raters: list[int] = field(default_factory=list)  # columns
    merged: Tensor | None = None  # int64 columns that go through a layer once more, to be clustered behind it


class Text:
    """A pass of the language model over one row: columns that are gone by a layer are keys to nobody."""

    def __init__(self, policy: fk.policies.base.Policy, images: list[Shown], text: Tensor, live: Tensor) -> None:
        """`text`: bool [L] columns of the prompt that show no image; `live`: bool [L'] of the row those that enter."""
        self.policy, self.images, self.text, self.live = policy, images, text, live
        self.last = int(live[: len(text)].nonzero().max())
        self.asks = int(text.nonzero().max()) if text.any() else self.last
        self.cuts: dict[float, Tensor] = {}  # bool [L'] gone after a layer, or at its entrance

    def watch(self, decoder: nn.Module) -> list[Any]:
        """Hooks besides `see`, which the attention calls."""
        for layer in decoder.layers:
            layer.self_attn.watch = self
        if not isinstance(self.policy, fk.SparseVLM):
            return []
        return [
            decoder.register_forward_pre_hook(
                lambda _, args, given: self.rate(given["inputs_embeds"][0]), with_kwargs=True
            ),
            *(
                layer.register_forward_pre_hook(lambda _, args, i=i: (self.enter(i, args[0]), *args[1:]))
                for i, layer in enumerate(decoder.layers)
            ),
        ]

    def rate(self, embeds: Tensor) -> None:
        """SparseVLM's raters, by the embeddings [L', D] that enter."""
        for image in self.images:
            words = [c for c in range(int(image.columns.max()) + 1, len(self.text)) if self.text[c]]
            relevance = (embeds[image.columns] @ embeds[words].T).softmax(1).mean(0)
            image.raters = [c for c, m in zip(words, relevance, strict=True) if m > relevance.mean()]
            image.raters = image.raters or [self.last]

    def see(self, module, query, key, value, scaling, mask) -> Tensor:
        """bool [1, L']: columns that are left as keys of a layer."""
        layer, live = module.layer_idx, self.live.clone()
        for gone in self.cuts.values():
            live &= ~gone
        seen = live & (mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0)  # [L', L']
        gone, chosen = torch.zeros_like(live), False
        for image in self.images:
            kept = self.choose(image, layer, live, seen, *(x[0].transpose(0, 1) for x in (query, key, value)), scaling)
            if kept is not None:
                chosen = True
                gone[image.columns] = True
                gone[kept] = False
        if chosen:
            self.cuts[layer] = gone
        return (live & ~gone if isinstance(self.policy, fk.PyramidDrop) else live)[None]

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """SparseVLM's clusters, of the layer before: means in the place of one of them."""
        for image in self.images:
            others, image.merged = image.merged, None
            if others is None:
                continue
            found = clusters_of(hidden[0, others])
            hidden = hidden.clone()
            gone = torch.zeros(hidden.shape[1], dtype=torch.bool).index_fill(0, others, True)
            gone[others[list(found)]] = False
            means = [hidden[0, others[part]].mean(0) for part in found.values()]
            hidden[0, others[list(found)]] = torch.stack(means)
            self.cuts[layer - 0.5] = gone | self.cuts.get(layer - 0.5, gone)
        return hidden

    def kept(self, layer: int, full: int) -> int | None:
        """Tokens that stay of an image, where a layer chooses."""
        policy = self.policy
        if isinstance(policy, (fk.PyramidDrop, fk.SparseVLM)):
            if layer not in policy.layers:
                return None
            stage = policy.layers.index(layer)
            if isinstance(policy, fk.SparseVLM):
                return round((*policy.surplus, 1)[stage] * policy.budget(full))
            share = (stage + 1) / len(policy.layers)
            return max(round(full * (policy.budget(full) / full) ** share), policy.budget(full))
        last = policy.layer - 1 if isinstance(policy, fk.FastV) else getattr(policy, "llm_layer", None)
        return policy.budget(full) if layer == last else None

    def choose(
        self, image: Shown, layer: int, live: Tensor, seen: Tensor, query: Tensor, key: Tensor, value: Tensor,
        scaling: float,
    ) -> Tensor | None:  # fmt: skip
        """int64 columns of an image that go on from a layer."""
        if getattr(self.policy, "llm_stages", ()):
            cuts = staged(Item(image.columns, image.importance, []), image.columns.tolist(), self.policy.llm_stages)
            return torch.tensor(cuts[layer]) if layer in cuts else None
        left, count = image.columns[live[image.columns]], self.kept(layer, image.full)
        if count is None or count >= len(left):
            return None
        if isinstance(self.policy, fk.FlowCut):
            score, _ = flow_score(query[self.asks], key[left], value[left], value[self.asks], 0, scaling)
        else:  # attention over all that they see
            score = torch.zeros(len(live), dtype=key.dtype)
            for asks in image.raters if isinstance(self.policy, fk.SparseVLM) else [self.last]:
                asks = int(live[: asks + 1].nonzero().max())  # of a dropped one: the row before it
                keys = seen[asks].nonzero().flatten()
                score[keys] += attention_of(query[asks], key[keys], scaling)
            score = score[left]
        order = left[score.argsort(descending=True, stable=True)]
        if isinstance(self.policy, fk.SparseVLM):
            best, count = count, count + int(0.3 * (len(left) - count)) + 1
            image.merged = order[best:count].sort().values
        return order[:count]


@dataclass
class Visuals:
    """What a kind of visuals of one row puts into the language model, in the order of its placeholders."""

    features: Tensor  # [T, D] of all places
    kept: Tensor  # bool [T]
    visual: Tensor  # int64 [T] whose
    importance: Tensor | None = None  # [T]
    output: Any = None  # the same features as get_image_features returns them
    tiles: list[Tensor] = field(default_factory=list)  # tokens that the encoder leaves of each tile, ascending


@lru_cache(maxsize=2)
def stock(build: Callable[..., Any]) -> Any:
    """The model that oracles of a family share: each takes away what it adds."""
    model = build(dtype=torch.float64).requires_grad_(False)
    model.set_attn_implementation("oracle")
    return model


class Oracle:
    """Logits of single rows under a policy."""

    def __init__(self, family: Family, policy: fk.policies.base.Policy) -> None:
        self.family, self.policy, self.model = family, policy, stock(family.model)
        self.inner = self.model.model
        self.token_ids = {kind: getattr(self.model.config, f"{kind}_token_id") for kind in family.kinds}

    def inputs(self, row: list) -> dict[str, Any]:
        given = self.family.prompt([row])
        return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}

    def __call__(self, row: list, new: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [L', V] of what is left of a row, with `new` tokens behind it, and the columns [L'] those are."""
        inputs = self.inputs(row)
        ids = inputs["input_ids"]
        length, more = ids.shape[1], 0 if new is None else len(new)
        positions = None if self.family.positions is None else self.family.positions(self.model, inputs)
        visuals, live = {}, torch.ones(length, dtype=torch.bool)
        for kind, token_id in self.token_ids.items():
            columns = (ids[0] == token_id).nonzero().flatten()
            if len(columns):
                visuals[kind] = made = self.visuals(inputs, kind)
                live[columns[~made.kept]] = False
        for name, x in inputs.items():  # what goes with the prompt grows by what was written
            if x.shape[:2] == ids.shape and name != "attention_mask":
                kind = x.new_full((1, more), self.family.written_type)
                inputs[name] = torch.cat([x, new[None] if name == "input_ids" and more else kind], 1)
        live = torch.cat([live, torch.ones(more, dtype=torch.bool)])
        if positions is None:
            positions = (live.long().cumsum(0) - 1).clamp_min(0)[None]
        else:
            after = positions.amax() + 1 + torch.arange(more)
            positions = torch.cat([positions, after.expand(*positions.shape[:-1], -1)], -1)
        inputs |= dict(attention_mask=live[None].long(), position_ids=positions, use_cache=False)
        watch = self._text(ids[0], visuals, live)
        decoder = self.model.get_decoder()
        hooks = watch.watch(decoder)
        try:
            for kind, made in visuals.items():
                setattr(self.inner, f"get_{kind}_features", lambda *_, output=made.output, **__: output)
            logits = self.model(**inputs).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
            for layer in decoder.layers:
                del layer.self_attn.watch
            for kind in visuals:
                vars(self.inner).pop(f"get_{kind}_features", None)
        for gone in watch.cuts.values():
            live = live & ~gone
        self.positions = positions[..., live]
        return logits[live], live.nonzero().flatten()

    def _text(self, ids: Tensor, visuals: dict[str, Visuals], live: Tensor) -> Text:
        """What the language model drops of a prompt's columns `ids`."""
        images = []
        for kind, made in visuals.items():
            columns = (ids == self.token_ids[kind]).nonzero().flatten()
            for i in range(int(made.visual.max()) + 1):
                mine = made.visual == i
                importance = None if made.importance is None else made.importance[mine & made.kept]
                images.append(Shown(columns[mine & made.kept], int(mine.sum()), importance))
        return Text(self.policy, images, ~torch.isin(ids, torch.tensor([*self.token_ids.values()])), live)

    def visuals(self, inputs: dict[str, Any], kind: str) -> Visuals:
        """The features of a kind, and which of their places in the prompt are left."""
        places = int((inputs["input_ids"] == self.token_ids[kind]).sum())
        groups = self.family.tiles(self.model, inputs, kind)
        tiles = [tile for group in groups for tile in group]
        owner = torch.zeros(sum(len(tile.tokens) + len(tile.leads) for tile in tiles))
        leads = torch.zeros_like(owner)
        for i, group in enumerate(groups):
            for tile in group:
                owner[tile.tokens], owner[tile.leads], leads[tile.leads] = i, i, 1
        # Which tokens the model takes, and whose a place is; newlines come behind a place that is known.
        with torch.enable_grad():
            ones, self.later = (1 - leads).requires_grad_(), 0
            marks = self._assembled(inputs, kind, torch.stack([ones, owner, leads], 1))
            if len(marks) < places:
                self.later = (places - len(marks)) // len(groups)
                marks = self._assembled(inputs, kind, torch.stack([ones, owner, leads], 1))
            weight, whose, lead = marks.unbind(1)
            taken = torch.autograd.grad(weight.sum(), ones)[0] > 0
        patch, lead, whose = weight.detach() > 0, lead > 0, (whose / (weight + lead)).detach().round()
        visual = torch.where(patch | lead, whose, 0).cummax(0).values.long()
        full = torch.bincount(visual[~lead], minlength=len(groups)).tolist()
        real = torch.bincount(visual[patch], minlength=len(groups)).tolist()
        left, pruned, resampled = [], [], []
        budgets: list[int] = []
        voids: list[Tensor] = []
        for group, tokens, places in zip(groups, full, real, strict=True):
            room = [int(taken[tile.tokens].sum()) for tile in group]
            lasting = tokens - places if kind == "video" else 0  # a newline that stays, and counts
            budget = self.policy.encoder_budget(tokens, len(group))
            pruned.append(budget < tokens)
            resampled.append(places < sum(room))
            left.append(min(max(budget - lasting, 1), places))
            ends = shares(left[-1] * (4 if resampled[-1] else 1), room)
            cut = pruned[-1] and ends != room
            budgets += ends if cut else [len(tile.tokens) for tile in group]
            voids += [~taken[tile.tokens] & cut for tile in group]

        features, output, tower = self._watched(inputs, kind, tiles, voids, budgets)
        if isinstance(self.policy, fk.VFlowOpt):
            importance = torch.zeros_like(owner, dtype=torch.float64)
            for tile, x in zip(tiles, tower.importance, strict=True):
                importance[tile.tokens] = x
            importance = self._assembled(inputs, kind, importance[:, None])[:, 0].masked_fill(~patch, 1.0)
            every = torch.ones_like(lead)
            made = self._recycled(inputs, kind, groups, Visuals(features, every, visual, importance), lead)
        else:
            alive, score = torch.zeros_like(owner), torch.zeros_like(owner, dtype=torch.float64)
            for tile, still, found, budget in zip(tiles, tower.alive, tower.history, budgets, strict=True):
                alive[tile.tokens] = still.to(alive) if budget else 0.0
                if found is not None:
                    score[tile.tokens[still]] = found
            marks, score = self._assembled(inputs, kind, torch.stack([alive, score], 1)).unbind(1)
            score = score / marks if score.any() else marks
            partial = (marks > 0) & (marks < weight.detach())
            if partial.any():  # resampled: made of those of its tokens that are left
                weighed = self._watched(
                    inputs, kind, tiles, voids, budgets, lambda n, out: out * alive[n, None].to(out)
                )
                features[partial] = (weighed[0] / marks[:, None])[partial]
            gone = torch.tensor(pruned)[visual]
            kept = torch.where(patch, marks > 0, ~gone if kind == "image" else torch.ones_like(gone))
            for i in range(len(groups)):
                if pruned[i] and resampled[i]:
                    self._most_important(kept, score, (visual == i) & patch, left[i], len(groups[i]), kind)
            made = Visuals(features, kept, visual)
            if self.policy.prunes_features:  # among what the encoder leaves
                made.importance = score.masked_fill(~patch, 1.0)
                made = self._recycled(inputs, kind, groups, made, lead)
        made.output, made.tiles = output, [left.nonzero().flatten() for left in tower.alive]
        made.output.pooler_output = laid_out(made.features, output.pooler_output, self.later)
        return made

    @staticmethod
    def _most_important(kept: Tensor, score: Tensor, mine: Tensor, count: int, tiles: int, kind: str) -> None:
        """Of the `kept` places that are `mine`, those of the highest `score`; of a video's frames equal shares."""
        frames = mine.nonzero().flatten().chunk(tiles if kind == "video" else 1)
        for places, share in zip(frames, shares(count, [len(x) for x in frames]), strict=True):
            there = places[kept[places]]
            best = there[score[there].argsort(descending=True, stable=True)[:share]]
            assert len(best) == share
            kept[places] = False
            kept[best] = True

    def _recycled(
        self, inputs: dict[str, Any], kind: str, groups: list[list[Tile]], made: Visuals, lead: Tensor
    ) -> Visuals:
        """What is kept, by the oracle of test_feature_stage.py; `lead` [T] stays besides."""
        assert made.importance is not None
        if self.family.grids is None:
            grids = [[tile.grid for tile in group] for group in groups]
        else:
            grids = self.family.grids(self.model, inputs, kind)
        for i, grid in enumerate(grids):
            mine = ((made.visual == i) & ~lead).nonzero().flatten()
            places = made.kept[mine].nonzero().flatten()
            at, inside = mine[places], int((places < sum(h * w for h, w in grid)).sum())
            item = Item(
                made.features[at], made.importance[at], list(grid), len(at) - inside, places[:inside].tolist()
            )  # fmt: skip
            left = pruned_by_hand(item, self.policy.budget(len(mine)), self.policy.recycle_cell)
            made.kept[at] = False
            made.features[at[left.kept]], made.kept[at[left.kept]] = left.features, True
        return made

    def _assembled(self, inputs: dict[str, Any], kind: str, values: Tensor) -> Tensor:
        """[T, C]: `values` [tokens, C] in the projected tokens' place, as the model assembles them; 0 for newlines."""
        line = getattr(self.inner, "image_newline", None)
        before = None if line is None else line.data.clone()
        layers = self._layers(kind)

        def put(number: Tensor, out: Tensor) -> Tensor:
            return torch.nn.functional.pad(values[number].to(out), (0, out.shape[1] - values.shape[1]))

        try:
            if line is not None:
                line.data.zero_()
            for layer in layers:  # what they compute is thrown away behind the projector
                layer.forward = lambda hidden, *_, **__: hidden
            return self._call(inputs, kind, put)[0][:, : values.shape[1]]
        finally:
            for layer in layers:
                del layer.forward
            if line is not None:
                line.data.copy_(before)

    def _layers(self, kind: str) -> list[nn.Module]:
        """Of the tower that reads a kind."""
        video = self.family.video_layers if kind == "video" else None
        return list((video or self.family.layers)(self.model))

    def _watched(
        self,
        inputs: dict[str, Any],
        kind: str,
        tiles: list[Tile],
        voids: list[Tensor],
        budgets: list[int],
        change: Any = None,
    ) -> tuple[Tensor, Any, Tower]:
        """Features [T, D] of a pruning tower, the output they came in, and what it dropped."""
        layers = self._layers(kind)
        modules = [self.family.attention(layer) for layer in layers]
        watch = Tower(self.policy, tiles, voids, budgets, len(modules))
        handles = [m.register_forward_hook(lambda *_, i=i: watch.end(i)) for i, m in enumerate(modules)]
        if self.policy.wants_pixels:
            convolutions = [x for x in self.inner.modules() if isinstance(x, (nn.Conv2d, nn.Conv3d))]
            handles += [x.register_forward_pre_hook(watch.look) for x in convolutions]
        if isinstance(self.policy, fk.VisionZip):  # what is read of the tower changes before it is projected
            last, projector = layers[-1], self.family.projector(self.model)
            handles += [last.register_forward_hook(watch.read), projector.register_forward_pre_hook(watch.merge)]
        try:
            for module in modules:
                module.watch = watch
            return *self._call(inputs, kind, change), watch
        finally:
            for handle in handles:
                handle.remove()
            for module in modules:
                del module.watch

    def _call(
        self, inputs: dict[str, Any], kind: str, change: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """The model's own get_image_features [T, D], zeros for what it adds later on, and the output they came in.

        `change` gets the projected tokens' numbers [n] and values [n, D].
        """
        done = 0

        def put(module, args, out):
            nonlocal done
            number = torch.arange(done, done + out.shape[:-1].numel())
            done += len(number)
            return change(number, out.flatten(0, -2)).view_as(out)

        hook = None if change is None else self.family.projector(self.model).register_forward_hook(put)
        try:
            output = made_of(self.inner, inputs, kind)
        finally:
            if hook is not None:
                hook.remove()
        pieces = [torch.nn.functional.pad(x.flatten(0, -2), (0, 0, 0, self.later)) for x in output.pooler_output]
        return torch.cat(pieces), output


def laid_out(features: Tensor, like: Any, later: int) -> Any:
    """Features [T, D] in the form of `like`, a tensor or several, without the last `later` of each."""
    pieces = features.split([x[..., 0].numel() + later for x in like])
    pieces = [piece[: len(piece) - later].view_as(x) for piece, x in zip(pieces, like, strict=True)]
    return torch.stack(pieces) if isinstance(like, Tensor) else type(like)(pieces)


def made_of(inner: nn.Module, inputs: dict[str, Any], kind: str) -> Any:
    """What the model's own get_image_features returns for the arguments that it takes of a prompt's."""
    method = getattr(inner, f"get_{kind}_features")
    first, *names = inspect.signature(method).parameters
    pixels = inputs["pixel_values_videos" if kind == "video" else next(x for x in inputs if x.startswith("pixel"))]
    return method(**{name: inputs[name] for name in names if name in inputs} | {first: pixels, "return_dict": True})
