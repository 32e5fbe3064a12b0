"""Equal average tokens: budgets solved from the policies' own averages, published settings found again, refusals."""

import pytest

import flowcut_kernels as fk
from flowcut_kernels.bench.contenders import BEFORE, INSIDE, NAMES, contender, named
from flowcut_kernels.bench.names import LOOKS

PRESETS = [
    (fk.FastV, "FastV", 192),
    (fk.FastV, "FastV", 128),
    (fk.FastV, "FastV", 64),
    (fk.PyramidDrop, "PyramidDrop", 270),
    (fk.PyramidDrop, "PyramidDrop", 192),
    (fk.PyramidDrop, "PyramidDrop", 128),
    (fk.PyramidDrop, "PyramidDrop", 64),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("layers", "tokens", "average"), [(32, 576, 192), (32, 576, 64), (12, 400, 132), (12, 400, 44), (28, 729, 182)]
)
def test_average_is_what_was_asked_for(name, layers, tokens, average):
    policy = contender(name, average, layers, tokens)
    reached = policy.average_tokens(layers, tokens)
    assert reached <= average + max(0.5, 0.01 * average)
    assert reached == average if name in BEFORE else reached > average - 1.5
    policy.check_decoder(layers)


@pytest.mark.parametrize(("kind", "name", "average"), PRESETS)
def test_presets_are_found_again(kind, name, average):
    assert contender(name, average, 32, 576) == kind.preset(average)


def test_layers_scale_with_depth():
    assert contender("SparseVLM", 132, 12, 400).layers == (1, 2, 5)
    assert contender("SparseVLM", 44, 12, 400).layers == (0, 2, 5)
    assert contender("FastV", 132, 12, 400).layer == 2
    assert contender("FastV", 44, 12, 400).layer == 1
    assert contender("PyramidDrop", 132, 12, 400).layers == (3, 6, 9)
    assert contender("PyramidDrop", 44, 12, 400).layers == (1, 2, 3)
    assert contender("SparseVLM", 192, 32, 576).layers == (2, 6, 15)
    assert contender("SparseVLM", 200, 3, 324).layers == (0, 1)
    assert contender("FastV", 300, 2, 400).layer == 1


@pytest.mark.parametrize(
    ("name", "arithmetic"),
    [
        ("FastV", "(400 + 11 * 1) / 12 = 34.2"),
        ("PyramidDrop", "(400 + 54 + 7 + 9 * 1) / 12 = 39.2"),
        ("SparseVLM", "(400 + 2 * 16 + 3 * 3 + 6 * 2) / 12 = 37.8"),
    ],
)
def test_out_of_reach_says_why(name, arithmetic):
    with pytest.raises(ValueError, match=f"{name} cannot keep 24 of 400 tokens on average") as error:
        contender(name, 24, 12, 400)
    assert str(error.value).endswith(arithmetic)


def test_names():
    """Every one once, with a look; random draws by its seed, and nothing else does; a name that is none is refused."""
    assert sorted(NAMES) == sorted((*BEFORE, *INSIDE)) and set(NAMES) <= set(LOOKS)
    for name in NAMES:
        same = contender(name, 132, 12, 400, 1) == contender(name, 132, 12, 400, 2)
        assert same == (name != "random")
    with pytest.raises(ValueError, match="name='guess' is unknown: use one of FlowCut, "):
        contender("guess", 64, 32, 576)


def test_names_on_a_command_line():
    assert named("FlowCut,CLS attention") == named("flowcut, cls-attention") == ("FlowCut", "CLS attention")
    with pytest.raises(ValueError, match="'flowcutt' is unknown: use flowcut, flowcut-release"):
        named("flowcut,flowcutt")
