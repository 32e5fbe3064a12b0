"""What a layer adds to the stock model: one launch where it scores, two where it prunes."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowcut_kernels as fk
from flowcut_kernels._library import native_error, triton_error

SCHEDULE = ((2, 40), (4, 20), (5, 8))  # of 8 layers, the seventh read: layers 0, 1 and 3 score and do not prune


class Operators(TorchDispatchMode):
    """Counts operators that compute something: views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not (function.is_view or function._opname == "_unsafe_view"):
            self.counts[function._opname] += 1
        return output


@pytest.mark.parametrize("record", [False, True])
def test_kernel_launches(monkeypatch, record):
    """Every launch of a Triton kernel, by layer; a trace costs no more of them."""
    if triton_error():
        pytest.skip(triton_error())
    from flowcut_kernels.ops import _triton_common

    launches, tower, pixels = [], tiny.clip_tower(), tiny.images(1)
    launch = _triton_common.Launch.__call__

    def counted(self):
        launches.append(self.kernel.fn.__name__.lstrip("_"))
        return launch(self)

    monkeypatch.setattr(_triton_common.Launch, "__call__", counted)
    by_layer: list[list[str]] = []
    hooks = [layer.register_forward_hook(lambda *_: by_layer.append(launches.copy())) for layer in tower.encoder.layers]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = fk.FlowCut(8, schedule=SCHEDULE)
    with fk.patched(tower.to(device), policy, backend="triton", record=record), torch.no_grad():
        tower(pixels.to(device))
    for hook in hooks:
        hook.remove()
    added = [now[len(before) :] for before, now in zip([[], *by_layer], by_layer, strict=False)]
    score, prune = ["anchor_stats"], ["anchor_stats", "gather_tokens"]
    assert added == [score, score, prune, score, prune, prune, [], []]


# The anchor's own arithmetic, one row per image: the query of the class token where a layer prunes (elsewhere it is
# among all queries); the mean token and its query and value where there is no class token. SigLIP's embeddings are
# brought to rows, once.
ANCHORS = {"clip": Counter(addmm=3), "siglip": Counter(mean=6, addmm=12, clone=1)}


@pytest.mark.parametrize("kind", ANCHORS)
def test_nothing_else_is_launched(kind):
    """Around those launches runs what makes the anchor, and nothing more."""
    if native_error():
        pytest.skip(native_error())
    tower, pixels = tiny.TOWERS[kind](), tiny.images(2)
    with torch.no_grad(), Operators() as stock:
        tower(pixels)
    with fk.patched(tower, fk.FlowCut(8, schedule=SCHEDULE)), torch.no_grad(), Operators() as ours:
        tower(pixels)
    # On a CPU the scored layers' attention is one operator for another.
    added = Counter(anchor_stats_select=6, gather_tokens=3, attention=6)
    assert ours.counts - stock.counts == added + ANCHORS[kind]
    assert stock.counts - ours.counts == Counter(_scaled_dot_product_flash_attention_for_cpu=6)


def test_ragged_batches_cost_a_mask_and_nothing_more():
    """The mask comes out of the gather; what is left is SDPA's own preparation of it."""
    if native_error():
        pytest.skip(native_error())
    tower, pixels = tiny.clip_tower(), tiny.images(4)
    with fk.patched(tower, fk.FlowCut(8), record=True), torch.no_grad():
        tower(pixels)
        assert any(len(set(stage.kept)) > 1 for stage in fk.trace(tower).stages)
    with fk.patched(tower, fk.FlowCut(8)), torch.no_grad(), Operators() as ours:
        tower(pixels)
    assert ours.counts["arange"] == ours.counts["lt"] == ours.counts["gather"] == 0
