"""A table of models side by side, as aligned text for people and as JSON for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

CACHE_COLUMNS = ("name", "heads", "parameters", "cache_numbers", "saving", "stored_as", "cache_bytes")
FLOP_COLUMNS = ("name", "heads", "attention_parameters", "projection", "slope", "macs", "intensity")
HEADINGS = {
    "name": "mechanism",
    "parameters": "parameters of the model",
    "attention_parameters": "parameters per layer",
    "cache_numbers": "numbers per token and layer",
    "saving": "saving",
    "stored_as": "stored as",
    "cache_bytes": "cache bytes per device",
    "projection": "projection MACs",
    "slope": "MACs per cached token",
    "macs": "MACs per step and layer",
    "intensity": "flop per byte",
    "max_context": "longest context",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in exact integers; `max_context` is None where memory was not given or is too small."""

    name: str
    heads: int
    parameters: int
    attention_parameters: int
    cache_numbers: int
    stored_as: str
    cache_bytes: int
    projection: int
    slope: int
    macs: int
    intensity: float
    max_context: int | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows and the case they were counted for.

    Args:
        rows: one per model.
        baseline: name of the row that `saving` and `more_parameters` refer to.
        batch: sequences.
        seq_len: cached tokens of each.
        tp: devices that divide the heads.
    """

    rows: tuple[Row, ...]
    baseline: str
    batch: int
    seq_len: int
    tp: int

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            KeyError: if there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def saving(self, name: str) -> float:
        """How many times fewer numbers per token this row caches than the baseline."""
        return self.row(self.baseline).cache_numbers / self.row(name).cache_numbers

    def more_parameters(self, name: str) -> float:
        """Parameters beyond those of the baseline, as a share of the baseline's."""
        return self.row(name).parameters / self.row(self.baseline).parameters - 1

    def to_text(self, columns: Sequence[str] = CACHE_COLUMNS) -> str:
        """Aligned columns under one heading line; numbers have thousands separators.

        Args:
            columns: fields of `Row`, or "saving".

        Raises:
            ValueError: if a column is unknown.
        """
        known = [*(field.name for field in fields(Row)), "saving"]
        for column in columns:
            if column not in known:
                raise ValueError(f"columns must be among {', '.join(known)}, got {column!r}")
        lines = [[HEADINGS.get(column, column) for column in columns]]
        lines += [[self._cell(row, column) for column in columns] for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in ("name", "stored_as") else cell.rjust(width)
                for cell, width, column in zip(line, widths, columns, strict=True)
            ).rstrip()
            for line in lines
        )

    def to_json(self) -> str:
        """All fields of all rows, the saving against the baseline, and the case; keys are stable."""
        rows = [
            {**asdict(r), "saving": self.saving(r.name), "more_parameters": self.more_parameters(r.name)}
            for r in self.rows
        ]
        case = {"baseline": self.baseline, "batch": self.batch, "seq_len": self.seq_len, "tp": self.tp}
        return json.dumps({**case, "rows": rows}, indent=2)

    def _cell(self, row: Row, column: str) -> str:
        value = f"{self.saving(row.name):.1f}x" if column == "saving" else getattr(row, column)
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.1f}"
        return f"{value:,}" if isinstance(value, int) else value
