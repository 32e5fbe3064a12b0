"""Stage B: the projector and the language model learn to answer from the frozen tower's features."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .model import EOS, PAD, VOCABULARY, pixels
from .scenes import GRID

LENGTH = 8  # tokens of a packed question: its words, the answer's, end of sequence
END = 0.1  # weight of the end of sequence beside a word of the answer
TOKENS = GRID * GRID


def encode(asked: list[list[tuple[str, str, str]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Questions to ids [B, Q, LENGTH] and the index of each question's last word [B, Q]."""
    index = {word: i for i, word in enumerate(VOCABULARY)}
    ids = torch.full((len(asked), len(asked[0]), LENGTH), PAD)
    last = torch.empty(ids.shape[:2], dtype=torch.long)
    for b, row in enumerate(asked):
        for q, (text, answer, _) in enumerate(row):
            words = [index[word] for word in (*text.split(), *answer.split())] + [EOS]
            ids[b, q, : len(words)] = torch.tensor(words)
            last[b, q] = len(text.split()) - 1
    return ids, last


def features(tower: nn.Module, images: np.ndarray, size: int = 32) -> torch.Tensor:
    """Patch features at the layer that LLaVA reads, without CLS: float16 [B, N, D]."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        chunks = [
            tower(pixels(images[i : i + size]), output_hidden_states=True).hidden_states[-2][:, 1:].half()
            for i in range(0, len(images), size)
        ]
    return torch.cat(chunks)


def thin(visual: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every other time, drop up to 60 % of the visual tokens at random: [B, N, D] -> [B, K, D].

    So the model reads place and number from the features, as models trained on many prompt lengths do, and not from
    the position and the count of the tokens. Some regions lose more than others; content plays no part in the choice.
    """
    draw = torch.rand(2, generator=generator)
    if draw[0] < 0.5:
        return visual
    count = int(visual.shape[1] * (0.4 + 0.6 * draw[1]))
    region = (
        torch.rand(len(visual), GRID // 4, GRID // 4, generator=generator)
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)
    )
    score = torch.rand(visual.shape[:2], generator=generator) + 0.5 * region.flatten(1)
    kept = score.topk(count).indices.sort().values
    return visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))


class LanguageTask(nn.Module):
    """Projector and language model over packed questions: all of a scene share its visual tokens, none sees another."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.projector = model.model.multi_modal_projector
        self.decoder = model.model.language_model
        self.head = model.lm_head

    def logits(self, visual: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """visual [B, K, D], ids [B, Q, LENGTH] -> logits [B, Q, LENGTH, vocabulary]."""
        count, per_scene, length = ids.shape
        kept = visual.shape[1]
        inputs = torch.cat([self.projector(visual), self.decoder.embed_tokens(ids.flatten(1))], 1)
        block = torch.cat([torch.full((kept,), -1), torch.arange(per_scene).repeat_interleave(length)])
        order = torch.arange(len(block))
        visible = (order[:, None] >= order) & ((block == -1) | (block[:, None] == block))
        mask = torch.zeros(visible.shape, dtype=inputs.dtype).masked_fill(~visible, -1e4)
        position = torch.cat([torch.arange(kept), kept + torch.arange(length).repeat(per_scene)])
        hidden = self.decoder(
            inputs_embeds=inputs,
            attention_mask=mask[None, None].expand(count, 1, -1, -1),
            position_ids=position.expand(count, -1),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[:, kept:]).unflatten(1, (per_scene, length))

    def forward(
        self, visual: torch.Tensor, ids: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the answer's words, and a little of the end of sequence after a single one."""
        logits, wanted = self.logits(visual, ids)[:, :, :-1].float(), ids[:, :, 1:]
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape)
        step = torch.arange(LENGTH - 1)
        weight = ((step >= last[..., None]) & (wanted != PAD)).float()
        single = (wanted == EOS) & (weight.sum(-1, keepdim=True) == 2)
        weight[single] = END
        first = step == last[..., None]
        right = (logits.argmax(-1) == wanted)[first].float().mean().item()
        return (weight * loss).sum() / weight.sum(), {"answers": right}


def initialise(model: nn.Module, visual: torch.Tensor) -> None:
    """Word embeddings and projected visual tokens start at one scale; queries start as keys."""
    task = LanguageTask(model)
    with torch.no_grad():
        nn.init.normal_(task.decoder.embed_tokens.weight)
        visual = visual.float()
        first, second = task.projector.linear_1, task.projector.linear_2
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        first.weight.div_(visual.std())
        first.bias.copy_(-first.weight @ visual.mean((0, 1)))
        second.weight.div_(task.projector(visual).std())
        for layer in task.decoder.layers:
            layer.self_attn.q_proj.weight.copy_(layer.self_attn.k_proj.weight)
