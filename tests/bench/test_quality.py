"""Questions put to the stand-in under every policy, one prompt each where the policy reads it; and ablations."""

import dataclasses

import pytest
import torch

import flowcut_kernels as fk
from flowcut_kernels.policies.flowcut import CRITERIA

pytest.importorskip("typer", reason="the bench extra is not installed")

from flowcut_kernels.bench.mini_vlm import model as mini
from flowcut_kernels.bench.mini_vlm.quiz import questions

from flowcut_kernels.bench import ablation, contenders, quality, tables
from flowcut_kernels.bench.shapes import patches_of

LAYERS = mini.config().text_config.num_hidden_layers
TOKENS = patches_of(mini.config().vision_config)
HALF = TOKENS // 2
CLOSE = dict(rtol=0, atol=3e-6)  # norms and rotations of the language model are in float32
BY_PROMPT = {
    "SparseVLM": fk.SparseVLM(target_tokens=20, layers=(0, 1), surplus=(2.0,)),
    "PyramidDrop": fk.PyramidDrop(target_tokens=20, layers=(1, 2)),
    "FastV": fk.FastV(target_tokens=20, layer=1),
    "FlowCut in the language model": fk.FlowCut(target_tokens=20, llm_layer=1),
}
BY_SCENE = {
    **{name: contenders.BEFORE[name](HALF, 0) for name in contenders.BEFORE},
    "VFlowOpt in stages": fk.VFlowOpt(target_tokens=HALF, llm_stages=((1, 0.5),)),
}


def untrained(dtype=torch.float32):
    """Random weights, the same every time."""
    return mini.build(0).to(dtype).eval(), mini.processor()


STAND_IN = untrained, questions


@pytest.fixture
def unchecked(monkeypatch):
    """Both ways to put questions are compared elsewhere."""
    monkeypatch.setattr(quality, "refcheck", lambda *args: "ok")


@pytest.mark.parametrize("name", BY_PROMPT)
@torch.no_grad()
def test_a_prompt_for_each_question(name):
    """Scenes that are encoded once and prompts of several lengths side by side: as each prompt alone."""
    model, processor = untrained(torch.float64)
    asked = questions("dev", 4, 3, 2)
    asked[1] = dataclasses.replace(asked[1], prompt="<image> how many digits")  # a word less than others
    exam = quality.Exam.of(asked, processor)
    assert exam.last.unique().numel() > 1
    calls = []
    model.model.vision_tower.register_forward_hook(lambda tower, args, output: calls.append(len(output[0])))
    with fk.patched(model, BY_PROMPT[name]):
        answering = quality.answering(model, BY_PROMPT[name])
        found = answering(model, exam.pixels.double(), exam.ids, exam.last).flatten(0, 1)
        assert sum(calls) == (4 if name.startswith("FlowCut") else 2)
        for question, logits in zip(asked, found, strict=True):
            inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
            inputs["pixel_values"] = inputs["pixel_values"].double()
            torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits[0, -1], logits, **CLOSE)
        by_scene = quality.answers(model, exam.pixels.double(), exam.ids, exam.last).flatten(0, 1)
        assert not torch.allclose(by_scene, found, **CLOSE)


@pytest.mark.parametrize("name", BY_PROMPT | BY_SCENE)
def test_who_reads_the_question(name):
    policy = (BY_PROMPT | BY_SCENE)[name]
    assert quality.reads_question(policy, LAYERS, TOKENS) == (name in BY_PROMPT)


def test_what_cannot_be_reached_is_said(unchecked):
    """Every policy has its row at every budget; the paired differences leave out those without an answer."""
    names = ("FlowCut", "FastV", "random")
    section = quality.measure(
        questions=4, per_scene=2, shares=(0.6, 0.01), policies=names, stand_in=STAND_IN, command=""
    )
    few = max(1, round(0.01 * TOKENS))
    assert [(row["policy"], row["tokens"]) for row in section.rows[1:]] == [
        *((name, round(0.6 * TOKENS)) for name in names), *((name, few) for name in names),
    ]  # fmt: skip
    (row,) = (row for row in section.rows if "unreachable" in row)
    assert (row["policy"], row["tokens"]) == ("FastV", few) and "accuracy" not in row
    assert f"not reachable: {row['unreachable']}" in section.notes and f"keep {few} of {TOKENS}" in row["unreachable"]
    main, kinds = tables.views(section)
    assert tables.cells(main, row)[3] == "not reachable" and {*tables.cells(kinds, row)[2:]} == {tables.DASH}
    for row in (row for row in section.rows[1:] if "unreachable" not in row):
        assert row["average"] == pytest.approx(row["tokens"], abs=1.5)
        assert ("over_random" in row) == (row["policy"] != "random")


def test_attention_alone_is_named_where_it_wins():
    row = dict(tokens=36, policy="CLS attention", over_flowcut=0.05, over_flowcut_low=0.01, over_flowcut_high=0.09)
    assert "attention alone beats FlowCut beyond chance: CLS attention at 36" in quality.verdict([row])
    assert "attention alone beats FlowCut beyond chance: at no budget" in quality.verdict(
        [row | dict(over_flowcut_low=-0.01)]
    )


@pytest.mark.parametrize("of", ablation.POLICIES)
def test_every_cell_of_an_ablation(of, unchecked):
    section = ablation.measure(of=of, questions=2, per_scene=2, shares=(0.06,), stand_in=STAND_IN, command="")
    assert not section.failed
    variants = [row["variant"] for row in section.rows]
    assert len(set(variants)) == len(variants) and "over_default" not in section.rows[1]
    assert all(-1 <= row["over_default"] <= 1 for row in section.rows[2:])
    assert all(row["average"] == pytest.approx(row["tokens"], abs=0.5) for row in section.rows[1:])
    if of == "flowcut":
        score = [row["variant"] for row in section.rows if row["part"] == "score"]
        assert len(score) == 7 * 2 * 2 and score[0] == "default"
        assert {f"criteria={name}" for name in CRITERIA} < {*score}
        assert "criteria=attention+value_norm, cumulative=False, adaptive=False" in score
        assert {"interval=1", "interval=4", "interval=6", "history_weight=0.0", "history_weight=0.75"} < {*variants}
        same = {row["variant"]: row["accuracy"] for row in section.rows}
        assert same["history_weight=0.0"] == same["cumulative=False"]
    else:
        assert {"entropy_weight=1.0", "entropy_weight=-1.0", "recycle_cell=None", "recycle_cell=2.0"} < {*variants}
        assert sum(name.startswith("llm_stages=") for name in variants) == 6


def test_ablation_says_which_criterion_ties():
    differences = dict(attention=(0.01, 0.03), relevance=(-0.04, -0.02), value_norm=(-0.01, 0.01))
    rows = [
        dict(variant=f"criteria={name}", tokens=36, over_default=0.0, over_default_low=low, over_default_high=high)
        for name, (low, high) in differences.items()
    ]
    first, second = ablation.verdict(rows)
    assert first.endswith(": attention ahead, relevance behind, value_norm not told apart")
    assert "ahead of the default: criteria=attention. Behind it: criteria=relevance. Not told apart: 1 of 3" in second
