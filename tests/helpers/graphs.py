"""A small graph for the compiler."""

import torch
from torch import fx

aten = torch.ops.aten


def accumulating_module():
    """State ← state + row · w; loss = Σ state²."""
    graph = fx.Graph()
    state, row, w = (graph.placeholder(name) for name in ("state", "row", "w"))
    product = graph.call_function(aten.mm.default, (row, w))
    graph.call_function(aten.add_.Tensor, (state, product))
    square = graph.call_function(aten.mul.Tensor, (state, state))
    graph.output((graph.call_function(aten.sum.default, (square,)),))
    return fx.GraphModule({}, graph)
