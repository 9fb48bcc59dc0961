"""Times the prefill kernels under other plans: what the table of `kernels/prefill_config.py` rests on.

One thing is changed at a time from the plan of the table: a tile, or how many heads are expanded. Kernels are
compiled first, by as many processes as there are cores, so that the table is there after seconds.

Run on a GPU: `python benchmarks/tune_prefill.py --tokens 1024 --batch 16`
"""

import argparse
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor

from tpa_attention.torch.kernels.prefill import prefill_triton
from tpa_attention.torch.kernels.prefill_backward import prefill_backward_triton
from tpa_attention.torch.kernels.prefill_config import Plan, Tile, choose_plan

ROUNDS = 15
TILES = {
    "forward": [(128, 64, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3)],
    "grad_q": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 8, 2),
        (128, 32, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3, 128),
    ],
    "grad_kv": [
        (64, 64, 4, 3),
        (64, 64, 4, 2, 168),
        (128, 64, 8, 2),
        (64, 128, 8, 2),
        (32, 64, 4, 2),
        (32, 128, 8, 2),
    ],
}
HEADS = (4, 8, 12, 16, 24, 48)
Sizes = tuple[int, int, int, int, tuple[int, int, int]]


def plans(width: int) -> dict[str, Plan]:
    """Name -> plan: that of the table, and one change each."""
    table = choose_plan(2, width, width)
    found = {"table": table}
    for kernel, tiles in TILES.items():
        for numbers in tiles:
            found[f"{kernel} {numbers}"] = replace(table, **{kernel: Tile(*numbers)})
    for heads in HEADS:
        found[f"{heads} heads at a time"] = replace(table, heads=heads)
    return found


def inputs(sizes: Sizes) -> tuple[Tensor, ...]:
    """Six factors and the gradient of the output, bfloat16."""
    B, T, H, D, ranks = sizes
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(B, T, rank, width) for rank in ranks for width in (H, D)] + [(B, T, H, D)]
    return tuple(
        torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16) for shape in shapes
    )


def run(plan: Plan, sizes: Sizes, rounds: int) -> tuple[float, float] | str:
    """Milliseconds of the forward and of the backward pass, medians; or why there are none."""
    *factors, dout = inputs(sizes)
    options = (None, True, None, sizes[3] ** -0.5 / sizes[4][0] / sizes[4][1], 1 / sizes[4][2], plan)
    times: tuple[list[float], list[float]] = ([], [])
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    try:
        for _ in range(rounds):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            flush.zero_()
            marks[0].record()
            out, lse = prefill_triton(*factors, *options)
            marks[1].record()
            prefill_backward_triton(dout, None, *factors, out, lse, *options)
            marks[2].record()
            torch.cuda.synchronize()
            for i, found in enumerate(times):
                found.append(marks[i].elapsed_time(marks[i + 1]))
    except Exception as error:  # a plan that does not fit is a row of the table
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return statistics.median(times[0]), statistics.median(times[1])


def compile_only(plan: Plan, sizes: Sizes) -> None:
    """Fills Triton's cache; the kernels know neither batch nor length."""
    _, T, H, D, ranks = sizes
    run(plan, (1, T, H, D, ranks), 1)


def main() -> None:
    """Prints one row per plan, the table's own first."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name, default in (("batch", 16), ("tokens", 1024), ("heads", 47), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ranks", type=int, nargs=3, default=(6, 2, 2), metavar=("RQ", "RK", "RV"))
    given = parser.parse_args()
    sizes = (given.batch, given.tokens, given.heads, given.width, tuple(given.ranks))
    candidates = plans(given.width)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_only, candidates.values(), [sizes] * len(candidates)))
    flop = given.batch * given.heads * given.tokens**2 * given.width  # a product, half of it masked
    print(
        f"{torch.cuda.get_device_name()}: B {sizes[0]}, T {sizes[1]}, h {sizes[2]}, D {sizes[3]}, {sizes[4]}"
    )
    print("| plan | forward ms | TFLOP/s | backward ms | TFLOP/s |\n|---|---|---|---|---|")
    for name, plan in candidates.items():
        found = run(plan, sizes, ROUNDS)
        if isinstance(found, str):
            print(f"| {name} | {found} | | | |")
        else:  # 2 products forward, 5 backward, as FlashAttention is counted
            rates = (2 * flop / found[0] / 1e9, 5 * flop / found[1] / 1e9)
            print(
                f"| {name} | {found[0]:.3f} | {rates[0]:.0f} | {found[1]:.3f} | {rates[1]:.0f} |", flush=True
            )
    print("plan of the table:", candidates["table"])


if __name__ == "__main__":
    main()
