"""The command line in tests: a table, a module of one's own, and how commands are called."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from inference.cli.commands import main

RUN_FILES = [".kiln.lock", "posterior-HASH.safetensors", "posterior.json", "report.html", "run.json"]
COLUMNS = ["mean", "std", "lower", "upper"]
MY_MODULE = """
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints


def model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ slope, 0.5), obs=y)


def guide(x, y=None):
    loc = pyro.param("loc", torch.zeros(x.shape[1]))
    scale = pyro.param("scale", 0.1 * torch.ones(x.shape[1]), constraint=constraints.positive)
    pyro.sample("slope", dist.Normal(loc, scale).to_event(1))


number = 3
"""


def frame():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 2))
    y = 1 + 2 * x[:, 0] - x[:, 1] + generator.normal(0, 0.3, 40)
    return pd.DataFrame({"size": x[:, 0], "age": x[:, 1], "price": y})


def fit_arguments(data, out, model="linear_regression", **options):
    given = {"data": data, "target": "price", "out": out, "steps": 60, **options}
    pairs = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
    return ["fit", model, *(word for pair in pairs for word in pair)]


def names_in(folder):
    return sorted(re.sub("-[0-9a-f]{16}", "-HASH", path.name) for path in folder.iterdir())


def tensors_in(folder):
    (path,) = Path(folder).glob("posterior-*.safetensors")
    return load_file(path)


def refused(capsys, arguments):
    status = main([str(word) for word in arguments])
    printed = capsys.readouterr()
    assert (status, printed.out) == (1, "")
    assert "Traceback" not in printed.err
    assert re.fullmatch(r"kiln: [^\n]+\n", printed.err)
    return printed.err.removeprefix("kiln: ").strip()


def predict(folder, table, out, **options):
    words = [str(word) for name, value in {"draws": 200, **options}.items() for word in (f"--{name}", value)]
    assert main(["predict", str(folder), "--data", str(table), "--out", str(out), *words]) == 0
    return pd.read_csv(out) if out.suffix == ".csv" else None
