"""Distance of the guides from known targets: energies, linear regression, a posteriordb posterior.

    python -m benchmarks.flows --threads 2
    python -m benchmarks.flows --only energies --seeds 5

KL(q‖p) in nats on the energies of Rezende, Mohamed (2015), by the number of layers; the time that a flow of
64 layers takes to compile, beside one of 8; mean, covariance and ELBO of the full-rank guide against linear
regression's closed form; four guides on posteriordb's sblri-blr, from the folder named by KILN_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import guides
from benchmarks.posteriordb_models import blr
from examples.planar_flow import fit_energy, kl
from inference import Posterior, cosine_decay, fit
from ppl_models import exact_linear_regression, linear_regression

LAYERS = (2, 8, 16, 32)
STEPS = 30_000


def energies(seeds: int) -> None:
    """KL by energy and guide: median and all of the seeds, the shares right of 0, and seconds of a fit."""
    for name in ("u1", "u2", "u3", "u4"):
        for layers in LAYERS:
            build = partial(guides.planar_flow, layers=layers)
            _energy_row(name, f"planar K={layers}", build, seeds, steps=20_000, particles=1000, lr=2e-3)
        _energy_row(name, "spline", guides.spline_flow, seeds, steps=8_000, particles=256, lr=5e-3)


def _energy_row(name: str, label: str, build: Callable[..., Any], seeds: int, **options: Any) -> None:
    rows = []
    for seed in range(seeds):
        posterior = fit_energy(name, build, seed, **options)
        rows.append((*kl(posterior, name, draws=50_000), posterior.record.seconds))
    found, share, seconds = (list(column) for column in zip(*rows, strict=True))
    shares = f"{min(share):.3f} to {max(share):.3f}"
    each = " ".join(f"{value:.4f}" for value in found)
    print(
        f"{name}  {label:<12} KL {statistics.median(found):.4f} ({each})  right of 0: {shares}  "
        f"{statistics.median(seconds):.1f} s",
        flush=True,
    )


def compile_time(repeats: int) -> None:
    """Seconds of the first 1,000 steps, compiling included, from an empty cache."""
    found: dict[int, list[float]] = {8: [], 64: []}
    outside = os.environ.get("XDG_CACHE_HOME")
    for _ in range(repeats):
        for layers, seconds in found.items():
            with tempfile.TemporaryDirectory() as cache:
                os.environ["XDG_CACHE_HOME"] = cache
                started = time.perf_counter()
                build = partial(guides.planar_flow, layers=layers)
                fit_energy("u1", build, 0, steps=1000, particles=100, lr=2e-3)
                seconds.append(time.perf_counter() - started)
    if outside is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = outside
    first, second = (statistics.median(seconds) for seconds in found.values())
    print(f"compiling: K=8 {first:.1f} s, K=64 {second:.1f} s, ratio {second / first:.2f}")


def regression(seeds: int) -> None:
    """Full rank against the closed form, on a parabola: three strongly correlated coefficients."""
    rng = np.random.default_rng(7)
    t = np.linspace(0, 1, 60)
    x, y = np.stack([t, t**2], 1), 1 + 2 * t - t**2 + rng.normal(0, 0.5, 60)
    exact = exact_linear_regression(x, y, noise=0.5)
    model = partial(linear_regression, noise=0.5)
    options: dict[str, Any] = {"steps": 20_000, "lr": cosine_decay(0.01, 20_000), "particles": 8}
    for seed in range(seeds):
        posterior = fit(model, guides.full_rank_normal(model), x, y, seed=seed, progress=False, **options)
        draws = posterior.sample(10_000)
        z = torch.cat([draws["weights"], draws["bias"][:, None]], 1).double()
        error = (z.mean(0) - exact.mean) / (exact.covariance.diagonal() / len(z)).sqrt()
        off = (learned_covariance(posterior.params) / exact.covariance - 1).abs().max()
        gap = exact.log_evidence - float(posterior.log_weights(2000).double().mean())
        print(
            f"full rank, seed {seed}: means {error.abs().max():.1f} Monte-Carlo errors off, covariance {off:.1%}, "
            f"log evidence − ELBO {gap:.4f} nats"
        )


def learned_covariance(params: dict[str, Tensor]) -> Tensor:
    """Σ of the full-rank guide, from its parameters."""
    name = "AutoMultivariateNormal"
    factor = (params[f"{name}.scale"][:, None] * params[f"{name}.scale_tril"]).double()
    return factor @ factor.T


def posteriordb(seeds: int) -> None:
    """Four guides on sblri-blr: the worst error of a mean in reference sds, and the sd ratios.

    The posterior is ten thousand times narrower than the prior. The target is annealed, so that flows are not bent
    out of shape on the way there; of the splines the best of three starts is kept.
    """
    folder = Path(os.environ.get("KILN_DATA", "data")) / "posteriordb" / "sblri-blr"
    if not folder.is_dir():
        sys.exit(f"{folder} is not there: set KILN_DATA to the folder that holds posteriordb/")
    data = json.loads((folder / "data.json").read_text())
    reference = np.load(folder / "reference_draws.npz")
    known = np.column_stack([reference["beta"], reference["sigma"]])
    cases: list[tuple[Any, float, int]] = [
        (guides.mean_field_normal, 0.05, 1),
        (guides.full_rank_normal, 0.05, 1),
        (guides.planar_flow, 0.05, 1),
        (guides.spline_flow, 0.01, 3),
    ]
    for build, lr, restarts in cases:
        for seed in range(seeds):
            posterior = fit(
                blr, build(blr), np.array(data["X"]), np.array(data["y"]), steps=STEPS, lr=cosine_decay(lr, STEPS),
                particles=16, anneal=STEPS // 2, restarts=restarts, seed=seed, progress=False,
            )  # fmt: skip
            _moments_row(f"{build.__name__:<18} seed {seed}", posterior, known)


def _moments_row(label: str, posterior: Posterior, known: np.ndarray) -> None:
    drawn = posterior.sample(20_000)
    z = np.column_stack([drawn["beta"].numpy(), drawn["sigma"].numpy()])
    off = np.abs((z.mean(0) - known.mean(0)) / known.std(0)).max()
    ratio = z.std(0) / known.std(0)
    print(
        f"sblri-blr  {label}: means {off:.3f} sd off, sd ratios {ratio.min():.3f} to {ratio.max():.3f}, "
        f"{posterior.record.seconds:.1f} s",
        flush=True,
    )


def main() -> None:
    """Print what was asked for."""
    parts = {"energies": energies, "compile": compile_time, "regression": regression, "posteriordb": posteriordb}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, nargs="+", default=list(parts))
    parser.add_argument("--seeds", type=int, default=5, help="seeds, and repeats of compiling")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.only:
        parts[name](options.seeds)


if __name__ == "__main__":
    main()
