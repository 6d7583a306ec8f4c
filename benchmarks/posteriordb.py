"""Default fits of eight posteriordb posteriors on raw data, against the reference draws.

    KILN_DATA=… python -m benchmarks.posteriordb --threads 1

Each posterior by each guide and seed: ``fit(model, guide, *data,
optimizer="auto")`` with no other option but the ceiling of steps and, where
asked for, the particles, beside Pyro's
own way, its autoguide under ClippedAdam 0.02 that decays to 1 % over 8,000
steps. Of each: the largest error of a mean in reference sds, the least and
largest ratio of sds (20,000 draws), the ELBO in nats with its standard error
(5,000 draws), steps, gradient evaluations, seconds with the compiled program
warm, and why it stopped; then Pareto k-hat, the verdict of ``diagnose()``, and the
same errors of 20,000 corrected draws. Flows have no counterpart in Pyro here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import ClippedAdam

from benchmarks.posteriordb_models import NAMES, Errors, Posterior, read
from guides import full_rank_normal, funnel_flow, mean_field_normal, planar_flow, spline_flow
from inference import fit
from inference.optim.adaptive import StopReason

CEILING, PYROS, DRAWS, WEIGHTS = 7_000, 8_000, 20_000, 5_000
GUIDES: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "full rank": (full_rank_normal, AutoMultivariateNormal),
    "mean field": (mean_field_normal, AutoNormal),
    "planar": (planar_flow, None),
    "funnel": (funnel_flow, None),
    "spline": (spline_flow, None),
}


def by_kiln(posterior: Posterior, guide: Callable[..., Any], seed: int, particles: int) -> tuple[Errors, float, str]:
    """Errors, seconds, and what the fit says of itself."""
    began = time.perf_counter()
    found = fit(
        posterior.model,
        guide(posterior.model),
        *posterior.data,
        optimizer="auto",
        steps=CEILING,
        particles=particles,
        seed=seed,
        engine="compiled",
        progress=False,
    )
    seconds = time.perf_counter() - began
    weights = found.log_weights(WEIGHTS).double()
    elbo = f"{float(weights.mean()):>10.3f} ± {float(weights.std()) / WEIGHTS**0.5:.3f}"
    cost = f"{len(found.losses):>6}{found.record.evaluations:>7}"
    return (
        posterior.errors(found.sample(DRAWS)),
        seconds,
        f"{elbo}{cost}  {_end(found.record.stop):<22}{_verdict(posterior, found)}",
    )


def _end(stop: StopReason | None) -> str:
    if stop is None:
        return "all steps"
    words = "converged" if stop.converged else "settled" if stop.settled else "ceiling"
    return f"{words:<9} {'own steps' if stop.rhat is None else f'R-hat {stop.rhat:.2f}'}"


def _verdict(posterior: Posterior, found: Any) -> str:
    """K-hat, the verdict, and the errors of corrected draws where there are any."""
    diagnosis = found.diagnose()
    said = f"{diagnosis.khat:>6.2f} {diagnosis.verdict:<12}"
    try:
        errors = posterior.errors(found.sample(DRAWS, corrected=True))
    except ValueError:
        return f"{said}refused"
    false = diagnosis.trusted and not errors.landed
    return f"{said}{errors.mean:>7.3f}{errors.least:>7.3f}{errors.most:>7.3f}{' FALSE' if false else ''}"


def by_pyro(posterior: Posterior, guide: Callable[..., Any], seed: int) -> tuple[Errors | None, float, str]:
    """Fit by Pyro's own loop; no errors where it cannot start or ends without finite parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    args = tuple(value.float() if value.is_floating_point() else value for value in posterior.data)
    began = time.perf_counter()
    try:
        built = guide(posterior.model)
        svi = SVI(posterior.model, built, ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / PYROS)}), Trace_ELBO())
        for _ in range(PYROS):
            svi.step(*args)
        with torch.no_grad():
            draws = [built(*args) for _ in range(2000)]
        found = posterior.errors({name: torch.stack([draw[name] for draw in draws]) for name in draws[0]})
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return None, time.perf_counter() - began, f"refused: {str(error).splitlines()[0][:60]}"
    return found, time.perf_counter() - began, f"{'':>18}{PYROS:>6}{PYROS:>7}"


def show(name: str, guide: str, seed: int, way: str, result: tuple[Errors | None, float, str]) -> None:
    """Return a line of the table."""
    errors, seconds, said = result
    figures = " " * 22
    if errors is not None:
        figures = f"{errors.mean:>8.3f}{errors.least:>7.3f}{errors.most:>7.3f}"
    verdict = "lands" if errors is not None and errors.landed else ""
    print(f"{name:<40}{guide:<11}{seed:>2} {way:<5}{figures} {verdict:<6}{seconds:>6.1f}{said}", flush=True)


def main() -> None:
    """Print a line for each fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guides", choices=GUIDES, nargs="+", default=list(GUIDES))
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--pyro", action="store_true", help="Pyro's way beside it, at the first seed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{'posterior':<40}{'guide':<11}seed way      mean  least   most       seconds      ELBO          steps  grads"
        "  stop                  k-hat verdict     corrected: mean, least, most"
    )
    for name in NAMES:
        posterior = read(name)
        for label in options.guides:
            ours, pyros = GUIDES[label]
            by_kiln(posterior, ours, 0, options.particles)  # compiles
            for seed in range(options.seeds):
                show(name, label, seed, "Kiln", by_kiln(posterior, ours, seed, options.particles))
            if options.pyro and pyros is not None:
                show(name, label, 0, "Pyro", by_pyro(posterior, pyros, 0))


if __name__ == "__main__":
    main()
