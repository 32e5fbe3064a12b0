"""Video-LLaVA: a CLIP tower for images and one for frames, which go to the language model one after another."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import VideoLlavaForConditionalGeneration

from ..modules.encoder import PrunedEncoder
from ..policies.base import Policy
from ._bound import Replacement
from ._features import Encoded, Kind, Layout, ScatteredProjector, equal_tiles
from ._vlm import MANY, vlm_replacements
from .clip import replace_tower


class VideoLlava:
    """Adapter of ``VideoLlavaForConditionalGeneration``.

    Budgets count per image and per video, and are spread evenly over a video's frames: 256 of the 2,048 patches of 8
    frames are 32 of each. The frames' class tokens, which the model keeps, stay and do not count; cuts inside the
    language model treat them as tokens like others.
    """

    model_class = VideoLlavaForConditionalGeneration

    def replacements(
        self, model: Any, policy: Policy, *, record: bool, backend: str | None, compact_cache: bool
    ) -> tuple[PrunedEncoder, list[Replacement]]:
        inner, config = model.model, model.config
        replace = partial(replace_tower, model, policy, record=record, backend=backend)
        if getattr(policy, "class_token", False):
            raise ValueError(
                f"class_token=True, but {type(model).__name__} gives the language model the class tokens of frames "
                "anyway: set class_token=False"
            )
        tower, encoder, replacements, fixed = replace(name="image_tower")
        _, frames, more, _ = replace(name="video_tower")
        frames.traced, patches = encoder, tower.patches(inner.image_tower)
        strategy = fixed["vision_feature_select_strategy"]
        lead = tower.protect
        kinds = (
            VideoLlavaImages(inner, config.image_token_id, patches, lead if strategy == "full" else 0),
            VideoLlavaVideos(inner, config.video_token_id, patches, lead),
        )
        projector = inner.multi_modal_projector
        replacements += [*more, (projector, "forward", ScatteredProjector(projector))]
        replacements += vlm_replacements(
            model, kinds, policy, MANY, encoder, fixed, backend=backend, compact_cache=compact_cache
        )
        return encoder, replacements


class _Frames(Kind):
    """Frames of all patches, maybe each behind its class token; an image is a single one."""

    assembles = True

    def __init__(self, model: Any, token_id: int, patches: int, leads: int) -> None:
        super().__init__(model, token_id)
        self.patches, self.leads = patches, leads

    def layouts(self, pixels: Tensor, arguments: dict[str, Any]) -> list[Layout]:
        frames = 1 if pixels.dim() == 4 else pixels.shape[1]
        grid = PrunedEncoder.grid(self.patches)
        return [equal_tiles(frames, grid, even=True, leads=self.leads)] * len(pixels)

    def lengths(self, features: Any, known: Encoded | None) -> list[int]:
        found = super().lengths(features, known)
        if known is None:
            return found
        return [known.kept[0]] * (sum(found) // known.kept[0])  # frame by frame, where nothing was dropped


class VideoLlavaImages(_Frames):
    """The name of their pixels changed with transformers' versions."""

    modality, pixels, method = "image", "pixel_values", "get_image_features"
    aliases = ("pixel_values_images",)


class VideoLlavaVideos(_Frames):
    """Frames one behind another."""

    modality, pixels, method = "video", "pixel_values_videos", "get_video_features"
