"""Questions to a model whose rows have latents of their own: encode, decode, generate, and log p(x) of each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.arguments import plain_tensor
from inference.model.bound_model import name_of
from inference.model.elbo import Model, traces
from inference.model.protocols import SupportsDecode, SupportsEncode, supports
from inference.model.vectorization import draws_together, map_over_draws, rows_together
from inference.predictive.approximation import Approximation
from inference.predictive.prediction import Prediction
from inference.predictive.sampling import concatenate, predictive, row_parts
from inference.utils.validation import positive_integer

__all__ = [
    "Encoding",
    "EvidenceScores",
    "HeldOutRows",
    "decode",
    "encode",
    "evaluate_rows",
    "generate",
    "interpolate",
    "log_evidence",
    "reconstruct",
]

SHARED_DRAWS = 100
ENCODED = 4096  # rows that an encoder takes together, if nothing else was asked for


class Encoding(NamedTuple):
    """q(z | x) of N rows: means and standard deviations of K latent numbers, in the unconstrained space.

    Attributes
    ----------
    mean, std
        (N, K).
    """

    mean: Tensor
    std: Tensor

    def active(self, threshold: float = 0.01) -> Tensor:
        """Which of the K numbers say anything of x: Var over rows of their mean above ``threshold``, shape (K,).

        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders.
        """
        return self.mean.var(0) > threshold


@dataclass(frozen=True)
class EvidenceScores:
    """Scores of held-out rows by how probable they are under a model with latents of rows.

    ``elbo`` is the mean over rows of E_q log p(x, z)/q(z | x), ``log_evidence``
    that of the importance-weighted bound on log p(x) with ``samples`` draws a
    row, both in nats a row, and ``standard_error`` the latter's over rows.
    ``active`` of the ``size`` numbers of a code say anything of the row.
    """

    rows: int
    elbo: float
    log_evidence: float
    standard_error: float
    samples: int
    active: int
    size: int


@dataclass(frozen=True)
class HeldOutRows:
    """Rows that the fit never saw, their codes, and how probable they are."""

    encoding: Encoding
    observed: Tensor
    scores: EvidenceScores


def encode(approximation: Approximation, *data: Any, batch_size: int | None = None) -> Encoding:
    """Means and standard deviations of q(z | x) at new rows, for a guide of :func:`~guides.amortized_encoder`."""
    args = approximation.check_arguments(data)
    with _running(approximation, 0, batch_size) as (_, size):
        guide = approximation.bound_model.guide
        if not supports(guide, SupportsEncode):
            raise _no_encoder(guide)
        x = next(value for value in args if isinstance(value, Tensor) and value.dim())
        parts = [guide.encode(part) for part in x.split(size or ENCODED)]
        mean, std = (torch.cat([part[i].cpu() for part in parts]) for i in range(2))
    return Encoding(mean, std)


def decode(approximation: Approximation, z: Any, *, batch_size: int | None = None, seed: int = 0) -> Tensor:
    """E[x | z], (M, …), for codes (M, K) such as the means that :func:`encode` gives.

    Averaged over latents that all rows share.
    """
    with _running(approximation, seed, batch_size) as (site, at_once):
        bound_model, guide = approximation.bound_model, approximation.bound_model.guide
        if not supports(guide, SupportsDecode):
            raise _no_encoder(guide)
        codes = plain_tensor(z, "z", bound_model.dtype).to(bound_model.device, bound_model.dtype)
        if codes.dim() != 2 or codes.shape[1] != guide.size:
            raise ValueError(
                f"z has shape {tuple(codes.shape)}: give codes of shape (M, {guide.size}), as encode gives them"
            )
        shared = _draw_shared(approximation, SHARED_DRAWS)
        draws = SHARED_DRAWS if shared else 1
        found = []
        for part in codes.split(at_once or max(1, len(codes))):
            latents = shared | guide.values(part.expand(draws, *part.shape))
            blank = _blank_arguments(approximation, len(part))
            prediction = predictive(bound_model.model, latents, draws, blank, site)
            found.append(prediction.mean if isinstance(prediction, Prediction) else prediction.probs)
        return torch.cat(found)


def reconstruct(approximation: Approximation, *data: Any, batch_size: int | None = None) -> Tensor:
    """E[x | z] at the mean of q(z | x): new rows as the few numbers of z remember them."""
    return decode(approximation, encode(approximation, *data, batch_size=batch_size).mean, batch_size=batch_size)


def interpolate(approximation: Approximation, first: Any, last: Any, *, steps: int = 10) -> Tensor:
    """E[x | z] on straight lines between the codes of rows, (rows, steps, …)."""
    ends = (encode(approximation, first).mean, encode(approximation, last).mean)
    places = torch.linspace(0, 1, positive_integer(steps, "steps"))
    lines = torch.stack([torch.lerp(*ends, float(place)) for place in places], 1)
    found = decode(approximation, lines.flatten(0, 1))
    return found.reshape(*lines.shape[:2], *found.shape[1:])


def generate(approximation: Approximation, rows: int, *, seed: int = 0, batch_size: int | None = None) -> Tensor:
    """Rows that the fitted model makes, E[x | z] at z from its prior, (rows, …).

    Latents that all rows share are one draw from the posterior.
    """
    with _running(approximation, seed, batch_size) as (site, at_once):
        count = positive_integer(rows, "rows")
        size = at_once or count
        model, shared = approximation.bound_model.model, _draw_shared(approximation, 1)
        sizes = (min(size, count - begin) for begin in range(0, count, size))
        parts = [predictive(model, shared, 1, _blank_arguments(approximation, n), site) for n in sizes]
    return concatenate(parts).draws[0]


def log_evidence(
    approximation: Approximation,
    *data: Any,
    samples: int = 1000,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """A lower bound of log p(xₙ) in nats for each row, (N,), which rises to it with ``samples``.

    log (1/k) Σᵢ p(xₙ, zᵢ)/q(zᵢ | xₙ) over k draws, for a model whose
    latents are all of single rows; k = 1 is the ELBO of the row.

    References
    ----------
    Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders.
    """
    args = approximation.check_arguments(data)
    with _running(approximation, seed, batch_size) as (_, size):
        return _evidence(approximation, args, positive_integer(samples, "samples"), size, progress)[1].cpu()


def evaluate_rows(
    approximation: Approximation,
    args: tuple[Any, ...],
    samples: int,
    *,
    seed: int,
    batch_size: int | None,
    progress: bool,
) -> HeldOutRows:
    """Encode held-out rows, the checked ``args``, and score how probable they are from ``samples`` draws a row."""
    encoding = encode(approximation, *args, batch_size=batch_size)
    with _running(approximation, seed, batch_size) as (_, size):
        elbo, bound = _evidence(approximation, args, samples, size, progress)
    error = float(bound.std(correction=0)) / math.sqrt(len(bound))
    scores = EvidenceScores(
        rows=len(bound),
        elbo=float(elbo.mean()),
        log_evidence=float(bound.mean()),
        standard_error=error,
        samples=samples,
        active=int(encoding.active().sum()),
        size=encoding.mean.shape[1],
    )
    return HeldOutRows(encoding, args[0].cpu(), scores)


@contextmanager
def _running(approximation: Approximation, seed: int, batch_size: int | None) -> Iterator[tuple[str, int | None]]:
    """Run the block at the fitted parameters; yield the observed site and the most rows to run at a time."""
    with approximation.running(seed):
        yield approximation.observed_site, approximation.resolve_batch_size(batch_size)


def _no_encoder(guide: Model) -> ValueError:
    return ValueError(f"the guide {name_of(guide)!r} has no encoder: fit with one that amortized_encoder builds")


def _evidence(
    approximation: Approximation, args: tuple[Any, ...], samples: int, batch_size: int | None, progress: bool
) -> tuple[Tensor, Tensor]:
    """Return the ELBO of each row and log (1/k) Σᵢ p(xₙ, zᵢ)/q(zᵢ | xₙ), both in nats, (N,), from the same k draws."""
    bound_model = approximation.bound_model
    shared = sorted(_shared_sites(approximation))
    if shared:
        raise ValueError(f"all rows share the latents {shared}, without which a row has no density of its own")

    def bounds(part: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        def row_weights(_: object) -> Tensor:  # without the scale of mini-batches
            model_trace, guide_trace = traces(bound_model.model, bound_model.guide, part)
            return _by_row(model_trace) - _by_row(guide_trace)

        weights: Tensor = map_over_draws(row_weights, {}, samples, draws_together(part))
        return weights.mean(0), torch.logsumexp(weights, 0) - math.log(samples)

    size = batch_size and min(batch_size, rows_together(args, min(samples, SHARED_DRAWS)))
    parts = tqdm(row_parts(args, size), desc="log p(x)", unit="batch", delay=1, leave=False, disable=not progress)
    elbo, bound = zip(*(bounds(part) for _, part in parts), strict=True)
    return torch.cat(elbo), torch.cat(bound)


def _by_row(trace: poutine.Trace) -> Tensor:
    terms = [site["fn"].log_prob(site["value"]) for site in trace.nodes.values() if site["type"] == "sample"]
    return torch.stack([term.expand(max(terms, key=Tensor.numel).shape) for term in terms]).sum(0)


def _shared_sites(approximation: Approximation) -> set[str]:
    """Return the names of the latents that all rows share."""
    return {site.name for site in approximation.bound_model.latents} - approximation.latent_sampler.row_sites().keys()


def _draw_shared(approximation: Approximation, draws: int) -> dict[str, Tensor]:
    """Draw the latents that all rows share; an empty dict if there are none."""
    shared = _shared_sites(approximation)
    if not shared:
        return {}
    drawn = approximation.latent_sampler.draw(draws, approximation.args)
    return {name: drawn[name] for name in shared}


def _blank_arguments(approximation: Approximation, rows: int) -> tuple[Any, ...]:
    """Return arguments of so many rows whose values no one reads."""
    args = approximation.args
    return tuple(v.new_zeros(rows, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v for v in args)
