"""The state of one parameter: what is allocated, in which dtype, and how a checkpoint comes back.

    step            number of steps done, float32 0-d tensor on the CPU (capturable: beside the parameter)
    exp_avg         momentum m_t (memory_efficient: the plain average of the gradients)
    exp_avg_sq      second moment v_t, AdamW path only
    max_exp_avg_sq  its running maximum, with amsgrad
    last_grad       h for the next step, always owned: a copy, never .grad itself
    previous_grad   exact form, way 3: recorded for the step after this one
    prev_param      exact form, ways 1-2 and decay_mode "l2": parameters before the last update

The first five names are those of the released code, so its checkpoints load.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .correction import working_dtype
from .options import has_second_moment, keeps_plain_average


def prepare_state(
    state: dict[str, Any], param: Tensor, grad: Tensor, path: str, group: dict[str, Any]
) -> None:
    """Allocate what a step along the path reads and the state lacks.

    Args:
        state: of the parameter.
        param: the parameter.
        grad: the gradient of this step, as the mathematics sees it.
        path: from `path_of`.
        group: the parameter's group.
    """
    dtype = _state_dtype(param, group["state_dtype"])
    if "step" not in state:
        device = param.device if group["capturable"] else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        if keeps_plain_average(path, group) and group["prev_grad_init"] == "current":
            # the start that makes c_1 = g_1; see quasi_hyperbolic
            gamma = group["gamma"]
            state["exp_avg"].copy_(grad).mul_(-gamma / (1 - gamma))
    if has_second_moment(path) and "exp_avg_sq" not in state:
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
    if has_second_moment(path) and group["amsgrad"] and "max_exp_avg_sq" not in state:
        state["max_exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)


def remember_gradient(
    state: dict[str, Any], name: str, grad: Tensor, param: Tensor, group: dict[str, Any]
) -> None:
    """Copy a gradient into the state, in `prev_grad_dtype` or its own dtype."""
    own = gradient_buffer(state, name, grad, param, group)
    # local parts of DTensors cost no dispatch; a gradient may be placed otherwise than its parameter
    placed_alike = getattr(grad, "placements", None) == getattr(own, "placements", None)
    target, source = (own_part(own), own_part(grad)) if placed_alike else (own, grad)
    target.copy_(source)


def keep_gradients(stores: list[Tensor], grads: list[Tensor]) -> None:
    """Copy gradients into the state's tensors."""
    if type(stores[0]) is Tensor:
        torch._foreach_copy_(stores, grads)  # pyright: ignore[reportPrivateImportUsage]
        return
    for store, grad in zip(stores, grads, strict=True):
        # local parts of DTensors cost no dispatch; a gradient has been placed like its parameter
        own_part(store).copy_(own_part(grad))


def require_own_memory(grad: Tensor) -> None:
    """Raise unless a gradient may be taken away from its parameter.

    Raises:
        RuntimeError: if the gradient is part of a larger memory (a bucket of DDP with
            gradient_as_bucket_view=True, a reduction buffer of FSDP), which is written to again, or is
            tracked by autograd (create_graph=True), so that somebody holds on to it.
    """
    if grad.requires_grad or grad.retains_grad:
        raise RuntimeError("steal_grad=True cannot take gradients that autograd tracks (create_graph=True)")
    own = own_part(grad)
    if own.untyped_storage().nbytes() > own.numel() * own.element_size():
        raise RuntimeError(
            "steal_grad=True cannot take a gradient that is part of a larger memory, "
            "such as a bucket of DDP with gradient_as_bucket_view=True"
        )


def gradient_buffer(
    state: dict[str, Any], name: str, grad: Tensor, param: Tensor, group: dict[str, Any]
) -> Tensor:
    """The state's tensor that a gradient is to be copied into; a new one, not yet filled, if none fits."""
    own = state.get(name)
    if own is None or own.shape != grad.shape:
        dtype = group["prev_grad_dtype"]
        own = torch.empty_like(param, dtype=grad.dtype if dtype is None or grad.is_complex() else dtype)
        state[name] = own
    return own


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over a mesh; asks without importing torch.distributed.tensor."""
    return hasattr(tensor, "device_mesh")


def own_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, a plain tensor as it is; call it under torch.no_grad."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def on_any_rank(flags: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Whether a flag is up, for a DTensor on any rank that holds a part of it; a 0-d tensor on the CPU."""
    up = [flag.cpu() for flag, tensor in zip(flags, tensors, strict=True) if not is_dtensor(tensor)]
    spread = [(flag, tensor) for flag, tensor in zip(flags, tensors, strict=True) if is_dtensor(tensor)]
    if spread:
        from .shards import Layout, summed_over_ranks

        layouts = [Layout.of(tensor) for _, tensor in spread]  # pyright: ignore[reportArgumentType]
        counts = summed_over_ranks([flag.double().reshape(1) for flag, _ in spread], layouts)
        up += [(count > 0).reshape(()).cpu() for count in counts]
    return torch.stack(up).any()


def restore_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give every state tensor of a loaded checkpoint its saved dtype and memory of its own."""
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    capturable = {p: group.get("capturable") for group in optimizer.param_groups for p in group["params"]}
    for saved_id, param in zip(saved_ids, params, strict=True):
        saved = state_dict["state"].get(saved_id)
        if saved is None:
            continue
        state = optimizer.state[param]
        for name, value in saved.items():
            if name == "step":
                device = param.device if capturable.get(param, False) else "cpu"
                state[name] = torch.as_tensor(value, dtype=torch.float32).detach().clone().to(device)
            elif isinstance(value, Tensor):
                state[name] = value.detach().to(param.device, copy=True)
        _drop_promoted_gradient(state)


def _drop_promoted_gradient(state: dict[str, Any]) -> None:
    """The release keeps previous_grad after it became last_grad; used again it would be a batch late."""
    previous, last = state.get("previous_grad"), state.get("last_grad")
    if previous is not None and last is not None and torch.equal(previous, last):
        del state["previous_grad"]


def _state_dtype(param: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    if param.is_complex():
        return param.dtype
    return working_dtype(param.dtype) if wanted is None else wanted
