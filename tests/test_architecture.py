import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each line may import from the lines above it, never from its own line or below.
LEVELS = [
    {"arrays"},
    {
        "arguments",
        "arviz_compat",
        "background",
        "beside",
        "convergence",
        "double",
        "failures",
        "files",
        "fingerprint",
        "flat_priors",
        "frozen",
        "isolation",
        "lowering",
        "mode",
        "numpy_layers",
        "numpy_prediction",
        "numpy_random",
        "optimizers",
        "parallel",
        "params",
        "pauses",
        "interrupts",
        "places",
        "plain",
        "prelude",
        "pools",
        "printable",
        "private_files",
        "read_ahead",
        "row_files",
        "sites",
        "uniformity",
    },
    {
        "annealing",
        "draws",
        "executable",
        "fresh",
        "headers",
        "importance",
        "minibatch",
        "native",
        "non_finite",
        "numpy_operators",
        "kinds",
        "loaders",
        "objective",
        "parquet",
        "processes",
        "replayed",
        "row_source",
        "sealed",
        "side_by_side",
        "updates",
        "vectorized",
    },
    {"archive", "batches", "finding", "numpy_graph", "operator_names", "predict", "program", "shares", "tape"},
    {
        "batch_stream",
        "density",
        "diagnostics",
        "identity",
        "leave_one_out",
        "log_joint",
        "numpy_predictor",
        "recorded",
        "reliability",
    },
    {"latents", "prediction_store", "standalone", "start", "storage", "surface", "verdict"},
    {"checkpoint", "moments", "placing", "stored", "whitening"},
    {"found_steps", "init", "landing", "origins"},
    {"task"},
    {"automatic", "batch_weights", "fitted", "gradients", "step"},
    {"asked", "programs", "stacked", "streaming"},
    {
        "arviz_export",
        "autoencoder",
        "compiled",
        "eager",
        "figures",
        "lanes",
        "metrics",
        "onnx_export",
        "page",
        "recordings",
        "sections",
        "verified",
    },
    {"engines", "export", "pictures", "reliability_figures", "screens", "together", "trust_figures"},
    {"calibration_figures", "code_pictures", "comparison_figures", "held_out_report", "joining", "loo_report", "trust"},
    {"code_report", "comparison"},
    {"report"},
    {"predicting"},
    {"posterior"},
    {"watch"},
    {"attempt", "contour", "json_lines", "live_plot", "loop", "parameter_trace", "snapshots", "tensorboard"},
    {"fitting"},
    {"request"},
    {"svi"},
    {"many", "registry", "runs", "simulated"},
    {"calibration_folder", "prediction_files", "run_reports"},
    {"calibration"},
    {"cli"},
    {"__main__", "__init__"},
]
WITHIN_A_LEVEL = {("runs", "registry")}


def level(module):
    return next(i for i, names in enumerate(LEVELS) if module in names)


def imports(path):
    """Modules imported at run time, inside functions too, but not for type checking alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            yield from (
                [f"{node.module}.{a.name}" for a in node.names] if node.module == "inference" else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_of_inference_has_a_level():
    assert {path.stem for path in (ROOT / "inference").glob("*.py")} == set.union(*LEVELS)


@pytest.mark.parametrize("path", sorted((ROOT / "inference").glob("*.py")), ids=lambda p: p.stem)
def test_inference_imports_downwards_only(path):
    for name in imports(path):
        package, _, module = name.partition(".")
        assert package not in ("ppl_models", "guides"), f"{path.stem} imports {name}"
        if package == "inference" and module:
            lower = level(module) < level(path.stem)
            assert lower or (path.stem, module) in WITHIN_A_LEVEL, f"{path.stem} imports {module}"


@pytest.mark.parametrize("package", ["ppl_models", "guides"])
def test_models_and_guides_do_not_know_the_engine(package):
    for path in (ROOT / package).glob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] == "inference"], path


def test_the_public_names():
    names = {
        package: set(importlib.import_module(package).__all__) for package in ("inference", "guides", "ppl_models")
    }
    assert names == {
        "inference": {
            "Calibration",
            "Checkpoint",
            "ClassPrediction",
            "Diagnosis",
            "FitsFailed",
            "GradientCheck",
            "JsonLines",
            "Labels",
            "LivePlot",
            "NonFinite",
            "ParameterTrace",
            "Posterior",
            "Prediction",
            "Progress",
            "StoredClassPrediction",
            "StoredPrediction",
            "batches",
            "calibrate",
            "check_gradients",
            "compare_report",
            "Snapshots",
            "TensorBoard",
            "cosine_decay",
            "every",
            "fit",
            "fit_many",
            "fresh",
            "load",
            "open_prediction",
            "plot_loss_contour",
        },
        "guides": {
            "amortized_encoder",
            "bernoulli_dropout",
            "conditional_normal",
            "full_rank_normal",
            "funnel_flow",
            "low_rank_normal",
            "mean_field_normal",
            "planar_flow",
            "spline_flow",
        },
        "ppl_models": {
            "VAE",
            "DropoutCNN",
            "DropoutNetwork",
            "DropoutRegression",
            "Energy",
            "ExactPosterior",
            "Scaling",
            "bnn_regression",
            "exact_linear_regression",
            "linear_regression",
            "mlp_regression",
            "u1",
            "u2",
            "u3",
            "u4",
        },
    }


@pytest.mark.parametrize(
    "path",
    [p for package in ("inference", "guides", "ppl_models") for p in sorted((ROOT / package).glob("*.py"))],
    ids=lambda p: f"{p.parent.name}.{p.stem}",
)
def test_user_input_is_never_checked_by_assert_and_pickle_is_never_loaded(path):
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not [name for name in imports(path) if name.split(".")[0] in ("pickle", "dill", "cloudpickle")]
    assert "torch.load" not in path.read_text()
