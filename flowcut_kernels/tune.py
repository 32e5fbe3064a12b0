"""Guided search of a policy's numbers on unlabelled samples (VFlowOpt, ICCV 2025, arXiv 2508.05211)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .models import patched
from .models._prompt import one_mask, seen_by_last
from .policies import Policy, VFlowOpt
from .policies.base import Range, is_number, is_whole
from .policies.stages import feasible_ratios

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

logger = logging.getLogger("flowcut_kernels")

_SEARCHED = "flowcut_kernels"  # attribute of a study: what it searches
_POLICY = "policy"  # attributes of a trial: its policy as JSON, whether that is the given one, why it was pruned
_START = "start"
_REASON = "reason"
_LEAST_LAST = 0.05  # the ratios before leave that much to the last one
_MANY = 10**6  # tokens of an image, of which any share is a whole number
_PUBLISHED_DEPTHS = (9 / 28, 18 / 28)  # of VFlowOpt's stages


def tune(
    model: nn.Module,
    samples: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    budget: float = 0.10,
    trials: int = 50,
    storage: str | os.PathLike | BaseStorage | None = None,
    *,
    policy: Policy | None = None,
    space: Mapping[str, Range] | None = None,
    sampler: Literal["gp", "tpe"] = "gp",
    seed: int = 0,
    study_name: str | None = None,
    backend: str | None = None,
    progress: bool = True,
    on_trial: Callable[[Study, FrozenTrial], object] | None = None,
) -> Policy:
    """Search the numbers of a policy that change what the model makes of a prompt the least.

    The objective of a policy is the mean over all prompts of the cosine similarity between the final-norm hidden state
    of the last prompt token with and without pruning; no labels are needed, and the unpruned pass runs once. All
    policies compared leave an average of `budget` of the visual tokens over the layers of the language model: the last
    ratio, that of a policy's last cut, follows from all else. The first trial is the policy as it was given, so the
    result is never worse by the objective. Ctrl-C ends the search with what was found so far.

    Args:
        model: an unpatched VLM, one of :func:`supported_models`.
        samples: processor output, each one prompt or a batch of them; about 30 prompts are usual.
        budget: share of visual tokens in (0, 1), averaged over the layers of the language model.
        trials: finished trials that the study shall have in the end, those of earlier runs included. Several workers
            on one storage may finish one more each.
        storage: where trials are kept, so that a search can be resumed and shared by processes and machines: an Optuna
            URL ("sqlite:///tune.db"), a journal file ("journal:///my/tune.log", or a path ending in .log or .journal),
            or an Optuna storage; None: in memory.
        policy: where the search starts, and what its other fields stay at; its own ratio or count is replaced where the
            budget decides it. None: :class:`VFlowOpt` that leaves `budget` before the language model, with stages at
            the published depths that drop nothing yet.
        space: field -> (low, high), (low, high, "int") or (low, high, "log"), with "field.1" for an item of a tuple and
            "llm_stages.0" for the ratio of a stage. A ratio is drawn from what the budget leaves of its range. None:
            ``policy.search_space(budget)``.
        sampler: "gp", a Gaussian process and expected improvement, or "tpe", a tree-structured Parzen estimator.
        seed: of the sampler; with the trial's number it decides what is drawn.
        study_name: of the study in the storage; None: the policy's class and the budget.
        backend: as in :func:`patch`.
        progress: show a bar.
        on_trial: called as ``on_trial(study, trial)`` after every trial of this process, with Optuna's objects.

    Returns:
        The policy of the best trial; ``policy.to_json(path)`` keeps it and ``type(policy).from_json(path)`` reads it.

    Raises:
        ImportError: Optuna is not installed.
        TypeError: samples that are no processor output, a model without a language model, no policy, no storage.
        ValueError: no samples, a range or ratio that cannot be met, stages beyond the model, a storage that cannot be
            opened, a study that searches something else. What a trial of the search cannot meet, or where a state is
            not finite, is no error: it counts as pruned, and the reason is logged.
        RuntimeError: no trial succeeded.
    """
    _require_optuna()
    if not is_number(budget) or not 0 < budget < 1:
        raise ValueError(f"tune: budget={budget!r} must lie in (0, 1): a share of the visual tokens, of which some go")
    if not is_whole(trials) or trials < 1:
        raise ValueError(f"tune: trials={trials!r} must be a whole number, at least 1")
    if not is_whole(seed) or seed < 0:
        raise ValueError(f"tune: seed={seed!r} must be a whole number, at least 0")
    if on_trial is not None and not callable(on_trial):
        raise TypeError(f"tune: on_trial={on_trial!r} must be a function of a study and a trial")
    if sampler not in ("gp", "tpe"):
        raise ValueError(f"tune: sampler={sampler!r} must be 'gp' or 'tpe'")
    layers = _decoder(model).config.num_hidden_layers
    base = published_policy(budget, layers) if policy is None else policy
    search = _Search(base, budget, layers, space)
    with patched(model, search.policy(search.start), backend=backend):
        pass  # what cannot be patched is an error before anything runs
    opened = _patiently(storage, lambda: open_storage(storage))
    objective = Objective(model, samples, backend)

    study = _study(opened, study_name or f"{type(base).__name__} {budget:g}", _sampler(sampler, seed))
    _claim(study, search.facts() | objective.facts())
    _enqueue(study, search.start)
    _run(study, search, objective, trials, progress, on_trial)
    try:
        best = study.best_trial
    except ValueError:
        reasons = {trial.user_attrs.get(_REASON) for trial in study.get_trials(deepcopy=False)}
        raise RuntimeError(f"tune: no trial succeeded: {'; '.join(filter(None, reasons))}") from None
    return type(base).from_json(best.user_attrs[_POLICY])


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError("tune needs Optuna: pip install 'flowcut-kernels[tune]'") from error


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if decoder is model or not hasattr(decoder, "layers"):
        raise TypeError(f"tune: {type(model).__name__} has no language model whose states could be compared")
    return decoder


def published_stages(layers: int) -> tuple[tuple[int, float], ...]:
    """VFlowOpt's stages at the published depths, which drop nothing yet."""
    depths = sorted({round(depth * layers) for depth in _PUBLISHED_DEPTHS} & set(range(1, layers)))
    return tuple((depth, 1.0) for depth in depths)


def published_policy(budget: float, layers: int) -> VFlowOpt:
    """Where :func:`tune` starts by default, for a language model of `layers` layers."""
    return VFlowOpt(retain_ratio=budget, llm_stages=published_stages(layers))


class _Search:
    """What is searched: parameters of a trial in, a policy that meets the budget out."""

    def __init__(self, base: Policy, budget: float, layers: int, space: Mapping[str, Range] | None) -> None:
        if not isinstance(base, Policy):
            raise TypeError(f"tune: policy={base!r} is not a policy: use for example VFlowOpt(retain_ratio=0.1)")
        if getattr(base, "schedule", None) is not None:
            raise ValueError("tune: the policy has a calibrated schedule: tune first, calibrate the result")
        base.check_decoder(layers)
        if space is not None and not isinstance(space, Mapping):
            raise TypeError(f"tune: space={space!r} must map fields to their ranges")
        space = base.search_space(budget) if space is None else dict(space)
        if not space:
            raise ValueError(f"tune: {type(base).__name__} has no numbers to search; name some in space")
        self.base, self.budget, self.layers, self.space = base, budget, layers, space
        # Names of the ratios in the order of the layers where they apply; the budget decides the last one.
        self.stages: tuple[tuple[int, float], ...] = getattr(base, "llm_stages", ())
        self.ratios = ["retain_ratio", *(f"llm_stages.{i}" for i in range(len(self.stages)))]
        for name in space:
            self._check(name)
        self.start = {name: self._start(name) for name in space if name not in self.ratios} | self._start_ratios()

    def _check(self, name: str) -> None:
        found = self.space[name]
        listed = isinstance(found, (tuple, list)) and len(found) in (2, 3) and all(map(is_number, found[:2]))
        kind = found[2] if listed and len(found) == 3 else ""
        fits = kind in ("", "log") or (kind == "int" and all(map(is_whole, found[:2])))
        if not listed or not fits or found[0] >= found[1] or (kind == "log" and found[0] <= 0):
            raise ValueError(
                f"tune: space[{name!r}]={found!r} must be (low, high), (low, high, 'int') of whole numbers or (low, "
                "high, 'log') with low > 0, where low < high"
            )
        if name == self.ratios[-1]:
            raise ValueError(f"tune: space names {name!r}, but the budget decides the last ratio: leave it out")
        if name in self.ratios:
            if kind or not 0 < found[1] <= 1 or found[0] < 0:
                raise ValueError(f"tune: space[{name!r}]={found!r} must be (low, high) within 0..1, for a ratio")
        elif not is_number(_get(self.base, name)):
            raise ValueError(f"tune: space names {name!r}, which is no number of {self.base}")

    def _start(self, name: str) -> float:
        low, high = self.space[name][:2]
        value = _get(self.base, name)
        if not low <= value <= high:
            raise ValueError(
                f"tune: {name}={value} of the policy lies outside of its range {low}..{high}: widen it by space, or "
                "start from another policy"
            )
        return value

    def _start_ratios(self) -> dict[str, float]:
        """Places of the policy's own ratios, or of those next to them that meet the budget."""
        known: list[float] = []
        places: dict[str, float] = {}
        for name in self.ratios:
            least, most = self._interval(name, known)
            known.append(min(max(self._own_ratio(name), least), most))
            if name in self.space:
                places[name] = 0.0 if most <= least else (known[-1] - least) / (most - least)
        return places

    def _own_ratio(self, name: str) -> float:
        if name == "retain_ratio":
            return self.budget if self.base.retain_ratio is None else self.base.retain_ratio
        return self.stages[int(name.partition(".")[2])][1]

    def _range(self, name: str) -> tuple[float, float]:
        """What a ratio may be as long as the budget is met."""
        if name in self.space:
            low, high = self.space[name][:2]
            return low, high
        if name != self.ratios[-1]:
            return self._own_ratio(name), self._own_ratio(name)
        return _LEAST_LAST, 1.0

    def _interval(self, name: str, known: list[float]) -> tuple[float, float]:
        """What is left of a ratio's range if the budget is to be met, given the ratios before."""
        low, high = self._range(name) if name != self.ratios[-1] else (0.0, 1.0)
        later = [self._range(other) for other in self.ratios[len(known) + 1 :]]
        least, most = feasible_ratios(known, later, [layer for layer, _ in self.stages], self.budget, self.layers)
        found = max(least, low), min(most, high)
        if found[0] > found[1] + 1e-9:
            chosen = ", ".join(f"{n}={value:.4g}" for n, value in zip(self.ratios, known, strict=False))
            raise ValueError(
                f"tune: {name} would have to lie in {least:.4g}..{most:.4g} for an average of {self.budget:g} over "
                f"{self.layers} layers{' after ' + chosen if chosen else ''}, but may only in {low:g}..{high:g}"
            )
        return min(found[0], found[1]), found[1]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Of the parameters; that of a ratio is its place, 0..1, in the interval that the budget leaves it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {}
        for name, (low, high, *kind) in self.space.items():
            if name in self.ratios:
                found[name] = FloatDistribution(0.0, 1.0)
            elif kind == ["int"]:
                found[name] = IntDistribution(int(low), int(high))
            else:
                found[name] = FloatDistribution(low, high, log=kind == ["log"])
        return found

    def policy(self, parameters: Mapping[str, Any]) -> Policy:
        """ValueError where the policy does not accept a value, or where no ratio meets the budget."""
        known: list[float] = []
        for name in self.ratios:
            least, most = self._interval(name, known)
            known.append(least + parameters.get(name, 0.0) * (most - least))
        if known[-1] <= 0:
            raise ValueError(f"tune: {self.ratios[-1]} would be {known[-1]:.4g} for an average of {self.budget:g}")
        changes: dict[str, Any] = dict(target_tokens=None, retain_ratio=known[0])
        if self.stages:
            changes["llm_stages"] = tuple((k, ratio) for (k, _), ratio in zip(self.stages, known[1:], strict=True))
        for name, value in parameters.items():
            field, _, item = name.partition(".")
            if name in self.ratios:
                continue
            if item:
                items = list(changes.get(field, getattr(self.base, field)))
                items[int(item)] = value
                value = tuple(items)
            changes[field] = value
        made = replace(self.base, **changes)
        return made if self.stages else self._at_budget(made)

    def _at_budget(self, policy: Policy) -> Policy:
        """`policy` with the ratio whose average the budget is: another one where it cuts in the language model."""
        if policy.feature_budget(_MANY) is None:
            return policy

        def average(ratio: float) -> float:
            return replace(policy, retain_ratio=ratio).average_tokens(self.layers, _MANY) / _MANY

        low, high = 1 / _MANY, 1.0
        if average(low) > self.budget:
            raise ValueError(
                f"tune: {policy} leaves {average(low):.4g} of the tokens on average even with a retain_ratio of 0: cut "
                f"in earlier layers for an average of {self.budget:g}"
            )
        if abs(average(self.budget) - self.budget) < 2 / _MANY:
            return policy
        for _ in range(40):  # it grows with the ratio
            middle = (low + high) / 2
            low, high = (middle, high) if average(middle) < self.budget else (low, middle)
        return replace(policy, retain_ratio=high)

    def facts(self) -> dict[str, Any]:
        space = {name: list(self.space[name]) for name in sorted(self.space)}
        return dict(policy=type(self.base).__name__, fields=asdict(self.base), budget=self.budget, space=space)


def _get(policy: Policy, name: str) -> Any:
    """A field, or an item of a tuple; None where there is no such thing."""
    field, _, item = name.partition(".")
    value = getattr(policy, field, None)
    if not item:
        return value
    return value[int(item)] if item.isdigit() and isinstance(value, tuple) and int(item) < len(value) else None


def _batches(samples: Any) -> list[Mapping[str, Any]]:
    if isinstance(samples, (str, Tensor)) or not isinstance(samples, Iterable):
        raise TypeError(f"tune: samples is {type(samples).__name__}; give processor output, of one prompt or several")
    batches = [samples] if isinstance(samples, Mapping) else list(samples)
    if not batches:
        raise ValueError("tune: samples is empty; give processor output of at least one prompt")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise TypeError(
                f"tune: samples[{number}] is {type(batch).__name__} without input_ids; give processor output"
            )
        ids = batch["input_ids"]
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"tune: samples[{number}] holds no prompt: input_ids has shape {tuple(ids.shape)}")
        if not any(name.startswith("pixel_values") and x is not None for name, x in batch.items()):  # of several names
            raise ValueError(f"tune: samples[{number}] holds no pixel_values; without an image nothing is pruned")
    return batches


class Objective:
    """Mean cosine similarity of the last prompt token's final-norm state to that of the unpruned model.

    Args:
        model: unpatched; it runs on all samples at once.
        samples, backend: as in :func:`tune`.
    """

    def __init__(self, model: Any, samples: Any, backend: str | None = None) -> None:
        self.model, self.decoder, self.backend = model, _decoder(model), backend
        digest = hashlib.sha256()
        self.batches = []
        for batch in _batches(samples):
            for name, x in sorted(batch.items()):
                digest.update(f"{name} {getattr(x, 'shape', x)} {getattr(x, 'dtype', '')}".encode())
                if isinstance(x, Tensor):
                    digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            self.batches.append({name: self._placed(x) for name, x in batch.items()})
        self.digest = digest.hexdigest()[:16]
        self.unpruned = self._states()

    def _placed(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(self.model.device, self.model.dtype if x.is_floating_point() else x.dtype)

    def facts(self) -> dict[str, Any]:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return dict(samples=self.digest, model=f"{type(self.model).__name__}, {parameters:,} parameters")

    def __call__(self, policy: Policy) -> float:
        return self.similarities(policy).mean().item()

    def similarities(self, policy: Policy) -> Tensor:
        """Of every prompt, float64 on the CPU; ValueError where a state is not finite."""
        with patched(self.model, policy, backend=self.backend):
            return torch.cosine_similarity(self._states(), self.unpruned, dim=1).cpu()

    @torch.inference_mode()
    def _states(self) -> Tensor:
        """Final-norm states of the last prompt tokens [prompts, D], float64."""
        found: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, given: dict[str, Any], output: Any) -> None:
            found.append(_last(output.last_hidden_state, given.get("attention_mask"), given.get("visual_tokens")))

        hook = self.decoder.register_forward_hook(keep, with_kwargs=True)
        try:
            for batch in self.batches:
                self.model(**batch, logits_to_keep=1, use_cache=False)
        finally:
            hook.remove()
        states = torch.cat(found).double()
        broken = (~states.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"tune: the last hidden states of prompts {broken} hold NaN or Inf")
        return states


def _last(hidden: Tensor, mask: Any, visual: Any) -> Tensor:
    """Rows of the last live columns of hidden [B, M, D].

    Args:
        mask: of the L columns that went in, [B, L] or as models prepare it, [B, 1, L, L]; None: all are live.
        visual: `VisualTokens` of a language model that pruned, whose `kept` names the M columns that came out.
    """
    mask = one_mask(mask)
    if mask is not None and mask.dim() == 4:
        mask = seen_by_last(mask)
    kept = None if visual is None else visual.kept
    if kept is not None:
        live = kept >= 0
        if mask is not None:
            live &= mask.bool().gather(1, kept.clamp_min(0))
    elif mask is not None:
        live = mask.bool()
    else:
        return hidden[:, -1]
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), torch.where(live, columns, 0).amax(1)]


def _sampler(kind: str, seed: int) -> BaseSampler:
    import numpy as np
    from optuna.samplers import BaseSampler, GPSampler, TPESampler
    from optuna.trial import TrialState

    class Numbered(BaseSampler):
        """A sampler of its own for every trial, seeded by its number.

        No two workers draw the same, and a study that was interrupted goes on as it would have.
        """

        inner: BaseSampler

        def before_trial(self, study, trial):
            number = int(np.random.SeedSequence([seed, trial.number]).generate_state(1)[0])
            if kind == "gp":
                self.inner = GPSampler(seed=number, warn_independent_sampling=False)
            else:
                self.inner = TPESampler(seed=number)

        def infer_relative_search_space(self, study, trial):
            finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            if finished and finished[-1].state is TrialState.PRUNED:
                return {}  # nothing was learnt from it: the same would be drawn again
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(self, study, trial, search_space):
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(self, study, trial, param_name, param_distribution):
            return self.inner.sample_independent(study, trial, param_name, param_distribution)

    return Numbered()


def _study(storage: Any, name: str, sampler: BaseSampler) -> Study:
    import optuna

    return _patiently(
        storage,
        lambda: optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True
        ),
    )


def _patiently(storage: Any, act: Callable[[], Any]) -> Any:
    """What `act` returns, tried again where another worker is making the same tables."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, DBAPIError

    for wait in (0.2, 0.4, 0.8, 1.6, None):
        try:
            return act()
        except (ArgumentError, DBAPIError, StorageInternalError, OSError) as error:
            if wait is None or isinstance(error, (ArgumentError, OSError)):
                raise ValueError(f"tune: storage={storage!r} cannot be opened: {error}") from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def open_storage(storage: Any) -> Any:
    """The Optuna storage that :func:`tune` means by its argument."""
    from optuna.storages import BaseStorage, JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if storage is None or isinstance(storage, BaseStorage):
        return storage
    if not isinstance(storage, (str, os.PathLike)):
        raise TypeError(f"tune: storage={storage!r} must be a URL, a journal file's path or an Optuna storage")
    text = os.fspath(storage)
    if text.startswith("journal://") or ("://" not in text and Path(text).suffix in (".log", ".journal")):
        return JournalStorage(JournalFileBackend(text.removeprefix("journal://")))
    if "://" not in text:
        raise ValueError(
            f"tune: storage={text!r} must be a URL such as sqlite:///tune.db, or a journal file (.log, .journal)"
        )
    waits = dict(connect_args=dict(timeout=60)) if text.startswith("sqlite") else {}
    return RDBStorage(text, engine_kwargs=waits)


def _claim(study: Study, facts: dict[str, Any]) -> None:
    """Write down what a new study searches; ValueError if an old one searches something else."""
    facts = json.loads(json.dumps(facts))
    there = study.user_attrs.get(_SEARCHED)
    if there is None:
        study.set_user_attr(_SEARCHED, facts)
        return
    other = [f"{key} {there.get(key)!r} there, {facts[key]!r} here" for key in facts if there.get(key) != facts[key]]
    if other:
        raise ValueError(
            f"tune: study {study.study_name!r} of this storage searches something else ({'; '.join(other)}): give "
            "another study_name or storage"
        )


def _enqueue(study: Study, start: dict[str, float]) -> None:
    """Make the policy as it was given the next trial, unless it was one; a trial that runs may be a dead worker's."""
    there = (trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get(_START))
    if not any(trial.state.name in ("WAITING", "COMPLETE", "PRUNED") for trial in there):
        study.enqueue_trial(start, user_attrs={_START: True})


def _run(
    study: Study,
    search: _Search,
    objective: Objective,
    trials: int,
    progress: bool,
    on_trial: Callable[[Study, FrozenTrial], object] | None,
) -> None:
    from optuna.trial import TrialState
    from tqdm.auto import tqdm

    def finished() -> int:
        return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))

    with tqdm(total=trials, initial=min(finished(), trials), desc="tune", disable=not progress) as bar:
        try:
            while (done := finished()) < trials:
                bar.update(done - bar.n)
                trial = study.ask(search.distributions)
                try:
                    policy = search.policy(trial.params)
                    trial.set_user_attr(_POLICY, policy.to_json())
                    value = objective(policy)
                except ValueError as error:
                    logger.warning("trial %d is pruned: %s", trial.number, error)
                    trial.set_user_attr(_REASON, str(error))
                    frozen = study.tell(trial, state=TrialState.PRUNED)
                except BaseException:
                    study.tell(trial, state=TrialState.FAIL)
                    raise
                else:
                    frozen = study.tell(trial, value)
                    bar.set_postfix(best=f"{study.best_value:.4f}")
                if on_trial is not None:
                    on_trial(study, frozen)
            bar.update(done - bar.n)
        except KeyboardInterrupt:
            if not any(trial.state is TrialState.COMPLETE for trial in study.get_trials(deepcopy=False)):
                raise
            logger.warning("tune: stopped after %d of %d trials; the best of them counts", finished(), trials)
