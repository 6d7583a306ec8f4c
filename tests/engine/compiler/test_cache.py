"""The cache of compiled programs."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import fx

from inference.engine.compiler import cache as programs
from inference.engine.compiler import cpp_build, cpp_codegen, inductor
from inference.storage.atomic_files import cache_folder, newest_first
from tests.helpers.graphs import accumulating_module

aten = torch.ops.aten


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.zeros(2, 3), torch.zeros(2, 4), torch.randn(4, 3, generator=generator)]


@pytest.fixture
def cache(empty_cache):
    return empty_cache / "programs"


@pytest.fixture(scope="module")
def compiled(own_cache):
    """What ``run`` left in the cache of all tests."""
    run()
    return cache_folder("programs") / programs._key(accumulating_module(), inputs(), [1], 1)


@pytest.fixture
def entry(compiled, cache):
    """The same in the cache of one test, to be spoiled."""
    return shutil.copytree(compiled, cache / compiled.name)


@pytest.fixture
def builds(monkeypatch):
    """How often something was compiled."""
    calls = []
    build = cpp_build.build
    monkeypatch.setattr(cpp_build, "build", lambda *paths: (calls.append(paths), build(*paths)))
    return calls


def run(steps=5, threads=1):
    given = inputs()
    rows = torch.randn(steps, 2, 4, generator=torch.Generator().manual_seed(1))
    losses = programs.executable(accumulating_module(), given, [1], threads).run([rows])
    expected = (rows @ given[2]).cumsum(0)
    torch.testing.assert_close(losses, (expected**2).sum((1, 2)))
    torch.testing.assert_close(given[0], expected[-1])


def test_a_second_call_loads_what_the_first_compiled(cache, builds):
    run()
    run(steps=7)
    assert len(builds) == 1
    assert sorted(p.name for p in next(cache.iterdir()).iterdir()) == ["plan.json", "step.so"]


def test_another_graph_shape_or_thread_count_is_another_program(cache, builds):
    run()
    programs.executable(accumulating_module(), [torch.zeros(3, 3), torch.zeros(3, 4), torch.zeros(4, 3)], [1])
    assert len(builds) == 2
    run(threads=2)
    assert len(builds) == 3


@pytest.mark.parametrize("harm", ["none", "library", "plan", "number", "another", "half", "writable", "link"])
def test_a_spoiled_entry_is_not_run_but_built_again(entry, builds, harm, tmp_path):
    library, plan = entry / "step.so", entry / "plan.json"
    if harm == "library":
        library.write_bytes(library.read_bytes() + b"x")
    elif harm == "plan":
        plan.write_text(json.dumps({**json.loads(plan.read_text()), "plan": {"kind": "os.system", "value": {}}}))
    elif harm == "number":  # a bit of a place in memory
        plan.write_text(re.sub(r'"start": (\d+)', r'"start": 1\1', plan.read_text(), count=1))
    elif harm == "another":  # whole, but of another program
        programs.executable(accumulating_module(), [torch.zeros(3, 3), torch.zeros(3, 4), torch.zeros(4, 3)], [1])
        builds.pop()
        (other,) = (path for path in entry.parent.iterdir() if path != entry)
        shutil.rmtree(entry)
        other.rename(entry)
    elif harm == "half":
        library.unlink()
    elif harm == "writable":
        library.chmod(0o666)
    elif harm == "link":
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    run()
    assert len(builds) == (harm != "none")


@pytest.mark.parametrize("mode", [0o777, 0o500])
def test_a_folder_that_others_can_write_to_or_nobody_is_not_used(cache, builds, mode):
    if mode == 0o500 and os.getuid() == 0:
        pytest.skip("root can write anywhere")
    cache.mkdir(parents=True)
    cache.chmod(mode)
    run()
    run()
    assert len(builds) == 2
    assert list(cache.iterdir()) == []


def test_a_folder_below_one_that_others_can_change_is_not_used(cache, builds, tmp_path):
    cache.mkdir(parents=True, mode=0o700)
    tmp_path.chmod(0o777)
    run()
    assert list(cache.iterdir()) == []
    tmp_path.chmod(0o1777)  # others may add to it, but not rename
    run()
    assert len(list(cache.iterdir())) == 1


def test_what_another_process_takes_away_meanwhile_is_no_matter(tmp_path, monkeypatch):
    for name in ("old", "new", "gone"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "old", (1, 1))
    listed = list(tmp_path.iterdir())
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: iter(listed))
    assert [path.name for path in newest_first(tmp_path)] == ["new", "old", "gone"]


def test_a_failed_build_leaves_nothing_behind(cache, monkeypatch):
    monkeypatch.setattr(cpp_codegen, "source", lambda *_: ("this is not C++", [0]))
    with pytest.raises(inductor.NotCompilable, match=r"the C\+\+ compiler failed: .*error"):
        run()
    assert list(cache.iterdir()) == []


def test_old_entries_make_room(cache, monkeypatch):
    monkeypatch.setattr(programs, "_KEPT", 1)
    run()
    programs.executable(accumulating_module(), [torch.zeros(3, 3), torch.zeros(3, 4), torch.zeros(4, 3)], [1])
    assert len(list(cache.iterdir())) == 1


SCRIPT = """
import sys
from functools import partial
import torch
from guides import mean_field_normal
from inference import fit
from ppl_models import linear_regression
x = torch.linspace(-1, 1, 20).reshape(-1, 1)
model = partial(linear_regression, noise=0.3, intercept=False)
options = {"steps": 100, "engine": "compiled", "progress": False}
p = fit(model, mean_field_normal(model), x, x[:, 0], **options)
print(p.losses.tobytes().hex(), "torch._inductor.graph" in sys.modules)
"""


def test_the_next_process_neither_compiles_nor_loads_the_compiler(cache, builds, capsys):
    exec(SCRIPT, {})
    here = capsys.readouterr().out.split()
    next_process = [sys.executable, "-c", SCRIPT]
    there = subprocess.run(next_process, capture_output=True, text=True, check=True).stdout.split()
    assert len(builds) == 1
    assert here[0] == there[0]
    assert (here[1], there[1]) == ("True", "False")


def product_cases():
    """Every size with every layout, and both with everything that is added."""
    sizes = [
        (1, 1, 1),
        (5, 3, 7),
        (40, 10, 10),
        (40, 1, 10),
        (1, 33, 2),
        (17, 16, 4),
        (2, 35, 41),
        (6, 50, 128),
        (90, 50, 60),
    ]
    layouts = itertools.product(sizes, ("N", "T"), ("N", "T"))
    return zip(layouts, itertools.cycle([None, "row", "whole"]), strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrix_products_of_every_layout(cache, dtype):
    """All sizes and layouts in one program, against torch's own."""
    graph = fx.Graph()
    given, expected, totals = [torch.zeros(1, dtype=dtype)], [], []
    row = graph.placeholder("row")
    generator = torch.Generator().manual_seed(0)
    for ((m, n, k), left, right), add in product_cases():
        shapes = [(m, k) if left == "N" else (k, m), (k, n) if right == "N" else (n, k)]
        bias = {None: [], "row": [(n,)], "whole": [(m, n)]}[add]
        values = [torch.randn(shape, dtype=dtype, generator=generator) for shape in [*shapes, *bias]]
        nodes = [graph.placeholder(f"v{len(given) + i}") for i in range(len(values))]
        given += values
        turned = [v.t() if how == "T" else v for v, how in zip(values, (left, right), strict=False)]
        flipped = [
            graph.call_function(aten.t.default, (node,)) if how == "T" else node
            for node, how in zip(nodes, (left, right), strict=False)
        ]
        if add is None:
            product, number = graph.call_function(aten.mm.default, tuple(flipped)), turned[0] @ turned[1]
        else:
            product = graph.call_function(aten.addmm.default, (nodes[2], *flipped))
            number = torch.addmm(values[2], *turned)
        weight = torch.randn(m, n, dtype=dtype, generator=generator)
        given.append(weight)
        weighted = graph.call_function(aten.mul.Tensor, (product, graph.placeholder(f"v{len(given) - 1}")))
        totals.append(graph.call_function(aten.sum.default, (weighted,)))
        expected.append((number * weight).sum())
    total = graph.call_function(aten.sum.default, (graph.call_function(aten.stack.default, (totals,)),))
    output = graph.call_function(aten.add.Tensor, (total, graph.call_function(aten.sum.default, (row,))))
    graph.output((output,))
    module = fx.GraphModule({}, _inputs_first(graph))
    losses = programs.executable(module, given, [0]).run([torch.ones(2, 1, dtype=dtype)])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(losses, (sum(expected) + 1).expand(2), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh(cache, dtype):
    magnitudes = torch.cat([torch.logspace(-30, 1, 40_000), torch.linspace(0, 20, 40_001), torch.tensor([torch.inf])])
    x = torch.cat([magnitudes, -magnitudes]).to(dtype)
    graph = fx.Graph()
    row, given, out = (graph.placeholder(name) for name in ("row", "given", "out"))
    graph.call_function(aten.copy_.default, (out, graph.call_function(aten.tanh.default, (given,))))
    graph.output((graph.call_function(aten.sum.default, (row,)),))
    found = torch.zeros_like(x)
    program = programs.executable(fx.GraphModule({}, graph), [torch.zeros(1, dtype=dtype), x, found], [0])
    program.run([torch.zeros(1, 1, dtype=dtype)])
    torch.testing.assert_close(found.double(), x.double().tanh(), rtol=3 * torch.finfo(dtype).eps, atol=0)
    assert (found.abs() <= 1).all()
    assert (found.sign() == x.sign()).all()
    x.fill_(torch.nan)
    program.run([torch.zeros(1, 1, dtype=dtype)])
    assert found.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_beside_each_other(cache, dtype):
    """Sizes that fill no tile and no vector."""
    generator = torch.Generator().manual_seed(0)
    graph, given, expected = fx.Graph(), [torch.zeros(1, dtype=dtype)], []
    row, total = graph.placeholder("row"), []
    for rows, inner, columns, places in ((5, 11, 7, 19), (4, 1, 3, 8), (1, 9, 1, 3), (9, 3, 8, 33)):
        shapes = (rows, inner, places), (inner, columns, places), (rows, columns, places)
        a, b, weight = (torch.randn(*shape, dtype=dtype, generator=generator) for shape in shapes)
        nodes = [graph.placeholder(f"v{len(given) + i}") for i in range(3)]
        given += [a, b, weight]
        product = graph.call_function(torch.ops.kiln.products_beside.default, (nodes[0], nodes[1]))
        total.append(
            graph.call_function(aten.sum.default, (graph.call_function(aten.mul.Tensor, (product, nodes[2])),))
        )
        expected.append((torch.einsum("mkc,knc->mnc", a.double(), b.double()) * weight).sum())
    summed = graph.call_function(aten.stack.default, ([*total, graph.call_function(aten.sum.default, (row,))],))
    graph.output((summed,))
    module = fx.GraphModule({}, _inputs_first(graph))
    (found,) = programs.executable(module, given, [0]).run([torch.ones(1, 1, dtype=dtype)])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(
        found.double(), torch.stack([*expected, torch.tensor(1.0).double()]), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [4, 70])
def test_batched_products(cache, batch, size):
    graph = fx.Graph()
    row, left, right = (graph.placeholder(name) for name in ("row", "left", "right"))
    product = graph.call_function(aten.bmm.default, (left, right))
    turned = graph.call_function(aten.bmm.default, (product, graph.call_function(aten.transpose.int, (right, 1, 2))))
    total = graph.call_function(aten.sum.default, (turned,))
    graph.output((graph.call_function(aten.add.Tensor, (total, graph.call_function(aten.sum.default, (row,)))),))
    a, b = torch.randn(2, batch, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, 1, dtype=torch.float64)
    losses = programs.executable(fx.GraphModule({}, graph), [ones[0], a, b], [0]).run([ones])
    torch.testing.assert_close(losses, ((a @ b @ b.mT).sum() + 1).expand(2), rtol=1e-9, atol=1e-9)


def _inputs_first(graph):
    """Placeholders have to stand before the operators."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "placeholder":
            first.prepend(node)
    return graph


def test_no_more_threads_than_asked_work_on_it_and_the_process_keeps_its_own(cache, monkeypatch):
    """Those of BLAS too, which on a busy machine wait for each other a thousand times as long as they work."""
    asked, before = [], torch.get_num_threads()
    real = torch.set_num_threads
    real(2)
    try:
        monkeypatch.setattr(torch, "set_num_threads", lambda count: (asked.append(count), real(count)))
        given = inputs()
        programs.executable(accumulating_module(), given, [1], 1).run([torch.stack([given[1]] * 3)])
        assert asked == [1, 2]
        assert torch.get_num_threads() == 2
    finally:
        real(before)
