"""What the conformance suite leaves out of LLaVA-NeXT-Video: other ways to pool, strides that do not fit."""

from __future__ import annotations

import pytest
import torch
from tiny import SIDE
from torch.nn.functional import avg_pool2d, max_pool2d
from torch.testing import assert_close
from zoo import Video
from zoo.llava_next_video import model, prompt

import flowcut_kernels as fk

KEEP, FRAMES = 7, 2


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("mode", ["average", "max", "conv"])
@torch.no_grad()
def test_squares_are_pooled_as_the_model_does(mode, stride):
    """Uniform tokens by hand: all patches up to the layer before the feature layer, then those of kept squares."""
    llava = model(dtype=torch.float64, spatial_pool_mode=mode, spatial_pool_stride=stride)
    inner, pixels = llava.model, prompt([[Video(FRAMES)]])["pixel_values_videos"].double()
    with fk.patched(llava, fk.UniformTokens(KEEP), record=True):
        got = inner.get_video_features(pixels).pooler_output
        encoder, features = fk.trace(llava).stages
    budgets = [min(4, (SIDE // stride) ** 2), 3]
    assert encoder.kept == budgets and features.kept == [KEEP]
    tower, want = inner.vision_tower, []
    edge = SIDE // stride
    patch = torch.arange(SIDE**2).view(edge, stride, edge, stride).transpose(1, 2).reshape(-1, stride**2)
    pool = dict(average=avg_pool2d, max=max_pool2d).get(mode, lambda x, _: inner.vision_resampler.pool(x))
    for frame, indices, budget in zip(pixels[0], encoder.indices, budgets, strict=True):
        x = tower.pre_layrnorm(tower.embeddings(frame[None]))
        for layer in tower.encoder.layers[:-2]:
            x = layer(x, None)
        kept = patch[indices[:budget]].flatten()
        x = tower.encoder.layers[-2](torch.cat([x[:, :1], x[:, 1:][:, kept]], 1), None)[0, 1:]
        squares = x.view(budget, stride, stride, -1).permute(0, 3, 1, 2)
        want.append(inner.multi_modal_projector(pool(squares, stride).flatten(1)))
    assert_close(got[0].view(KEEP, -1), torch.cat(want))


@pytest.mark.parametrize("record", [False, True])
@torch.no_grad()
def test_frames_of_one_token(record):
    """Those without a share of the budget are gone."""
    llava, pixels = model(spatial_pool_stride=SIDE), prompt([[Video(3)]])["pixel_values_videos"]

    def features():  # of a video, in a tensor or a tuple
        return llava.model.get_video_features(pixels).pooler_output[0].flatten(0, -2)

    whole = features()
    with fk.patched(llava, fk.FlowCut(2), record=record):
        assert_close(features(), whole[:2])


def test_refused():
    with pytest.raises(ValueError, match=r"spatial_pool_stride=3.*whole squares of 3 x 3"):
        fk.patch(model(spatial_pool_stride=3), fk.FlowCut(KEEP))
