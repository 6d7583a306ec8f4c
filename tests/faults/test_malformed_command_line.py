"""Tables, options and folders given to the command line: one line on standard error and nothing half written."""

import contextlib
import csv
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from guides import mean_field_normal
from inference import fit
from inference.cli import commands
from ppl_models import linear_regression
from tests.faults.outcomes import hold

FEW = 4
ROWS = 12
CHECKPOINT = {".kiln.lock", "checkpoint-HASH.safetensors", "checkpoint.json"}
RUN_FILES = {".kiln.lock", "posterior-HASH.safetensors", "posterior.json", "report.html", "run.json"}


def examples(most):
    return pytest.mark.parametrize("examples", [FEW, pytest.param(most, marks=pytest.mark.slow)])


def houses(rows=ROWS):
    generator = np.random.default_rng(0)
    x = generator.integers(0, 9, size=(rows, 2)).astype(float)
    return pd.DataFrame({"size": x[:, 0], "age": x[:, 1], "price": 1 + 2 * x[:, 0] - x[:, 1]})


X, Y = houses()[["size", "age"]].to_numpy(), houses()["price"].to_numpy()
SEEN = []


def seen_problem(model, guide, data, options):
    """Keeps the rows that would be fitted."""
    x, y = data
    assert np.isfinite(x).all()
    assert np.isfinite(y).all()
    SEEN.append((x, y))


def no_fit(problem, options):
    """Gives a posterior of other rows."""
    return fit(linear_regression, mean_field_normal(linear_regression), X, Y, steps=1, engine="eager", progress=False)


CLEAN = houses().to_csv(index=False)


def short_report(posterior, run, split, path, held_out):
    """Reports take seconds, and have tests of their own."""
    path.write_text("report")
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(commands, "write_run_report", short_report)
    monkeypatch.delenv("KILN_TRACEBACK", raising=False)
    SEEN.clear()
    (tmp_path / "new").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "houses.csv").write_text(CLEAN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "write_run_report", short_report)
        done = kiln("fit", "linear_regression", "--data", folder / "houses.csv", "--target", "price", *fast(folder))
    assert done.status == 0, done.err
    return folder


def fast(folder):
    return ("--steps", "2", "--engine", "eager", "--lr", "0.01", "--holdout", "0", "--out", folder / "run")


def kiln(*words):
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        status = commands.main([str(word) for word in words])
    return SimpleNamespace(status=status, out=printed.getvalue(), err=said.getvalue())


def refused(done, *words):
    """Checks that a command ended as one that was refused ends, and named one of ``words``."""
    assert done.status in (1, 2), done
    assert "Traceback" not in done.err
    assert "a defect of kiln" not in done.err, done.err
    if done.status == 1:
        lines = [line for line in done.err.splitlines() if line.startswith("kiln: ")]
        assert len(lines) == 1, done.err
        assert len(lines[0]) < 6000
        assert any(str(word) in lines[0] for word in words), lines[0]


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fit_table(name, content, place):
    """Gives a file of that name and content to ``kiln fit``; how it ended, and the rows that would be fitted."""
    Path(name).write_bytes(content)
    before = files_in(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "FitProblem", SimpleNamespace(of=seen_problem))
        patch.setattr(commands, "run_fit", no_fit)
        done = kiln("fit", "linear_regression", "--data", name, "--target", "price", *fast(Path("new")))
    written = {path: content for path, content in files_in(place).items() if path not in before}
    if done.status != 0:
        assert written == {}
        assert not (place / "new" / "run").exists()
        return done, None
    assert names_of(written) == RUN_FILES
    clear(place / "new" / "run")
    return done, SEEN.pop()


def names_of(paths):
    """Their names, in which a hash is HASH."""
    return {re.sub("-[0-9a-f]{16}", "-HASH", path.name) for path in paths}


def clear(run):
    assert names_of(run.iterdir()) == RUN_FILES
    shutil.rmtree(run)


def are_rows_of(kept, table):
    return np.array_equal(kept[0], table.drop(columns="price")) and np.array_equal(kept[1], table["price"])


def rows_of(text):
    return [line.split(",") for line in text.splitlines()]


def each_cell(change):
    return lambda text: "\n".join(",".join(map(change, row)) for row in rows_of(text)) + "\n"


def each_row(change):
    def changed(text):
        head, *rows = text.splitlines()
        return "\n".join([head, *map(change, rows)]) + "\n"

    return changed


SAME = {
    "as it is": str,
    "byte-order mark": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "old Mac": lambda text: text.replace("\n", "\r"),
    "no end of line": str.strip,
    "blank lines": lambda text: text.replace("\n", "\n\n") + "\n\n",
    "quoted": each_cell('"{}"'.format),
    "spaces after numbers": each_row(lambda row: row.replace(",", " ,")),
    "whole numbers": lambda text: text.replace(".0", ""),
    "exponents": lambda text: text.replace(".0", "e0"),
    "plus signs": each_row(lambda row: ",".join("+" + cell if cell[0] != "-" else cell for cell in row.split(","))),
    "zeros in front": each_row(lambda row: "00" + row),
    "many decimals": lambda text: text.replace(".0", "." + "0" * 40),
}


@examples(250)
def test_a_table_written_in_another_way_is_the_same_table(examples, place):
    def same(case):
        way, other, rows = case
        text = SAME[other](SAME[way](houses(rows).to_csv(index=False)))
        done, kept = fit_table("a.csv", text.encode(), place)
        assert done.status == 0, f"{way}, {other}: {done.err}"
        assert are_rows_of(kept, houses(rows))

    hold(same, st.tuples(*[st.sampled_from(sorted(SAME))] * 2, st.integers(4, 20)).filter(compatible), examples)


def compatible(case):
    """Ways that can be written one over the other: quotes are no numbers, and a mark stands in front of all."""
    first, second, _ = case
    return second == "as it is" or (first not in ("quoted", "byte-order mark") and second in ("CRLF", "no end of line"))


BAD_CELLS = ["", "NA", "nan", "null", "inf", "-Infinity", "1e400", "old", "1,5", "1_000", "0x10", "12:30", "2020-01-01"]
BAD_CELLS += [
    "1.2.3",
    "--1",
    "1e",
    "£5",
    "5%",
    "\x00",
    "٣٤x",
    "(1)",
    "1 2",
    "1e39",
    "True?",
    "[1]",
    "'1'",
    "None",
    "#N/A",
]


@examples(250)
def test_a_cell_that_is_no_number_is_named_by_file_and_column(examples, place):
    def named(case):
        row, column, cell = case
        rows = rows_of(CLEAN)
        rows[row][column] = f'"{cell}"'
        done, kept = fit_table("b.csv", ("\n".join(map(",".join, rows)) + "\n").encode(), place)
        assert kept is None, f"{cell!r} in {rows[0][column]} was fitted"
        refused(done, "b.csv")
        assert repr(rows[0][column]) in done.err or "NUL" in done.err, done.err

    hold(named, st.tuples(st.integers(1, ROWS), st.integers(0, 2), st.sampled_from(BAD_CELLS)), examples)


def header(names):
    return CLEAN.replace("size,age,price", names, 1)


BAD_TABLES = {
    "nothing": b"",
    "one line end": b"\n",
    "blanks": b" \n \n",
    "header alone": b"size,age,price\n",
    "no header": CLEAN.split("\n", 1)[1].encode(),
    "target alone": houses()[["price"]].to_csv(index=False).encode(),
    "semicolons": CLEAN.replace(",", ";").encode(),
    "tabs": CLEAN.replace(",", "\t").encode(),
    "decimal commas": each_row(lambda row: row.replace(".", ","))(CLEAN).encode(),
    "a cell too many": each_row(lambda row: row + ",1")(CLEAN).encode(),
    "a cell too many in one row": (CLEAN + "1,2,3,4\n").encode(),
    "a cell too few": (CLEAN + "1,2\n").encode(),
    "a quote that is not closed": (CLEAN + '"1,2,3\n').encode(),
    "a column twice": header("size,size,price").encode(),
    "the target twice": header("price,age,price").encode(),
    "a target with blanks": header("size,age, price").encode(),
    "another case": header("size,age,Price").encode(),
    "UTF-16": CLEAN.encode("utf-16"),
    "Latin-1": header("gr\xf6\xdfe,age,price").encode("latin-1"),
    "zeros": bytes(1000),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "JSON": b'[{"size": 1, "price": 2}]',
    "HTML": b"<html><body>Sign in</body></html>",
    "comment": b"# houses\n" + CLEAN.encode(),
    "Parquet": b"PAR1" + bytes(100) + b"PAR1",
    "Zip": b"PK\x03\x04" + bytes(100),
    "one cell of a megabyte": (CLEAN + "1," + "9" * 10**6 + ",3\n").encode(),
}


@pytest.mark.parametrize("table", BAD_TABLES)
def test_a_table_that_is_none_is_refused_by_its_name(place, table):
    done, kept = fit_table("c.csv", BAD_TABLES[table], place)
    assert kept is None
    refused(done, "c.csv", "1 rows")


@examples(400)
def test_any_bytes_at_all_are_refused_or_are_a_table_of_numbers(examples, place):
    def right(case):
        ending, content = case
        done, kept = fit_table(f"d.{ending}", content, place)
        if kept is None:
            refused(done, f"d.{ending}", "rows leaves none", "'y' in the model")
        else:
            assert ending == "csv"
            assert are_rows_of(kept, plainly_read(content.decode()))

    text = st.text(alphabet="0123456789.,-e\n\"' sizeagepr\r\t;", max_size=200)
    broken = st.tuples(st.integers(0, len(CLEAN)), st.binary(max_size=3)).map(
        lambda cut: CLEAN.encode()[: cut[0]] + cut[1] + CLEAN.encode()[cut[0] + 1 :]
    )
    content = st.binary(max_size=200) | text.map(lambda t: ("size,age,price\n" + t).encode()) | broken
    hold(right, st.tuples(st.sampled_from(["csv", "npz", "parquet"]), content), examples)


def plainly_read(text):
    """The table as Python's own reader and numbers have it, with True and False for 1 and 0."""
    head, *rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    words = {"true": 1.0, "false": 0.0}
    return pd.DataFrame([[words.get(c.strip().lower()) or float(c) for c in row] for row in rows], columns=head)


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


BAD_NPZ = {
    "no x": npz(z=X, price=Y),
    "no target": npz(x=X),
    "other rows": npz(x=X, price=Y[1:]),
    "scalar x": npz(x=1.0, price=Y),
    "cube": npz(x=X[..., None], price=Y),
    "no rows": npz(x=X[:0], price=Y[:0]),
    "no columns": npz(x=X[:, :0], price=Y),
    "objects": npz(x=X.astype(object), price=Y),
    "words": npz(x=X.astype(str), price=Y),
    "complex": npz(x=X + 0j, price=Y),
    "structured": npz(x=np.zeros(12, [("a", float)]), price=Y),
    "dates": npz(x=X.astype("M8[s]"), price=Y),
    "target of words": npz(x=X, price=Y.astype(str)),
    "target of two columns": npz(x=X, price=np.c_[Y, Y]),
    "NaN": npz(x=X * np.nan, price=Y),
    "infinite target": npz(x=X, price=Y + np.inf),
    "beyond single precision": npz(x=X * 1e300, price=Y),
    "shape that is no shape": npz(x=X, price=Y).replace(b"(12, 2)", b"(-1, 2)"),
    "shape beyond memory": npz(x=X, price=Y).replace(b"(12, 2), }     ", b"(10**15, 9),}   "),
}


@pytest.mark.parametrize("table", BAD_NPZ)
def test_an_npz_file_that_is_no_table_is_refused_by_its_name(place, table):
    done, kept = fit_table("e.npz", BAD_NPZ[table], place)
    assert kept is None
    refused(done, "e.npz")


NPZ_TYPES = ["f2", "f4", ">f8", "longdouble", "i1", "i8", ">i4", "u1", "u8"]


@pytest.mark.parametrize("dtype", NPZ_TYPES)
def test_numbers_of_any_type_in_an_npz_file_are_the_same_table(place, dtype):
    x = np.asfortranarray(np.abs(X).astype(dtype))
    done, kept = fit_table("f.npz", npz(x=x, price=np.abs(Y).astype(dtype)), place)
    assert done.status == 0, done.err
    assert are_rows_of(kept, houses().abs())


def parquet(table):
    stream = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pandas(table), stream)
    return stream.getvalue()


BAD_PARQUET = {
    "words": houses().assign(age="old"),
    "numbers as words": houses().astype({"age": str}),
    "dates": houses().assign(age=pd.Timestamp("2020-01-01")),
    "spans": houses().assign(age=pd.Timedelta(1, "s")),
    "missing": houses().assign(age=pd.Series([1] * 11 + [None], dtype="Int64")),
    "nothing in a column": houses().assign(age=None),
    "lists": houses().assign(age=[[1.0]] * ROWS),
    "mappings": houses().assign(age=[{"a": 1}] * ROWS),
    "categories": houses().assign(age=pd.Categorical(["old"] * ROWS)),
    "target as index": houses().set_index("price"),
    "no rows": houses()[:0],
    "a column twice": pa.table([X[:, 0], X[:, 1], Y], names=["size", "size", "price"]),
    "the target twice": pa.table([X[:, 0], Y, Y], names=["size", "price", "price"]),
    "beyond single precision": houses().assign(age=1e300),
}


@pytest.mark.parametrize("table", BAD_PARQUET)
def test_a_parquet_file_that_is_no_table_is_refused_by_its_name(place, table):
    done, kept = fit_table("g.parquet", parquet(BAD_PARQUET[table]), place)
    assert kept is None
    refused(done, "g.parquet")


@pytest.mark.parametrize("dtype", ["Int64", "Float32", "int8", "float64[pyarrow]", "uint16[pyarrow]"])
def test_numbers_of_any_type_in_a_parquet_file_are_the_same_table(place, dtype):
    done, kept = fit_table("h.parquet", parquet(houses().abs().astype(dtype)), place)
    assert done.status == 0, done.err
    assert are_rows_of(kept, houses().abs())


WORDS = st.one_of(
    st.sampled_from(
        ["0", "-1", "1.5", "nan", "inf", "-inf", "1e400", "10000000000000000000000", "", " ", "None", "abc"]
    ),
    st.sampled_from(
        ["..", "/dev/null", "[" * 5000, "{", "\n", "a\nb", "é", "\udcff", "--", "-h", "1" * 5000, "cuda:9"]
    ),
    st.text(alphabet=st.characters(exclude_characters="\0"), max_size=8),
)
OPTIONS = ["data", "target", "guide", "set", "holdout", "steps", "lr", "optimizer", "particles", "anneal"]
OPTIONS += ["restarts", "batch-size", "seed", "device", "engine"]
SETTINGS = ["noise", "prior_scale", "intercept", "scaling", "x", "y", "nothing"]


@examples(500)
def test_an_option_of_fit_is_taken_or_refused_by_name(examples, fitted, place):
    def right(case):
        option, word, setting = case
        value = f"{setting}={word}" if option == "set" else word
        before = files_in(place)
        given = {
            "data": fitted / "houses.csv",
            "target": "price",
            "steps": 2,
            "engine": "eager",
            "lr": 0.01,
            "holdout": 0,
        }
        given |= {option: value, "out": place / "new" / "run"}
        pairs = (w for name, v in given.items() for w in (f"--{name}={v}",))
        done = kiln("fit", "linear_regression", *pairs)
        named = (option, option.replace("-", "_"), setting, "linear_regression", "'y'", "at step", repr(word)[:9])
        if done.status != 0:
            refused(done, *named)
            if "at step" in done.err:  # the last good state is kept
                assert names_of((place / "new" / "run").iterdir()) == CHECKPOINT
                shutil.rmtree(place / "new")
            assert files_in(place) == before
            return
        clear(place / "new" / "run")
        assert files_in(place) == before

    cases = st.tuples(st.sampled_from(OPTIONS), WORDS, st.sampled_from(SETTINGS))
    hold(right, cases.filter(lambda case: not is_long(*case[:2])), examples)


def is_long(option, word):
    """Numbers that are right but for the time that they take."""
    return option in ("steps", "particles", "restarts") and word.strip().isdecimal() and 1 < len(word.strip()) < 11


@examples(300)
def test_an_option_of_predict_is_taken_or_refused_by_name(examples, fitted, place):
    def right(case):
        option, word = case
        given = {"data": fitted / "houses.csv", "out": "new/p.csv", "draws": 5, option: word}
        table = pd.read_csv(fitted / "houses.csv").drop(columns="price")
        table.to_csv("rows.csv", index=False)
        given["data"] = word if option == "data" else "rows.csv"
        done = kiln("predict", fitted / "run", *(f"--{name}={value}" for name, value in given.items()))
        written = Path("new/p.csv")
        if done.status != 0:
            refused(done, option, option.replace("-", "_"), repr(word)[:9], word.strip())
            assert not list(place.glob("new/*"))
        else:
            assert len(pd.read_csv(written)) == ROWS
            written.unlink()

    options = st.sampled_from(["data", "draws", "prob", "batch-size", "seed"])
    hold(right, st.tuples(options, WORDS).filter(lambda case: not is_long("steps", case[1])), examples)


NO_RUNS = {
    "nothing": lambda place: place / "nothing",
    "an empty folder": lambda place: place / "new",
    "a file": lambda place: file_at(place / "file", "junk"),
    "run.json that is a folder": lambda place: folder_at(place / "new" / "run.json").parent,
    "run.json alone": lambda place: file_at(place / "new" / "run.json", "{}").parent,
    "run.json that is a number": lambda place: file_at(place / "new" / "run.json", "1").parent,
    "the posterior alone": lambda place: file_at(place / "new" / "posterior.json", "{}").parent,
    "a name that is too long": lambda place: place / ("a" * 300),
    "a folder nobody may read": lambda place: locked(place / "new"),
}


def file_at(path, text):
    path.write_text(text)
    return path


def folder_at(path):
    path.mkdir()
    return path


def locked(path):
    path.chmod(0)
    return path


def slowly(command):
    return pytest.param(command, marks=pytest.mark.slow)


@pytest.mark.parametrize("command", ["predict", *map(slowly, ("report", "diagnose", "report two"))])
@pytest.mark.parametrize("junk", NO_RUNS)
def test_a_folder_that_is_no_run_is_refused_by_its_name(fitted, place, command, junk):
    folder = NO_RUNS[junk](place)
    before = sorted(place.rglob("*"))
    words = {"predict": ["--data", fitted / "houses.csv", "--out", place / "p.csv"], "report two": [fitted / "run"]}
    done = kiln(command.split()[0], folder, *words.get(command, []))
    assert done.status == 1
    refused(done, folder, "a" * 99)
    assert sorted(place.rglob("*")) == before
    (place / "new").chmod(0o700)


OUTS = {
    "a file": lambda place: file_at(place / "file", "kept"),
    "under a file": lambda place: file_at(place / "file", "kept") / "run",
    "a device": lambda place: Path("/dev/null"),
    "in a folder of the system": lambda place: Path("/proc/run"),
    "a name that is too long": lambda place: place / ("a" * 300),
}


@pytest.mark.parametrize("command", ["predict", *map(slowly, ("fit", "report"))])
@pytest.mark.parametrize("out", OUTS)
def test_a_place_where_nothing_can_be_written_is_named(fitted, place, command, out):
    where = OUTS[out](place)
    where = where if command == "fit" else where / "p.csv" if command == "predict" else where / "report.html"
    before = files_in(place), sorted(place.rglob("*"))
    run, table = fitted / "run", fitted / "houses.csv"
    words = {
        "fit": ["linear_regression", "--data", table, "--target", "price", "--steps", 2],
        "predict": [run, "--data", table, "--draws", 5],
        "report": [run],
    }[command]
    done = kiln(command, *words, "--out", where)
    assert done.status == 1, done
    refused(done, where, where.parent)
    assert (files_in(place), sorted(place.rglob("*"))) == before


TABLE = ["--data", "a.csv", "--target", "price", "--out", "run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fit", "linear_regression", "--data", "b.csv", "--target", "price", "--out", "run"], "b.csv"),
        (["fit", "linear_regression", "--data", "\udcff.csv", "--target", "price", "--out", "run"], "csv"),
        (
            ["fit", "dropout_regression", "--data", "a.csv", "--target", "price", "--out", "run", "--set", "hidden=-1"],
            "-1",
        ),
        (["fit", "os:getcwd", "--data", "a.csv", "--target", "price", "--out", "run"], "getcwd"),
        (
            [
                "fit",
                "linear_regression",
                "--guide",
                "torch.nn:Linear",
                "--data",
                "a.csv",
                "--target",
                "price",
                "--out",
                "run",
            ],
            "Linear",
        ),
        (["predict", "a.csv", "--data", "a.csv", "--out", "p.csv"], "a.csv"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_a_process_of_its_own_says_one_line_too(place, words, named):
    Path("a.csv").write_text(CLEAN)
    Path("b.csv").write_text(CLEAN.replace("\n", ",\n", 1))
    before = files_in(place)
    command = [sys.executable, "-m", "kiln", *map(os.fsencode, words)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"(^|\n)kiln: [^\n]+\n$", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert named in done.stderr
    assert files_in(place) == before


def test_the_property_fails_where_a_bare_error_gets_through(place, monkeypatch, unshrunk):
    monkeypatch.setattr("ppl_models.data.tables._numbers", lambda column, path: column.to_numpy(dtype=float))
    with pytest.raises(AssertionError):
        test_a_cell_that_is_no_number_is_named_by_file_and_column(25, place)


def test_the_property_fails_where_a_fit_leaves_half_a_run(place, monkeypatch):
    monkeypatch.setattr("inference.cli.runs.Run.save", lambda run, folder: 1 / 0)
    with pytest.raises(AssertionError):
        fit_table("a.csv", CLEAN.encode(), place)
