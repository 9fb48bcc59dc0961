"""Time and kernels of an optimiser step under muP, beside plain AdamW and microsoft/mup.

An 8-layer transformer's parameters with ready gradients. muP is two learning rates, so its optimiser has two
groups; the fair comparison for cost is torch.optim with two groups of the same tensors, and both are shown.
Kernels are counted by the dispatcher: every aten operation of one step.

Run: `python benchmarks/bench_scaling.py --json scaling.json`, on a GPU with `--device cuda`
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mup_features import apply_mup, infer_roles, param_groups
from tenfold_tools.bench import Comparison, Options, main

TINY = "tiny"  # for the test of this benchmark
SETS = ("transformer-256", "transformer-512")
LAYERS, BASE, VOCABULARY, LENGTH = 8, 64, 256, 128


class Transformer(nn.Module):
    """Embedding, pre-norm encoder layers, readout."""

    def __init__(self, width: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.readout = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, vocabulary)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.readout(x)


def measure(name: str, options: Options) -> Comparison:
    """Times one width.

    Args:
        name: one of SETS or TINY.
        options: of the harness.
    """
    width, layers = (32, 1) if name == TINY else (int(name.split("-")[1]), LAYERS)
    steps: dict[str, Callable[[], Any]] = {}
    absent: dict[str, str] = {}
    base = Transformer(BASE, layers)
    for title, build in optimizers(base).items():
        model = Transformer(width, layers).to(options.device)
        generator = torch.Generator(options.device).manual_seed(0)
        try:
            optimizer = build(model)
        except ImportError as error:
            absent[title] = f"not installed: {error.name}"
            continue
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).normal_(generator=generator)
        steps[title] = optimizer.step
    kernels = {title: count_kernels(step) for title, step in steps.items()}
    comparison = options.compare(
        steps, baseline="torch AdamW, 1 group", title=f"{name}: {layers} layers, torch {torch.__version__}"
    )
    return comparison.with_column("kernels", lambda row: str(kernels[row.name])).with_absent(absent)


def optimizers(base: nn.Module) -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """Contenders: name -> optimiser of a model."""

    def ours(model: nn.Module) -> torch.optim.Optimizer:
        roles = infer_roles(model, base=base)
        apply_mup(model, roles, init="fan_in")
        return torch.optim.AdamW(param_groups(model, roles, lr=1e-3, weight_decay=0.1))

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def two_groups(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        groups = [{"params": matrices}, {"params": others, "lr": 2e-3}]
        return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)

    def microsoft(model: Transformer) -> torch.optim.Optimizer:
        mup = import_module("mup")
        layers, device = len(model.blocks), model.readout.weight.device

        def theirs(width: int) -> Transformer:
            built = Transformer(width, layers)
            built.readout = mup.MuReadout(width, VOCABULARY)
            return built

        model.readout = mup.MuReadout(model.readout.in_features, VOCABULARY).to(device)
        mup.set_base_shapes(model, theirs(BASE), delta=theirs(2 * BASE))
        return mup.MuAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    return {
        "torch AdamW, 1 group": plain,
        "torch AdamW, 2 groups": two_groups,
        "mup-features, AdamW": ours,
        "microsoft/mup, MuAdamW": microsoft,
    }


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def count_kernels(step: Callable[[], Any]) -> int:
    """Operations that a step dispatches, once its state exists."""
    step()
    with _Counter() as counter:
        step()
    return counter.count


if __name__ == "__main__":
    sys.exit(
        main(
            measure,
            workloads=[TINY, *SETS],
            default=list(SETS),
            description="An optimiser step under muP, beside plain AdamW and microsoft/mup.",
        )
    )
