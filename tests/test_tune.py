"""`tune`: budgets met exactly, an objective that is the model's own, studies that stop, go on and are shared."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import flowcut_kernels as fk
from flowcut_kernels.policies.stages import average_retention
from flowcut_kernels.tune import Objective, _Search

optuna = pytest.importorskip("optuna", reason="the tune extra is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

TESTS = Path(__file__).parent
LAYERS = 4
VFLOWOPT = fk.VFlowOpt(retain_ratio=0.25, hub_threshold=2.0, recycle_cell=3.0, llm_stages=((1, 1.0), (2, 1.0)))


@functools.cache
def model():
    return tiny.llava(text=dict(num_hidden_layers=LAYERS))


def prompt(words: list[int], seed: int) -> dict:
    ids = torch.tensor([[1] + [tiny.IMAGE] * tiny.PATCHES + words])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=tiny.images(1, seed=seed))


SAMPLES = [prompt([5, 6], 0), prompt([7, 8, 9], 1)]


def search(*args, **options):
    """`tune` on the tiny model, and what its trials were."""
    seen: list = []
    options = dict(progress=False, on_trial=lambda study, trial: seen.append(trial)) | options
    return fk.tune(model(), SAMPLES, *args, **options), seen


# The budget


@given(
    budget=st.floats(0.03, 0.9),
    gaps=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    places=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_every_draw_meets_the_budget(budget, gaps, places):
    """The last ratio is solved for; the others are drawn from what the budget leaves of their ranges."""
    depths = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    layers = depths.pop() + 1
    base = fk.VFlowOpt(retain_ratio=budget, llm_stages=tuple((depth, 1.0) for depth in depths))
    found = _Search(base, budget, layers, base.search_space(budget))
    policy = found.policy({name: place for name, place in zip(found.ratios[:-1], places, strict=False)})
    assert average_retention(policy.retain_ratio, policy.llm_stages, layers) == pytest.approx(budget, rel=1e-9)
    ratios = [policy.retain_ratio, *(ratio for _, ratio in policy.llm_stages)]
    assert all(0 < ratio <= 1 for ratio in ratios)
    assert budget * (1 - 1e-9) <= ratios[0] <= 1.5 * budget * (1 + 1e-9)
    start = found.policy(found.start)
    assert average_retention(start.retain_ratio, start.llm_stages, layers) == pytest.approx(budget, rel=1e-9)
    assert [start.retain_ratio, *(ratio for _, ratio in start.llm_stages)] == pytest.approx(
        [budget] + [1] * len(depths)
    )


def test_published_ratios_are_where_a_search_from_them_starts():
    """R1 and R2 of the released settings stay, R3 follows from their average."""
    released = fk.VFlowOpt.release(0.25)
    average = average_retention(released.retain_ratio, released.llm_stages, 28)
    found = _Search(released, average, 28, None)
    start = found.policy(found.start)
    assert start.retain_ratio == pytest.approx(released.retain_ratio)
    assert [r for _, r in start.llm_stages] == pytest.approx([r for _, r in released.llm_stages])
    assert set(found.start) == {"hub_threshold", "entropy_weight", "recycle_cell", "retain_ratio", "llm_stages.0"}


@pytest.mark.parametrize(
    ("policy", "space"),
    [
        (fk.FlowCut(3, llm_layer=1), dict(encoder_surplus=(1.0, 3.0))),
        (fk.FlowCut(3, llm_layer=0), dict(interval=(1, 3, "int"))),
        (fk.FastV(3, layer=1), dict(layer=(1, 3, "int"))),
        (fk.PyramidDrop(3, layers=(1, 4)), {"layers.1": (2, 9, "int")}),
        (fk.SparseVLM(3, layers=(0, 1), surplus=(3.0,)), {"surplus.0": (1.0, 4.0)}),
        (fk.VisionZip(3), dict(contextual_share=(0.05, 0.5))),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0.0, 0.7, 1.0])
def test_policies_that_cut_in_the_language_model_meet_the_budget(policy, space, place):
    """Whatever is drawn: what they keep in the end is solved for."""
    budget, layers, ((name, (low, high, *kind)),) = 0.4, 10, space.items()
    found = _Search(policy, budget, layers, space)
    drawn = low + place * (high - low)
    made = found.policy({name: int(drawn) if kind else drawn})
    assert made.average_tokens(layers, 10**6) == pytest.approx(budget * 10**6, abs=layers)
    start = found.policy(found.start)
    assert start.average_tokens(layers, 10**6) == pytest.approx(budget * 10**6, abs=layers)
    assert dataclasses.replace(start, target_tokens=3, retain_ratio=None) == policy


def test_spaces_name_what_has_an_effect():
    assert set(fk.FlowCut(8).search_space(0.1)) == {
        "criteria_weights.1", "criteria_weights.2", "history_weight", "interval", "entropy_exponent"
    }  # fmt: skip
    plain = fk.FlowCut(8, criteria=("attention",), cumulative=False, adaptive=False)
    assert set(plain.search_space(0.1)) == {"interval"}
    assert set(fk.VFlowOpt(8, recycle_cell=None).search_space(0.1)) == {"hub_threshold", "entropy_weight"}


# The objective


@pytest.mark.parametrize("side", ["alone", "left", "right"])
@pytest.mark.parametrize(
    "policy",
    [fk.FlowCut(retain_ratio=0.2), fk.FlowCut(12, llm_layer=1), dataclasses.replace(VFLOWOPT, llm_stages=((1, 0.5),))],
    ids=["encoder", "LLM layer", "stages"],
)
def test_objective_is_the_cosine_of_the_final_states(policy, side):
    """Against `output_hidden_states` on prompts alone; a batch is padded, one of its prompts has two images."""
    llava, image = model(), [tiny.IMAGE] * tiny.PATCHES
    rows = [[1, *image, 5, 6], [1, *image, 7, *image, 8, 9, 10], [1, *image, 11]]
    pixels = tiny.images(4, seed=3)
    parts = [pixels[:1], pixels[1:3], pixels[3:]]
    alone = [
        dict(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)), pixel_values=part)
        for row, part in zip(rows, parts, strict=True)
    ]
    states = []
    for active in (False, True):
        if active:
            fk.patch(llava, policy)
        with torch.no_grad():
            states.append(
                torch.cat(
                    [llava(**x, output_hidden_states=True, use_cache=False).hidden_states[-1][:, -1] for x in alone]
                )
            )
    fk.unpatch(llava)
    expected = torch.cosine_similarity(states[1], states[0], dim=1).mean().item()

    samples = alone
    if side != "alone":
        longest = max(map(len, rows))
        pad = [[tiny.PAD] * (longest - len(row)) for row in rows]
        ids = torch.tensor([p + r if side == "left" else r + p for r, p in zip(rows, pad, strict=True)])
        samples = [dict(input_ids=ids, attention_mask=(ids != tiny.PAD).long(), pixel_values=pixels)]
    objective = Objective(llava, samples)
    assert objective.unpruned.shape == (3, 32)
    torch.testing.assert_close(objective.unpruned, states[0].double(), rtol=1e-4, atol=1e-4)
    assert objective(policy) == pytest.approx(expected, abs=1e-5) and expected < 0.999
    assert not llava.get_decoder()._forward_hooks and "_flowcut_patch" not in vars(llava)


# Searches


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
@pytest.mark.parametrize("policy", [fk.FlowCut(3), None], ids=["FlowCut", "VFlowOpt"])
def test_best_trial_is_returned(policy, sampler, tmp_path):
    best, trials = search(0.25, 13, policy=policy, sampler=sampler)
    assert type(best) is (type(policy) if policy else fk.VFlowOpt)
    values = [trial.value for trial in trials]
    assert len(values) == 13 and max(values) > values[0]
    winner = max(trials, key=lambda trial: trial.value)
    assert type(best).from_json(winner.user_attrs["policy"]) == best
    # The first one is the policy as it was given, at the budget.
    first = type(best).from_json(trials[0].user_attrs["policy"])
    default = fk.VFlowOpt(retain_ratio=0.25, llm_stages=((1, 1.0), (3, 1.0)))
    wanted = dataclasses.asdict(default if policy is None else fk.FlowCut(retain_ratio=0.25))
    assert {k: pytest.approx(v) if k == "retain_ratio" else v for k, v in dataclasses.asdict(first).items()} == wanted
    llava = model()
    again = Objective(llava, SAMPLES)
    assert again(best) == pytest.approx(winner.value, abs=1e-6)
    best.to_json(tmp_path / "best.json")
    assert type(best).from_json(tmp_path / "best.json") == best


def test_unpruned_pass_runs_once(capsys):
    """And a bar tells how far the search is."""
    passes: list = []
    hook = model().get_decoder().register_forward_hook(lambda *_: passes.append(1))
    try:
        _, trials = search(0.25, 3, policy=fk.FlowCut(3), progress=True)
    finally:
        hook.remove()
    assert len(passes) == len(SAMPLES) * (1 + len(trials))
    bar = capsys.readouterr().err
    assert "3/3" in bar and f"best={max(trial.value for trial in trials):.4f}" in bar


def drawn(trials) -> list:
    return [(trial.number, trial.params, trial.value) for trial in trials]


@pytest.mark.parametrize("storage", ["sqlite:///{}/tune.db", "journal://{}/tune", "{}/tune.log"])
def test_a_study_goes_on_as_if_it_had_never_stopped(storage, tmp_path):
    storage = storage.format(tmp_path)
    whole, trials = search(0.25, 12, policy=fk.FlowCut(3), seed=4)
    assert drawn(search(0.25, 12, policy=fk.FlowCut(3), seed=4)[1]) == drawn(trials)
    _, first = search(0.25, 5, storage, policy=fk.FlowCut(3), seed=4)
    best, rest = search(0.25, 12, storage, policy=fk.FlowCut(3), seed=4)
    assert drawn(first + rest) == drawn(trials) and best == whole
    assert search(0.25, 12, storage, policy=fk.FlowCut(3))[1] == [], "finished already"
    for change, word in (
        (dict(policy=fk.FlowCut(3, relevance="softmax")), "'softmax'"),
        (dict(policy=fk.FlowCut(3), space=dict(interval=(1, 3, "int"))), "space"),
    ):
        with pytest.raises(ValueError, match=f"searches something else .*{word}.*study_name"):
            search(0.25, 13, storage, **change)
    assert len(search(0.25, 1, storage, policy=fk.FlowCut(3, interval=1), study_name="other")[1]) == 1
    with pytest.raises(ValueError, match="samples"):
        fk.tune(model(), SAMPLES[:1], 0.25, 13, storage, policy=fk.FlowCut(3), progress=False)


WORKER = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import test_tune, torch
import flowcut_kernels as fk
torch.set_num_threads(1)
best, trials = test_tune.search(0.25, 6, sys.argv[2], policy=fk.FlowCut(3))
print(json.dumps(dict(best=best.to_json(), numbers=[trial.number for trial in trials])))
"""


@pytest.mark.parametrize("storage", ["sqlite:///{}/tune.db", "journal://{}/tune.log"])
def test_two_workers_share_a_study(storage, tmp_path):
    storage = storage.format(tmp_path)
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]), OMP_NUM_THREADS="1"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(TESTS), storage],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    done = [worker.communicate(timeout=300) for worker in workers]
    for worker, (_, errors) in zip(workers, done, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    results = [json.loads(output.splitlines()[-1]) for output, _ in done]
    numbers = sorted(number for result in results for number in result["numbers"])
    assert numbers == list(range(len(numbers))) and 6 <= len(numbers) <= 7
    best, rest = search(0.25, 6, storage, policy=fk.FlowCut(3))
    assert rest == [] and best.to_json() in [result["best"] for result in results]


def test_ctrl_c_keeps_what_was_found(caplog):
    def stop(study, trial):
        if trial.number == 2:
            raise KeyboardInterrupt

    best, _ = search(0.25, 9, policy=fk.FlowCut(3), on_trial=stop)
    assert isinstance(best, fk.FlowCut) and "stopped after 3 of 9 trials" in caplog.text

    def at_once(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Objective, "__call__", at_once)
        search(0.25, 9, policy=fk.FlowCut(3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picky(fk.FlowCut):
    """Fails where a layer is skipped, and loses itself where history counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval > 2:
            raise ValueError("no layer may be skipped")

    def encoder_select(self, step, view):
        found = super().encoder_select(step, view)
        if self.history_weight != 0.5:
            view.value.fill_(math.nan)
        return found


def test_what_fails_in_a_trial_is_pruned_with_its_reason(caplog):
    best, trials = search(0.25, 8, policy=Picky(3))
    pruned = [trial for trial in trials if trial.state is optuna.trial.TrialState.PRUNED]
    assert len(trials) == 8 and len(pruned) == 7 and best == Picky(retain_ratio=0.25)
    for trial in pruned:
        assert trial.user_attrs["reason"] in caplog.text
    assert {"NaN" in trial.user_attrs["reason"] for trial in pruned} == {True, False}
    assert "no layer may be skipped" in caplog.text


def test_a_search_without_a_result_is_an_error(monkeypatch):
    def nothing(self, policy):
        raise ValueError("the cat sat on the image")

    monkeypatch.setattr(Objective, "__call__", nothing)
    with pytest.raises(RuntimeError, match="no trial succeeded: the cat sat on the image"):
        search(0.25, 2, policy=fk.FlowCut(3))


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(samples=[]), ValueError, "samples is empty"),
        (dict(samples=None), TypeError, "samples is NoneType; give processor output"),
        (dict(samples=["a prompt"]), TypeError, r"samples\[0\] is str without input_ids"),
        (dict(samples=[{k: x[:0] for k, x in SAMPLES[0].items()}]), ValueError, r"samples\[0\] holds no prompt: .*\(0"),
        (dict(samples=[dict(input_ids=torch.ones(1, 3))]), ValueError, r"samples\[0\] holds no pixel_values"),
        (dict(budget=0), ValueError, r"budget=0 must lie in \(0, 1\)"),
        (dict(budget=1.0), ValueError, r"budget=1.0 must lie in \(0, 1\)"),
        (dict(budget=math.nan), ValueError, "budget=nan must lie"),
        (dict(trials=0), ValueError, "trials=0 must be a whole number"),
        (dict(seed=-1), ValueError, "seed=-1 must be a whole number, at least 0"),
        (dict(on_trial=3), TypeError, "on_trial=3 must be a function"),
        (dict(sampler="grid"), ValueError, "sampler='grid' must be 'gp' or 'tpe'"),
        (dict(policy="FlowCut"), TypeError, "'FlowCut' is not a policy"),
        (dict(policy=fk.RandomTokens(3)), ValueError, "RandomTokens has no numbers to search"),
        (dict(policy=fk.FlowCut(3, schedule=((2, 9), (5, 3)))), ValueError, "tune first, calibrate the result"),
        (dict(policy=fk.FastV(3, layer=2), space=dict(layer=(1, 2, "int"))), ValueError, "leaves 0.5 .* even with a"),
        (dict(policy=fk.VFlowOpt(3, llm_stages=((1, 1.0), (4, 1.0)))), ValueError, "layer 4, but .* has 4 layers"),
        (dict(space={}), ValueError, "no numbers to search"),
        (dict(space=["interval"]), TypeError, r"space=\['interval'\] must map fields to their ranges"),
        (dict(space=dict(interval=(3, 1, "int"))), ValueError, r"\['interval'\]=\(3, 1, 'int'\) must be \(low, high"),
        (dict(space=dict(history_weight=(0.0, 1.0, "log"))), ValueError, "with low > 0, where low < high"),
        (dict(space=dict(interval=(1, 2.5, "int"))), ValueError, "of whole numbers"),
        (dict(space=dict(colour=(0, 1))), ValueError, "'colour', which is no number of FlowCut"),
        (dict(space={"criteria_weights.3": (0, 1)}), ValueError, "'criteria_weights.3', which is no number"),
        (dict(space=dict(relevance=(0, 1))), ValueError, "'relevance', which is no number"),
        (dict(space=dict(retain_ratio=(0.1, 0.2))), ValueError, "the budget decides the last ratio"),
        (dict(space=dict(history_weight=(0.6, 0.9))), ValueError, "history_weight=0.5 of the policy lies outside"),
        (dict(policy=VFLOWOPT, space=dict(retain_ratio=(0.1, 2.0))), ValueError, "within 0..1, for a ratio"),
        (
            dict(policy=VFLOWOPT, space=dict(retain_ratio=(0.05, 0.2))),
            ValueError,
            r"retain_ratio would have to lie in 0.25..0.\d+ for an average of 0.25 .*, but may only in 0.05..0.2",
        ),
        (
            dict(policy=dataclasses.replace(VFLOWOPT, retain_ratio=0.3), space={"llm_stages.0": (0.1, 0.2)}),
            ValueError,
            "retain_ratio would have to lie in .* over 4 layers, but may only in 0.3..0.3",
        ),
        (dict(storage=5), TypeError, "storage=5 must be a URL, a journal file's path or an Optuna storage"),
        (dict(storage="tune"), ValueError, "storage='tune' must be a URL such as sqlite:///tune.db, or a journal file"),
    ],
)  # fmt: skip
def test_bad_input(change, error, words):
    arguments = dict(samples=SAMPLES, budget=0.25, trials=2, policy=fk.FlowCut(3), progress=False) | change
    with pytest.raises(error, match=words):
        fk.tune(model(), **arguments)


@pytest.mark.parametrize(
    ("storage", "words"),
    [("sqlite:////no/such/tune.db", "cannot be opened: .*unable to"), ("/no/such/tune.log", "opened: .*No such file"),
     ("sqlight:///tune.db", "opened: Can't load plugin: .*sqlight")],
)  # fmt: skip
def test_storages_that_cannot_be_opened(storage, words, monkeypatch):
    """Are tried again, as another worker may be making them, before anything runs."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(Objective, "_states", None)
    with pytest.raises(ValueError, match=words):
        search(0.25, 2, storage)
    assert len(waits) == (4 if "sqlite" in storage else 0)


def test_models_that_cannot_be_tuned():
    with pytest.raises(TypeError, match="CLIPVisionModel has no language model"):
        fk.tune(tiny.clip_tower(), SAMPLES, progress=False)
    llava = fk.patch(copy.deepcopy(model()), fk.FlowCut(8))
    with pytest.raises(ValueError, match="already patched"):
        fk.tune(llava, SAMPLES, progress=False)
    broken = copy.deepcopy(model())
    with torch.no_grad():
        broken.get_decoder().norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"prompts \[0, 1\] hold NaN"):
        fk.tune(broken, SAMPLES, progress=False)


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'flowcut-kernels\[tune\]'"):
        search(0.25, 2)
