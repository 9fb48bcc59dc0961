"""Time of a decode step against the length of the cache, from the JSON of bench_decode.py: log2 on both axes.

One panel per combination of heads, width and batch, one line per contender.

Run: `python benchmarks/plot_decode.py decode.json decode.svg`
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Lines = dict[str, dict[str, list[tuple[int, float]]]]  # panel -> contender -> (tokens, median seconds)


def lines_of(comparisons: list[dict[str, Any]]) -> Lines:
    """What is drawn, panels and contenders in the order in which they were measured.

    Args:
        comparisons: the content of the JSON file.

    Raises:
        ValueError: if a title is not one of bench_decode.py.
    """
    found: Lines = {}
    for comparison in comparisons:
        sizes = re.search(r"B (\d+), M (\d+), (h \d+, D \d+)", comparison["title"])
        if sizes is None:
            raise ValueError(f"titles must be those of bench_decode.py, got {comparison['title']!r}")
        batch, tokens, shape = sizes.groups()
        panel = found.setdefault(f"{shape}, B {batch}", {})
        for row in comparison["rows"]:
            if row["error"] is None:
                panel.setdefault(row["name"], []).append((int(tokens), row["median"]))
    return found


def draw(panels: Lines) -> Figure:
    """The figure."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, contenders) in zip(grid, panels.items(), strict=False):
        for name, points in contenders.items():
            tokens, seconds = zip(*sorted(points), strict=True)
            axes.plot(tokens, [1e6 * value for value in seconds], marker="o", markersize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(title=title, xlabel="cached tokens", ylabel="microseconds")
        axes.legend(fontsize="x-small")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def main(arguments: list[str]) -> int:
    """Draw what the first file holds into the second."""
    if len(arguments) != 2:
        sys.stderr.write("usage: plot_decode.py RESULTS.json PICTURE\n")
        return 2
    source, target = map(Path, arguments)
    draw(lines_of(json.loads(source.read_text(encoding="utf-8")))).savefig(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
