"""Scripts beside the tests, run with two host devices: their number is settled when jax starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def with_two_devices(script: str, *arguments: str | Path) -> dict[str, Any]:
    """What the script prints as JSON."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / script, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
