"""The data of the experiments: what is taken from them, and files that are none."""

from pathlib import Path

import numpy as np
import pytest

harness = pytest.importorskip("tenfold_tools.claims", reason="the experiments run in the monorepo's workshop")

from tenfold_tools.claims_runner import load_experiments  # noqa: E402

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def sets():
    """data_sets.py, loaded as the runner would."""
    return load_experiments(EXPERIMENTS / "data_sets.py", "mup_features_data_sets")


def test_the_first_four_of_each_class_are_taken_in_order(sets):
    X, Y = sets.load("digits")
    samples = sets.digits()
    own = [np.flatnonzero(samples.targets == label)[:4] for label in range(8)]
    raw = samples.inputs[np.concatenate(own)]
    centred = raw - raw.mean(axis=0)
    np.testing.assert_allclose(X, centred / np.linalg.norm(centred, axis=1, keepdims=True), rtol=1e-12)
    assert (Y.argmax(axis=1) == np.repeat(range(8), 4)).all()
    np.testing.assert_allclose(np.unique(Y), [-0.1, 0.9], rtol=1e-12)


def test_a_class_with_too_few_samples_is_refused(sets):
    with pytest.raises(ValueError, match="4 samples of 2 classes"):
        sets.first_of_each(np.zeros((5, 3)), np.array([0, 0, 0, 0, 1]), 4, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(3000, np.uint8), "records of 3073 bytes, got 3000"),
        (np.zeros(0, np.uint8), "records of 3073 bytes, got 0"),
        (np.full(3073, 10, np.uint8), "labels from 0 to 9, got 10"),
    ],
)
def test_a_file_that_is_not_cifar_is_refused(sets, tmp_path, monkeypatch, content, message):
    content.tofile(tmp_path / "data_batch_1.bin")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        sets.load("cifar")
