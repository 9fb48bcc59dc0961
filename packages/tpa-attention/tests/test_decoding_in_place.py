"""Layers that decode from pages and from eight bits as they lie, against all records as a tensor."""

import pytest
import torch
from cache_cases import KINDS, cache_for, tensor
from layer_cases import OPTIONS, build
from test_reference_layer import d

from tpa_attention.config import ModelConfig
from tpa_attention.torch import blockwise
from tpa_attention.torch.baselines import GQA, MHA, MLA
from tpa_attention.torch.cache import FactorCache
from tpa_attention.torch.cache_protocol import DecodesInPlace, decodes_in_place
from tpa_attention.torch.layers import MAX_DECODE_TOKENS, TPAttention
from tpa_attention.torch.model import T6
from tpa_attention.torch.paged_cache import PagedFactorCache

ROUNDING = 1e-12  # the same products of numbers of size 1 to 10, summed in blocks, in float64
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
COMPLETE = [
    *("contextual", "without rank scale", "KV-only", "A with bias", "sigmoid", "partial rotation"),
    *("factor norm", "output norm and gate", "KV shift"),
]
OTHERS = [name for name in OPTIONS if name not in COMPLETE]


def kinds_of(names, thorough):
    """Every kind for the thorough names, one with pages and one in eight bits for the others."""
    return pytest.mark.parametrize(
        ("name", "kind"),
        [(name, kind) for name in names for kind in (KINDS if name in thorough else ("pages", "int8"))],
    )


class Appending:
    """A cache that hides what it can do: layers get all records at each step."""

    def __init__(self, cache):
        self.cache = cache

    def __getattr__(self, name):
        if name in ("decode", "decodes"):
            raise AttributeError(name)
        return getattr(self.cache, name)


class InPlace(Appending):
    """A cache that returns no records."""

    def append(self, *_records):
        raise AssertionError("records were gathered")

    def __getattr__(self, name):
        return getattr(self.cache, name)


def pair(layer, kind, **options):
    return InPlace(cache_for(layer, kind, **options)), Appending(cache_for(layer, kind, **options))


def both(layer, caches, x, **arguments):
    found, expected = (layer(x, cache=cache, **arguments) for cache in caches)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    assert not torch.equal(found, torch.zeros_like(found))
    return found


@kinds_of(COMPLETE, ("contextual", "KV-only", "KV shift"))
def test_a_layer_decodes_in_place_what_it_decodes_from_all_records(name, kind):
    layer, x = build(name), tensor(1)
    caches = pair(layer, kind)
    assert isinstance(caches[0].cache, DecodesInPlace)
    for chunk in x[:, :6].split([3, 1, 2], dim=1):
        both(layer, caches, chunk)


@kinds_of(OTHERS, ("shared B", "third order", "non-contextual A"))
def test_records_that_are_not_what_attention_reads_become_factors_in_place(name, kind):
    layer, x = build(name), tensor(2, tokens=6)
    caches = pair(layer, kind)
    found = torch.cat([both(layer, caches, chunk) for chunk in x.split([5, 1], dim=1)], dim=1)
    if kind.startswith("pages"):
        torch.testing.assert_close(found, layer(x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("shared B", kind) for kind in (*KINDS, "contiguous")),
        *(("third order", "contiguous"), ("non-contextual B", "pages")),
    ],
)
def test_keys_that_rotate_on_load_are_rotated_a_block_at_a_time(name, kind, monkeypatch):
    layer, x = build(name), tensor(26, tokens=40)
    make = (
        (lambda: FactorCache(layer, 2, 40, dtype=x.dtype))
        if kind == "contiguous"
        else (lambda: cache_for(layer, kind, room=40))
    )
    cache, whole = make(), make()
    for one in (cache, whole):
        layer(x[:, :37], cache=one)
        one.crop(torch.tensor([37, 21]))
    expected = layer(x[:, 37:], cache=whole)
    tokens, unpack = [], layer._unpack
    monkeypatch.setattr(layer, "_unpack", lambda k, v, at: (tokens.append(k.shape[1]), unpack(k, v, at))[1])
    monkeypatch.setattr(blockwise, "SCRATCH", 1)
    found = layer(x[:, 37:], cache=cache)
    assert tokens == [16, 16, 8]  # a tile each, and what is left
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@EVERY_KIND
def test_a_prefill_and_the_most_tokens_that_are_decoded_agree_with_all_records(kind):
    layer, x = build("contextual"), tensor(3, tokens=MAX_DECODE_TOKENS + 3)
    gathered, caches = cache_for(layer, kind), pair(layer, kind)
    both(layer, caches, x[:, :MAX_DECODE_TOKENS])
    caches[0].cache.reset()
    with pytest.raises(AssertionError, match="records were gathered"):
        layer(x, cache=caches[0])
    torch.testing.assert_close(
        layer(x, cache=gathered), layer(x), rtol=0, atol=ROUNDING if "pages" in kind else 1.0
    )


@EVERY_KIND
def test_sequences_of_unequal_length_decode_in_place(kind):
    layer, x, more = build("contextual"), tensor(4), tensor(5, tokens=6)
    caches = pair(layer, kind)
    for cache in caches:
        layer(x, cache=cache.cache)
        cache.crop(torch.tensor([9, 2]))
    for chunk in more.split([1, 3, 1, 1], dim=1):
        both(layer, caches, chunk)
    assert [int(n) for n in caches[0].past_length(0)] == [15, 8]


@EVERY_KIND
def test_masks_and_biases_reach_the_cache(kind):
    layer, x = build("contextual"), tensor(6)
    caches = pair(layer, kind)
    for cache in caches:
        layer(x[:, :6], cache=cache.cache)
    heads, fixed = layer.num_heads, kind.endswith("fixed shape")
    seen = torch.ones(2, 24 if fixed else 8, dtype=torch.int64)
    seen[0, :3] = 0
    seen[1] = 0  # a row that sees nothing gives 0
    found = both(layer, caches, x[:, 6:8], attention_mask=seen)
    assert not found[1].any()
    bias = torch.randn(2, heads, 1, 24 if fixed else 9, generator=torch.Generator().manual_seed(7)).double()
    both(layer, caches, x[:, 8:], attention_mask=bias)
    alone = cache_for(layer, kind)
    for chunk in x.split([6, 2, 1], dim=1):
        plain = layer(chunk, cache=alone)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[0, 0], plain[0, 0], rtol=0, atol=1e-3)


@EVERY_KIND
def test_a_mask_that_does_not_fit_is_refused_before_anything_is_written(kind):
    layer, x = build("contextual"), tensor(8)
    cache = cache_for(layer, kind)
    layer(x[:, :5], cache=cache)
    cache.crop(torch.tensor([5, 2]))  # unequal lengths: how long the mask must be is the cache's to say
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        layer(x[:, :1], cache=cache, attention_mask=torch.ones(2, 3, dtype=torch.int64))
    assert [int(n) for n in cache.past_length(0)] == [5, 2]


@EVERY_KIND
def test_beams_decode_in_place_from_the_sequence_they_were_given(kind):
    layer, x, more = build("KV shift"), tensor(9), tensor(10, tokens=2)
    caches = pair(layer, kind)
    for cache in caches:
        layer(x, cache=cache.cache)
        cache.reorder(torch.tensor([1, 1]))
    found = both(layer, caches, more)
    if kind.startswith("pages"):
        expected = layer(torch.cat([x[[1, 1]], more], dim=1))[:, -2:]
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_forks_write_to_copies_of_the_pages_they_share():
    layer, x, more = build("contextual"), tensor(11, batch=1, tokens=6), tensor(12)
    cache = PagedFactorCache(layer, 8, 4, batch=1, dtype=torch.float64)
    layer(x, cache=cache)
    cache.fork(cache.sequences[0])
    found = torch.cat([layer(chunk, cache=InPlace(cache)) for chunk in more.split(3, dim=1)], dim=1)
    expected = layer(torch.cat([x.expand(2, -1, -1), more], dim=1))[:, 6:]
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@EVERY_KIND
def test_a_full_cache_refuses_before_anything_is_written(kind):
    layer, x = build("KV shift"), tensor(13, tokens=8)
    cache = cache_for(layer, kind, room=8)
    layer(x, cache=cache)
    state = cache.state_dict()
    with pytest.raises(ValueError, match=r"no room for 1 more|need 2 more blocks of 4, and 0 of 4"):
        layer(x[:, :1], cache=cache)
    after = cache.state_dict()
    assert state.keys() == after.keys()
    for name, value in state.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


@EVERY_KIND
def test_a_model_generates_the_same_tokens_in_place_and_without_a_cache(kind):
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_attention_heads": 3, "head_dim": 8, "q_rank": 3}
    config = ModelConfig(**sizes, num_hidden_layers=2, zero_init_output=False)
    model = T6(config, dtype=torch.float64, generator=torch.Generator().manual_seed(14)).eval()
    ids = torch.randint(17, (2, 5), generator=torch.Generator().manual_seed(15))
    caches = pair(model, kind)
    whole, new = ids, [ids, ids]
    with torch.no_grad():
        for _ in range(4):
            found, expected = (model(step, cache=cache) for step, cache in zip(new, caches, strict=True))
            torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
            truth = model(whole)[:, -1]
            if kind.startswith("pages"):
                torch.testing.assert_close(found[:, -1], truth, rtol=0, atol=ROUNDING)
            token = truth.argmax(-1, keepdim=True)
            whole, new = torch.cat([whole, token], dim=1), [token, token]


@pytest.mark.parametrize(
    "layer", [MHA(d, 2, 4), GQA(d, 4, 4, 2), MLA(d, 2, 4, 6, 6, 4)], ids=["mha", "gqa", "mla"]
)
def test_baselines_read_gathered_pages(layer):
    layer = layer.double()
    torch.nn.init.normal_(layer.o.weight, generator=torch.Generator().manual_seed(16))
    x = tensor(17)
    for kind in ("pages", "pages of fixed shape"):
        cache = cache_for(layer, kind)
        with torch.no_grad():
            found = torch.cat([layer(chunk, cache=cache) for chunk in x.split([4, 1, 1, 3], dim=1)], dim=1)
            torch.testing.assert_close(found, layer(x), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_an_implementation_asked_for_gets_all_records(impl):
    layer, x = build("contextual", impl=impl), tensor(18, tokens=3)
    with pytest.raises(AssertionError, match="records were gathered"):
        layer(x, cache=InPlace(cache_for(layer, "pages")))


def test_gradients_flow_to_the_query_of_a_cache_read_in_place():
    layer, x = build("contextual"), tensor(19)
    for kind in KINDS:
        caches, grads = pair(layer, kind), []
        for cache in caches:
            with torch.no_grad():
                layer(x[:, :8], cache=cache.cache)
            layer.zero_grad()
            layer(x[:, 8:], cache=cache).square().sum().backward()
            grads.append(layer.b_q.matrix.grad.clone())
        torch.testing.assert_close(*grads, rtol=0, atol=1e-10)  # sums of squares of outputs of size 10
        assert grads[0].any()


def decode_interpreted(cases):
    """Rows of layers that decode by kernels alone, gathering nothing, and of the same without a cache."""
    x = tensor(27, tokens=4).float()
    found = []
    for name, kind in cases:
        generator = torch.Generator().manual_seed(28)
        layer = TPAttention(d, 3, 8, 2, 2, 1, **OPTIONS[name], zero_init_output=False, generator=generator)
        expected = layer(x)
        layer.impl = "triton"
        cache = InPlace(cache_for(layer, kind, dtype=torch.float32))
        with torch.no_grad():
            rows = torch.cat([layer(chunk, cache=cache) for chunk in x.split([3, 1], dim=1)], dim=1)
        found.append((name, kind, rows, expected.detach()))
    return found


def test_layers_decode_in_place_by_the_kernels(triton_interpreter):
    cases = [
        ("contextual", "pages of fixed shape"),
        ("contextual", "int8"),
        ("KV-only with non-contextual A", "pages"),
    ]
    for name, kind, rows, expected in triton_interpreter(decode_interpreted, cases):
        # float32 sums in another order, and 1/254 of each row's largest number in eight bits
        error = (rows - expected).norm() / expected.norm()
        assert error < (0.02 if kind == "int8" else 1e-5), (name, kind, error)


def test_free_head_factors_are_asked_for_where_records_hold_none():
    for name in ("contextual", "non-contextual A"):
        layer = build(name)
        cache = cache_for(layer, "pages")
        layer(tensor(29), cache=cache)
        records, free = (layer.k_record, layer.v_record), torch.ones(1, 1, 2, 3).double()
        query = torch.ones(2, 1, 2, 3).double(), torch.ones(2, 1, 2, 8).double()
        wrong = (free, free) if layer.k_record.has_a else None
        with pytest.raises(ValueError, match="free_a be given iff they hold no A"):
            cache.decode(0, *query, records, free_a=wrong)


def test_a_contiguous_cache_is_read_in_place_by_its_views():
    layer = build("contextual")
    assert not decodes_in_place(FactorCache(layer, 1, 1))
    assert decodes_in_place(cache_for(layer, "pages"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("contextual", kind) for kind in KINDS), ("KV-only with non-contextual A", "pages")],
)
def test_a_layer_decodes_in_place_on_the_gpu(name, kind):
    options = OPTIONS[name] | {"zero_init_output": False, "generator": torch.Generator().manual_seed(24)}
    layer = TPAttention(64, 6, 32, 4, 2, 2, **options).cuda()
    x = tensor(25, tokens=40, width=64).float().cuda()
    cache = cache_for(layer, kind, room=48, dtype=torch.float32, device="cuda")
    plain = Appending(cache_for(layer, kind, room=48, dtype=torch.float32, device="cuda"))
    with torch.no_grad():
        for chunk in x.split([20, 1, 16, 3], dim=1):
            found = layer(chunk, cache=InPlace(cache) if chunk.shape[1] <= MAX_DECODE_TOKENS else cache)
            # float32 sums in another order, values of size 1; with TF32 off on both ways
            torch.testing.assert_close(found, layer(chunk, cache=plain), rtol=1e-4, atol=1e-4)
