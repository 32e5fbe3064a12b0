"""The trained stand-in: its scenes are reproducible, its splits share no digit, and the committed weights answer."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mini_vlm
from mini_vlm import quiz, scenes


@pytest.fixture(scope="module")
def loaded():
    return mini_vlm.load()


def test_scenes_are_deterministic():
    first, again, other = (scenes.generate("dev", 3, seed) for seed in (1, 1, 2))
    for field in ("images", "digits", "colours", "boxes", "coverage"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
    assert not np.array_equal(first.images, other.images)


def test_questions_are_deterministic():
    first, again = (mini_vlm.questions("dev", 20, seed=3) for _ in range(2))
    assert [(q.prompt, q.answer, q.kind) for q in first] == [(q.prompt, q.answer, q.kind) for q in again]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))


def test_lists_are_of_the_scenes_that_questions_ask_about():
    asked = quiz.lists("dev", 5, seed=3)
    pairs = zip(asked, mini_vlm.questions("dev", 20, seed=3)[::4], strict=True)
    assert all(np.array_equal(a.image, b.image) and a.scene == b.scene for a, b in pairs)
    assert all(q.answer.split() == sorted(set(q.answer.split())) and q.kind == quiz.LIST for q in asked)


def test_splits_share_no_digit_image():
    train, dev, test = (scenes.digit_ids(split) for split in ("train", "dev", "test"))
    assert not train & dev and not train & test and not dev & test


def test_truth_lies_on_the_digits():
    batch = scenes.generate("dev", 50, 0)
    assert (batch.digits >= 0).sum(1).min() >= 1
    for boxes, digits, mask in zip(batch.boxes, batch.digits, batch.patch_mask, strict=True):
        inside = np.zeros((scenes.GRID, scenes.GRID), bool)
        for x0, y0, x1, y1 in boxes[digits >= 0].astype(int):
            inside[y0 // scenes.PATCH : -(-y1 // scenes.PATCH), x0 // scenes.PATCH : -(-x1 // scenes.PATCH)] = True
        assert not (mask & ~inside.ravel()).any()


def test_contrast_does_not_find_digits():
    """Among the patches of highest contrast, digits are no more common than among all objects of the scene."""
    batch = scenes.generate("dev", 200, 0)
    top = np.argsort(-scenes.contrast(batch.images), 1)[:, : round(0.06 * scenes.GRID**2)]
    assert np.take_along_axis(batch.patch_mask, top, 1).mean() < 0.35


def test_weights_are_small():
    assert (mini_vlm.WEIGHTS / "model.safetensors").stat().st_size < 8e6


def test_weights_answer(loaded):
    model, processor = loaded
    asked = mini_vlm.questions("dev", 100, seed=11)
    right = 0
    for i in range(0, len(asked), 50):
        part = asked[i : i + 50]
        inputs = processor(
            images=[q.image for q in part], text=[q.prompt for q in part], padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            guess = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        words = processor.tokenizer.convert_ids_to_tokens(guess.tolist())
        right += sum(word == question.answer for word, question in zip(words, part, strict=True))
    assert right >= 0.85 * len(asked)


def test_generate_stops_after_the_answer(loaded):
    model, processor = loaded
    inputs = processor(
        images=mini_vlm.questions("dev", 1)[0].image, text="<image> how many digits", return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert len(output) == 2 and output[-1] == model.config.text_config.eos_token_id


def test_generate_lists_the_digits(loaded):
    model, processor = loaded
    asked = quiz.lists("dev", 40, seed=12)
    inputs = processor(images=[q.image for q in asked], text=[q.prompt for q in asked], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs.input_ids.shape[1] :]
    told = processor.batch_decode(output, skip_special_tokens=True)
    assert sum(text == question.answer for text, question in zip(told, asked, strict=True)) >= 0.6 * len(asked)


def test_last_vision_layer_is_not_read(loaded):
    model, processor = loaded
    inputs = processor(
        images=mini_vlm.questions("dev", 1)[0].image, text="<image> how many digits", return_tensors="pt"
    )
    tower = model.model.vision_tower
    with torch.no_grad():
        before = model(**inputs).logits
        last = tower.encoder.layers[-1].mlp.fc2.weight
        original = last.clone()
        last.zero_()
        after = model(**inputs).logits
        last.copy_(original)
    assert original.abs().max() > 0 and torch.equal(before, after)
