import base64
import re
import warnings
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from guides import amortized_encoder, mean_field_normal
from inference import ClassPrediction, Labels, fit
from inference.predictive.importance_weights import UnreliableWeights
from inference.reporting.figures import posterior_plots
from inference.reporting.figures.image_grids import entropy_grids
from ppl_models import VAE, linear_regression

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
        "CRPS, in units of the target",
        "Are predictions as sure as they should be?",
        "Do its intervals hold what they promise?",
        "mean log likelihood, nats a row",
        "Can this fit be trusted?",
        "Did the fit settle?",
        "Does the guide cover the posterior?",
        "Are its means and spreads right?",
        "How uncertain are the predictions?",
        "Does the model make data like effect?",
        "Which observations surprise it?",
        "sum over observations (elpd), nats",
        "What did the data teach?",
        "Posterior table",
        "weights[0]",
        "pyro-ppl",
        "seed",
        "seconds of fitting",
    ):
        assert part in text
    assert Reader(page).tags.count("img") == 10


def test_every_figure_has_a_sentence_and_is_not_empty(page):
    assert page.count('<p class="reading">') == page.count("<section>") == 12
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


def test_names_that_no_file_may_hold_leave_it_whole(line, tmp_path):
    posterior = fit(linear_regression, AutoNormal(linear_regression), line.x, line.y, steps=60, progress=False)
    odd = "\x1b[31m\x08"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        page = posterior.report(tmp_path / "r.html", labels=Labels(title=odd + "\udc80", columns=[odd], target=odd))
    pictures = re.findall(r"base64,([A-Za-z0-9+/=]+)", page.read_text(encoding="utf-8"))
    assert all(ElementTree.fromstring(base64.b64decode(picture)).tag.endswith("svg") for picture in pictures)


def test_classes_rows_and_several_sites(tmp_path, blank_figures):
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
    assert "Can its probabilities be believed?" in page
    several = fit(model, AutoNormal(model), x, y, torch.ones(60), steps=200, progress=False)
    page = several.report(tmp_path / "two.html").read_text()
    assert "Does the model make data like label?" in page
    assert "Does the model make data like count?" in page


def test_a_report_is_whole_or_not_there(posterior, tmp_path, monkeypatch, blank_figures):
    (tmp_path / "r.html").write_text("old")
    monkeypatch.setattr("inference.reporting.section.versions", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        posterior.report(tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").read_text() == "old"


class Classifier(torch.nn.Module):
    """Bright or dark images; flat rows are images to the report only if the model says of what shape."""

    def __init__(self, image_shape=None):
        super().__init__()
        self.image_shape = image_shape

    def forward(self, x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            bright = x.reshape(len(x), -1).mean(-1)
            return pyro.sample("y", dist.Categorical(logits=bright[:, None] * w), obs=y)


@pytest.mark.parametrize(
    ("shape", "image_shape", "shown"),
    [
        ((1, 8, 8), None, True),
        ((8, 8), None, True),
        ((64,), (8, 8), True),
        ((64,), None, False),
        ((3, 8, 8), None, True),
    ],
)
@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.usefixtures("blank_figures")
def test_a_classifier_of_images_shows_the_surest_and_the_least_sure(tmp_path, shape, image_shape, shown, held_out):
    x = torch.randn(40, *shape) + torch.arange(40).reshape(-1, *[1] * len(shape)) % 2
    y = torch.arange(40) % 2
    model = Classifier(image_shape)
    posterior = fit(model, AutoNormal(model), x, y, steps=20, progress=False)
    page = posterior.report(tmp_path / "r.html", test=(x, y) if held_out else None, progress=False).read_text()
    assert ("Which images is it sure of?" in page) == shown
    assert (("Of the held-out images" if held_out else "Of the images of the fit") in page) == shown


def test_the_grids_are_ordered_by_entropy_and_frame_what_is_wrong():
    probs = torch.tensor([[0.99, 0.01], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1], [0.05, 0.95]])
    prediction = ClassPrediction("y", probs[None], torch.zeros(1, 5))
    images = np.arange(5)[:, None, None] / 10 + np.zeros((5, 14, 14))
    figure = entropy_grids(images, np.array([0, 0, 0, 0, 1]), prediction, count=2, classes=[0])
    surest, least = (axes.get_images()[0].get_array() for axes in figure.axes)
    assert [round(1 - surest[8, 8 + 16 * i, 0], 3) for i in range(2)] == [0.0, 0.3]
    assert [round(1 - least[8, 8 + 16 * i, 0], 3) for i in range(2)] == [0.1, 0.2]
    framed = [sheet[0, 16 * i, 2] < 0.5 for sheet in (surest, least) for i in range(2)]
    assert framed == [False, False, False, True]
    assert "0.056 to 0.33 nats" in figure.axes[0].get_title()
    assert posterior_plots.as_svg(figure).count("<image ") == 2


@pytest.mark.parametrize("image_shape", [None, (8, 8)])
def test_an_autoencoder_shows_its_codes_and_images_only_where_rows_are_images(tmp_path, image_shape):
    x = (torch.rand(80, 64, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    model = VAE(64, latent=3, hidden=[8], image_shape=image_shape)
    posterior = fit(model, amortized_encoder(model), x, steps=30, progress=False)
    path = posterior.report(tmp_path / "r.html", test=(x[:30],), groups=np.arange(30) % 3, progress=False)
    page = path.read_text()
    assert "How well does it describe new rows?" in page
    assert "Where do the codes lie?" in page
    for title in ("What do its codes remember?", "What does the model make?", "What does each number do?"):
        assert (title in page) == (image_shape is not None)
    assert "Posterior table" not in page
    whole = posterior.report(tmp_path / "s.html", progress=False).read_text()
    assert "rows of the fit" in whole


def test_the_curve_of_the_elbo_has_its_two_parts(page):
    picture = base64.b64decode(re.findall(r"base64,([A-Za-z0-9+/=]+)", page)[0]).decode()
    assert posterior_plots.elbo_curve(np.ones(400), np.full(400, np.nan)).count("<g ") < picture.count("<g ")


def test_only_a_refusal_leaves_out_the_section_on_each_observation(tmp_path, line, monkeypatch):
    guide = mean_field_normal(linear_regression)
    posterior = fit(linear_regression, guide, line.x, line.y, steps=20, engine="eager", progress=False)

    def failing(error):
        def loo(*args, **options):
            raise error

        return loo

    monkeypatch.setattr("inference.reporting.report.loo", failing(UnreliableWeights("the guide is too far away")))
    page = posterior.report(tmp_path / "refused.html", progress=False).read_text()
    assert "Which observations surprise it?" not in page
    monkeypatch.setattr("inference.reporting.report.loo", failing(ValueError("the model could not run")))
    with pytest.raises(ValueError, match="the model could not run"):
        posterior.report(tmp_path / "failed.html", progress=False)
