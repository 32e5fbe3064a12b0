"""Pictures of what policies keep: what hooks see of an encoder, the command, and its page in a browser."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PATCHES, TOWERS, images

import flowcut_kernels as fk
from flowcut_kernels.ops import anchor_stats

typer = pytest.importorskip("typer", reason="the bench extra is not installed")
pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from flowcut_kernels.bench.mini_vlm import model as stand_in  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from flowcut_kernels.bench import look as looking  # noqa: E402
from flowcut_kernels.bench import mini_vlm, shapes  # noqa: E402
from flowcut_kernels.bench.commands import app  # noqa: E402
from flowcut_kernels.bench.watch import watched  # noqa: E402

HOSTILE = "<img src=x onerror=alert(1)>&amp;.png"
POLICIES = "flowcut(adaptive=False),vflowopt,fastv,random"


def run(command: str, *extra: object):
    return CliRunner().invoke(app, [*shlex.split(command), *map(str, extra)])


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (150, 200, 3), np.uint8))


@pytest.fixture(scope="module", autouse=True)
def untrained():
    """A stand-in without weights, for what does not depend on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_vlm, "load", lambda dtype=None: (stand_in.build(0).eval(), stand_in.processor()))
        patch.setattr(looking, "WORDS", 2)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command's folder, for two pictures under several policies."""
    folder = tmp_path_factory.mktemp("look")
    names = ["a picture.png", HOSTILE]
    for seed, name in enumerate(names):
        picture(seed).save(folder / name)
    command = "look --retain 0.4 --prompt 'how many digits'"
    done = run(command, "--policy", POLICIES, "--out", folder / "out", *(folder / name for name in names))
    assert done.exit_code == 0, done.output
    return folder / "out", done.output


@pytest.fixture(scope="module")
def expected():
    """What the page must show of the first picture under the first policy: `look.Seen`."""
    model, processor = mini_vlm.load()
    shown = looking.show(model, processor, picture(0), "a picture.png", "how many digits")
    policy = fk.FlowCut(target_tokens=round(0.4 * shown.tokens), adaptive=False)
    return looking.look(model, processor, shown, policy, "flowcut")


@pytest.mark.parametrize("tower", TOWERS)
def test_hooks_see_what_the_policy_sees_and_change_nothing(tower):
    class Noting(fk.FlowCut):
        def encoder_select(self, step, view):
            query, anchor = view.anchor("cls" if view.protect else "mean")
            stats = anchor_stats(query, view.key, view.value, anchor, protect=view.protect)
            noted.append([x[0, ..., view.protect :].flatten() for x in stats[:3]] + [stats[3].item()])
            return super().encoder_select(step, view)

    model, pixels, policy = TOWERS[tower](), images(1), Noting(target_tokens=9)
    noted: list = []
    with fk.patched(model, policy, record=True):
        plain = model(pixels).last_hidden_state
        first = fk.trace(model)
        noted.clear()
        with watched(model, policy) as seen:
            assert torch.equal(model(pixels).last_hidden_state, plain)
        second = fk.trace(model)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(first.stages, second.stages, strict=True))
    assert seen.grid == (8, 8) and len(seen.layers) == len(noted) + 1  # and the layer that is read
    alive = torch.arange(PATCHES)
    for number, (layer, (attention, relevance, norm, entropy)) in enumerate(zip(seen.layers, noted, strict=False)):
        for (found,), want in ((layer.attention, attention), (layer.relevance, relevance), (layer.value_norm, norm)):
            torch.testing.assert_close(found[alive], want, rtol=1e-4, atol=1e-6)
            assert found.isfinite().sum() == len(alive)
        assert layer.entropy.item() == pytest.approx(entropy, abs=1e-5)
        assert layer.entropy.item() == pytest.approx(second.entropy[number].item(), abs=1e-5)
        cut = next((stage for stage in second.stages if stage.layer == number), None)
        assert layer.score is not None and layer.score.isfinite().sum() == len(alive)
        if cut is not None:
            torch.testing.assert_close(layer.score, cut.scores, equal_nan=True)
            alive = cut.indices[0, : cut.kept[0]]
    assert len(second.stages) > 1 and len(alive) == 9 and seen.layers[-1].score is None


def test_squares_are_tokens():
    layer = looking.Layer(*(torch.arange(16.0)[None],) * 3, entropy=torch.tensor([0.5]))
    merged = looking._merged(layer, (4, 4), 2)
    assert merged.attention.tolist() == [[2.5, 4.5, 10.5, 12.5]] and merged.score is None


def test_saved_tower(tmp_path):
    """A folder of a supported class, with its image processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    small = dict(image_size=112, hidden_size=64, intermediate_size=128, num_attention_heads=1)
    shapes.llava(shapes.clip_large(6, **small)).model.vision_tower.save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}).save_pretrained(
        tmp_path
    )
    try:
        model, processor = looking.load_model(str(tmp_path))
    except ValueError as error:
        pytest.skip(str(error))
    shown = looking.show(model, processor, Image.new("RGB", (112, 112), (255, 0, 0)), "red")
    seen = looking.look(model, processor, shown, fk.UniformTokens(target_tokens=4), "uniform")
    picture = shown.views[0].picture
    assert picture.shape == (112, 112, 3)
    assert picture[..., 0].min() > 250 and picture[..., 1:].max() < 5
    drawn = looking.overlay(picture, seen.cuts[0].alive.view(seen.grid).numpy())
    assert (drawn == picture).all(-1).sum() == 4 * 14 * 14
    assert seen.answer is None and looking.decoder_layers(model) is None


def test_command_writes_the_page_and_pngs(made, expected):
    folder, output = made
    pngs = sorted(folder.glob("*.png"))
    assert len(pngs) == 8 and any(path.name.startswith("a-picture-flowcut-adaptive-False-") for path in pngs)
    for path in pngs:
        with Image.open(path) as image:
            assert image.width > 600 and len(image.getcolors(2**20) or range(99)) > 20
    assert " → ".join(str(cut.kept) for cut in expected.cuts) + " kept" in output
    page = (folder / "look.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page) and "default-src 'none'" in page
    assert str(folder) not in page and str(folder.parent) not in page


def test_without_a_picture_a_scene(tmp_path):
    done = run("look --policy uniform-grid --tokens 9", "--out", tmp_path)
    assert done.exit_code == 0 and "9 kept" in done.output
    assert (tmp_path / "scene-uniform-grid-9.png").exists()


def of_page(folder):
    text = (folder / "look.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def pixels(page, number=0):
    return page.locator("canvas").nth(number).evaluate("canvas => canvas.toDataURL()")


def test_slider_by_keys(made, visit):
    page = visit(made[0] / "look.html")
    steps = of_page(made[0])["steps"]
    assert page.locator("canvas").count() == 8  # side by side: four policies for each of two images
    boxes = [page.locator("canvas").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]

    last = pixels(page)
    page.focus("#step")
    page.keyboard.press("Home")
    first = pixels(page)
    assert first != last and page.inner_text("#where") == steps[0]["words"]
    for _ in steps[1:]:
        page.keyboard.press("ArrowRight")
    assert pixels(page) == last and page.get_attribute("#step", "aria-valuetext") == f"after {steps[-1]['words']}"
    kept = of_page(made[0])["images"][0][0]["kept"]
    assert page.locator(".panel .count").first.inner_text().startswith(f"{kept[-1]} of {kept[0]} left")

    page.keyboard.press("ArrowLeft")
    charts = [page.locator(f"svg.{name} line").last for name in ("kept", "entropy")]
    marks = [chart.get_attribute("x1") for chart in charts]
    page.click("#play")  # to the end, where it stops
    page.get_by_role("button", name="Play", pressed=False).wait_for()
    assert page.inner_text("#where") == steps[-1]["words"]
    assert all(chart.get_attribute("x1") != mark for chart, mark in zip(charts, marks, strict=True))

    page.uncheck("#dim")
    whole = pixels(page)
    assert whole != last
    page.select_option("#view", "score")
    assert pixels(page) != whole and page.locator("#scale").is_visible()
    assert page.locator(".panel .count").nth(3).inner_text().endswith("no scores")  # of "random"


@pytest.mark.parametrize("way", ["mouse", "keys", "tap"])
def test_criteria_of_a_token(way, made, expected, visit):
    """The three criteria and the score as computed here, where a layer cuts: of a token that stays, one that goes."""
    page = visit(made[0] / "look.html", width=360 if way == "tap" else 1280, has_touch=way == "tap")
    cut = expected.cuts[0]
    layer = expected.layers[cut.layer]
    page.evaluate("at => { slider.value = at; draw(); }", cut.layer)
    (rows, columns), canvas = expected.grid, page.locator("canvas").first
    stays, goes = int(cut.alive[0].nonzero()[5]), int((~cut.alive[0]).nonzero()[-1])
    for token, fate in ((stays, "kept"), (goes, "dropped after")):
        row, column = divmod(token, columns)
        box = canvas.bounding_box()
        where = dict(x=(column + 0.5) * box["width"] / columns, y=(row + 0.5) * box["height"] / rows)
        if way == "mouse":
            canvas.hover(position=where)
        elif way == "tap":
            canvas.tap(position=where)
        else:
            page.evaluate("sections[0].groups[0].token = 0")
            canvas.focus()
            for key, times in (("ArrowDown", row), ("ArrowRight", column)):
                for _ in range(times):
                    page.keyboard.press(key)
            assert fate in page.locator("#say").inner_text()
        panel = page.locator(".panel").first
        assert panel.locator(".cell").inner_text().startswith(f"row {row + 1}, column {column + 1}: {fate}")
        for name in ("attention", "relevance", "value_norm", "score"):
            read = float(panel.locator(f"dd[data-key={name}]").inner_text())
            assert read == pytest.approx(float(getattr(layer, name)[0, token]), rel=6e-3), name


@pytest.mark.parametrize("context", [{}, dict(color_scheme="dark")], ids=["light", "dark"])
def test_phone(context, made, visit):
    """Nothing sticks out at 360 pixels (`visit` sees to that), words can be read, and file names are only words."""
    page = visit(made[0] / "look.html", width=360, **context)
    assert [heading.strip() for heading in page.locator("h2").all_inner_texts()] == ["a picture.png", HOSTILE]
    assert page.locator("img:not(.picture)").count() == 0
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, dt, dd, h3, label, li')].map(x => parseFloat(getComputedStyle(x).fontSize))"
    )
    assert min(sizes) >= 13
    assert page.locator("canvas").first.bounding_box()["width"] >= 140


@pytest.mark.parametrize(
    "options, message",
    [
        ("--policy none", "flowcut-release"),
        ("--policy 'flowcut(interval=0)'", "interval=0"),
        ("--policy 'flowcut(colour=1)'", "'colour' is no field of FlowCut: it has target_tokens"),
        ("--policy 'flowcut('", "no list of policies"),
        ("--policy 'flowcut(anchor=cls)'", "words in quotes"),
        ("--policy fastv --tokens 1", "on average"),
        ("--tokens 9 --retain 0.5", "--retain"),
        ("--model some/model", "needs pictures"),
        ("picture.png --model no/such/folder", "no/such/folder"),
        ("text.png", "text.png"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(0).save("picture.png")
    (tmp_path / "text.png").write_text("no picture")
    done = run(f"look {options} --out out")
    assert (
        done.exit_code == 2
        and message in " ".join(done.output.replace("│", " ").split())
        and not (tmp_path / "out").exists()
    )


def test_names_of_files(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture(0).save(tmp_path / folder / "x.png")
    assert list(looking.opened([tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"])) == ["x.png", "x 2.png"]
    assert looking.file_name("../x", "flowcut(interval=3)") == "x-flowcut-interval-3.png"


def test_choices():
    given = looking.choices(["flowcut-release,uniform-grid", 'flowcut(criteria=("attention",), interval=3)'])
    assert [choice.name for choice in given] == ["FlowCut release", "uniform grid", "FlowCut"]
    assert given[2].policy(9, None, 64) == fk.FlowCut(target_tokens=9, criteria=("attention",), interval=3)
    with pytest.raises(ValueError, match="no language model"):
        looking.choices(["fastv"])[0].policy(9, None, 64)
