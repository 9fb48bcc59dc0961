"""Snapshots: what is kept, files, and references."""

import json

import numpy as np
import pytest

from mup_features.metrics import FeatureSnapshot, gram


def arrays(seed, samples=4, n=40):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((samples, n)).astype(np.float32) for name in ("fc1", "fc2")}


def assert_same(first, second):
    assert (first.tag, dict(first.metadata), list(first.layers)) == (
        second.tag,
        dict(second.metadata),
        list(second.layers),
    )
    for name, layer in first.layers.items():
        other = second.layers[name]
        for part, value in vars(layer).items():
            assert type(value) is type(getattr(other, part))
            assert np.array_equal(value, getattr(other, part))


@pytest.mark.parametrize("keep", [True, False])
def test_a_snapshot_survives_a_file_bit_for_bit(tmp_path, keep):
    snapshot = FeatureSnapshot.from_arrays(
        arrays(1),
        "step 5",
        reference=arrays(0),
        keep_features=keep,
        bounds=(-1.0, 1.0),
        sample_keys=np.arange(4.0),
        metadata={"lr": 0.1, "layers": ["a", "b"]},
    )
    snapshot.save(tmp_path / "after.npz")
    loaded = FeatureSnapshot.load(tmp_path / "after.npz")
    assert_same(snapshot, loaded)
    assert np.array_equal(loaded.sample_keys, np.arange(4.0))
    assert [file.name for file in tmp_path.iterdir()] == ["after.npz"]
    with np.load(tmp_path / "after.npz", allow_pickle=False) as stored:
        assert json.loads(str(stored["header"]))["tag"] == "step 5"


def test_a_layer_holds_gram_cross_products_and_displacements_of_its_features():
    A, A0 = arrays(1), arrays(0)
    A["fc1"][:, 3] = 0
    layer = FeatureSnapshot.from_arrays(A, "t", reference=A0, keep_features=False, bounds=(-9.0, 9.0)).layers[
        "fc1"
    ]
    a, a0 = A["fc1"].astype(float), A0["fc1"].astype(float)
    assert layer.features is None and layer.width == 40
    assert layer.gram == pytest.approx(gram(a), abs=1e-14)
    assert layer.cross == pytest.approx(a @ a0.T / 40, abs=1e-14)
    assert layer.displacement == pytest.approx(((a - a0) ** 2).mean(1), rel=1e-13)
    assert layer.reference_squares == pytest.approx((a0**2).mean(1), rel=1e-13)
    assert layer.dead == 1 / 40 and layer.saturated == 0


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "s.npz"
    FeatureSnapshot.from_arrays(arrays(0), "old").save(path)

    def fail(stream, **arrays):
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        FeatureSnapshot.from_arrays(arrays(0), "new").save(path)
    assert FeatureSnapshot.load(path).tag == "old"
    assert list(tmp_path.iterdir()) == [path]


def edited(path, change):
    with np.load(path) as stored:
        parts = dict(stored)
    change(parts)
    np.savez(path, **parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("header"), "header"),
        (lambda parts: parts.pop("0.gram"), "gram"),
        (lambda parts: parts.update({"0.gram": np.eye(3)}), "features of layer 'fc1' must have 3 rows"),
        (
            lambda parts: parts.update({"1.features": np.ones((3, 2))}),
            "features of layer 'fc2' must have 4 rows",
        ),
        (
            lambda parts: parts.update({"1.gram": np.full((4, 4), np.nan)}),
            "gram of layer 'fc2' must be finite",
        ),
        (lambda parts: parts.update(header=np.array('{"format": "snapshot 0"}')), "format must be"),
        (lambda parts: parts.update(header=np.array(["object"], dtype=object)), "allow_pickle"),
    ],
)
def test_a_stale_or_foreign_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "bad.npz"
    FeatureSnapshot.from_arrays(arrays(0), "t").save(path)
    edited(path, change)
    with pytest.raises(ValueError, match=r"bad\.npz") as caught:
        FeatureSnapshot.load(path)
    assert message in str(caught.value)


def test_what_is_no_npz_is_refused_and_a_missing_file_stays_a_missing_file(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="must be a snapshot of this package"):
        FeatureSnapshot.load(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        FeatureSnapshot.load(tmp_path / "none.npz")


def test_a_reference_must_hold_the_features_that_are_asked_for():
    light = FeatureSnapshot.from_arrays(arrays(0), "init", keep_features=False)
    with pytest.raises(ValueError, match="must have kept the features of layer 'fc1'"):
        FeatureSnapshot.from_arrays(arrays(1), "t", reference=light)
    with pytest.raises(ValueError, match="must hold layer 'fc2', got 'fc1'"):
        FeatureSnapshot.from_arrays(arrays(1), "t", reference={"fc1": arrays(0)["fc1"]})
    with pytest.raises(ValueError, match="at least one layer"):
        FeatureSnapshot("t", {})
    with pytest.raises(ValueError, match="features must be"):
        FeatureSnapshot.from_arrays({"fc1": np.ones(3)}, "t")
