"""Recording in bounded memory: passes, sketches, and what a loader must keep to."""

import tracemalloc

import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import drawn

from mup_features import metrics
from mup_features.flax.features import record_features
from mup_features.metrics import compare

N, D, n = 6, 4, 32
OUTPUT = {"layers": "", "when": "pre"}


@pytest.fixture
def X():  # noqa: N802
    return np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)


def net(width=n, seed=0):
    return drawn(lambda: nnx.Linear(D, width, use_bias=False, rngs=nnx.Rngs(0)), seed)


def recorded(model, loader, **options):
    return record_features(model, loader, **OUTPUT, **options).layers[".output"]


@pytest.mark.parametrize("passes", [3, 40])
def test_batches_and_passes_change_nothing_but_memory(X, passes):
    model = net()
    # dead, saturated and other columns
    model.kernel[...] = model.kernel[...].at[:, :5].set(0.0).at[:, 7:11].multiply(1e3)
    whole = recorded(model, X, bounds=(-1.0, 1.0))
    parts = recorded(model, [X[:4], X[4:]], bounds=(-1.0, 1.0), passes=passes)
    # float32: the size of a batch may change the order of its sums
    assert parts.features == pytest.approx(whole.features, rel=1e-5, abs=1e-6)
    for layer in (whole, parts):
        # float64, another order of sums
        assert layer.gram == pytest.approx(metrics.gram(layer.features), rel=1e-13)
    assert whole.dead == parts.dead == 5 / n
    assert whole.saturated == pytest.approx(parts.saturated, rel=1e-13)
    assert whole.saturated > 0.1
    assert (parts.width, parts.sketch) == (n, None)


def test_more_passes_take_less_memory():
    model, many = net(1 << 14), np.zeros((256, D), np.float32)

    def peak(passes):
        tracemalloc.start()
        try:
            recorded(model, many, keep_features=False, passes=passes)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # One pass holds 256 x 2^14 entries of 4 bytes, and their copy of 8 bytes in pieces of 16 MB at most.
    assert peak(1) > (16 << 20)
    assert peak(16) < (8 << 20)


def test_a_sketch_keeps_inner_products_and_is_the_same_for_any_batches(X):
    wide = net(4_000)
    exact = recorded(wide, X)
    found = recorded(wide, X, max_features=1000)
    again = recorded(wide, [X[:4], X[4:]], max_features=1000, passes=3)
    other = recorded(wide, X, max_features=1000, seed=1)
    assert (found.width, found.sketch, found.features.shape) == (4_000, 1000, (N, 1000))
    assert found.dead is None
    assert again.features == pytest.approx(found.features, rel=1e-5, abs=1e-6)  # float32 products
    scale = np.sqrt(np.outer(np.diag(exact.gram), np.diag(exact.gram)))
    for sketch in (found, other):
        # 7 standard deviations of an inner product, 1 / sqrt(1000) of the norms
        assert np.abs(sketch.gram - exact.gram).max() < 0.22 * scale.max()
        assert sketch.gram == pytest.approx(sketch.features @ sketch.features.T / 1000, rel=1e-4, abs=1e-6)
    assert np.abs(found.gram - other.gram).max() > 1e-3


def test_narrow_layers_are_not_sketched_and_sketches_can_be_compared(X):
    snapshots = [record_features(net(seed=seed), X, **OUTPUT, max_features=16) for seed in (0, 1)]
    kept = compare(*snapshots).measures[".output"]
    light = recorded(net(), X, max_features=n)
    assert (light.sketch, light.dead) == (None, 0.0)
    options = {"max_features": 16, "keep_features": False, "passes": 2}
    for reference in (snapshots[0], net()):
        after = record_features(net(seed=1), X, **OUTPUT, reference=reference, **options)
        found = compare(snapshots[0], after).measures[".output"]
        assert found["change"] == pytest.approx(kept["change"], rel=1e-5)  # float32 features
    assert (after.metadata["max_features"], after.metadata["seed"]) == (16, 0)
    with pytest.raises(ValueError, match=r"must have .* 'jax', 3\)\), got .* 'jax', 0\)\)"):
        record_features(net(), X, **OUTPUT, reference=snapshots[0], max_features=16, seed=3)
    with pytest.raises(ValueError, match=r"must have shape \(6, 8\), got \(6, 16\)"):
        record_features(net(), X, **OUTPUT, reference=snapshots[0], max_features=8)


def test_later_snapshots_compile_nothing(X):
    traced = []

    def forward(model, x):
        traced.append(len(x))
        return model(x)

    model, batches = net(), [X[:4], X[4:]]
    options = {"forward": forward, "max_features": 16, "passes": 2}
    before = recorded(model, batches, **options)
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: m(X).mean())(model))
    after = recorded(model, batches, **options)
    assert traced == [4, 2]
    assert np.abs(after.features - before.features).max() > 1e-3


def test_a_model_that_jit_could_not_hash_is_recorded(X):
    class Listed(nnx.Linear):
        """A set among its attributes."""

    model = Listed(D, n, use_bias=False, rngs=nnx.Rngs(0))
    model.names = {"a", "b"}
    with pytest.raises(TypeError, match="unhashable"):
        hash(nnx.graphdef(model))
    assert recorded(model, X).features == pytest.approx(X @ np.asarray(model.kernel[...]), abs=1e-6)


class Shuffled:
    """Another order of samples each time."""

    def __init__(self, X):
        self.X, self.times = X, 0

    def __iter__(self):
        self.times += 1
        return iter([np.roll(self.X, self.times, 0)])


class Moody(nnx.Module):
    """A second layer for large batches only."""

    def __init__(self):
        self.first, self.second = net(), nnx.Linear(n, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.second(self.first(x)) if len(x) > 2 else self.first(x)


def test_what_would_mix_up_samples_or_features_is_refused(X):
    words = X[:, None] * np.ones((1, 3, 1), np.float32)
    for call, message in [
        (lambda: record_features(net(), X, max_features=0), "max_features must be >= 1 or None, got 0"),
        (lambda: record_features(net(), X, seed=-1), "seed must be >= 0, got -1"),
        (lambda: record_features(net(), X, passes=0), "passes must be >= 1, got 0"),
        (lambda: record_features(net(), X, bounds=(1.0, -1.0)), r"bounds must be .*, got \(1.0, -1.0\)"),
        (lambda: recorded(net(), iter([X]), passes=2), r"iterable 2 times \(passes\), got an iterator"),
        (lambda: recorded(net(), Shuffled(X), passes=2), "same samples in each pass"),
        (lambda: recorded(net(), [words, words[:, :2]]), r"in all batches, got 96 and 64; .* reduce='mean'"),
        (lambda: record_features(Moody(), [X, X[:2]]), r"same layers .*, got \['second.input'\] and \[\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
