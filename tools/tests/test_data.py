"""data.py: what the sets contain, that they are the same everywhere, and what is refused."""

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tenfold_tools import data


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """A small standard library in place of the real one."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    (tmp_path / "json" / "test").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    for name, content in {
        "abc.py": b"a" * 10,
        "ast.py": b"b\r\n" * 5,
        "json/__init__.py": b"c" * 10,
        "json/test/test_it.py": b"X" * 10,
        "site.py": b"X" * 10,
        "sitecustomize.py": b"X" * 10,
        "_sysconfigdata__linux.py": b"X" * 10,
        "site-packages/abc.py": b"X" * 10,
        "zipfile.py": b"d" * 10,
    }.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_stdlib_source_is_single_files_by_name_then_packages_with_unix_line_ends(stdlib):
    text = data.stdlib_source(None, held_out=0)
    assert text.train.tobytes() == b"a" * 10 + b"b\n" * 5 + b"d" * 10 + b"c" * 10
    assert text.train.dtype == np.uint8


def test_stdlib_source_holds_out_the_end_of_the_first_files(stdlib):
    text = data.stdlib_source(2, held_out=4)
    assert (text.train.tobytes(), text.test.tobytes()) == (b"a" * 10 + b"b\n" * 3, b"b\n" * 2)
    assert text.sha256 == hashlib.sha256(b"a" * 10 + b"b\n" * 5).hexdigest()


def test_size_cuts_the_text_before_the_end_is_held_out(stdlib):
    text = data.stdlib_source(None, held_out=2, size=12)
    assert (text.train.tobytes(), text.test.tobytes()) == (b"a" * 10, b"b\n")


def test_stdlib_source_is_the_same_in_another_process_and_folder(tmp_path):
    code = "from tenfold_tools import data; print(data.stdlib_source().sha256)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    text = data.stdlib_source()
    assert done.stdout.strip() == text.sha256
    assert len(text.test) == 100_000
    assert len(text.train) > 1_000_000
    assert text.source.startswith("standard library of Python 3.")


def test_the_files_of_the_experiments_hold_nothing_of_this_machine():
    paths = data._stdlib_files()[:120]
    assert len(paths) == 120
    root = Path(sysconfig.get_paths()["stdlib"])
    assert [path for path in paths if path.parent != root] == []
    assert [path.name for path in paths if str(root).encode() in path.read_bytes()] == []


def test_importing_data_loads_no_framework():
    code = (
        "import sys; from tenfold_tools import data; print('torch' in sys.modules, 'sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": 0}, "files must be >= 1 or None, got 0"),
        ({"files": 5}, "files must be at most 4, what this Python has, got 5"),
        ({"held_out": -1, "files": None}, "held_out must be >= 0, got -1"),
        ({"held_out": 40, "files": None}, "held_out must be less than the 40 bytes"),
        ({"held_out": 0, "size": 0, "files": None}, "size must be >= 1 or None, got 0"),
        ({"held_out": 0, "size": 41, "files": None}, "size must be at most 40"),
    ],
)
def test_stdlib_source_refuses_bad_numbers(stdlib, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.stdlib_source(**arguments)


def test_a_python_without_source_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="no source of the standard library in"):
        data.stdlib_source()


def test_local_text_reads_the_users_file_as_it_is(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"one\r\ntwo")
    text = data.local_text(tmp_path / "book.txt", held_out=3)
    assert (text.train.tobytes(), text.test.tobytes(), text.source) == (b"one\r\n", b"two", "book.txt")


def test_local_text_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be an existing file, got .*absent\.txt"):
        data.local_text(tmp_path / "absent.txt")


def test_digits_are_scaled_grey_values_of_ten_classes():
    inputs, targets = data.digits()
    assert inputs.shape == (1797, 64)
    assert (inputs.min(), inputs.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(inputs * 16, np.round(inputs * 16))
    np.testing.assert_array_equal(np.unique(targets), np.arange(10))
    assert (inputs.dtype, targets.dtype) == (np.float64, np.int64)


def test_diabetes_features_have_mean_zero_and_norm_one():
    inputs, targets = data.diabetes()
    assert (inputs.shape, targets.shape) == ((442, 10), (442,))
    # scikit-learn standardises in float64: rounding of sums of 442 numbers
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(inputs, axis=0), 1, atol=1e-12)


def test_split_is_a_partition_that_the_generator_decides():
    samples = data.Samples(np.arange(10.0)[:, None], np.arange(10))
    train, test = data.split(samples, 0.3, np.random.default_rng(1))
    again, _ = data.split(samples, 0.3, np.random.default_rng(1))
    other, _ = data.split(samples, 0.3, np.random.default_rng(2))
    assert (len(train.targets), len(test.targets)) == (7, 3)
    np.testing.assert_array_equal(np.sort(np.concatenate([train.targets, test.targets])), np.arange(10))
    np.testing.assert_array_equal(train.inputs[:, 0], train.targets)
    np.testing.assert_array_equal(train.targets, again.targets)
    assert not np.array_equal(train.targets, other.targets)


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_split_leaves_a_sample_on_each_side(held_out):
    train, test = data.split(data.Samples(np.zeros((3, 1)), np.arange(3)), held_out, np.random.default_rng(0))
    assert min(len(train.targets), len(test.targets)) == 1


def test_split_refuses_fractions_and_sets_that_cannot_be_split():
    samples = data.Samples(np.zeros((1, 1)), np.zeros(1))
    with pytest.raises(ValueError, match=r"held_out must be in \(0, 1\), got 1.0"):
        data.split(samples, 1.0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        data.split(samples, 0.5, np.random.default_rng(0))
