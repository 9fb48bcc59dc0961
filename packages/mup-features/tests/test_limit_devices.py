"""The limit with its population spread over devices."""

import pytest
from device_runs import with_two_devices


@pytest.mark.slow
def test_two_devices_give_the_numbers_of_one(tmp_path):
    made = with_two_devices("limit_on_devices.py", tmp_path / "state.npz")
    assert made["devices"] == 2
    assert made["parts"] == [2]
    for name, gaps in made["gaps"].items():
        # Sums of two halves instead of one; relative to the largest number of each kind.
        assert max(gaps) < 1e-12, name
