"""Decode kernels of other packages: timed where they can be imported, named as missing where not.

All are for CUDA and keep caches as (B, M, G, D) or in blocks of 64 tokens:

- flash-attn `flash_attn_with_kvcache`: MHA, GQA and MQA.
- flashinfer `single_decode_with_kv_cache` for one sequence, its paged wrapper for several (planned once,
  outside the timing, and not held in a CUDA graph).
- FlashMLA `flash_mla_with_kvcache`: MLA with d_c = 512 and d_R = 64, the only widths it has.
- The authors' FlashTPA: `tpa_decode_parallel_bn_triton`, their split kernels for rank 1 and for any rank,
  from the folder that the environment variable TPA_AUTHORS names (`decode/` of github.com/tensorgi/TPA, MIT,
  rank 1 at 3a6e04b, any rank at 55349a6; the former imports `xopes.utils`). They take a tensor per factor.
  Their errors are their own: partial results are kept in 16 bits, and the merge of the rank-1 file reads LSEs
  with the stride of a single head.

Sources: the packages' documentation and code; the first three were not installed where this was written.
"""

import importlib
import os
import sys
from collections.abc import Callable

import torch
from contenders import PAGE, Contender, Random, Step, Workload, attention
from torch import Tensor

FLASH_MLA = (512, 64)


class Unusable(Exception):  # noqa: N818 - says what is wrong, not that we failed
    """A peer is there and cannot run this."""


def peer_contenders(
    work: Workload, device: str, dtype: torch.dtype
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The peers that work here, and the others with the reason.

    Args:
        work: sizes.
        device: where the caches are.
        dtype: of the caches.
    """
    finders: dict[str, Callable[[], dict[str, Contender]]] = {
        "flash-attn": lambda: flash_attn(work, device, dtype),
        "flashinfer": lambda: flashinfer(work, device, dtype),
        "FlashMLA": lambda: flash_mla(work, device, dtype),
        "the authors' FlashTPA": lambda: flash_tpa(work, device, dtype),
    }
    lineup: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name, find in finders.items():
        try:
            found = find()
            if not device.startswith("cuda"):
                raise Unusable("it runs on CUDA only")
            lineup |= found
        except ImportError as problem:
            absent[name] = f"not installed: {problem}"
        except Unusable as problem:
            absent[name] = f"not usable here: {problem}"
    return lineup, absent


def flash_attn(work: Workload, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    """`flash_attn_with_kvcache` with as many key-value heads as each mechanism has."""
    from flash_attn import flash_attn_with_kvcache

    def build(groups: int) -> Step:
        q, k, v = heads(work, groups, Random(device, dtype))
        return Step(
            lambda: flash_attn_with_kvcache(q, k, v),
            lambda: grouped_truth(q[0, 0], k, v),
            2 * k.numel() * k.itemsize,
        )

    return grouped("flash-attn", work, build)


def flashinfer(work: Workload, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    """One request by its own kernel, a batch by the paged wrapper with pages in order."""
    import flashinfer as package

    def single(groups: int) -> Step:
        q, k, v = heads(work, groups, Random(device, dtype))
        return Step(
            lambda: package.single_decode_with_kv_cache(q[0, 0], k[0], v[0])[None],
            lambda: grouped_truth(q[0, 0], k, v),
            2 * k.numel() * k.itemsize,
        )

    def batched(groups: int) -> Step:
        if work.tokens % PAGE:
            raise Unusable(f"M must be a multiple of {PAGE}, got {work.tokens}")
        q, k, v = heads(work, groups, Random(device, dtype))
        blocks = work.tokens // PAGE
        pages = [cache.view(-1, PAGE, groups, work.width) for cache in (k, v)]
        workspace = torch.zeros(2**27, dtype=torch.uint8, device=device)
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            torch.arange(work.batch + 1, dtype=torch.int32, device=device) * blocks,
            torch.arange(work.batch * blocks, dtype=torch.int32, device=device),
            torch.full((work.batch,), PAGE, dtype=torch.int32, device=device),
            *(work.heads, groups, work.width, PAGE),
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return Step(
            lambda: wrapper.run(q[:, 0], tuple(pages)),
            lambda: grouped_truth(q[0, 0], k, v),
            2 * k.numel() * k.itemsize,
            capturable=False,
        )

    return grouped("flashinfer", work, single if work.batch == 1 else batched)


def flash_mla(work: Workload, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    """FlashMLA's kernel on a cache of blocks in order."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    if (work.latent, work.rotary) != FLASH_MLA:
        raise Unusable(f"it has d_c 512 and d_R 64 alone, this set has {work.latent} and {work.rotary}")
    if work.tokens % PAGE:
        raise Unusable(f"M must be a multiple of {PAGE}, got {work.tokens}")
    width = work.latent + work.rotary

    def build() -> Step:
        draw = Random(device, dtype)
        q, cache = draw(work.batch, 1, work.heads, width), draw(work.batch, work.tokens, 1, width)
        blocks = work.tokens // PAGE
        table = torch.arange(work.batch * blocks, dtype=torch.int32, device=device).view(work.batch, blocks)
        lens = torch.full((work.batch,), work.tokens, dtype=torch.int32, device=device)
        plan, splits = get_mla_metadata(lens, work.heads, 1)
        scale = (work.width + work.rotary) ** -0.5

        def call() -> Tensor:
            paged = cache.view(-1, PAGE, 1, width)
            return flash_mla_with_kvcache(
                *(q, paged, table, lens, work.latent, plan, splits), softmax_scale=scale, causal=True
            )[0]

        def truth() -> Tensor:
            keys = cache[0, :, 0].double()
            return attention(q[0, 0].double(), keys, keys[:, : work.latent], scale)

        return Step(call, truth, cache.numel() * cache.itemsize)

    return {"FlashMLA 512+64": Contender(build, width)}


def flash_tpa(work: Workload, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    """The authors' kernels with (16,1,1) and (16,2,2)."""
    folder = os.environ.get("TPA_AUTHORS")
    if folder is None:
        raise ImportError("TPA_AUTHORS names no folder")
    if folder not in sys.path:
        sys.path.append(folder)
    names = ("flashtpa_decode_triton", "flashtpa_decode_triton_multi_kvrank")
    try:
        one, several = (importlib.import_module(name).tpa_decode_parallel_bn_triton for name in names)
    except ValueError as problem:  # a decorator of theirs that this triton refuses
        raise Unusable(str(problem)) from problem
    B, M, h, D = work.batch, work.tokens, work.heads, work.width

    def build(rank: int) -> Step:
        draw = Random(device, dtype)
        aq, bq = draw(B, 1, h, 16), draw(B, 1, 16, D)
        ak, bk, av, bv = (draw(B, M, width, rank) for width in (h, D, h, D))
        kernel = several if rank > 1 else one
        cached = (ak, av, bk, bv) if rank > 1 else tuple(x[..., 0].contiguous() for x in (ak, av, bk, bv))

        def truth() -> Tensor:
            heads = []
            for i in range(h):
                q = aq[0, 0, i].double() @ bq[0, 0].double() / 16
                k = torch.einsum("mr,mdr->md", ak[0, :, i].double(), bk[0].double()) / rank
                v = torch.einsum("mr,mdr->md", av[0, :, i].double(), bv[0].double()) / rank
                heads.append(attention(q[None], k, v, D**-0.5)[0])
            return torch.stack(heads)

        def call() -> Tensor:
            ak, av, bk, bv = cached
            return kernel(aq, ak, av, bq, bk, bv)

        return Step(call, truth, sum(x.numel() for x in cached) * dtype.itemsize)

    return {
        f"TPA (16,{rank},{rank}), the authors' kernel": Contender(
            lambda rank=rank: build(rank), 2 * rank * (h + D)
        )
        for rank in (1, 2)
    }


def grouped(package: str, work: Workload, build: Callable[[int], Step]) -> dict[str, Contender]:
    """MHA, GQA and MQA by one function of the number of key-value heads."""
    return {
        f"{name}, {package}": Contender(lambda groups=groups: build(groups), 2 * groups * work.width)
        for name, groups in (("MHA", work.heads), (f"GQA-{work.groups}", work.groups), ("MQA", 1))
    }


def heads(work: Workload, groups: int, draw: Random) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, 1, h, D), keys and values (B, M, G, D)."""
    shape = (work.batch, work.tokens, groups, work.width)
    return draw(work.batch, 1, work.heads, work.width), draw(*shape), draw(*shape)


def grouped_truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the first sequence, a group at a time."""
    groups = k.shape[2]
    rows = q.double().view(groups, -1, q.shape[-1])
    parts = [
        attention(rows[g], k[0, :, g].double(), v[0, :, g].double(), q.shape[-1] ** -0.5)
        for g in range(groups)
    ]
    return torch.cat(parts)
