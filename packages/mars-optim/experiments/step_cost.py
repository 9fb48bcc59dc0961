"""What MARS adds to a step: interleaved timing of MARS-AdamW and AdamW, both in their foreach form."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from mars_optim.torch import MARS
from tenfold_tools import bench, data
from tenfold_tools.stats import Estimate
from tenfold_tools.workloads import ByteGPT, GPTConfig, cross_entropy, token_batches

# GPT-2 small has 148 tensors: two embeddings, twelve blocks of twelve, and the last norm.
GPT2_BLOCK = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
GPT2_BLOCK += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "1000 tensors of 4k": [(64, 64)] * 1000,
    "one tensor of 100M": [(10_000, 10_000)],
    "GPT-2 small": [(50_257, 768), (1024, 768), *GPT2_BLOCK * 12, (768,), (768,)],
}


def optimizer_step(name: str, repeats: int, device: str) -> Estimate:
    """Time of MARS's step over AdamW's on one set of tensors."""
    return _compare(
        {
            "MARS": lambda: _optimizer_step(MARS, SHAPES[name], device),
            "AdamW": lambda: _optimizer_step(torch.optim.AdamW, SHAPES[name], device),
        },
        repeats,
        device,
    )


def training_step(repeats: int, device: str) -> Estimate:
    """The same for a whole step (forward, backward, optimiser) of the byte-level GPT of R6."""
    return _compare(
        {
            "MARS": lambda: _training_step(MARS, device),
            "AdamW": lambda: _training_step(torch.optim.AdamW, device),
        },
        repeats,
        device,
    )


def _compare(make: dict[str, Callable[[], Callable[[], object]]], repeats: int, device: str) -> Estimate:
    steps = {name: build() for name, build in make.items()}
    row = bench.compare(steps, baseline="AdamW", repeats=repeats, device=device).row("MARS")
    if row.ratio is None:
        raise RuntimeError(row.error or "AdamW could not be timed")
    return row.ratio


def _optimizer_step(
    optimizer: Callable[..., torch.optim.Optimizer], shapes: Sequence[tuple[int, ...]], device: str
) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.full(shape, 0.1, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
    return optimizer(parameters, lr=1e-3, foreach=True).step


def _training_step(make: Callable[..., torch.optim.Optimizer], device: str) -> Callable[[], object]:
    generator, config = torch.Generator().manual_seed(0), GPTConfig()
    model = ByteGPT(config, generator).to(device)
    optimizer = make(model.parameters(), lr=1e-3, foreach=True)
    text = data.stdlib_source().train
    (batch,) = token_batches(
        text, steps=1, batch=16, context=config.context, generator=generator, device=device
    )

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()

    return step
