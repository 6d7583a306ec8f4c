"""Golden numbers: some thirty fits, and what follows from them, as hashes that a refactoring must not change.

``python -m tests.end_to_end.golden write NUMBERS KEPT`` runs every case and writes the hashes to the JSON file
NUMBERS, and what is saved on disk to the folder KEPT. ``python -m tests.end_to_end.golden compare NUMBERS KEPT``
runs them again, loads what KEPT holds, and exits with 1 if a hash differs. The hashes are those of one machine,
one version of torch and one thread: write them on the parent commit, compare on the next.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal

import guides
import inference as kiln
from ppl_models import VAE, DropoutRegression, bnn_regression, linear_regression, mlp_regression, u1

fit = partial(kiln.fit, progress=False)
Case = Callable[[], Iterator[tuple[str, Any]]]
KEPT = Path()


def digest(*values: Any) -> str:
    """The SHA-256 of numbers, to their last bit, cut to 16 hex digits."""
    arrays = (np.ascontiguousarray(v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v) for v in values)
    return hashlib.sha256(b"".join(str(a.dtype).encode() + a.tobytes() for a in arrays)).hexdigest()[:16]


def parameters(posterior: Any) -> str:
    """The hash of the parameters, the losses and the KL divergences of a fit."""
    return digest(*posterior.params.values(), posterior.losses, posterior.kl)


def rows(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a linear regression with two columns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0]) + 0.1 * torch.randn(count, generator=generator)


X, Y = rows()
LINE = partial(linear_regression, noise=0.1)
GUIDES: dict[str, Callable[..., Any]] = {
    "mean_field": guides.mean_field_normal,
    "full_rank": guides.full_rank_normal,
    "low_rank": guides.low_rank_normal,
    "planar": partial(guides.planar_flow, layers=2),
    "spline": partial(guides.spline_flow, layers=1, hidden=(8,)),
    "laplace": AutoLaplaceApproximation,
    "point": AutoDelta,
}


def branch(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """A model that no compiler takes: it branches on a value."""
    slope = pyro.sample("slope", dist.Normal(0, 1))
    mean = slope * x[:, 0] if slope > 0 else slope * x[:, 1]
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, 1), obs=y)


def own_line(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """A linear regression whose source stays as it is."""
    weights = pyro.sample("weights", dist.Normal(0, 1).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ weights, 0.1), obs=y)


def eight_schools() -> torch.Tensor:
    """The hierarchical model of the eight schools, centred: a funnel."""
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
    mu, tau = pyro.sample("mu", dist.Normal(0, 5)), pyro.sample("tau", dist.HalfCauchy(5))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def fits_of_guides(engine: str) -> Iterator[tuple[str, Any]]:
    """Each guide on the linear regression, with the draws that follow."""
    for name, guide in GUIDES.items():
        model = LINE if name == "laplace" else linear_regression  # that needs a mode, where the curvature is taken
        posterior = fit(model, guide(model), X, Y, steps=120, lr=0.02, engine=engine)
        yield name, parameters(posterior)
        yield f"{name} draws", digest(*posterior.sample(20).values(), posterior.predict(X[:5], draws=20).draws)


def automatic() -> Iterator[tuple[str, Any]]:
    """Fits that choose steps and end themselves."""
    for engine in ("eager", "compiled"):
        posterior = fit(LINE, guides.full_rank_normal(LINE), X, Y, steps=1500, engine=engine)
        yield f"full rank {engine}", parameters(posterior)
        yield f"full rank {engine} stop", posterior.stop_reason
        if engine == "compiled":
            diagnosis = posterior.diagnose(draws=500)
            yield "k-hat", repr(diagnosis.khat)
            yield "verdict", str(diagnosis.verdict)
            yield "loo", digest(posterior.loo(draws=500).pointwise)
            yield "log weights", digest(posterior.log_weights(200))
            yield "log density", digest(posterior.log_prob(posterior.sample(20)))
            yield "corrected", digest(*posterior.sample(20, corrected=True).values())
            yield "prior", digest(*posterior.prior(20).values())
            yield "likelihood", digest(*posterior.log_likelihood(draws=20).values())
    network = partial(bnn_regression, hidden=(4,))
    posterior = fit(network, guides.mean_field_normal(network), X, Y, steps=1200, engine="compiled")
    yield "network", parameters(posterior)
    yield "network scores", repr(posterior.evaluate(X, Y, draws=50).scores)
    posterior = fit(eight_schools, guides.funnel_flow(eight_schools), steps=1000, engine="compiled")
    yield "funnel flow", parameters(posterior)
    yield "funnel k-hat", repr(posterior.diagnose(draws=500).khat)
    posterior = fit(
        u1, guides.planar_flow(u1, layers=4), steps=300, anneal=100, lr=0.01, particles=8, engine="compiled"
    )
    yield "annealed", parameters(posterior)
    for init in ("mode", "prior", {"bias": 1.0}):
        options = {"lr": 0.01, "steps": 50, "engine": "eager"}
        yield (
            f"init {init}",
            parameters(fit(linear_regression, guides.mean_field_normal(linear_regression), X, Y, init=init, **options)),
        )


def options() -> Iterator[tuple[str, Any]]:
    """Mini-batches, restarts, optimisers, schedules, data that are read or generated, in both engines."""
    guide = guides.mean_field_normal(linear_regression)
    for engine in ("eager", "compiled"):
        one = partial(fit, linear_regression, guide, engine=engine, steps=100)
        yield f"mini-batch {engine}", parameters(one(X, Y, lr=0.02, batch_size=20))
        yield f"restarts {engine}", parameters(one(X, Y, lr=0.02, restarts=2))
        yield f"particles {engine}", parameters(one(X, Y, lr=0.02, particles=3))
        yield f"schedule {engine}", parameters(one(X, Y, lr=kiln.cosine_decay(0.05, 100)))
        yield f"sgd {engine}", parameters(one(X, Y, lr=1e-5, optimizer="sgd"))
        yield f"clipped {engine}", parameters(one(X, Y, lr=0.02, optimizer="clippedadam"))
        yield f"double {engine}", parameters(one(X, Y, lr=0.02, dtype=torch.float64))
        read = one(kiln.batches(X.numpy(), Y.numpy()), lr=0.02, batch_size=16)
        yield f"batches {engine}", parameters(read)
        yield f"batches weights {engine}", digest(read.log_weights(20))
        yield f"generated {engine}", parameters(one(kiln.fresh(lambda: rows(20)), lr=0.02))
    yield "branch", parameters(fit(branch, guides.mean_field_normal(branch), X, Y, steps=50, lr=0.02))


def networks() -> Iterator[tuple[str, Any]]:
    """Dropout and an autoencoder, whose guides have noise or latents of rows."""
    torch.manual_seed(0)
    model = DropoutRegression(2, hidden=8)
    posterior = fit(model, guides.bernoulli_dropout(model), X, Y, steps=80, batch_size=20, lr=0.01, engine="compiled")
    yield "dropout", parameters(posterior)
    yield "dropout per row", digest(posterior.predict(X[:5], draws=10, per_row=True).draws)
    pixels = (torch.rand(40, 16, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    vae = VAE(16, latent=2, hidden=(8,))
    posterior = fit(vae, guides.amortized_encoder(vae), pixels, steps=60, batch_size=20, lr=0.01, engine="compiled")
    yield "autoencoder", parameters(posterior)
    yield "evidence", digest(posterior.evaluate(pixels[:10], draws=20).scores.log_evidence)
    mlp = partial(mlp_regression, hidden=(4,))
    yield "mlp", parameters(fit(mlp, AutoDelta(mlp), X, Y, steps=80, lr=0.01, engine="compiled"))


def many() -> Iterator[tuple[str, Any]]:
    """Many fits in one program, and calibration."""
    guide = guides.mean_field_normal(linear_regression)
    wanted = [partial(kiln.fit, linear_regression, guide, X, Y, seed=i) for i in range(3)]
    for engine in ("eager", "compiled"):
        found = kiln.fit_many(wanted, steps=150, lr=0.02, engine=engine, progress=False)
        yield f"many {engine}", [parameters(posterior) for posterior in found]
    found = kiln.fit_many(
        [partial(kiln.fit, LINE, guides.mean_field_normal(LINE), X, Y * k) for k in (1, 2)], steps=1200, progress=False
    )
    yield "many automatic", [parameters(posterior) for posterior in found]
    calibration = kiln.calibrate(LINE, guides.mean_field_normal, X, Y, fits=4, draws=9, steps=100, progress=False)
    yield "calibration", digest(calibration.ranks)


def kept(write: bool) -> Iterator[tuple[str, Any]]:
    """What an earlier version has saved: a posterior, a checkpoint, a stored prediction, an exported predictor."""
    guide = AutoNormal(own_line)  # no guide of ours: a checkpoint holds a hash of the source of model and guide
    for engine in ("eager", "compiled"):
        checkpoint = KEPT / f"checkpoint-{engine}"
        one = partial(fit, own_line, guide, X, Y, lr=0.02, engine=engine, checkpoint=checkpoint)
        if write:
            one(steps=100)
            yield (
                f"resumed {engine}",
                parameters(fit(own_line, guide, X, Y, lr=0.02, engine=engine, steps=200)),
            )
        else:
            yield f"resumed {engine}", parameters(one(steps=200, resume=True))
    automatic = partial(
        fit, own_line, AutoMultivariateNormal(own_line), X, Y, engine="eager", checkpoint=KEPT / "checkpoint-automatic"
    )
    yield "resumed automatic", parameters(automatic(steps=1200, resume=not write))
    guide = guides.mean_field_normal(linear_regression)
    if write:
        posterior = fit(linear_regression, guide, X, Y, steps=100, lr=0.02, engine="eager")
        posterior.save(KEPT / "posterior")
        posterior.predict(X, draws=20, out=KEPT / "prediction", progress=False)
        posterior.export(KEPT / "exported" / "predictor.npz", draws=20)
    posterior = kiln.load(KEPT / "posterior", linear_regression, guide)
    yield "loaded", parameters(posterior)
    yield "loaded prediction", digest(posterior.predict(X[:5], draws=20).draws)
    stored = kiln.open_prediction(KEPT / "prediction")
    yield "stored prediction", digest(np.asarray(stored.mean))
    yield "exported before", digest(predictor(KEPT / "exported").predict(X.numpy()).draws)
    with tempfile.TemporaryDirectory() as folder:
        posterior.export(Path(folder) / "predictor.npz", draws=20)
        yield "exported now", digest(predictor(Path(folder)).predict(X.numpy()).draws)
    frame = posterior.to_arviz(draws=20, seed=0)
    yield "arviz", digest(*(frame.posterior[name].values for name in sorted(frame.posterior.data_vars)))


def predictor(folder: Path) -> Any:
    """The predictor that an export left in a folder, run by NumPy alone."""
    spec = importlib.util.spec_from_file_location("predictor", folder / "predictor.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["predictor"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(folder / "predictor.npz")


def numbers(write: bool) -> dict[str, Any]:
    """Run every case: ``{name: hash}``."""
    cases: dict[str, Case] = {
        "eager": partial(fits_of_guides, "eager"),
        "compiled": partial(fits_of_guides, "compiled"),
        "automatic": automatic,
        "options": options,
        "networks": networks,
        "many": many,
        "kept": partial(kept, write),
    }
    found: dict[str, Any] = {}
    for group, case in cases.items():
        for name, value in case():
            found[f"{group}: {name}"] = value
    return found


def main(action: str, path: str, folder: str) -> int:
    """Write the numbers, or compare them with those written: 1 if any differ."""
    global KEPT  # noqa: PLW0603 - a script's one setting
    KEPT = Path(folder)
    KEPT.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = numbers(action == "write")
    if action == "write":
        Path(path).write_text(json.dumps(found, indent=1))
        print(f"{len(found)} numbers written")
        return 0
    known = json.loads(Path(path).read_text())
    found = json.loads(json.dumps(found))
    differ = [name for name in known.keys() | found.keys() if known.get(name) != found.get(name)]
    for name in sorted(differ):
        print(f"{name}: {known.get(name)} before, {found.get(name)} now")
    print(f"{len(known) - len(differ)} of {len(known)} numbers are equal")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
