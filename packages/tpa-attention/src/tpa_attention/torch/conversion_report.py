"""What a conversion cost and what it saved: errors of Q, K, V and the output, numbers cached per token.

All errors are relative, ||X - X^|| / ||X||, in float64, before converted weights are rounded to their type.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SideReport:
    """One of Q, K and V.

    Attributes:
        rank: R of the converted side.
        exact: whether no rank was cut, R >= the number of different heads.
        singular_values: of the h x (D d) matrix of all heads, largest first; those that are zero because
            heads of a group repeat are left out.
        weight_error: ||W - W^||_F / ||W||_F of the factorisation with head factors free of the token.
        token_error: of the heads of all calibration tokens, after refinement; None without calibration.
        refinement: the errors on the calibration tokens from the start to the last accepted step; empty
            without refinement.
    """

    rank: int
    exact: bool
    singular_values: tuple[float, ...]
    weight_error: float
    token_error: float | None = None
    refinement: tuple[float, ...] = ()

    def error_at(self, rank: int) -> float:
        """The relative weight error that plain truncation at a rank has: sqrt(tail / sum of sigma^2).

        Args:
            rank: >= 0; beyond the singular values there is no error.

        Raises:
            ValueError: if the rank is negative.
        """
        if rank < 0:
            raise ValueError(f"rank must be >= 0, got {rank!r}")
        squares = [s * s for s in reversed(self.singular_values)]  # small ones first: no cancellation
        total = sum(squares)
        tail = sum(squares[: max(len(squares) - rank, 0)])
        return (tail / total) ** 0.5 if total else 0.0

    @property
    def error(self) -> float:
        """The error on tokens where there are any, else that of the weights."""
        return self.weight_error if self.token_error is None else self.token_error

    def __str__(self) -> str:
        return "exact" if self.exact else f"error {self.error:.3e}"


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        k: keys, before RoPE, which turns K and K^ alike.
        v: values.
        q: queries if they were factored, else None: they are as they were.
        output_error: of the layer's output on the calibration tokens; None without calibration.
        cache_before: numbers cached per token by the original layer, G (D + E).
        cache_after: numbers cached per token by the converted layer, without padding.
    """

    k: SideReport
    v: SideReport
    q: SideReport | None
    output_error: float | None
    cache_before: int
    cache_after: int

    def __str__(self) -> str:
        sides = [
            f"{name} {side} at rank {side.rank}"
            for name, side in (("Q", self.q), ("K", self.k), ("V", self.v))
            if side is not None
        ]
        output = [] if self.output_error is None else [f"output error {self.output_error:.3e}"]
        return ", ".join([*sides, *output, f"cache {self.cache_before} -> {self.cache_after}"])


@dataclass(frozen=True)
class ConversionReport:
    """All converted layers, in order: iterate over them, or print the table.

    Attributes:
        layers: one report per attention layer.
    """

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def cache_before(self) -> int:
        """Numbers cached per token by the original layers together."""
        return sum(layer.cache_before for layer in self.layers)

    @property
    def cache_after(self) -> int:
        """Numbers cached per token by the converted layers together, without padding."""
        return sum(layer.cache_after for layer in self.layers)

    @property
    def cache_ratio(self) -> float:
        """How many times smaller the cache became; below 1 it grew."""
        return self.cache_before / self.cache_after

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries, for JSON."""
        return {
            "cache_before": self.cache_before,
            "cache_after": self.cache_after,
            "cache_ratio": self.cache_ratio,
            "layers": [_plain(asdict(layer)) for layer in self.layers],
        }

    def __str__(self) -> str:
        on_tokens = any(layer.output_error is not None for layer in self.layers)
        factored = any(layer.q is not None for layer in self.layers)
        sides = ("q", "k", "v") if factored else ("k", "v")
        header = ["layer", *(f"{s.upper()} {n}" for s in sides for n in ("rank", "error"))]
        rows = [header + (["output error"] if on_tokens else [])]
        for i, layer in enumerate(self.layers):
            row = [str(i)]
            for side in (getattr(layer, s) for s in sides):
                row += (
                    ["-", "-"]
                    if side is None
                    else [str(side.rank), "exact" if side.exact else f"{side.error:.3e}"]
                )
            if on_tokens:
                row.append("-" if layer.output_error is None else f"{layer.output_error:.3e}")
            rows.append(row)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in rows]
        what = "heads of the calibration tokens" if on_tokens else "weights"
        return "\n".join(
            [
                f"relative errors of the {what}",
                *lines,
                f"cached numbers per token: {self.cache_before} before, {self.cache_after} after, "
                f"ratio {self.cache_ratio:.2f}",
            ]
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
