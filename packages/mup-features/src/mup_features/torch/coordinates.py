"""Coordinate check of a torch model: train it for a few steps at several widths and measure every module.

The model is measured in eval mode on one batch that stays the same (the batch of step 0), before and after
each update; its training batches may differ from step to step. Forward hooks do the measuring and are gone
afterwards. Nothing global is touched: the random state of the caller is put back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_features._coordinate_runs import MODEL, Measured, Patterns, chosen, collect
from mup_features.coordinates import CoordReport, Record

Activations = dict[str, list[Tensor]]


def coordinate_check(
    model_fn: Callable[[int], Any],
    batch_fn: Callable[[int, int], Any],
    widths: Sequence[int],
    seeds: Sequence[int],
    steps: int = 5,
    *,
    optimizer_fn: Callable[..., torch.optim.Optimizer],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    record: Record = "rms",
    modules: Patterns = "auto",
    progress: bool = True,
) -> CoordReport:
    """Sizes of activations and of their changes in training, at several widths.

        def model_fn(width):
            model = Transformer(width)
            roles = infer_roles(model, base=Transformer(64), other=Transformer(32))
            apply_mup(model, roles)
            return model, roles

        report = coordinate_check(
            model_fn, batch_fn, [64, 128, 256, 512], seeds=range(6),
            optimizer_fn=lambda model, roles: torch.optim.AdamW(param_groups(model, roles, lr=1e-3)),
        )
        report.verdict()

    Args:
        model_fn: called with a width, returns the model, on its device, or a pair (model, roles). Global
            random state is seeded before.
        batch_fn: called with (seed, step), returns a batch; the same for the same arguments, and of the same
            data at every width. Real and small: the updates of many unrelated samples in one batch align with
            one another only at widths beyond their number, and slopes below that are not those of the limit.
        widths: at least two, increasing; four octaves give clear slopes.
        seeds: distinct; at least three for a verdict, five or more for a clear one.
        steps: updates, >= 1; at least 2 for a verdict.
        optimizer_fn: called with the model, and with the roles where `model_fn` gave some.
        loss_fn: called with (model, batch), returns the loss. By default a batch is a pair (inputs, targets);
            integer targets mean cross-entropy over the last axis of the output, others the squared error.
        record: "rms" or "l1".
        modules: "auto": every module that owns a parameter; or patterns of names (* for anything). The
            model's own output is always recorded, as "(model)" where no module's output is the same tensor.
        progress: whether to show a bar; only in a terminal.

    Returns:
        The report; `.verdict()` judges it.

    Raises:
        ValueError: for a bad grid, a pattern that matches nothing, models whose modules differ between
            widths, or a module whose activations change shape between steps.
        TypeError: if `model_fn` gives no module.

    Source: Yang et al. 2022 (arXiv 2203.03466), appendix D.1.
    """
    loss_of = default_loss if loss_fn is None else loss_fn

    def run(width: int, seed: int) -> list[Measured]:
        with _own_random_state(seed), torch.enable_grad():
            model, roles = _unpacked(model_fn(width))
            optimizer = optimizer_fn(model) if roles is None else optimizer_fn(model, roles)
            probe = batch_fn(seed, 0)
            start, outputs = _activations(model, lambda: loss_of(model, probe), modules)
            found = [_measure(start, start, outputs, record)]
            for step in range(steps):
                optimizer.zero_grad()
                loss_of(model, batch_fn(seed, step)).backward()
                optimizer.step()
                now, _ = _activations(model, lambda: loss_of(model, probe), modules)
                found.append(_measure(now, start, outputs, record))
        return found

    return collect(run, widths, seeds, steps, record, progress=progress)


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy over the last axis for integer targets, else the mean squared error.

    Args:
        model: called with the inputs.
        batch: a pair (inputs, targets).

    Raises:
        ValueError: if the batch is no pair.
    """
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise ValueError(
            f"batch must be a pair (inputs, targets) or loss_fn given, got {type(batch).__name__}"
        )
    inputs, targets = batch
    output = model(inputs)
    if targets.is_floating_point():
        return functional.mse_loss(output, targets)
    return functional.cross_entropy(output.reshape(-1, output.shape[-1]), targets.reshape(-1))


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seeds what `model_fn` draws from inside the block, and gives the caller's state back after it.

    Initializers of torch.nn take no generator. Only generators that are saved here are seeded:
    `torch.manual_seed` would touch those of other accelerators too.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def _unpacked(given: Any) -> tuple[nn.Module, Any]:
    model, roles = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_fn must return a module or (module, roles), got {type(given).__name__}")
    return model, roles


def _activations(
    model: nn.Module, forward: Callable[[], Any], modules: Patterns
) -> tuple[Activations, tuple[str, ...]]:
    """What the modules return in one forward pass without dropout, and which of them are the output."""
    named = dict(model.named_modules())
    owners = [name for name, module in named.items() if name and any(True for _ in module.parameters(False))]
    wanted = chosen([name for name in named if name], owners, modules)
    caught: dict[str, list[Tensor]] = {}
    last: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001
            tensor = _main_tensor(output)
            if tensor is not None:
                last[name] = tensor
                caught.setdefault(name, []).append(tensor.clone())  # what follows may write into it

        return keep

    handles = [named[name].register_forward_hook(hook(name)) for name in wanted]
    handles.append(model.register_forward_hook(hook(MODEL)))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            forward()
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    outputs = [name for name in wanted if MODEL in last and last.get(name) is last[MODEL]]
    names = [name for name in wanted if name in caught]
    if MODEL in last and not outputs:
        names.append(MODEL)
        outputs.append(MODEL)
    return {name: caught[name] for name in names}, tuple(outputs)


def _main_tensor(output: Any) -> Tensor | None:
    """The tensor that a module's return value is about: its logits, or the first one that is no scalar."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.ndim else None
    if isinstance(output, Mapping):
        if "logits" in output:
            return _main_tensor(output["logits"])
        output = list(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return next((found for entry in output if (found := _main_tensor(entry)) is not None), None)
    return None


def _measure(now: Activations, start: Activations, outputs: tuple[str, ...], record: Record) -> Measured:
    sizes, changes = {}, {}
    for name, before in start.items():
        after = now.get(name, [])
        if [one.shape for one in after] != [one.shape for one in before]:
            shapes = [[tuple(one.shape) for one in some] for some in (before, after)]
            raise ValueError(
                f"modules: {name} must keep the shapes of its activations from step to step, "
                f"got {shapes[0]}, then {shapes[1]}; leave it out"
            )
        sizes[name] = _size(after, record)
        changes[name] = _size([_wide(a) - _wide(b) for a, b in zip(after, before, strict=True)], record)
    return Measured(sizes, changes, outputs)


def _size(tensors: Sequence[Tensor], record: Record) -> float:
    """Root mean square, or mean absolute value, over all entries of all tensors."""
    entries = torch.cat([_wide(tensor).reshape(-1) for tensor in tensors])
    return float(entries.square().mean().sqrt() if record == "rms" else entries.abs().mean())


def _wide(tensor: Tensor) -> Tensor:
    """In float64: squares of half-precision activations would overflow or vanish; float32 on mps."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
