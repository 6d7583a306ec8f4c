"""What a fit found: the parameters, how they came about, and everything run under them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.data.arguments import as_tensors, check_new_shapes, shape_of
from inference.data.batch_loader import BatchLoader
from inference.model.bound_model import BoundModel, name_of, set_training
from inference.predictive.fit_record import FitRecord
from inference.utils.random_state import RandomStream
from inference.utils.validation import one_of, positive_integer, seed_number

__all__ = ["Fitted"]


class Fitted:
    """A program with the parameters θ that a fit found, the arguments of the fit, and its record.

    Where the rows were read in ``batches``, the arguments are the first of them.
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
        self._bound_model = bound_model
        self._flat_params = flat_params
        self._args = args
        self._has_data = has_data
        self._batches = batches
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
        """Why the fit ended, with figures where it was to find its end: ``optimizer="auto"``."""
        stop = self.record.stop
        return f"all {len(self.losses):,} steps were taken" if stop is None else stop.reason

    @property
    def params(self) -> dict[str, Tensor]:
        """The fitted parameters by name, in the user's (constrained) space."""
        return self._bound_model.params.constrained(self._flat_params)

    @property
    def unconstrained_params(self) -> dict[str, Tensor]:
        """The fitted parameters by the same names, as the optimiser moves them: any real numbers.

        Flattened and joined in this order they are θ, shape (P,). A scale σ, for
        one, is kept as the number whose softplus or exponential it is.

        >>> from guides import mean_field_normal
        >>> from inference import fit
        >>> from ppl_models import linear_regression
        >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
        >>> guide = mean_field_normal(linear_regression)
        >>> posterior = fit(linear_regression, guide, x, x[:, 0], steps=10, progress=False)
        >>> name = "AutoNormal.scales.bias"
        >>> bool(posterior.params[name] > 0), bool(posterior.unconstrained_params[name] > 0)
        (True, False)
        """
        return {name: view.clone() for name, view in self._bound_model.params.named(self._flat_params).items()}

    @property
    def bound_model(self) -> BoundModel:
        """Model, guide and what one run showed of them."""
        return self._bound_model

    @property
    def model_name(self) -> str:
        """The name of the model function or module."""
        return name_of(self._bound_model.model)

    @property
    def guide_name(self) -> str:
        """The name of the guide function or class."""
        return name_of(self._bound_model.guide)

    @property
    def has_data(self) -> bool:
        """Whether the data of the fit is at hand."""
        return self._has_data

    @property
    def data(self) -> tuple[Any, ...]:
        """The arguments of the fit; where its rows were read in batches, the first batch.

        Raises
        ------
        ValueError
            If the posterior was loaded without them.
        """
        if not self._has_data:
            given = ", ".join(self.argument_names)
            raise ValueError(f"this posterior was loaded without its data: pass it, load(path, model, guide, {given})")
        return self._args

    @property
    def observed_site(self) -> str:
        """The name of the one observed site.

        Raises
        ------
        ValueError
            If there is none, or several.
        """
        sites = [site.name for site in self._bound_model.observed]
        if len(sites) == 1:
            return sites[0]
        raise ValueError(f"the model observes {sites or 'no site'}: pass site= with the name of one to predict")

    @contextmanager
    def _running(self, seed: int, branch: int = 0) -> Iterator[None]:
        set_training(self._bound_model.guide, False)
        with (
            torch.no_grad(),
            self._bound_model.running(self._flat_params, RandomStream.seeded(seed_number(seed), branch)),
        ):
            yield

    def _site(self, given: str | None) -> str:
        """The observed site that is asked for: the one given, or else the only one."""
        known = [site.name for site in self._bound_model.observed]
        if given is None or not known:
            return self.observed_site
        return one_of(given, "site", known)

    def _batch_size(self, given: int | None) -> int | None:
        """The most rows to run at a time: what was asked for, else that of the fit, else all."""
        size = self.record.options.get("batch_size") if given is None else given
        return None if size is None else positive_integer(size, "batch_size")

    def _new_names(self, data: tuple[Any, ...]) -> list[str]:
        """What to call each of ``data``, those beyond the arguments of the fit by number."""
        return self.argument_names[: len(data)] + [f"argument {i}" for i in range(len(self.argument_names), len(data))]

    def _new_arguments(self, data: tuple[Any, ...], rows: slice | None = None) -> tuple[Any, ...]:
        """``data``, or these ``rows`` of it, as the model takes it, checked, what is missing given as None."""
        names, first = self._new_names(data), 0
        if rows is not None:
            names, first = [f"{name}[{rows.start}:{rows.stop}]" for name in names], rows.start
        args = as_tensors(data, names, self._bound_model.device, self._bound_model.dtype, shared=True, first_row=first)
        check_new_shapes(args, self.argument_names, [shape_of(value) for value in self._args])
        for site in self._bound_model.observed:
            if site.argument is not None and site.argument < len(args) and args[site.argument] is not None:
                site.refuse_impossible(args[site.argument])
        return args + (None,) * (len(self._args) - len(args))
