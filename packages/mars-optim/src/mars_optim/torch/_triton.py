"""The fused step on CUDA: three Triton kernels for all tensors of one dtype combination.

    _sum_squares   partial sums of ||c||^2, one per chunk of a tensor        when tensors are clipped
    _finish        ||c|| from them, and what depends on the step number      when one of them is needed
    _update        clip, momentum, second moment, update, copy of the gradient

Kernels find their tensors through a table of addresses, so the number of launches does not depend on how
many there are. The reduction has two stages and no atomics: the same sums in the same order each time.
Nothing is read back from the device. Tables and numbers travel asynchronously, and only when they differ from
those of an earlier step; learning rate, gamma and the step number lie in memory, so no schedule compiles
anything again.

_update runs through the chunks in the opposite order of _sum_squares, so the gradients read last are still
in the second-level cache. With a constant number of launches this is all the reuse there is: the floor of a
large model with clipping is 44 bytes per parameter, not 36.

The truth of every kernel is `_loop.mars_single`. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""

# ruff: noqa: SIM102, SIM108  a branch on a tl.constexpr is decided by the compiler, and reads as such
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false
# Triton's own language is Python only in form: kernels are indexed by a grid and their arguments are retyped

import functools
import math
from contextlib import nullcontext

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ._fused import Table, host_steps, mars_fused, step_numbers
from .rule import ORTHOGONALISED, UpdateRule

_CHUNK = 4096  # elements per program
_BLOCK = 1024  # elements at a time
_WARPS = 4
_KEPT_TABLES = 64
_TYPES = {
    None: None,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# rows of the table, `entries` long each; then entry and number of every chunk
_GRAD, _REFERENCE, _STEP = tl.constexpr(1), tl.constexpr(2), tl.constexpr(7)
_SIZE, _FIRST_CHUNK, _ROWS = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)

# a graph replays with the addresses it has captured, so these live as long as the process
_captured: list[Tensor] = []


def mars_triton(
    params: list[Tensor],
    grads: list[Tensor],
    references: list[Tensor] | None,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: UpdateRule,
    norm: Tensor | None,
    stores: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """See `functional.mars`; gradients are copied into `stores` in the same pass.

    Args:
        params: as in `functional.mars`, and so the other lists.
        grads: gradients g_t.
        references: h_t; may be the very tensors of `stores`.
        exp_avgs: momenta.
        exp_avg_sqs: second moments.
        max_exp_avg_sqs: their running maxima.
        steps: number of steps done so far; float32, on the CPU, or with `rule.capturable` on the device.
        rule: what to do. With `rule.capturable` a CUDA graph can hold the step: take one step with the same
            tensors before capturing it, which brings the tables to the device.
        norm: the norm to clip by; None: each tensor's own.
        stores: where the gradients go; None when the caller takes them over (steal_grad) or needs none.
        generator: for `rule.stochastic_rounding`, on the device; None: torch's default one.
    """
    lists = (params, grads, references, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    rule = rule if rule.capturable else rule.on_host()
    return mars_fused(_launch, *lists, steps, rule, norm, stores, generator)


def _launch(
    table: Table,
    steps: list[Tensor],
    rule: UpdateRule,
    given: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    entries, device, capturable = len(table.sizes), table.device, rule.capturable
    chunks = -(-table.sizes // _CHUNK)
    blocks = int(chunks.sum())
    own_norm = rule.clip is not None and given is None
    where = _resident(_packed(table, chunks, steps if capturable else None).tobytes(), "int64", device)
    scalars = _scalars(rule, device)
    if capturable:
        numbers = torch.empty(5, entries, dtype=torch.float64, device=device)
    else:
        on_host = step_numbers(host_steps(steps), rule)[:, table.owners]
        decay = np.full((1, entries), rule.decay)
        numbers = _to_device(np.concatenate([on_host, decay]), device)
    divisors = torch.empty(entries, dtype=table.working, device=device) if own_norm else given
    partials = torch.empty(blocks, dtype=torch.float64, device=device) if own_norm else None
    grad, reference = table.dtypes[1], table.dtypes[2]
    noise = None
    if rule.stochastic_rounding and table.dtypes[0] == torch.bfloat16 and rule.kind not in ORTHOGONALISED:
        noise = torch.randint(1 << 30, (1,), dtype=torch.int64, device=device, generator=generator)
    shared = {
        "CORRECTED": reference is not None,
        "WORK": _TYPES[table.working],
        "CHUNK": _CHUNK,
        "BLOCK": _BLOCK,
        "ALIGNED": bool((table.addresses % 16 == 0).all()),
    }
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if own_norm:
            _sum_squares[(blocks,)](
                where, scalars, partials, entries, blocks,
                G=_TYPES[grad], H=_TYPES[reference], num_warps=_WARPS, **shared,
            )  # fmt: skip
        if own_norm or capturable:
            _finish[(entries,)](
                where, scalars, partials, divisors, numbers, entries,
                NORM=own_norm, COUNTING=capturable, ADAM=rule.has_second_moment,
                EPS_FIRST=rule.eps_before_correction, WORK=_TYPES[table.working],
                CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=_WARPS,
            )  # fmt: skip
        types = dict(zip("XGHMVLS", (_TYPES[dtype] for dtype in table.dtypes), strict=True))
        _update[(blocks,)](
            where, scalars, numbers, divisors, noise, int(own_norm), entries, blocks,
            KIND="momentum" if rule.kind in ORTHOGONALISED else rule.kind,
            CLIPPED=rule.clip is not None, QUASI=rule.quasi_hyperbolic,
            OF_GRADIENT=rule.second_moment == "grad", CAUTIOUS=rule.cautious_decay, COUNTING=capturable,
            NOISY=noise is not None, num_warps=_WARPS, **types, **shared,
        )  # fmt: skip
    return divisors if own_norm else None


def _packed(table: Table, chunks: NDArray[np.int64], steps: list[Tensor] | None) -> NDArray[np.int64]:
    """The table as kernels read it: see `_ROWS`."""
    entries = len(table.sizes)
    counters = np.zeros(entries, dtype=np.int64)
    if steps is not None:
        counters = np.array([step.data_ptr() for step in steps], dtype=np.int64)[table.owners]
    first = np.cumsum(chunks) - chunks
    owner = np.repeat(np.arange(entries), chunks)
    number = np.arange(len(owner)) - first[owner]
    return np.concatenate([table.addresses.ravel(), counters, table.sizes, first, owner, number])


def _scalars(rule: UpdateRule, device: torch.device) -> Tensor:
    """The numbers of the rule that all tensors share, in the order in which kernels read them."""
    averages = [rule.correction_factor, rule.clip or 0.0, rule.beta1, rule.beta2, rule.gamma]
    values = [*averages, rule.lr, rule.eps, rule.decay, _log2(rule.beta1), _log2(rule.beta2)]
    known = np.array([0.0 if isinstance(value, Tensor) else value for value in values])
    scalars = _resident(known.tobytes(), "float64", device)
    if rule.has_tensors:
        scalars = scalars.clone()
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                scalars[place] = value
    return scalars


def _log2(beta: float | Tensor) -> float | Tensor:
    if isinstance(beta, Tensor):
        return beta.double().log2()
    return math.log2(beta) if beta > 0 else -math.inf


@functools.lru_cache(maxsize=_KEPT_TABLES)
def _kept(content: bytes, dtype: str, device: torch.device) -> Tensor:
    return _to_device(np.frombuffer(content, dtype=dtype).copy(), device)


def _resident(content: bytes, dtype: str, device: torch.device) -> Tensor:
    """A device copy of an array; that of an earlier step if it had the same content."""
    tensor = _kept(content, dtype, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(tensor)
    return tensor


def _to_device(array: NDArray[np.int64] | NDArray[np.float64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def _pointer(table, row, entries, entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """First element of a stream of one entry, as a pointer of the stream's dtype."""
    pointer = tl.load(table + row * entries + entry).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read(pointer, at, inside, MASKED: tl.constexpr, WORK: tl.constexpr):
    """Elements in the working dtype; zeros outside. Only the last chunk of a tensor needs a mask."""
    if MASKED:
        values = tl.load(pointer + at, mask=inside, other=0.0)
    else:
        values = tl.load(pointer + at)
    return values.to(WORK)


@triton.jit
def _write(pointer, at, values, inside, MASKED: tl.constexpr, TYPE: tl.constexpr):
    if MASKED:
        tl.store(pointer + at, values.to(TYPE), mask=inside)
    else:
        tl.store(pointer + at, values.to(TYPE))


@triton.jit
def _rounded(values, seed, at):
    """Float32 values that bfloat16 represents, each a neighbour at random. Truth: `stochastic_round_`."""
    bits = values.to(tl.int32, bitcast=True)
    noise = tl.randint(seed, at).to(tl.int32, bitcast=True) & 0xFFFF
    rounded = ((bits + noise) & -65536).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, rounded, values)


@triton.jit
def _correct(g, reference, at, inside, a, MASKED: tl.constexpr, CORRECTED: tl.constexpr, WORK: tl.constexpr):
    """The corrected gradient g + a (g - h). Truth: `correction.gradient_correction`."""
    if CORRECTED:
        h = _read(reference, at, inside, MASKED, WORK)
        g = (g - h) * a + g
    return g


@triton.jit
def _sum_chunk(
    grad, reference, start, size, a,
    MASKED: tl.constexpr, CORRECTED: tl.constexpr, WORK: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), dtype=WORK)
    length = CHUNK
    if MASKED:
        length = size - start
    for offset in range(0, length, BLOCK):
        at = start + offset + tl.arange(0, BLOCK)
        inside = at < size
        g = _read(grad, at, inside, MASKED, WORK)
        c = _correct(g, reference, at, inside, a, MASKED, CORRECTED, WORK)
        total += c * c
    return tl.sum(total)


@triton.jit(do_not_specialize=["entries", "blocks"])
def _sum_squares(
    table, scalars, partials, entries, blocks,
    G: tl.constexpr, H: tl.constexpr, CORRECTED: tl.constexpr, WORK: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Squared norm of the corrected gradient over one chunk.

    Truth: the square of `correction.norm_of(gradient_correction(g, h))` for the chunk. Floor: reading g and h
    once, 8 bytes per parameter in float32.
    """
    block = tl.program_id(0)
    entry = tl.load(table + _ROWS * entries + block)
    start = tl.load(table + _ROWS * entries + blocks + block) * CHUNK
    size = tl.load(table + _SIZE * entries + entry)
    a = tl.load(scalars).to(WORK)
    grad = _pointer(table, _GRAD, entries, entry, G, ALIGNED)
    reference = grad
    if CORRECTED:
        reference = _pointer(table, _REFERENCE, entries, entry, H, ALIGNED)
    if start + CHUNK <= size:
        total = _sum_chunk(grad, reference, start, size, a, False, CORRECTED, WORK, CHUNK, BLOCK)
    else:
        total = _sum_chunk(grad, reference, start, size, a, True, CORRECTED, WORK, CHUNK, BLOCK)
    tl.store(partials + block, total.to(tl.float64))


@triton.jit(do_not_specialize=["entries"])
def _finish(
    table, scalars, partials, divisors, numbers, entries,
    NORM: tl.constexpr, COUNTING: tl.constexpr, ADAM: tl.constexpr,
    EPS_FIRST: tl.constexpr, WORK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What one entry is divided by, and its step size, root factor, epsilon, decay and step number.

    Truth: `correction.clip_divisor` and `_fused.step_numbers`. Floor: none, it touches no parameter; its time
    is that of a launch.
    """
    entry = tl.program_id(0)
    if NORM:
        first = tl.load(table + _FIRST_CHUNK * entries + entry)
        chunks = (tl.load(table + _SIZE * entries + entry) + CHUNK - 1) // CHUNK
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for offset in range(0, chunks, BLOCK):
            at = offset + tl.arange(0, BLOCK)
            total += tl.load(partials + first + at, mask=at < chunks, other=0.0)
        norm = tl.sqrt(tl.sum(total)).to(WORK)
        clip = tl.load(scalars + 1).to(WORK)
        # an infinite or NaN norm gives NaN
        tl.store(divisors + entry, tl.maximum(norm / clip, 1.0) + norm * 0)
    if COUNTING:
        step = tl.load(table + _STEP * entries + entry).to(tl.pointer_type(tl.float32))
        t = tl.load(step).to(tl.float64) + 1
        size = tl.load(scalars + 5)
        decay = tl.load(scalars + 7)
        if ADAM:
            size = size / (1 - tl.exp2(t * tl.load(scalars + 8)))
            root = 1 / tl.sqrt(1 - tl.exp2(t * tl.load(scalars + 9)))
            eps = tl.load(scalars + 6)
            if EPS_FIRST:
                eps = eps * root
            tl.store(numbers + entries + entry, root)
            tl.store(numbers + 2 * entries + entry, eps)
        tl.store(numbers + entry, size)
        tl.store(numbers + 3 * entries + entry, decay)
        tl.store(numbers + 4 * entries + entry, t)


@triton.jit
def _update_chunk(
    table, scalars, numbers, inverse, seed, entries, entry, start, size,
    MASKED: tl.constexpr, KIND: tl.constexpr, CLIPPED: tl.constexpr, QUASI: tl.constexpr,
    OF_GRADIENT: tl.constexpr, CAUTIOUS: tl.constexpr, NOISY: tl.constexpr, CORRECTED: tl.constexpr,
    X: tl.constexpr, G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    S: tl.constexpr, WORK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    a = tl.load(scalars).to(WORK)
    beta1, rest1 = tl.load(scalars + 2).to(WORK), (1 - tl.load(scalars + 2)).to(WORK)
    beta2, rest2 = tl.load(scalars + 3).to(WORK), (1 - tl.load(scalars + 3)).to(WORK)
    gamma = tl.load(scalars + 4).to(WORK)
    step_size = tl.load(numbers + entry).to(WORK)
    root, eps = 1.0, 0.0
    if KIND == "adamw":
        root = tl.load(numbers + entries + entry).to(WORK)
        eps = tl.load(numbers + 2 * entries + entry).to(WORK)
    kept = (1 - tl.load(numbers + 3 * entries + entry)).to(WORK)

    param = _pointer(table, 0, entries, entry, X, ALIGNED)
    grad = _pointer(table, _GRAD, entries, entry, G, ALIGNED)
    reference, second, largest, stored = grad, grad, grad, grad
    average = _pointer(table, 3, entries, entry, M, ALIGNED)
    if CORRECTED:
        reference = _pointer(table, _REFERENCE, entries, entry, H, ALIGNED)
    if KIND == "adamw":
        second = _pointer(table, 4, entries, entry, V, ALIGNED)
    if L is not None:
        largest = _pointer(table, 5, entries, entry, L, ALIGNED)
    if S is not None:
        stored = _pointer(table, 6, entries, entry, S, ALIGNED)

    length = CHUNK
    if MASKED:
        length = size - start
    for offset in range(0, length, BLOCK):
        at = start + offset + tl.arange(0, BLOCK)
        inside = at < size
        g = _read(grad, at, inside, MASKED, WORK)
        c = _correct(g, reference, at, inside, a, MASKED, CORRECTED, WORK)
        if CLIPPED:
            c = c * inverse
        if S is not None:  # over h, which has been read
            _write(stored, at, g, inside, MASKED, S)
        m = _read(average, at, inside, MASKED, WORK) * beta1 + c * rest1
        _write(average, at, m, inside, MASKED, M)
        if KIND != "momentum":
            if QUASI:
                m = m + (g - m) * gamma
            if KIND == "adamw":
                squared = c
                if OF_GRADIENT:
                    squared = g
                v = _read(second, at, inside, MASKED, WORK) * beta2 + squared * squared * rest2
                _write(second, at, v, inside, MASKED, V)
                if L is not None:
                    before = _read(largest, at, inside, MASKED, WORK)
                    v = tl.where((v > before) | (v != v), v, before)
                    _write(largest, at, v, inside, MASKED, L)
                u = m / (tl.sqrt(v) * root + eps)
            elif KIND == "lion":
                # NaN stays NaN, where the comparisons would make a silent zero step of it
                u = (m > 0).to(WORK) - (m < 0).to(WORK) + m * 0
            else:
                u = m
            x = _read(param, at, inside, MASKED, WORK)
            if CAUTIOUS:
                x = tl.where(u * x >= 0, x * kept, x)
            else:
                x = x * kept
            x = x - u * step_size
            if NOISY:
                x = _rounded(x, seed + entry, at)
            _write(param, at, x, inside, MASKED, X)


@triton.jit(do_not_specialize=["divisor_stride", "entries", "blocks"])
def _update(
    table, scalars, numbers, divisors, noise, divisor_stride, entries, blocks,
    KIND: tl.constexpr, CLIPPED: tl.constexpr, QUASI: tl.constexpr, OF_GRADIENT: tl.constexpr,
    CAUTIOUS: tl.constexpr, COUNTING: tl.constexpr, NOISY: tl.constexpr, CORRECTED: tl.constexpr,
    X: tl.constexpr, G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, V: tl.constexpr, L: tl.constexpr,
    S: tl.constexpr, WORK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The whole elementwise step of one chunk; for orthogonalised kinds up to the momentum.

    Truth: `_loop.mars_single`, and `state.remember_gradient` for the copy. Floor in float32, kind adamw:
    reading p, g, h, m, v and writing p, m, v, h, 36 bytes per parameter; 32 without the copy; lion 28, lion
    without reference 20.
    """
    block = blocks - 1 - tl.program_id(0)
    entry = tl.load(table + _ROWS * entries + block)
    number = tl.load(table + _ROWS * entries + blocks + block)
    start = number * CHUNK
    size = tl.load(table + _SIZE * entries + entry)
    seed = 0
    if NOISY:
        seed = tl.load(noise)
    inverse = 1.0
    if CLIPPED:
        inverse = 1 / tl.load(divisors + entry * divisor_stride)
    if COUNTING:
        if number == 0:  # the matrices of one tensor all write the same number
            counter = tl.load(table + _STEP * entries + entry).to(tl.pointer_type(tl.float32))
            tl.store(counter, tl.load(numbers + 4 * entries + entry).to(tl.float32))
    if start + CHUNK <= size:
        _update_chunk(
            table, scalars, numbers, inverse, seed, entries, entry, start, size,
            False, KIND, CLIPPED, QUASI, OF_GRADIENT, CAUTIOUS, NOISY, CORRECTED,
            X, G, H, M, V, L, S, WORK, CHUNK, BLOCK, ALIGNED,
        )  # fmt: skip
    else:
        _update_chunk(
            table, scalars, numbers, inverse, seed, entries, entry, start, size,
            True, KIND, CLIPPED, QUASI, OF_GRADIENT, CAUTIOUS, NOISY, CORRECTED,
            X, G, H, M, V, L, S, WORK, CHUNK, BLOCK, ALIGNED,
        )  # fmt: skip
