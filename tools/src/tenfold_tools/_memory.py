"""Peak memory of one call, above what the process held when the call began.

- CUDA: torch's own count of allocated bytes, exact.
- Linux CPU: growth of the resident set. Memory that the C library keeps after a free is first handed back, so
  that a reused block counts too; then the kernel's high-water mark is reset and read after the call. Where
  the mark cannot be reset (some containers forbid it) a thread samples the resident set each millisecond,
  which can miss a short peak. Either is a matter of pages touched, good to a few MiB, not of bytes asked for.
- Elsewhere: not measurable, None.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["memory_method", "peak_memory"]

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
SAMPLE_SECONDS = 0.001


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes by which memory grew at most during one call, or None where this cannot be measured.

    Args:
        function: what to call; its value is dropped.
        device: "cpu", or a CUDA device of torch ("cuda", "cuda:1").
    """
    gc.collect()
    if device.startswith("cuda"):
        return _cuda_peak(function, device)
    method = memory_method(device)
    if method is None:
        return None
    _give_back_freed_memory()
    return _high_water_peak(function) if method == HIGH_WATER else _sampled_peak(function)


def memory_method(device: str = "cpu") -> str | None:
    """How `peak_memory` measures here, in words for a report; None if it does not."""
    if device.startswith("cuda"):
        return "bytes allocated by torch on the device"
    if sys.platform != "linux" or not STATUS.exists():
        return None
    return HIGH_WATER if _reset_high_water() else SAMPLED


HIGH_WATER = "growth of the resident set, kernel high-water mark"
SAMPLED = "growth of the resident set, sampled each millisecond (a lower bound)"


def _cuda_peak(function: Callable[[], Any], device: str) -> int:
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _high_water_peak(function: Callable[[], Any]) -> int:
    _reset_high_water()
    before = _status_bytes("VmRSS")
    function()
    return max(0, _status_bytes("VmHWM") - before)


def _sampled_peak(function: Callable[[], Any]) -> int:
    before = peak = _status_bytes("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, _status_bytes("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return max(0, max(peak, _status_bytes("VmRSS")) - before)


def _reset_high_water() -> bool:
    try:
        CLEAR_REFS.write_text("5")  # 5 resets the peak resident set, see proc(5)
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no line {field}")


def _give_back_freed_memory() -> None:
    if os.name == "posix":
        # musl and others have no such function; their answer is then a little too small
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
