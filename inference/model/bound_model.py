"""A model and a guide made runnable: set up once, checked once, then bound to a parameter vector."""

from __future__ import annotations

import copy
import functools
import reprlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from inference.data.arguments import argument_names, row_count
from inference.model.elbo import Model, traces_with_plates
from inference.model.improper_priors import let_flat_priors_start
from inference.model.nonfinite_sites import refuse_non_finite
from inference.model.parameters import Params
from inference.model.sites import (
    Site,
    is_point_guide,
    latent_values,
    observed_arguments,
    observed_nodes,
    refuse_broadcast,
    score_sites,
)
from inference.model.subsampling import SubsampleScale, Subsampling
from inference.model.vectorization import remembering
from inference.utils.errors import problem_of
from inference.utils.random_state import RandomStream, environment
from inference.utils.validation import as_device
from inference.utils.warnings import warn

__all__ = [
    "BoundModel",
    "clone",
    "device_for",
    "from_sendable",
    "name_of",
    "named_failure",
    "row_scale",
    "set_training",
    "to_sendable",
]

T = TypeVar("T")


@dataclass(frozen=True)
class BoundModel:
    """A model and a guide with the parameters, latents and observed sites that one run showed.

    ``score_function_sites`` are the latents that need score-function gradients; ``is_delta``
    says that the guide puts all its mass on one value, as AutoDelta does.
    """

    model: Model
    guide: Model
    params: Params
    latents: tuple[Site, ...]
    observed: tuple[Site, ...]
    score_function_sites: tuple[str, ...]
    is_delta: bool
    device: torch.device
    dtype: torch.dtype
    _one_by_one: set[Hashable] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def start(
        cls,
        model: Model,
        guide: Model,
        args: tuple[Any, ...],
        stream: RandomStream,
        device: torch.device,
        dtype: torch.dtype,
        check_values: bool = True,
        batch_size: int | None = None,
    ) -> BoundModel:
        """Run guide and model once on ``args``, validated, and record what they are made of.

        The caller's guide is copied first, so that a guide can be fitted any
        number of times from the same start. ``check_values=False`` is for
        placeholder data: it leaves out the checks of values and densities. With
        a ``batch_size`` no more rows than that are looked at together, but where
        one of Pyro's autoguides has to lay out latents of each row.

        Raises
        ------
        ValueError
            If model or guide cannot run on the data, if their sites differ, or
            if a density is not finite at the first draw.
        """
        guide = clone(guide)
        let_flat_priors_start(guide)
        set_training(guide, False)
        with stream.active(), environment(device, dtype, validate=check_values):
            with _few_rows(model, guide, args, batch_size):
                params = Params.discover(lambda: _first_run(model, guide, args))
                with params.bound(params.flatten()):
                    model_trace, guide_trace = _first_run(model, guide, args)
            with params.bound(params.flatten()):
                for name, node in observed_nodes(model_trace).items():
                    refuse_broadcast(name, node)
                given = observed_arguments(model_trace, args)
                observed = [Site.of(n, node, given.get(n)) for n, node in observed_nodes(model_trace).items()]
                if check_values:
                    for site in observed:
                        whole = model_trace.nodes[site.name]["value"] if site.argument is None else args[site.argument]
                        site.refuse_impossible(whole)
                    named_failure("guide", guide, args, guide_trace.log_prob_sum)
                    named_failure("model", model, args, model_trace.log_prob_sum)
                    refuse_non_finite(model_trace, guide_trace, "at the first draw")
                    _warn_of_nothing_observed(model, model_trace, args)
        return cls(
            model,
            guide,
            params,
            tuple(Site.of(name, guide_trace.nodes[name]) for name in latent_values(guide_trace)),
            tuple(observed),
            score_sites(guide_trace),
            is_point_guide(guide_trace),
            device,
            dtype,
        )

    @contextmanager
    def running(self, flat_params: Tensor, stream: RandomStream, grad: Tensor | None = None) -> Iterator[None]:
        """Everything between here and the end of the block reads θ = ``flat_params`` and draws from ``stream``."""
        with (
            stream.active(),
            environment(self.device, self.dtype, validate=False),
            self.params.bound(flat_params, grad),
            remembering(self._one_by_one),
        ):
            yield


def clone(guide: Model) -> Model:
    """A copy of a guide that shares nothing trainable with it; plain functions are returned as they are."""
    if not isinstance(guide, nn.Module):
        return guide
    # An AutoGuide drops its reference to the model when it is copied, from the original too.
    parts = _autoguides(guide)
    references = [(part._model, part.master) for part in parts]
    try:
        twin = copy.deepcopy(guide)
    finally:
        for part, (model, master) in zip(parts, references, strict=True):
            part._model, part.master = model, master
    for part, (model, _) in zip(_autoguides(twin), references, strict=True):
        part._model = model
    return twin


def to_sendable(guide: Model) -> tuple[Model, list[Model]]:
    """A guide for another process, and the models that its parts lose on the way; see :func:`from_sendable`."""
    return clone(guide), [part.model for part in _autoguides(guide)]


def from_sendable(guide: Model, models: list[Model]) -> Model:
    """The guide of a :func:`to_sendable`, with its models again."""
    for part, model in zip(_autoguides(guide), models, strict=True):
        part._model = (model,)
    return guide


def row_scale(bound_model: BoundModel, args: tuple[Any, ...], rows: int) -> SubsampleScale:
    """Return the scale that makes the batch ``args`` stand for all ``rows`` in model and guide.

    Raises
    ------
    ValueError
        If the model observes rows outside of a plate over them, or an autoguide
        would keep a distribution for each row of a batch.
    """
    batch = row_count(args) or 1
    scale = SubsampleScale(rows / batch)
    longer = tuple(torch.cat([v, v[:1]]) if isinstance(v, Tensor) and v.dim() else v for v in args)
    automatic = isinstance(bound_model.guide, AutoGuide)
    with bound_model.running(bound_model.params.flatten(), RandomStream.seeded(0)), torch.no_grad(), scale:
        for given in (longer, args):
            if not automatic:
                poutine.trace(bound_model.guide).get_trace(*given)
            model_trace = poutine.trace(bound_model.model).get_trace(*given)
    scale.require_use(model_trace, rows)
    own = [name for name in latent_values(model_trace) if scale.is_of_rows(model_trace.nodes[name])]
    if own and automatic:
        raise ValueError(
            f"{name_of(bound_model.guide)} keeps a distribution for each row of {own}, and a fit by batches sees new "
            "rows at each step: use a guide that computes them from the row, such as amortized_encoder"
        )
    return scale


def _autoguides(guide: Model) -> list[AutoGuide]:
    parts = guide.modules() if isinstance(guide, nn.Module) else []
    return [part for part in parts if isinstance(part, AutoGuide)]


def device_for(device: str | torch.device, *functions: Model) -> torch.device:
    """The device to run on: for ``"auto"`` that of the networks in model and guide, or else a GPU where there is one.

    Raises
    ------
    ValueError
        If this machine does not have it, or a network lies on another.
    """
    modules = [function for function in functions if isinstance(function, nn.Module)]
    found = {parameter.device for module in modules for parameter in module.parameters()}
    if len(found) > 1:
        raise ValueError(
            f"the parameters of model and guide are on {sorted(map(str, found))}: bring them to one device"
        )
    own = found.pop() if found else None
    if isinstance(device, str) and device == "auto" and own is not None:
        return own
    wanted = as_device(device)
    if own is not None and own.type != wanted.type:
        raise ValueError(
            f"the parameters of the model are on {own}, but device is {wanted}: use model.to({str(wanted)!r})"
        )
    return wanted


def set_training(guide: Model, training: bool) -> None:
    """Tell a guide that is a module, by torch's own switch, whether it is being fitted or asked."""
    if isinstance(guide, nn.Module):
        guide.train(training)


@contextmanager
def _few_rows(model: Model, guide: Model, args: tuple[Any, ...], batch_size: int | None) -> Iterator[None]:
    rows = row_count(args)
    if batch_size is None or rows is None:
        yield
        return
    few, parts = Subsampling(rows, batch_size), _autoguides(guide)
    whole = bool(parts) and _has_latents_of_rows(model, args, few)
    models = [part._model for part in parts]
    if not whole:  # an autoguide hides its own run of the model
        for part in parts:
            part._model = (Subsampling(rows, batch_size)(part.model),)
    try:
        with nullcontext() if whole and isinstance(guide, AutoGuide) else few:
            yield
    finally:
        for part, own in zip(parts, models, strict=True):
            part._model = own


def _has_latents_of_rows(model: Model, args: tuple[Any, ...], few: Subsampling) -> bool:
    """Return True if a latent lies in a plate over the rows."""
    with pyro.get_param_store().scope(), few, torch.no_grad():
        trace = named_failure("model", model, args, lambda: poutine.trace(model).get_trace(*args))
    latents = [trace.nodes[name] for name in latent_values(trace)]
    return any(frame.name in few.plates for site in latents for frame in site["cond_indep_stack"])


def _first_run(model: Model, guide: Model, args: tuple[Any, ...]) -> tuple[poutine.Trace, poutine.Trace]:
    if not isinstance(poutine.unwrap(guide), AutoGuide | Messenger):  # those run the model themselves
        named_failure("guide", guide, args, lambda: poutine.trace(guide).get_trace(*args))
    pair = named_failure("model", model, args, lambda: traces_with_plates(model, guide, args))
    _check_sites(*pair)
    return pair


def named_failure(role: str, function: Model, args: tuple[Any, ...], run: Callable[[], T]) -> T:
    """``run()``, or one ValueError that says whose code failed on which shapes, and why."""
    try:
        return run()
    except Exception as error:
        given = ", ".join(map(_described, args))
        raise ValueError(
            f"the {role} {name_of(function)!r} could not run on data of shapes {given}: {problem_of(error)}"
        ) from error


def _described(value: Any) -> str:
    """The shape of a tensor, with its type where that is unusual; what else it is in a few words."""
    if not isinstance(value, Tensor):
        return reprlib.repr(value)
    kind = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{kind}"


def name_of(function: Model) -> str:
    """Return the name of a model or a guide, under any ``functools.partial``."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _warn_of_nothing_observed(model: Model, model_trace: poutine.Trace, args: tuple[Any, ...]) -> None:
    """Say so where a model could have been given more data, and observes none."""
    if any(node["type"] == "sample" and node["is_observed"] for node in model_trace.nodes.values()):
        return
    names = argument_names(model, len(args) + 1)
    left_out = [name for name, value in zip(names, (*args, None), strict=True) if value is None]
    if args and not left_out[0].startswith("argument "):
        warn(f"the model {name_of(model)!r} observes nothing, as {left_out[0]} is not given: the fit is of its prior")


def _check_sites(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> None:
    wanted = set(latent_values(model_trace))
    offered = set(latent_values(guide_trace))
    if wanted == offered:
        return
    parts = []
    if wanted - offered:
        parts.append(f"the model samples {sorted(wanted - offered)}, which the guide does not")
    if offered - wanted:
        parts.append(f"the guide samples {sorted(offered - wanted)}, which the model does not")
    raise ValueError(
        f"model and guide disagree: {'; '.join(parts)}: name the same sites in both, or pass the data that the "
        "model observes (extra guide sites need infer={'is_auxiliary': True})"
    )
