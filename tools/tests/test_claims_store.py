"""Report files: strict JSON, whole at every moment, and plain about what cannot be stored."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold_tools import claims_store as store
from tenfold_tools.claims import Measurement, NotRun, Number, Run, claim

HEAD = {"version": "0.1.0", "commit": None, "modified": False, "fingerprint": "f"}


def record_of(outcome, root: Path = Path("/nowhere")):
    described = claim("R1", sentence="It works.", source="Table 1")(lambda _run: outcome)
    return store.record(described, Run("quick", (0,)), HEAD, outcome, 1.0, root)


@given(st.floats(), st.floats(), st.floats(), st.floats())
def test_no_measurement_whatever_its_numbers_breaks_strict_json(value, low, high, published):
    try:
        number = Number("x", value, low, high, published=published)
    except ValueError:
        return
    entry = record_of(Measurement([number], [], configurations=[{"lr": value, "grid": (low, [high])}]))
    stored = json.loads(json.dumps(entry, allow_nan=False))["numbers"][0]
    for name, original in (("value", value), ("low", low), ("high", high), ("published", published)):
        assert stored[name] == (original if math.isfinite(original) else None)


def test_arrays_and_numpy_scalars_become_plain_values():
    configuration = {"lr": np.float32(0.5), "steps": np.int64(3), "on": np.bool_(True), 1: np.arange(3)}
    entry = record_of(Measurement([], [], configurations=[configuration]))
    assert entry["configurations"] == [{"lr": 0.5, "steps": 3, "on": True, "1": [0, 1, 2]}]


def test_what_json_cannot_hold_is_refused_with_its_place():
    with pytest.raises(TypeError, match=r"configurations\[0\]\['path'\] must be .*, got PosixPath"):
        record_of(Measurement([], [], configurations=[{"path": Path("x")}]))


def test_a_traceback_begins_at_the_experiment_and_hides_where_the_workspace_lies():
    def experiment(_run):
        raise RuntimeError("no")

    described = claim("R1", sentence="It works.", source="Table 1")(experiment)
    root = Path(__file__).parent
    try:
        described(Run("quick", (0,)))
    except RuntimeError as error:
        assert error.__traceback__ is not None
        error = error.with_traceback(error.__traceback__.tb_next)  # begins in claims.py, as under the runner
        entry = store.record(described, Run("quick", (0,)), HEAD, error, 1.0, root)
    assert str(root) not in entry["traceback"]
    assert entry["traceback"].count('File "') == 1
    assert "in experiment" in entry["traceback"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "alpha.json"
    store.write(path, {"number": 1})

    def interrupt(_handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write(path, {"number": 2})
    assert json.loads(path.read_text()) == {"number": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_a_part_of_a_file(tmp_path):
    path = tmp_path / "alpha.json"
    store.write(path, {"text": ["0"] * 20_000})
    done = threading.Event()
    seen = []

    def read():
        while not done.is_set():
            seen.append(len(set(json.loads(path.read_text())["text"])))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        store.write(path, {"text": [str(number)] * 20_000})
    done.set()
    reader.join()
    assert set(seen) == {1}


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    path = tmp_path / "alpha.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write(path, {"number": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_files_set_aside_do_not_overwrite_one_another(tmp_path):
    path = tmp_path / "alpha.json"
    for content in ("one", "two"):
        path.write_text(content)
        store.set_aside(path)
    assert [(tmp_path / f"alpha.json.set-aside-{n}").read_text() for n in (1, 2)] == ["one", "two"]


def test_a_written_document_reads_back_and_a_field_less_is_noticed(tmp_path):
    path = tmp_path / "alpha.json"
    document = HEAD | {
        "schema": store.SCHEMA,
        "package": "alpha",
        "environment": {},
        "scale": "quick",
        "device": "cpu",
        "claims": [record_of(NotRun("needs a GPU"))],
    }
    store.write(path, document)
    assert store.read(path) == document
    for name in document:
        store.write(path, {key: entry for key, entry in document.items() if key != name})
        with pytest.raises(store.Unreadable, match=name):
            store.read(path)
    for name in document["claims"][0]:
        if name == "required_from":  # told to the reader of the JSON, used by nothing
            continue
        short = {key: entry for key, entry in document["claims"][0].items() if key != name}
        store.write(path, document | {"claims": [short]})
        with pytest.raises(store.Unreadable, match=name):
            store.read(path)
