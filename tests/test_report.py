import base64
import re
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from guides import mean_field_normal
from inference import Labels, fit
from ppl_models import linear_regression

pytestmark = pytest.mark.usefixtures("few_draws")


class Reader(HTMLParser):
    """Tags, links and visible text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def posterior(line):
    return fit(
        linear_regression, mean_field_normal(linear_regression), line.x, line.y, steps=600, lr=0.03, progress=False
    )


@pytest.fixture(scope="module")
def page(posterior, line, tmp_path_factory, few_draws):
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    labels = Labels(title="Slopes", data="line.csv", columns=["dose"], target="effect")
    return posterior.report(path, test=(line.x, line.y), labels=labels, baselines={"least squares": 0.31}).read_text()


def test_it_is_one_file_that_needs_no_network(page):
    reader = Reader(page)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in reader.links)
    assert "script" not in reader.tags
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert len(page) < 3_000_000


def test_it_holds_every_part(page):
    text = " ".join(" ".join(Reader(page).text).split())
    for part in (
        "Slopes",
        "line.csv",
        "linear_regression: 3 unknown numbers in 3 sites",
        "Pareto k-hat",
        "How good are its predictions?",
        "RMSE of least squares, same rows 0.31",
        "inside their 90% interval",
        "mean log likelihood, nats a row",
        "Did the fit settle?",
        "How uncertain are the predictions?",
        "Does the model make data like effect?",
        "What did the data teach?",
        "Posterior table",
        "weights[0]",
        "pyro-ppl",
        "seed",
        "seconds of fitting",
    ):
        assert part in text
    assert Reader(page).tags.count("img") == 5


def test_every_figure_has_a_sentence_and_is_not_empty(page):
    assert page.count('<p class="reading">') == page.count("<section>") == 6
    for picture in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        assert base64.b64decode(picture).count(b"<path") > 20


def test_names_are_shown_and_never_run(line, tmp_path):
    site = "<script>alert(1)</script>"

    def model(x, y=None):
        w = pyro.sample("<b>w</b>", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample(site, dist.Normal(w * x[:, 0], 1.0), obs=y)

    posterior = fit(model, AutoNormal(model), line.x, line.y, steps=60, progress=False)
    labels = Labels(title="<img src=x onerror=alert(2)>", columns=["$\\frac{$"], target="a & <i>b</i> $")
    page = posterior.report(tmp_path / "r.html", labels=labels).read_text()
    assert "<script" not in page
    assert "<b>w" not in page
    assert "&lt;b&gt;w&lt;/b&gt;" in page
    assert "<img src=x" not in page


def test_classes_rows_and_several_sites(tmp_path):
    def model(x, y=None, counts=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("label", dist.Categorical(logits=x @ w), obs=y)
            if counts is not None:
                pyro.sample("count", dist.Poisson(1 + (x @ w).square().sum(-1)), obs=counts)

    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    one = fit(model, AutoNormal(model), x, y, steps=200, progress=False)
    page = one.report(tmp_path / "one.html", test=(x, y)).read_text()
    assert "share predicted rightly" in page
    several = fit(model, AutoNormal(model), x, y, torch.ones(60), steps=200, progress=False)
    page = several.report(tmp_path / "two.html").read_text()
    assert "Does the model make data like label?" in page
    assert "Does the model make data like count?" in page


def test_a_report_is_whole_or_not_there(posterior, tmp_path, monkeypatch):
    (tmp_path / "r.html").write_text("old")
    monkeypatch.setattr("inference.report.versions", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        posterior.report(tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").read_text() == "old"
