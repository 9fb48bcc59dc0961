"""Networks of finite width with their neurons spread over devices."""

import jax
import pytest
from device_runs import with_two_devices
from reference import ETA

from mup_features.jax.width import WidthSimulator


@pytest.mark.slow
def test_two_devices_hold_half_of_each_network_and_give_the_numbers_of_one():
    made = with_two_devices("width_on_devices.py")
    for kind in ("revealed", "whole"):
        # Two devices, two parts, no copies.
        assert made[kind]["before"] == made[kind]["after"] == [[2, 2]], kind
        for name, gap in made[kind]["gaps"].items():
            # Sums of two halves instead of one; relative to the largest number of each kind.
            assert gap < 1e-12, (kind, name)
    assert made["revealed"]["grown"] == [[2, 2]]
    width = str(made["width"])
    # A step gathers vectors over the whole width nowhere, or only where a matrix is whole, but never that.
    assert not [shape for shape in made["revealed"]["shapes"] if width in shape.split(",")]
    assert not [shape for shape in made["whole"]["shapes"] if shape.split(",").count(width) > 1]


@pytest.mark.parametrize("count", [0, 3])
def test_a_width_that_devices_cannot_share_is_refused(x64, count):
    devices = jax.devices()[:1] * count
    message = f"width must be a multiple of the number of devices, got 64 and {count} devices"
    with pytest.raises(ValueError, match=message):
        WidthSimulator(64, depth=2, input_dim=2, lr=ETA, key=jax.random.key(0), devices=devices)
