"""The limit with its population spread over devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_devices_give_the_numbers_of_one(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, here / "limit_on_devices.py", tmp_path / "state.npz"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout)
    assert made["devices"] == 2
    assert made["parts"] == [2]
    for name, gaps in made["gaps"].items():
        # Sums of two halves instead of one; relative to the largest number of each kind.
        assert max(gaps) < 1e-12, name
