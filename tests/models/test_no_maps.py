"""What choosing costs inside a model: under no policy a tensor of N x N elements is made, or a layer run twice.

Smaller ones are: a layer that cuts masks its kept rows by all keys, SparseVLM asks 32 words at a time with all heads,
and its clusters need the distances between the at most 0.3 N + 1 tokens that they are made of.
"""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import spell

import flowcut_kernels as fk
from flowcut_kernels import policies

LAYERS, SIDE = 17, 24  # SparseVLM's last cut is after layer 15
N = SIDE**2
POLICIES = [getattr(policies, name).preset(64) for name in policies.__all__ if name != "Policy"]
POLICIES += [fk.FlowCut.preset(64, llm_layer=1), fk.VFlowOpt.preset(64, hub_threshold=1.5, llm_stages=((2, 0.5),))]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns. A fused attention is one operator."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        # A view that repeats what is there has no elements of its own.
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


class Calls:
    """How often modules of the layers are called: counts[name] by layer, those of the vision tower first."""

    def __init__(self, model) -> None:
        layers = [*model.model.vision_tower.encoder.layers, *model.model.language_model.layers]
        self.counts = {name: [0] * len(layers) for name in ("k_proj", "v_proj", "o_proj", "out_proj", "mlp")}
        self.handles = []
        for number, layer in enumerate(layers):
            for path, module in layer.named_modules():
                name = path.rpartition(".")[2]
                if name in self.counts:
                    self.handles.append(module.register_forward_hook(partial(self.count, name, number)))

    def count(self, name: str, number: int, *_) -> None:
        self.counts[name][number] += 1

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def model_of(attention: str):
    text = dict(num_hidden_layers=LAYERS, num_key_value_heads=4)
    return tiny.llava(attention=attention, side=SIDE, text=text)


@pytest.fixture(scope="module")
def llava():
    return model_of("sdpa")


def given() -> dict:
    return dict(
        **spell([[1, *[tiny.IMAGE] * N, *range(3, 60)]]), pixel_values=tiny.images(1, side=SIDE), logits_to_keep=1
    )


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@torch.no_grad()
def test_policies(llava, policy, backend):
    inputs = given()
    with fk.patched(llava, policy, backend=backend), Calls(llava) as calls, Largest() as largest:
        llava(**inputs)
    assert largest.elements < N * N
    keys = calls.counts.pop("k_proj")
    assert all(max(counts) == 1 for counts in calls.counts.values())
    twice = [i - tiny.LAYERS for i, count in enumerate(keys) if count > 1]
    # PyramidDrop looks at a layer's keys before it knows which tokens enter it.
    assert twice == (list(policy.layers) if isinstance(policy, fk.PyramidDrop) else [])


@pytest.mark.parametrize(("attention", "map_"), [("sdpa", False), ("eager", True)])
@torch.no_grad()
def test_a_map_is_seen(attention, map_):
    """The stock model's attention shows that the limit means something."""
    model, inputs = model_of(attention), given()
    with Largest() as largest:
        model(**inputs)
    assert (largest.elements >= N * N) == map_
