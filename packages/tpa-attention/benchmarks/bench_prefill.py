"""Attention of whole sequences: TPA from its factors against torch's attention on given heads, and MHA's.

Three questions in one table. What do the factors cost over the same attention on Q, K and V that exist
already ("heads alone", as many heads)? How does TPA compare with the MHA of equal parameters, which has fewer
heads? What must be kept for the backward pass? Saved numbers are counted from what autograd holds after a
forward pass, once per storage, inputs included; beside them the count of the formula, with and without
materialised Q, K and V. The peak is what a call takes while it runs.

The kernels ("TPA, triton") are held to 1.10 times the time of "TPA, sdpa, flash", on which the column
"against materialised" is based on a GPU, and to 1 / 2.5 of its saved numbers.

Routes of `tpa_attention` that cannot run here are named with the reason. No projections.

Run: `python benchmarks/bench_prefill.py --set medium-512-forward medium-512-training --repeats 10`, or with
`--device cuda`, which takes the sets of GPU_SETS.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from memory import threads
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tenfold_tools.bench import Comparison, Options, Row, main
from tpa_attention import accounting
from tpa_attention.config import ModelConfig, preset
from tpa_attention.torch.factors import TPAFactors
from tpa_attention.torch.functional import tpa_attention

BASELINE = "heads alone, SDPA"
FLASH = "TPA, sdpa, flash"
ROUTES = ("sdpa", "flex", "triton")
DESCRIPTION = "Forward pass, and forward and backward, of causal attention over whole sequences."


@dataclass(frozen=True)
class Workload:
    """A trained size and a batch of sequences.

    Attributes:
        size: "small", "medium", "large" or "xl".
        tokens: T.
        training: whether the backward pass is timed too.
        batch: B.
    """

    size: str
    tokens: int
    training: bool
    batch: int = 1


LENGTHS = ((16, 1), (512, 1), (1024, 1), (4096, 1), (1024, 16), (4096, 4), (16384, 1))  # 16 for tests
SETS = {
    f"{size}-{tokens}{f'x{batch}' if batch > 1 else ''}-{'training' if training else 'forward'}": Workload(
        size, tokens, training, batch
    )
    for size in ("small", "medium")
    for tokens, batch in LENGTHS
    for training in (False, True)
}
CPU_SETS = ["medium-512-forward", "medium-512-training"]
GPU_SETS = ["medium-1024x16-forward", "medium-1024x16-training", "medium-4096x4-training"]


def measure(name: str, options: Options, *, flex: bool = False) -> Comparison:
    """Times every route on a set.

    Args:
        name: key of SETS.
        options: of the harness.
        flex: whether FlexAttention takes part, which is compiled first.
    """
    work = SETS[name]
    on_gpu = options.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = preset(work.size, "tpa")
    forwards, absent = contenders(work, config, options.device, dtype, flex)
    calls = {
        label: trained(forward, inputs) if work.training else forward
        for label, (forward, inputs) in forwards.items()
    }
    per_token = work.batch * work.tokens
    with threads(None if on_gpu else 1):
        saved = {label: saved_bytes(forward) for label, (forward, _) in forwards.items()}
        with torch.set_grad_enabled(work.training):
            comparison = options.compare(
                calls,
                baseline=BASELINE,
                title=f"{name}: B {work.batch}, T {work.tokens}, h {config.num_attention_heads}, "
                f"ranks ({config.q_rank}, {config.k_rank}, {config.v_rank}), {dtype}",
            )
    counted = {
        materialised: accounting.saved_activations(config, materialised=materialised)
        for materialised in (True, False)
    }

    def formula(row: Row) -> str:
        return f"{counted[True]} / {counted[False]}" if row.name.startswith("TPA") else ""

    comparison = comparison.with_column(
        "saved numbers per token", lambda row: f"{saved[row.name] / per_token / dtype.itemsize:.0f}"
    )
    comparison = comparison.with_column("formula: materialised / factors", formula)
    materialised = comparison.row(FLASH if FLASH in forwards else "TPA, sdpa").median
    comparison = comparison.with_column(
        "against materialised", lambda row: f"{row.median / materialised:.2f}"
    )
    return comparison.with_absent(absent)


def contenders(
    work: Workload, config: ModelConfig, device: str, dtype: torch.dtype, flex: bool
) -> tuple[dict[str, tuple[Callable[[], Tensor], list[Tensor]]], dict[str, str]]:
    """Name -> (forward pass, inputs that want gradients), and the routes that cannot run with the reason."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        full = (work.batch, *shape)
        return torch.randn(full, generator=generator, device=device, dtype=dtype).requires_grad_()

    def heads(count: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        qkv = [draw(count, work.tokens, config.head_dim) for _ in range(3)]
        return lambda: functional.scaled_dot_product_attention(*qkv, is_causal=True), qkv

    T, h, D = work.tokens, config.num_attention_heads, config.head_dim
    sides = [
        draw(T, rank, width) for rank in (config.q_rank, config.k_rank, config.v_rank) for width in (h, D)
    ]
    factors = TPAFactors(*sides)
    lineup = {BASELINE: heads(h)}
    absent = {}
    for impl in ROUTES:
        reason = problem(impl, factors, device, flex)
        if reason is None:
            lineup[f"TPA, {impl}"] = (lambda impl=impl: tpa_attention(*factors, impl=impl)), sides
        else:
            absent[f"TPA, {impl}"] = reason
    if device.startswith("cuda"):
        lineup[FLASH] = (lambda: by_flash(factors)), sides
    mha = preset(work.size, "mha").num_attention_heads
    lineup[f"MHA, {mha} heads, SDPA"] = heads(mha)
    return lineup, absent


def by_flash(factors: TPAFactors) -> Tensor:
    """Materialised heads and torch's FlashAttention-2, whatever else torch would prefer."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return tpa_attention(*factors, impl="sdpa")


def problem(impl: str, factors: TPAFactors, device: str, flex: bool) -> str | None:
    """Why a route cannot run here; None if it can. Asked on four tokens."""
    if impl == "flex" and not device.startswith("cuda"):
        return "left out: FlexAttention has no backward pass on the CPU and compiles for half a minute"
    if impl == "flex" and not flex:
        return "left out: compiles for half a minute; ask for it with --flex"
    few = [factor[:, :4].detach() for factor in factors]
    try:
        tpa_attention(*few, impl=impl)
    except RuntimeError as error:
        return f"not available: {str(error).splitlines()[0]}"
    return None


def trained(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward with fresh gradients."""

    def step() -> tuple[Tensor, ...]:
        out = forward()
        return torch.autograd.grad(out, inputs, out.detach())

    return step


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass."""
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (tensor.detach(), storage.nbytes())  # kept alive: its address is its name
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for _, size in kept.values())


def own_options() -> argparse.ArgumentParser:
    """Options of this benchmark beside those of the harness."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--flex", action="store_true", help="on a GPU, with FlexAttention")
    return parser


if __name__ == "__main__":
    own, others = own_options().parse_known_args()
    sys.exit(
        main(
            partial(measure, flex=own.flex),
            workloads=list(SETS),
            default=GPU_SETS if any("cuda" in argument for argument in others) else CPU_SETS,
            description=DESCRIPTION,
            parents=[own_options()],
        )
    )
