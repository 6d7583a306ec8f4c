import threading
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch.utils.data import DataLoader, IterableDataset

from guides import amortized_encoder, mean_field_normal
from inference import NonFinite, batches, fit, load
from inference.engine.svi_problem import SVIProblem
from inference.model.bound_model import BoundModel
from inference.model.elbo import loss
from inference.predictive.importance_weights import weighted_draws
from inference.utils.random_state import RandomStream
from ppl_models import VAE
from tests.helpers.row_sources import CPU, OPTIONS, ROWS, model, npy, stream, taken


def epoch_of_losses(source, factor):
    found = stream(source, size=50)
    random = RandomStream.seeded(0)
    bound_model = BoundModel.start(model, mean_field_normal(model), found.first, random, CPU, torch.float64)
    problem = SVIProblem.on(bound_model, found)
    found.hold(0, 20)
    values = []
    with torch.no_grad():
        for step in range(20):
            with bound_model.running(bound_model.params.flatten(), RandomStream.seeded(1)):
                values.append(loss(problem.model, problem.guide, problem.args_at(step), 1, True)[0] * factor)
    found.close()
    with torch.no_grad(), bound_model.running(bound_model.params.flatten(), RandomStream.seeded(1)):
        args = tuple(part.flatten(0, 1) for part in found.rows(0, 20))
        return torch.stack(values).mean(), loss(bound_model.model, bound_model.guide, args, 1, True)[0]


def test_the_mean_over_an_epoch_is_the_full_elbo(data, tmp_path):
    mean, full = epoch_of_losses(npy(tmp_path, *data), 1.0)
    assert abs(mean - full) < 1e-9 * abs(full)
    mean, full = epoch_of_losses(npy(tmp_path, *data), 50 / ROWS)  # what it is without the scale
    assert abs(mean - full) > 0.1 * abs(full)


def test_both_engines_take_the_steps_of_a_loop_by_hand(data, tmp_path):
    source = npy(tmp_path, *data)
    guide = AutoDelta(
        model,
        init_loc_fn=init_to_value(
            values={"bias": torch.zeros((), dtype=torch.float64), "weights": torch.zeros(2, dtype=torch.float64)}
        ),
    )
    fits = [
        fit(model, guide, source, optimizer="sgd", steps=60, engine=engine, **OPTIONS | {"lr": 1e-5})
        for engine in ("eager", "compiled")
    ]
    xs, ys = taken(stream(source, size=50), 60)
    bias, weights, losses = torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64), []
    for x, y in zip(xs, ys, strict=True):
        b, w = bias.clone().requires_grad_(), weights.clone().requires_grad_()
        prior = dist.Normal(0.0, 1.0).log_prob(b) + dist.Normal(0.0, 1.0).log_prob(w).sum()
        value = -(prior + ROWS / 50 * dist.Normal(x @ w + b, 0.5).log_prob(y).sum())
        value.backward()
        bias, weights = bias - 1e-5 * b.grad, weights - 1e-5 * w.grad
        losses.append(value.item())
    for found in fits:
        assert np.allclose(found.losses, losses, rtol=1e-9)


@pytest.mark.parametrize("engine", [pytest.param("eager", marks=pytest.mark.slow), "compiled"])
def test_a_fit_lands_where_the_one_in_memory_does(data, tmp_path, engine):
    source = npy(tmp_path, *data)
    found = fit(model, mean_field_normal(model), source, steps=1500, seed=2, engine=engine, **OPTIONS)
    x = np.column_stack([np.ones(ROWS), data[0]])
    precision = x.T @ x / 0.25 + np.eye(3)
    exact = np.linalg.solve(precision, x.T @ data[1] / 0.25)
    params = found.params
    assert abs(params["AutoNormal.locs.bias"] - exact[0]) < 0.05
    assert np.abs(params["AutoNormal.locs.weights"].numpy() - exact[1:]).max() < 0.05
    assert found.record.options["num_data"] == ROWS
    assert found.record.options["batch_size"] == 50
    assert found.data[1].shape == (50,)


def test_arrays_on_disk_with_a_batch_size_are_read_in_batches(data, tmp_path):
    npy(tmp_path, *data)
    x, y = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy")
    found = fit(model, mean_field_normal(model), x, y, steps=20, **OPTIONS)
    assert np.array_equal(found.losses, fit(model, mean_field_normal(model), batches(x, y), steps=20, **OPTIONS).losses)
    assert found.record.options["num_data"] == ROWS


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_fit_goes_on_from_its_checkpoint_with_the_batches_that_were_next(data, tmp_path, engine):
    source = npy(tmp_path, *data)
    run = partial(fit, model, mean_field_normal(model), source, **OPTIONS, engine=engine)
    whole = run(steps=150)

    class Stop(Exception):
        pass

    def stop(now):
        if now.step == 100:
            raise Stop

    with pytest.raises(Stop):
        run(steps=150, checkpoint=tmp_path / "run", callbacks=[stop])
    run(steps=70, checkpoint=tmp_path / "other")
    longer = run(steps=150, checkpoint=tmp_path / "other", resume=True)
    assert np.array_equal(longer.losses, whole.losses)
    with pytest.raises(ValueError, match=r"another fit.*batch_size"):
        run(steps=150, checkpoint=tmp_path / "other", resume=True, batch_size=40)
    np.save(tmp_path / "y.npy", data[1] + 1)
    with pytest.raises(ValueError, match="another fit"):
        run(steps=150, checkpoint=tmp_path / "other", resume=True)


def test_weights_on_all_rows(data, tmp_path):
    source = npy(tmp_path, *data)
    found = fit(model, mean_field_normal(model), source, steps=100, **OPTIONS)
    drawn, log_weights = weighted_draws(found, 40, 0)
    x, y = map(torch.from_numpy, data)
    mean = drawn["weights"] @ x.T + drawn["bias"][:, None]
    prior = dist.Normal(0.0, 1.0).log_prob(drawn["weights"]).sum(1) + dist.Normal(0.0, 1.0).log_prob(drawn["bias"])
    by_hand = prior + dist.Normal(mean, 0.5).log_prob(y).sum(1) - found.log_prob(drawn)
    assert torch.allclose(log_weights, by_hand, rtol=1e-10)
    assert torch.equal(found.log_weights(40), log_weights)
    found.save(tmp_path / "run")
    loaded = load(tmp_path / "run", model, mean_field_normal(model), source)
    assert torch.allclose(loaded.log_weights(40), log_weights)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kiln")]


def test_what_asks_about_all_rows(data, tmp_path, blank_figures):
    found = fit(model, mean_field_normal(model), npy(tmp_path, *data), steps=100, **OPTIONS)
    diagnosis = found.diagnose(draws=200)
    assert diagnosis.khat is not None
    assert diagnosis.draws == 200
    assert found.predict(data[0][:7], draws=5).mean.shape == (7,)
    assert found.report(tmp_path / "report.html", progress=False).exists()
    with pytest.raises(ValueError, match="held-out rows"):
        found.loo()


def test_an_encoder_takes_new_rows_at_each_step(tmp_path):
    rows = (np.random.default_rng(0).random((300, 12)) < 0.3).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    vae = VAE(12, hidden=(8, 8), latent=2)
    options = {"lr": 1e-9, "progress": False, "steps": 200}
    guide = amortized_encoder(vae)
    few = fit(vae, guide, batches(tmp_path / "x.npy"), batch_size=20, **options)
    all_rows = fit(vae, guide, rows, **options)
    for ours, whole in ((few.losses, all_rows.losses), (few.kl, all_rows.kl)):
        error = np.hypot(ours.std(), whole.std()) / np.sqrt(200)
        assert abs(ours.mean() - whole.mean()) < 4 * error < 0.1 * whole.mean()
    assert few.diagnose().khat is None


def test_latents_of_rows_need_an_encoder(data, tmp_path):
    def mixed(x, y=None):
        with pyro.plate("data", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(shift + x[:, 0], 0.5), obs=y)

    with pytest.raises(ValueError, match=r"AutoNormal keeps a distribution for each row of .'shift'.*amortized"):
        fit(mixed, AutoNormal(mixed), npy(tmp_path, *data), steps=5, **OPTIONS)


def test_a_model_without_a_plate_is_told_how_to_write_it(data, tmp_path):
    def flat_params(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match=r"site 'y' observes rows outside.*pyro.plate\('data', len\(x\)\)"):
        fit(flat_params, AutoNormal(flat_params), npy(tmp_path, *data), steps=5, **OPTIONS)


def test_a_plate_that_names_all_rows_keeps_its_scale(data, tmp_path):
    def sized(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", ROWS, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5), obs=y)

    def plain(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5), obs=y)

    source = npy(tmp_path, *data)
    one, other = (fit(f, AutoDelta(f), source, steps=20, engine="eager", **OPTIONS).losses for f in (sized, plain))
    assert np.allclose(one, other)


def test_a_number_that_is_none_is_named_by_its_row(data, tmp_path):
    x, y = data[0].copy(), data[1]
    x[777, 1] = np.nan
    with pytest.raises(ValueError, match=r"x has 1 values that are NaN.*row 777, column 1"):
        fit(model, AutoNormal(model), npy(tmp_path, x, y), steps=50, **OPTIONS)


def test_a_step_that_is_not_finite_is_named(data, tmp_path):
    def logs(x, y=None):
        slope = pyro.param("slope", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x[:, 0].log(), 1.0), obs=y)

    x = np.abs(data[0])
    x[0, 0] = 0.0
    ordered = batches(np.ascontiguousarray(x[::-1]), np.ascontiguousarray(data[1][::-1]), shuffle=False)
    for engine in ("eager", "compiled"):
        with pytest.raises(NonFinite) as caught:
            fit(logs, lambda x, y=None: None, ordered, steps=50, **OPTIONS, engine=engine)
        assert caught.value.step == 19
        assert caught.value.site == "y"


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2), torch.zeros(()))] * 10)


REFUSED = {
    "rows": (lambda x, y: batches(x, y[:-1]), "1,000 rows but y has 999"),
    "nothing": (lambda x, y: batches("no.npy", "y.npy"), "no.npy"),
    "kind": (lambda x, y: batches("x.csv"), "x.csv is not an .npy"),
    "unknown": (lambda x, y: batches(DataLoader(Endless())), "pass num_data="),
    "once": (lambda x, y: batches(iter([(x, y)]), num_data=10), "only once"),
    "dict": (lambda x, y: batches([{"x": x, "y": y}], num_data=10), "dict of .'x', 'y'."),
    "uneven": (lambda x, y: batches([(x, y[:5])], num_data=10), r"\[1000, 5\] rows"),
    "empty": (lambda x, y: batches([], num_data=10), "no batch"),
    "target": (lambda x, y: batches(x, y, target="y"), "column of Parquet"),
    "count": (lambda x, y: batches(x, y, num_data=7), "1,000 rows"),
    "object": (lambda x, y: batches(object()), "cannot take rows"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read(data, make, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        fit(model, AutoNormal(model), make(*data), steps=5, **OPTIONS)


def test_batches_say_how_many_rows(data):
    with pytest.raises(ValueError, match="pass batch_size="):
        fit(model, AutoNormal(model), batches(*data), steps=5)
    with pytest.raises(ValueError, match="batches stand alone"):
        fit(model, AutoNormal(model), batches(data[0]), data[1], steps=5)


def test_parquet_s_columns(tmp_path):
    pd.DataFrame({"a": [1.0, None], "y": [1, 2]}).to_parquet(tmp_path / "null.parquet")
    pd.DataFrame({"a": ["b", "c"], "y": [1, 2]}).to_parquet(tmp_path / "text.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, target, words in (
        ("null", "y", "column 'a' .* 1 values missing"),
        ("text", "y", "column 'a' .* of type"),
        ("text", "z", "no column 'z'"),
        ("broken", "y", "cannot be read as Parquet"),
        ("none", "y", "not there"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            stream(batches(tmp_path / f"{name}.parquet", target=target), size=2)
