"""Operators that bring C++ of their own: how a compiled step calls it."""

import pytest
import torch
from torch import Tensor, fx

from inference.engine.compiler import cache as programs

SIZES = """
template <typename T> static void sizes(
    const T* a, const T* m, const T* v, const T* s, T* found, long ar, long ac, long mr, long mc, long vr, long vc,
    long sr, long sc) {
    const long all[8] = {ar, ac, mr, mc, vr, vc, sr, sc};
    for (int i = 0; i < 8; ++i) found[i] = T(all[i]) + *s;
}
"""


@pytest.fixture
def sizes():
    """An operator that finds the sizes that its C++ is told of its four arguments, plus the last one's number."""

    @torch.library.custom_op("kiln_tests::sizes", mutates_args=())
    def found(a: Tensor, m: Tensor, v: Tensor, s: Tensor) -> Tensor:
        return a.new_empty(8)  # which the C++ fills

    found.register_fake(lambda a, m, v, s: a.new_empty(8))
    operator = torch.ops.kiln_tests.sizes.default
    operator.cpp = SIZES
    return operator


def test_an_operators_own_cpp_is_told_the_rows_of_each_argument_and_the_numbers_in_a_row(sizes, empty_cache):
    """An argument without dimensions is one row of one number."""
    graph = fx.Graph()
    state, *given = (graph.placeholder(name) for name in ("state", "a", "m", "v", "s"))
    graph.call_function(torch.ops.aten.add_.Tensor, (state, graph.call_function(sizes, tuple(given))))
    graph.output((graph.call_function(torch.ops.aten.sum.default, (state,)),))
    inputs = [torch.zeros(8), torch.ones(2, 3, 5), torch.ones(4, 6), torch.ones(7), torch.tensor(0.5)]
    module = fx.GraphModule({}, graph)
    programs.executable(module, inputs, [1]).run([torch.ones(1, 2, 3, 5)])
    torch.testing.assert_close(inputs[0], torch.tensor([2, 15, 4, 6, 7, 1, 1, 1]) + 0.5)
