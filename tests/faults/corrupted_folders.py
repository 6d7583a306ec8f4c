"""Load folders that were harmed, many of them: ``python -m tests.faults.corrupted_folders --count 5000``.

Each ends in one of Kiln's own errors or loads to what was written; forgeries,
whose checksums are right, may load to what the forger wrote. Nothing in them is
run, none hangs, and all of it fits in a gigabyte beyond what the program takes.
"""

import argparse
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from guides import mean_field_normal
from inference import every, fit, load
from inference.cli.commands import main as command_line
from inference.cli.runs import Run, data_for
from inference.export.runtime.predictor import load as predictor
from inference.storage.checkpoint import Checkpoint, read_checkpoint
from inference.svi.calibration.simulation import CalibrationFolder, Outcome, Simulation
from ppl_models import linear_regression
from tests.faults.corruptions import Canary, harm

OURS = (ValueError, TypeError, NotImplementedError, OSError)
SECONDS, BYTES = 20, 2**30
X = torch.linspace(-1, 1, 12).reshape(-1, 1)
LINE = partial(linear_regression, noise=0.5)


class Hung(BaseException):
    """A folder took longer than :data:`SECONDS`."""


@dataclass
class Tally:
    """What came of the folders; ``wrong`` says of each that broke the rules which way and how."""

    ends: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    peak: int = 0


def posterior_folder(folder, seed):
    fit(LINE, mean_field_normal(LINE), X, X[:, 0], steps=5, seed=seed, engine="eager", progress=False).save(folder)


def read_posterior(folder):
    found = load(folder, LINE, mean_field_normal(LINE))
    return found.unconstrained_params, found.losses, found.kl, found.record


def run_folder(folder, seed):
    table = folder.parent / "table.csv"
    if not table.exists():
        x = np.linspace(0, 1, 20)
        table.write_text("x,y\n" + "".join(f"{v},{1 + 2 * v + 0.1 * np.sin(9 * v)}\n" for v in x))
    words = ["--data", str(table), "--target", "y", "--out", str(folder), "--steps", "5", "--seed", str(seed)]
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        mock.patch("inference.cli.commands.write_run_report", return_value=folder / "report.html"),
    ):
        assert command_line(["fit", "linear_regression", *words]) == 0


def read_run(folder):
    """As ``kiln report`` and ``kiln diagnose`` do it, and then as ``kiln predict`` does."""
    run = Run.read(folder)
    split = run.split()
    found = run.posterior(folder, *data_for(run.bind(), split.train))
    again = run.posterior(folder)
    return run, split, found.unconstrained_params, found.losses, found.record, again.unconstrained_params


def checkpoint_folder(folder, seed):
    guide = mean_field_normal(LINE)
    kept = Checkpoint(folder, every=5)
    fit(LINE, guide, X, X[:, 0], steps=10, seed=seed, engine="eager", progress=False, checkpoint=kept)


def simulation(seed):
    return Simulation.of(LINE, mean_field_normal, (X, X[:, 0]), 9, seed, {"steps": 5})


def calibration_folder(folder, seed):
    kept = CalibrationFolder(folder, simulation(seed))
    kept.keep(Outcome(0, [3, 4]))
    kept.keep(Outcome(1, None, "it failed"))
    kept.keep(Outcome(2, [0, 9]))


def read_calibration(folder):
    found = CalibrationFolder(folder, simulation(0)).read(3)
    return {outcome.number: outcome for outcome in found}


def resume(folder):
    """Go on with a fit that had some of its 15 steps behind it."""
    guide = mean_field_normal(LINE)
    options = {"steps": 15, "engine": "eager", "progress": False, "resume": True}
    found = fit(LINE, guide, X, X[:, 0], checkpoint=folder, **options)
    return found.unconstrained_params, found.losses, found.kl


def stopped_folder(folder, seed):
    def stop(now):
        if now.step == 10:
            raise KeyboardInterrupt

    guide, options = mean_field_normal(LINE), {"engine": "eager", "progress": False}
    kept = Checkpoint(folder, every=5)
    with suppress(KeyboardInterrupt):
        fit(LINE, guide, X, X[:, 0], steps=15, seed=seed, checkpoint=kept, callbacks=[every(5, stop)], **options)
    assert (folder / "checkpoint.json").exists()


def export_folder(folder, seed):
    guide = mean_field_normal(LINE)
    found = fit(LINE, guide, X, X[:, 0], steps=5, seed=seed, engine="eager", progress=False)
    found.export(folder / "predictor.npz", draws=5)


def read_export(folder):
    found = predictor(folder / "predictor.npz")
    return found.manifest, found.latents, found.predict(X.numpy()).draws


KINDS = {
    "posterior": (posterior_folder, read_posterior),
    "run": (run_folder, read_run),
    "checkpoint": (checkpoint_folder, read_checkpoint),
    "resumed": (stopped_folder, resume),
    "export": (export_folder, read_export),
    "calibration": (calibration_folder, read_calibration),
}


def same(found: Any, wanted: Any) -> bool:
    """Bit for bit, at any depth."""
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and found.shape == wanted.shape and same(found.numpy(), wanted.numpy())
    if isinstance(wanted, np.ndarray):
        return found.dtype == wanted.dtype and found.shape == wanted.shape and found.tobytes() == wanted.tobytes()
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[name], wanted[name]) for name in wanted)
    if isinstance(wanted, tuple | list):
        alike = type(found) is type(wanted) and len(found) == len(wanted)
        return alike and all(same(a, b) for a, b in zip(found, wanted, strict=True))
    if hasattr(wanted, "__dict__"):
        return type(found) is type(wanted) and same(vars(found), vars(wanted))
    return repr(found) == repr(wanted)


def originals(root, kinds):
    """A whole folder of each kind, another of another fit, and what reading the first gives."""
    made = {}
    for kind in kinds:
        write, read = KINDS[kind]
        folders = [root / kind / name for name in ("one", "other")]
        for seed, folder in enumerate(folders):
            folder.parent.mkdir(exist_ok=True)
            write(folder, seed)
        copy = shutil.copytree(folders[0], root / "copy")
        made[kind] = (*folders, read(copy))
        shutil.rmtree(copy)
        copy = shutil.copytree(folders[0], root / "copy")
        assert same(read(copy), made[kind][2]), kind
        shutil.rmtree(copy)
    return made


def lay_traps(here):
    """Things that must not be run or waited for, where a forged name would find them."""
    (here / "evil.py").write_text(f"from pathlib import Path\nPath({str(here / 'canary')!r}).touch()\nrun = print\n")
    os.mkfifo(here / "fifo.csv")
    objects = np.array([Canary(here / "canary")], dtype=object)
    np.savez(here / "pickled.npz", x=objects, y=objects)


def one(number, seed, made, here, tally):
    """Harm one folder and load it."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(list(made))
    folder, other, wanted = made[kind]
    copy, outside = here / "copy", here / "outside"
    shutil.copytree(folder, copy)
    outside.mkdir()
    way, forged = harm(copy, other, rng, here)
    signal.alarm(SECONDS)
    found = None
    try:
        found = KINDS[kind][1](copy)
        end = "loaded"
    except OURS:
        end = "refused"
    except Hung:
        end = "hung"
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    if end == "loaded" and not same(found, wanted):
        end = "loaded otherwise"
    if (here / "canary").exists():
        (here / "canary").unlink()
        end = "ran what it should not"
    lost_fits = kind == "calibration" and way == "lost" and end == "loaded otherwise" and set(found) < set(wanted)
    if lost_fits:
        end = "loaded without the fit that was lost"
    allowed = {"loaded", "refused"} | ({"loaded otherwise"} if forged else {"loaded without the fit that was lost"})
    tally.ends[f"{'forged ' * forged}{end if end in allowed else 'wrong'}"] += 1
    if end not in allowed:
        tally.wrong.append(f"{number}: {kind}, {way}: {end}")
    shutil.rmtree(copy)
    shutil.rmtree(outside)
    for path in here.glob("away*"):
        path.unlink()


def peak_memory():
    """The most that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_all(count, seed, root, numbers=None, kinds=tuple(KINDS)):
    """Harm and load ``count`` folders below ``root``; what came of them."""
    made, tally, here = originals(root, kinds), Tally(), root / "here"
    here.mkdir()
    lay_traps(here)
    before, outside = peak_memory(), os.getcwd()
    previous = signal.signal(signal.SIGALRM, _hung)
    os.chdir(here)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in numbers or range(count):
                one(number, seed, made, here, tally)
    finally:
        os.chdir(outside)
        signal.signal(signal.SIGALRM, previous)
    tally.peak = peak_memory() - before
    return tally


def _hung(*_):
    raise Hung


def main():
    """Run from the command line, with a limit on the memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one folder")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=tuple(KINDS))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, mock.patch.dict(os.environ, XDG_CACHE_HOME=f"{root}/cache"):
        numbers = None if asked.only is None else [asked.only]
        tally = run_all(asked.count, asked.seed, Path(root), numbers, asked.kinds)
    for end, count in sorted(tally.ends.items()):
        print(f"{count:6d} {end}")
    print(f"{tally.peak / 2**20:.0f} MiB beyond what the program takes")
    print("\n".join(tally.wrong))
    return 1 if tally.wrong or tally.peak > BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
