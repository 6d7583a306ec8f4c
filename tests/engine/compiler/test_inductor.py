"""The canary for torch's private entry points, and that one module alone names them."""

from pathlib import Path

import pytest
import torch

import inference
from inference.engine.compiler import cpp_codegen, inductor
from tests.helpers.graphs import accumulating_module


def inputs():
    return [torch.zeros(2, 3), torch.ones(2, 4), torch.ones(4, 3)]


def test_canary_the_private_entry_points_are_where_they_were():
    """Fails first if a new torch has moved something: see inference/engine/compiler/inductor.py."""
    from torch._inductor import compile as inductor_compile
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.graph import GraphLowering

    private = (inductor_compile, AsyncCompile, CppBuilder, CppTorchOptions, pick_vec_isa, InvalidCxxCompiler)
    assert all(callable(c) for c in private)
    assert callable(GraphLowering.compile_to_module)
    assert callable(GraphLowering.codegen)
    with config.patch({"fx_graph_cache": False, "cpp.vec_isa_ok": True, "fallback_random": True}):
        assert config.fallback_random
    lowered = inductor.lower(accumulating_module(), inputs())
    assert [call.operator for call in lowered.calls if call.operator] == ["aten.addmm.out"]
    assert all('extern "C"' in kernel for kernel in lowered.kernels)
    text, parts = cpp_codegen.source(lowered, [(1, 32)])
    assert parts == [0]
    assert "small_product<float" in text


def test_one_module_names_the_private_entry_points():
    naming = [
        path.name
        for path in Path(inference.__file__).parent.rglob("*.py")
        if "torch._inductor" in path.read_text(encoding="utf-8")
    ]
    assert naming == ["inductor.py"]


def test_a_graph_that_the_compiler_refuses_is_named(monkeypatch):
    def refuses(*_):
        raise KeyError("no such backend")

    monkeypatch.setattr("torch._inductor.compile", refuses)
    with pytest.raises(inductor.NotCompilable, match="TorchInductor: KeyError: 'no such backend'"):
        inductor.fuse(accumulating_module(), inputs())
    with pytest.raises(inductor.NotCompilable, match="TorchInductor: KeyError: 'no such backend'"):
        inductor.lower(accumulating_module(), inputs())
