"""Synthetic scenes of real handwritten digits among clutter of equal contrast.

The only data are the 1,797 digits (8 x 8, 17 grey levels) that ship inside scikit-learn. A scene is a textured
background with 1-5 coloured digits and 10-15 pieces of clutter, each rotated, sheared and scaled, at positions that
ignore the patch grid. Clutter has the format, palette, size and mean ink of the digits, so that local contrast does not
tell the two apart.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

SIZE, PATCH = 160, 8  # pixels
GRID = SIZE // PATCH  # patches per side
CELLS = 5  # objects sit in a jittered CELLS x CELLS layout
CELL = SIZE // CELLS  # pixels
JITTER = 5  # pixels
SPLITS = {"train": (0.0, 0.65), "dev": (0.65, 0.80), "test": (0.80, 1.0)}  # share of the images of every class
COLOURS = {
    "red": (235, 50, 45),
    "green": (45, 190, 60),
    "blue": (60, 90, 240),
    "yellow": (240, 220, 40),
    "purple": (190, 60, 220),
    "cyan": (40, 215, 225),
}

# Strokes of letters unlike any digit, as polylines on a unit square (x right, y down).
LETTERS = [
    "0,1 .5,0 1,1|.2,.65 .8,.65",
    "1,0 0,0 0,1 1,1|0,.5 .8,.5",
    "1,0 0,0 0,1|0,.5 .8,.5",
    "0,0 0,1|1,0 1,1|0,.5 1,.5",
    "0,0 0,1|1,0 0,.55 1,1",
    "0,1 0,0 .5,.6 1,0 1,1",
    "0,1 0,0 1,1 1,0",
    "0,0 0,1|0,0 1,.1 1,.45 0,.5 1,1",
    "0,0 1,0|.5,0 .5,1",
    "0,0 0,.9 .5,1 1,.9 1,0",
    "0,0 .5,1 1,0",
    "0,0 .25,1 .5,.4 .75,1 1,0",
    "0,0 1,1|1,0 0,1",
    "0,0 .5,.5 1,0|.5,.5 .5,1",
    "0,0 0,1 1,1",
]


@dataclasses.dataclass
class Scenes:
    """A batch of B scenes with D digit slots, the most that a scene of the batch may hold; unused slots hold -1."""

    images: np.ndarray  # uint8   [B, SIZE, SIZE, 3]
    digits: np.ndarray  # int64   [B, D]                 0..9
    colours: np.ndarray  # int64   [B, D]                 index into COLOURS
    boxes: np.ndarray  # float32 [B, D, 4]              x0, y0, x1, y1 in pixels, exclusive end
    coverage: np.ndarray  # float32 [B, GRID*GRID, D]      mean ink of each digit inside each patch, 0..1

    @property
    def centres(self) -> np.ndarray:
        """Centres of the digit boxes, [B, D, 2] as x, y in pixels."""
        return (self.boxes[..., :2] + self.boxes[..., 2:]) / 2

    @property
    def patch_mask(self) -> np.ndarray:
        """Patches that show a digit (mean ink of at least 8 %), bool [B, GRID*GRID]."""
        return self.coverage.max(-1) >= 0.08


@functools.cache
def _digit_bank(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits of one split: images float32 [n, 8, 8] in 0..1 and labels [n]. The splits share no image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    low, high = SPLITS[split]
    chosen = []
    for digit in range(10):
        members = order[data.target[order] == digit]
        chosen.append(members[round(low * len(members)) : round(high * len(members))])
    index = np.concatenate(chosen)
    return (data.images[index] / 16).astype(np.float32), data.target[index]


def digit_ids(split: str) -> set[bytes]:
    """The digit images of a split as hashable values."""
    return {image.tobytes() for image in _digit_bank(split)[0]}


def _letters(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Letters drawn as strokes at 32 x 32 and averaged to 8 x 8, which is how the digits were made."""
    glyphs = []
    for strokes in rng.choice(LETTERS, count):
        canvas = Image.new("L", (32, 32))
        width, height = rng.uniform(14, 24), rng.uniform(24, 28)
        for stroke in strokes.split("|"):
            points = np.array([[float(v) for v in point.split(",")] for point in stroke.split()])
            points = (points - 0.5 + rng.normal(0, 0.05, points.shape)) * (width, height) + 15.5
            ImageDraw.Draw(canvas).line(
                [tuple(p) for p in points], fill=255, width=int(rng.integers(4, 7)), joint="curve"
            )
        glyphs.append(np.asarray(canvas, np.float32).reshape(8, 4, 8, 4).mean((1, 3)) / 255)
    return glyphs


def _blobs(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Smooth random texture inside an ellipse."""
    y, x = np.mgrid[:8, :8] - 3.5
    glyphs = []
    for _ in range(count):
        noise = np.kron(rng.normal(size=(4, 4)), np.ones((2, 2))) + 0.7 * rng.normal(size=(8, 8))
        inside = (x / rng.uniform(2.5, 4.2)) ** 2 + (y / rng.uniform(3.2, 4.4)) ** 2 < 1
        glyphs.append((np.clip(0.4 + 0.7 * noise, 0, 1) * inside).astype(np.float32))
    return glyphs


def _nearest(glyphs: np.ndarray, images: np.ndarray, rank: int) -> np.ndarray:
    """Distance of every glyph to its rank-th nearest image, over shifts of up to two columns: [n]."""
    images = images.reshape(len(images), 64)
    best = np.full((len(glyphs), len(images)), np.inf, np.float32)
    for shift in (-2, -1, 0, 1, 2):
        moved = np.roll(glyphs, shift, 2).reshape(-1, 64)
        squared = (moved**2).sum(1)[:, None] + (images**2).sum(1) - 2 * moved @ images.T
        best = np.minimum(best, squared)
    return np.sqrt(np.maximum(np.partition(best, rank - 1, 1)[:, rank - 1], 0))


@functools.cache
def _clutter_bank(split: str) -> np.ndarray:
    """Clutter glyphs float32 [n, 8, 8]: letters, blobs, and mirrored, broken and partial digits of the same split."""
    rng = np.random.default_rng(list(SPLITS).index(split) + 1)
    images, labels = _digit_bank(split)
    glyphs = _letters(rng, 900) + _blobs(rng, 250)
    for image in images[np.isin(labels, (3, 4, 6, 7, 9))]:  # mirrored
        glyphs.append(image[:, ::-1])
    for image in images[rng.integers(len(images), size=400)]:  # broken: its quarters change places
        quarters = image.reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).reshape(4, 4, 4)
        shuffled = quarters[[[1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1]][rng.integers(3)]]
        glyphs.append(shuffled.reshape(2, 2, 4, 4).transpose(0, 2, 1, 3).reshape(8, 8))
    for image in images[rng.integers(len(images), size=400)]:  # a piece, enlarged
        y, x = rng.integers((0, 1), (5, 4))
        glyphs.append(np.kron(image[y : y + 4, x : x + 4], np.ones((2, 2), np.float32)))
    bank = np.stack(glyphs)
    bank = bank[
        _nearest(bank, images, 1) > np.quantile(_nearest(images, images, 2), 0.97)
    ]  # nothing that could pass for a digit
    target = rng.choice(images.mean((1, 2)), len(bank)) / np.maximum(
        bank.mean((1, 2)), 0.1
    )  # as much ink as some digit
    return np.clip(bank * np.clip(target, 0.6, 1.7)[:, None, None], 0, 1).astype(np.float32)


def _warp(glyphs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate, shear, scale and shift n glyphs [n, 8, 8] into windows [n, CELL, CELL] by bilinear sampling."""
    n = len(glyphs)

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (n, 1)).astype(np.float32)

    angle, shear, height = draw(-0.25, 0.25), draw(-0.2, 0.2), draw(14, 22)
    width = height * draw(0.85, 1.2)
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32).reshape(2, 1, -1) - (CELL - 1) / 2
    x, y = x - draw(-0.5, 0.5), y - draw(-0.5, 0.5)
    v = np.cos(angle) * y - np.sin(angle) * x
    u = (np.cos(angle) * x + np.sin(angle) * y - shear * v) * (8 / width) + 4.5
    v = v * (8 / height) + 4.5
    u, v = np.clip(u, 0, 8.999, out=u), np.clip(v, 0, 8.999, out=v)
    i, j = v.astype(np.int32), u.astype(np.int32)
    fy, fx = v - i, u - j
    flat = np.pad(glyphs, ((0, 0), (1, 1), (1, 1))).ravel()
    base = np.arange(n, dtype=np.int32)[:, None] * 100 + i * 10 + j
    left = flat[base] * (1 - fy) + flat[base + 10] * fy
    right = flat[base + 1] * (1 - fy) + flat[base + 11] * fy
    return (left * (1 - fx) + right * fx).reshape(n, CELL, CELL)


def _background(rng: np.random.Generator, count: int) -> np.ndarray:
    """Coloured low-contrast texture at three scales, float32 [count, SIZE, SIZE, 3] in 0..255."""
    image = rng.uniform(25, 110, (count, 1, 1, 1)) + rng.normal(0, 8, (count, 1, 1, 3))
    image = np.broadcast_to(image, (count, SIZE, SIZE, 3)).astype(np.float32)
    for step, spread in ((24, 8), (9, 6), (2, 6)):
        side = -(-SIZE // step) + 1
        noise = rng.standard_normal((count, side, side, 3), np.float32) * spread
        y, x = rng.integers(step, size=2)  # off the patch grid
        image += noise.repeat(step, 1).repeat(step, 2)[:, y : y + SIZE, x : x + SIZE]
    return image


def generate(
    split: str,
    count: int,
    seed: int | tuple[int, ...],
    digits: tuple[int, int] = (1, 5),
    clutter: tuple[int, int] = (10, 15),
    distinct: bool = True,
) -> Scenes:
    """`count` scenes of one split; the same arguments give the same scenes.

    digits, clutter: inclusive ranges of how many a scene holds.
    distinct: no two digits of a scene share class or colour.
    """
    rng = np.random.default_rng([list(SPLITS).index(split), *np.atleast_1d(seed)])
    bank, labels = _digit_bank(split)
    most = digits[1]
    slots = most + clutter[1]
    n_digits = rng.integers(digits[0], digits[1] + 1, count)
    n_clutter = rng.integers(clutter[0], clutter[1] + 1, count)
    live = np.concatenate([np.arange(most) < n_digits[:, None], np.arange(clutter[1]) < n_clutter[:, None]], 1)
    cell = rng.random((count, CELLS * CELLS)).argsort(1)[:, :slots]
    colour = rng.integers(len(COLOURS), size=(count, slots))
    if distinct:
        digit = rng.random((count, 10)).argsort(1)[:, :most]
        colour[:, :most] = rng.random((count, len(COLOURS))).argsort(1)[:, :most]
    else:
        digit = rng.integers(10, size=(count, most))

    start = np.searchsorted(labels, np.arange(11))
    exemplar = start[digit] + (rng.random(digit.shape) * (start[digit + 1] - start[digit])).astype(np.int64)
    scraps = _clutter_bank(split)
    glyphs = np.concatenate([bank[exemplar], scraps[rng.integers(len(scraps), size=(count, clutter[1]))]], 1)
    alpha = np.zeros((count, slots, CELL, CELL), np.float32)
    alpha[live] = np.minimum(1, 1.3 * _warp(glyphs[live], rng)) * rng.uniform(0.8, 1, (live.sum(), 1, 1)).astype(
        np.float32
    )

    tint = np.array(list(COLOURS.values()), np.float32)[colour] + rng.normal(0, 10, (count, slots, 3)).astype(
        np.float32
    )
    corner = (
        np.stack([cell // CELLS, cell % CELLS], -1) * CELL
        + rng.integers(-JITTER, JITTER + 1, (count, slots, 2))
        + JITTER
    )
    padded = SIZE + 2 * JITTER
    image = np.pad(_background(rng, count), ((0, 0), (JITTER,) * 2, (JITTER,) * 2, (0, 0)))
    ink = np.zeros((count, most, padded, padded), np.float32)
    b = np.arange(count)[:, None, None]
    for slot in range(slots):
        y = corner[:, slot, 0, None, None] + np.arange(CELL)[:, None]
        x = corner[:, slot, 1, None, None] + np.arange(CELL)
        a = alpha[:, slot, ..., None]
        image[b, y, x] += a * (tint[:, slot, None, None] - image[b, y, x])
        if slot < most:
            ink[b, slot, y, x] = alpha[:, slot]
    inner = slice(JITTER, JITTER + SIZE)
    image = image[:, inner, inner] + rng.standard_normal((count, SIZE, SIZE, 1), np.float32) * 4
    ink = ink[:, :, inner, inner]

    on = ink > 0.15
    spans = []
    for axis in (2, 3):  # columns (x), then rows (y)
        line = on.any(axis)
        spans += [line.argmax(-1), SIZE - line[..., ::-1].argmax(-1)]
    boxes = np.stack([spans[0], spans[2], spans[1], spans[3]], -1).astype(np.float32)
    used = live[:, :most]
    boxes[~used] = -1
    coverage = (
        ink.reshape(count, most, GRID, PATCH, GRID, PATCH).mean((3, 5)).reshape(count, most, -1).transpose(0, 2, 1)
    )
    return Scenes(
        np.clip(image, 0, 255).astype(np.uint8),
        np.where(used, digit, -1),
        np.where(used, colour[:, :most], -1),
        boxes,
        np.ascontiguousarray(coverage),
    )


def contrast(images: np.ndarray) -> np.ndarray:
    """Standard deviation inside every patch, mean over colours: uint8 [B, SIZE, SIZE, 3] -> float32 [B, GRID*GRID]."""
    patches = images.reshape(-1, GRID, PATCH, GRID, PATCH, 3).astype(np.float32)
    return patches.std((2, 4)).mean(-1).reshape(len(images), -1)
