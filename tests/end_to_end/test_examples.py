import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import function_approximation, mc_dropout, planar_flow, vae
from examples.bayesian_nn import run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_edwards_network_finds_the_cosine(seed):
    assert run(0.1, seed, 10_000, progress=False).rmse <= 0.065


@pytest.mark.slow
def test_with_learned_noise_it_collapses_and_is_not_trusted():
    """The reason why a fit needs a verdict: this ELBO is better than that of the good fit."""
    collapsed, good = run("learned", 0, 10_000, progress=False), run(0.1, 0, 10_000, progress=False)
    assert collapsed.rmse > 0.3
    assert collapsed.noise > 0.3
    assert collapsed.posterior.losses[-500:].mean() < good.posterior.losses[-500:].mean()
    assert not collapsed.posterior.diagnose().trusted


@pytest.mark.slow
def test_planar_flows_reach_the_energies_and_more_layers_come_closer():
    """KL of medians over 5 seeds, with the bounds of a prototype; both modes of U1 at every seed."""
    bounds = {("u1", 16): 0.015, ("u1", 32): 0.006, ("u2", 16): 0.08, ("u3", 32): 0.20, ("u4", 32): 0.20}
    for name in ("u1", "u2", "u3", "u4"):
        medians = []
        for layers in (2, 8, 16, 32):
            fits = [planar_flow.run(name, layers, seed, 20_000, 1000, progress=False) for seed in range(5)]
            medians.append(sorted(found.kl for found in fits)[2])
            assert medians[-1] <= bounds.get((name, layers), float("inf")), (name, layers)
            if name == "u1" and layers >= 16:
                assert all(0.45 <= found.right <= 0.55 for found in fits)
        assert medians == sorted(medians, reverse=True), name


def test_the_flows_script_runs_and_saves_its_figures(tmp_path):
    command = [sys.executable, ROOT / "examples" / "planar_flow.py", "--steps", "20", "--energies", "u1", "u4"]
    command += ["--layers", "2", "4", "--particles", "2", "--out", tmp_path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.count("u1 ") == said.count("u4 ") == 2
    for name in ("planar_flow.png", "planar_flow_kl.png"):
        assert (tmp_path / name).stat().st_size > 20_000


@pytest.mark.slow
def test_the_dropout_script_runs_on_digits_where_there_is_no_mnist(tmp_path):
    command = [
        sys.executable,
        ROOT / "examples" / "mc_dropout.py",
        "--digits",
        "--epochs",
        "2",
        "--fast",
        "--out",
        tmp_path,
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "predicted rightly" in said
    assert "expected calibration error" in said
    for name in ("mc_dropout.png", "mc_dropout_one.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_the_function_script_runs_from_start_to_end(tmp_path):
    command = [sys.executable, ROOT / "examples" / "function_approximation.py", "--steps", "200", "--out", tmp_path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "gradients: right" in said
    network, hand = re.search(r"the network says ([\d.]+), by hand ([\d.]+)", said).groups()
    assert float(network) == pytest.approx(float(hand), abs=2e-5)
    for name in ("loss", "approximation", "descent", "contour"):
        assert (tmp_path / f"function_{name}.png").stat().st_size > 10_000
    assert (tmp_path / "predictor.npz").exists()
    assert len(list((tmp_path / "snapshots").iterdir())) == 100


@pytest.mark.parametrize("seed", range(3))
def test_the_network_of_the_tutorial_learns_the_exponential(tmp_path, seed):
    """10,000 steps of 100 fresh points: e^0.2 within 0.002, and nowhere on [0, 1] off by more than 0.01."""
    learned = function_approximation.learn(tmp_path, seed=seed, progress=False)
    mean = function_approximation.predicted(learned.posterior, 1).mean
    truth = function_approximation.GRID[:, 0].exp()
    assert abs(float(mean[40] - truth[40])) < 0.002
    assert float((mean - truth).abs().max()) < 0.01
    assert function_approximation.by_hand(learned.posterior, 0.2) == pytest.approx(float(mean[40]), abs=2e-5)


@pytest.mark.slow
def test_the_autoencoder_script_runs_on_digits_where_there_is_no_mnist(tmp_path):
    command = [sys.executable, ROOT / "examples" / "vae.py", "--digits", "--epochs", "3", "--out", tmp_path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "ELBO of test images" in said
    assert (tmp_path / "vae.png").stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.skipif("KILN_DATA" not in os.environ, reason="needs MNIST")
def test_two_epochs_of_the_autoencoder_on_mnist():
    """The ELBO of test images is above −105 nats (an untrained one's is −550), and its curve was followed."""
    data = vae.Images.read()
    posterior, curves = vae.run(data, 2, progress=False)
    assert len(curves.test) == len(curves.training) == 2
    assert curves.test[0] < curves.test[1]
    assert curves.test[1] > -105
    assert posterior.encode(data.x_test).mean.shape == (10_000, 50)


@pytest.mark.slow
@pytest.mark.skipif("KILN_DATA" not in os.environ, reason="needs MNIST")
def test_mc_dropout_on_mnist_knows_what_it_does_not_know():
    """Four epochs: 98.5 % right (of 10,000, ± 0.1 %), and wrong images have much the higher entropy."""
    data = mc_dropout.Images.read()
    posterior = mc_dropout.run(data, 4, fast=True, progress=False)
    found = posterior.evaluate(data.x_test, data.y_test, draws=50, progress=False)
    assert found.scores.accuracy > 0.985
    assert found.scores.error_auroc > 0.95
    wrong = found.prediction.labels != found.observed
    entropy = found.prediction.entropy
    assert entropy[wrong].mean() > 5 * entropy[~wrong].mean()


@pytest.mark.slow
def test_the_script_runs_and_saves_its_figure(tmp_path):
    command = [sys.executable, ROOT / "examples" / "bayesian_nn.py", "--steps", "60", "--seeds", "1", "--out", tmp_path]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "bayesian_nn.png").stat().st_size > 20_000
    assert "don't trust" in said
