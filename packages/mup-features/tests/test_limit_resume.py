"""Runs of the limit that are taken up again: what was saved, interrupted or continued."""

import threading

import jax
import numpy as np
import pytest
from limit_runs import KEY, limit
from precision import float64
from reference import X, Y

from mup_features.jax import limit_run, replica

OPTIONS = {"depth": 3, "batch": 1, "momentum": 0.5, "weight_decay": 0.1}
TEST = np.array([[0.2, -0.4]])


@pytest.fixture(scope="module")
def whole():
    """Seven uninterrupted steps."""
    with float64(True):
        return limit(**OPTIONS).fit(X, Y, 7, X_test=TEST, every=2)


def assert_same(run, whole):
    np.testing.assert_array_equal(run.steps, whole.steps)
    np.testing.assert_array_equal(run.learning_rates, whole.learning_rates)
    assert run.replicas.keys() == whole.replicas.keys()
    for name, values in whole.replicas.items():
        np.testing.assert_array_equal(run.replicas[name], values, err_msg=name)


def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(x64, whole):
    model = limit(**OPTIONS)
    # The last step of each part is recorded in it, though not in the whole.
    assert model.fit(X, Y, 3, X_test=TEST, every=2).steps.tolist() == [0, 2, 3]
    assert model.resume(5).steps.tolist() == [0, 2, 4, 5]
    assert_same(model.resume(7), whole)


@pytest.mark.parametrize("cores", [1, 2])
def test_replicas_side_by_side_are_those_one_after_another(x64, whole, monkeypatch, cores):
    threads = set()
    product = replica.product

    def noted(*args, **options):
        threads.add(threading.get_ident())
        return product(*args, **options)

    monkeypatch.setattr(replica, "product", noted)
    monkeypatch.setattr(limit_run.os, "cpu_count", lambda: cores)
    assert_same(limit(**OPTIONS).fit(X, Y, 7, X_test=TEST, every=2), whole)
    assert (len(threads) > 1) == (cores > 1)


def test_a_saved_run_is_taken_up_bit_for_bit(x64, whole, tmp_path):
    model = limit(**OPTIONS)
    model.fit(X, Y, 3, X_test=TEST, every=2)
    model.save(tmp_path / "state.npz")
    other = limit(**OPTIONS)
    other.load(tmp_path / "state.npz")
    assert_same(other.resume(7), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_an_interrupted_run_is_taken_up_from_its_last_save(x64, whole, tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    forward = limit_run.forward
    calls = []

    def interrupted(*args, **options):
        calls.append(None)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return forward(*args, **options)

    model = limit(**OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(limit_run, "forward", interrupted)
        model.fit(X, Y, 7, X_test=TEST, every=2, save_to=path, save_every=2)
    with pytest.raises(RuntimeError, match="no state to go on from"):
        model.resume(7)
    model.load(path)
    assert model.state is not None
    assert model.state.step in (2, 4)
    assert_same(model.resume(7), whole)


def test_a_failed_save_leaves_the_one_before(x64, tmp_path, monkeypatch):
    path = tmp_path / "state.npz"
    model = limit()
    model.fit(X, Y, 1, save_to=path)
    before = path.read_bytes()

    def full(*args, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(np, "savez", full)
        model.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.5}, "a state with lr = 0.5, got 0.3"),
        ({"depth": 3}, "a state with depth = 3, got 2"),
        ({"samples": 256}, "a state with samples = 256, got 512"),
        ({"activation": "sin"}, r"a state with activation = \['sin', 'sin'\], got \['tanh', 'tanh'\]"),
        ({"key": jax.random.key(6)}, "a state with key = "),
    ],
)
def test_a_state_of_other_settings_is_refused(x64, tmp_path, options, message):
    model = limit(replicas=1)
    model.fit(X, Y, 0)
    model.save(tmp_path / "state.npz")
    with pytest.raises(ValueError, match=message):
        limit(**({"replicas": 1} | options)).load(tmp_path / "state.npz")


def test_files_of_other_kinds_are_refused(x64, tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("nothing")
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "pickle.npz", description=np.array([{}], dtype=object), allow_pickle=True)
    for name in ("other.npz", "text.npz", "empty.npz", "pickle.npz"):
        with pytest.raises(ValueError, match=f"must be a state saved by mup_features, got '.*{name}'"):
            limit().load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        limit().load(tmp_path / "missing.npz")


def test_there_is_nothing_to_go_on_from_before_a_fit(x64, tmp_path):
    model = limit(key=KEY)
    for call in (lambda: model.resume(3), model.step, lambda: model.save(tmp_path / "state.npz")):
        with pytest.raises(RuntimeError, match="call fit, or load a save"):
            call()


def test_a_run_does_not_go_back(x64):
    model = limit(replicas=1)
    model.fit(X, Y, 2)
    with pytest.raises(ValueError, match="steps must be an integer >= 2, got 1"):
        model.resume(1)


@pytest.mark.parametrize(
    "options", [{"method": "quadrature", "depth": 1, "activation": "identity"}, {"parametrization": "ntp"}]
)
def test_methods_without_a_state_refuse_to_save_it(x64, tmp_path, options):
    model = limit(**options)
    with pytest.raises(ValueError, match="save_to must be None where there is no sampler's state"):
        model.fit(X, Y, 1, save_to=tmp_path / "state.npz")
    model.fit(X, Y, 1, record=())
    with pytest.raises(RuntimeError, match="no state"):
        model.resume(2)
