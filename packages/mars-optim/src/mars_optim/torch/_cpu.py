"""The fused step on the CPU: `_cpu.cpp`, compiled on first use and called through ctypes.

A C++ compiler with OpenMP is needed once; the library is kept beside other caches of the user and loaded in
about a millisecond by later processes. The learning rate, gamma and the step number are arguments, so no
schedule compiles anything again. The kernels use as many threads as torch does, and their result does not
depend on how many.

Plain C++ rather than Inductor, because the step of a tensor is a reduction followed by an update that must
meet its data still in the cache, in one parallel region for all tensors: Inductor emits one region per tensor
and pass. (One tensor of 10 million with clip, one thread, in one run: Inductor 1.84, this 1.66 times torch's
fused AdamW; 34 s to compile for that one shape.) And not torch.utils.cpp_extension, which needs ninja at the
user's and compiles torch's headers for nothing: the kernels take addresses.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._fused import STREAMS, Table, host_steps, mars_fused, step_numbers
from .rule import UpdateRule

_SOURCE = Path(__file__).with_name("_cpu.cpp")
_BLOCK = 4096  # as in the source: elements per partial sum
_COMPILERS = ("c++", "g++", "clang++")
# sqrt becomes one instruction and loops with it vectorise; neither flag changes a result
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_VECTORS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
_COMPILE_SECONDS = 300
_DTYPES = {None: 0, torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.float16: 4}
_KINDS = {"adamw": 0, "lion": 1, "sgd": 2, "shampoo": 3, "m": 3}
_CLIP_OFF, _CLIP_GIVEN, _CLIP_OWN = range(3)


class _Job(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("sizes", ctypes.c_void_p),
        ("addresses", ctypes.c_void_p * len(STREAMS)),
        ("step_sizes", ctypes.c_void_p),
        ("root_scales", ctypes.c_void_p),
        ("epsilons", ctypes.c_void_p),
        ("divisors", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("correction", ctypes.c_double),
        ("clip", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("gamma", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("noise", ctypes.c_uint64),
        ("dtypes", ctypes.c_int32 * len(STREAMS)),
        ("working", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("clipping", ctypes.c_int32),
        ("quasi_hyperbolic", ctypes.c_int32),
        ("second_of_gradient", ctypes.c_int32),
        ("cautious_decay", ctypes.c_int32),
        ("stochastic_rounding", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def mars_cpu(
    params: list[Tensor],
    grads: list[Tensor],
    references: list[Tensor] | None,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: UpdateRule,
    norm: Tensor | None,
    stores: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """See `functional.mars`; gradients are copied into `stores` in the same pass.

    Raises:
        RuntimeError: if the kernels cannot be built here; ask `why_unavailable` before.
    """
    lists = (params, grads, references, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    return mars_fused(_launch, *lists, steps, rule.on_host(), norm, stores, generator)


def why_unavailable() -> str | None:
    """Why the kernels cannot be used here, None if they can. The first call compiles them, in seconds."""
    try:
        _library()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def available_or_warn() -> bool:
    """Whether the kernels can be used; says why not in one warning per process."""
    reason = why_unavailable()
    if reason is not None:
        warnings.warn(
            f"fused CPU kernels are not available, using foreach: {reason}", UserWarning, stacklevel=4
        )
    return reason is None


def _launch(
    table: Table,
    steps: list[Tensor],
    rule: UpdateRule,
    given: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    kernels = _library()
    numbers = step_numbers(_counted(steps), rule)[:, table.owners]
    columns = [np.ascontiguousarray(row) for row in numbers]
    divisors = partials = None
    if rule.clip is None:
        clipping = _CLIP_OFF
    elif given is not None:
        clipping, divisors = _CLIP_GIVEN, given.expand(len(table.sizes)).contiguous()
    else:
        clipping, divisors = _CLIP_OWN, torch.empty(len(table.sizes), dtype=table.working)
        partials = np.empty(int((-(-table.sizes // _BLOCK)).sum()))
    job = _Job(
        count=len(table.sizes),
        sizes=_address(table.sizes),
        addresses=tuple(_address(row) for row in table.addresses),
        step_sizes=_address(columns[0]),
        root_scales=_address(columns[1]),
        epsilons=_address(columns[2]),
        divisors=None if divisors is None else divisors.data_ptr(),
        partials=None if partials is None else _address(partials),
        correction=rule.correction_factor,
        clip=rule.clip or 0.0,
        beta1=rule.beta1,
        beta2=rule.beta2,
        gamma=rule.gamma,
        decay=rule.decay,
        noise=_random_bits(generator) if rule.stochastic_rounding else 0,
        dtypes=tuple(_DTYPES[dtype] for dtype in table.dtypes),
        working=_DTYPES[table.working],
        kind=_KINDS[rule.kind],
        clipping=clipping,
        quasi_hyperbolic=rule.quasi_hyperbolic,
        second_of_gradient=rule.second_moment == "grad",
        cautious_decay=rule.cautious_decay,
        stochastic_rounding=rule.stochastic_rounding,
        threads=torch.get_num_threads(),
    )
    kernels.mars_step(ctypes.byref(job))
    return divisors if clipping == _CLIP_OWN else None


def _counted(steps: list[Tensor]) -> list[float]:
    """Count the step and read the counters."""
    if any(step.dtype != torch.float32 for step in steps):
        return host_steps(steps)
    addresses = np.array(list(map(Tensor.data_ptr, steps)), dtype=np.int64)
    values = np.empty(len(steps))
    _library().mars_count(len(steps), _address(addresses), _address(values))
    return values.tolist()


def _random_bits(generator: torch.Generator | None) -> int:
    """The seed of this step's roundings."""
    return int(torch.randint(1 << 62, (), generator=generator))


def _address(array: NDArray[np.int64] | NDArray[np.float64]) -> int:
    return array.ctypes.data


@functools.cache
def _library() -> ctypes.CDLL:
    command = (*_compiler(), *_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()))
    described = repr((command, platform.machine(), platform.system())).encode() + _SOURCE.read_bytes()
    name = f"mars_cpu_{hashlib.sha256(described).hexdigest()[:16]}.so"
    try:
        path = _cache_folder() / name
        if not path.exists():
            _compile(command, path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"cannot build or load {name}: {error}") from error
    library.mars_step.argtypes = (ctypes.POINTER(_Job),)
    library.mars_step.restype = None
    library.mars_count.argtypes = (ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    library.mars_count.restype = None
    return library


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen
    found = next((name for name in _COMPILERS if shutil.which(name)), None)
    if found is None:
        raise RuntimeError(f"no C++ compiler: set CXX or install one of {', '.join(_COMPILERS)}")
    return [found]


def _cache_folder() -> Path:
    """A folder of this user; the one that torch's own extensions are sent to, if the user has set it."""
    root = (
        os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    )
    folder = Path(root) / "mars_optim"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _compile(command: tuple[str, ...], path: Path) -> None:
    """Compile beside the target and rename, so that other processes see all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        try:
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(built)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            first = (error.stderr.strip().splitlines() or ["no message"])[0]
            raise RuntimeError(f"{command[0]} failed with status {error.returncode}: {first}") from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{command[0]} took more than {_COMPILE_SECONDS} s") from error
        built.replace(path)
