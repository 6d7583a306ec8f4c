"""The fitted approximation q(z): its parameters, how they came about, and everything that runs under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from inference.data.arguments import as_tensors, check_new_shapes, shape_of
from inference.data.batch_loader import BatchLoader
from inference.model.bound_model import BoundModel, name_of, set_training
from inference.model.elbo import traces
from inference.model.guide_density import as_points, log_density
from inference.model.protocols import SupportsEncode, supports
from inference.model.sites import observed_nodes
from inference.model.vectorization import draws_together, map_over_draws
from inference.optim.adaptive import StopReason
from inference.predictive.sampling import LatentSampler
from inference.utils.random_state import RandomStream
from inference.utils.validation import one_of, positive_integer, seed_number

__all__ = ["Approximation", "FitRecord"]


@dataclass(frozen=True)
class FitRecord:
    """Record of a fit: −ELBO and its KL per step, seconds, seed, options, −ELBO where each start ended.

    ``evaluations`` counts gradients of the log joint, those of the search of a
    start and those of steps and particles; ``stop`` says why it ended where
    that was to be found.
    """

    losses: np.ndarray
    kl: np.ndarray
    seconds: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    starts: tuple[float, ...] = ()
    evaluations: int = 0
    stop: StopReason | None = None


class Approximation:
    """A model and a guide with the parameters θ that a fit found, the arguments of the fit, and its record.

    Functions that answer questions by running it, such as
    :func:`~inference.predictive.posterior_predictive.predict`, take it as their
    first argument; :class:`~inference.Posterior` has them as methods.

    Attributes
    ----------
    bound_model
        Model, guide, and what one run showed of their sites.
    flat_params
        θ as one vector of unconstrained numbers, shape (P,).
    args
        The arguments of the fit. The first batch if the rows were read in batches;
        placeholders of the same shapes if the posterior was loaded without its data.
    argument_names
        The names of the arguments of the fit.
    record
        How the fit went.
    has_data
        True if ``args`` are data, False if they are placeholders.
    batches
        The reader of all rows, if they were read in batches.
    """

    def __init__(
        self,
        bound_model: BoundModel,
        flat_params: Tensor,
        args: tuple[Any, ...],
        names: list[str],
        record: FitRecord,
        has_data: bool = True,
        batches: BatchLoader | None = None,
    ) -> None:
        set_training(bound_model.guide, False)
        self.bound_model = bound_model
        self.flat_params = flat_params
        self.args = args
        self.has_data = has_data
        self.batches = batches
        self.argument_names = names
        self.record = record

    @property
    def losses(self) -> np.ndarray:
        """−ELBO in nats, one estimate a step, shape (steps,)."""
        return self.record.losses

    @property
    def kl(self) -> np.ndarray:
        """KL(q ‖ p(z)) in nats, one estimate a step, shape (steps,): what the latents cost.

        The other part of −ELBO is what the data cost, −E_q log p(x | z) =
        ``losses − kl``, factors included. NaN where the guide needs
        score-function gradients.
        """
        return self.record.kl

    @property
    def stop_reason(self) -> str:
        """The reason why the fit ended, with figures where it was to find its end: ``optimizer="auto"``."""
        stop = self.record.stop
        return f"all {len(self.losses):,} steps were taken" if stop is None else stop.reason

    @property
    def params(self) -> dict[str, Tensor]:
        """The fitted parameters by name, in the user's (constrained) space."""
        return self.bound_model.params.constrained(self.flat_params)

    @property
    def unconstrained_params(self) -> dict[str, Tensor]:
        """The fitted parameters by the same names, as the optimiser moves them: any real numbers.

        Flattened and joined in this order they are θ, shape (P,). A scale σ, for
        one, is kept as the number whose softplus or exponential it is.

        >>> import kiln
        >>> from kiln.guides import mean_field_normal
        >>> from kiln.models import linear_regression
        >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
        >>> guide = mean_field_normal(linear_regression)
        >>> posterior = kiln.fit(linear_regression, guide, x, x[:, 0], steps=10, progress=False)
        >>> name = "AutoNormal.scales.bias"
        >>> bool(posterior.params[name] > 0), bool(posterior.unconstrained_params[name] > 0)
        (True, False)
        """
        return {name: view.clone() for name, view in self.bound_model.params.named(self.flat_params).items()}

    @property
    def model_name(self) -> str:
        """The name of the model function or module."""
        return name_of(self.bound_model.model)

    @property
    def guide_name(self) -> str:
        """The name of the guide function or class."""
        return name_of(self.bound_model.guide)

    @property
    def data(self) -> tuple[Any, ...]:
        """The arguments of the fit; where its rows were read in batches, the first batch.

        Raises
        ------
        ValueError
            If the posterior was loaded without them.
        """
        if not self.has_data:
            given = ", ".join(self.argument_names)
            raise ValueError(f"this posterior was loaded without its data: pass it, load(path, model, guide, {given})")
        return self.args

    @property
    def observed_site(self) -> str:
        """The name of the one observed site.

        Raises
        ------
        ValueError
            If there is none, or several.
        """
        sites = [site.name for site in self.bound_model.observed]
        if len(sites) == 1:
            return sites[0]
        raise ValueError(f"the model observes {sites or 'no site'}: pass site= with the name of one to predict")

    @property
    def is_autoencoder(self) -> bool:
        """True if the model observes what the guide encodes, so that rows are remade rather than predicted."""
        sites = self.bound_model.observed
        return supports(self.bound_model.guide, SupportsEncode) and len(sites) == 1 and sites[0].argument == 0

    @property
    def latent_sampler(self) -> LatentSampler:
        """Draws of z for the rows of the fit and for new ones; use it inside :meth:`running`."""
        return LatentSampler(self.bound_model, self.args)

    @contextmanager
    def running(self, seed: int, branch: int = 0) -> Iterator[None]:
        """Run everything inside the block at the fitted parameters, without gradients.

        Random numbers depend on the seed and on ``branch``: calls that take the
        same seed from the caller, and must not repeat each other's numbers, differ in it.
        """
        set_training(self.bound_model.guide, False)
        stream = RandomStream.seeded(seed_number(seed), branch)
        with torch.no_grad(), self.bound_model.running(self.flat_params, stream):
            yield

    def resolve_site(self, given: str | None) -> str:
        """Return the observed site to answer for: the one given, or else the only one."""
        known = [site.name for site in self.bound_model.observed]
        if given is None or not known:
            return self.observed_site
        return one_of(given, "site", known)

    def resolve_batch_size(self, given: int | None) -> int | None:
        """Return the most rows to run at a time: the number given, or else that of the fit; None for all."""
        size = self.record.options.get("batch_size") if given is None else given
        return None if size is None else positive_integer(size, "batch_size")

    def names_of(self, data: tuple[Any, ...]) -> list[str]:
        """Return a name for each of ``data``; those beyond the arguments of the fit are numbered."""
        return self.argument_names[: len(data)] + [f"argument {i}" for i in range(len(self.argument_names), len(data))]

    def check_arguments(self, data: tuple[Any, ...], rows: slice | None = None) -> tuple[Any, ...]:
        """Return ``data`` as the model takes it, checked against the fit, with None for arguments that are missing.

        ``rows`` says where these rows lie in the caller's data, for messages.
        """
        names, first = self.names_of(data), 0
        if rows is not None:
            names, first = [f"{name}[{rows.start}:{rows.stop}]" for name in names], rows.start
        args = as_tensors(data, names, self.bound_model.device, self.bound_model.dtype, shared=True, first_row=first)
        check_new_shapes(args, self.argument_names, [shape_of(value) for value in self.args])
        for site in self.bound_model.observed:
            if site.argument is not None and site.argument < len(args) and args[site.argument] is not None:
                site.refuse_impossible(args[site.argument])
        return args + (None,) * (len(self.args) - len(args))

    def sample(self, draws: int = 1000, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw from q(z): ``{site: tensor of shape (S, *site shape)}``, in the model's own space."""
        count = positive_integer(draws, "draws")
        with self.running(seed):
            drawn = self.latent_sampler.draw(count, self.args)
        return {name: value.cpu() for name, value in drawn.items()}

    def log_prob(self, values: Mapping[str, Any]) -> Tensor:
        """log q(z) in nats at any values of the latents, ``{site: (..., *site shape)}`` in the model's own space.

        The shape is that of the leading dimensions, which all sites share: a
        single point gives a scalar, the draws of :meth:`sample` (S,).

        Raises
        ------
        ValueError
            If a site is missing or unknown or has another shape, or if q has no
            density: a point guide, or one that draws more than the latents.
        """
        if self.bound_model.is_delta:
            raise ValueError(f"the guide {self.guide_name!r} puts all its mass on one point, it has no density")
        points, leading = as_points(values, self.bound_model)
        with self.running(0):
            found = log_density(self.bound_model.guide, self.args, points)
        return found.reshape(leading).cpu()

    def prior(self, draws: int = 1000, *, seed: int = 0, rows: int | None = None) -> dict[str, Tensor]:
        """Draw latents and observations from the model before the data, ``{site: (S, *site shape)}``.

        At all rows of the fit, or the first ``rows``. Empty where a prior is
        flat, which nothing can be drawn from.
        """
        rows = None if rows is None else positive_integer(rows, "rows")
        data = tuple(value[:rows] if isinstance(value, Tensor) and value.dim() else value for value in self.data)
        names = {site.name for site in (*self.bound_model.latents, *self.bound_model.observed)}
        model = poutine.uncondition(self.bound_model.model)

        def run(_: object) -> dict[str, Tensor]:
            nodes = poutine.trace(model).get_trace(*data).nodes
            return {name: node["value"] for name, node in nodes.items() if name in names}

        with self.running(seed):
            try:
                found: dict[str, Tensor] = map_over_draws(
                    run, {}, positive_integer(draws, "draws"), draws_together(data)
                )
                return found
            except NotImplementedError:
                return {}

    def observed_values(self) -> dict[str, Tensor]:
        """Return what the model observed in the fit, ``{site: tensor}``."""
        sites = self.bound_model.observed
        if all(site.argument is not None for site in sites):
            return {site.name: self.data[site.argument or 0] for site in sites}
        with self.running(0):
            model_trace, _ = traces(self.bound_model.model, self.bound_model.guide, self.data)
        return {name: site["value"] for name, site in observed_nodes(model_trace).items()}

    def inputs(self) -> dict[str, Tensor]:
        """The tensors among the arguments of the fit that the model does not observe, by argument name."""
        observed = {site.argument for site in self.bound_model.observed}
        pairs = enumerate(zip(self.argument_names, self.data, strict=True))
        return {name: value for i, (name, value) in pairs if isinstance(value, Tensor) and i not in observed}
