"""Random variables of a trace: which are latent, which observed, and their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

__all__ = [
    "Site",
    "base_distribution",
    "is_point_guide",
    "latent_values",
    "observed_arguments",
    "observed_nodes",
    "refuse_broadcast",
    "refuse_weighted_rows",
    "scalars",
    "score_sites",
    "site_is_draw",
]


_CHECKED = 4096  # rows looked at together


@dataclass(frozen=True)
class Site:
    """One random variable: its name, its shape over all rows, and the plates its dimensions belong to.

    ``argument`` is the position of the model's argument that it observes as it
    is, None where it does not; ``kind`` names its distribution, and ``support``
    is what that can make, None where it depends on latents or rows.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    batch_dims: int
    kind: str
    support: Any
    argument: int | None = None

    @classmethod
    def of(cls, name: str, site: dict[str, Any], argument: int | None = None) -> Site:
        """Read a site off its node in a trace."""
        batch = len(site["fn"].batch_shape)
        shape = list(site["value"].shape)
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and shape[frame.dim - len(shape) + batch] == frame.size:
                shape[frame.dim - len(shape) + batch] = frame.full_size or frame.size
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        dims = [plates.get(i - batch, f"{name}_dim_{i}") for i in range(batch)]
        dims += [f"{name}_dim_{i}" for i in range(batch, len(shape))]
        kind = type(base_distribution(site["fn"])).__name__
        return cls(name, tuple(shape), tuple(dims), batch, kind, _support(site["fn"]), argument)

    def refuse_impossible(self, values: Tensor) -> None:
        """Raise a ValueError that names the first row of ``values`` which this site cannot observe."""
        if self.support is None:
            return
        parts = values.split(_CHECKED) if values.dim() > self.support.event_dim else (values,)
        for i, part in enumerate(parts):
            inside = self.support.check(part)
            if not inside.all():
                self._refuse(values, i * _CHECKED + int((~inside).nonzero()[0][0]) if inside.dim() else 0)

    def _refuse(self, values: Tensor, row: int) -> NoReturn:
        bad = values[row] if values.dim() else values
        found = f"{bad.item():g}" if bad.numel() == 1 else f"numbers from {bad.min().item():g} to {bad.max().item():g}"
        support = _of_elements(self.support)
        words = "0 or 1" if support is constraints.boolean else str(support)
        raise ValueError(
            f"site {self.name!r} observes {found} at row {row}, which is outside the support of {self.kind}, "
            f"{words}: correct the data, or the model's likelihood"
        )


def base_distribution(fn: Any) -> Any:
    """The distribution under ``to_event``, ``mask`` and ``expand``."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return fn


def latent_values(guide_trace: poutine.Trace) -> dict[str, Tensor]:
    """Site → drawn value for the model's latents, the guide's auxiliary sites left out."""
    return {
        name: site["value"]
        for name, site in guide_trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site["infer"].get("is_auxiliary")
        and not site_is_subsample(site)
    }


def observed_nodes(model_trace: poutine.Trace) -> dict[str, Any]:
    """The sites that hold data: not ``pyro.factor``, not ``pyro.deterministic``."""
    return {
        name: site
        for name, site in model_trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site["infer"].get("_deterministic")
        and type(base_distribution(site["fn"])).__name__ not in ("Unit", "Delta")
    }


def refuse_broadcast(name: str, site: dict[str, Any]) -> None:
    """Raise a ValueError where an observed value and its distribution are of shapes that multiply.

    As N numbers of shape (N, 1) do with N distributions of shape (N,), which Pyro
    takes for N² observations. Under a plate the value may have no dimension more.
    """
    value, wanted = tuple(site["value"].shape), tuple(site["fn"].shape())
    plated = any(frame.vectorized for frame in site["cond_indep_stack"])
    try:
        joined = tuple(torch.broadcast_shapes(value, wanted))
    except RuntimeError:
        return  # its density has failed already
    if (joined == wanted and len(value) == len(wanted)) if plated else joined in (value, wanted):
        return
    raise ValueError(
        f"site {name!r} observes values of shape {value}, where its distribution has shape {wanted}: "
        f"give the data as {wanted}, or let the model say what the other dimensions are"
    )


def site_is_draw(site: dict[str, Any]) -> bool:
    """Return True if a number is drawn at this site: not observed, no choice of rows, no fixed value."""
    sampled = site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    return sampled and type(base_distribution(site["fn"])).__name__ != "Delta"


def scalars(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(S, …) draws of sites as one (S,) array an element, scalar sites first.

    >>> sorted(scalars({"w": np.zeros((5, 2)), "b": np.zeros(5)}))
    ['b', 'w[0]', 'w[1]']
    """
    flat: dict[str, np.ndarray] = {}
    for name, draws in sorted(values.items(), key=lambda item: item[1].ndim > 1):
        for index in np.ndindex(draws.shape[1:]):
            flat[f"{name}[{', '.join(map(str, index))}]" if index else name] = draws[(slice(None), *index)].astype(
                float
            )
    return flat


def score_sites(guide_trace: poutine.Trace) -> tuple[str, ...]:
    """Latents whose gradient has to come from the score function.

    Those are drawn without reparameterisation from a distribution that depends
    on a parameter; one that is fixed, as a dropout mask's, has no gradient at all.
    """
    return tuple(
        name
        for name, site in guide_trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not getattr(site["fn"], "has_rsample", False)
        and torch.as_tensor(site["fn"].log_prob(site["value"])).requires_grad
    )


def is_point_guide(guide_trace: poutine.Trace) -> bool:
    """Return True if the guide is a point estimate (Delta)."""
    sites = [site for site in guide_trace.nodes.values() if site["type"] == "sample"]
    drawn = [site["fn"] for site in sites if not site_is_subsample(site)]
    return all(type(base_distribution(fn)).__name__ == "Delta" for fn in drawn)


def observed_arguments(model_trace: poutine.Trace, args: tuple[Any, ...]) -> dict[str, int]:
    """The observed sites that hold an argument of the model as it is, or rows of it chosen by a plate, and which."""
    nodes = model_trace.nodes.values()
    chosen = [site["value"] for site in nodes if site["type"] == "sample" and site_is_subsample(site)]
    found = {}
    for name, site in observed_nodes(model_trace).items():
        matches = [i for i, value in enumerate(args) if _holds(value, site["value"], chosen)]
        if matches:
            found[name] = matches[-1]  # y, where an autoencoder's x would do as well
    return found


def _holds(value: Any, seen: Tensor, chosen: list[Tensor]) -> bool:
    if not isinstance(value, Tensor) or value.dtype != seen.dtype:
        return False
    if value.dim() != seen.dim() or value.shape[1:] != seen.shape[1:]:
        return False
    if not value.dim() or len(value) == len(seen):
        return torch.equal(value, seen)
    return any(torch.equal(value[rows], seen) for rows in chosen if len(rows) == len(seen))


def _support(fn: Any) -> Any:
    """The support of a distribution, if it depends on no tensor: neither on latents nor on rows."""
    try:
        support = fn.support
    except NotImplementedError:
        return None
    varies = any(isinstance(value, Tensor) for value in vars(_of_elements(support)).values())
    return None if varies else support


def _of_elements(support: Any) -> Any:
    """The constraint on each number, under those that join some into an event."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def refuse_weighted_rows(model_trace: poutine.Trace, name: str) -> None:
    """Raise a ValueError unless the observed site ``name`` is there and counts with its likelihood as it is."""
    observed = observed_nodes(model_trace)
    if name not in observed:
        raise ValueError(f"the model observes {sorted(observed)}, not {name!r}: pass site= with the name of one")
    site = observed[name]
    unmasked = site["mask"] is None or site["mask"] is True
    if not unmasked or bool(torch.as_tensor(site["scale"] != 1).any()):
        raise ValueError(
            f"site {name!r} is scaled or masked, so an observation weighs something else than its likelihood: "
            "leave the scale or the mask out, or take held-out rows, posterior.evaluate(x_test, y_test)"
        )
