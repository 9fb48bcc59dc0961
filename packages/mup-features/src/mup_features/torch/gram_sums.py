"""Sums over features in float64 on the device of the features, on one process or a group of them.

What a layer's measurement needs is a sum over features: A A', A A0', ||a - a0||^2, counts. So a matrix of
features is taken in chunks of columns, each converted to float64 for its products. In a process group

    shard = "samples"   a rank holds the rows of its own samples: chunks of columns are gathered, a rank
                        multiplies its rows by everyone's, and the rows of the result are gathered at the end;
    shard = "features"  a rank holds the columns of its own features: the sums are added up.

Every rank ends with the same numbers, bit for bit. Rows are ordered by rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

Shard = Literal["samples", "features"]

# Entries of a float64 copy of a chunk (32 MB), and rows in a block of the triangle that is computed.
_CHUNK = 1 << 22
_BLOCK = 128


@dataclass(frozen=True)
class Group:
    """Who shares the work.

    Attributes:
        shard: what a rank holds.
        process_group: the group of torch.distributed, None for all processes.
    """

    shard: Shard
    process_group: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.process_group)

    @property
    def rank(self) -> int:
        """This process' rank in the group."""
        return dist.get_rank(self.process_group)

    def counts(self, own: int, device: torch.device) -> list[int]:
        """A number of every rank."""
        mine = torch.tensor([own], device=device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.process_group)
        return [int(count) for count in found]

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks; shorter ones are padded for the transport."""
        sent = rows.new_zeros((max(counts), *rows.shape[1:]))
        sent[: len(rows)] = rows
        found = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(found, sent, group=self.process_group)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def add(self, values: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(values, group=self.process_group)
        return values


class GramSums:
    """Sums of one layer over all chunks, passes and ranks.

    Args:
        rows: samples on this rank.
        device: where the sums are; it has to know float64.
        reference: whether reference features come along.
        bounds: range of the activation, to count saturated entries; None counts none.
        group: who shares the work; None for one process.
    """

    def __init__(
        self,
        rows: int,
        device: torch.device,
        *,
        reference: bool,
        bounds: tuple[float, float] | None = None,
        group: Group | None = None,
    ) -> None:
        self.group = group
        self.split = group is not None and group.shard == "samples"
        self.counts = group.counts(rows, device) if group is not None and self.split else [rows]
        self.samples, self.bounds, self.reference = sum(self.counts), bounds, reference
        self.columns = 0
        zeros = {"dtype": torch.float64, "device": device}
        self.own = torch.zeros(rows, self.samples, **zeros)
        self.cross = torch.zeros(rows, self.samples, **zeros) if reference else None
        # Rows: ||a - a0||^2, ||a0||^2 of each sample; then the numbers of dead columns and saturated entries.
        self.squares = torch.zeros(2, rows, **zeros)
        self.tallies = torch.zeros(2, **zeros)

    def update(self, A: Float[Tensor, "rows columns"], A0: Float[Tensor, "rows columns"] | None) -> None:
        """Adds columns: other features of the same samples."""
        width = max(1, _CHUNK // self.samples)
        chunks = A.split(width, 1)
        for a, a0 in zip(chunks, [None] * len(chunks) if A0 is None else A0.split(width, 1), strict=True):
            everyone = self._everyone(a)
            mine = a.double() if self.split else everyone
            if self.split:
                self.own.addmm_(mine, everyone.T)
            else:
                _add_lower_triangle(self.own, mine)
            self.tallies += self._count(everyone)
            if a0 is not None and self.cross is not None:
                other, all_others = a0.to(a.device).double(), self._everyone(a0.to(a.device))
                self.cross.addmm_(mine, all_others.T)
                self.squares += torch.stack([((mine - other) ** 2).sum(1), (other**2).sum(1)])
        self.columns += A.shape[1]

    def finish(self) -> dict[str, Any]:
        """Means over features: gram, cross, displacement, reference_squares; dead, saturated, columns."""
        if self.split and self.group is not None:
            self.own = self.group.gather_rows(self.own, self.counts)
            self.squares = self.group.gather_rows(self.squares.T.contiguous(), self.counts).T
            if self.cross is not None:
                self.cross = self.group.gather_rows(self.cross, self.counts)
            # Two ranks computed entry ij and ji, in different orders of summation.
            gram = (self.own + self.own.T) / 2
        else:
            gram = self.own.tril() + self.own.tril(-1).T
        columns = self.columns
        if self.group is not None and self.group.shard == "features":
            columns = sum(self.group.counts(columns, gram.device))
            for values in (gram, self.cross, self.squares, self.tallies):
                if values is not None:
                    self.group.add(values)
        against = {}
        if self.cross is not None:
            moved, size = (self.squares / columns).cpu().numpy()
            against = {"displacement": moved, "reference_squares": size}
            against["cross"] = (self.cross / columns).cpu().numpy()
        dead, saturated = (self.tallies / columns).tolist()
        return {
            "gram": (gram / columns).cpu().numpy(),
            "dead": dead,
            "saturated": None if self.bounds is None else saturated / self.samples,
            "columns": columns,
            **against,
        }

    def _everyone(self, a: Tensor) -> Float[Tensor, "samples columns"]:
        if not self.split or self.group is None:
            return a.double()
        return self.group.gather_rows(a.contiguous(), self.counts).double()

    def _count(self, everyone: Tensor) -> Tensor:
        dead = (~everyone.any(0)).sum().double()
        if self.bounds is None:
            return torch.stack([dead, torch.zeros_like(dead)])
        low, high = self.bounds
        margin = 0.01 * (high - low)
        return torch.stack([dead, ((everyone <= low + margin) | (everyone >= high - margin)).sum().double()])


def require_float64(device: torch.device) -> None:
    """Raises where sums could only be taken in float32.

    Raises:
        ValueError: if the device has no float64.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"device must compute in float64, {device} does not; give device='cpu'") from error


def _add_lower_triangle(total: Tensor, a: Tensor) -> None:
    """Adds a a' to the blocks on and below the diagonal: little more than half of the work."""
    for start in range(0, len(a), _BLOCK):
        stop = min(start + _BLOCK, len(a))
        total[start:stop, :stop].addmm_(a[start:stop], a[:stop].T)
