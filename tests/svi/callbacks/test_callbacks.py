"""The ready-made callbacks: what they leave, that they change no number, and that nothing is left running."""

import base64
import json
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.image import imread
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation

from guides import mean_field_normal
from inference import JsonLines, LivePlot, ParameterTrace, Snapshots, TensorBoard, every, fit, load
from inference.svi.callbacks import live_plot
from inference.utils.background_writer import BackgroundWriter
from ppl_models import linear_regression

X = torch.linspace(-1, 1, 40).reshape(-1, 1)
Y = torch.cos(3 * X[:, 0])


def fitted(*callbacks, steps=130, engine="eager", guide=mean_field_normal, **options):
    options = {"progress": False, **options}
    return fit(
        linear_regression, guide(linear_regression), X, Y, steps=steps, engine=engine, callbacks=callbacks, **options
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    kinds = [thread.name + type(thread).__name__ for thread in threading.enumerate()]
    assert not [kind for kind in kinds if kind.startswith("kiln") or "AsyncWriter" in kind]


class Context:
    """Notes when it is entered, called and left."""

    def __init__(self, fails=None):
        self.notes, self.fails = [], fails

    def __enter__(self):
        self.notes.append("in")
        if self.fails == "in":
            raise OSError("no place")

    def __call__(self, now):
        self.notes.append(now.step)
        if self.fails == now.step:
            raise KeyboardInterrupt

    def __exit__(self, kind, error, trace):
        self.notes.append(kind)


def test_a_context_manager_is_entered_before_and_left_after():
    one = Context()
    fitted(every(60, one), every(100, one), restarts=2)
    assert one.notes == ["in", 60, 100, 120, 130, 130, 60, 100, 120, 130, 130, None]


def test_it_is_left_when_the_fit_is_interrupted_and_it_can_refuse_before_the_first_step():
    broken = Context(fails=100)
    with pytest.raises(KeyboardInterrupt):
        fitted(broken)
    assert broken.notes == ["in", 100, KeyboardInterrupt]
    first, second = Context(), Context(fails="in")
    with pytest.raises(OSError, match="no place"):
        fitted(first, second)
    assert first.notes == ["in", OSError]


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_all_of_them_change_no_number(engine, tmp_path):
    alone = fitted(engine=engine, steps=330)
    path = tmp_path / "watched"
    callbacks = (
        LivePlot(7, path / "a.png"),
        JsonLines(path / "a.jsonl", 13),
        ParameterTrace(every=30),
        Snapshots(path / "s", 50),
    )
    watched = fitted(*callbacks, engine=engine, steps=330)
    np.testing.assert_array_equal(alone.losses, watched.losses)
    np.testing.assert_array_equal(alone.kl, watched.kl)
    assert torch.equal(alone.sample(5)["weights"], watched.sample(5)["weights"])


def test_those_told_late_are_told_the_same(tmp_path):
    def told(*more):
        path = tmp_path / f"{len(more)}.jsonl"
        trace = ParameterTrace(every=40)
        fitted(JsonLines(path, 30), trace, *more, engine="compiled", steps=1000)
        return [{k: v for k, v in line.items() if k != "seconds"} for line in read(path)], trace

    (late, trace), (at_once, other) = told(), told(lambda now: None)
    assert late == at_once
    assert len(late) == 34
    np.testing.assert_array_equal(trace.flat_params, other.flat_params)


def test_a_loss_that_is_not_finite_is_told_up_to_its_chunk(tmp_path):
    def grows(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.factor("away", 100 * slope + (30 - slope).log())

    seen = {}
    for engine in ("eager", "compiled"):
        log = JsonLines(tmp_path / f"{engine}.jsonl", 10)
        with pytest.raises(ValueError, match="at step 3") as error:
            fit(grows, AutoDelta(grows), X, steps=5000, lr=0.1, engine=engine, callbacks=[log], progress=False)
        seen[engine] = (str(error.value), [line["step"] for line in read(log.path)])
    assert seen["eager"] == seen["compiled"]
    assert seen["eager"][1][-1] > 100


def test_json_lines(tmp_path):
    log = JsonLines(tmp_path / "new" / "fit.jsonl", params=["AutoNormal.scales.weights"])
    posterior = fitted(log, steps=250)
    lines = read(log.path)
    assert [line["step"] for line in lines] == [100, 200, 250]
    np.testing.assert_allclose(lines[0]["loss"], posterior.losses[:100].mean(), rtol=1e-5)
    np.testing.assert_allclose(lines[2]["kl"], posterior.kl[200:].mean(), rtol=1e-5)
    assert lines[1]["elbo"] == -lines[1]["loss"]
    assert lines[0]["seconds"] < lines[2]["seconds"]
    np.testing.assert_allclose(lines[2]["params"]["AutoNormal.scales.weights"], posterior.params[log.params[0]])
    with pytest.raises(ValueError, match="overwrite=True"):
        fitted(log)
    assert read(log.path) == lines
    log.overwrite = True
    fitted(log, steps=20, restarts=2)
    assert [(line["start"], line["step"]) for line in read(log.path)] == [(1, 20), (2, 20)]
    with pytest.raises(ValueError, match="no parameter 'slope': give names among"):
        fitted(JsonLines(tmp_path / "a.jsonl", params="slope"))
    with pytest.raises(OSError, match="cannot be written"):
        fitted(JsonLines(log.path / "under_a_file.jsonl"))


def test_lines_are_on_disk_while_the_fit_runs(tmp_path):
    log, found = JsonLines(tmp_path / "fit.jsonl", 1), []
    fitted(log, every(1, lambda now: (time.sleep(0.02), found.append(len(log.path.read_text())))), steps=70)
    assert found[0] == 0
    assert found[-1] > 0


def test_the_trace_is_the_path(tmp_path):
    trace = ParameterTrace(every=40)
    posterior = fitted(trace, steps=130)
    assert trace.steps.tolist() == [40, 80, 120, 130]
    assert trace.flat_params.shape == (4, 6)
    for name, value in posterior.params.items():
        np.testing.assert_array_equal(trace[name][-1], value)
    shorter = fitted(steps=80).params
    np.testing.assert_array_equal(trace["AutoNormal.scales.weights"][1], shorter["AutoNormal.scales.weights"])
    assert len([axes for axes in trace.plot().axes if axes.get_visible()]) == 6
    assert len(trace.plot("AutoNormal.locs.bias").axes) == 1
    with pytest.raises(ValueError, match="no parameter 'bias'"):
        trace["bias"]
    with pytest.raises(ValueError, match="empty"):
        ParameterTrace().flat_params  # noqa: B018


def test_a_trace_of_some_parameters_and_of_restarts():
    some, whole = ParameterTrace(["AutoNormal.scales.bias"], every=50), ParameterTrace(every=50)
    posterior = fitted(some, whole, steps=200, restarts=3)
    assert some.flat_params.shape == (4, 1)
    np.testing.assert_array_equal(some["AutoNormal.scales.bias"], whole["AutoNormal.scales.bias"])
    np.testing.assert_array_equal(whole["AutoNormal.locs.bias"][-1], posterior.params["AutoNormal.locs.bias"])


def test_a_trace_keeps_to_its_memory():
    trace = ParameterTrace(every=1, megabytes=10 * 6 * 4 / 2**20)
    fitted(trace, steps=101)
    assert len(trace.steps) <= 11
    assert trace.steps[-1] == 101
    assert len(set(np.diff(trace.steps)[:-1])) == 1


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_each_snapshot_loads_as_the_posterior_of_a_shorter_fit(engine, tmp_path):
    kept = Snapshots(tmp_path, every=50)
    last = fitted(kept, steps=130, engine=engine)
    assert [path.name for path in kept.written] == ["step_000050", "step_000100", "step_000130"]
    assert sorted(tmp_path.iterdir()) == kept.written
    for path, steps in zip(kept.written, (50, 100, 130), strict=True):
        found = load(path, linear_regression, mean_field_normal(linear_regression))
        shorter = fitted(steps=steps, engine=engine)
        assert torch.equal(found.predict(X, draws=5).draws, shorter.predict(X, draws=5).draws)
        np.testing.assert_array_equal(found.losses, shorter.losses)
    assert found.record.options == last.record.options


def test_snapshots_that_are_kept_refused_and_overwritten(tmp_path):
    kept = Snapshots(tmp_path, every=20, keep=2)
    fitted(kept)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_000120", "step_000130"]
    with pytest.raises(ValueError, match=r"2 snapshots of another fit, the first is step_000120.*overwrite=True"):
        fitted(Snapshots(tmp_path))
    fitted(Snapshots(tmp_path, overwrite=True), steps=100, restarts=2)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob("**/step*"))] == [
        "start_1/step_000100",
        "start_2/step_000100",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file cannot be written .*: give a folder"):
        fitted(Snapshots(tmp_path / "file"))
    with pytest.raises(ValueError, match="keep is 0"):
        Snapshots(tmp_path, keep=0)


def test_a_snapshot_that_cannot_be_written_ends_the_fit(tmp_path):
    kept, told = Snapshots(tmp_path / "s", every=10), []
    (tmp_path / "s").mkdir()

    def spoil(now):
        told.append(now.step)
        if now.step == 20:
            kept.folder = tmp_path / "file" / "below"
            (tmp_path / "file").write_text("")

    with pytest.raises(OSError, match="file"):
        fitted(every(10, spoil), kept, steps=2000)


def test_a_snapshot_of_the_laplace_guide_has_its_spread(tmp_path):
    kept = Snapshots(tmp_path, every=500)
    fitted(kept, steps=600, guide=AutoLaplaceApproximation, lr=0.05)
    found = load(kept.written[0], linear_regression, AutoLaplaceApproximation(linear_regression))
    assert 0.01 < float(found.sample(100)["weights"].std()) < 1


def test_the_plot_is_rewritten_at_its_path(tmp_path, monkeypatch):
    monkeypatch.setattr(live_plot, "_LEAST", 0.0)
    monkeypatch.setattr(live_plot, "_SHARE", 0.1)
    path, sizes = tmp_path / "new" / "elbo.png", []
    plot = LivePlot(every=10, path=path)
    fitted(every(10, plot), lambda now: sizes.append(path.exists()), steps=250)
    assert sizes[0]
    assert imread(path).shape == (352, 946, 4)
    assert [entry.name for entry in path.parent.iterdir()] == ["elbo.png"]
    assert plot.title.startswith("step 250 of 250: ELBO -")
    assert len(plot.figure().axes[0].lines[0].get_xdata()) == 25
    with pytest.raises(OSError, match="cannot be written"):
        fitted(LivePlot(path=path / "under_a_file.png"))


def test_drawing_waits_for_fifty_times_what_it_cost(tmp_path, monkeypatch):
    drawn = []
    plot = LivePlot(every=1, path=tmp_path / "a.png")

    def png(self):
        drawn.append(self.title)
        time.sleep(0.01)
        return b""

    monkeypatch.setattr(LivePlot, "png", png)

    def pause(now):
        time.sleep(0.002)

    begun = time.perf_counter()
    fitted(plot, every(1, pause), steps=600)
    assert 2 <= len(drawn) <= 2 + (time.perf_counter() - begun) / 0.5


def test_restarts_and_the_loss_are_drawn(tmp_path):
    plot = LivePlot(every=20, path=tmp_path / "a.png", loss=True)
    fitted(plot, steps=60, restarts=3)
    figure = plot.figure()
    assert len(figure.axes[0].lines) == 3
    assert figure.axes[0].get_ylabel() == "−ELBO (nats)"
    assert "start 3: loss" in plot.title


def test_the_terminal_gets_one_line(capsys):
    fitted(LivePlot(every=10), steps=100)
    line = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert "step 100 of 100: ELBO -" in line
    assert set(line.split(" ")[0]) <= set("▁▂▃▄▅▆▇█")


def test_the_plot_of_a_fit_that_fails_is_drawn(tmp_path):
    plot = LivePlot(every=10, path=tmp_path / "a.png")
    with pytest.raises(KeyboardInterrupt):
        fitted(plot, Context(fails=100))
    assert imread(plot.path).size


def test_a_notebook_shows_one_picture_and_changes_it(tmp_path, monkeypatch):
    shown, updated = [], []

    def display(image, display_id):
        shown.append(image)
        return SimpleNamespace(update=updated.append)

    package, part = ModuleType("IPython"), ModuleType("IPython.display")
    package.version_info = (9, 0)
    package.get_ipython = lambda: SimpleNamespace(kernel=object())
    part.display, part.Image = display, SimpleNamespace
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", part)
    monkeypatch.setattr(live_plot, "_LEAST", 0.0)
    monkeypatch.setattr(live_plot, "_SHARE", 0.1)
    fitted(LivePlot(every=10, path=tmp_path / "a.png"), steps=200)
    assert len(shown) == 1
    assert updated
    assert updated[-1].data == (tmp_path / "a.png").read_bytes()
    assert updated[-1].alt.endswith("nats")


def test_a_real_notebook(tmp_path):
    nbformat, nbconvert = pytest.importorskip("nbformat"), pytest.importorskip("nbconvert.preprocessors")
    pytest.importorskip("ipykernel")
    code = """
        import torch, warnings
        warnings.simplefilter("ignore")
        from guides import mean_field_normal
        from inference import LivePlot, fit
        from inference.svi.callbacks import live_plot
        from ppl_models import linear_regression as line
        live_plot._LEAST, live_plot._SHARE = 0.0, 0.1
        x = torch.linspace(-1, 1, 40).reshape(-1, 1)
        _ = fit(line, mean_field_normal(line), x, x[:, 0], steps=300, callbacks=[LivePlot(20)], progress=False)
        """.replace("\n        ", "\n")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbconvert.ExecutePreprocessor(timeout=120).preprocess(book, {"metadata": {"path": str(tmp_path)}})
    pictures = [output for output in book.cells[0].outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 1
    path = tmp_path / "a.png"
    path.write_bytes(base64.b64decode(pictures[0].data["image/png"]))
    picture = imread(path)
    assert picture.shape == (352, 946, 4)
    assert (picture[..., :3] < 0.9).any(-1).mean() > 0.005  # something is drawn
    assert "step 300 of 300" in pictures[0].metadata["image/png"]["alt"]


def test_tensorboard_is_asked_for_before_the_fit(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "kiln-ppl\[watch\]"'):
        TensorBoard("folder")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    posterior = fitted(TensorBoard(tmp_path, histograms=True), steps=250)
    found = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(found.Tags()["scalars"]) == ["elbo", "kl", "loss"]
    assert [event.step for event in found.Scalars("elbo")] == [100, 200, 250]
    np.testing.assert_allclose(found.Scalars("loss")[0].value, posterior.losses[:100].mean(), rtol=1e-5)
    assert sorted(found.Tags()["histograms"]) == sorted(posterior.params)
    fitted(TensorBoard(tmp_path / "more"), steps=20, restarts=2)
    assert sorted(path.name for path in (tmp_path / "more").iterdir()) == ["start_1", "start_2"]
    with pytest.raises(OSError, match="cannot be written"):
        fitted(TensorBoard(next(tmp_path.glob("events*"))))


@pytest.mark.parametrize("make", [JsonLines, Snapshots])
def test_called_by_hand_they_say_what_they_are_for(make, tmp_path):
    with pytest.raises(ValueError, match=r"callbacks=\[…\]"):
        make(tmp_path / "a")(SimpleNamespace())
    with pytest.raises(ValueError, match="every is 0"):
        make(tmp_path / "a", every=0)


def test_background_work_raises_its_first_error_once():
    def fails():
        raise IndexError

    work, done = BackgroundWriter("test"), []
    work.put(fails)
    for _ in range(20):
        try:
            work.put(lambda: done.append(1))
        except IndexError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the error was lost")
    work.close()
    assert not done or len(done) < 20
