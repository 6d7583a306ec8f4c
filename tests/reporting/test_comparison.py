"""Several fits on one page."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from guides import mean_field_normal
from inference import Labels, compare_report, fit
from inference.reporting.comparison import _with_error
from inference.reporting.figures import comparison_plots
from ppl_models import linear_regression

pytestmark = pytest.mark.usefixtures("few_draws")
FEW = {"draws": 60, "progress": False}


@pytest.fixture(scope="module")
def two(line):
    """Two guides of one model on the same rows."""
    guides = {"by halves": mean_field_normal, "whole": AutoMultivariateNormal}
    return {
        name: fit(linear_regression, guide(linear_regression), line.x, line.y, steps=300, lr=0.03, progress=False)
        for name, guide in guides.items()
    }


@pytest.fixture(scope="module")
def page(two, line, tmp_path_factory, few_draws):
    path = tmp_path_factory.mktemp("comparison") / "deep" / "c.html"
    tested = {name: posterior.evaluate(line.x, line.y, draws=60, progress=False) for name, posterior in two.items()}
    labels = {name: Labels(data="line.csv") for name in two}
    return compare_report(path, two, held_out=tested, labels=labels, **FEW).read_text()


class Reader(HTMLParser):
    """The rows of the tables of a page, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.rows, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data.strip()


def pictures(page):
    return [base64.b64decode(found).decode() for found in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]


def test_it_is_one_file_with_a_column_for_each_fit(page, two):
    reader = Reader(page)
    rows = {row[0]: row[1:] for row in reader.rows if row}
    assert rows[""] == ["by halves", "whole"]
    assert rows["Model"] == ["linear_regression"] * 2
    assert rows["Guide"] == ["AutoNormal, 6 parameters", "AutoMultivariateNormal, 15 parameters"]
    assert rows["Data"] == ["line.csv, 40 rows"] * 2
    assert rows["Steps"] == ["300 of adam"] * 2
    assert rows["Held-out rows"] == ["40", "40"]
    for name, posterior in zip(("by halves", "whole"), two.values(), strict=True):
        diagnosis = posterior.diagnose()
        value, error = diagnosis.evidence.elbo
        assert rows["ELBO, nats"][list(two).index(name)] == _with_error(value, error)
        assert rows["Pareto k-hat"][list(two).index(name)].startswith(f"{diagnosis.khat:.2f} ")
    for row in ("Verdict", "Seconds of fitting", "Gradient evaluations", "Effective sample size", "RMSE", "CRPS"):
        assert len(rows[row]) == 2
    assert "script" not in reader.tags
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert len(page) < 3_000_000


def test_it_shows_verdicts_curves_shared_unknowns_and_calibration(page):
    for part in (
        "by halves: ",
        "How did each fit go?",
        "Do they agree on what they share?",
        "weights[0]",
        "Do their intervals hold what they promise?",
    ):
        assert part in page
    assert "different data" not in page
    assert "different rows" not in page
    assert len(pictures(page)) == 3
    assert all(picture.count("<path") > 20 for picture in pictures(page))


def test_shared_unknowns_have_mean_and_interval_of_each(page, two):
    rows = {row[0]: row[1:] for row in Reader(page).rows if row}
    for cell, posterior in zip(rows["bias"], two.values(), strict=True):
        draws = posterior.sample(60)["bias"].double().numpy()
        low, high = np.quantile(draws, [0.05, 0.95])
        assert cell == f"{draws.mean():.3g} [{low:.3g}, {high:.3g}]"


def test_fits_of_different_data_are_not_compared_as_if_equal(two, line, tmp_path, blank_figures):
    other = fit(linear_regression, AutoNormal(linear_regression), line.x, 2 * line.y, steps=60, progress=False)
    fits = {"one": two["whole"], "other": other}
    tested = {
        "one": fits["one"].evaluate(line.x, line.y, draws=50, progress=False),
        "other": other.evaluate(line.x, 2 * line.y, draws=50, progress=False),
    }
    page = compare_report(tmp_path / "c.html", fits, held_out=tested, **FEW).read_text()
    assert "These fits saw different data" in page
    assert "These fits were tested on different rows" in page
    assert "ELBO, nats, of different data" in page
    assert "Each on held-out rows of its own" in page


def test_a_precision_is_no_difference_of_data(two, line, tmp_path, blank_figures):
    double = fit(
        linear_regression, AutoNormal(linear_regression), line.x.double(), line.y.double(), steps=60, progress=False
    )
    page = compare_report(tmp_path / "c.html", {"one": two["whole"], "double": double}, **FEW).read_text()
    assert "different data" not in page


def test_guides_without_weights_and_classes_are_compared_too(tmp_path):
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("label", dist.Categorical(logits=x @ w), obs=y)

    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    fits = {
        guide.__name__: fit(model, guide(model), x, y, steps=60, progress=False) for guide in (AutoNormal, AutoDelta)
    }
    tested = {name: posterior.evaluate(x, y, draws=50, progress=False) for name, posterior in fits.items()}
    page = compare_report(tmp_path / "c.html", fits, held_out=tested, **FEW).read_text()
    assert "Can their probabilities be believed?" in page
    assert "(last quarter of the steps)" in page
    assert "Predicted rightly" in page


def test_names_are_shown_and_never_run(two, tmp_path):
    names = ("<script>alert(1)</script>", "$\\frac{$ <img src=x onerror=alert(2)>")
    fits = dict(zip(names, two.values(), strict=True))
    labels = {names[0]: Labels(data="<b>data</b>")}
    page = compare_report(tmp_path / "c.html", fits, labels=labels, **FEW).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<b>data" not in page
    reader = Reader(page)
    assert names[0] in reader.text
    assert names[1] in reader.text


@pytest.mark.parametrize(
    ("names", "held_out", "said"),
    [
        (["whole"], {}, "two fits or more, not 1"),
        (["whole", "by halves"], {"lost": None}, "no posterior named 'lost'"),
    ],
)
def test_what_cannot_be_compared_is_refused(two, tmp_path, names, held_out, said):
    with pytest.raises(ValueError, match=said):
        compare_report(tmp_path / "c.html", {name: two[name] for name in names}, held_out=held_out, **FEW)
    assert not list(tmp_path.iterdir())


def test_no_two_of_five_fits_look_alike_without_colour():
    looks = [(str(dashes), marker) for _, dashes, marker in comparison_plots.LOOKS]
    assert len({dashes for dashes, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
