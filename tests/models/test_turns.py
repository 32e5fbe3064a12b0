"""Who calls a patched model while it answers somebody else: from a callback, from another thread, from a hook."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from zoo import Family, Image, families

import flowcut_kernels as fk

GREEDY = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False)
TILED = [family for family in families() if family.name in ("idefics3", "internvl", "llava_next")]
POLICIES = (fk.FlowCut(12, llm_layer=1), fk.VFlowOpt(retain_ratio=0.3, counts="release"))


class Callback:
    """All of the kinds that `generate` takes."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.call()
        return scores

    def put(self, value: torch.Tensor) -> None:
        self.call()

    def end(self) -> None:
        self.call()


def callbacks(call: Any) -> dict[str, Any]:
    def goes_on(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        call()
        return torch.zeros(len(ids), dtype=torch.bool)

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        call()
        return list(range(3, 90))

    both = Callback(call)
    return dict(streamer=both, logits_processor=[both], stopping_criteria=[goes_on], prefix_allowed_tokens_fn=allowed)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("family", TILED, ids=str)
@torch.no_grad()
def test_callbacks_may_call_the_model(family: Family, policy: Any):
    """About other images, of other sizes, by `forward` and by `generate`; each answer is the one it has alone."""
    model, (one, other, third) = family.model(dtype=torch.float64), (Image(*size) for size in family.sizes)
    outer = family.prompt([[3, one, 5, 6]])
    inner = family.prompt([[3, third, 4, other, 7, 8, 9]])
    for inputs in (outer, inner):
        inputs |= {name: x.double() for name, x in inputs.items() if name.startswith("pixel_values")}
    found = []

    def ask(turn: int) -> None:
        way = (len(found) + turn) % 2
        found.append((way, answer[way]()))

    answer = (lambda: model(**inner, use_cache=False).logits, lambda: model.generate(**inner, **GREEDY))
    with fk.patched(model, policy, record=True):
        want = [each() for each in answer]
        # Calls go the two ways in turn, and each kind of callback goes both: a step makes an even number of calls.
        for turn, (given, cached) in enumerate(((outer, True), (outer, False), (family.prompt([[3, 4, 5]]), True))):
            settings = GREEDY | dict(use_cache=cached)
            alone = model.generate(**given, **settings, **callbacks(lambda: None))
            kept = [stage.kept for stage in fk.trace(model).stages]
            found.clear()
            asking = callbacks(partial(ask, turn))
            assert torch.equal(model.generate(**given, **settings, **asking), alone)
            assert len(found) > 8 and all(torch.equal(got, want[way]) for way, got in found)
            assert [stage.kept for stage in fk.trace(model).stages] == kept


@pytest.mark.parametrize("family", TILED, ids=str)
@torch.no_grad()
def test_callbacks_may_wait_for_another_thread(family: Family):
    """That answers with the same model."""
    model, images = family.model(dtype=torch.float64), [Image(*size) for size in family.sizes[1:]]
    prompts = [family.prompt([[3, image, 5, 6]]) for image in images]
    for inputs in prompts:
        inputs |= {name: x.double() for name, x in inputs.items() if name.startswith("pixel_values")}
    with fk.patched(model, POLICIES[0]), ThreadPoolExecutor(1) as threads:
        alone = [model.generate(**inputs, **GREEDY, **callbacks(lambda: None)) for inputs in prompts]
        found = []

        def ask() -> None:
            asked = threads.submit(model.generate, **prompts[1], **GREEDY, **callbacks(lambda: None))
            found.append(asked.result(timeout=60))

        assert torch.equal(model.generate(**prompts[0], **GREEDY, **callbacks(ask)), alone[0])
        assert found and all(torch.equal(x, alone[1]) for x in found)


@pytest.mark.parametrize("family", TILED, ids=str)
@torch.no_grad()
def test_hooks_that_call_their_model_are_refused(family: Family):
    """What it knows of the prompt at hand would be another's; afterwards the model is as it was."""
    model, inputs = family.model(), family.prompt([[3, Image(*family.sizes[2]), 5, 6]])
    other = family.prompt([[3, Image(*family.sizes[1]), 5, 6]])
    for module in (family.layers(model)[0], model.get_decoder().layers[0]):
        for name in ("forward", "generate"):
            with fk.patched(model, POLICIES[0]):
                want = model(**inputs).logits
                hook = module.register_forward_pre_hook(lambda *_, name=name: getattr(model, name)(**other) and None)
                with pytest.raises(RuntimeError, match="was called while it runs, by a hook of its own"):
                    model(**inputs)
                with pytest.raises(RuntimeError, match="was called while it runs, by a hook of its own"):
                    model.generate(**inputs, **GREEDY)
                hook.remove()
                assert torch.equal(model(**inputs).logits, want)
