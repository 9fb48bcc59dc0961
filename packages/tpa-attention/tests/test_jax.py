"""JAX: rotation, product, attention and decoding against the float64 truth and worked value 1; refusals.

Each comparison compiles one program: JAX compiles every operation of an eager call anew for each shape.
"""

import subprocess
import sys

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import reference  # noqa: E402
import reference_rope  # noqa: E402
from jax import experimental  # noqa: E402
from reference_rope import Rope  # noqa: E402
from test_reference import WORKED_LSE, WORKED_OUT, draw, worked_decode  # noqa: E402

from tpa_attention.config import RopeConfig  # noqa: E402
from tpa_attention.jax import materialize, rope, tpa_attention, tpa_decode  # noqa: E402

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else experimental.enable_x64

ROUNDING = 1e-12  # float64: a few hundred operations on numbers of size 1 to 10
SINGLE = 2e-6  # float32: a dozen units in the last place of numbers of size 1 to 10
PRINTED = 1e-13  # the specification prints 14 significant digits of numbers below 2


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Programs here run once on tiny arrays: compiling them well is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def unchecked():
    """Without the runtime check of annotations, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def few(cases, *typical):
    """The typical cases, and the others among the slow tests: compiling each takes a second."""
    return [
        pytest.param(case, id=name, marks=() if name in typical else pytest.mark.slow)
        for name, case in cases.items()
    ]


def arrays(factors, dtype=None):
    return tuple(None if f is None else jnp.asarray(f, dtype) for f in factors)


def run(function, factors, **keywords):
    """`function` of float64 factors, compiled."""
    with enable_x64(True):
        moved = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in keywords.items()}
        traced = {k: v for k, v in moved.items() if isinstance(v, jax.Array)}
        static = {k: v for k, v in moved.items() if k not in traced}
        out = jax.jit(lambda f, t: function(*f, **t, **static))(arrays(factors), traced)
        return jax.tree.map(np.asarray, out)


def assert_close(found, expected, atol=ROUNDING):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------- rotation

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "half": {},
    "interleaved, plus": {"layout": "interleaved", "sign": 1},
    "partial": {"fraction": 0.75, "base": 500.0},
    "partial interleaved": {"fraction": 0.5, "layout": "interleaved"},
    "linear": {"scaling": {"rope_type": "linear", "factor": 4.0}},
    "ntk": {"scaling": {"rope_type": "ntk", "factor": 4.0}},
    "yarn": {"scaling": YARN, "sign": 1},
    "llama3": {"scaling": {**YARN, "rope_type": "llama3"}, "sign": 1},
}


@pytest.mark.parametrize("options", few(ROPES, "interleaved, plus", "partial", "yarn", "llama3"))
def test_rotation_agrees_with_the_truth(options):
    rng = np.random.default_rng(0)
    b, positions = rng.normal(size=(2, 3, 2, 16)), rng.integers(-50, 5000, size=(2, 3))
    config = RopeConfig(**options)
    found = run(lambda b, positions: rope(b, positions, config), (b,), positions=positions)
    assert found.dtype == np.float64
    assert_close(found, reference_rope.rotate(b, positions, Rope(**options)))


def test_no_rotation_returns_what_came_in():
    b = jnp.ones((1, 2, 1, 3))
    assert rope(b, np.arange(2), RopeConfig.none()) is b


def test_float32_rotation_is_exact_at_positions_where_a_float32_angle_is_not():
    positions = np.array([0, 1, 4097, 100_003, 1_048_577, 16_777_217, -1_048_577])
    b = np.random.default_rng(1).normal(size=(1, 7, 1, 64)).astype(np.float32)
    found = jax.jit(lambda b, p: rope(b, p, RopeConfig()))(b, positions)
    assert found.dtype == jnp.float32
    expected = reference_rope.rotate(b.astype(np.float64), positions[None], Rope())
    assert_close(found, expected, SINGLE)
    theta, _ = reference_rope.frequencies(64, Rope())
    naive = np.float32(positions)[:, None] * np.float32(theta)
    assert np.abs(np.cos(naive) - np.cos(positions[:, None] * theta)).max() > 1e-2


def test_rounding_cosines_to_bfloat16_reproduces_the_authors():
    b = np.random.default_rng(2).normal(size=(1, 5, 2, 8)).astype(np.float32)
    configs = RopeConfig(), RopeConfig(dtype="bfloat16")
    exact, rounded = jax.jit(lambda b: [rope(b, jnp.arange(5), config) for config in configs])(b)
    # bfloat16 keeps 8 bits: cos and sin are off by up to 2^-9, and each output sums two products.
    assert 1e-4 < np.abs(exact - rounded).max() < 2 * 2**-9 * np.abs(b).max()


def test_a_factor_free_of_the_token_turns_with_the_positions():
    row = np.random.default_rng(3).normal(size=(1, 1, 2, 8))
    positions = np.arange(6).reshape(2, 3)
    found = run(
        lambda b, positions: rope(b, positions, RopeConfig(fraction=0.5)), (row,), positions=positions
    )
    everywhere = np.broadcast_to(row, (2, 3, 2, 8))
    assert_close(found, reference_rope.rotate(everywhere, positions, Rope(fraction=0.5)))


# ------------------------------------------------------------------------------------------------- attention


def test_heads_are_the_mean_of_outer_products():
    aq, bq, *_ = draw(4)
    for rank_scale in (True, False):
        found = run(lambda a, b, s=rank_scale: materialize(a, b, s), (aq, bq))
        assert_close(found, reference.materialize(aq, bq, rank_scale))
    assert materialize(None, jnp.asarray(bq)).shape == bq.shape


@pytest.mark.parametrize(
    ("T", "M", "window", "kv_only"),
    [(5, 5, None, True), (5, 9, None, False), (9, 5, None, False), (5, 9, 3, True)],
)
def test_causal_attention_agrees_with_the_truth(T, M, window, kv_only):
    factors = draw(5, T, M, kv_only=kv_only)
    expected, _ = reference.tpa_attention(*factors, mask=reference.causal_mask(T, M, window))
    found = run(tpa_attention, factors, window=window)
    assert found.dtype == np.float64
    assert_close(found, expected)
    if T > M:
        assert (found[:, : T - M] == 0).all()  # these queries stand before every key


@pytest.mark.parametrize("E", [6, 12], ids=["narrow values", "wide values"])
def test_float32_attention_through_dot_product_attention_agrees_with_the_truth(E):
    factors = draw(6, 5, 9, E=E)
    expected, _ = reference.tpa_attention(*factors, mask=reference.causal_mask(5, 9))
    found = jax.jit(tpa_attention)(*arrays(factors, jnp.float32))
    assert found.dtype == jnp.float32
    assert_close(found, expected, SINGLE)
    square = draw(6, 9, 9, E=E)
    expected, _ = reference.tpa_attention(*square, mask=reference.causal_mask(9, 9))
    assert_close(jax.jit(tpa_attention)(*arrays(square, jnp.float32)), expected, SINGLE)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=str)
def test_masks_and_biases_of_every_shape_join_causality(dtype):
    rng = np.random.default_rng(7)
    factors = draw(7, 4, 6)
    causal = reference.causal_mask(4, 6)
    tolerance = ROUNDING if dtype == jnp.float64 else SINGLE
    for shape in ((6,), (2, 3, 4, 6)):
        allowed = rng.random(shape) < 0.6
        bias = np.where(allowed, rng.normal(size=shape), -np.inf)
        with enable_x64(dtype == jnp.float64):
            given = arrays(factors, dtype)
            by_mask, by_bias = jax.jit(
                lambda f, m, b: (tpa_attention(*f, mask=m), tpa_attention(*f, mask=b))
            )(given, jnp.asarray(allowed), jnp.asarray(bias, dtype))
        expected, _ = reference.tpa_attention(*factors, mask=causal & allowed)
        assert_close(by_mask, expected, tolerance)
        with np.errstate(invalid="ignore"):
            expected, _ = reference.tpa_attention(
                *factors, mask=causal & allowed, bias=np.where(allowed, bias, 0)
            )
        assert_close(by_bias, expected, tolerance)


def test_attention_without_causality_scale_and_rank_scale_follows_its_arguments():
    factors = draw(8, 4, 6)
    expected, _ = reference.tpa_attention(*factors, scale=0.3, rank_scale=False)
    assert_close(run(tpa_attention, factors, causal=False, scale=0.3, rank_scale=False), expected)


@pytest.mark.parametrize("function", [tpa_attention, tpa_decode])
def test_gradients_are_those_of_the_formulas(function):
    factors = draw(9, 4, 6)
    d_out = np.random.default_rng(10).normal(size=(2, 4, 3, 6))
    mask = reference.causal_mask(4, 6)
    expected = reference.attention_backward(*factors, d_out, mask=mask)
    chunk = {"chunk": 4} if function is tpa_decode else {}
    found = run(
        lambda *f: jax.grad(lambda f: (function(*f, **chunk) * d_out).sum())(f),
        factors,
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("function", [tpa_attention, tpa_decode])
def test_a_query_without_keys_has_zero_gradients(function):
    factors = draw(11, 2, 3)
    allowed = np.array([False, False, True])
    grads = run(lambda *f: jax.grad(lambda f: function(*f, mask=allowed).sum())(f), factors)
    assert all(np.isfinite(g).all() for g in grads)
    assert (grads[0][:, 0] == 0).all()  # aq of the query that would see positions 0 and 1 alone


# --------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("chunk", [2, 512])
def test_worked_decode_agrees_with_the_specification(chunk):
    out, lse = run(tpa_decode, worked_decode(), chunk=chunk, return_lse=True)
    assert_close(out[0, 0], WORKED_OUT, PRINTED)
    assert_close(lse[0, 0], WORKED_LSE, PRINTED)


CASES = {
    "factored Q": {"ranks": (1, 2, 2)},
    "Q formed once": {"ranks": (3, 2, 1)},
    "full Q": {"kv_only": True},
    "many heads, odd": {"H": 7, "ranks": (2, 1, 3), "E": 5},
}


@pytest.mark.parametrize("case", few(CASES, "factored Q", "many heads, odd"))
def test_ragged_decoding_with_window_and_bias_agrees_with_the_truth(case):
    factors = draw(12, 3, 11, B=4, **case)
    lens = np.array([0, 2, 7, 11])
    bias = np.random.default_rng(13).normal(size=(4, case.get("H", 3), 3, 11))
    options = {"seq_lens": lens, "window": 4}
    expected, expected_lse = reference.flash_decode(*factors, bias=bias, **options)
    out, lse = run(tpa_decode, factors, mask=bias, chunk=4, return_lse=True, **options)
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    assert np.isneginf(lse[0]).all() and (out[0] == 0).all()


def test_what_lies_behind_a_sequence_is_never_read():
    aq, bq, *cached = draw(14, 1, 9, B=2)
    lens = np.array([4, 6])
    expected, _ = reference.flash_decode(aq, bq, *cached, seq_lens=lens)
    for f in cached:
        f[0, 4:], f[1, 6:] = np.nan, np.inf
    assert_close(run(tpa_decode, (aq, bq, *cached), seq_lens=lens, chunk=4), expected)


def test_spread_logits_stay_finite():
    aq, bq, ak, bk, av, bv = draw(15, 1, 8)
    bk[:, 3:5] *= 400.0  # exp of the differences overflows and underflows even float64
    expected, expected_lse = reference.flash_decode(aq, bq, ak, bk, av, bv)
    out, lse = run(tpa_decode, (aq, bq, ak, bk, av, bv), chunk=2, return_lse=True)
    assert np.ptp(expected_lse) > 88
    assert_close(out, expected)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-13)  # relative: these are in the hundreds


def test_half_precision_accumulates_in_float32():
    factors = draw(16, 2, 40)
    rounded = arrays(factors, jnp.bfloat16)
    expected, expected_lse = reference.flash_decode(*(np.asarray(f, np.float64) for f in rounded))
    out, lse = jax.jit(lambda f: tpa_decode(*f, chunk=16, return_lse=True))(rounded)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert_close(lse, expected_lse, 1e-5)  # float32 sums of 40 products of bfloat16 numbers
    assert_close(np.asarray(out, np.float64), expected, np.abs(expected).max() * 2**-8)  # one rounding


def test_decoding_maps_over_a_new_axis():
    stacked = [draw(seed, 1, 6) for seed in (17, 18)]
    lens = np.array([[3, 6], [1, 4]])
    found = run(
        lambda *f, lens: jax.vmap(lambda f, n: tpa_decode(*f, seq_lens=n, chunk=4))(f, lens),
        tuple(np.stack(pair) for pair in zip(*stacked, strict=True)),
        lens=lens,
    )
    for i, factors in enumerate(stacked):
        assert_close(found[i], reference.flash_decode(*factors, seq_lens=lens[i])[0])


def test_the_program_does_not_grow_with_the_cache():
    def lines(M):
        factors = arrays(draw(19, 1, M), jnp.float32)
        return len(str(jax.make_jaxpr(lambda f: tpa_decode(*f, chunk=4))(factors)).splitlines())

    assert lines(64) == lines(8)


def test_an_empty_cache_gives_zeros():
    factors = arrays(draw(20, 2, 0), jnp.float32)
    out, lse = tpa_decode(*factors, return_lse=True)
    assert out.shape == (2, 2, 3, 6) and (out == 0).all() and jnp.isneginf(lse).all()
    assert (tpa_attention(*factors) == 0).all()


# -------------------------------------------------------------------------------------------- what is refused

F = arrays(draw(21, 2, 4), jnp.float32)
REFUSED = {
    "integer factor": (
        TypeError,
        "ak must be a floating",
        lambda: tpa_decode(*F[:2], F[2].astype(int), *F[3:]),
    ),
    "shapes": (
        ValueError,
        r"bk \(B, M, R_K, D\).*got aq",
        lambda: tpa_attention(*F[:3], F[3][..., :4], *F[4:]),
    ),
    "full Q": (ValueError, r"bq \(B, T, H, D\)", lambda: tpa_attention(None, F[1][:, :, :2], *F[2:])),
    "too many queries": (
        ValueError,
        "1 to 16 query tokens, got N = 17",
        lambda: tpa_decode(*arrays(draw(0, 17, 20), jnp.float32)),
    ),
    "chunk": (ValueError, "chunk must be >= 1, got 0", lambda: tpa_decode(*F, chunk=0)),
    "window": (ValueError, "window must be >= 1, got 0", lambda: tpa_attention(*F, window=0)),
    "window, no order": (
        ValueError,
        "window needs causal",
        lambda: tpa_attention(*F, window=2, causal=False),
    ),
    "lengths": (ValueError, r"seq_lens must have shape \(B,\)", lambda: tpa_decode(*F, seq_lens=[1])),
    "float lengths": (TypeError, "seq_lens must hold integers", lambda: tpa_decode(*F, seq_lens=[1.0, 2.0])),
    "mask": (ValueError, r"mask must broadcast .*got \(5,\)", lambda: tpa_decode(*F, mask=jnp.ones(5, bool))),
    "integer mask": (TypeError, "mask must be bool", lambda: tpa_decode(*F, mask=jnp.ones(4, int))),
    "product": (ValueError, "a .B, T, R, H. and b", lambda: materialize(F[0], F[3])),
    "positions": (TypeError, "position_ids must be integers", lambda: rope(F[1], [0.0, 1.0], RopeConfig())),
    "how many": (ValueError, r"position_ids must have shape", lambda: rope(F[1], np.arange(3), RopeConfig())),
    "odd width": (ValueError, "even, got 7", lambda: rope(F[1][..., :7], np.arange(2), RopeConfig())),
    "axes": (
        ValueError,
        r"b must have shape \(B, T, R, D\)",
        lambda: rope(F[1][0], np.arange(2), RopeConfig()),
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("error", "message", "call"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_the_name_the_rule_and_the_value(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("namespace", "missing"), [("jax", "jax"), ("flax", "flax"), ("flax", "jax")])
def test_without_the_framework_the_error_says_what_to_install(namespace, missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    import tpa_attention.{namespace}
except ImportError as error:
    assert 'pip install "tpa-attention[{namespace}]"' in str(error), error
    assert error.name == {missing!r}
else:
    raise SystemExit("imported")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
