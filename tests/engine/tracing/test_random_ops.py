"""Noise drawn for many steps at once has the distribution of the call that it stands for."""

import pytest
import torch

from inference.engine.tracing.traced_graph import GraphInput, InputKind
from inference.engine.tracing.tracer import Tracer
from inference.model import subsampling  # noqa: F401 - registers kiln::subset

COUNT = 4000
P = torch.tensor([0.1, 0.5, 0.9])

CALLS = {
    "normal_": lambda: torch.empty(3).normal_(2.0, 3.0),
    "uniform_": lambda: torch.empty(3).uniform_(-1.0, 4.0),
    "bernoulli_": lambda: torch.empty(3).bernoulli_(0.3),
    "exponential_": lambda: torch.empty(3).exponential_(2.0),
    "normal": lambda: torch.normal(P, 1 + P),
    "randn": lambda: torch.randn(3),
    "rand": lambda: torch.rand(3),
    "rand_like": lambda: torch.rand_like(P),
    "bernoulli": lambda: torch.bernoulli(P),
    "poisson": lambda: torch.poisson(10 * P),
    "gamma": lambda: torch._standard_gamma(1 + P),
    "dirichlet": lambda: torch._sample_dirichlet(1 + P),
    "randint": lambda: torch.randint(2, 9, (3,)),
    "randperm": lambda: torch.randperm(5),
    "multinomial": lambda: torch.multinomial(P, 2),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(3), 0.4),
    "subset": lambda: torch.ops.kiln.subset(7, 3).sort().values,
}


def recorded(call):
    tape = Tracer({GraphInput(InputKind.ARGUMENT): torch.zeros(())})
    torch.manual_seed(0)
    with tape:
        call()
    return tape.draws


@pytest.mark.parametrize("name", CALLS)
def test_many_at_once_are_distributed_as_one_at_a_time(name):
    """Mean and mean square within 5 standard errors of 4,000 single calls: one failure in 10⁵ by chance."""
    (draw,) = recorded(CALLS[name])
    torch.manual_seed(1)
    many = draw.many(COUNT)
    assert many.shape == (COUNT, *draw.shape)
    assert many.dtype == draw.dtype
    empty = [torch.empty(draw.shape)] if draw.in_place else []
    single = torch.stack([draw.func(*(e.clone() for e in empty), *draw.args, **draw.kwargs) for _ in range(COUNT)])
    if name == "subset":  # whose order means nothing
        many, single = many.sort().values, single.sort().values
    for power in (1, 2):
        a, b = many.double() ** power, single.double() ** power
        error = ((a.var(0) + b.var(0)) / COUNT).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= 5 * error + 1e-12).all()
    assert len(many.double().reshape(COUNT, -1).unique(dim=0)) > 1
    assert not torch.equal(many[: COUNT // 2], many[COUNT // 2 :])


@pytest.mark.parametrize(
    ("name", "mean", "sd"), [("normal_", 2.0, 3.0), ("uniform_", 1.5, 25**0.5 / 12**0.5), ("exponential_", 0.5, 0.5)]
)
def test_the_distribution_is_the_one_asked_for(name, mean, sd):
    (draw,) = recorded(CALLS[name])
    torch.manual_seed(2)
    numbers = draw.many(COUNT)
    assert abs(float(numbers.mean()) - mean) < 5 * sd / (3 * COUNT) ** 0.5
    assert abs(float(numbers.std()) / sd - 1) < 5 * 1.5 / (3 * COUNT) ** 0.5


def test_a_subset_has_distinct_rows_each_as_often():
    (draw,) = recorded(lambda: torch.ops.kiln.subset(7, 3))
    torch.manual_seed(3)
    rows = draw.many(COUNT)
    assert all(len(set(row)) == 3 for row in rows.tolist())
    counts = rows.flatten().bincount(minlength=7) / COUNT
    assert ((counts - 3 / 7).abs() < 5 * (3 / 7 * 4 / 7 / COUNT) ** 0.5).all()
