"""Running a model over batches without leaving a trace in it."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .captures import is_compiled, tensors_of


@contextmanager
def recording_mode(*models: nn.Module) -> Iterator[None]:
    """No gradients, eval mode, eager, no fused path that skips modules; everything is put back.

    Warns:
        UserWarning: if a model is compiled.
    """
    modules = [module for model in models for module in model.modules()]
    if any(is_compiled(module) or module._compiled_call_impl is not None for module in modules):
        warnings.warn("the model is compiled; here it runs eagerly, module by module", stacklevel=4)
    modes = [(module, module.training) for module in modules]
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for model in models:
                model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module: DistributedDataParallel would exchange buffers at every forward pass."""
    while True:
        if is_compiled(model):
            model = getattr(model, "_orig_mod")  # noqa: B009 (typed as a tensor or module)
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Calls the model with a tensor, with keyword arguments, or with the first entry of a sequence."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, Sequence) else batch)


def to_device(batch: Any, model: nn.Module) -> Any:
    """The batch with its tensors on the device of the model's parameters."""
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, model) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [to_device(value, model) for value in batch]
    return batch


def sample_keys(batch: Any) -> Tensor:
    """One number for each sample: its first input against fixed weights that tell entries apart."""
    inputs = tensors_of(batch)
    if not inputs or not inputs[0].ndim:
        return torch.zeros(0, dtype=torch.float64)
    flat = inputs[0].detach().cpu().reshape(len(inputs[0]), -1).double()
    return flat @ torch.cos(torch.arange(flat.shape[1], dtype=torch.float64))
