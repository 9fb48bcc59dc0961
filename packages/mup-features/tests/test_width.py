"""Networks of finite width, exact in distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import float64
from reference import ETA, R1_F, R1_K, X, Y, effective, train_networks
from reference_network import draw_weights
from scipy.stats import ks_2samp

from mup_features.jax.activations import resolve
from mup_features.jax.conditioning import RevealedMatrix, grown, orthonormal_rest
from mup_features.jax.kernels import KernelGD, limiting_kernel
from mup_features.jax.losses import resolve_loss
from mup_features.jax.network_step import Network, Start, new_networks, rates_of, train_step
from mup_features.jax.trajectory import DivergedError
from mup_features.jax.width import WidthSimulator
from mup_features.parametrization import Parametrization

BASE = {"depth": 3, "input_dim": 2, "lr": ETA, "reduction": "sum"}
TWO_OUTPUTS = np.stack([Y, [0.3, 0.8]], axis=1)


def dtanh(x):
    return 1 / np.cosh(x) ** 2


def stepped(network, keys, start, coordinates, y, batches, rates, capacities, width):
    """States before and after steps of `train_step`, and what was recorded; the last step only looks."""
    states = new_networks(network, width, coordinates.shape[1], y.shape[1], capacities, start, keys)
    first = jax.tree.map(jnp.copy, states)
    records = []
    for t, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        offsets = jnp.array([t * len(coordinates), t * len(batch)])
        states, record = train_step(
            network,
            states,
            coordinates,
            y,
            jnp.asarray(batch),
            rate,
            start,
            jnp.asarray(t),
            offsets,
            full=True,
        )
        records.append(record)
    return first, states, {name: np.stack([r[name] for r in records]) for name in records[0]}


def completed(matrix: RevealedMatrix, rng) -> np.ndarray:
    """A weight matrix with all the products that were revealed, and anything elsewhere."""
    qx, hx, qy, hy = (np.asarray(part) for part in (matrix.qx, matrix.hx, matrix.qy, matrix.hy))
    unseen_x, unseen_y = np.eye(qx.shape[1]) - qx.T @ qx, np.eye(qx.shape[1]) - qy.T @ qy
    anything = unseen_y @ rng.standard_normal(unseen_x.shape) @ unseen_x
    return hx.T @ qx + qy.T @ hy @ unseen_x + anything


@pytest.mark.parametrize(("whole", "depth"), [(False, 3), (True, 2)], ids=["revealed", "drawn whole"])
def test_a_real_network_with_the_revealed_weights_trains_the_same(x64, whole, depth):
    width, steps, lr, momentum, shrink = 40, 3, 0.4, 0.5, 0.9
    table = Parametrization("ip_bias", sigma=1.5)
    means = np.array([0.0] + [1 / width] * depth)
    start = Start(*map(jnp.asarray, (table.variances(width, depth), means, table.bias_variances(depth))))
    rates = np.array(table.rates(width, depth, lr))
    tanh = resolve("tanh")
    network = Network(
        (tanh.phi,) * depth, (tanh.dphi,) * depth, resolve_loss("mse", "mean"), True, 3, True, True
    )
    rng = np.random.default_rng(0)
    inputs, y = rng.standard_normal((4, 2)), rng.standard_normal((3, 2))  # three samples and a test input
    batches = [np.array(pair) for pair in ([0, 2], [1, 2], [0, 1], [0, 2])]
    moving = rates_of(rates, rates[0], momentum, shrink)
    looking = rates_of(0 * rates, 0.0, 0.0, 1.0)
    first, last, got = stepped(
        network,
        jax.random.split(jax.random.key(3), 1),
        start,
        jnp.asarray(inputs),
        jnp.asarray(y),
        batches,
        [moving] * steps + [looking],
        None if whole else (16, 8),
        width,
    )
    if whole:
        hidden = [np.asarray(m.weight[0]) for m in first.hidden]
    else:
        hidden = [completed(jax.tree.map(lambda a: a[0], m), rng) + 1 / width for m in last.hidden]
    weights = [w[None] for w in [np.asarray(first.first[0]).T, *hidden, np.asarray(first.readout[0])]]
    run = train_networks(
        weights,
        rates,
        inputs,
        np.concatenate([y, np.zeros((1, 2))]),
        steps,
        phi=np.tanh,
        dphi=dtanh,
        batches=batches,
        reduction="mean",
        momentum=momentum,
        shrink=shrink,
        biases=np.asarray(first.biases),
    )
    # Rounding, amplified by three steps.
    np.testing.assert_allclose(got["f"][:, 0], run["f"][:, 0, :3], atol=1e-11)
    np.testing.assert_allclose(got["f_test"][:, 0], run["f"][:, 0, 3:], atol=1e-11)
    for t in range(steps + 1):
        for layer in range(depth):
            h, x, b = (run[name][t][layer][0] for name in ("pre", "post", "b"))
            h0, x0 = run["pre"][0][layer][0, :3], run["post"][0][layer][0, :3]
            for name, gram in (
                ("K_pre", h[:3] @ h[:3].T),
                ("K_post", x[:3] @ x[:3].T),
                ("K_pre_cross", h[:3] @ h0.T),
                ("K_post_cross", x[:3] @ x0.T),
            ):
                np.testing.assert_allclose(got[name][t, 0, layer], gram / width, atol=1e-11)
            within = np.ix_(batches[t], batches[t])
            np.testing.assert_allclose(got["G"][t, 0, layer][within], b @ b.T / width, atol=1e-11)
            assert np.count_nonzero(got["G"][t, 0, layer]) == 4
            change = np.mean(np.linalg.norm(h[:3] - h0, axis=1) / np.linalg.norm(h0, axis=1))
            np.testing.assert_allclose(got["change"][t, 0, layer], change, atol=1e-11)


@pytest.mark.slow
def test_r5_outputs_are_distributed_like_those_of_direct_networks(x64):
    simulator = WidthSimulator(24, **BASE, replicas=1500, conditioning=True, key=jax.random.key(1))
    f = simulator.fit(X, Y, 4, record=()).replicas["f"][:, 4, :, 0]
    variances, rates = effective("mup", 24, 3, ETA)
    weights = draw_weights(np.random.default_rng(1), variances, 24, 2, 1, 1500)
    direct = train_networks(weights, rates, X, Y[:, None], 4, phi=np.tanh, dphi=dtanh)["f"][4, :, :, 0]
    for sample in range(2):
        assert ks_2samp(f[:, sample], direct[:, sample]).pvalue > 0.01
    # The specification's 3000 networks, within 4 standard errors of both means and printed digits.
    np.testing.assert_allclose(f.mean(axis=0), [0.557, -0.338], atol=4 * 0.094 * np.sqrt(1 / 1500 + 1 / 3000))
    np.testing.assert_allclose(f.std(axis=0), [0.094, 0.095], atol=0.008)


@pytest.mark.parametrize("preset", ["mup", "ip", "ip_llr", "ntp", "sp", "sp_const"])
def test_every_preset_has_the_moments_and_distribution_of_direct_networks(x64, preset):
    width, lr, nets = 30, 0.2, 400
    simulator = WidthSimulator(
        width, depth=3, input_dim=2, output_dim=2, lr=lr, batch=2, parametrization=preset, replicas=nets,
        conditioning=True, key=jax.random.key(2),
    )  # fmt: skip
    inputs = np.concatenate([X, [[0.4, -0.7]]])
    y = np.concatenate([TWO_OUTPUTS, [[0.6, -0.2]]])
    run = simulator.fit(inputs, y, 3)
    batch_key = jax.random.split(jax.random.key(2))[0]
    batches = [
        np.sort(np.asarray(jax.random.choice(jax.random.fold_in(batch_key, t), 3, (2,), replace=False)))
        for t in range(4)
    ]
    name = "ip" if preset == "ip_llr" else preset
    variances, rates = effective(name, width, 3, lr)
    first_rates = rates * (width ** np.array([1.0, 0.5, 0.5, 1.0]) if preset == "ip_llr" else 1.0)
    weights = draw_weights(np.random.default_rng(2), variances, width, 2, 2, nets)
    direct = train_networks(
        weights,
        rates,
        inputs,
        y,
        3,
        phi=np.tanh,
        dphi=dtanh,
        batches=batches,
        reduction="mean",
        rates_0=first_rates,
    )
    f = run.replicas["f"].swapaxes(0, 1)
    error = np.sqrt((f.var(axis=1) + direct["f"].var(axis=1)) / nets)
    assert (np.abs(f.mean(axis=1) - direct["f"].mean(axis=1)) < 4 * error).all()
    # 24 numbers: the smallest of as many p-values is below 1e-4 in one seed of 400.
    for t, i, c in np.ndindex(4, 3, 2):
        assert ks_2samp(f[t, :, i, c], direct["f"][t, :, i, c]).pvalue > 1e-4
    norms = np.stack([[np.sum(h[:, 0] ** 2, axis=1) / width for h in step] for step in direct["pre"]])
    got = run.replicas["K_pre"][..., 0, 0].transpose(1, 2, 0)
    for t, layer in np.ndindex(4, 3):
        assert ks_2samp(got[t, layer], norms[t, layer]).pvalue > 1e-4


def test_wide_deep_linear_networks_are_close_to_r1(x64):
    simulator = WidthSimulator(
        20_000,
        **(BASE | {"depth": 2}),
        activation="identity",
        replicas=4,
        key=jax.random.key(0),
        devices=jax.devices()[:1],
    )
    run = simulator.fit(X, Y, 3)
    # Four standard errors and the bias, of order 1/n, and few replicas to estimate the error from.
    assert (np.abs(run.f[1:, :, 0] - R1_F[2]) < 4 * run.stderr("f")[1:, :, 0] + 2e-3).all()
    K = run.K_post[1, 3][np.triu_indices(2)]
    assert (np.abs(K - R1_K[2]) < 4 * run.stderr("K_post")[3, 1][np.triu_indices(2)] + 2e-3).all()
    assert run.stderr("f").max() < 0.02


WIDE = 20_000


@pytest.fixture(scope="module", params=["ntp", "sp"])
def kernel_run(request):
    """Regime and wide networks in it, that also look at the training inputs as test inputs."""
    with float64(True):
        simulator = WidthSimulator(
            WIDE, **(BASE | {"depth": 2}), parametrization=request.param, replicas=4, key=jax.random.key(4)
        )
        return request.param, simulator.fit(X, Y, 3, X[::-1])


def test_wide_networks_of_kernel_regimes_follow_kernel_descent(x64, kernel_run):
    regime, run = kernel_run
    theta = limiting_kernel(X, depth=2, activation="tanh", parametrization=regime)
    for f in run.replicas["f"][..., 0]:
        expected = KernelGD(theta, lr=ETA).predict(Y, range(4), f[0]).train
        # The kernel of one net deviates by order n^{-1/2}.
        np.testing.assert_allclose(f, expected, atol=5 / np.sqrt(WIDE))
        assert np.abs(f[3] - f[0]).max() > 20 / np.sqrt(WIDE)
    assert run.change.max() < 5 / np.sqrt(WIDE)


def test_a_test_input_equal_to_a_training_input_has_its_outputs(kernel_run):
    run = kernel_run[1].replicas
    # Sums over 2e4 entries in another order.
    np.testing.assert_allclose(run["f_test"], run["f"][:, :, ::-1], atol=1e-12)


@pytest.mark.slow
def test_runs_repeat_and_do_not_depend_on_how_replicas_are_grouped_or_what_is_recorded(x64):
    def run(replicas_at_once, **options):
        simulator = WidthSimulator(
            400,
            **(BASE | {"depth": 2}),
            replicas=2,
            replicas_at_once=replicas_at_once,
            conditioning=True,
            key=jax.random.key(0),
        )
        return simulator.fit(X, Y, 4, **options)

    together = run(2)
    np.testing.assert_array_equal(together.f, run(2).f)
    # Sums in another order.
    np.testing.assert_allclose(together.replicas["f"], run(1).replicas["f"], atol=1e-12)
    sparse = run(2, record=("change",), every=3)
    assert sorted(sparse.replicas) == ["change", "f", "loss"]
    np.testing.assert_array_equal(sparse.steps, [0, 3, 4])
    np.testing.assert_allclose(sparse.f, together.f[[0, 3, 4]], atol=1e-12)
    np.testing.assert_allclose(
        together.loss[4], 0.5 * np.sum((together.replicas["f"][:, 4, :, 0] - Y) ** 2) / 2
    )
    assert len(together.learning_rates) == 4


@pytest.mark.slow
def test_bases_grow_without_losing_what_they_hold(x64):
    simulator = WidthSimulator(
        400, **(BASE | {"depth": 2}), replicas=1, conditioning=True, key=jax.random.key(0)
    )
    run = simulator.fit(X, Y, 45, record=("f",), every=45)
    # 92 directions do not fit the 72 rows at the start; training nevertheless ends where it must.
    np.testing.assert_allclose(run.f[-1, :, 0], Y, atol=1e-3)
    matrix = jax.tree.map(lambda a: a + 1.0, grown(_empty_matrix(), 5, 4))
    assert grown(matrix, 8, 9).learned.shape == (9, 8)
    np.testing.assert_array_equal(grown(matrix, 8, 9).learned[:4, :5], matrix.learned)


def _empty_matrix():
    return RevealedMatrix(*(jnp.zeros((2, 6)),) * 4, jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.ones(()))


def test_new_directions_are_orthonormal_and_dependent_rows_add_none(x64):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((50, 4)))[0].T
    rows = rng.standard_normal((5, 50))
    rows[1] = basis[2] * 3
    rows[3] = rows[0] - 2 * rows[2]
    rows[4] = basis[0] + 1e-5 * rows[4]
    new = np.asarray(jax.jit(orthonormal_rest)(basis, rows))
    kept = new[np.abs(new).max(axis=1) > 0]
    assert len(kept) == 3
    whole = np.concatenate([basis, kept])
    np.testing.assert_allclose(whole @ whole.T, np.eye(7), atol=1e-14)
    # What is left outside is below the share that counts as dependent.
    np.testing.assert_allclose(rows @ whole.T @ whole, rows, atol=1e-6)


def test_divergence_carries_what_came_before(x64):
    simulator = WidthSimulator(
        400,
        **(BASE | {"lr": 1e8, "depth": 1}),
        activation="identity",
        parametrization="sp_const",
        replicas=1,
        key=jax.random.key(0),
    )
    with pytest.raises(DivergedError, match="not finite at step") as caught:
        simulator.fit(X, Y, 30)
    assert np.isfinite(caught.value.trajectory.f).all()
    assert len(caught.value.trajectory.steps) >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be an integer >= 1, got 0"),
        ({"replicas_at_once": 0}, "replicas_at_once must be an integer >= 1, got 0"),
        ({"parametrization": "mupp"}, "mupp"),
        ({"parametrization": "ip_llr", "activation": "cos"}, "phi\\(0\\) = 0 for 'ip_llr'"),
    ],
)
def test_bad_settings_are_refused_by_name(x64, options, message):
    with pytest.raises(ValueError, match=message):
        WidthSimulator(**({"width": 8, "key": jax.random.key(0)} | BASE | options))


def test_more_directions_than_the_width_need_the_whole_matrix(x64):
    with pytest.raises(ValueError, match=r"more directions \(10\) than the width \(8\)"):
        WidthSimulator(8, **BASE, conditioning=True, key=jax.random.key(0)).fit(X, Y, 4)


def test_without_float64_nothing_is_simulated():
    with float64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        WidthSimulator(8, **BASE, key=jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_large_first_step_of_ip_moves_the_layers_that_it_should(x64, activation):
    widths, sizes = (2_000, 32_000), []
    for width in widths:
        simulator = WidthSimulator(
            width,
            **(BASE | {"lr": 2.0}),
            activation=activation,
            parametrization="ip_llr",
            replicas=4,
            conditioning=True,
            key=jax.random.key(0),
        )
        run = simulator.fit(X, Y, 3, record=("K",)).replicas
        moved = run["K_pre"] + run["K_pre"][:, :1] - 2 * run["K_pre_cross"]
        squares = np.diagonal(moved, axis1=-2, axis2=-1).mean(axis=(0, -1))
        sizes.append(0.5 * np.log(squares[1:]))
    slopes = (sizes[1] - sizes[0]) / np.log(widths[1] / widths[0])
    # Steps 1, 2, 3 by layers 1, 2, 3. Slope 0 is reached slowly, in powers of n^{-1/2}.
    np.testing.assert_allclose(slopes[:, :2], 0, atol=0.08)
    np.testing.assert_allclose(slopes[1:, 2], 0, atol=0.15)
    if activation == "tanh":  # <xbar^2, x^2_1> vanishes in the limit
        np.testing.assert_allclose(slopes[0, 2], -0.5, atol=0.1)
    else:
        np.testing.assert_allclose(slopes[0, 2], 0, atol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 3])
def test_very_wide_deep_linear_networks_are_r1_within_errors(x64, depth):
    simulator = WidthSimulator(
        30_000, **(BASE | {"depth": depth}), activation="identity", replicas=10, key=jax.random.key(3)
    )
    run = simulator.fit(X, Y, 3)
    # Student's t with nine degrees of freedom is within 6 in all but 2e-4; the bias of order 1/n is below.
    assert (np.abs(run.f[1:, :, 0] - R1_F[depth]) < 6 * run.stderr("f")[1:, :, 0]).all()
    K = run.mean("K_post")[3, -1][np.triu_indices(2)]
    assert (np.abs(K - R1_K[depth]) < 6 * run.stderr("K_post")[3, -1][np.triu_indices(2)]).all()
