"""The posterior predictive as one function from inputs to numbers, which can be recorded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from inference.data.arguments import row_count
from inference.model.bound_model import BoundModel, named_failure
from inference.model.sites import latent_values
from inference.model.vectorization import together
from inference.predictive.approximation import Approximation
from inference.predictive.sampling import at_latents
from inference.utils.random_state import RandomStream

__all__ = ["PredictiveFunction"]

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PredictiveFunction:
    """E[y | x, zₛ], Var[y | x, zₛ] and y itself at ``site``, for S ``draws`` of z ~ q at ``seed``.

    ``shared`` holds the draws that all rows have in common, ``{site: (S, *site
    shape)}``; latents of single rows are drawn as ``posterior.predict`` does for
    new rows. ``classes`` says that the site is a class, ``has_mean`` that its mean is finite.
    """

    approximation: Approximation
    draws: int
    seed: int
    site: str = ""
    shared: dict[str, Tensor] = field(default_factory=dict)
    classes: bool = False
    has_mean: bool = True

    @classmethod
    def of(cls, approximation: Approximation, site: str | None, draws: int, seed: int) -> PredictiveFunction:
        """Draw the shared latents, and run the model once to see the form of its answer at the site.

        Raises
        ------
        ValueError
            If no site is named where there are several.
        """
        bound_model, latents = approximation.bound_model, approximation.latent_sampler
        whole = cls(approximation=approximation, draws=draws, seed=seed)
        with whole.running():
            drawn = latents.draw(draws, whole.arguments(whole.inputs(3)))
        own = latents.row_sites()
        shared = {name: value for name, value in drawn.items() if name not in own}
        sites = [observed.name for observed in bound_model.observed] or list(shared)
        if not site and len(sites) != 1:
            raise ValueError(f"the model has the sites {sites}: pass site= with the name of one to predict")
        found = replace(whole, site=site or sites[0], shared=shared)
        if found.site in shared:
            return found
        with found.running():
            args, z = found.arguments(found.inputs(3)), {name: value[0] for name, value in shared.items()}
            described, _ = named_failure("model", bound_model.model, args, lambda: found._described(z, args))
        return replace(found, classes=len(described) == 1, has_mean=bool(torch.isfinite(described[0]).all()))

    @property
    def bound_model(self) -> BoundModel:
        """Model and guide of the approximation."""
        return self.approximation.bound_model

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the model inside the block, with random numbers from the seed."""
        with (
            torch.no_grad(),
            self.bound_model.running(self.approximation.flat_params, RandomStream.seeded(self.seed)),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", UserWarning)  # of what vmap is slow at
            yield

    def together(self, inputs: Tensors) -> dict[str, Tensor]:
        """The answers at all draws, each (S, rows, …)."""
        args = self.arguments(inputs)
        with self.running():
            if self.site in self.shared:
                return self._named(*self._latent(self.shared[self.site]))
            (found,) = together(lambda z: self._described(z, args), self.shared, self.draws, self.draws)
        return self._named(*found)

    def each(self, inputs: Tensors) -> dict[str, Tensor]:
        """The answers at one draw, whose latents are among the inputs, each (rows, …)."""
        z = {name: inputs[name] for name in self.shared}
        with self.running():
            if self.site in z:
                return self._named(*self._latent(z[self.site]))
            return self._named(*self._described(z, self.arguments(inputs)))

    def inputs(self, rows: int) -> dict[str, Tensor]:
        """So many rows of the inputs of the fit, again from the first where they are used up."""
        found = {}
        for i in self._places():
            value = self.approximation.args[i]
            if value.dim():
                value = value[torch.arange(rows) % len(value)]
            if not self.approximation.has_data and value.is_floating_point():
                value = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(rows))
            found[self.approximation.argument_names[i]] = value.to(self.bound_model.device)
        return found

    def inputs_with_latents(self, rows: int) -> dict[str, Tensor]:
        """Return :meth:`inputs`, and with them the first draw of the shared latents."""
        return self.inputs(rows) | {name: value[0] for name, value in self.shared.items()}

    def arguments(self, inputs: Tensors) -> tuple[Any, ...]:
        """The model's arguments with the inputs at their places, and None for what it observes."""
        places = self._places()
        observed = {site.argument for site in self.bound_model.observed}
        given = (
            inputs.get(self.approximation.argument_names[i]) if i in places else value
            for i, value in enumerate(self.approximation.args)
        )
        return tuple(None if i in observed and i not in places else value for i, value in enumerate(given))

    def described_inputs(self) -> list[dict[str, Any]]:
        """Name, shape (None for the rows) and type of each input."""
        values = ((self.approximation.argument_names[i], self.approximation.args[i]) for i in self._places())
        return [
            {
                "name": name,
                "shape": [None, *value.shape[1:]] if value.dim() else [],
                "dtype": str(value.dtype).removeprefix("torch."),
            }
            for name, value in values
        ]

    def latent_arrays(self) -> dict[str, np.ndarray]:
        """The draws of the shared latents, as arrays."""
        return {name: np.array(value.cpu().numpy(), order="C") for name, value in self.shared.items()}

    def two_counts(self) -> tuple[int, int] | None:
        """Two numbers of rows unlike that of the fit; None where nothing has rows."""
        trained = row_count([self.approximation.args[i] for i in self._places()])
        if trained is None:
            return None
        one, two, *_ = (count for count in (3, 5, 7) if count != trained)
        return one, two

    def _places(self) -> list[int]:
        """The arguments to predict from: tensors that are not observed, or else the first, as an autoencoder's."""
        observed = {site.argument for site in self.bound_model.observed}
        tensors = [i for i, value in enumerate(self.approximation.args) if isinstance(value, Tensor)]
        return [i for i in tensors if i not in observed] or tensors[:1]

    def _described(self, z: Tensors, args: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        return at_latents(self.bound_model.model, {**z, **self._row_latents(z, args)}, args, self.site)

    def _row_latents(self, z: Tensors, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """Latents of single rows, by the guide if it takes new rows; else none, and the model draws them."""
        own = self.approximation.latent_sampler.row_sites()
        guide = self.bound_model.guide
        if not own or isinstance(guide, AutoGuide):
            return {}
        conditioned = poutine.condition(guide, data=dict(z)) if z else guide
        drawn = latent_values(poutine.trace(conditioned).get_trace(*args))
        rows = row_count(args)
        return {name: value for name, value in drawn.items() if name in own and value.shape[own[name]] == rows}

    def _latent(self, value: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        value = value if value.is_floating_point() else value.to(self.bound_model.dtype)
        return (value, torch.zeros_like(value)), value

    def _named(self, described: tuple[Tensor, ...], samples: Tensor) -> dict[str, Tensor]:
        if self.classes:
            return {"draws": described[0], "samples": samples}
        if not self.has_mean:  # as under a Cauchy: the draws themselves are all there is
            described = samples, torch.zeros_like(samples)
        return {"draws": described[0], "variance": described[1], "samples": samples}
