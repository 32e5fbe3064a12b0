"""What the conformance suite leaves out of Video-LLaVA: budgets of frames, two towers with one trace, names."""

from __future__ import annotations

import copy

import pytest
import torch
from test_cost import predicted, run
from tiny import PATCHES
from torch.testing import assert_close
from transformers import VideoLlavaForConditionalGeneration
from zoo import Image, Video
from zoo.video_llava import NAMES, PIXELS, model, prompt

import flowcut_kernels as fk

KEEP, FRAMES = 11, 3


def given(rows):
    return {name: x.double() if x.is_floating_point() else x for name, x in prompt(rows).items()}


@torch.no_grad()
def test_frames_share_a_budget():
    """Every frame keeps what a bare tower keeps of it with its share, behind its class token, which does not count."""
    llava, pixels = model(dtype=torch.float64), given([[Video(FRAMES), Video(FRAMES, seed=1)]])["pixel_values_videos"]
    tower, frames, shares = copy.deepcopy(llava.model.video_tower), pixels.flatten(0, 1), [4, 4, 3] * 2
    want, kept = [], []
    for frame, share in zip(frames, shares, strict=True):
        with fk.patched(tower, fk.FlowCut(share), record=True):
            states = tower(frame[None], output_hidden_states=True).hidden_states[-2]
            kept.append(fk.trace(tower).stages[-1].indices[0])
        want.append(llava.model.multi_modal_projector(states[0]))
    with fk.patched(llava, fk.FlowCut(KEEP), record=True):
        got = llava.model.get_video_features(pixels).pooler_output
        *_, encoder, features = fk.trace(llava).stages
    assert_close(got, torch.stack([torch.cat(want[:FRAMES]), torch.cat(want[FRAMES:])]))
    assert (encoder.kept, features.kept) == (shares, [KEEP + FRAMES] * 2)
    for video, indices in enumerate(features.indices):
        parts = kept[FRAMES * video :][:FRAMES]
        places = [torch.cat([torch.tensor([-1]), part]) + 1 + i * (PATCHES + 1) for i, part in enumerate(parts)]
        assert torch.equal(indices, torch.cat(places))


@torch.no_grad()
def test_a_frame_too_small_for_contextual_tokens():
    """Of the other frame's two tokens one is contextual; the class tokens of both are the stock model's."""
    llava, pixels = model(dtype=torch.float64), given([[Video(2)]])["pixel_values_videos"]
    stock = llava.model.get_video_features(pixels).pooler_output.flatten(0, -2)
    with fk.patched(llava, fk.VisionZip(3, contextual_share=0.4, class_token=False), record=True):
        features = llava.model.get_video_features(pixels).pooler_output.flatten(0, -2)
        assert fk.trace(llava).stages[0].recycled.sum(1).tolist() == [1, 0]
    assert_close(features[[0, 3]], stock[[0, PATCHES + 1]])


@torch.no_grad()
def test_trace_of_the_last_pass():
    """Of either tower, where one alone has work, and of the videos where both do."""
    llava = model()
    with fk.patched(llava, fk.FlowCut(KEEP), record=True):
        for row, kept in (
            ([Image(), 5], [KEEP]),
            ([Video(2)], [6, 5]),
            ([Image(), Video(2)], [6, 5]),
            ([Image()], [KEEP]),
        ):
            llava(**prompt([row]))
            encoder = [stage for stage in fk.trace(llava).stages if stage.name == "encoder"]
            assert encoder[-1].kept == kept


@torch.no_grad()
def test_images_are_frames_without_class_tokens():
    """Where the encoder's surplus is recycled too; and what the language model leaves of them is theirs."""
    llava, rows = model(dtype=torch.float64), [[3, Image(), 5, Video(2)], [Video(2, seed=1), Image(seed=1), 7]]
    inputs = given(rows)
    llava.model.video_tower.load_state_dict(llava.model.image_tower.state_dict())
    with fk.patched(llava, fk.FlowCut(KEEP, recycle_cell=2.0)):
        images = llava.model.get_image_features(inputs[PIXELS]).pooler_output
        frames = llava.model.get_video_features(inputs[PIXELS][:, None]).pooler_output
    assert_close(images, frames[:, 1:])
    with fk.patched(llava, fk.FlowCut.release(KEEP, llm_layer=1), record=True):
        llava(**inputs)
        image, video, other, _ = fk.trace(llava).stages[-1].indices  # of each row images come first
        llava.model.get_image_features(inputs[PIXELS])
        entered = fk.trace(llava).stages[-1].indices
    assert torch.isin(image, entered[0]).all() and torch.isin(other, entered[1]).all()
    assert video.max() > PATCHES and not torch.isin(image, entered[1]).all()


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_cut_in_the_language_model_alone(beams):
    """Frames that the encoder leaves whole are one video to the language model, in `generate` too."""
    llava, rows = model(dtype=torch.float64), [[3, Video(2), 5], [Video(2, seed=1), 6, 7]]
    inputs, policy = given(rows), fk.FlowCut(PATCHES + 8, llm_layer=1)
    with fk.patched(llava, policy, record=True):
        logits = llava(**inputs).logits[:, -1]
        assert [(stage.name, stage.kept) for stage in fk.trace(llava).stages] == [("llm", [PATCHES + 8] * 2)]
        settings = dict(max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True)
        first = llava.generate(**inputs, **settings, num_beams=beams).logits[0]
    assert_close(first[::beams].double(), logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pixels_by_either_name():
    llava, inputs = model(), prompt([[3, Image(), 5, 6]])
    pixels = inputs.pop(PIXELS)
    names = [name for name in ("pixel_values", "pixel_values_images") if name in NAMES]
    with fk.patched(llava, fk.FlowCut(KEEP)):
        logits = [llava(**inputs, **{name: pixels}).logits for name in names]
        written = [llava.generate(**inputs, **{name: pixels}, max_new_tokens=3, do_sample=False) for name in names]
    assert logits[0].shape[1] == KEEP + 3
    assert torch.equal(logits[0], logits[-1]) and torch.equal(written[0], written[-1])


@pytest.mark.parametrize("llm_layer", [None, 1])
def test_cost(llm_layer):
    """Of frames with class tokens, in a tower of their own, beside images."""
    llava, policy = model(), fk.FlowCut(30, adaptive=False, llm_layer=llm_layer)
    inputs = prompt([[3, Image(), 4, Video(3), 5], [Video(3, seed=1), 6, Image(seed=1), 7]])
    towers = dict(logits_to_keep=1, towers=("image_tower", "video_tower"))
    cost = fk.cost(llava, policy, inputs)
    assert run(llava, inputs, **towers) == predicted(cost.full)
    with fk.patched(llava, policy, backend="reference"):
        assert run(llava, inputs, **towers) == predicted(cost.pruned)


@torch.no_grad()
def test_stages_cut_class_tokens():
    """Where a budget of one leaves them nothing else to cut."""
    llava, inputs = model(), prompt([[3, Video(FRAMES), 5]])
    policy = fk.VFlowOpt(1, llm_stages=((1, 0.5), (2, 0.4)))
    cost = fk.cost(llava, policy, inputs)
    with fk.patched(llava, policy, record=True):
        llava(**inputs)
        assert [stage.kept for stage in fk.trace(llava).stages] == [[1 + FRAMES], [2], [1]]
    assert cost.pruned.decoder.leaving[:3] == (2 + 2, 2 + 1, 2 + 1)


def test_refused():
    with pytest.raises(ValueError, match="class_token=False"):
        fk.patch(model(), fk.VisionZip(KEEP))
    assert VideoLlavaForConditionalGeneration in fk.supported_models()
