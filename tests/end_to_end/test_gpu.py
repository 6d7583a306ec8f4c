import numpy as np
import pytest
import torch

from guides import bernoulli_dropout, mean_field_normal
from inference import cosine_decay, fit, load
from ppl_models import DropoutCNN, linear_regression
from ppl_models.data.datasets import digits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_a_fit_on_the_gpu_agrees_with_one_on_the_cpu(line, tmp_path):
    def run(device):
        guide = mean_field_normal(linear_regression)
        schedule = cosine_decay(0.03, 2000)
        return fit(linear_regression, guide, line.x, line.y, steps=2000, lr=schedule, device=device, progress=False)

    gpu, cpu = run("cuda"), run("cpu")
    assert gpu.bound_model.device.type == "cuda"
    for name, draws in cpu.sample(1000).items():
        other = gpu.sample(1000)[name]
        assert other.device.type == "cpu"
        # Two fits with other random numbers: their own error is within a quarter of an sd.
        assert ((other.mean(0) - draws.mean(0)).abs() < 0.25 * draws.std(0)).all()
    gpu.save(tmp_path)
    loaded = load(tmp_path, linear_regression, mean_field_normal(linear_regression), device="cuda")
    assert np.array_equal(loaded.predict(line.x, draws=9).draws, gpu.predict(line.x, draws=9).draws)


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_gpus_random_state(line):
    before = torch.cuda.get_rng_state()
    first, second = (
        fit(linear_regression, mean_field_normal(linear_regression), line.x, line.y, steps=50, progress=False)
        for _ in range(2)
    )
    assert np.array_equal(first.losses, second.losses)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_compiled_steps_are_replayed_from_a_graph_and_are_the_eager_ones(line):
    """One draw of noise for both: the CUDA graph's losses against the model itself, step by step."""
    from tests.helpers.engines import losses_of_both

    device = torch.device("cuda")
    args = (line.x.double().to(device), line.y.double().to(device))
    ours, theirs, theta, reference = losses_of_both(
        linear_regression, mean_field_normal(linear_regression), args, steps=100, device=device
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    torch.testing.assert_close(theta, reference, rtol=1e-7, atol=1e-9)


def test_a_compiled_fit_on_the_gpu_goes_down_and_is_reproducible(line):
    options = {"steps": 300, "engine": "compiled", "device": "cuda", "progress": False}
    first, second = (
        fit(linear_regression, mean_field_normal(linear_regression), line.x, line.y, **options) for _ in range(2)
    )
    assert np.array_equal(first.losses, second.losses)
    assert first.losses[-50:].mean() < first.losses[:50].mean()


def test_a_network_with_dropout_is_fitted_where_it_lies_and_predicts_there():
    data = digits()
    torch.manual_seed(0)
    model = DropoutCNN((8, 8), hidden=50, brightest=16).to("cuda")
    posterior = fit(model, bernoulli_dropout(model), data.x, data.y, steps=600, batch_size=100, lr=1e-3, progress=False)
    assert posterior.bound_model.device.type == "cuda"
    found = posterior.evaluate(data.x, data.y, draws=20, progress=False)
    assert found.prediction.draws.device.type == "cpu"
    assert found.scores.accuracy > 0.9
    apart = posterior.predict(data.x[:10], draws=5, per_row=True)
    assert apart.draws.shape == (5, 10, 10)
