"""Who is compared: every policy, set so that the language model's layers see the same average number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from ..policies import (
    AttentionTokens,
    FastV,
    FlowCut,
    Policy,
    PyramidDrop,
    RandomTokens,
    SparseVLM,
    UniformTokens,
    VFlowOpt,
    VisionZip,
)

PUBLISHED = 32  # decoder layers of LLaVA-1.5-7B, for which papers name theirs
# Layers before the attention that a first cut goes by; in the very first layer no token has read another.
READ = (2, 1)

# Policies that prune before the language model: name -> policy of a budget, and of a seed where tokens are drawn.
BEFORE: dict[str, Callable[[int, int], Policy]] = {
    "FlowCut": lambda budget, seed: FlowCut(target_tokens=budget),
    "FlowCut release": lambda budget, seed: FlowCut.release(target_tokens=budget),
    "VFlowOpt": lambda budget, seed: VFlowOpt(target_tokens=budget),
    "hybrid": lambda budget, seed: FlowCut(target_tokens=budget, recycle_cell=4),
    "VisionZip": lambda budget, seed: VisionZip(target_tokens=budget),
    "CLS attention": lambda budget, seed: AttentionTokens(target_tokens=budget),
    "CLS staged": lambda budget, seed: FlowCut(budget, criteria=("attention",)),
    "random": lambda budget, seed: RandomTokens(target_tokens=budget, seed=seed),
    "uniform grid": lambda budget, seed: UniformTokens(target_tokens=budget),
}


def _sparsevlm(layers: int) -> list[Callable[..., Policy]]:
    # What comes after layer 2 has had three layers. Of stages that fall together the last is left.
    found: list[Callable[..., Policy]] = []
    for least in READ:
        published = zip((2, 6, 15), (*SparseVLM.surplus, 1.0), strict=True)
        stages = {max(_scaled(layer + 1, layers), min(least, layers - 1)) - 1: surplus for layer, surplus in published}
        found.append(partial(SparseVLM, layers=tuple(stages), surplus=tuple(stages.values())[:-1]))
    return found


def _pyramiddrop(layers: int) -> list[Callable[..., Policy]]:
    stages = ((8, 16, 24), (4, 8, 16), (2, 4, 8))  # as published, and those of the presets for fewer tokens
    return [partial(PyramidDrop, layers=tuple(sorted({_scaled(x, layers) for x in some}))) for some in stages]


def _fastv(layers: int) -> list[Callable[..., Policy]]:
    return [partial(FastV, layer=max(_scaled(2, layers), min(least, layers - 1))) for least in READ]


# Policies that prune inside it: name -> what can be tried in a model of so many layers, the next where one cannot reach
# the average; each lacks its target_tokens.
INSIDE: dict[str, Callable[[int], list[Callable[..., Policy]]]] = {
    "SparseVLM": _sparsevlm,
    "PyramidDrop": _pyramiddrop,
    "FastV": _fastv,
}
NAMES = (*list(BEFORE)[:5], *INSIDE, *list(BEFORE)[5:])  # methods, then what they have to beat
KNOWN = {name.lower().replace(" ", "-"): name for name in NAMES}  # as a command line has them


def named(text: str) -> tuple[str, ...]:
    """Those of a list with commas: "FlowCut,CLS attention" or "flowcut,cls-attention".

    Raises:
        ValueError: a name that is unknown.
    """
    found = []
    for word in text.split(","):
        short = word.strip().lower().replace(" ", "-")
        if short not in KNOWN:
            raise ValueError(f"{word!r} is unknown: use {', '.join(KNOWN)}")
        found.append(KNOWN[short])
    return tuple(found)


def _scaled(layer: int, layers: int) -> int:
    """A layer of the published 32 at the same depth of a model of `layers`, at least 1."""
    return max(round(layer * layers / PUBLISHED), 1)


@lru_cache(maxsize=512)
def contender(name: str, average: int, layers: int, tokens: int, seed: int = 0) -> Policy:
    """The policy that keeps `average` of an image's `tokens` on average over the `layers` of a language model.

    What enters the language model stays there unless a policy prunes inside it, so that the average is its budget. The
    layers of those that do are at the published depth, the first two at least in front of a cut; they are earlier where
    the average cannot be reached so.
    What they keep in the end is the count whose :meth:`~flowcut_kernels.policies.Policy.average_tokens` is nearest to
    the average, and at most half a token or 1 % above it.

    Args:
        name: one of ``NAMES``.
        seed: of the tokens that "random" draws.

    Raises:
        ValueError: an unknown name, or an average below what the layers that see all tokens cost alone.
    """
    if name in BEFORE:
        return BEFORE[name](average, seed)
    if name not in INSIDE:
        raise ValueError(f"contender: name={name!r} is unknown: use one of {', '.join(NAMES)}")
    for form in INSIDE[name](layers):
        form(target_tokens=1).check_decoder(layers)
        found = nearest(form, average, layers, tokens)
        if found is not None:
            return found
    least = form(target_tokens=1).arithmetic(layers, tokens)
    raise ValueError(f"{name} cannot keep {average} of {tokens} tokens on average: with one in the end it has {least}")


def nearest(form: Callable[..., Policy], average: int, layers: int, tokens: int) -> Policy | None:
    """The policy of a `form` that lacks its target_tokens, whose average is nearest; None where all lie above it."""
    most = average + max(0.5, 0.01 * average)
    reached = {kept: form(target_tokens=kept).average_tokens(layers, tokens) for kept in range(1, tokens + 1)}
    fitting = [kept for kept, mean in reached.items() if mean <= most]
    return form(target_tokens=min(fitting, key=lambda kept: abs(reached[kept] - average))) if fitting else None
