"""Every family of ``zoo`` through the same tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import Family, Image, Video, families, parts_of

import flowcut_kernels as fk

EVERYTHING = (fk.FlowCut(10**6), fk.FlowCut(retain_ratio=1.0), fk.VFlowOpt(10**6), fk.UniformTokens(10**6))
GREEDY = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True)


@pytest.fixture(params=families(), ids=str)
def family(request) -> Family:
    reason = request.param.skips.get(request.node.originalname)
    if reason:
        pytest.skip(reason)
    return request.param


def prompts(family: Family) -> dict[str, list[list]]:
    """Rows of every kind that the family takes."""
    one, other, third = (Image(*size, seed=i) for i, size in enumerate(family.sizes))
    found: dict[str, list[list]] = {
        "one image": [[3, one, 5, 6]],
        "sizes in a batch": [[3, one, 5, 6, 7], [3, 9, other, 8], [third, 4]],
        "interleaved": [[3, one, 4, 5, other, 6], [7, third, 8]],
        "image or none": [[3, one, 5], [3, 11, 12, 13], [3, 9, other, 8, 7]],
        "text alone": [[3, 4, 5, 6], [3, 7]],
    }
    if "video" in family.kinds:
        found |= {
            "a video": [[3, Video(2), 5, 6], [3, 7, Video(2, seed=1), 8]],
            "video next to image": [[3, Video(2), 4, other, 6], [3, 5, 6], [5, third, 7]],
        }
    return found


def given(
    family: Family, rows: list[list], padding: str = "left", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    inputs = family.prompt(rows, padding)
    return {name: x.to(dtype) if name.startswith("pixel_values") else x for name, x in inputs.items()}


@torch.no_grad()
def test_budget_of_everything_changes_nothing(family):
    """Nor does unpatching leave anything: the stock model's outputs, bit for bit."""
    model = family.model()
    policies = [policy for policy in EVERYTHING if isinstance(policy, family.policies)]
    for rows in prompts(family).values():
        inputs = given(family, rows)
        want = model(**inputs).logits
        for policy in policies:
            with fk.patched(model, policy):
                assert torch.equal(model(**inputs).logits, want), policy
        assert torch.equal(model(**inputs).logits, want)
    settings = GREEDY | dict(output_logits=False)
    want = model.generate(**inputs, **settings).sequences
    with fk.patched(model, policies[0]):
        assert torch.equal(model.generate(**inputs, **settings).sequences, want)


def test_prompts_are_of_different_sizes(family):
    """The comparisons mean something: images differ, and so do rows."""
    images = [x.pixels for x in parts_of(prompts(family)["sizes in a batch"], Image)]
    assert len({x.tobytes() for x in images}) == len(images)
    inputs = family.prompt(prompts(family)["sizes in a batch"])
    assert (inputs["attention_mask"] == 0).any()
