"""Each operator in NumPy is torch's: recorded at 3 and 5 rows, run at 4 and at 1."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from inference.engine.tracing.tracer import Untraceable
from inference.export.graph_recording import NotExportable, export_graph
from inference.export.runtime.graph import Graph
from inference.export.runtime.operators import OPERATORS

SEEN = set()


def data(rows, shape=(6,), low=-2.0, high=2.0):
    generator = torch.Generator().manual_seed(rows)
    return low + (high - low) * torch.rand(rows, *shape, generator=generator, dtype=torch.float64)


def in_numpy(function, shape=(6,), low=-2.0, high=2.0):
    """A function of x with NumPy, as it would come out of a file."""
    found = export_graph(lambda z: {"out": function(z["x"])}, lambda n: {"x": data(n, shape, low, high)}, (3, 5), {})
    found.graph.update(each=False, latents=[])
    SEEN.update(node[0] for node in found.graph["nodes"])
    graph = Graph(json.loads(json.dumps(found.graph)), found.arrays, 1)
    return lambda x: graph.run([x], len(x), [0], ("out",))[0]


def agree(function, **options):
    run = in_numpy(function, **options)
    for rows in (4, 1):
        x = data(rows, **options)
        expected = function(x.clone())
        found = run(x.numpy())
        assert found.dtype == expected.numpy().dtype
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10, atol=1e-12)


W = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)
IMAGE = {"shape": (2, 7, 6)}
FUNCTIONS = {
    **{name: getattr(torch, name) for name in (
        "abs", "neg", "exp", "expm1", "exp2", "sin", "cos", "tan", "atan", "sinh", "cosh", "tanh",
        "asinh",
    )},
    **{name: getattr(torch, name) for name in (
        "sigmoid", "square", "sign", "floor", "ceil", "trunc", "round", "erf", "erfc", "relu",
    )},
    **{name: getattr(torch, name) for name in (
        "isnan", "isinf", "logical_not",
    )},
    **{name: getattr(F, name) for name in (
        "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "leaky_relu", "hardtanh", "relu6",
    )},
    **{name: getattr(F, name) for name in (
        "hardsigmoid", "hardswish", "logsigmoid", "softsign", "tanhshrink",
    )},
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "threshold": lambda x: F.threshold(x, 0.5, 3.0),
    "prelu": lambda x: F.prelu(x, torch.full((1,), 0.3, dtype=torch.float64)),
    "softplus_beta": lambda x: F.softplus(x, beta=3.0, threshold=2.0),
    "add_alpha": lambda x: torch.add(x, x.exp(), alpha=2) - torch.sub(x, 1.0, alpha=0.5),
    "rsub": lambda x: torch.rsub(x, 3.0) + (1 - x),
    "divisions": lambda x: torch.div(x, 0.7, rounding_mode="floor") + torch.div(x, 0.7, rounding_mode="trunc") + x / 3,
    "modulo": lambda x: torch.fmod(x, 0.7) + torch.remainder(x, 0.7),
    "powers": lambda x: x**3 + 2.0**x + x.abs() ** x,
    "compared": lambda x: torch.where((x > 0) & (x <= 1) | (x == 0) ^ (x < -1), x, -x) + (x >= 0.5) + (x != 0),
    "clamped": lambda x: x.clamp(-1, 1) + x.clamp_min(0) + x.clamp_max(0.5),
    "larger": lambda x: torch.maximum(x, -x) + torch.minimum(x, x**2),
    "atan2": lambda x: torch.atan2(x, x + 3) + torch.logaddexp(x, -x),
    "xlogy": lambda x: torch.xlogy(x.relu(), x.abs() + 1) + torch.special.entr(x.sigmoid()),
    "lerp": lambda x: torch.lerp(x, x.exp(), 0.3),
    "addc": lambda x: torch.addcmul(x, x, x, value=2) + torch.addcdiv(x, x, x + 5, value=3),
    "masked": lambda x: x.masked_fill(x > 0, -1.0),
    "products": lambda x: (x @ W) @ W.T + x @ W[:, 0].unsqueeze(-1),
    "linear": lambda x: F.linear(x, W.T, W[0]),
    "batched": lambda x: torch.bmm(x.unsqueeze(1), W.expand(len(x), 6, 3)) + torch.baddbmm(
        torch.ones(1, 1, 3, dtype=x.dtype), x.unsqueeze(1), W.expand(len(x), 6, 3), beta=0.5, alpha=2
    ),
    "einsum": lambda x: torch.einsum("ni,ij,nj->n", x, W @ W.T, x),
    "softmax": lambda x: F.softmax(x, -1) + F.log_softmax(x, 1) + x.logsumexp(-1, keepdim=True),
    "sums": lambda x: x.sum() + x.sum(-1) + x.mean(1) + x.mean() + x.prod(1) + x.sum((0, 1)),
    "spread": lambda x: x.var(1) + x.std(1) + x.var(1, correction=0),
    "norms": lambda x: torch.linalg.vector_norm(x, dim=1) + x.norm(dim=1),
    "ends": lambda x: x.amax(1) + x.amin(1) + x.max(1).values + x.min(1).values + x.max() + x.min() + x.argmax(1),
    "whether": lambda x: (x > 1).any(1) | (x > -1).all(1) | (x > 5).any() | (x > -5).all(),
    "cumulative": lambda x: x.cumsum(1) + x.cumprod(1),
    "shapes": lambda x: x.reshape(-1, 2, 3).transpose(1, 2).flatten(1).unsqueeze(0).squeeze(0).view(len(x), 6),
    "permuted": lambda x: x.reshape(len(x), 2, 3).permute(2, 0, 1).reshape(3, -1),
    "cut": lambda x: torch.cat([x[:, 1::2], x[:, -2:], x[:, 3].unsqueeze(1), x.flip(1)], 1),
    "split": lambda x: torch.stack(x.split(3, 1), 1).sum(1) + x.chunk(2, 1)[0],
    "parts": lambda x: sum(x.split([1, 2, 3], 1)[2].unbind(1)),
    "padded": lambda x: F.pad(x, (1, 2), value=0.5) + F.pad(x, (4, -1)),
    "repeated": lambda x: x.repeat(1, 2) + x.roll(2, 1).repeat(1, 2),
    "like": lambda x: torch.ones_like(x).tile(2) * x.tile(2) + torch.zeros_like(x).tile(2),
    "picked": lambda x: x[:, torch.tensor([2, 0, 1])] + x.index_select(1, torch.tensor([5, 5, 0])),
    "gathered": lambda x: x.gather(1, (x[:, :2] > 0).long()),
    "own_rows": lambda x: x[torch.arange(len(x))] + x.new_zeros(len(x), 1) + torch.zeros(len(x), 6, dtype=x.dtype),
    "table": lambda x: F.embedding((x[:, :2] > 0).long(), W),
    "triangles": lambda x: (x.unsqueeze(-1) * x.unsqueeze(1)).tril().triu(-2).diagonal(dim1=1, dim2=2),
    "in_place": lambda x: x.clone().mul_(2).add_(1).relu_(),
    "assigned": lambda x: x.new_zeros(len(x), 6).index_put((torch.arange(len(x)), torch.zeros(len(x)).long()), x[:, 0]),
    "filled": lambda x: torch.full_like(x, 2.0) * x + x.new_ones(len(x), 6),
    "solved": lambda x: torch.linalg.solve_triangular(
        torch.linalg.cholesky(W @ W.T + 2 * x.square().diag_embed().exp()), x.unsqueeze(-1), upper=False
    ),
    "typed": lambda x: (x.float() * 2 + x.long()).double() + (x > 0) * torch.tensor(3, dtype=torch.int32),
    "layer_norm": lambda x: F.layer_norm(x, (6,), W[:, 0], W[:, 1]),
    "normalised": lambda x: F.normalize(x, dim=1),
}  # fmt: skip
IMAGES = {
    "conv2d": nn.Conv2d(2, 4, (3, 2)),
    "conv_strided": nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
    "conv_dilated": nn.Conv2d(2, 4, (3, 2), dilation=2, padding=(2, 1)),
    "conv_grouped": nn.Conv2d(2, 4, 3, groups=2),
    "conv_transposed": nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
    "conv_transposed_grouped": nn.ConvTranspose2d(2, 4, (2, 3), stride=(2, 1), groups=2),
    "max_pool": nn.MaxPool2d(2),
    "max_pool_ceil": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "max_pool_dilated": nn.MaxPool2d(2, stride=1, dilation=2),
    "avg_pool": nn.AvgPool2d(3, stride=2, padding=1),
    "avg_pool_inside": nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    "avg_pool_ceil": nn.AvgPool2d(2, ceil_mode=True),
    "conv1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 3, 5, stride=3)),
    "global_pool": nn.AdaptiveAvgPool2d(1),
    "group_norm": nn.GroupNorm(2, 2),
    "batch_norm": nn.BatchNorm2d(2).eval(),
    "resnet_block": nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2).eval(), nn.ReLU(inplace=True)),
}
POSITIVE = {
    name: getattr(torch, name)
    for name in ["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma", "logit", "acosh"]
}
POSITIVE |= {
    "asin": lambda x: torch.asin(x / 3),
    "acos": lambda x: torch.acos(x / 3),
    "atanh": lambda x: torch.atanh(x / 3),
}
POSITIVE |= {"logit": lambda x: torch.logit(x / 3), "acosh": lambda x: torch.acosh(x + 1)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_rows(name):
    agree(FUNCTIONS[name])


@pytest.mark.parametrize("name", POSITIVE)
def test_functions_of_positive_numbers(name):
    agree(POSITIVE[name], low=0.1)


@pytest.mark.parametrize("name", IMAGES)
def test_layers_for_images(name):
    layer = IMAGES[name].double().requires_grad_(False)
    for buffer in layer.buffers():
        if buffer.dtype == torch.float64:
            buffer.uniform_(0.5, 2)
    agree(layer, **IMAGE)


def test_a_transformer_layer_and_a_recurrent_one():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).double().eval().requires_grad_(False)
    agree(layer, shape=(5, 6))
    cell = nn.GRUCell(6, 4).double().requires_grad_(False)
    agree(cell)


def test_most_of_the_table_is_tried_here():
    """Runs last: what no function above has used is listed, so that it does not grow unseen."""
    if len(SEEN) < 100:
        pytest.skip("needs the other tests of this file in the same process")
    assert len(set(OPERATORS) - SEEN) < 60, sorted(set(OPERATORS) - SEEN)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (torch.special.i0, "aten.i0.default"),
        (lambda x: torch.fft.rfft(x).abs(), "aten._fft_r2c.default|complex"),
        (lambda x: x * (1 / len(x)), "depends on the number of rows"),
        (lambda x: x * torch.tensor(float(len(x))), "depends on the number of rows"),
        (lambda x: x * torch.linspace(0, 1, len(x)).unsqueeze(1), "depends on the number of rows"),
        (lambda x: x * 2 if len(x) == 3 else x + 1, "other operators"),
        (lambda x: x.to(torch.bfloat16).double(), "bfloat16"),
    ],
)
def test_what_has_no_numpy_form_is_named(function, named):
    with pytest.raises(NotExportable, match=named):
        in_numpy(function)


def test_a_branch_on_a_value_cannot_be_recorded():
    with pytest.raises(Untraceable, match="value"):
        in_numpy(lambda x: x if x.sum() > 0 else -x)
