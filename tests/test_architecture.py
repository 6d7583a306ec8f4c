"""The rules of the layout: who may import whom, by the table in CONTRIBUTING.md, and what is named or used where."""

import ast
import graphlib
import importlib
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "inference").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
ROW = re.compile(r"^\| (\d+) \| `([\w/]+)` \|", re.MULTILINE)
LEVELS = {room.replace("/", "."): int(level) for level, room in ROW.findall((ROOT / "CONTRIBUTING.md").read_text())}


def room(module):
    """The package of a module, or the module itself where it lies in ``inference`` itself."""
    name = module.removeprefix("inference").removeprefix(".")
    return max((known for known in LEVELS if f"{name}.".startswith(f"{known}.")), key=len, default=name)


def imports(path):
    """All that a file imports, inside functions and for type checking too: ``{module or name in it}``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES or node.module not in MODULES else node.module


def tops(path):
    return {name.partition(".")[0] for name in imports(path)}


def allowed(path, *folders):
    return any(path.is_relative_to(ROOT / "inference" / folder) for folder in folders)


def upward(module, names):
    """The imports of a module that do not go down to a lower level, nor stay in its room."""
    own = room(module)
    return [name for name in names if name in MODULES and room(name) != own and LEVELS[room(name)] >= LEVELS[own]]


def test_every_module_is_in_a_room_of_the_table():
    assert {room(module) for module in MODULES} - {""} == LEVELS.keys()


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"inference"}))
def test_imports_go_down_only(module):
    assert not upward(module, imports(MODULES[module]))


def test_an_import_that_goes_up_is_found():
    assert upward("inference.storage.json_document", ["inference.svi.fitting", "inference.utils.errors"]) == [
        "inference.svi.fitting"
    ]


def test_no_module_imports_itself_by_others():
    graph = {module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("package", ["ppl_models", "guides"])
def test_models_and_guides_do_not_know_the_engine(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not {"inference", "kiln"} & tops(path), path
    for path in SOURCES:
        assert not {package, "kiln"} & tops(path), path


def test_some_packages_are_used_in_some_places_only():
    for path in SOURCES:
        if allowed(path, "export/runtime"):
            own = {name for name in imports(path) if name.startswith("inference")}
            assert tops(path) - {"inference"} <= {"numpy", *sys.stdlib_module_names}, path
            assert all(name.startswith("inference.export.runtime.") for name in own), path
        if allowed(path, "engine/tracing"):
            assert all(room(name) == "engine.tracing" for name in imports(path) if name in MODULES), path
        if "torch._inductor" in path.read_text():
            assert allowed(path, "engine/compiler"), path
        for name, homes in {
            "jinja2": ["reporting"],
            "typer": ["cli"],
            "joblib": ["utils/processes.py"],
            "matplotlib": ["reporting/figures", "svi/callbacks"],
        }.items():
            assert name not in tops(path) or allowed(path, *homes), f"{path} imports {name}"


def test_a_package_is_imported_without_those_above_it():
    """Every ``__init__`` below ``inference`` is a docstring alone."""
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent.name != "inference":
            assert [type(node) for node in ast.parse(path.read_text()).body] == [ast.Expr], path


def test_no_name_has_two_meanings():
    public = set(importlib.import_module("inference").__all__)
    names = Counter(path.stem for path in SOURCES if path.name != "__init__.py" and not allowed(path, "export/runtime"))
    classes = Counter(
        node.name
        for path in SOURCES
        if not allowed(path, "export/runtime")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    )
    assert not public & names.keys()
    assert not [name for name, count in (names + classes).items() if count > 1]


def test_no_folder_is_a_crowd():
    folders = Counter(path.parent for path in SOURCES if path.name != "__init__.py")
    assert max(folders.values()) <= 15


PUBLIC = {
    "inference": """
        batches calibrate Calibration check_gradients Checkpoint ClassPrediction compare_report cosine_decay
        Diagnosis every fit fit_many FitsFailed fresh GradientCheck JsonLines Labels LivePlot load NonFinite
        open_prediction ParameterTrace plot_loss_contour Posterior Prediction Progress Snapshots
        StoredClassPrediction StoredPrediction TensorBoard
    """,
    "guides": """
        amortized_encoder bernoulli_dropout conditional_normal full_rank_normal funnel_flow low_rank_normal
        mean_field_normal planar_flow spline_flow
    """,
    "ppl_models": """
        bnn_regression DropoutCNN DropoutNetwork DropoutRegression Energy exact_linear_regression ExactPosterior
        linear_regression mlp_regression Scaling u1 u2 u3 u4 VAE
    """,
}


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names(package):
    assert set(importlib.import_module(package).__all__) == set(PUBLIC[package].split())


@pytest.mark.parametrize(
    "path",
    [p for package in ("kiln", "inference", "guides", "ppl_models") for p in sorted((ROOT / package).rglob("*.py"))],
    ids=lambda p: f"{p.parent.name}.{p.stem}",
)
def test_user_input_is_never_checked_by_assert_and_pickle_is_never_loaded(path):
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not [name for name in imports(path) if name.split(".")[0] in ("pickle", "dill", "cloudpickle")]
    assert not re.search(r"(?<![\w.])torch\.load", path.read_text())  # safetensors.torch.load reads no pickle


WITHOUT_TEST_FILE = """
    data.row_arrays data.shuffle_buffer diagnostics.loss_surface diagnostics.uniformity_tests diagnostics.verdict
    engine.batched.grouping engine.batched.runner engine.batched.stacked_step engine.batched.trace_cache
    engine.compiler.executable engine.eager engine.process_group engine.svi_problem engine.tracing.batching_rules
    engine.tracing.traced_graph engine.tracing.tracer export.graph_recording export.runtime.graph
    export.runtime.layers model.bound_model model.captured_values model.guide_density model.improper_priors
    model.log_joint model.nonfinite_sites model.parameters model.sites optim.adaptive optim.convergence
    optim.initialization.mode_search optim.optimizers optim.whitening posterior predictive.autoencoder
    predictive.sampling predictive.stored_prediction predictive.zarr_store reporting.autoencoder_section
    reporting.figures.comparison_plots reporting.figures.diagnostic_plots reporting.figures.image_grids
    reporting.figures.posterior_plots reporting.figures.style reporting.held_out_section reporting.section
    storage.atomic_files storage.fit_fingerprint storage.json_document svi.calibration.simulation
    svi.callbacks.json_lines svi.callbacks.live_plot svi.callbacks.parameter_trace svi.callbacks.snapshots
    svi.callbacks.tensorboard svi.fitting svi.restarts utils.arviz_compat utils.background_writer utils.errors
    utils.processes utils.validation
"""


def test_modules_without_a_test_file_of_their_own_are_known():
    """What uses them tests them; one that gets a file of its own leaves the list, and a new one comes with its file."""
    without = {
        name.removeprefix("inference.")
        for name, path in MODULES.items()
        if not path.stem.startswith("__")
        and not (ROOT / "tests" / path.relative_to(ROOT / "inference").with_name(f"test_{path.stem}.py")).exists()
    }
    assert without == set(WITHOUT_TEST_FILE.split())
