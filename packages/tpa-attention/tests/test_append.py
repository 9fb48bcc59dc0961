"""`tpa::append_paged`: new records at their place in the pages and nothing elsewhere; its kernel."""

import pytest
import torch

from tpa_attention.torch.append import append_paged

BLOCKS, SIZE = 6, 4


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(new=3, dtype=torch.float32, records=torch.float32, widths=(10, 7), narrow=0, positions=True):
    """Arguments: two sequences of 2 and 5 tokens, whose new ones cross a page; records may be narrower."""
    k, v = (normal(2, new, width - narrow, seed=i, dtype=records) for i, width in enumerate(widths, 3))
    return {
        "pool_k": normal(BLOCKS, SIZE, widths[0], seed=1, dtype=dtype),
        "pool_v": normal(BLOCKS, SIZE, widths[1], seed=2, dtype=dtype),
        "pool_positions": torch.full((BLOCKS, SIZE), -1, dtype=torch.int32) if positions else None,
        "k": k,
        "v": v,
        "block_table": torch.tensor([[5, 2, 0], [1, 3, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([2, 5], dtype=torch.int32),
        "positions": None if positions is not True else torch.arange(2 * new).view(2, new) + 50,
    }


def expected(arguments):
    """Pools after the call, token by token."""
    pools = [
        arguments[name] if arguments[name] is None else arguments[name].clone()
        for name in ("pool_k", "pool_v", "pool_positions")
    ]
    for b, length in enumerate(arguments["seq_lens"].tolist()):
        for t in range(arguments["k"].shape[1]):
            page, slot = divmod(length + t, SIZE)
            block = int(arguments["block_table"][b, page])
            for pool, name in zip(pools[:2], "kv", strict=True):
                record = arguments[name][b, t]
                pool[block, slot, : len(record)] = record.to(pool.dtype)
            if pools[2] is not None:
                given = arguments["positions"]
                pools[2][block, slot] = length + t if given is None else given[b, t]
    return pools


def written(arguments):
    append_paged(**arguments)
    return [arguments[name] for name in ("pool_k", "pool_v", "pool_positions")]


def same(found, truth):
    for one, other in zip(found, truth, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.cpu(), other.cpu())


CASES = {
    "a few tokens": {},
    "one token": {"new": 1},
    "no token": {"new": 0},
    "narrower than the pool": {"narrow": 2},
    "no positions": {"positions": False},
    "places for positions": {"positions": "place"},
    "many numbers": {"widths": (1500, 20), "new": 2},
    "nothing of V": {"widths": (10, 0)},
    "cast": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16, "records": torch.bfloat16},
}


@pytest.mark.parametrize("name", [*CASES, "float64"])
def test_records_are_written_to_their_place_and_nowhere_else(name):
    arguments = call(**CASES.get(name, {"dtype": torch.float64, "records": torch.float64}))
    truth = expected(arguments)
    same(written(arguments), truth)


def write_interpreted(cases):
    """What the kernel makes of all cases, and of one that does not fit."""
    from tpa_attention.torch.kernels import append as module

    calls, kernel = [], module.append_paged_triton
    module.append_paged_triton = lambda *args: (calls.append(1), kernel(*args))[1]
    try:
        found = [written(arguments) for arguments in cases]
    finally:
        module.append_paged_triton = kernel
    outside = call(new=3)
    outside["seq_lens"] = torch.tensor([10, -2], dtype=torch.int32)
    outside["block_table"][0, 2] = BLOCKS
    kernel(*outside.values())
    return found, len(calls), [outside[name] for name in ("pool_k", "pool_v", "pool_positions")]


def test_the_kernel_writes_the_same_and_nothing_outside_of_the_pages(triton_interpreter):
    cases = [call(**options) for options in CASES.values()]
    cases[0]["k"] = cases[0]["k"].mT.contiguous().mT  # strided
    truths = [expected(arguments) for arguments in cases]
    found, calls, outside = triton_interpreter(write_interpreted, cases)
    assert calls == len(cases)
    for one, truth in zip(found, truths, strict=True):
        same(one, truth)
    untouched = call()
    untouched["pool_k"][1, 0, :10] = untouched["k"][1, 2]  # place 0 of the second sequence: the one that fits
    untouched["pool_v"][1, 0, :7] = untouched["v"][1, 2]
    untouched["pool_positions"][1, 0] = 55
    same(outside, [untouched[name] for name in ("pool_k", "pool_v", "pool_positions")])


@pytest.mark.parametrize("name", ["a few tokens", "no positions", "places for positions"])
def test_torch_library_finds_nothing_wrong(name):
    torch.library.opcheck(torch.ops.tpa.append_paged.default, tuple(call(**CASES[name]).values()))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"seq_lens": torch.tensor([2, 10])},
            ValueError,
            "seq_lens must leave room for 3 new tokens in the 12",
        ),
        ({"seq_lens": torch.tensor([-1, 5])}, ValueError, "seq_lens must leave room"),
        (
            {"block_table": torch.tensor([[5, 6, 0], [1, 3, 0]])},
            ValueError,
            r"block_table must name blocks in \[0, 6\) where tokens go, got \[\[5, 5, 6\], \[3, 3, 3\]\]",
        ),
        ({"seq_lens": torch.tensor([2.0, 5.0])}, TypeError, "seq_lens must hold integers"),
        ({"seq_lens": torch.tensor([2])}, ValueError, r"seq_lens must have shape \(2,\), got \(1,\)"),
        ({"k": torch.zeros(2, 3, 11)}, ValueError, "k must be at most as wide as its pool, 10, got 11"),
        ({"k": torch.zeros(2, 10)}, ValueError, r"k must have 3 axes, got shape \(2, 10\)"),
        ({"v": torch.zeros(2, 2, 7)}, ValueError, r"v must have shape \(2, 3, 7\), got \(2, 2, 7\)"),
        ({"pool_v": torch.zeros(6, 5, 7)}, ValueError, r"pool_v must have shape \(6, 4, 7\)"),
        ({"positions": torch.zeros(2, 2).long()}, ValueError, r"positions must have shape \(2, 3\)"),
        ({"pool_positions": None}, ValueError, "positions must be None where pool_positions is"),
        ({"k": torch.zeros(2, 3, 10, device="meta")}, ValueError, "k must be on cpu like pool_k, got meta"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(changed, error, message):
    arguments = call() | changed
    before = [arguments[name].clone() for name in ("pool_k", "pool_v")]
    with pytest.raises(error, match=message):
        append_paged(**arguments)
    same([arguments["pool_k"], arguments["pool_v"]], before)


@pytest.mark.slow  # seconds per kernel
@pytest.mark.parametrize("positions", [True, False])
def test_the_kernel_compiles_for_cuda(positions, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
    triton = pytest.importorskip("triton", reason="needs triton, which is optional")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tpa_attention.torch.kernels.append import _append_records

    constants = {"WK": 444, "WV": 392, "PAGE": 64, "BLOCK": 512, "k_w": 1, "v_w": 1, "pk_w": 1, "pv_w": 1}
    types = dict.fromkeys(("pool_k", "pool_v", "k", "v"), "*bf16") | {"positions": "*i64"}
    types |= dict.fromkeys(("pool_positions", "block_table", "seq_lens"), "*i32")
    if not positions:
        constants |= {"positions": None, "pool_positions": None}
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in _append_records.arg_names
    }
    code = triton.compile(ASTSource(_append_records, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert code.metadata.shared == 0
    assert "st.global" in code.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_records_are_written_to_their_place_on_the_gpu(name):
    arguments = call(**CASES[name])
    truth = expected(arguments)
    on_gpu = {name: tensor if tensor is None else tensor.cuda() for name, tensor in arguments.items()}
    same(written(on_gpu), truth)


@pytest.mark.gpu
def test_a_cuda_graph_writes_where_lengths_and_table_point_when_it_is_replayed():
    on_gpu = {name: tensor.cuda() for name, tensor in call(new=1).items()}
    append_paged(**on_gpu)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_paged(**on_gpu)
    for lengths, blocks in (((2, 5), [5, 2, 0]), ((8, 7), [5, 2, 4])):
        on_gpu["seq_lens"].copy_(torch.tensor(lengths))
        on_gpu["block_table"][0] = torch.tensor(blocks)
        truth = expected({name: tensor.cpu() for name, tensor in on_gpu.items()})
        graph.replay()
        same([on_gpu[name] for name in ("pool_k", "pool_v", "pool_positions")], truth)
