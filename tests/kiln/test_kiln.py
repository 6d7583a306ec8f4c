"""``import kiln``: every public name, lazily, and an error where a file of the user's hides one of our packages."""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import guides
import inference
import kiln
import ppl_models

ROOT = Path(kiln.__file__).parents[1]
OWN = {"__version__", "data", "guides", "models"}


def run(code, folder, *options):
    """Run Python in ``folder``, where it looks for modules first, as it does for a script there."""
    environment = {"PATH": "", "PYTHONPATH": f"{folder}:{ROOT}", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, *options, *(("-c", code) if code else ())],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_public_names_are_those_of_inference():
    assert set(kiln.__all__) == set(inference.__all__) | OWN
    assert all(getattr(kiln, name) is getattr(inference, name) for name in inference.__all__)
    assert kiln.__version__ == version("kiln-ppl")


@pytest.mark.parametrize(("module", "package"), [("guides", guides), ("models", ppl_models)])
def test_guides_and_models_have_all_public_names(module, package):
    own = importlib.import_module(f"kiln.{module}")
    assert getattr(kiln, module) is own
    assert set(own.__all__) >= set(package.__all__)
    assert all(getattr(own, name) is getattr(package, name) for name in package.__all__)


def test_models_have_their_modules():
    assert kiln.models.vae.VAE is kiln.models.VAE
    assert kiln.models.dropout_networks.DropoutCNN is kiln.models.DropoutCNN


@pytest.mark.parametrize("name", ["datasets", "tables"])
def test_data_has_the_data_sets_and_readers_of_the_command_line(name):
    module = importlib.import_module(f"ppl_models.data.{name}")
    registered = {
        line.split(" = ")[0].strip()
        for line in (ROOT / "setup.cfg").read_text().splitlines()
        if f"= ppl_models.data.{name}:" in line
    }
    names = {f"read_{one}" for one in registered} if name == "tables" else registered
    assert names
    assert names <= set(kiln.data.__all__)
    assert all(getattr(kiln.data, one) is getattr(module, one) for one in names)
    assert all(hasattr(kiln.data, one) for one in kiln.data.__all__)


def test_dir_shows_public_names_alone():
    assert dir(kiln) == sorted(kiln.__all__)


@pytest.mark.parametrize(("name", "advice"), [("fitt", r"Did you mean kiln\.fit\?"), ("zzz", r"dir\(kiln\) shows")])
def test_an_unknown_name_is_an_error_with_advice(name, advice):
    with pytest.raises(AttributeError, match=rf"module 'kiln' has no attribute '{name}'\. {advice}"):
        getattr(kiln, name)


def test_nothing_is_imported_before_it_is_used(tmp_path):
    heavy = "{'torch', 'pyro', 'numpy', 'inference', 'guides', 'ppl_models'}"
    found = run(
        f"import sys, kiln; dir(kiln); kiln.__version__; print({heavy} & sys.modules.keys());"
        "kiln.guides; print('guides' in sys.modules, 'inference' in sys.modules)",
        tmp_path,
    )
    assert (found.stdout, found.stderr) == ("set()\nTrue False\n", "")


@pytest.mark.parametrize("name", ["inference", "guides", "ppl_models"])
@pytest.mark.parametrize("as_package", [False, True])
def test_a_file_that_hides_a_package_is_named(name, as_package, tmp_path):
    hiding = tmp_path / name / "__init__.py" if as_package else tmp_path / f"{name}.py"
    hiding.parent.mkdir(exist_ok=True)
    hiding.write_text("raise SystemExit('it ran')\n")
    for code, options in (("import kiln", ()), ("from kiln import fit", ()), ("", ("-m", "kiln", "list"))):
        found = run(code, tmp_path, *options)
        assert found.returncode == 1
        assert f"{hiding} has the name of Kiln's own package '{name}'" in found.stderr
        assert "Rename it" in found.stderr


def test_a_folder_without_python_files_does_not_hide_a_package(tmp_path):
    (tmp_path / "guides").mkdir()
    found = run("import kiln; print(kiln.guides.full_rank_normal.__module__)", tmp_path)
    assert found.stdout == "guides.full_rank\n"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="Install kiln-ppl again"):
        kiln._refuse_hidden_packages()


def test_a_folder_that_hides_a_package_of_a_checkout_is_named(monkeypatch, tmp_path):
    """A package that an editable install finds comes after any folder of its name, even an empty one."""
    (tmp_path / "guides").mkdir()
    monkeypatch.delitem(sys.modules, "guides")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ImportError, match="guides has the name of Kiln's own package 'guides'"):
        kiln._refuse_hidden_packages()


def test_the_command_line_runs_by_this_name(tmp_path):
    found = run("", tmp_path, "-m", "kiln", "list")
    assert found.returncode == 0, found.stderr
    assert "full_rank_normal" in found.stdout


def test_a_type_checker_is_told_every_name():
    """Names are loaded by ``__getattr__``, which type checkers do not read; mypy itself takes a minute to see it."""
    block = next(node for node in ast.parse(Path(kiln.__file__).read_text()).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    told = {(node.module, alias.name) for node in imports for alias in node.names}
    assert told == {("inference", "*"), *(("kiln", name) for name in OWN - {"__version__"})}


@pytest.mark.slow
def test_mypy_knows_the_types_and_finds_a_misspelt_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import kiln\nreveal_type(kiln.fit)\nreveal_type(kiln.models.VAE)\nkiln.fitt\n")
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", str(tmp_path)]
    told, _, _ = pytest.importorskip("mypy.api").run([*options, str(script)])
    fit, vae, misspelt, *_ = told.splitlines()
    assert "-> inference.posterior.Posterior" in fit
    assert "-> ppl_models.vae.VAE" in vae
    assert 'Module has no attribute "fitt"' in misspelt
