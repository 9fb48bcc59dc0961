"""flax: every variant against the float64 truth, with and without its cache; torch parity; sharding by heads.

Each comparison compiles one or two programs; what runs is tiny.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import flax_cases  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import reference_layer  # noqa: E402
from flax import nnx  # noqa: E402
from flax_cases import SMALL, random_model, shapes_of, torch_shapes  # noqa: E402
from jax import experimental  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from test_reference_layer import LAYERS, d, hidden  # noqa: E402

from tpa_attention import accounting  # noqa: E402
from tpa_attention.config import RopeConfig  # noqa: E402
from tpa_attention.flax import T6, TPAttention, from_torch, shard_heads  # noqa: E402

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else experimental.enable_x64

ROUNDING = 1e-12  # float64: layers of a hundred products of numbers of size 1 to 10
SINGLE = 2e-6  # float32: what the specification grants against torch, for numbers of size 1 to 3

TYPICAL = ("non-contextual B", "third order, shared B", "KV shift")
VARIANTS = [pytest.param(name, marks=() if name in TYPICAL else pytest.mark.slow, id=name) for name in LAYERS]
forward = nnx.jit(lambda module, x, **options: module(x, **options))
traces = []  # shapes for which `step` was compiled


@nnx.jit
def step(model, cache, ids):
    """Logits of new tokens behind those of the cache."""
    traces.append(ids.shape)
    return model(ids, cache=cache)


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


def assert_close(found, expected, atol=ROUNDING):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_and_its_decoding_agree_with_the_truth(name):
    x = hidden(20)
    expected, kept = reference_layer.forward(LAYERS[name], x)
    with enable_x64(True):
        layer = flax_cases.build(name, chunk=4)
        cache = layer.init_cache(2, 9)
        found = forward(layer, jnp.asarray(x))
        steps = [np.asarray(forward(layer, jnp.asarray(x[:, t : t + 1]), cache=cache)) for t in range(7)]
        held = [f[...] for f in (cache.ak, cache.bk, cache.av, cache.bv) if f is not None]
        assert found.dtype == np.float64
    assert_close(found, expected)
    assert_close(np.concatenate(steps, axis=1), expected)
    assert sum(f[0, 0].size for f in held) == reference_layer.numbers_per_token(kept)


def test_left_padding_changes_no_valid_row_with_or_without_a_cache():
    name = "KV shift"  # the one variant where padding could leak into the next token
    x = hidden(22, T=5, B=1)
    expected, _ = reference_layer.forward(LAYERS[name], x)
    padded = np.concatenate([hidden(23, T=3, B=1), x], axis=1)
    valid = np.arange(10)[None] >= 3
    with enable_x64(True):
        layer = flax_cases.build(name)
        cache = layer.init_cache(1, 10)
        found = forward(layer, jnp.asarray(padded), attention_mask=jnp.asarray(valid[:, :8]))
        rows = [
            np.asarray(forward(layer, jnp.asarray(part), attention_mask=jnp.asarray(valid), cache=cache))
            for part in (padded[:, :4], padded[:, 4:])
        ]
    assert_close(found[:, 3:], expected)
    assert_close(np.concatenate(rows, axis=1)[:, 3:], expected)


def test_long_prompts_fill_the_cache_at_once_or_in_chunks():
    name = "shared B"
    x = hidden(24, T=41)
    expected, _ = reference_layer.forward(LAYERS[name], x)
    with enable_x64(True):
        layer = flax_cases.build(name, chunk=16)
        cache = layer.init_cache(2, 50)
        extend = nnx.jit(lambda layer, cache, x: layer(x, cache=cache))
        # 20 tokens: the first time against an empty cache, the second time behind the first.
        rows = [np.asarray(extend(layer, cache, jnp.asarray(x[:, t : t + 20]))) for t in (0, 20)]
        rows.append(np.asarray(extend(layer, cache, jnp.asarray(x[:, 40:]))))
    assert_close(np.concatenate(rows, axis=1), expected)


# ------------------------------------------------------------------------------------------------------ cache


def test_a_full_cache_raises_and_inside_jit_gives_nan_and_stays_as_it_was():
    with enable_x64(True):
        layer = flax_cases.build("contextual")
        cache = layer.init_cache(2, 6)
        forward(layer, jnp.asarray(hidden(25, T=5)), cache=cache)
        before = jax.tree.map(np.asarray, nnx.state(cache))
        two = jnp.asarray(hidden(26, T=2))
        with pytest.raises(ValueError, match="capacity 6 holds 5 tokens: no room for 2 more"):
            layer(two, cache=cache)
        with pytest.raises(ValueError, match="no room for 7 more"):
            forward(layer, jnp.asarray(hidden(27, T=7)), cache=cache)
        assert np.isnan(forward(layer, two, cache=cache)).all()
        jax.tree.map(np.testing.assert_array_equal, nnx.state(cache), before)


def test_cropped_and_reordered_sequences_go_on_as_they_would_alone():
    model = random_model()
    ids = np.random.default_rng(1).integers(0, 61, size=(2, 4))
    cache = model.init_cache(2, 10)
    whole = step(model, cache, jnp.asarray(ids))
    cache.crop(jnp.asarray([1, 3]))
    assert cache.lengths.tolist() == [1, 3]
    cache.reorder(jnp.asarray([1, 0]))
    assert cache.lengths.tolist() == [3, 1]
    again = step(model, cache, jnp.asarray([ids[1, 3:4], ids[0, 1:2]]))
    assert_close(again[0, 0], whole[1, 3], SINGLE)
    assert_close(again[1, 0], whole[0, 1], SINGLE)
    cache.reset()
    assert_close(step(model, cache, jnp.asarray(ids)), whole, 0)


def test_a_decode_step_compiles_once_and_generation_equals_generation_without_cache():
    model = random_model(2)
    ids = np.random.default_rng(3).integers(0, 61, size=(2, 10))
    cache = model.init_cache(2, 10)
    token = step(model, cache, jnp.asarray(ids[:, :4]))[:, -1].argmax(axis=-1)
    for n in range(4, 10):
        full = forward(model, jnp.asarray(ids))[:, n - 1]  # causal: the tail is not seen
        assert token.tolist() == full.argmax(axis=-1).tolist()
        ids[:, n] = token
        token = step(model, cache, token[:, None])[:, -1].argmax(axis=-1)
    assert traces == [(2, 4), (2, 1)]  # whichever of the tests came first


def test_the_cache_has_the_bytes_of_the_formula():
    config = replace(SMALL, num_hidden_layers=2)
    model = shapes_of(lambda: T6(config, rngs=nnx.Rngs(0)))
    cache = model.init_cache(3, 7, jnp.bfloat16)
    numbers = (2 + 2) * (6 + 8)  # (R_K + R_V)(h + D)
    assert cache.nbytes == 2 * 3 * 7 * numbers * 2
    assert accounting.cache_bytes(config, 3, 7, "bfloat16", padded=False) == cache.nbytes


# --------------------------------------------------------------------------------------------- torch parity

PARITY = {
    "contextual": {"out_norm": True},
    "KV-only, gated, partial rotation": {
        "variant": "kv_only",
        "output_gate": True,
        "rope": RopeConfig(fraction=0.5, sign=1),
        "v_head_dim": 12,
    },
}


@pytest.mark.parametrize("options", PARITY.values(), ids=PARITY.keys())
def test_layer_output_and_gradients_are_those_of_torch(options):
    torch = pytest.importorskip("torch")
    from tpa_attention.torch.layers import TPAttention as TorchTPAttention

    generator = torch.Generator().manual_seed(0)
    sizes = (24, 5, 8, 3, 2, 2)
    theirs = TorchTPAttention(*sizes, **options, zero_init_output=False, generator=generator)
    mine = from_torch(
        theirs.state_dict(), shapes_of(lambda: TPAttention(*sizes, **options, rngs=nnx.Rngs(0)))
    )
    x = np.random.default_rng(4).normal(size=(2, 9, 24)).astype(np.float32)
    y = theirs(torch.from_numpy(x))
    y.square().sum().backward()

    def loss(module, x):
        out = module(x)
        return jnp.square(out).sum(), out

    gradients, found = nnx.jit(nnx.grad(loss, has_aux=True))(mine, jnp.asarray(x))
    assert_close(found, y.detach().numpy(), SINGLE)
    as_torch = {name: p.grad for name, p in theirs.named_parameters()}
    expected = nnx.state(from_torch(as_torch, nnx.clone(mine)), nnx.Param)
    scale = max(float(g.abs().max()) for g in as_torch.values())
    for mine_, theirs_ in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.abs(theirs_).max() > 0
        assert_close(mine_, theirs_, scale * SINGLE)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_model_logits_are_those_of_torch(tied):
    torch = pytest.importorskip("torch")
    from tpa_attention.torch import model as torch_model

    config = replace(SMALL, num_hidden_layers=2, tie_word_embeddings=tied)
    theirs = torch_model.T6(config, generator=torch.Generator().manual_seed(0))
    mine = from_torch(theirs.state_dict(), shapes_of(lambda: T6(config, rngs=nnx.Rngs(0))))
    ids = np.random.default_rng(5).integers(0, 61, size=(2, 12))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).numpy()
    assert_close(forward(mine, jnp.asarray(ids)), expected, SINGLE)


def test_bfloat16_weights_of_torch_load_without_rounding_again():
    torch = pytest.importorskip("torch")
    weights = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        for name, shape in torch_shapes(SMALL).items()
    }
    model = from_torch(weights, shapes_of(lambda: T6(SMALL, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    found = model.model.embed_tokens.embedding[...]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(found, np.float32), weights["model.embed_tokens.weight"].float().numpy()
    )


def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied():
    make = lambda: TPAttention(4, 3, 4, 1, 1, 1, rngs=nnx.Rngs(0))  # noqa: E731
    layer = nnx.jit(make)()
    before = jax.tree.map(np.asarray, nnx.state(layer))
    shapes = {"a": (3, 4), "b": (4, 4)}
    good = {f"{m}_{x}.weight": np.ones(shapes[m]) for m in "ab" for x in "qkv"} | {
        "o.weight": np.ones((4, 12))
    }
    for change, message in (
        (
            {"o.weight": np.ones((12, 4))},
            r"state_dict\['o.weight'\] must have shape \(4, 12\), got \(12, 4\)",
        ),
        ({"gate.weight": np.ones((12, 4))}, "unknown .'gate.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            from_torch(good | change, layer)
    with pytest.raises(ValueError, match=r"missing .'a_k\.weight'"):
        from_torch({name: w for name, w in good.items() if name != "a_k.weight"}, layer)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), before)
    from_torch(good, layer)
    assert (layer.o.kernel[...] == 1).all()


def test_an_output_matrix_that_should_be_tied_must_equal_the_embedding():
    weights = {name: np.ones(shape) for name, shape in torch_shapes(SMALL).items()}
    model = shapes_of(lambda: T6(SMALL, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"lm_head\.weight equal to model\.embed"):
        from_torch(weights | {"lm_head.weight": np.zeros((61, 32))}, model)
    from_torch(weights | {"lm_head.weight": np.ones((61, 32))}, model)


# -------------------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize(
    ("init", "bounds"),
    [  # worked value 4 of the specification: A_Q, A_K, B_Q, B_K of the medium preset
        ("t6", (0.030556616567607, 0.052925612402496, 0.0095404097121522, 0.0095589889112734)),
        pytest.param(
            "xavier",
            (0.067780385838685, 0.073257943575826, 0.065279120983387, 0.072168783648703),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_initial_weights_fill_the_bounds_of_the_specification(init, bounds):
    layer = nnx.jit(lambda: TPAttention(1024, 47, 64, init=init, rngs=nnx.Rngs(params=7)))()
    for factor_map, bound in zip((layer.a_q, layer.a_k, layer.b_q, layer.b_k), bounds, strict=True):
        largest = float(np.abs(factor_map.kernel[...]).max())
        assert 0.999 * bound < largest <= bound * (1 + 1e-6)  # > 90 000 draws reach within 0.1 %
        assert abs(float(factor_map.kernel[...].std()) / (bound / np.sqrt(3)) - 1) < 0.01
    assert (layer.o.kernel[...] == 0).all()


def test_free_factors_start_as_described_and_the_key_decides():
    @partial(nnx.jit, static_argnums=1)
    def make(key, variant):
        return TPAttention(8, 400, 64, 6, variant=variant, rngs=nnx.Rngs(params=key))

    first, again, other = (make(jax.random.key(seed), "noncontextual_a") for seed in (0, 0, 1))
    rows = first.a_q.bias[...]
    assert_close(np.square(rows).mean(axis=-1), 1, 1e-6)  # normalised, in float32
    assert 0.018 < float(rows.std()) < 0.022  # 2400 draws of std 0.02
    free_b = make(jax.random.key(0), "noncontextual_b").b_q.bias[...]
    assert 0.8 < float(free_b.std()) * 8 < 1.2  # N(0, 1/64), 384 draws
    for x in ("a_q", "a_k", "b_v"):
        arrays = [jax.tree.leaves(nnx.state(getattr(layer, x)))[0] for layer in (first, again, other)]
        assert np.array_equal(arrays[0], arrays[1])
        assert not np.array_equal(arrays[0], arrays[2])


def test_parameters_are_as_many_as_the_accounting_counts():
    layer = shapes_of(lambda: TPAttention(64, 5, 16, 6, 2, 2, rngs=nnx.Rngs(0)))
    count = sum(p.size for p in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    sizes = {"d_model": 64, "num_heads": 5, "head_dim": 16, "q_rank": 6, "k_rank": 2, "v_rank": 2}
    assert count == accounting.params("tpa", **sizes)


# -------------------------------------------------------------------------------------------- transformations


def test_the_layer_maps_over_a_new_axis_and_computes_in_the_type_asked_for():
    x = np.random.default_rng(6).normal(size=(3, 2, 5, d))
    with enable_x64(True):
        layer = flax_cases.build("contextual")
        mapped = jax.jit(lambda x: jax.vmap(layer)(x))(jnp.asarray(x))
        half = flax_cases.build("contextual", dtype=jnp.bfloat16)
        assert shapes_of(lambda: half(jnp.asarray(x[0]))).dtype == jnp.bfloat16
    for part, rows in zip(x, mapped, strict=True):
        assert_close(rows, reference_layer.forward(LAYERS["contextual"], part)[0])


def check_sharding():
    mesh = Mesh(np.array(jax.devices()), ("heads",))
    assert mesh.size == 2
    model = random_model()
    ids = jnp.asarray(np.random.default_rng(7).integers(0, 61, size=(2, 9)))
    expected = forward(model, ids)
    model, cache = shard_heads(model, mesh, "heads"), shard_heads(model.init_cache(2, 12), mesh, "heads")
    assert_close(forward(model, ids), expected, SINGLE)
    assert_close(step(model, cache, ids), expected, SINGLE)
    attn, layer = model.model.layers[0].attn, cache.layers[0]
    by_heads = {
        "a_k": (attn.a_k.kernel, P(None, None, "heads")),
        "o": (attn.o.kernel, P("heads")),
        "cached a_k": (layer.ak, P(None, None, None, "heads")),
        "cached b_k": (layer.bk, P()),
        "b_k": (attn.b_k.kernel, P()),
        "embedding": (model.model.embed_tokens.embedding, P()),
    }
    for name, (variable, spec) in by_heads.items():
        value = variable[...]
        assert value.sharding.is_equivalent_to(NamedSharding(mesh, spec), value.ndim), (name, value.sharding)
    one = layer.ak[...].addressable_shards[0].data.shape
    assert one == (2, 12, 2, 3)  # 3 of 6 heads
    odd = shapes_of(lambda: TPAttention(8, 3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="multiple of the 2 devices of axis 'heads', got 3 heads in"):
        shard_heads(odd, mesh, "heads")
    with pytest.raises(ValueError, match="axis must be one of"):
        shard_heads(model, mesh, "model")


def test_two_devices_by_heads_give_the_logits_of_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    here = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {here!r}); import test_flax; test_flax.check_sharding()"
    out = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
