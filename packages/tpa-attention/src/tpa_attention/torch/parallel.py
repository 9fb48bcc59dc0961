"""Sharding plans: tensor parallelism over heads, data parallelism over parameters.

Under tensor parallelism rank k of p owns heads H_k. A factors are split by head, B factors belong to all
heads and are computed by every rank, and W^O adds up what the ranks found:

    A_X[:, H_k] = W^a_X[:, H_k] x,    B_X = W^b_X x,    y = sum_k W^O[:, H_k] concat(head_i, i in H_k)

A rank's gradient of W^b counts its own heads only, so these are summed over the ranks, as is that of x. A
token's cache shrinks in its A part alone, to R_K (h/p + D) + R_V (h/p + E) numbers per device. To divide a
cache exactly by p, split it by tokens: `context_parallel_decode`.

Parameters are DTensors, plans go to torch's `parallelize_module`. Attention itself runs on a rank's own
heads, on plain tensors, so kernels and caches are the same as on one device.

Source: heads of Zhang et al. 2025 (arXiv 2501.06425), eq. 3.1-3.3, split as in Shoeybi et al. 2019 (arXiv
1909.08053).
"""

from dataclasses import replace
from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
)
from torch.func import functional_call

from .cache import LayerCache
from .context_parallel import ContextParallelDecode, context_parallel_decode
from .layers import TPAttention
from .model import SwiGLU, T6Block

__all__ = [
    "ContextParallelDecode",
    "HeadParallel",
    "context_parallel_decode",
    "fsdp2_plan",
    "full_state_dict",
    "tensor_parallel_plan",
]


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle] | ParallelStyle:
    """What `parallelize_module(model, mesh, plan)` does to every attention and SwiGLU layer of a model.

    Attention is split by heads (`HeadParallel`), SwiGLU by its hidden features with torch's own styles.
    Neither has to be divisible by the number of ranks. Embedding, norms and output matrix stay as they are,
    plain and equal on all ranks. Build caches afterwards and from the model, `FactorCache(model, ..)`, not
    from its configuration: the model then knows its own heads. All ranks must be fed the same tokens.

    `clip_grad_norm_` takes no mixture of plain tensors and DTensors. Take `get_total_norm` of each kind
    (`full_tensor()` of the latter), and hand the root of the sum of their squares to `clip_grads_with_norm_`.

    Args:
        model: contains `TPAttention` layers, or is one.

    Returns:
        Styles by names of modules; of a layer by itself, its style.

    Raises:
        ValueError: if there is no such layer, or one has `head_activation="softmax"`.

    Example:
        mesh = init_device_mesh("cuda", (8,))
        parallelize_module(model, mesh, tensor_parallel_plan(model))
    """
    if isinstance(model, TPAttention):
        check_activation(model)
        return HeadParallel()
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, TPAttention):
            check_activation(module)
            plan[name] = HeadParallel()
        elif isinstance(module, SwiGLU):
            plan[name] = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
            # DTensors in between: they know the hidden width, where it does not divide evenly too
            plan[f"{name}.w1"] = ColwiseParallel(use_local_output=False)
            plan[f"{name}.w2"] = ColwiseParallel(use_local_output=False)
            plan[f"{name}.w3"] = RowwiseParallel()
    if not any(isinstance(style, HeadParallel) for style in plan.values()):
        raise ValueError(f"model must contain TPAttention layers, got {type(model).__name__} without one")
    return plan


def fsdp2_plan(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool = True,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
) -> nn.Module:
    """Shard parameters, gradients and optimizer state: `fully_shard` on every block, then on the model.

    The units are `T6Block`s, or bare attention layers where there are none. After `tensor_parallel_plan` on
    another dimension of the same mesh, both apply. Create the optimizer afterwards.

    Args:
        model: changed in place.
        mesh: one dimension to shard over, or two, (replicate, shard).
        reshard_after_forward: free gathered parameters between forward and backward.
        mp_policy: types of computation and reduction.
        offload_policy: where sharded parameters wait.

    Returns:
        The model.

    Raises:
        ValueError: if `mesh` has more dimensions, or `model` neither blocks nor attention layers.
    """
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must have 1 dimension, or 2 (replicate, shard), got {mesh.ndim}")
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    options |= {} if mp_policy is None else {"mp_policy": mp_policy}
    options |= {} if offload_policy is None else {"offload_policy": offload_policy}
    units = [module for module in model.modules() if isinstance(module, T6Block)]
    units = units or [module for module in model.modules() if isinstance(module, TPAttention)]
    if not units:
        raise ValueError(
            f"model must contain T6Block or TPAttention modules, got {type(model).__name__} without one"
        )
    for unit in [*(unit for unit in units if unit is not model), model]:
        sharded = fully_shard(unit, **options)
        if mesh.device_type == "cpu":
            # asked for an average, gloo returns the sum in torch 2.8, without a word
            sharded.set_force_sum_reduction_for_comms(True)
    return model


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Plain tensors with the names and shapes of the model before any plan; every rank must call it.

    A sharded head map is stored as (R, h, d), which can be split by heads, in place of (R h, d), and W^O as
    (d, h, E). What comes out here loads into a model on one device.
    """
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    for prefix, module in model.named_modules():
        if isinstance(module, HeadParallelAttention):
            for name in head_axes(module):
                key = f"{prefix}.{name}" if prefix else name
                if key in state:
                    state[key] = joined(module, name, state[key])
    return state


class HeadParallel(ParallelStyle):
    """Tensor parallelism of a `TPAttention` layer: each rank owns ceil(h / p) heads, the last one the rest.

    Afterwards the layer's `num_heads`, its records and its `cache_layout` are those of the rank.

    Args:
        input_layouts: how x is laid out over the ranks; Shard(1) for sequence parallelism.
        output_layouts: how y is to be laid out.
        use_local_output: return a plain tensor; False for a DTensor. Input may be either.

    Raises:
        TypeError: (applied) if the module is no `TPAttention`.
        ValueError: (applied) if the mesh has several dimensions, a rank would be left without a head, the
            layer is split already, or its head activation needs all heads at once.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, TPAttention):
            raise TypeError(f"module must be a TPAttention, got {type(module).__name__}")
        if isinstance(module, HeadParallelAttention):
            raise ValueError("module must not be split by heads already, got one that is")
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh must have 1 dimension, got {device_mesh.ndim}")
        check_activation(module)
        owned = head_range(module.num_heads, device_mesh.size(), device_mesh.get_local_rank())
        layouts = (self.input_layouts, self.output_layouts, self.use_local_output)
        split_by_heads(module, device_mesh, self.src_data_rank)
        module.__class__ = HeadParallelAttention
        cast(HeadParallelAttention, module).own(owned, device_mesh, layouts)
        return module


class HeadParallelAttention(TPAttention):
    """What `HeadParallel` makes of a layer: DTensor parameters, a forward pass over this rank's heads.

    During that pass the layer's own code finds this rank's plain parts in place of its parameters. A split
    part's gradient is complete. A replicated one's counts the heads of this rank, so it is summed over the
    ranks on its way to the parameter.
    """

    def own(
        self, heads: tuple[int, int], mesh: DeviceMesh, layouts: tuple[Placement, Placement, bool]
    ) -> None:
        """Take the sizes of the rank that owns heads `heads[0]` to `heads[1]` - 1."""
        self.all_heads, self.owned, self.mesh = self.num_heads, slice(*heads), mesh
        self.input_layouts, self.output_layouts, self.use_local_output = layouts
        self.num_heads = heads[1] - heads[0]
        for head_map in (self.a_q, self.a_k, self.a_v):
            if head_map is not None:
                head_map.widths = (self.num_heads,)
        if self.kv_only:
            self.b_q.rank = self.num_heads
        self.k_record = replace(self.k_record, heads=self.num_heads)
        self.v_record = replace(self.v_record, heads=self.num_heads)

    def forward(
        self,
        x: Float[Tensor, "B T d"],
        position_ids: Int[Tensor, "..."] | None = None,
        attention_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        layer_idx: int = 0,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> Float[Tensor, "B T d"]:
        """As `TPAttention.forward`, whose arguments these are; a mask of all h heads is cut to the rank's."""
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, (self.input_layouts,), run_check=False)
        own_x = summed_gradient(x)
        if attention_mask is not None and attention_mask.ndim == 4 and attention_mask.shape[1] != 1:
            if attention_mask.shape[1] != self.all_heads:
                raise ValueError(
                    f"attention_mask must have 1 or {self.all_heads} heads, got {attention_mask.shape[1]}"
                )
            attention_mask = attention_mask[:, self.owned]
        parts = {f"layer.{name}": self._part(name, p) for name, p in self.named_parameters()}
        arguments = (own_x, position_ids, attention_mask, cache, layer_idx, cu_seqlens)
        y = functional_call(OwnHeads(self), parts, arguments)
        summed = DTensor.from_local(y, self.mesh, (Partial(),), run_check=False)
        summed = summed.redistribute(placements=(self.output_layouts,))
        return summed.to_local() if self.use_local_output else summed

    def _part(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter as `TPAttention` has it on one device with this rank's heads alone."""
        sharded = cast(DTensor, parameter)
        if name in head_axes(self):
            return joined(self, name, sharded.to_local())
        return summed_gradient(sharded)


class OwnHeads(nn.Module):
    """The plain forward pass of a split layer, for `functional_call`."""

    def __init__(self, layer: HeadParallelAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Any) -> Tensor:
        """`TPAttention.forward` with whatever parameters the layer holds at the moment."""
        return TPAttention.forward(self.layer, *arguments)


def check_activation(module: TPAttention) -> None:
    """Raise if a rank cannot activate its own heads without those of the others."""
    if module.head_activation == "softmax":
        raise ValueError(
            "head_activation must be 'none' or 'sigmoid' under tensor parallelism, got 'softmax', which runs "
            "over the heads of all ranks"
        )


def head_range(heads: int, ranks: int, rank: int) -> tuple[int, int]:
    """First head of a rank and the one after its last, as `Shard` cuts: ceil(h / p) each, the last the rest.

    Raises:
        ValueError: if a rank would own no head.
    """
    share = -(-heads // ranks)
    if share * (ranks - 1) >= heads:
        raise ValueError(
            f"num_heads must leave a head for each of the {ranks} ranks of the mesh, {share} per rank, "
            f"got {heads} heads"
        )
    return share * rank, min(heads, share * (rank + 1))


# --------------------------------------------------------------------------------------------- parameters


def head_axes(module: TPAttention) -> dict[str, tuple[int, int]]:
    """The parameters that have heads: the axis of heads, once split off, and the axis it is split from.

    A maps (R h, ..) -> (R, h, ..), W^Q of KV-only and the gate (h n, d) -> (h, n, d), W^O (d, h E) ->
    (d, h, E). All others belong to every head.
    """
    axes = {f"{name}.{kind}": (1, 0) for name in ("a_q", "a_k", "a_v") for kind in ("weight", "bias")}
    axes |= {"gate.weight": (0, 0), "o.weight": (1, 1)} | ({"b_q.weight": (0, 0)} if module.kv_only else {})
    return axes


def split_by_heads(module: TPAttention, mesh: DeviceMesh, source: int | None) -> None:
    """Distribute every parameter in place; those with heads get an axis of heads and are sharded along it."""
    heads, axes = module.num_heads, head_axes(module)
    for name, parameter in list(module.named_parameters()):
        value, placement = parameter.detach(), Replicate()
        if name in axes:
            head_axis, axis = axes[name]
            sizes = (-1, heads) if head_axis > axis else (heads, -1)
            value, placement = value.unflatten(axis, sizes), Shard(head_axis)
        value = distribute_tensor(value, mesh, (placement,), src_data_rank=source)
        owner, _, attribute = name.rpartition(".")
        distributed = nn.Parameter(value, requires_grad=parameter.requires_grad)
        module.get_submodule(owner).register_parameter(attribute, distributed)


def joined(module: TPAttention, name: str, value: Tensor) -> Tensor:
    """The value of a split parameter in the shape it has without a plan."""
    _, axis = head_axes(module)[name]
    return value.flatten(axis, axis + 1)


def summed_gradient(value: DTensor) -> Tensor:
    """The whole value as a plain tensor; its gradients on the ranks are summed."""
    return value.redistribute(placements=(Replicate(),)).to_local(grad_placements=(Partial(),))
