"""How DTensor parameters lie on their meshes, and the norms of whole tensors from the parts that ranks hold.

All norms of a step travel in one vector per mesh, with one all-reduce over each mesh dimension that shards
anything and none over a dimension that only replicates.

This module imports torch.distributed.tensor, so import it only where there is a DTensor.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Layout:
    """How a DTensor lies on its mesh.

    Args:
        mesh: the mesh of devices.
        placements: one placement per mesh dimension.
        shape: shape of the whole tensor.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size

    @classmethod
    def of(cls, tensor: DTensor) -> "Layout":
        """The layout of a DTensor."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape)

    @property
    def sharding(self) -> tuple[int, ...]:
        """Mesh dimensions along which ranks hold different entries."""
        return tuple(
            i for i, p in enumerate(self.placements) if not p.is_replicate() and self.mesh.size(i) > 1
        )

    @property
    def regular(self) -> bool:
        """Whether every sharding dimension cuts consecutive blocks (FSDP over TP interleaves them)."""
        return all(type(self.placements[i]) is Shard for i in self.sharding)

    def sharded_axes(self) -> set[int]:
        """Axes of the tensor that are cut, counted from 0."""
        dims = [self.placements[i].dim for i in self.sharding]  # pyright: ignore[reportAttributeAccessIssue]
        return {dim % max(len(self.shape), 1) for dim in dims}

    def box(self, coordinate: Sequence[int]) -> tuple[slice, ...]:
        """The entries that the rank at a mesh coordinate holds, for a regular layout."""
        starts, sizes = [0] * len(self.shape), list(self.shape)
        for i in self.sharding:
            axis = self.placements[i].dim % len(self.shape)  # pyright: ignore[reportAttributeAccessIssue]
            chunk = -(-sizes[axis] // self.mesh.size(i))
            before = min(coordinate[i] * chunk, sizes[axis])
            starts[axis] += before
            sizes[axis] = min(chunk, sizes[axis] - before)
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))

    def own_box(self) -> tuple[slice, ...]:
        """The entries that this rank holds, for a regular layout."""
        return self.box(_coordinate(self.mesh))


def require_placement(
    param: Tensor, grad: Tensor, reference: Tensor | None, state: Mapping[str, Any], *, batched: bool
) -> None:
    """Raise unless a step can work on the local parts of a parameter, its gradients and its state.

    Raises:
        ValueError: if only one of parameter and gradient is a DTensor; if the parameter is complex or a
            Partial sum; if a gradient lies on another mesh, or a state tensor not as the parameter does; if
            the matrices of a stack would have to be found in interleaved shards.
    """
    if not isinstance(param, DTensor):
        raise ValueError("the gradient of a plain parameter must be a plain tensor, got a DTensor")
    layout = Layout.of(param)
    if param.is_complex():
        raise ValueError(f"a DTensor parameter must be real, got dtype {param.dtype}")
    if any(isinstance(placement, Partial) for placement in layout.placements):
        raise ValueError(f"a parameter must be replicated or sharded, got placements {layout.placements}")
    if stacked(layout.shape, batched) and not layout.regular:
        raise ValueError(f'matrix_view="batch" needs placements Shard or Replicate, got {layout.placements}')
    for what, tensor in (("gradient", grad), ("reference gradient", reference)):
        if tensor is None:
            continue
        if not isinstance(tensor, DTensor):
            raise ValueError(f"the {what} of a DTensor parameter must be a DTensor, got a plain tensor")
        if tensor.device_mesh != layout.mesh:
            raise ValueError(
                f"the {what} must lie on the mesh of its parameter, {layout.mesh}, got {tensor.device_mesh}"
            )
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim and _placements(value) != layout.placements:
            raise ValueError(
                f"the state {name!r} must be placed like its parameter, {layout.placements}, "
                f"got {_placements(value) or 'a plain tensor'}"
            )


def placed_like(param: Tensor, tensor: Tensor) -> Tensor:
    """A gradient laid out as its parameter, so that a step can work on local parts."""
    return _redistributed(tensor, Layout.of(param))  # pyright: ignore[reportArgumentType]


def local_part(tensor: Tensor, param: DTensor) -> Tensor:
    """The memory of this rank's part of a DTensor that must lie as the parameter does.

    Call it under torch.no_grad, where it costs no dispatch.
    """
    if not isinstance(tensor, DTensor):
        raise TypeError("what belongs to a DTensor parameter must be a DTensor, got a plain tensor")
    if tensor.placements != param.placements:
        raise ValueError(
            f"a tensor must be placed like its parameter, {param.placements}, got {tensor.placements}"
        )
    return tensor.to_local()


def squared_norms(parts: Sequence[Tensor], layouts: Sequence[Layout], batched: bool = False) -> list[Tensor]:
    """Squared Frobenius norms of whole tensors from their local parts, in float64.

    Args:
        parts: local parts, at least one, on one device.
        layouts: how the tensors lie.
        batched: whether tensors of three or more axes have one norm per matrix.

    Returns:
        For every tensor a vector of its squared norms: one, or batched one per matrix of the whole tensor.
    """
    return summed_over_ranks(own_squares(parts, layouts, batched), layouts)


def own_squares(parts: Sequence[Tensor], layouts: Sequence[Layout], batched: bool) -> list[Tensor]:
    """Squared norms of what this rank holds, vectors in float64 in the form of `squared_norms`."""
    norms = torch.stack(torch._foreach_norm(list(parts))).double()
    squares = list(norms.square().split(1))
    for i, layout in enumerate(layouts):
        if stacked(layout.shape, batched):
            own = torch.linalg.vector_norm(parts[i], dim=(-2, -1)).double().square()
            every = torch.zeros(layout.shape[:-2], dtype=torch.float64, device=own.device)
            every[layout.own_box()[:-2]] = own
            squares[i] = every.flatten()
    return squares


def summed_over_ranks(squares: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Sums of vectors over the ranks that share a tensor.

    Per mesh there is one vector for all tensors and one all-reduce over every dimension that shards any of
    them. A tensor that such a dimension replicates is counted at its first coordinate only.
    """
    sums = list(squares)
    for members in _by_mesh(layouts).values():
        mesh = layouts[members[0]].mesh
        dims = sorted({dim for i in members for dim in layouts[i].sharding})
        if not dims:
            continue
        here = _coordinate(mesh)
        vector = torch.cat([_counted(squares[i], layouts[i], dims, here) for i in members])
        for dim in dims:
            dist.all_reduce(vector, group=mesh.get_group(dim))
        for i, total in zip(members, vector.split([squares[i].numel() for i in members]), strict=True):
            sums[i] = total
    return sums


def own_norm(squared: Tensor, layout: Layout, batched: bool) -> Tensor:
    """The norm that divides this rank's part: 0-d, or for a stack shaped to divide each matrix by its own."""
    norm = squared.sqrt()
    if not stacked(layout.shape, batched):
        return norm.reshape(())
    batch = layout.own_box()[:-2]
    return norm.view(layout.shape[:-2])[batch][..., None, None]


def stacked(shape: Sequence[int], batched: bool) -> bool:
    """Whether the tensor counts as a stack of matrices, each with its own norm."""
    return batched and len(shape) >= 3


def _redistributed(tensor: Tensor, layout: Layout) -> Tensor:
    if not isinstance(tensor, DTensor) or tuple(tensor.placements) == layout.placements:
        return tensor
    return tensor.redistribute(placements=layout.placements)


def _placements(tensor: Tensor) -> tuple[Placement, ...] | None:
    return tuple(tensor.placements) if isinstance(tensor, DTensor) else None


def _counted(squares: Tensor, layout: Layout, dims: Sequence[int], here: Sequence[int]) -> Tensor:
    """The squares, or zeros where another rank of the reduced dimensions counts the same entries."""
    again = any(here[dim] > 0 for dim in dims if dim not in layout.sharding)
    return torch.zeros_like(squares) if again else squares


def _by_mesh(layouts: Sequence[Layout]) -> dict[DeviceMesh, list[int]]:
    meshes: dict[DeviceMesh, list[int]] = defaultdict(list)
    for i, layout in enumerate(layouts):
        meshes[layout.mesh].append(i)
    return meshes


def _coordinate(mesh: DeviceMesh) -> Sequence[int]:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError(f"this rank holds a parameter of {mesh} but is not part of it")
    return coordinate
