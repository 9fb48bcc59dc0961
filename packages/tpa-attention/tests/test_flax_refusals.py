"""flax: what the layer, the model and their calls refuse, by name and before anything changes."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")

import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
from flax import nnx  # noqa: E402
from flax_cases import shapes_of  # noqa: E402
from test_reference_layer import D, d, h  # noqa: E402

from tpa_attention.config import ModelConfig  # noqa: E402
from tpa_attention.flax import T6, TPAttention  # noqa: E402


@pytest.fixture
def unchecked():
    """Without the runtime check of annotations, which would raise before the package's own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def layer_with(**options):
    return shapes_of(lambda: TPAttention(d, h, D, rngs=nnx.Rngs(0), **options))


REFUSED = {
    "variant": ({"variant": "mqa"}, "variant must be one of"),
    "activation": ({"head_activation": "relu"}, "head_activation must be one of"),
    "implementation": ({"implementation": "triton"}, "implementation must be one of None, 'xla', 'cudnn'"),
    "shared ranks": ({"shared_kv_b": True, "k_rank": 1}, "shared_kv_b needs k_rank = v_rank"),
    "free A with bias": ({"a_bias": True, "variant": "noncontextual_a"}, "a_bias needs a contextual A"),
    "factors": ({"factor_dims": (4, 4)}, "product of factor_dims must equal"),
    "chunk": ({"chunk": 0}, "chunk must be >= 1, got 0"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        layer_with(**options)


def test_the_model_takes_tpa_alone_and_leaves_the_choice_of_kernels_to_jax():
    for options, message in (
        ({"mechanism": "mha"}, "mechanism must be one of 'tpa', 'kvonly', got 'mha'"),
        ({"impl": "sdpa"}, "impl must be 'auto' for flax, .* got 'sdpa'"),
    ):
        config = ModelConfig(vocab_size=8, hidden_size=8, num_attention_heads=2, head_dim=4, **options)
        with pytest.raises(ValueError, match=message):
            T6(config, rngs=nnx.Rngs(0))


@pytest.mark.usefixtures("unchecked")
def test_calls_that_do_not_fit_are_refused_before_the_cache_changes():
    layer = nnx.jit(lambda: TPAttention(4, 2, 4, rngs=nnx.Rngs(0)))()
    cache = layer.init_cache(1, 8)
    x = jnp.ones((1, 3, 4))
    for error, message, arguments in (
        (ValueError, r"x must have shape \(B, T, 4\)", {"x": jnp.ones((1, 3, 5))}),
        (ValueError, "batch of x must be that of the cache, 1, got 2", {"x": jnp.ones((2, 3, 4))}),
        (
            ValueError,
            r"attention_mask must have shape \(B, M\) = \(1, 8\)",
            {"attention_mask": np.ones((1, 3), bool)},
        ),
        (TypeError, "attention_mask .B, M. must be bool or integer", {"attention_mask": np.ones((1, 8))}),
        (TypeError, "position_ids must be integers", {"position_ids": np.ones(3)}),
        (ValueError, "position_ids must have shape", {"position_ids": np.arange(2)}),
    ):
        with pytest.raises(error, match=message):
            layer(**({"x": x} | arguments), cache=cache)
    assert cache.lengths[...].tolist() == [0]
    with pytest.raises(TypeError, match="dtype must be a floating type"):
        layer.init_cache(1, 8, jnp.int8)
    with pytest.raises(ValueError, match="max_len must be >= 1, got 0"):
        layer.init_cache(1, 0)
