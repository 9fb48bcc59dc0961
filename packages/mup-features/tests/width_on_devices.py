"""Train networks of finite width on one and on two host devices and print what differs.

The number of host devices is settled when jax starts, hence a process of its own.
"""

import json
import re

import jax
import numpy as np
from precision import float64
from reference import ETA, X, Y

from mup_features.jax import width
from mup_features.jax.network_step import with_room

WIDTH = 214
"""Neither it nor its half is another size here, or a product of others."""

BASE = {
    "depth": 2, "input_dim": 2, "lr": ETA, "reduction": "sum", "replicas": 3, "parametrization": "ip_bias",
    "momentum": 0.3, "weight_decay": 0.01, "key": jax.random.key(0),
}  # fmt: skip


def shares(states) -> list[tuple[int, int]]:
    """For the arrays over the width: on how many devices they lie, and into how many parts they are cut."""
    found = set()
    for leaf in jax.tree.leaves(states):
        if WIDTH in leaf.shape:
            part = leaf.sharding.shard_shape(leaf.shape)
            found.add((len(leaf.sharding.device_set), leaf.size // int(np.prod(part))))
    return sorted(found)


def compare(**options) -> dict:
    """Gaps between the runs, how the second's states lay, and shapes in the program of its steps."""
    one = width.WidthSimulator(WIDTH, **BASE, **options).fit(X, Y, 3, X_test=[[0.1, 0.2]])
    step, made = width.train_step, {}

    def watched(network, states, *arguments, full):
        if not made:
            program = step.lower(network, states, *arguments, full=full).compile()
            made["program"] = program
            made["before"] = shares(states)
            if options["conditioning"]:
                made["grown"] = shares(with_room(states, 50, 60))
        states, record = made["program"](states, *arguments)
        made["after"] = shares(states)
        return states, record

    width.train_step = watched
    simulator = width.WidthSimulator(WIDTH, **BASE, **options, devices=jax.devices())
    two = simulator.fit(X, Y, 3, X_test=[[0.1, 0.2]])
    width.train_step = step
    gaps = {
        name: float(np.max(np.abs(two.replicas[name] - values)) / np.max(np.abs(values)))
        for name, values in one.replicas.items()
    }
    shapes = re.findall(r"f64\[([\d,]+)\]", made.pop("program").as_text())
    return made | {"gaps": gaps, "shapes": sorted(set(shapes))}


def main() -> None:
    """Hidden matrices drawn where they are looked at, and drawn whole."""
    with float64(True):
        made = {"revealed": compare(conditioning=True), "whole": compare(conditioning=False)}
    print(json.dumps(made | {"width": WIDTH}))  # noqa: T201


if __name__ == "__main__":
    main()
