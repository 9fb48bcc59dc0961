"""Two gloo processes against one: tensor parallelism, FSDP2 and decoding from a cache split by tokens.

Tolerances: sums over heads, ranks and parts of a cache are formed in another order, which costs a few units
in the last place of numbers of size 1: 1e-12 in float64, 1e-6 in float32.
"""

import itertools

import pytest
import torch
from torch import nn

from tpa_attention.accounting import cache_bytes
from tpa_attention.config import ModelConfig
from tpa_attention.torch import T6, FactorCache, RecordLayout, TPAttention, tpa_decode, tpa_decode_factors
from tpa_attention.torch.parallel import HeadParallel, head_range, tensor_parallel_plan

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
WIDTH, HEADS, HEAD_DIM = 12, 4, 6
LAYERS = {
    "contextual": {},
    "KV-only": {"variant": "kv_only"},
    "non-contextual A": {"variant": "noncontextual_a"},
    "KV-only, non-contextual A": {"variant": "kv_only+noncontextual_a"},
    "A with bias": {"a_bias": True, "fused_proj": False},
    "non-contextual B": {"variant": "noncontextual_b"},
    "shared B": {"shared_kv_b": True},
    "third order": {"factor_dims": (2, 3)},
    "sigmoid, other width of V": {"head_activation": "sigmoid", "v_head_dim": 5},
    "norms and gate": {"out_norm": True, "factor_norm": True, "output_gate": True},
    "KV shift": {"kv_shift": True},
    "uneven heads": {"num_heads": 5},
    "uneven heads, KV-only, gate": {"num_heads": 3, "variant": "kv_only", "output_gate": True},
    "all parameters": {
        "a_bias": True,
        "out_norm": True,
        "output_gate": True,
        "kv_shift": True,
        "num_heads": 3,
    },
}
QUICK_LAYERS = ("contextual", "all parameters")


def randomised(module, seed=1):
    """All parameters drawn anew: W^O starts at zero, where the gradients of all others vanish."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return module


def layer(num_heads=HEADS, dtype=torch.float64, **options):
    return randomised(TPAttention(WIDTH, num_heads, HEAD_DIM, 3, 2, 2, dtype=dtype, **options))


def hidden_states(batch=2, tokens=5, seed=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, WIDTH, generator=generator, dtype=dtype)


def head_mask(heads, tokens):
    """A mask that differs between heads and leaves every query its own key."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(2, heads, tokens, tokens, generator=generator) < 0.7
    return mask | torch.eye(tokens, dtype=torch.bool)


def loss_of(y):
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype).view_as(y)
    return (y * weights + y.square()).sum()


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------- tensor parallelism


def tensor_parallel_layers(rank, world_size, names):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    from tpa_attention.torch.parallel import full_state_dict

    mesh = init_device_mesh("cpu", (world_size,))
    for name in names:
        options = LAYERS[name]
        single, split = layer(**options), layer(**options)
        whole_heads, shapes = single.num_heads, {n: p.shape for n, p in single.named_parameters()}
        parallelize_module(split, mesh, tensor_parallel_plan(split))
        first, last = head_range(whole_heads, world_size, rank)
        assert split.num_heads == last - first, name
        assert all(isinstance(p, DTensor) for p in split.parameters()), name
        state = full_state_dict(split)
        assert {n: v.shape for n, v in state.items()} == shapes, name
        single.load_state_dict(state)

        mask = head_mask(whole_heads, 5)
        x, x_split = hidden_states().requires_grad_(), hidden_states().requires_grad_()
        y, y_split = single(x, attention_mask=mask), split(x_split, None, mask)
        assert_close(y_split, y, 1e-12)
        loss_of(y).backward()
        loss_of(y_split).backward()
        assert_close(x_split.grad, x.grad, 1e-12)
        for (n, p), q in zip(single.named_parameters(), split.parameters(), strict=True):
            if whole_heads % world_size == 0:  # torch 2.8 replicates gradients of uneven shards
                assert q.grad.placements == q.placements, (name, n)
            assert p.grad.abs().max() > 1e-3, (name, n)
            assert_close(q.grad.full_tensor().view_as(p), p.grad, 1e-11)

        x = hidden_states(tokens=7)
        whole, part = (FactorCache(m, 2, 8, dtype=torch.float64) for m in (single, split))
        for tokens in (slice(0, 4), slice(4, 5), slice(5, 7)):
            with torch.no_grad():
                assert_close(split(x[:, tokens], cache=part), single(x[:, tokens], cache=whole), 1e-12)


def sequence_parallel_layer(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = init_device_mesh("cpu", (world_size,))
    sequence = layer()
    parallelize_module(
        sequence,
        mesh,
        HeadParallel(input_layouts=Shard(1), output_layouts=Shard(1), use_local_output=False),
    )
    single, x = layer(), hidden_states(tokens=6).requires_grad_()
    own = x.detach().chunk(world_size, 1)[rank].clone().requires_grad_()
    y = sequence(own)
    assert y.placements == (Shard(1),)
    assert_close(y.full_tensor(), single(x), 1e-12)
    y.redistribute(placements=[Replicate()]).to_local().sum().backward()
    single(x).sum().backward()
    assert_close(own.grad, x.grad.chunk(world_size, 1)[rank], 1e-12)
    with pytest.raises(ValueError, match="module must not be split by heads already"):
        parallelize_module(sequence, mesh, HeadParallel())
    lonely = layer(num_heads=1)
    before = dict(lonely.named_parameters())
    with pytest.raises(ValueError, match=r"a head for each of the 2 ranks of the mesh.*got 1 heads"):
        parallelize_module(lonely, mesh, HeadParallel())
    assert dict(lonely.named_parameters()) == before and lonely.num_heads == 1
    with pytest.raises(ValueError, match="attention_mask must have 1 or 4 heads, got 2"):
        sequence(x, None, head_mask(2, 6))
    square = init_device_mesh("cpu", (1, world_size))
    with pytest.raises(ValueError, match="device_mesh must have 1 dimension, got 2"):
        HeadParallel()._apply(lonely, square)
    with pytest.raises(TypeError, match="module must be a TPAttention, got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, HeadParallel())


def test_layers_split_by_heads_compute_and_train_as_on_one_device(run_distributed):
    run_distributed(tensor_parallel_layers, 2, QUICK_LAYERS)


@pytest.mark.slow
def test_every_variant_splits_by_heads(run_distributed):
    run_distributed(tensor_parallel_layers, 2, tuple(LAYERS), timeout=120)


@pytest.mark.slow
def test_split_layer_takes_and_returns_dtensors_along_the_sequence(run_distributed):
    run_distributed(sequence_parallel_layer, 2)


CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    head_dim=HEAD_DIM,
    q_rank=3,
    k_rank=2,
    v_rank=1,
    intermediate_size=21,  # odd: split unevenly
)


def model(dtype=torch.float64):
    return randomised(T6(CONFIG, dtype=dtype))


def batch_of_ids(rows=4):
    return torch.randint(CONFIG.vocab_size, (rows, 6), generator=torch.Generator().manual_seed(5))


def next_token_loss(logits, ids):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(trained, ids, optimizer_type=torch.optim.SGD, steps=2):
    """The loss of each step."""
    optimizer = optimizer_type(trained.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = next_token_loss(trained(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def sharded_models(rank, world_size, dtype):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import parallelize_module

    from tpa_attention.torch.parallel import fsdp2_plan, full_state_dict

    ids = batch_of_ids()
    mesh = init_device_mesh("cpu", (world_size,))
    tolerance = TOLERANCE[dtype]
    single = model(dtype)
    losses = train(single, ids)

    split = model(dtype)
    parallelize_module(split, mesh, tensor_parallel_plan(split))
    assert_close(train(split, ids), losses, tolerance)
    assert_states_close(full_state_dict(split), single.state_dict(), tolerance)
    cache = FactorCache(split, 2, 5, dtype=dtype)
    assert cache.nbytes == cache_bytes(CONFIG, 2, 5, str(dtype).removeprefix("torch."), tp=world_size)

    sharded = fsdp2_plan(model(dtype), mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    held = sum(p.to_local().numel() for p in sharded.parameters())
    assert held < 0.6 * sum(p.numel() for p in sharded.parameters())
    mean = train(sharded, ids.chunk(world_size)[rank])
    dist.all_reduce(mean)
    assert_close(mean / world_size, losses, tolerance)
    assert_states_close(full_state_dict(sharded), single.state_dict(), tolerance)
    with pytest.raises(ValueError, match="model must contain T6Block or TPAttention modules, got Linear"):
        fsdp2_plan(nn.Linear(2, 2), mesh)


def both_plans(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from tpa_attention.torch.parallel import fsdp2_plan, full_state_dict

    ids = batch_of_ids()
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("data", "heads"))
    single, both = model(), model()
    parallelize_module(both, mesh["heads"], tensor_parallel_plan(both))
    fsdp2_plan(both, mesh["data"])
    losses = train(single, ids, torch.optim.AdamW)
    # AdamW divides by the size of the gradient, which enlarges rounding where gradients are small
    assert_close(train(both, ids, torch.optim.AdamW), losses, 1e-11)
    assert_states_close(full_state_dict(both), single.state_dict(), 1e-10)


def assert_states_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance)


def test_models_train_sharded_as_on_one_device(run_distributed):
    run_distributed(sharded_models, 2, torch.float64)


@pytest.mark.slow
def test_models_train_sharded_in_single_precision(run_distributed):
    run_distributed(sharded_models, 2, torch.float32)


@pytest.mark.slow
def test_both_plans_apply_to_one_model(run_distributed):
    run_distributed(both_plans, 2)


def test_record_of_a_rank_falls_in_its_head_part_alone():
    # spec h: h = 32, D = 128, rank 2 + 2, p = 8
    first, last = head_range(32, 8, 3)
    assert (first, last) == (12, 16)
    assert 2 * RecordLayout(2, 32, 128).numbers == 640
    assert 2 * RecordLayout(2, last - first, 128).numbers == 528


def test_heads_are_cut_as_torch_chunks_them_or_refused():
    for heads in range(1, 20):
        for ranks in range(1, 9):
            parts = torch.arange(heads).chunk(ranks)
            if len(parts) < ranks:
                with pytest.raises(ValueError, match=f"{ranks} ranks of the mesh.* got {heads} heads"):
                    head_range(heads, ranks, 0)
                continue
            ranges = [head_range(heads, ranks, rank) for rank in range(ranks)]
            assert ranges == [(int(part[0]), int(part[-1]) + 1) for part in parts]


def test_plan_refuses_what_it_cannot_split():
    with pytest.raises(ValueError, match=r"head_activation must be 'none' or 'sigmoid'.*got 'softmax'"):
        tensor_parallel_plan(nn.Sequential(layer(head_activation="softmax")))
    with pytest.raises(ValueError, match=r"head_activation must be 'none' or 'sigmoid'.*got 'softmax'"):
        tensor_parallel_plan(layer(head_activation="softmax"))
    with pytest.raises(ValueError, match="model must contain TPAttention layers, got Linear"):
        tensor_parallel_plan(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------- context parallel

LENGTHS = torch.tensor([11, 0, 4, 7])  # tokens of each sequence
PARTS = torch.tensor([[6, 0, 4, 0], [5, 0, 0, 7]])  # of which each rank holds


CASES = (  # queries, window, bias
    (1, None, False),
    (1, None, True),
    (1, 3, False),
    (3, None, False),
    (3, 4, True),
)


def cached_factors(kv_only=False, dtype=torch.float64, queries=1, spread=1.0):
    """Queries and 11 cached tokens of 4 sequences, ranks (3, 2, 2), 3 heads, D = 4, E = 5."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    aq = None if kv_only else draw(4, queries, 3, 3)
    bq = draw(4, queries, 3, 4)
    keys = torch.ones(11, dtype=dtype)
    keys[6:] = spread
    return (
        aq,
        bq,
        draw(4, 11, 2, 3),
        draw(4, 11, 2, 4) * keys[:, None, None],
        draw(4, 11, 2, 3),
        draw(4, 11, 2, 5),
    )


def part_of(tensor, rank, placement):
    """What a rank holds of each sequence, behind which there is garbage."""
    rows = []
    for length, share, row in zip(LENGTHS.tolist(), PARTS[:, :].T.tolist(), tensor, strict=True):
        start = sum(share[:rank])
        own = row[start : start + share[rank]] if placement == "contiguous" else row[:length][rank::2]
        garbage = torch.full((7 - own.shape[0], *own.shape[1:]), torch.nan, dtype=own.dtype)
        rows.append(torch.cat([own, garbage]))
    return torch.stack(rows)


def decode_parts(rank, world_size):
    from tpa_attention.torch.parallel import context_parallel_decode

    for placement in ("contiguous", "interleaved"):
        lengths = PARTS[rank] if placement == "contiguous" else (LENGTHS - rank + 1) // 2
        for gather_numbers in (1 << 16, 0):
            decode = context_parallel_decode(placement=placement, gather_numbers=gather_numbers)
            for case in itertools.product(CASES, TOLERANCE, (False, True)):
                check(decode, rank, lengths, *case)

    decode = context_parallel_decode()
    # log-sum-exps that differ by far more than exp can hold
    aq, bq, *kv = cached_factors(spread=400.0)
    expected, lse = tpa_decode_factors(aq, bq, *kv, seq_lens=LENGTHS, return_lse=True, impl="reference")
    own = [part_of(f, rank, "contiguous") for f in kv]
    out, total = decode.factors(aq, bq, *own, seq_lens=PARTS[rank], return_lse=True)
    assert (lse.isfinite() & (lse.abs() > 176)).any()
    assert_close(out, expected, 1e-12)
    assert_close(total, lse, 1e-12)
    assert out[1].eq(0).all() and total[1].eq(-torch.inf).all()

    # a rank without a single token, not even room for one
    own = [f[:, :11] if rank == 0 else f[:, :0] for f in kv]
    assert_close(decode.factors(aq, bq, *own), tpa_decode_factors(aq, bq, *kv), 1e-12)

    # records, dense and paged; the device holds exactly its share
    records = (RecordLayout(2, 3, 4), RecordLayout(2, 3, 5))
    k, v = (r.pack(a, b) for r, a, b in zip(records, kv[::2], kv[1::2], strict=True))
    k, v = (torch.cat([cache, cache[:, :1]], 1) for cache in (k, v))  # 12 tokens
    sizes = {"ranks": (2, 2), "num_heads": 3, "head_dim": 4, "v_head_dim": 5}
    expected = tpa_decode(aq, bq, k, v, **sizes)
    for placement in ("contiguous", "interleaved"):
        decode = context_parallel_decode(placement=placement)
        my_k, my_v = (cache[:, decode.own_tokens(12)] for cache in (k, v))
        assert my_k.numel() * world_size == k.numel() and my_v.numel() * world_size == v.numel()
        assert_close(decode(aq, bq, my_k, my_v, **sizes), expected, 1e-12)
        pages = [cache.reshape(4 * 2, 3, -1) for cache in (my_k, my_v)]
        table = torch.arange(8).view(4, 2)
        assert_close(decode(aq, bq, *pages, block_table=table, **sizes), expected, 1e-12)

    with pytest.raises(ValueError, match="placement must be"):
        context_parallel_decode(placement="striped")
    with pytest.raises(ValueError, match="window must be"):
        decode(aq, bq, my_k, my_v, window=0, **sizes)


def check(decode, rank, lengths, case, dtype, kv_only):
    queries, window, biased = case
    aq, bq, *kv = cached_factors(kv_only, dtype, queries)
    bias = own_bias = None
    if biased:
        bias = torch.randn(4, 3, queries, 11, generator=torch.Generator().manual_seed(7)).to(dtype)
        own_bias = part_of(bias.movedim(-1, 1), rank, decode.placement).nan_to_num(0.0).movedim(1, -1)
    options = {"window": window, "return_lse": True}
    expected = tpa_decode_factors(aq, bq, *kv, seq_lens=LENGTHS, attn_bias=bias, impl="reference", **options)
    own = [part_of(f, rank, decode.placement) for f in kv]
    actual = decode.factors(aq, bq, *own, seq_lens=lengths, attn_bias=own_bias, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, TOLERANCE[dtype])


def test_cache_split_by_tokens_decodes_as_on_one_device(run_distributed):
    run_distributed(decode_parts, 2)
