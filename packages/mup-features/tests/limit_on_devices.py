"""Train on one and on two host devices and print what differs, in a process of its own.

The number of host devices is settled when jax starts, hence the process.
"""

import json
import sys

import jax
import numpy as np
from limit_runs import limit
from precision import float64
from reference import X, Y


def main(path: str) -> None:
    """Compare one device with two, and a state saved on two that is taken up on one."""
    devices = jax.devices()
    options = {"depth": 3, "samples": 256, "replicas": 1}
    with float64(True):
        one = limit(**options).fit(X, Y, 4, X_test=[[0.1, 0.2]])
        model = limit(**options, devices=devices)
        two = model.fit(X, Y, 4, X_test=[[0.1, 0.2]])
        state = model.state
        assert state is not None
        held = [block for matrix in state.replicas[0].matrices for block in (*matrix.x.q, *matrix.y.g)]
        parts = {len(block.sharding.device_set) for block in held}
        half = limit(**options, devices=devices)
        half.fit(X, Y, 2, X_test=[[0.1, 0.2]], save_to=path)
        taken = limit(**options)
        taken.load(path)
        resumed = taken.resume(4)
    gaps = {
        name: [
            float(np.max(np.abs(other.replicas[name] - values)) / np.max(np.abs(values)))
            for other in (two, resumed)
        ]
        for name, values in one.replicas.items()
    }
    print(json.dumps({"devices": len(devices), "parts": sorted(parts), "gaps": gaps}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
