"""Recording nnx models: features as by hand, and no trace in the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mup_features import metrics
from mup_features.flax.features import empirical_ntk, ntk_change, record_features
from mup_features.metrics import compare

N, D, n = 6, 4, 32


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.fc1, self.fc2 = nnx.Linear(D, n, rngs=rngs), nnx.Linear(n, n, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(n, rngs=rngs), nnx.Dropout(0.9, rngs=rngs)
        self.out = nnx.Linear(n, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.norm(self.fc1(x)))
        return self.out(self.drop(jnp.tanh(self.fc2(x))))


@pytest.fixture
def X():  # noqa: N802
    return np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)


def by_hand(net, X):
    """Pre- and post-activations in evaluation mode at initial statistics (mean 0, variance 1)."""
    h1 = net.fc1(X)
    x1 = jnp.tanh(h1 / jnp.sqrt(1 + net.norm.epsilon) * net.norm.scale[...] + net.norm.bias[...])
    h2 = net.fc2(x1)
    found = {"fc1.output": h1, "fc2.input": x1, "fc2.output": h2, "out.input": jnp.tanh(h2)}
    return {name: np.asarray(value, dtype=np.float64) for name, value in found.items()}


def moved(net):
    graph, parameters, rest = nnx.split(net, nnx.Param, ...)
    return nnx.merge(graph, jax.tree.map(lambda p: p * 1.3 + 0.05, parameters), rest)


def test_auto_takes_inputs_of_weight_layers_as_post_and_outputs_as_pre_activations(X):
    net = Net()
    expected = by_hand(net, X)
    both = record_features(net, [X[:4], X[4:]], when="both", tag="init", bounds=(-1.0, 1.0))
    assert list(both.layers) == ["fc1.output", "fc2.input", "fc2.output", "out.input"]
    for name, layer in both.layers.items():
        # float32 matrix products in another order.
        assert layer.features == pytest.approx(expected[name], abs=2e-6)
        assert layer.gram == pytest.approx(metrics.gram(layer.features), rel=1e-13, abs=1e-14)
        assert layer.gram.dtype == np.float64 and layer.saturated is not None
    assert list(record_features(net, X).layers) == ["fc2.input", "out.input"]
    assert list(record_features(net, X, when="pre").layers) == ["fc1.output", "fc2.output"]
    assert both.tag == "init"


def test_patterns_take_other_modules_by_what_goes_in_and_comes_out(X):
    net = Net()
    found = record_features(net, X, ["norm", "fc?"], "both").layers
    assert list(found) == ["fc1.input", "fc1.output", "norm.input", "norm.output", "fc2.input", "fc2.output"]
    assert np.array_equal(found["fc1.input"].features, X)
    assert np.array_equal(found["norm.input"].features, found["fc1.output"].features)


def test_recording_leaves_parameters_statistics_random_states_and_flags_alone(X):
    net = Net()
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(net, (nnx.Param, nnx.BatchStat)))]
    flags = (net.norm.use_running_average, net.drop.deterministic, nnx.Linear.__call__)
    count = int(net.drop.rngs.count[...])
    record_features(net, X, when="both")
    after = jax.tree.leaves(nnx.state(net, (nnx.Param, nnx.BatchStat)))
    assert len(after) == 10 and all(map(np.array_equal, before, after))
    assert (net.norm.use_running_average, net.drop.deterministic, nnx.Linear.__call__) == flags
    assert int(net.drop.rngs.count[...]) == count


@pytest.mark.parametrize(("kind", "passes"), [("snapshot", 3), ("model", 1), ("model", 5)])
def test_a_reference_makes_light_snapshots_comparable(X, kind, passes):
    net, later = Net(), moved(Net())
    before = record_features(net, X, tag="init")
    kept = compare(before, record_features(later, X, tag="end"))
    reference = before if kind == "snapshot" else net
    options = {"keep_features": False, "passes": passes}
    after = record_features(later, X, tag="end", reference=reference, **options)
    report = compare(record_features(net, X, keep_features=False), after)
    for name, expected in kept.measures.items():
        for measure in ("change", "joint_lambda_min", "cka"):
            assert report.measures[name][measure] == pytest.approx(expected[measure], rel=1e-9, abs=1e-12)


def test_tokens_can_be_flattened_averaged_or_samples():
    net = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    h = np.asarray(net(tokens))
    record = lambda reduce: record_features(net, tokens, "", "pre", reduce=reduce).layers[".output"].features  # noqa: E731
    for reduce, expected in [
        ("flatten", h.reshape(2, -1)),
        ("mean", h.mean(1)),
        ("tokens", h.reshape(8, 5)),
        (lambda a: a[:, -1], h[:, -1]),
    ]:
        assert record(reduce) == pytest.approx(expected, abs=1e-6)


def test_shared_inputs_count_once_and_shared_modules_once_for_each_call():
    class Heads(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.embed, self.q = nnx.Embed(7, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
            self.k, self.out = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, ids):
            x = self.embed(ids)
            return self.out(self.q(self.q(x)) * self.k(x))

    found = record_features(Heads(), np.arange(6).reshape(3, 2), when="both").layers
    expected = ["embed.output", "q.input", "q.output", "q.input#2", "q.output#2", "k.output", "out.input"]
    assert list(found) == expected


def test_batches_may_be_pairs_mappings_or_anything_with_a_forward(X):
    net = Net()
    expected = record_features(net, X).layers["out.input"].gram
    own = lambda model, batch: model(batch["x"])  # noqa: E731
    for batch, options in [((X, X[:, 0]), {}), ({"x": X}, {}), ({"x": X, "y": X}, {"forward": own})]:
        assert np.array_equal(record_features(net, [batch], **options).layers["out.input"].gram, expected)


def test_half_precision_features_are_summed_exactly(X):
    net = nnx.Linear(D, n, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer = record_features(net, X, "", "pre").layers[".output"]
    h = np.asarray(net(X).astype(jnp.float32), dtype=np.float64)
    assert layer.gram == pytest.approx(h @ h.T / n, rel=1e-13)


def test_bad_input_is_refused_by_name(X):
    net = Net()
    fewer = record_features(net, X[:3])
    for call, message in [
        (lambda: record_features(net, X, when="after"), "when must be .*, got 'after'"),
        (lambda: record_features(net, X, reduce="max"), "reduce must be .*, got 'max'"),
        (lambda: record_features(net, X, "fc9"), "'fc9' matches none"),
        (lambda: record_features(net, []), "at least one batch"),
        (lambda: record_features(net, X * np.nan), "'fc2.input' must be finite"),
        (lambda: record_features(net, X, reference=fewer), r"shape \(6, 32\), got \(3, 32\)"),
        (lambda: record_features(net, X, reduce=lambda a: a.sum()), "reduce must return an array"),
        (lambda: record_features(nnx.Dropout(0.1), X), "needs a module with a parameter"),
        (lambda: record_features(net, X, "drop", forward=lambda m, x: m.fc1(x)), "of 'drop' none is"),
        (lambda: empirical_ntk(net, X[:0]), r"X must be an array .*, got \(0, 4\)"),
        (lambda: empirical_ntk(nnx.Dropout(0.1), X), "must have an nnx.Param"),
        (lambda: empirical_ntk(net, X, rates={"fc9": 1.0}), "got 'fc9'"),
        (lambda: empirical_ntk(net, X, rates={"fc1.bias": -1.0}), "rates must be >= 0, got -1.0"),
        (lambda: empirical_ntk(net, X, block_size=0), "block_size must be >= 1 or None, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call in (record_features, empirical_ntk):
        with pytest.raises(TypeError, match=r"flax\.nnx\.Module, got int"):
            call(3, X)


class Mlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.fc, self.out = nnx.Linear(D, n, rngs=rngs), nnx.Linear(n, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.fc(x)))


def test_change_of_the_kernel_is_zero_for_a_copy(X):
    net = Mlp()
    found = ntk_change(net, nnx.merge(*nnx.split(net)), X)
    assert found == pytest.approx({"kernel_distance": 0.0, "relative_frobenius_change": 0.0}, abs=1e-12)
    assert ntk_change(net, moved(net), X)["kernel_distance"] > 1e-4
