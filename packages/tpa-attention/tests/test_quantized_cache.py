"""Eight-bit factors: their error bounds, and a cache of them that decodes in place."""

import pickle
from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_attention.accounting import cache_bytes
from tpa_attention.config import ModelConfig
from tpa_attention.torch.cache import FactorCache, LayerCache
from tpa_attention.torch.factors import RecordLayout
from tpa_attention.torch.layers import TPAttention
from tpa_attention.torch.model import T6
from tpa_attention.torch.quantization import TYPES, quantize_factors, quantize_rows
from tpa_attention.torch.quantized_cache import QuantizedFactorCache

RECORDS = RecordLayout(2, 3, 8), RecordLayout(1, 3, 6)
MODEL = ModelConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=3, head_dim=8, v_rank=1)
# half a step of int8; half of the last of three bits of float8, or half of its smallest step below 2^-6
BOUNDS = {
    "int8": lambda _, scale: scale / 2,
    "fp8_e4m3": lambda x, scale: torch.maximum(x.abs() / 16, scale / 1024),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer():
    sizes = {"q_rank": 2, "k_rank": 2, "v_rank": 1, "v_head_dim": 6}
    generator = torch.Generator().manual_seed(0)
    return TPAttention(16, 3, 8, **sizes, zero_init_output=False, generator=generator)


def caches(kind, batch=2, max_len=10, **options):
    config = layer().cache_layout
    return (
        QuantizedFactorCache(config, batch, max_len, kind=kind, records=RECORDS, **options),
        FactorCache(config, batch, max_len, **options),
    )


def records(batch, tokens, seed=0):
    return tuple(normal(batch, tokens, layout.numbers, seed=seed + i) for i, layout in enumerate(RECORDS))


@pytest.mark.parametrize("kind", TYPES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-20, 1e20), width=st.integers(1, 40))
def test_every_number_comes_back_within_the_bound_of_its_kind(kind, seed, size, width):
    x = size * normal(3, width, seed=seed)
    rows, scale = quantize_rows(x, kind)
    assert rows.dtype == TYPES[kind]
    error = (rows.float() * scale[:, None] - x).abs()
    # 1e-5: the division and the product are rounded to float32
    assert (error <= (1 + 1e-5) * BOUNDS[kind](x, scale[:, None]) + 1e-6 * x.abs()).all()


def quantise_interpreted(x, kinds):
    from tpa_attention.torch.kernels.quant import quantize_rows_triton

    largest = {"int8": 127.0, "fp8_e4m3": 448.0}
    with_nan = x.clone()
    with_nan[0, 0, 1, 3] = torch.nan
    found = []
    for kind in kinds:
        rows, scale = quantize_rows_triton(x, TYPES[kind], largest[kind])
        found.append((rows.float(), scale, quantize_rows_triton(with_nan, TYPES[kind], largest[kind])[1]))
    return found


def test_the_kernel_gives_the_same_rows_and_scales(triton_interpreter):
    x = normal(3, 5, 2, 47)[..., ::2]  # strided
    x[0, 0, 0] = 0
    for kind, found in zip(TYPES, triton_interpreter(quantise_interpreted, x, list(TYPES)), strict=True):
        rows, scale, scale_with_nan = found
        expected, expected_scale = quantize_rows(x, kind)
        assert torch.equal(scale, expected_scale)
        differ = rows != expected.float()
        if kind == "fp8_e4m3":  # the interpreter loses the carry of a number rounded up to a power of two
            differ &= expected.float().abs().log2() % 1 != 0
        assert not differ.any()
        assert scale_with_nan[0, 0].isnan().tolist() == [False, True]


@pytest.mark.slow  # seconds per kernel
@pytest.mark.parametrize(("kind", "name"), [("int8", "i8"), ("fp8_e4m3", "fp8e4nv")])
def test_the_kernel_compiles_for_cuda(kind, name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
    triton = pytest.importorskip("triton", reason="needs triton, which is optional")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tpa_attention.torch.kernels.quant import _quantize_rows

    constants = {"N": 64, "WIDTH": 64, "BLOCK": 32, "ROUND": kind == "int8", "stride_n": 1}
    types = {"x": "*bf16", "rows": "*" + name, "scales": "*fp32", "largest": "fp32"}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in _quantize_rows.arg_names
    }
    code = triton.compile(ASTSource(_quantize_rows, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert ("e4m3" in code.asm["ptx"]) == (kind == "fp8_e4m3")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TYPES)
def test_the_kernel_gives_the_same_rows_and_scales_on_the_gpu(kind):
    x = normal(3, 500, 2, 47).cuda()
    rows, scale = quantize_rows(x, kind)
    expected, expected_scale = quantize_rows(x.cpu(), kind)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(rows.cpu().float(), expected.float())


@pytest.mark.parametrize("kind", TYPES)
def test_torch_library_finds_nothing_wrong(kind):
    torch.library.opcheck(torch.ops.tpa.quantize_rows.default, (normal(2, 3, 8), kind))


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_zeros_stay_zero(kind):
    rows, scale = quantize_rows(torch.zeros(2, 5), kind)
    assert (rows.float() == 0).all()
    assert (scale == 1).all()


@pytest.mark.parametrize("kind", TYPES)
def test_the_scale_of_a_pair_is_the_product_of_both(kind):
    a, b = normal(2, 3, 2, 5), normal(2, 3, 2, 8, seed=1)
    small_a, small_b, scale = quantize_factors(a, b, kind)
    torch.testing.assert_close(scale, quantize_rows(a, kind)[1] * quantize_rows(b, kind)[1])
    assert torch.equal(small_a.float(), quantize_rows(a, kind)[0].float())
    assert quantize_factors(None, b, kind)[0] is None
    assert torch.equal(quantize_factors(None, b, kind)[2], quantize_rows(b, kind)[1])
    with pytest.raises(ValueError, match="a or b must be given"):
        quantize_factors(None, None, kind)
    with pytest.raises(ValueError, match="kind must be one of 'int8', 'fp8_e4m3', got 'int4'"):
        quantize_factors(a, b, "int4")
    assert small_b.shape == b.shape


@pytest.mark.parametrize("kind", TYPES)
def test_decoding_in_place_equals_the_reference_on_what_was_stored(kind):
    cache, _ = caches(kind)
    for step, tokens in enumerate((5, 1, 2)):
        cache.write(0, *records(2, tokens, seed=step))
    cache.crop(torch.tensor([8, 3]))
    cache.write(0, *records(2, 1, seed=9))
    k, v, _ = cache.append(0, *(r[:, :0] for r in records(2, 1)))
    (ak, bk), (av, bv) = (layout.views(r) for layout, r in zip(RECORDS, (k, v), strict=True))
    aq, bq = normal(2, 1, 2, 3, seed=20), normal(2, 1, 2, 8, seed=21)
    out, lse = cache.decode(0, aq, bq, window=5)
    expected, expected_lse = reference.flash_decode(
        *(factor.double().numpy() for factor in (aq, bq, ak, bk, av, bv)),
        seq_lens=cache.seq_lens.numpy(),
        window=5,
    )
    # float32 sums of a few products
    torch.testing.assert_close(out.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), torch.from_numpy(expected_lse), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("fp8_e4m3", 0.05)])
def test_a_layer_decodes_nearly_as_without_quantisation(kind, error):
    attention = layer()
    x = normal(2, 6, 16)
    with torch.no_grad():
        expected = attention(x)
        cache = QuantizedFactorCache(attention, 2, 6, kind=kind)
        rows = torch.cat([attention(x[:, t : t + 1], cache=cache) for t in range(6)], dim=1)
    assert isinstance(cache, LayerCache)
    # numbers are off by 1/254 of their row's largest (int8) or 1/16 of themselves (float8) at most, and by
    # less in the mean; eight seeds gave 0.004 to 0.006 and 0.015 to 0.030
    assert (rows - expected).norm() <= error * expected.norm()
    assert not torch.equal(rows, expected)


def test_bytes_count_records_and_scales():
    cache, plain = caches("int8")
    per_token = 32 + 16 + 4 * 2 + 4 * 1  # 22 and 9 bytes padded to 16, three float32 scales
    assert cache.nbytes == 2 * 10 * per_token
    assert plain.nbytes == 2 * 10 * (24 + 12) * 4


@pytest.mark.parametrize("fixed_shape", [False, True])
def test_beams_state_and_pickle_keep_records_with_their_scales(fixed_shape):
    cache, _ = caches("int8", batch=3, fixed_shape=fixed_shape)
    k, v = records(3, 4)
    before = cache.append(0, k * torch.tensor([1.0, 10.0, 100.0])[:, None, None], v)
    loaded, _ = caches("int8", batch=3, fixed_shape=fixed_shape)
    loaded.load_state_dict(cache.state_dict())
    nothing = tuple(r[:, :0] for r in records(3, 1))
    for copy in (loaded, pickle.loads(pickle.dumps(cache))):  # noqa: S301  our own bytes
        assert torch.equal(copy.append(0, *nothing)[0], before[0])
    cache.reorder(torch.tensor([2, 0, 0]))
    for now, then in zip(cache.append(0, *nothing)[:2], before[:2], strict=True):
        assert torch.equal(now, then[[2, 0, 0]])
    half = loaded.to(dtype=torch.bfloat16)
    assert half.append(0, *nothing)[0].dtype == torch.bfloat16
    assert half.nbytes == cache.nbytes


def test_a_full_cache_refuses_and_stays_as_it_was():
    cache, _ = caches("int8", max_len=3)
    cache.append(0, *records(2, 2))
    state = cache.state_dict()
    with pytest.raises(ValueError, match="cache of capacity 3 holds 2 tokens of layer 0"):
        cache.write(0, *records(2, 2, seed=5))
    with pytest.raises(ValueError, match="k must have shape"):
        cache.write(0, records(2, 1)[0][..., :5], records(2, 1)[1])
    assert all(torch.equal(x, state[name]) for name, x in cache.state_dict().items())


@pytest.mark.parametrize("as_config", [True, False])
def test_the_records_of_a_model_are_those_of_its_layers(as_config):
    cache = QuantizedFactorCache(MODEL if as_config else T6(MODEL, device="meta"), 2, 5, device="meta")
    assert cache.records == (RecordLayout(2, 3, 8), RecordLayout(1, 3, 8))
    assert cache.layout.num_layers == 2
    assert cache.nbytes == cache_bytes(MODEL, 2, 5, quant="int8")


def test_records_that_do_not_fit_the_layout_are_refused():
    config = layer().cache_layout
    with pytest.raises(TypeError, match="records must be two RecordLayouts"):
        QuantizedFactorCache(config, 1, 4)
    with pytest.raises(ValueError, match=r"records must hold 22 and 9 numbers, got \(22, 11\)"):
        QuantizedFactorCache(config, 1, 4, records=(RECORDS[0], RecordLayout(1, 3, 8)))
    with pytest.raises(ValueError, match="kind must be one of"):
        QuantizedFactorCache(config, 1, 4, records=RECORDS, kind="int2")
    with pytest.raises(TypeError, match="where config has no TPAttention layer"):
        QuantizedFactorCache(replace(MODEL, mechanism="gqa", num_key_value_heads=1), 1, 4)
    free = TPAttention(16, 3, 8, q_rank=2, k_rank=1, v_rank=1, variant="noncontextual_a")
    cache = QuantizedFactorCache(free, 1, 4)
    cache.write(0, normal(1, 1, 8), normal(1, 1, 8))
    with pytest.raises(ValueError, match="records must hold both factors"):
        cache.decode(0, normal(1, 1, 2, 3), normal(1, 1, 2, 8))
