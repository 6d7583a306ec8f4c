"""The module that goes with an exported predictor."""

import ast
import sys

from inference.export.standalone import module_source


def test_the_module_imports_numpy_and_the_standard_library_and_defines_nothing_twice():
    tree = ast.parse(module_source("predictor"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"numpy"}
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(defined) == len(set(defined))
    assigned = [ast.unparse(t) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    assert len(assigned) == len(set(assigned))
