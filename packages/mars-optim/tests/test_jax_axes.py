"""Matrices inside leaves of other shapes: `weight_dimension_numbers` of `mars_optim.jax.mars`."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from jax_cases import assert_same, enable_x64, gradients, run  # noqa: E402

from mars_optim.jax import mars  # noqa: E402

TYPES = ("adamw", "lion", "shampoo", "m", "sgd")


@pytest.fixture(autouse=True)
def x64():
    with enable_x64(True):
        yield


def test_row_and_column_axes_make_a_transposed_leaf_move_like_the_matrix_itself():
    rng = np.random.default_rng(12)
    for mars_type in ("shampoo", "m"):
        start = rng.normal(size=(6, 4))
        stream = gradients(rng, ((6, 4),))
        expected = run(mars(0.05, mars_type), [start], stream)
        turned = [([g[0].T], [h[0].T]) for g, h in stream]
        tx = mars(0.05, mars_type, weight_dimension_numbers=[(1, 0)])
        assert_same(run(tx, [start.T], turned), [[x.T for x in xs] for xs in expected])


def test_axes_in_neither_group_index_matrices_that_move_independently():
    rng = np.random.default_rng(13)
    start, stream = [rng.normal(size=(3, 6, 4))], gradients(rng, ((3, 6, 4),))
    for mars_type in TYPES:
        stacked = run(mars(0.05, mars_type, weight_dimension_numbers=[(1, 2)]), start, stream)
        alone = run(mars(0.05, mars_type), list(start[0]), [(list(g[0]), list(h[0])) for g, h in stream])
        assert_same(stacked, [[np.stack(xs)] for xs in alone])


def test_convolution_kernels_take_their_axes_in_any_order():
    rng = np.random.default_rng(14)
    start, stream = rng.normal(size=(8, 3, 3, 2)), gradients(rng, ((8, 3, 3, 2),))
    expected = run(mars(0.05, "shampoo"), [start], stream)

    def hwio(x):
        return x.transpose(1, 2, 3, 0)

    specs = [(3, (0, 1, 2)), ((-1,), [0, 1, 2])]
    if hasattr(optax.contrib, "MuonDimensionNumbers"):  # optax 0.2.6
        specs.append(optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3))
    for spec in specs:
        tx = mars(0.05, "shampoo", weight_dimension_numbers=lambda params, spec=spec: [spec for _ in params])
        moved = run(tx, [hwio(start)], [([hwio(g[0])], [hwio(h[0])]) for g, h in stream])
        assert_same(moved, [[hwio(x) for x in xs] for xs in expected])
