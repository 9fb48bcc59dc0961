"""What a conversion refuses, each with the argument's name, the rule and what was given."""

import numpy as np
import pytest
import torch
from reference_baselines import grouped_attention
from test_convert import RELATIVE, ROUNDING, convert, flat, hidden, output
from test_reference_conversion import heads

from tpa_attention.config import RopeConfig
from tpa_attention.torch.convert import mha_to_tpa


def replaced(index, tensor):
    weights = list(flat(heads(0, groups=3)))
    weights[index] = tensor
    return weights


def bad_options():
    w = flat(heads(0, groups=3))
    nan, inf = w[1].clone(), w[3].clone()
    nan[0, 0], inf[1, 2] = float("nan"), float("inf")
    x = torch.from_numpy(hidden())
    zeros = torch.zeros(3, 10, dtype=torch.float64)
    return {
        "K rank": ({"k_rank": 7}, ValueError, r"k_rank must not exceed num_heads, got 7 and 6"),
        "V rank": ({"v_rank": 8}, ValueError, r"v_rank must not exceed num_heads, got 8 and 6"),
        "Q rank": ({"q_rank": 9}, ValueError, r"q_rank must not exceed num_heads, got 9 and 6"),
        "rank 0": ({"k_rank": 0}, ValueError, r"k_rank must be >= 1, got 0"),
        "rank float": ({"v_rank": 2.0}, TypeError, r"v_rank must be an int, got 2.0"),
        "groups": (
            {"num_kv_heads": 4},
            ValueError,
            r"num_kv_heads must divide num_heads, got 4 and 6",
        ),
        "no heads": ({"num_heads": 0}, ValueError, r"num_heads must be >= 1, got 0"),
        "rows of Q": (
            {"weights": replaced(0, w[0][:23])},
            ValueError,
            r"w_q must have a multiple of num_heads = 6 rows, got 23",
        ),
        "rows of V": (
            {"weights": replaced(2, w[2][:11])},
            ValueError,
            r"w_v must have a multiple of num_kv_heads = 3 rows, got 11",
        ),
        "shape of K": (
            {"weights": replaced(1, w[0])},
            ValueError,
            r"w_k must have shape \(12, 10\) with 6 heads and 3 key-value heads, "
            r"got w_q \(24, 10\), w_k \(24, 10\), w_v \(12, 10\), w_o \(10, 24\)",
        ),
        "width of V": (
            {"weights": replaced(2, w[2][:, :9])},
            ValueError,
            r"w_v must have shape \(12, 10\)",
        ),
        "shape of O": (
            {"weights": replaced(3, w[3].T)},
            ValueError,
            r"w_o must have shape \(10, 24\) .* w_o \(24, 10\)",
        ),
        "no matrix": (
            {"weights": replaced(1, w[1].reshape(3, 4, 10))},
            ValueError,
            r"w_k must be a matrix that is not empty, got shape \(3, 4, 10\)",
        ),
        "integers": (
            {"weights": replaced(1, w[1].long())},
            TypeError,
            r"w_k must be a floating tensor, got torch.int64",
        ),
        "another type": (
            {"weights": replaced(2, w[2].float())},
            ValueError,
            r"w_v must have the type and device of w_q, torch.float64 on cpu, got torch.float32 on cpu",
        ),
        "nan": ({"weights": replaced(1, nan)}, ValueError, r"w_k must be finite"),
        "inf": ({"weights": replaced(3, inf)}, ValueError, r"w_o must be finite"),
        "no rope": ({"rope": None}, TypeError, r"rope must be a RopeConfig .* got None"),
        "calibration shape": (
            {"calibration": x[..., :9]},
            ValueError,
            r"calibration must have shape \(B, T, 10\) or \(T, 10\) and hold tokens, got \(2, 7, 9\)",
        ),
        "no tokens": (
            {"calibration": x[:, :0]},
            ValueError,
            r"calibration must have shape .* got \(2, 0, 10\)",
        ),
        "calibration type": (
            {"calibration": x.long()},
            TypeError,
            r"calibration must be a floating tensor, got torch.int64",
        ),
        "zero calibration": (
            {"calibration": zeros},
            ValueError,
            r"calibration must be finite and not all zero",
        ),
        "nan calibration": ({"calibration": zeros / 0}, ValueError, r"calibration must be finite"),
        "refinement alone": (
            {"refine_steps": 3},
            ValueError,
            r"calibration must be given for a refinement, got refine_steps=3",
        ),
        "negative steps": ({"refine_steps": -1}, ValueError, r"refine_steps must be >= 0, got -1"),
        "refined and free": (
            {"refine_steps": 3, "calibration": x, "a_bias": False},
            ValueError,
            r"a_bias must not be False for a refinement, got refine_steps=3",
        ),
        "bias": ({"a_bias": "yes"}, TypeError, r"a_bias must be True, False or None, got 'yes'"),
        "impl": ({"impl": "fast"}, ValueError, r"impl must be one of .* got 'fast'"),
    }


@pytest.mark.parametrize("case", list(bad_options()))
def test_bad_input_is_named_with_what_was_given(case):
    options, error, message = bad_options()[case]
    options = {"k_rank": 2, "v_rank": 2, "num_heads": 6, "num_kv_heads": 3, **options}
    weights = options.pop("weights", flat(heads(0, groups=3)))
    with pytest.raises(error, match=message):
        mha_to_tpa(*weights, **options)


def test_heads_of_odd_width_need_a_rope_that_is_off():
    weights = heads(25, D=3)
    with pytest.raises(ValueError, match=r"width that RoPE rotates must be even, got 3"):
        convert(weights, k_rank=2, v_rank=2)
    layer, _ = convert(weights, k_rank=6, v_rank=6, rope=RopeConfig.none())
    x = hidden()
    np.testing.assert_allclose(
        output(layer, x), grouped_attention(weights, x, None), rtol=RELATIVE, atol=ROUNDING
    )
