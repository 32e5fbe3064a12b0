"""Every family of ``zoo`` through the same tests."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import accelerate
import PIL.Image
import pytest
import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from oracle import Oracle
from torch.testing import assert_close
from transformers import pipeline
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from zoo import POLICIES, Family, Image, Video, families, parts_of

import flowcut_kernels as fk
from flowcut_kernels.tune import Objective

EVERYTHING = (fk.FlowCut(10**6), fk.FlowCut(retain_ratio=1.0), fk.VFlowOpt(10**6), fk.UniformTokens(10**6))
STEPS = 3
WRITTEN = dict(max_new_tokens=STEPS, min_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
GREEDY = WRITTEN | dict(do_sample=False)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Nothing here is large enough for two, which would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
        "interleaved": [[3, one, 4, 5, other, 6], [7, 8, third]],
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


PRUNING = {
    "flowcut": fk.FlowCut(12),
    "flowcut llm": fk.FlowCut(9, llm_layer=1),
    "hybrid": fk.FlowCut(retain_ratio=0.1, recycle_cell=2.5, llm_stages=((2, 0.5),)),
    "vflowopt": fk.VFlowOpt(
        retain_ratio=0.3,
        hub_threshold=1.6,
        entropy_weight=3.0,
        recycle_cell=2.5,
        llm_stages=((2, 0.5),),
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.5,) * 3,
    ),
    "attention": fk.AttentionTokens(13),
    "uniform": fk.UniformTokens(13),
    "one token": fk.FlowCut(1),
    "fastv": fk.FastV(7, layer=1),
    "pyramiddrop": fk.PyramidDrop(7, layers=(1, 3)),
    "sparsevlm": fk.SparseVLM(5, layers=(0, 1), surplus=(2,)),
    "visionzip": fk.VisionZip(13, contextual_share=0.4),
    "random": fk.RandomTokens(13),
}
# RMSNorm, rotary tables and the logits of generate are fp32 in an fp64 model.
CLOSE = dict(rtol=1e-4, atol=5e-5)


def policies_of(family: Family) -> dict[str, fk.policies.base.Policy]:
    """What the family takes, before the language model alone where that cannot be cut."""
    found = {name: policy for name, policy in PRUNING.items() if isinstance(policy, family.policies)}
    if not family.prunes_llm:
        found.pop("flowcut llm")
        found |= {name: dataclasses.replace(PRUNING[name], llm_stages=()) for name in ("vflowopt", "hybrid")}
    if "visionzip" in found and "video" in family.kinds:  # whose frames bring their class tokens along
        found["visionzip"] = dataclasses.replace(PRUNING["visionzip"], class_token=False)
    return found


def test_every_policy_is_here():
    assert {type(policy) for policy in PRUNING.values()} == {*POLICIES}


def test_what_is_not_defined_is_refused(family):
    """With the reason, and the model is as it was."""
    model, served = family.model(), policies_of(family)
    for name, policy in PRUNING.items():
        if served.get(name) == policy:
            continue
        words = family.refuses.get(type(policy)) or family.refuses.get(fk.FastV) or "set class_token=False"
        with pytest.raises(ValueError, match=words):
            fk.patch(model, policy)
        assert "_flowcut_patch" not in vars(model) and not any("forward" in vars(x) for x in model.modules())


def first_policy(family: Family) -> fk.policies.base.Policy:
    """FlowCut, or what the family has."""
    return next(iter(policies_of(family).values()))


def served() -> Iterator[Any]:
    """Families and names of policies. Random tokens are a uniform grid but for the choice: two families will do.

    Some drop at the places where FlowCut does, and differ in what they choose, which transformers has no part in.
    """
    for family in families():
        for name in policies_of(family):
            if name != "random" or str(family) in ("llava_next", "qwen2_5_vl"):  # voids, windows
                choice = name in ("attention", "uniform", "one token", "random")
                marks = [pytest.mark.any_transformers] * choice
                yield pytest.param(family, name, id=f"{family}-{name}", marks=marks)


# Prompts that are like others but for what no policy sees: two policies have them all.
ALIKE, THOROUGH = ("sizes in a batch", "text alone", "a video"), ("flowcut", "vflowopt")


@pytest.mark.parametrize(("family", "policy"), [*served()], indirect=["family"])
@torch.no_grad()
def test_every_logit(family, policy):
    """Of a batch padded on either side and of every decoding step: those of each row alone, by the oracle."""
    chosen = {name: rows for name, rows in prompts(family).items() if policy in THOROUGH or name not in ALIKE}
    policy, model = policies_of(family)[policy], family.model(dtype=torch.float64)
    oracle = Oracle(family, policy)
    for name, rows in chosen.items():
        inputs = {side: given(family, rows, side, torch.float64) for side in ("left", "right")}
        if inputs["left"]["attention_mask"].all():  # the other side is the same
            del inputs["right"]
        with fk.patched(model, policy):
            logits = {side: model(**inputs[side]).logits for side in inputs}
            out = model.generate(**inputs["left"], **GREEDY)
        length = inputs["left"]["input_ids"].shape[1]
        assert torch.equal(out.sequences[:, :length], inputs["left"]["input_ids"])
        for i, row in enumerate(rows):
            want, _ = oracle(row, out.sequences[i, length:])
            want, steps = want[:-STEPS], want[-STEPS - 1 : -1]
            places = dict(left=slice(-len(want), None), right=slice(len(want)))
            found = {side: (logits[side][i, places[side]], want) for side in inputs}
            found["steps"] = torch.stack([step[i] for step in out.logits]), steps
            for way, (got, expected) in found.items():
                assert_close(got.double(), expected, **CLOSE, msg=lambda m, at=(name, i, way): f"{at}: {m}")


@pytest.mark.any_transformers
@torch.no_grad()
def test_the_oracle_can_tell(family):
    """Policies and budgets give different logits: the comparisons mean something."""
    row = prompts(family)["one image"][0]
    policies = [*policies_of(family).values(), *(p for p in EVERYTHING[1:3] if isinstance(p, family.policies))]
    last = [Oracle(family, policy)(row)[0][-1] for policy in policies]
    for i, one in enumerate(last):
        same = [policies[i] for i, other in enumerate(last[:i]) if (one - other).abs().max() < 0.05]
        assert not same or policies[i] in EVERYTHING, (policies[i], same)


def likelihood(oracle: Oracle, row: list, new: torch.Tensor) -> torch.Tensor:
    """Mean log probability of the tokens `new` behind a row."""
    steps = oracle(row, new)[0][-len(new) - 1 : -1].log_softmax(-1)
    return steps.gather(1, new[:, None]).mean()


@torch.no_grad()
def test_beams(family):
    """Scores of the beams that won are the probabilities of what they wrote."""
    policy, model, rows = first_policy(family), family.model(dtype=torch.float64), prompts(family)["sizes in a batch"]
    oracle, inputs = Oracle(family, policy), given(family, rows, dtype=torch.float64)
    with fk.patched(model, policy):
        out = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=2, output_scores=True)
    for i, (ids, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        assert_close(score.double(), likelihood(oracle, rows[i // 2], ids[-STEPS:]), **CLOSE)


@torch.no_grad()
def test_sampling(family):
    """By a seed, several answers to a row: every step's logits follow from what was written before."""
    policy, model, rows = first_policy(family), family.model(dtype=torch.float64), prompts(family)["image or none"]
    oracle, inputs, seen = Oracle(family, policy), given(family, rows, dtype=torch.float64), []
    with fk.patched(model, policy):
        for _ in range(2):
            torch.manual_seed(11)
            settings = WRITTEN | dict(do_sample=True, temperature=2.0, top_k=0, num_return_sequences=2)
            seen.append(model.generate(**inputs, **settings))
    assert torch.equal(seen[0].sequences, seen[1].sequences)
    assert len({tuple(ids[-STEPS:].tolist()) for ids in seen[0].sequences}) > len(rows)
    for i, ids in enumerate(seen[0].sequences):
        want = oracle(rows[i // 2], ids[-STEPS:])[0][-STEPS - 1 : -1]
        assert_close(torch.stack([step[i] for step in seen[0].logits]).double(), want, **CLOSE)


@torch.no_grad()
def test_conversation(family):
    """A second question goes on with the returned cache, and the images are not given again."""
    policy, model = first_policy(family), family.model(dtype=torch.float64)
    row, oracle = prompts(family)["interleaved"][0], Oracle(family, policy)
    with fk.patched(model, policy):
        first = model.generate(**given(family, [row], dtype=torch.float64), **GREEDY)
        written = first.sequences[0, -STEPS:].tolist()
        row = [*row, *written, 8, 9]
        whole = family.prompt([row])
        ids = whole["input_ids"]
        assert torch.equal(ids[:, :-2], first.sequences)
        text = {name: x for name, x in whole.items() if x.shape == ids.shape}
        second = model.generate(**text, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
    want = oracle(row, second.sequences[0, -STEPS:])[0][-STEPS - 1 : -1]
    assert_close(torch.cat(second.logits).double(), want, **CLOSE)


@torch.no_grad()
def answered(family: Family, model: Any, policies: list) -> list[tuple[torch.Tensor, list]]:
    """Logits behind the rows of a batch, of the stock model and under policies, each with its trace."""
    inputs, found = given(family, prompts(family)["sizes in a batch"], dtype=model.dtype), []
    found.append((model(**inputs).logits[:, -1], []))
    for policy in policies:
        with fk.patched(model, policy, record=True):
            found.append((model(**inputs).logits[:, -1], fk.trace(model).stages))
    return found


def test_precision(family):
    """As close to the fp64 model as the stock model is, where both keep the same; and any policy's budget is exact."""
    policies = [policies_of(family).get(name) for name in ("flowcut", "flowcut llm", "vflowopt")]
    policies = [policy for policy in (*policies, fk.RandomTokens(13)) if isinstance(policy, family.policies)]
    (exact, _), *others = answered(family, family.model(dtype=torch.float64), policies)
    for dtype, attention in itertools.product((torch.float32, torch.bfloat16), ("sdpa", "eager")):
        (stock, _), *pruned = answered(family, family.model(attention, dtype), policies)
        noise = (stock - exact).abs().mean()
        for policy, (logits, stages), (reference, wanted) in zip(policies, pruned, others, strict=True):
            error = (logits - reference).abs().mean()
            assert stages[-1].kept == wanted[-1].kept and error.isfinite()
            if all(torch.equal(a.indices, b.indices) for a, b in zip(stages, wanted, strict=True)):
                assert error < 3 * noise, (dtype, attention, policy)


@torch.no_grad()
def test_positions(family):
    """Read back from the tables of the last layer: what is left has the positions with which it entered."""
    if family.positions is not None:
        pytest.skip("positions of three axes: test_qwen_vl.py reads them back")
    policy = policies_of(family).get("flowcut llm") or first_policy(family)
    model, row, found = family.model(dtype=torch.float64), prompts(family)["interleaved"][0], []
    decoder, oracle = model.get_decoder(), Oracle(family, policy)
    _, columns = oracle(row)
    decoder.layers[-1].self_attn.register_forward_pre_hook(
        lambda _, args, given: found.append(given["position_embeddings"][0][0]), with_kwargs=True
    )
    inputs = given(family, [row], dtype=torch.float64)
    model(**inputs)
    with fk.patched(model, policy):
        model(**inputs)
    stock, ours = found  # [L, d] cosines; the stock model's are those of a contiguous prompt
    same = (ours[:, None] == stock).all(-1)
    assert same.any(1).all() and torch.equal(same.int().argmax(1), oracle.positions[0])
    assert len(columns) == len(ours) and torch.equal(ours, stock[: len(ours)]) == (not family.prunes_llm)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_what_is_inside_by_itself(family):
    """Without the model that reads prompts: refused where images come, rather than answered from what is left."""
    model, inputs = family.model(), given(family, prompts(family)["one image"])
    words = r"not its \.model|tokens do not match|elements of source|not divisible|out of bounds"  # by versions
    for policy in policies_of(family).values():
        with fk.patched(model, policy):
            with pytest.raises((ValueError, RuntimeError, IndexError), match=words):
                model.model(**inputs)
            text = model.model(**given(family, [[3, 4, 5]]))
            model(**inputs)
        assert torch.equal(text.last_hidden_state, model.model(**given(family, [[3, 4, 5]])).last_hidden_state)


@torch.no_grad()
def test_calibrated(family):
    """A schedule of the images of a prompt fits that prompt, and leaves as many of each tile and each image."""
    policy, model = PRUNING["flowcut"], family.model()
    inputs, kept = given(family, prompts(family)["sizes in a batch"]), []
    for each in (policy, fk.calibrate(model, policy, inputs)):
        with fk.patched(model, each, record=True):
            model(**inputs)
            kept.append({stage.name: stage.kept for stage in fk.trace(model).stages})
    assert each.schedule and kept[0] == kept[1]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.any_transformers
@torch.no_grad()
def test_defaults_of_torch(family):
    """Another default dtype, or a default device that is not the model's (as meta is), changes no answer."""
    row = [3, Image(112, 168), 5, 6]  # more tokens than bfloat16 has whole numbers, where images have tiles
    inputs, model = given(family, [row, prompts(family)["one image"][0]]), family.model()
    defaults: list[Any] = [partial(default_dtype, torch.bfloat16)]
    with suppress(NotImplementedError), torch.device("meta"):
        model(**inputs)
        defaults.append(partial(torch.device, "meta"))
    for policy in policies_of(family).values():
        policy = dataclasses.replace(policy, target_tokens=11, retain_ratio=None)  # that nobody remembers
        for default in defaults:
            with fk.patched(model, policy):  # which remembers nothing of the last time
                with default():
                    found = model(**inputs).logits
                assert torch.equal(found, model(**inputs).logits), (policy, default)


@torch.no_grad()
def test_threads(family, request):
    """That call one model at once get what each gets alone."""
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)
    model, rows = family.model(dtype=torch.float64), prompts(family)["sizes in a batch"]
    inputs = [given(family, [row], dtype=torch.float64) for row in rows] * 3

    @torch.no_grad()
    def answer(x: dict[str, Any]) -> torch.Tensor:
        return model.generate(**x, **GREEDY | dict(output_logits=False)).sequences

    with fk.patched(model, first_policy(family)), ThreadPoolExecutor(len(inputs)) as threads:
        want = [answer(x) for x in inputs[: len(rows)]] * 3
        assert all(map(torch.equal, threads.map(answer, inputs), want))


@torch.no_grad()
def test_trace(family):
    """Tokens of every tile, numbered row by row as the tile has them."""
    if fk.FlowCut not in family.policies:
        pytest.skip("nothing is dropped in its encoder")
    policy, model = PRUNING["flowcut"], family.model(dtype=torch.float64)
    oracle, rows = Oracle(family, policy), prompts(family)["interleaved"]
    tiles = [tile for row in rows for tile in oracle.visuals(oracle.inputs(row), "image").tiles]
    with fk.patched(model, policy, record=True):
        model(**given(family, rows, dtype=torch.float64))
        last = [stage for stage in fk.trace(model).stages if stage.name == "encoder"][-1]
    assert last.kept == [len(tile) for tile in tiles]
    for indices, tile in zip(last.indices, tiles, strict=True):
        assert indices[indices >= 0].tolist() == tile.tolist()


@torch.no_grad()
def test_trace_of_features_made_before(family):
    """It is theirs, whatever was encoded in between; of the stock model's it tells what the language model cut."""
    model, names = family.model(), inspect.signature(family.model().model.get_image_features).parameters
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers encodes no features beforehand")
    one, other = (family.prompt([[3, Image(*family.sizes[0], seed=seed), 5, 6]]) for seed in range(2))
    rest = {name: x for name, x in one.items() if not name.startswith("pixel_values")}

    def made(inputs: dict[str, Any]) -> dict[str, Any]:
        known = {name: x for name, x in inputs.items() if name in names}
        return dict(image=model.model.get_image_features(**known, return_dict=True))

    def stages() -> list:
        model(**rest, mm_encoder_outputs=features)
        return fk.trace(model).stages

    stock, cuts = made(one), [fk.FlowCut(9, llm_layer=1), fk.FastV(7, layer=1)] if family.prunes_llm else []
    for policy in (PRUNING["flowcut"], *cuts):
        with fk.patched(model, policy, record=True):
            features = stock if isinstance(policy, fk.FastV) else made(one)
            want = stages()
            made(other)
            found = stages()
        assert want and [stage.name for stage in found] == [stage.name for stage in want]
        assert all(torch.equal(a.indices, b.indices) for a, b in zip(found, want, strict=True))


@torch.no_grad()
def test_caches(family):
    """Every kind of cache, and none, gives the same answers, as far as it does with the stock model."""
    policy, model = first_policy(family), family.model(dtype=torch.float64)
    inputs = given(family, prompts(family)["sizes in a batch"], dtype=torch.float64)
    kinds = [{}, dict(use_cache=False), dict(cache_implementation="static", disable_compile=True)]

    def answers(kind: dict) -> torch.Tensor:
        return model.generate(**inputs, **GREEDY | dict(output_logits=False), **kind).sequences

    same = [kind for kind in kinds if torch.equal(answers(kind), answers({}))]
    assert len(same) > 1
    with fk.patched(model, policy):
        want = answers({})
        assert all(torch.equal(answers(kind), want) for kind in same)


@pytest.mark.parametrize("compact_cache", [False, True], ids=["whole", "compacted"])
@torch.no_grad()
def test_accepted_drafts(family, compact_cache, monkeypatch):
    """Assisted generation whose drafts are right from the first pass on, which brings them along with the prompt."""
    policy = fk.FastV(7, layer=1) if family.prunes_llm else first_policy(family)
    model, rows = family.model(dtype=torch.float64), prompts(family)["interleaved"][:1]
    inputs, drafted = given(family, rows, dtype=torch.float64), []

    class Drafts(PromptLookupCandidateGenerator):
        def get_candidates(self, input_ids, *args, **kwargs):
            drafted.append(input_ids.shape[1])
            written = want.sequences[:, -STEPS:][:, drafted[-1] - drafted[0] :]
            return torch.cat([input_ids, written[:, : STEPS - 1]], 1), None

    def differ() -> bool:
        nonlocal want
        drafted.clear()
        want = model.generate(**inputs, **GREEDY)
        out = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
        return not torch.allclose(torch.cat(out.logits), torch.cat(want.logits), **CLOSE)

    want: Any = None
    monkeypatch.setattr(transformers.generation.utils, "PromptLookupCandidateGenerator", Drafts)
    if differ():
        pytest.skip("the stock model's logits are others with drafts in the first pass")
    with fk.patched(model, policy, compact_cache=compact_cache):
        assert not differ() and len(drafted) < STEPS


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")
def test_training(family):
    """The loss of what is left, and the same gradients with checkpointed layers."""
    policy, gradients = first_policy(family), []
    inputs = given(family, prompts(family)["interleaved"], dtype=torch.float64)
    ids, text = inputs["input_ids"], inputs["attention_mask"].bool()
    for checkpointed in (False, True):
        model = family.model(dtype=torch.float64).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        for kind in family.kinds:
            text &= ids != getattr(model.config, f"{kind}_token_id")
        with fk.patched(model, policy):
            loss = model(**inputs, labels=ids.masked_fill(~text, -100), use_cache=False).loss
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    first = family.attention(family.layers(model)[0])
    assert all(p.grad.abs().max() > 0 for name, p in first.named_parameters() if name.endswith("weight"))
    assert gradients[0].keys() == gradients[1].keys() and loss.isfinite()
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_objective_of_a_search(family):
    """`tune` looks at the last token of each row, wherever its padding is and however masks are prepared."""
    policy, model, rows = first_policy(family), family.model(dtype=torch.float64), prompts(family)["image or none"]

    def last(row: list) -> torch.Tensor:
        inputs = given(family, [row], dtype=torch.float64)
        return model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]

    whole = torch.stack([last(row) for row in rows])
    with fk.patched(model, policy):
        left = torch.stack([last(row) for row in rows])
    for side in ("left", "right"):
        objective = Objective(model, given(family, rows, side, torch.float64))
        assert_close(objective.similarities(policy), torch.cosine_similarity(left, whole).double(), **CLOSE)


# Copies


@torch.no_grad()
def test_copies(family, tmp_path):
    """A copy of a patched model, pickled or not, is patched by itself; what is saved is the model without its patch."""
    policy, stock, model = first_policy(family), family.model(), family.model()
    inputs = given(family, prompts(family)["one image"])
    names, whole = list(stock.state_dict()), stock(**inputs).logits
    # transformers' own hooks, which come with the first call, do not pickle.
    pickled = pickle.loads(pickle.dumps(fk.patch(model, policy)))
    want = model(**inputs).logits
    assert want.shape != whole.shape and list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    for parameter in model.parameters():
        parameter.zero_()
    assert not torch.equal(model(**inputs).logits, want)
    for other in (twin, pickled):
        assert torch.equal(other(**inputs).logits, want)
        assert torch.equal(fk.unpatch(other)(**inputs).logits, whole)
    fk.unpatch(model)
    loaded = type(stock).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, whole)
    with fk.patched(loaded, policy):
        assert torch.equal(loaded(**inputs).logits, want)


# Other libraries


@pytest.mark.parametrize("place", ["cpu", pytest.param("disk", marks=pytest.mark.any_transformers)])
@torch.no_grad()
def test_hooks_of_accelerate(family, place, tmp_path):
    """A device map over several modules, which then run between hooks; weights on disk are loaded layer by layer."""
    # In fp64, as norms are rounded another way between hooks.
    policy, model = first_policy(family), family.model(dtype=torch.float64)
    inputs = given(family, prompts(family)["sizes in a batch"], dtype=torch.float64)
    settings = GREEDY | dict(output_logits=False)
    with fk.patched(model, policy):
        want, written = model(**inputs).logits, model.generate(**inputs, **settings).sequences
    whole = model(**inputs).logits
    layers = {*family.layers(model), *model.get_decoder().layers}
    places = {name: place for name, module in model.named_modules() if module in layers}
    rest = {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith(tuple(places))}
    places |= dict.fromkeys(rest, "cpu")
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    for _ in range(2):
        with fk.patched(model, policy):
            assert_close(model(**inputs).logits, want, **CLOSE)
            assert torch.equal(model.generate(**inputs, **settings).sequences, written)
        assert torch.equal(model(**inputs).logits, whole)
    fk.patch(model, policy)
    remove_hook_from_module(model, recurse=True)
    if place == "cpu":
        assert_close(model(**inputs).logits, want, **CLOSE)
    fk.unpatch(model)
    fk.unpatch(fk.patch(model, policy))


@torch.no_grad()
def test_pipeline(family):
    policy, model, processor = first_policy(family), family.model(), family.processor()
    image = PIL.Image.fromarray(Image(70, 90).pixels)
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    settings = dict(max_new_tokens=STEPS, do_sample=False)
    options = dict(text=f"w3 {processor.image_token} w5 w6", generate_kwargs=settings)
    whole = ask(images=image, **options)
    with fk.patched(model, policy, record=True):
        pruned = ask(images=image, **options)
        assert fk.trace(model).stages
        inputs = processor(images=[image], text=options["text"], return_tensors="pt")
        want = processor.tokenizer.decode(model.generate(**inputs, **settings)[0], skip_special_tokens=True)
    assert pruned[0]["generated_text"].split()[-STEPS:] == want.split()[-STEPS:]
    assert ask(images=image, **options) == whole
