"""Dropout as a guide: every unit is kept or dropped by a coin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from guides.plates import model_structure, row_count

__all__ = ["BernoulliDropout", "bernoulli_dropout"]

TEMPERATURE = 0.1
_ONE = torch.Size()


def bernoulli_dropout(model: Callable[..., Any], *, per_row: bool = True, learned: bool = False) -> BernoulliDropout:
    """q(masks) = Π Bernoulli(k): the guide for a model whose masks are Bernoulli sites.

    Gradients reach the weights, which are parameters of the model. While it is
    fitted, each row of a batch has masks of its own, which is an estimate of
    the same ELBO with less noise; a draw from the posterior is one mask for
    all rows, so that it is a function.

    The keep probability k of a site is that of the model's, or ``learned``:
    then the ELBO has the term −KL(Bernoulli(k) ‖ Bernoulli(k₀)) for each unit,
    with the model's k₀, and masks are relaxed to (0, 1) while fitting, at a
    temperature of 0.1, so that gradients reach k. With k₀ = ½ that is the
    objective of concrete dropout.

    Parameters
    ----------
    model
        A model such as :class:`~ppl_models.DropoutNetwork`, whose latent sites
        are all Bernoulli with a first dimension of 1 for the rows.
    per_row
        False shares one mask among the rows while fitting too.
    learned
        Learn one k for each site, the parameter ``keep.<site>``.

    References
    ----------
    Gal, Ghahramani (2016), Dropout as a Bayesian approximation: representing model uncertainty in deep learning.
    Gal, Hron, Kendall (2017), Concrete dropout.
    """
    return BernoulliDropout(model, per_row, learned)


class BernoulliDropout(nn.Module):
    """The guide of :func:`bernoulli_dropout`; in evaluation mode a draw is one mask for all rows."""

    no_common_density = (
        "a dropout guide sets weights to exactly zero, which their Gaussian prior never does: the two have no common "
        "density, so importance weights and Pareto k-hat do not exist"
    )

    def __init__(self, model: Callable[..., Any], per_row: bool, learned: bool) -> None:
        super().__init__()
        self.per_row = per_row
        self.learned = learned
        self._model = [model]  # not a submodule: the weights are the model's
        self._masks: dict[str, Any] = {}
        self._plates: tuple[str, ...] = ()

    def forward(self, *args: Any) -> dict[str, Tensor]:
        """Draw every mask: one for all rows, or while it is fitted one for each."""
        return self.draw_for_each_row(*args) if self.training and self.per_row else self._draw(args, 1)

    def draw_for_each_row(self, *args: Any) -> dict[str, Tensor]:
        """Draw every mask for each row of a batch apart."""
        self._set_up(args)
        rows = row_count(args)
        for name in self._plates:
            with pyro.plate(name, row_count(args)) as index:
                rows = len(index)
        return self._draw(args, rows)

    def _draw(self, args: tuple[Any, ...], rows: int) -> dict[str, Tensor]:
        self._set_up(args)
        exact = {"closed_form_kl": not self.learned}  # nothing, where q is the prior itself
        units = {name: self._units(name, mask, rows) for name, mask in self._masks.items()}
        return {name: pyro.sample(name, fn, infer=exact) for name, fn in units.items()}

    def _units(self, name: str, prior: Any, rows: int) -> Any:
        probs = prior.base_dist.probs
        shape = (rows, *probs.shape[1:])
        if not self.learned:
            return dist.Bernoulli(probs.expand(shape)).to_event(probs.dim())
        keep = pyro.param(f"keep.{name}", lambda: probs.mean().clone(), constraint=constraints.unit_interval)
        if self.training:
            return _Relaxed(keep.expand(shape), prior)
        return dist.Bernoulli(keep.detach().expand(shape)).to_event(probs.dim())

    def _set_up(self, args: tuple[Any, ...]) -> None:
        """Find the masks, and the plate of the rows."""
        if not self._masks:
            found = model_structure(self._model[0], args)
            self._plates = found.plates
            self._masks = {name: self._checked(name, site["fn"]) for name, site in found.latents.items()}

    def _checked(self, name: str, fn: Any) -> Any:
        base = getattr(fn, "base_dist", fn)
        if not isinstance(base, dist.Bernoulli) or base.batch_shape[:1] != (1,):
            raise ValueError(
                f"site {name!r} is {type(base).__name__} of shape {tuple(fn.shape())}: bernoulli_dropout is for models "
                "whose latents are Bernoulli masks (1, units), such as DropoutNetwork"
            )
        return fn

    def __deepcopy__(self, memo: dict[int, Any]) -> BernoulliDropout:
        twin = BernoulliDropout(self._model[0], self.per_row, self.learned)
        return twin.train(self.training)


class _Relaxed(dist.TorchDistribution):
    """Masks in (0, 1) near Bernoulli(keep), log q so written that log p − log q is −KL(Bernoulli(k) ‖ Bernoulli(k₀)).

    Maddison, Mnih, Teh (2017), The concrete distribution.
    """

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, keep: Tensor, prior: Any) -> None:
        super().__init__(event_shape=keep.shape, validate_args=False)
        self.keep = keep
        self.prior = prior

    def rsample(self, sample_shape: torch.Size = _ONE) -> Tensor:
        """σ((logit k + logistic noise) / temperature)."""
        uniform = torch.rand(sample_shape + self.keep.shape, dtype=self.keep.dtype, device=self.keep.device)
        return torch.sigmoid((self.keep.logit() + uniform.logit(eps=1e-6)) / TEMPERATURE)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of all units and rows together."""
        k, before = self.keep[:1], self.prior.base_dist.probs
        terms = torch.xlogy(k, k / before) + torch.xlogy(1 - k, (1 - k) / (1 - before))
        return self.prior.log_prob(value).sum() + terms.sum()
