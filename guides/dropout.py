"""Dropout as a guide: every unit is kept or dropped by a coin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

__all__ = ["BernoulliDropout", "bernoulli_dropout"]


def bernoulli_dropout(model: Callable[..., Any], *, per_row: bool = True) -> BernoulliDropout:
    """q(masks) = Π Bernoulli(k), k fixed: the guide for a model whose masks are Bernoulli sites.

    Gradients reach the weights, which are parameters of the model. While it is
    fitted, each row of a batch has masks of its own, which is an estimate of
    the same ELBO with less noise; a draw from the posterior is one mask for
    all rows, so that it is a function.

    Parameters
    ----------
    model
        A model such as :class:`~ppl_models.DropoutNetwork`, whose latent sites
        are all Bernoulli with a first dimension of 1 for the rows.
    per_row
        False shares one mask among the rows while fitting too.

    References
    ----------
    Gal, Ghahramani (2016), Dropout as a Bayesian approximation: representing model uncertainty in deep learning.
    """
    return BernoulliDropout(model, per_row)


class BernoulliDropout(nn.Module):
    """The guide of :func:`bernoulli_dropout`; in evaluation mode a draw is one mask for all rows."""

    no_common_density = (
        "a dropout guide sets weights to exactly zero, which their Gaussian prior never does: the two have no common "
        "density, so importance weights and Pareto k-hat do not exist"
    )

    def __init__(self, model: Callable[..., Any], per_row: bool) -> None:
        super().__init__()
        self.per_row = per_row
        self._model = [model]  # not a submodule: the weights are the model's
        self._masks: dict[str, Any] = {}
        self._plates: dict[str, int] = {}

    def forward(self, *args: Any) -> dict[str, Tensor]:
        """Draw every mask."""
        if not self._masks:
            self._look(args)
        rows = 1
        if self.training and self.per_row:
            for name, size in self._plates.items():
                with pyro.plate(name, size) as index:
                    rows = len(index)
        return {name: pyro.sample(name, self._units(mask, rows)) for name, mask in self._masks.items()}

    def _units(self, mask: Any, rows: int) -> Any:
        probs = mask.base_dist.probs
        return dist.Bernoulli(probs.expand(rows, *probs.shape[1:])).to_event(probs.dim())

    def _look(self, args: tuple[Any, ...]) -> None:
        """Find the masks, and the plate of the rows, by one run of the model."""
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(self._model[0]).get_trace(*args)
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            if type(site["fn"]).__name__ == "_Subsample":
                self._plates[name] = site["fn"].size
            elif not site["is_observed"]:
                self._masks[name] = self._checked(name, site["fn"])

    def _checked(self, name: str, fn: Any) -> Any:
        base = getattr(fn, "base_dist", fn)
        if not isinstance(base, dist.Bernoulli) or base.batch_shape[:1] != (1,):
            raise ValueError(
                f"site {name!r} is {type(base).__name__} of shape {tuple(fn.shape())}: bernoulli_dropout is for models "
                "whose latents are Bernoulli masks (1, units), such as DropoutNetwork"
            )
        return fn

    def __deepcopy__(self, memo: dict[int, Any]) -> BernoulliDropout:
        twin = BernoulliDropout(self._model[0], self.per_row)
        return twin.train(self.training)
