import gc
import re
import warnings

import numpy as np
import pandas as pd
import pytest

from ppl_models.data import tables
from ppl_models.data.tables import read_csv, read_npz, read_parquet

FRAME = pd.DataFrame({"a": [1.5, -2.0, 3.25], "y": [10.0, 20.0, 30.0], "b": [7, 8, 9]})
X = np.array([[1.5, 7.0], [-2.0, 8.0], [3.25, 9.0]])
Y = np.array([10.0, 20.0, 30.0])
BOTH = pytest.mark.parametrize(("read", "name"), [(read_csv, "t.csv"), (read_parquet, "t.parquet")], ids=["csv", "pq"])


def write(path, frame):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    return path


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def refusal(read, path, target="y", columns=None):
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read(path, target, columns)
    return str(caught.value).replace(str(path), "FILE")


def assert_table(table, x, y, columns, target):
    np.testing.assert_array_equal(table.x, x, strict=True)
    np.testing.assert_array_equal(table.y, y, strict=True)
    assert (table.columns, table.target, table.test_rows) == (columns, target, None)


@BOTH
def test_a_table_comes_back_with_its_values_names_and_target(tmp_path, read, name):
    path = write(tmp_path / name, FRAME)
    assert_table(read(path, "y", None), X, Y, ("a", "b"), "y")


@BOTH
def test_any_column_can_be_the_target(tmp_path, read, name):
    path = write(tmp_path / name, FRAME)
    assert_table(read(path, "b", None), FRAME[["a", "y"]].to_numpy(), np.array([7.0, 8.0, 9.0]), ("a", "y"), "b")


@BOTH
def test_true_and_false_become_1_and_0(tmp_path, read, name):
    path = write(tmp_path / name, FRAME.assign(a=[True, False, True]))
    np.testing.assert_array_equal(read(path, "y", None).x[:, 0], [1.0, 0.0, 1.0])


def test_full_precision_survives_csv(tmp_path):
    values = np.random.default_rng(0).normal(size=100)
    path = write(tmp_path / "t.csv", pd.DataFrame({"a": values, "y": values[::-1]}))
    assert_table(read_csv(path, "y", None), values[:, None], values[::-1], ("a",), "y")


def test_column_names_that_are_numbers_stay_text(tmp_path):
    path = write(tmp_path / "t.csv", pd.DataFrame(X, columns=[0, 1]).assign(y=Y))
    assert_table(read_csv(path, "y", None), X, Y, ("0", "1"), "y")


@BOTH
def test_prediction_takes_columns_by_name_in_the_order_of_the_fit(tmp_path, read, name):
    path = write(tmp_path / name, FRAME[["b", "a"]])
    table = read(path, "y", ["a", "b"])
    np.testing.assert_array_equal(table.x, X, strict=True)
    assert (table.y, table.columns, table.target) == (None, ("a", "b"), "y")


@BOTH
def test_prediction_does_not_look_at_the_target_filled_or_blank(tmp_path, read, name):
    path = write(tmp_path / name, FRAME.assign(y=np.nan))
    table = read(path, "y", ["b", "a"])
    np.testing.assert_array_equal(table.x, X[:, ::-1])
    assert (table.y, table.columns, table.target) == (None, ("b", "a"), "y")


@BOTH
def test_a_target_that_is_not_given_is_asked_for(tmp_path, read, name):
    path = write(tmp_path / name, FRAME)
    said = refusal(read, path, target=None)
    assert said == "FILE has columns ['a', 'y', 'b']: say which one to predict with --target"


@BOTH
def test_a_target_that_is_not_there_is_named(tmp_path, read, name):
    path = write(tmp_path / name, FRAME)
    said = refusal(read, path, target="z")
    assert said == "FILE has no column 'z', found ['a', 'y', 'b']: name one of them with --target"


@BOTH
def test_a_table_of_the_target_alone_is_refused(tmp_path, read, name):
    path = write(tmp_path / name, FRAME[["y"]])
    assert refusal(read, path) == ("FILE has only the target column 'y': give at least one column to predict it from")


@BOTH
@pytest.mark.parametrize("column", ["a", "y"])
def test_a_text_column_is_named(tmp_path, read, name, column):
    path = write(tmp_path / name, FRAME.assign(**{column: ["red", "green", "blue"]}))
    said = refusal(read, path)
    assert said == f"FILE: column '{column}' is not numeric, found 'red': encode it as numbers or drop it"


def test_one_text_cell_among_numbers_is_the_one_shown(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,y\n1,2\n3,4\nmany,6\n")
    assert refusal(read_csv, path) == ("FILE: column 'a' is not numeric, found 'many': encode it as numbers or drop it")


def test_a_column_of_dates_is_named(tmp_path):
    path = write(tmp_path / "t.parquet", FRAME.assign(a=pd.to_datetime(["2024-01-01"] * 3)))
    assert refusal(read_parquet, path).startswith("FILE: column 'a' is not numeric, found Timestamp('2024-01-01")


@BOTH
@pytest.mark.parametrize("column", ["a", "y"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_missing_and_infinite_values_are_counted_and_placed(tmp_path, read, name, column, value):
    frame = FRAME.copy()
    frame.loc[1:, column] = value
    said = refusal(read, write(tmp_path / name, frame))
    assert said == (
        f"FILE: column '{column}' has 2 missing or infinite values, the first in row 1: impute them or drop those rows"
    )


def test_a_missing_integer_in_parquet_is_found(tmp_path):
    path = write(tmp_path / "t.parquet", FRAME.assign(b=pd.array([1, 2, None], dtype="Int64")))
    said = refusal(read_parquet, path)
    assert said.startswith("FILE: column 'b' has 1 missing or infinite values, the first in row 2: ")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_csv_is_refused(tmp_path, content):
    path = tmp_path / "t.csv"
    path.write_text(content)
    assert refusal(read_csv, path) == "FILE is empty: give a header line and at least one row"


@BOTH
@pytest.mark.parametrize("columns", [None, ["a", "b"]], ids=["fit", "prediction"])
def test_a_header_without_rows_is_refused(tmp_path, read, name, columns):
    path = write(tmp_path / name, FRAME[:0])
    assert refusal(read, path, columns=columns) == "FILE has no rows: give at least one row under the header"


@pytest.mark.parametrize(
    ("read", "name", "content"),
    [
        (read_csv, "t.csv", b"a,y\n\xff\xfe,1\n"),
        (read_csv, "t.csv", b"a,y\n1,2\n1,2,3\n"),
        (read_csv, "t.csv", b'a,y\n1,2\n"1'),
        (read_parquet, "t.parquet", b""),
        (read_parquet, "t.parquet", b"not a Parquet file at all"),
    ],
)
def test_a_damaged_file_is_refused_with_advice(tmp_path, read, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    said = refusal(read, path)
    assert said.startswith("FILE cannot be read as a table: ")
    assert re.search("give|save|write", said)


def test_rows_longer_than_the_header_do_not_shift_the_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,y\n1,2,3\n4,5,6\n")
    refusal(read_csv, path)


@BOTH
def test_missing_columns_at_prediction_are_named(tmp_path, read, name):
    path = write(tmp_path / name, FRAME[["a", "y"]])
    said = refusal(read, path, columns=["a", "b"])
    assert said == "FILE lacks ['b']: give exactly the columns ['a', 'b']"


@BOTH
def test_extra_columns_at_prediction_are_named(tmp_path, read, name):
    path = write(tmp_path / name, FRAME.assign(c=1.0))
    said = refusal(read, path, columns=["a", "b"])
    assert said == "FILE has ['c'], which the fit did not see: give exactly the columns ['a', 'b']"


@BOTH
def test_missing_and_extra_columns_are_told_together(tmp_path, read, name):
    path = write(tmp_path / name, FRAME.rename(columns={"b": "c"}))
    said = refusal(read, path, columns=["a", "b"])
    assert said == "FILE lacks ['b'] and has ['c'], which the fit did not see: give exactly the columns ['a', 'b']"


@BOTH
def test_a_nan_at_prediction_is_named(tmp_path, read, name):
    path = write(tmp_path / name, pd.DataFrame({"a": [1.0, np.nan], "b": [1.0, 2.0]}))
    assert refusal(read, path, columns=["a", "b"]).startswith("FILE: column 'a' has 1 missing or infinite values")


@pytest.mark.parametrize("read", [read_csv, read_parquet, read_npz])
def test_a_file_that_is_not_there_is_named(tmp_path, read):
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(tmp_path / "none"))):
        read(tmp_path / "none", "y", None)


def test_an_npz_comes_back_with_its_values_and_numbered_columns(tmp_path):
    path = npz(tmp_path / "t.npz", x=X, y=Y)
    assert_table(read_npz(path, None, None), X, Y, ("x0", "x1"), "y")


def test_an_npz_takes_the_target_under_its_name(tmp_path):
    path = npz(tmp_path / "t.npz", x=X, y=Y, z=-Y)
    assert_table(read_npz(path, "z", None), X, -Y, ("x0", "x1"), "z")


def test_an_npz_may_hold_one_column_of_integers(tmp_path):
    path = npz(tmp_path / "t.npz", x=np.array([1, 2, 3]), y=np.array([True, False, True]))
    assert_table(read_npz(path, "y", None), np.array([[1.0], [2.0], [3.0]]), np.array([1.0, 0.0, 1.0]), ("x0",), "y")


def test_an_npz_for_prediction_needs_no_target_and_takes_the_names_of_the_fit(tmp_path):
    table = read_npz(npz(tmp_path / "t.npz", x=X), "price", ["size", "rooms"])
    np.testing.assert_array_equal(table.x, X)
    assert (table.y, table.columns, table.target) == (None, ("size", "rooms"), "price")


def test_an_npz_without_x_says_how_to_save_one(tmp_path):
    path = npz(tmp_path / "t.npz", inputs=X, y=Y)
    said = refusal(read_npz, path)
    assert said == "FILE has no array 'x', found ['inputs', 'y']: save it with np.savez(path, x=x, y=y)"


def test_an_npz_without_the_target_names_it(tmp_path):
    path = npz(tmp_path / "t.npz", x=X, y=Y)
    said = refusal(read_npz, path, target="price")
    assert said == "FILE has no target 'price', found ['x', 'y']: name one with --target"


@pytest.mark.parametrize("x", [np.array([["1", "a"]] * 3), np.zeros((3, 2, 2)), np.float64(1.0)])
def test_an_npz_whose_x_is_no_matrix_of_numbers_is_refused(tmp_path, x):
    said = refusal(read_npz, npz(tmp_path / "t.npz", x=x, y=Y))
    assert said == f"FILE: x has shape {x.shape} and type {x.dtype}: give numbers of shape (rows, columns)"


@pytest.mark.parametrize("y", [Y[:2], Y[:, None], np.array(["a", "b", "c"])])
def test_an_npz_whose_target_is_not_one_number_a_row_is_refused(tmp_path, y):
    said = refusal(read_npz, npz(tmp_path / "t.npz", x=X, y=y))
    assert said == f"FILE: y has shape {y.shape} and type {y.dtype}: give 3 numbers, one a row"


def test_an_npz_with_another_number_of_columns_than_the_fit_is_refused(tmp_path):
    said = refusal(read_npz, npz(tmp_path / "t.npz", x=X), columns=["a", "b", "c"])
    assert said == ("FILE: x has 2 columns but the fit had 3, ['a', 'b', 'c']: give the same columns in the same order")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "column"), [("x", "x1"), ("y", "y")])
def test_missing_and_infinite_values_in_an_npz_are_placed(tmp_path, name, column, value):
    arrays = {"x": X.copy(), "y": Y.copy()}
    arrays[name].reshape(3, -1)[2, -1] = value
    said = refusal(read_npz, npz(tmp_path / "t.npz", **arrays))
    assert said == (
        f"FILE: column '{column}' has 1 missing or infinite values, the first in row 2: impute them or drop those rows"
    )


@pytest.mark.parametrize("columns", [None, ["a", "b"]], ids=["fit", "prediction"])
def test_an_npz_without_rows_is_refused(tmp_path, columns):
    said = refusal(read_npz, npz(tmp_path / "t.npz", x=np.zeros((0, 2)), y=np.zeros(0)), columns=columns)
    assert said.startswith("FILE has no rows: give at least one row")


def test_an_npz_of_python_objects_is_never_unpickled(tmp_path):
    path = npz(tmp_path / "t.npz", x=np.array([[1, "a"]], dtype=object), y=np.ones(1))
    said = refusal(read_npz, path)
    assert said.startswith("FILE cannot be read as NPZ of plain numbers: ")
    assert "np.savez(" in said


def damaged_npz(path, kind):
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(100, 2)), y=np.zeros(100))
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    kinds = {"empty": b"", "text": b"hello", "cut": content[:200], "overwritten": content}
    path.write_bytes(kinds[kind])
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "overwritten"])
def test_a_damaged_npz_is_refused_with_advice(tmp_path, kind):
    said = refusal(read_npz, damaged_npz(tmp_path / "t.npz", kind))
    assert said.startswith("FILE cannot be read as NPZ of plain numbers: ")
    assert "np.savez(" in said


def test_a_damaged_npz_is_closed_again(tmp_path):
    path = damaged_npz(tmp_path / "t.npz", "cut")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        refusal(read_npz, path)
        gc.collect()
    assert [str(warning.message) for warning in seen if path.name in str(warning.message)] == []


def test_an_npz_that_would_fill_the_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "t.npz"
    np.savez_compressed(path, x=np.zeros((200_000, 10)), y=np.zeros(200_000))
    assert len(read_npz(path, None, None).x) == 200_000
    monkeypatch.setattr(tables, "BYTES", 2**20)
    assert "bytes would unpack to 17,600,2" in refusal(read_npz, path)


def test_a_parquet_file_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"x": np.zeros(200_000), "y": np.zeros(200_000)}).to_parquet(path)
    monkeypatch.setattr(tables, "BYTES", 2**20)
    assert "would unpack to 3,200,000" in refusal(read_parquet, path, target="y")


def test_a_single_array_saved_as_npz_is_refused_with_advice(tmp_path):
    path = tmp_path / "t.npz"
    with path.open("wb") as stream:
        np.save(stream, X)
    assert "np.savez(" in refusal(read_npz, path)
