"""A patched model for lmms-eval: ``--model flowcut --model_args pretrained=NAME,policy=FlowCut,target_tokens=64``.

lmms-eval finds it by the entry point ``lmms_eval.models``; it comes with the extra ``flowcut-kernels[lmms-eval]``.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from .. import policies
from ..models import patch, trace
from ..policies import Policy

POLICIES: dict[str, type[Policy]] = {name: getattr(policies, name) for name in policies.__all__ if name != "Policy"}
UNPATCHED = "none"


def manifest() -> ModelManifest:
    """What lmms-eval is told by the entry point: the model's name and where its class is."""
    return ModelManifest("flowcut", chat_class_path=f"{__name__}.PatchedModel")


def policy_of(name: str | None, path: str | None, given: dict[str, Any]) -> Policy | None:
    """The policy that command-line arguments describe.

    Args:
        name: of a policy's class; "none" for no policy.
        path: JSON of :meth:`Policy.to_json`, in place of the other two.
        given: fields of the policy.

    Raises:
        ValueError: an unknown name or field, a file that holds no policy, or values that the policy refuses.
        TypeError: a field's value of the wrong type.
        OSError: a file that cannot be read.
    """
    choices = f"one of {', '.join(POLICIES)}, or {UNPATCHED} for no pruning"
    if (name is None) == (path is None):
        raise ValueError(
            f"give exactly one of policy ({choices}) and policy_json, got policy={name}, policy_json={path}"
        )
    source = f"policy={name}" if path is None else f"policy_json={path}"
    if path is not None:
        try:
            content = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: this is no JSON: {error}") from error
        name = content.get("policy") if isinstance(content, dict) else None
    kind = POLICIES.get(str(name))
    if kind is None and source != f"policy={UNPATCHED}":
        raise ValueError(f"{source}: {name} is no policy: use {choices}")
    known = [field.name for field in fields(kind)] if kind and path is None else []
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"unknown argument {', '.join(unknown)}: {source} takes {', '.join(known) or 'no fields'}")
    if path is not None and kind:
        return kind.from_json(path)
    return kind(**given) if kind else None


class PatchedModel(lmms):
    """A model that :func:`flowcut_kernels.patch` serves, for tasks whose answers are generated.

    Prompts are made by the processor's chat template and answered greedily unless the task sets a temperature, with at
    most 1,024 tokens unless it sets a limit. As with lmms-eval's own chat models, answers are not cut at ``until``. The
    visual tokens kept per image at the last cut of each stage ("encoder": per tile, "features", "llm"), averaged over
    the images of the first process, are the results' ``throughput: avg_kept_STAGE``.

    Args:
        pretrained: name or folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load.
        policy: name of a policy, such as "FlowCut"; "none" answers unpatched, for comparison.
        policy_json: file of :meth:`Policy.to_json`, in place of `policy` and `given`.
        revision: of the weights.
        dtype: of the weights; "auto": as they are stored.
        attn_implementation: as in transformers.
        device: "cpu", "cuda:1", ...; None, or where several processes share the work: accelerate's choice.
        device_map: as in transformers, in place of `device`.
        backend: of :func:`flowcut_kernels.patch`.
        batch_size: prompts per call of ``generate``.
        max_batch_size: not used; lmms-eval passes it on.
        given: fields of the policy, such as ``target_tokens=64``.

    Raises:
        ValueError, TypeError: arguments that make no policy, before anything is loaded; a model that cannot be patched.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        policy: str | None = None,
        policy_json: str | None = None,
        *,
        revision: str = "main",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        backend: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        self.policy = policy_of(policy, policy_json, given)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be a whole number, at least 1")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        alone = self.accelerator.num_processes == 1
        self.device = torch.device(device) if device is not None and alone else self.accelerator.device
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, revision=revision, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map
        ).eval()
        self.model = model if device_map else model.to(self.device)
        if self.policy is not None:
            patch(self.model, self.policy, record=True, backend=backend)
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
        self.processor.tokenizer.padding_side = "left"  # answers start right after their prompts

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        alike = defaultdict(list)  # settings of generation -> places of the requests that have them
        for place, request in enumerate(requests):
            alike[repr(request.args[2])].append(place)
        size = self.batch_size
        parts = [places[i : i + size] for places in alike.values() for i in range(0, len(places), size)]
        answers: dict[int, GenerationResult] = {}
        kept: dict[str, list[int]] = defaultdict(list)
        seconds = 0.0
        for part in tqdm(parts, disable=self.rank != 0, desc="flowcut"):
            given, spent = self._answer([requests[place] for place in part], kept)
            answers.update(zip(part, given, strict=True))
            seconds += spent
        tokens = sum(answer.token_counts.output_tokens for answer in answers.values())
        facts = {f"kept_{name}": mean(counts) for name, counts in kept.items()}
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, facts)
        return [answers[place] for place in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, requests: list[Instance], kept: dict[str, list[int]]) -> tuple[list[GenerationResult], float]:
        """Answers to requests of one setting, and seconds in ``generate``; adds each image's tokens to `kept`."""
        inputs = self._inputs([
            ChatMessages(messages=to_messages(self.task_dict[task][split][document]))
            for _, to_messages, _, document, task, split in (request.args for request in requests)
        ])  # fmt: skip
        start = time.perf_counter()
        written = self.model.generate(**inputs, **self._settings(requests[0].args[2]))
        written = written[:, inputs["input_ids"].shape[1] :].cpu()
        seconds = time.perf_counter() - start
        if self.policy is not None and any(name.startswith("pixel_values") for name in inputs):
            for name, counts in {stage.name: stage.kept for stage in trace(self.model).stages}.items():
                kept[name] += counts  # of the last cut
        lengths = (written != self.processor.tokenizer.pad_token_id).sum(1).tolist()
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        counted = [TokenCounts(output_tokens=length) for length in lengths]
        return [GenerationResult(text, count) for text, count in zip(texts, counted, strict=True)], seconds

    def _inputs(self, asked: list[ChatMessages]) -> BatchFeature:
        """Processor output of prompts, padded on the left."""
        prompts = self.processor.apply_chat_template(
            [messages.to_hf_messages() for messages in asked], add_generation_prompt=True, tokenize=False
        )
        images, videos, sounds = zip(*(messages.extract_media() for messages in asked), strict=True)
        if any(sounds):
            raise ValueError("flowcut reads images and videos; this task has sound")
        start = self.processor.tokenizer.bos_token  # the tokenizer adds it where the template does not
        return self.processor(
            text=prompts,
            images=list(images) if any(images) else None,
            videos=list(videos) if any(videos) else None,
            add_special_tokens=start is None or not prompts[0].startswith(start),
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)

    def _settings(self, task: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` that a task sets, greedy without a temperature."""
        sampled = {name: task[name] for name in ("temperature", "top_p", "top_k") if task.get(name) is not None}
        sample = sampled.get("temperature", 0) > 0
        return dict(
            max_new_tokens=task.get("max_new_tokens", 1024),
            num_beams=task.get("num_beams", 1),
            pad_token_id=self.processor.tokenizer.pad_token_id,
            do_sample=sample,
            **(sampled if sample else dict(temperature=None, top_p=None, top_k=None)),
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("flowcut answers tasks that generate; choose a task variant without loglikelihood")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("flowcut answers tasks of one round")
