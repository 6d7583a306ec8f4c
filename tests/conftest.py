import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz  # noqa: F401 - its own announcement on import must not fail a test

    from inference.engine import compiled
    from inference.engine.batched import runner
    from inference.engine.compiler import cpp_build
    from inference.posterior import Posterior
    from inference.reporting.report import write_report
    from inference.storage.json_document import write_json


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Compiled programs of the tests are kept for the tests alone, and for all processes that run them."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture
def resealed():
    """Change values of a sealed JSON file, and give it the checksum that belongs to them, as only intent can."""

    def change(path, **values):
        content = json.loads(path.read_text())
        del content["sha256"]
        content |= values
        write_json(path, content, content.pop("schema"))

    return change


@pytest.fixture(scope="session")
def headers_kept(own_cache):
    """The header of all programs, compiled, as it lies in the cache."""
    with cpp_build.precompiled() as header:
        return header()


@pytest.fixture
def empty_cache(headers_kept, tmp_path, monkeypatch):
    """A cache of one test, with no program in it; the header, which takes seconds to compile, is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry = tmp_path / "kiln" / "headers" / headers_kept.parent.name
    entry.mkdir(parents=True, mode=0o700)
    for path in filter(Path.is_file, headers_kept.parent.iterdir()):
        os.link(path, entry / path.name)
    return tmp_path / "kiln"


@pytest.fixture(scope="module")
def few_draws():
    """Reports and verdicts from a few draws, where only their form is tested: each draw runs the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Posterior.diagnose.__kwdefaults__, "draws", 200)
        patch.setitem(Posterior.diagnose.__kwdefaults__, "repeats", 2)
        patch.setitem(write_report.__kwdefaults__, "draws", 50)
        yield


class Interpreted:
    """A program that torch runs operator by operator: what the graph says, without the seconds of a compiler."""

    def __init__(self, module, inputs, rows, threads):
        self.module, self.inputs, self.rows = module, inputs, rows

    def run(self, rows):
        losses = []
        with torch.no_grad():
            for i in range(len(rows[0])):
                for place, row in zip(self.rows, rows, strict=True):
                    self.inputs[place].copy_(row[i].reshape(self.inputs[place].shape))
                losses.append(self.module(*self.inputs)[0].clone())
        return torch.stack(losses)


@pytest.fixture
def interpreted(monkeypatch):
    for engine in (compiled, runner):
        monkeypatch.setattr(engine, "executable", Interpreted)


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are made but not drawn, which is most of the time of a report, where its words are tested."""
    monkeypatch.setattr(
        "inference.reporting.figures.posterior_plots.Figure.savefig",
        lambda _, file, **options: file.write("<svg></svg>"),
    )


@pytest.fixture(scope="session")
def line():
    """Forty rows on y = 1 + 2x, noise sd 0.3."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 40).reshape(-1, 1)
    y = 1 + 2 * x[:, 0] + 0.3 * torch.randn(40, generator=generator)
    return SimpleNamespace(x=x, y=y)
