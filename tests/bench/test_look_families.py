"""Pictures of families that cut images into tiles or pack them: what is drawn, and where, is what the model did."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature, Qwen2VLImageProcessorPil
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

import flowcut_kernels as fk
from flowcut_kernels.ops import anchor_stats

pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import zoo
from tiny import IMAGE
from typer.testing import CliRunner
from zoo import idefics3, internvl, llava_next, llava_onevision, qwen2_vl

from flowcut_kernels.bench import look as looking
from flowcut_kernels.bench.commands import app
from flowcut_kernels.bench.look_page import write_page

# Image processors, sizes of a picture (right and down), and rows of the tiles that it must be cut into.
QWEN = qwen2_vl.PATCHES, (80, 48), [[0]]
FAMILIES = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "llava_next": (llava_next.processor().image_processor, (100, 60), [[1, 2], [3, 4]]),
    "llava_onevision": (llava_onevision.IMAGES, (90, 168), [[1, 2], [3, 4]]),
    "internvl": (internvl.IMAGES, (100, 150), [[0, 1], [2, 3], [4, 5]]),
    "idefics3": (idefics3.IMAGES, (90, 112), [[0, 1], [2, 3]]),
}


@dataclass(frozen=True)
class Picture(zoo.Image):
    """A picture of its own as an image of a prompt."""

    shown: Image.Image | None = None

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(self.shown)


class Reader:
    """What a family's processor is to `look`: words "w3", "<image>", and pictures as the zoo prepares them."""

    image_token = "<image>"

    def __init__(self, name: str) -> None:
        self.family = next(family for family in zoo.families() if family.name == name)
        self.tokenizer, self.image_processor = zoo.tokenizer(), FAMILIES[name][0]

    def __call__(self, images, text, return_tensors, **_):
        shown = iter(images if isinstance(images, list) else [images])
        (words,) = [text] if isinstance(text, str) else text
        row = []
        for word in self.tokenizer(words)["input_ids"]:
            picture = next(shown) if word == IMAGE else None
            row.append(word if picture is None else Picture(picture.height, picture.width, shown=picture))
        return BatchFeature(self.family.prompt([row]))


def picture(name: str) -> Image.Image:
    """Dark, so that what is washed out differs from what is not."""
    width, height = FAMILIES[name][1]
    return Image.fromarray(np.random.default_rng(5).integers(0, 60, (height, width, 3), np.uint8))


def ready(name: str):
    """A family's model, reader, and `look.Shown`."""
    reader = Reader(name)
    model = reader.family.model()
    return model, reader, looking.show(model, reader, picture(name), name, "w5")


def stages(model, shown, policy):
    """What `fk.trace` says of a pass by itself."""
    with fk.patched(model, policy, record=True):
        model.generate(**shown.inputs, max_new_tokens=2, do_sample=False)
        return fk.trace(model).stages, fk.trace(model).entropy


class Noting(fk.FlowCut):
    """Notes the statistics of every layer it looks at, each where the policy is told that its token is."""

    def encoder_select(self, step, view):
        query, anchor = view.anchor("cls" if view.protect else "mean")
        lengths = view.lengths
        span = None if lengths is None else torch.stack([torch.zeros_like(lengths), lengths], 1)
        stats = anchor_stats(query, view.key, view.value, anchor, protect=view.protect, key_span=span)
        tiles, tokens = len(view.key), view.grid[0] * view.grid[1]
        places = torch.arange(tokens).expand(tiles, -1) if view.places is None else view.places()
        found = torch.full((3, tiles, tokens), float("nan"))
        for tile in range(tiles):
            end = view.key.shape[2] if lengths is None else int(lengths[tile])
            rows = torch.stack([x.view(tiles, -1)[tile, view.protect : end] for x in stats[:3]])
            values = rows.unflatten(1, (-1, view.block)).mean(2)
            found[:, tile, places[tile, : values.shape[1]]] = values
        NOTED.append((*found, stats[3][:, 0]))
        return super().encoder_select(step, view)


NOTED: list = []


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_what_the_policy_sees(name):
    model, reader, shown = ready(name)
    policy = Noting(retain_ratio=0.3)
    traced, entropy = stages(model, shown, policy)
    NOTED.clear()
    seen = looking.look(model, reader, shown, policy, "flowcut")
    assert len(seen.layers) == len(NOTED) + 1 == len(entropy) + 1  # and the layer that is read
    alive = torch.ones_like(seen.layers[0].attention, dtype=torch.bool)
    for number, layer in enumerate(seen.layers):
        cut = next((stage for stage in traced if stage.layer == number), None)
        if number < len(NOTED):
            attention, relevance, norm, even = NOTED[number]
            for found, want in ((layer.attention, attention), (layer.relevance, relevance), (layer.value_norm, norm)):
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(layer.entropy, even, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.entropy, entropy[number], rtol=1e-5, atol=1e-5)
        if cut is not None:
            torch.testing.assert_close(layer.score, cut.scores, equal_nan=True)
            assert layer.score.isfinite().equal(layer.attention.isfinite())
            alive = torch.zeros_like(alive)
            for tile, index in zip(alive, cut.indices, strict=True):
                tile[index[index >= 0]] = True
    assert layer.score is None and layer.attention.isfinite().equal(alive) and len(traced) > 2


@pytest.mark.parametrize("name", FAMILIES)
def test_picture_is_what_the_processor_made(name):
    size, rows = FAMILIES[name][1:]
    smooth = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 4, 3), np.uint8)).resize(size)
    reader = Reader(name).image_processor
    views = looking.views_of(smooth, lambda image: looking.as_pictures(reader([image], return_tensors="pt"), reader))
    assert [list(row) for row in views[0].tiles] == rows
    overview = 0 if rows[0][0] else rows[-1][-1] + 1
    assert [view.tiles for view in views[1:]] == ([] if name.startswith("qwen") else [((overview,),)])
    for view in views[1:] if name.startswith("llava") else views:  # those pad what they cut up
        height, width = view.picture.shape[:2]
        off = view.picture.astype(int) - np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC))
        assert np.abs(off).mean() < 3


@pytest.mark.parametrize("size", [(56, 56), (300, 60), (60, 300), (120, 110), (90, 40), (170, 115)])
def test_tiles_lie_where_the_family_says(size):
    """In rows and columns by the formula of each, which `look` does not know."""
    width, height = size
    image = Image.new("RGB", size)
    points = llava_onevision.IMAGES.image_grid_pinpoints
    many, down, right = idefics3.IMAGES.get_number_of_image_patches(height, width, {})
    canvas = get_optimal_tiled_canvas((height, width), (56, 56), internvl.IMAGES.min_patches, 6)
    for name, (rows, columns) in {
        "llava_next": [n // 56 for n in select_best_resolution((height, width), llava_next.POINTS)],
        "llava_onevision": [n // 56 for n in select_best_resolution((height, width), points)],
        "internvl": canvas[::-1],
        "idefics3": (down, right) if many > 1 else (1, 1),
    }.items():
        reader = FAMILIES[name][0]
        views = looking.views_of(image, lambda x, f=reader: looking.as_pictures(f([x], return_tensors="pt"), f))
        first = 1 if name.startswith("llava") else 0
        want = (
            np.arange(first, first + rows * columns).reshape(rows, columns) if rows * columns > 1 else np.zeros((1, 1))
        )
        assert np.array_equal(views[0].tiles, want), name


def test_tiles_of_no_grid_are_shown_one_by_one():
    assert looking._rows([0, 2], torch.tensor([[10.0, 20.0], [0.0, 0.0], [90.0, 60.0]])) is None
    corner = np.zeros((8, 8, 3), np.uint8)
    crops = [(0, 0, 4, 4), (2, 3, 6, 7), (0, 0, 8, 8)]
    views = looking.views_of(
        Image.fromarray(corner),
        lambda image: torch.stack([torch.tensor(np.array(image.resize((8, 8), 0, crop))) for crop in crops]),
    )
    assert [view.name for view in views] == ["tile 1", "tile 2", "overview"]
    views = looking.views_of(
        Image.new("RGB", (50, 30)), lambda image: torch.tensor(np.array([image.resize((16, 16))] * 2))
    )
    assert [(view.name, view.tiles) for view in views] == [("overview, tile 1", ((0,),)), ("overview, tile 2", ((1,),))]


def test_packed_frames_of_two():
    """A still image fills both frames of a patch."""
    reader = Qwen2VLImageProcessorPil()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 112, 3), np.uint8))
    (made,) = looking.as_pictures(reader([image], return_tensors="pt"), reader).int().numpy()
    assert np.abs(made - np.asarray(image)).max() <= 1


# Rows and columns of tokens of a tile, and the first row of the tiles that LLaVA-NeXT does not cut off as padding.
SIDE = {"qwen2_5_vl": (6, 10), "llava_next": (8, 8), "internvl": (4, 4), "idefics3": (4, 4)}
PADDED = 3
POLICIES = dict(flowcut=fk.FlowCut(retain_ratio=0.3), fastv=fk.FastV(retain_ratio=0.3, layer=1))


def place_of(name: str, stage, row: int, index: int) -> tuple[int, int] | None:
    """Tile and token of what a stage counts as `index` of its image `row`; None: a newline."""
    tokens = SIDE[name][0] * SIDE[name][1]
    if stage.name == "encoder" or name == "qwen2_5_vl":
        return row, index
    if name in ("internvl", "idefics3") or index < tokens:
        return divmod(index, tokens)
    line, column = divmod(index - tokens, 2 * 8 + 1)
    if column == 2 * 8:
        return None
    line += PADDED
    return 1 + 2 * (line // 8) + column // 8, line % 8 * 8 + column % 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page of several families, and of each policy, cut by cut, the step and (tile, token) of all that is left."""
    looked, expected = [], []
    for name in SIDE:
        model, reader, shown = ready(name)
        looked.append((shown, [looking.look(model, reader, shown, x, label) for label, x in POLICIES.items()]))
        expected.append([stages(model, shown, policy)[0] for policy in POLICIES.values()])
    page = write_page("tiny", looked, tmp_path_factory.mktemp("look") / "look.html")
    return page, [shown for shown, _ in looked], expected


DRAWN = """step => {
  slider.value = step; draw();
  return sections.map(section => section.groups.map(group => group.panels.map(panel => {
    const { canvas, cell, columns, rows } = panel, copy = new OffscreenCanvas(canvas.width, canvas.height);
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const bright = n => pixels[4 * (canvas.width * Math.floor((Math.floor(n / columns) + .5) * cell) + Math.floor((n % columns + .5) * cell))];
    return Array.from({ length: rows * columns }, (_, n) => bright(n) < 128);
  })));
}"""  # noqa: E501


def test_drawn_is_kept(made, visit):
    """Pixels of the pictures, view by view, against the trace, step by step."""
    path, shown, expected = made
    page = visit(path)
    steps = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])["steps"]
    found = [page.evaluate(DRAWN, step) for step in range(len(steps))]
    compared = 0
    for number, (name, image) in enumerate(zip(SIDE, shown, strict=True)):
        high, wide = SIDE[name]
        for policy, of_policy in enumerate(expected[number]):
            for stage in of_policy:
                step = steps.index(
                    next(x for x in steps if (x["place"], x["layer"]) == (stage.name, max(stage.layer, 0)))
                )
                given = [(row, i) for row, index in enumerate(stage.indices.tolist()) for i in index if i >= 0]
                kept = {place_of(name, stage, row, i) for row, i in given}
                drawn = set()
                for view, masks in zip(image.views, found[step][number], strict=True):
                    columns = wide * len(view.tiles[0])
                    for n in np.flatnonzero(masks[policy]):
                        y, x = divmod(int(n), columns)
                        drawn.add((view.tiles[y // high][x // wide], y % high * wide + x % wide))
                assert drawn == kept - {None}, (name, stage.name, stage.layer)
                compared += 1
    assert compared > 15


def test_page_of_tiles(made, visit):
    """At 360 pixels nothing sticks out (`visit` sees to that); keys go through the tokens of all tiles, and say so."""
    page = visit(made[0], width=360)
    tiles = page.locator("section").nth(1)
    assert tiles.locator(".panels").count() == 2 and tiles.locator("canvas").count() == 4
    assert tiles.locator(".panels figure:first-child h3").all_inner_texts() == ["2 by 2 tiles", "overview"]
    canvas = tiles.locator("canvas").first
    canvas.focus()
    for key in ["ArrowRight"] * 10 + ["ArrowDown"] * 9:
        page.keyboard.press(key)
    assert "row 10, column 10: " in page.locator("#say").inner_text()
    assert "newlines" in tiles.inner_text() and "newlines" not in page.locator("section").nth(2).inner_text()


def test_resized_tiles(monkeypatch):
    """Where tokens are means of several, one is drawn as long as a token that it is part of is there."""
    monkeypatch.setattr(llava_onevision.COUNTS, "vision_aspect_ratio", "anyres_max_1")
    reader = Reader("llava_onevision")
    model = reader.family.model()
    model.config.vision_aspect_ratio = "anyres_max_1"
    shown = looking.show(model, reader, picture("llava_onevision"), "x", "w5")
    seen = looking.look(model, reader, shown, fk.FastV(target_tokens=20, layer=1), "fastv")
    assert seen.resized and len(seen.cuts) == 2
    padding, last = seen.cuts
    assert padding.kept == shown.tokens and last.kept == 20
    # Of the overview nothing is a mean: its tokens come first and are those of the trace.
    index = stages(model, shown, fk.FastV(target_tokens=20, layer=1))[0][-1].indices[0]
    assert last.alive[0].nonzero()[:, 0].tolist() == index[index < 64].tolist()
    stitched = int((index >= 64).sum())
    assert 1 < stitched < int(last.alive[1:].sum()) <= 4 * stitched


def test_command_without_what_cannot_be(tmp_path, monkeypatch):
    """Of the usual policies FastV cannot keep so few; where it is asked for, that is an error."""
    reader = Reader("qwen2_5_vl")
    monkeypatch.setattr(looking, "load_model", lambda name: (reader.family.model(), reader))
    monkeypatch.setattr(looking, "WORDS", 2)
    picture("qwen2_5_vl").save(tmp_path / "a.png")
    command = ["look", str(tmp_path / "a.png"), "--model", "m", "--tokens", "2", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "without fastv: " in done.output and "→ 2 kept" in done.output
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert CliRunner().invoke(app, [*command, "--policy", "fastv"]).exit_code == 2


def test_saved_tiled_model(tmp_path):
    """A folder with its own processor."""
    reader = llava_next.processor()
    reader.save_pretrained(tmp_path / "m")
    llava_next.model().save_pretrained(tmp_path / "m")
    picture("llava_next").save(tmp_path / "a.png")
    command = ["look", str(tmp_path / "a.png"), "--model", str(tmp_path / "m"), "--policy", "random"]
    done = CliRunner().invoke(app, [*command, "--prompt", "w5 w7", "--tokens", "30", "--out", str(tmp_path / "out")])
    if "torchvision" in done.output:
        pytest.skip("this transformers reads no processor without torchvision")
    assert done.exit_code == 0 and "a.png: 234 tokens" in done.output and " 30 kept" in done.output
    assert "2 by 2 tiles" in (tmp_path / "out" / "look.html").read_text()
