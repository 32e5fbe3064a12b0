"""Lists of digits: how they are scored, and that every policy's are those that `generate` writes under it."""

import pytest
import torch

import flowcut_kernels as fk

pytest.importorskip("typer", reason="the bench extra is not installed")

from flowcut_kernels.bench.mini_vlm import model as mini
from flowcut_kernels.bench.mini_vlm.quiz import lists

from flowcut_kernels.bench import charts, contenders, generation, tables
from flowcut_kernels.bench.shapes import patches_of


def untrained(dtype=torch.float32):
    """Random weights, the same every time."""
    return mini.build(0).to(dtype).eval(), mini.processor()


@pytest.mark.parametrize(
    ("said", "answer", "right", "f1"),
    [
        ("3 7 9", "3 7 9", 1, 1),
        ("9 7 3", "3 7 9", 0, 1),  # the order counts for the whole, not for the set
        ("3 3 7 9", "3 7 9", 0, 1),
        ("3 7", "3 7 9", 0, 0.8),  # precision 1, recall 2/3
        ("3 red", "3", 0, 2 / 3),  # precision 1/2, recall 1
        ("1 2", "3", 0, 0),
        ("", "3", 0, 0),
    ],
)
def test_scores(said, answer, right, f1):
    assert generation.scores(said, answer) == (right, pytest.approx(f1))


def test_lists_are_what_generate_writes():
    """Batches of different lengths, the seed of each; rows that cannot be reached have no answers."""
    names, shares = ("FlowCut", "FastV", "random"), (0.6, 0.01)
    section = generation.measure(
        questions=3, batch=2, policies=names, shares=shares, stand_in=(untrained, lists), command=""
    )
    model, processor = untrained()
    asked, tokens = lists("dev", 3, 0), patches_of(model.config.vision_config)
    layers = model.config.get_text_config().num_hidden_layers
    longest = max(len(question.answer.split()) for question in asked)
    assert len(section.rows) == 1 + len(names) * len(shares)
    for row in section.rows[1:4]:
        found = []
        for i, question in enumerate(asked):
            policy = contenders.contender(row["policy"], row["tokens"], layers, tokens, i // 2)
            inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
            with fk.patched(model, policy):
                output = model.generate(**inputs, max_new_tokens=longest + 1, do_sample=False)
            said = processor.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            found.append(generation.scores(said, question.answer))
        exact, f1 = torch.tensor(found).mean(0).tolist()
        assert (row["accuracy"], row["f1"]) == (pytest.approx(exact), pytest.approx(f1))
    (row,) = (row for row in section.rows if "unreachable" in row)
    assert row["policy"] == "FastV" and "f1" not in row and f"not reachable: {row['unreachable']}" in section.notes
    assert [chart.title.split(" against")[0] for chart in charts.charts(section, {})] == [
        "Lists that are right",
        "Against FlowCut",
        "Digits that are found",
    ]
    assert tables.cells(tables.views(section)[0], row)[2:] == ["not reachable", *[tables.DASH] * 4]
