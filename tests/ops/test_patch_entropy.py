"""`patch_entropy`: bits of a patch's grey levels, from bytes and from what an image processor makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from skimage.measure import shannon_entropy
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

from flowcut_kernels.ops import patch_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# CLIP's.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# float32 of a few bits: three roundings.
CLOSE = dict(rtol=0, atol=2e-6)


def draw(batch, channels, height, width):
    """Bytes: noise over all levels, over few levels, and none at all."""
    spread = torch.tensor([256, 9, 1])[torch.arange(batch) % 3].view(-1, 1, 1, 1)
    return (torch.rand(batch, channels, height, width) * spread + (256 - spread) // 2).to(torch.uint8)


def normalise(image, channels, dtype=torch.float32):
    mean, std = (torch.tensor(x[:channels])[:, None, None] for x in (MEAN, STD))
    return ((image / 255 - mean) / std).to(dtype)


def by_scikit_image(image, size):
    """The definition by other hands, patch by patch, from bytes."""
    grey = image[:, 0] if image.shape[1] == 1 else (image.double().mean(1) + 1e-9).round()
    patches = grey.unfold(1, size, size).unfold(2, size, size).flatten(1, 2)
    return torch.tensor([[shannon_entropy(x.numpy()) for x in row] for row in patches], dtype=torch.float32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(28, 42, 14), (9, 31, 4), (3, 5, 1), (45, 35, 33), (37, 37, 37), (66, 67, 65)]
)
def test_equals_scikit_image(backend, device, height, width, size, channels):
    image = draw(3, channels, height, width)
    entropy = patch_entropy(image.to(device), size, backend=backend)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(entropy.cpu(), by_scikit_image(image, size), **CLOSE)
    assert (entropy[2] == 0).all() and not entropy.signbit().any()


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_bytes_are_found_again(backend, device, channels):
    image = draw(3, channels, 29, 43).to(device)
    options = dict(patch_size=14, backend=backend)
    expected = patch_entropy(image, **options)
    pixels = normalise(image.cpu(), channels).to(device)
    assert torch.equal(patch_entropy(pixels, mean=MEAN[:channels], std=STD[:channels], **options), expected)
    assert torch.equal(patch_entropy(image / 255, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("height", "width", "size"), [(28, 42, 14), (8, 37, 4), (35, 34, 33)])
def test_every_byte_falls_as_in_the_definition(backend, device, height, width, size, dtype):
    """Pixels that are no bytes, many beyond 0..255: the forms differ by the rounding of a logarithm."""
    pixels = (1.5 * torch.randn(2, 3, height, width)).to(device, dtype)
    entropy = patch_entropy(pixels, size, mean=MEAN, std=STD, backend=backend)
    expected = patch_entropy(pixels, size, mean=MEAN, std=STD, backend="reference")
    torch.testing.assert_close(entropy, expected, **CLOSE)


def test_halves_go_to_even_and_the_mean_to_the_nearest(backend, device):
    """A patch of two pixels, told apart by their levels: 1 bit, or 0 where both fall on one."""
    for (a, b), bits in (
        (([0.5] * 3, [0] * 3), 0), (([1.5] * 3, [2.5] * 3), 0), (([0.5] * 3, [1.5] * 3), 1),
        (([-9] * 3, [0] * 3), 0), (([255.6] * 3, [300] * 3), 0), (([math.inf] * 3, [255] * 3), 0),
        (([1, 0, 0], [0, 0, 0]), 0), (([1, 1, 0], [1, 1, 1]), 0), (([1, 1, 0], [1, 0, 0]), 1),
    ):  # fmt: skip
        # Powers of two as mean and std, so that the numbers above arrive as they are.
        pixels = (torch.tensor([[a, b], [b, a]], dtype=torch.float32).permute(2, 0, 1)[None] - 255) / 510
        found = patch_entropy(pixels.to(device), 2, mean=[1.0] * 3, std=[2.0] * 3, backend=backend)
        assert found.item() == bits, (a, b)


def test_nan_marks_its_patch_alone(backend, device):
    pixels = normalise(draw(1, 3, 28, 70), 3).to(device)
    options = dict(mean=MEAN, std=STD, backend=backend)
    expected = patch_entropy(pixels, 14, **options)
    for place, patch in (((0, 0, 13, 13), 0), ((0, 1, 14, 69), 9), ((0, 2, 5, 30), 2)):
        broken = pixels.clone()
        broken[place] = math.nan
        found = patch_entropy(broken, 14, **options)
        assert found[0].isnan().nonzero().tolist() == [[patch]]
        assert torch.equal(found.nan_to_num(0), expected.index_fill(1, torch.tensor([patch], device=device), 0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["crop", "channels_last", "expanded", "columns_first"])
def test_strides(backend, device, layout, dtype):
    """Views into a buffer that holds NaN, or another byte, wherever no patch lies."""
    dense = draw(3, 3, 28, 42)
    dense = (dense if dtype == torch.uint8 else (dense / 255).to(dtype)).to(device)
    # Two lines and one column are beyond the last whole patch.
    frame = torch.full((3, 3, 33, 50), 77 if dtype == torch.uint8 else math.nan, device=device).to(dtype)
    if layout == "channels_last":
        frame = frame.to(memory_format=torch.channels_last)
    elif layout == "columns_first":
        frame = frame.mT.contiguous().mT
    view = frame[:, :, 3:, 2:45]
    view[:, :, :28, :42] = dense
    if layout == "expanded":
        view, dense = view[:1].expand(3, -1, -1, -1), dense[:1].expand(3, -1, -1, -1)
    found = patch_entropy(view, 14, backend=backend)
    assert torch.equal(found, patch_entropy(dense.contiguous(), 14, backend=backend))


@pytest.mark.parametrize(
    ("shape", "patches"), [((0, 3, 28, 28), 4), ((2, 1, 13, 28), 0), ((2, 3, 0, 0), 0), ((1, 1, 14, 14), 1)]
)
def test_sizes_at_the_edge(backend, device, shape, patches):
    for dtype in (torch.uint8, torch.float32):
        found = patch_entropy(torch.ones(shape, device=device).to(dtype), 14, backend=backend)
        assert found.shape == (shape[0], patches) and (found == 0).all()


def test_float64_has_the_reference():
    image = draw(2, 3, 28, 28)
    pixels = normalise(image, 3, torch.float64).requires_grad_()
    found = patch_entropy(pixels, 14, mean=MEAN, std=STD)
    assert torch.equal(found, patch_entropy(image, 14, backend="reference")) and not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_opcheck(dtype):
    shift = [] if dtype == torch.uint8 else [0.5] * 3
    opcheck(
        torch.ops.flowcut_kernels.patch_entropy.default,
        (draw(2, 3, 9, 13).to(dtype),),
        dict(patch_size=4, mean=shift, std=shift),
    )


def test_compiles_without_graph_break_or_recompile():
    """fullgraph, dynamic batch and image: two sizes, one compilation."""
    counter = CompileCounter()
    run = lambda x: patch_entropy(x, 4, mean=MEAN, std=STD)  # noqa: E731
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for batch, height, width in ((2, 9, 13), (5, 16, 21)):
        pixels = torch.randn(batch, 3, height, width, device=DEVICE)
        assert torch.equal(compiled(pixels), run(pixels))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pixels=torch.zeros(3, 8, 8)), r"pixels must be \[batch, channels"),
        (dict(pixels=torch.zeros(1, 2, 8, 8)), r"1 or 3 channels, got \(1, 2, 8, 8\)"),
        (dict(pixels=torch.zeros(1, 3, 8, 8, dtype=torch.int32)), "got torch.int32"),
        (dict(patch_size=0), "patch_size=0"),
        (dict(patch_size=4.0), "patch_size=4.0 must be a whole number"),
        (dict(mean=[0.5]), r"mean=\[0.5\] must be 3 numbers"),
        (dict(mean=0.5), "mean=0.5 must be 3 numbers"),
        (dict(std=[0.5] * 4), "std=.* must be 3 numbers"),
        (dict(std=(0.5, 0.0, 0.5)), r"std=\(0.5, 0.0, 0.5\) must be positive"),
        (dict(std=[math.nan] * 3), "std=.* must be positive"),
        (dict(pixels=torch.zeros(1, 3, 8, 8, dtype=torch.uint8), std=STD), "std is given but pixels are uint8"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else None,
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        patch_entropy(**(dict(pixels=torch.zeros(1, 3, 8, 8), patch_size=4) | change))
