"""An encoder network as a guide: q(z | x) for the latents that each row has of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from guides.plates import first_rows, model_structure

__all__ = ["AmortizedEncoder", "amortized_encoder"]


def amortized_encoder(
    model: Callable[..., Any], encoder: nn.Module | None = None, *, others: Callable[..., Any] | None = None
) -> AmortizedEncoder:
    """q(z | x) = N(μ(x), σ²(x)) for the latents of each row, μ and log σ² by ``encoder``.

    The latents are those in the model's plate over its rows, K numbers a row
    together, in the order of the model; the ones with a constraint are Normal
    in the unconstrained space. Works with mini-batches, and on new rows. Where
    a prior is Normal too, the KL between the two is taken in closed form.

    Parameters
    ----------
    model
        A model whose first argument has one row an observation, such as
        :class:`~ppl_models.VAE`.
    encoder
        A network from rows of the first argument, (B, …), to (B, 2K): K means
        and K log variances. It is copied at every fit. If left out, what
        ``model.encoder()`` makes.
    others
        A guide for the latents that all rows share, if there are any, such as
        ``AutoNormal(poutine.block(model, hide=["z"]))``.

    Raises
    ------
    ValueError
        If there is no encoder. At the first call: if no row has a latent of its own, if there are
        shared latents and no ``others``, or if the encoder gives another
        number of columns.

    References
    ----------
    Kingma, Welling (2014), Auto-encoding variational Bayes.
    """
    if encoder is None:
        own = getattr(model, "encoder", None)
        if own is None:
            raise ValueError(
                "the model makes no encoder: pass one, a network from rows to their means and log variances"
            )
        encoder = own()
    return AmortizedEncoder(model, encoder, others)


@dataclass(frozen=True)
class Local:
    """A latent of each row: where it lives, and its shape in the unconstrained space."""

    name: str
    support: Any
    shape: torch.Size

    @property
    def size(self) -> int:
        """Return the number of the encoder's outputs that it takes."""
        return self.shape.numel()


class AmortizedEncoder(nn.Module):
    """The guide of :func:`amortized_encoder`."""

    def __init__(self, model: Callable[..., Any], encoder: nn.Module, others: Callable[..., Any] | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.others = others
        self._model = [model]  # not a submodule: its weights are the model's
        self._plate = ""
        self._latents: list[Local] = []

    def forward(self, *args: Any) -> None:
        """Draw the shared latents by the other guide, then those of each row."""
        self._set_up(args)
        if self.others is not None:
            self.others(*args)
        x = first_rows(args)
        with pyro.plate(self._plate, len(x)):
            loc, scale = self.encode(pyro.subsample(x, event_dim=x.dim() - 1))
            sizes = [latent.size for latent in self._latents]
            for latent, part_loc, part_scale in zip(
                self._latents, loc.split(sizes, 1), scale.split(sizes, 1), strict=True
            ):
                _sample(latent, part_loc.reshape(-1, *latent.shape), part_scale.reshape(-1, *latent.shape))

    @property
    def size(self) -> int:
        """K, the numbers of a row; after the first call of the guide."""
        return sum(latent.size for latent in self._latents)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """μ(x) and σ(x), each (B, K), in the unconstrained space; after the first call of the guide."""
        pyro.module("encoder", self.encoder)
        out = self.encoder(rows)
        if out.shape != (len(rows), 2 * self.size):
            raise ValueError(
                f"the encoder gives {tuple(out.shape)} for {len(rows)} rows: "
                f"it must give ({len(rows)}, {2 * self.size}), "
                f"the means and the log variances of {self.size} numbers a row"
            )
        loc, log_variance = out.chunk(2, -1)
        return loc, torch.exp(0.5 * log_variance)

    def values(self, codes: Tensor) -> dict[str, Tensor]:
        """Codes (…, K), in the unconstrained space, as values of the latents, ``{site: (…, *shape of a row)}``."""
        parts = codes.split([latent.size for latent in self._latents], -1)
        return {
            latent.name: biject_to(latent.support)(part.reshape(*codes.shape[:-1], *latent.shape))
            for latent, part in zip(self._latents, parts, strict=True)
        }

    def _set_up(self, args: tuple[Any, ...]) -> None:
        """Find the latents of the rows by one run of the model on the first of them."""
        if self._latents:
            return
        found = model_structure(self._model[0], args)
        own = {name: site["fn"] for name, site in found.latents.items() if found.is_of_rows(name)}
        shared = sorted(found.latents.keys() - own.keys())
        if not own:
            raise ValueError(f"no row has a latent of its own, found {shared}: draw one in the plate over the rows")
        if shared and self.others is None:
            raise ValueError(
                f"all rows share the latents {shared}: give them a guide, as in "
                f"others=AutoNormal(poutine.block(model, hide={sorted(own)}))"
            )
        for name, fn in own.items():
            if len(fn.batch_shape) != 1:
                raise ValueError(
                    f"site {name!r} has batch shape {tuple(fn.batch_shape)} in its plate: use .to_event(1)"
                )
        self._plate = found.plates[0]
        shapes = {name: biject_to(fn.support).inverse_shape(fn.event_shape) for name, fn in own.items()}
        self._latents = [Local(name, fn.support, torch.Size(shapes[name])) for name, fn in own.items()]

    def __deepcopy__(self, memo: dict[int, Any]) -> AmortizedEncoder:
        encoder, others = copy.deepcopy(self.encoder, memo), copy.deepcopy(self.others, memo)
        return AmortizedEncoder(self._model[0], encoder, others).train(self.training)


def _sample(latent: Local, loc: Tensor, scale: Tensor) -> None:
    normal = dist.Normal(loc, scale).to_event(loc.dim() - 1)
    if _is_real(latent.support):
        pyro.sample(latent.name, normal, infer={"closed_form_kl": True})
        return
    unbounded = pyro.sample(f"{latent.name}_unconstrained", normal, infer={"is_auxiliary": True})
    transform = biject_to(latent.support)
    value = transform(unbounded)
    change = transform.inv.log_abs_det_jacobian(value, unbounded)
    density = change.reshape(len(change), -1).sum(-1)
    pyro.sample(latent.name, dist.Delta(value, density, event_dim=value.dim() - 1))


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
