"""What this installation can do: versions, extras that import, implementations that really ran here.

An extra works when its modules import; an implementation works on a device when attention, and decoding from
factors, give there what the plain one gives.
"""

import os
import platform
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, cast

from . import __version__

if TYPE_CHECKING:
    from torch import Tensor

EXTRAS = {
    "torch": ("torch", "jaxtyping"),
    "triton": ("torch", "jaxtyping", "triton"),
    "hf": ("torch", "jaxtyping", "transformers"),
    "jax": ("jax", "jaxtyping"),
    "flax": ("jax", "jaxtyping", "flax"),
}
COMPILED = ("flex",)  # takes seconds to compile before its first answer


def info(*, compiled: bool = False) -> Iterator[str]:
    """Lines that describe this installation.

    Args:
        compiled: also try what torch.compile has to compile first.
    """
    python = f"Python {platform.python_version()} on {platform.machine()}"
    yield f"tpa-attention {__version__}, {python}, NumPy {installed_version('numpy')}"
    usable = {}
    for extra, modules in EXTRAS.items():
        problem = import_problem(modules)
        usable[extra] = problem is None
        found = ", ".join(f"{name} {installed_version(name)}" for name in modules)
        cure = f'pip install "tpa-attention[{extra}]"'
        yield f"extra [{extra}]: {found}: {verdict(problem, cure)}"
    if usable["torch"]:
        yield from implementations(compiled)
    else:
        yield "implementations: none without the extra [torch]"
    yield from interpreter(usable["triton"])


def implementations(compiled: bool) -> Iterator[str]:
    """A line per call, implementation and device."""
    from .torch.functional import ATTENTION_IMPLS, DECODE_IMPLS

    for device in devices():
        for call, impls in {"attention": ATTENTION_IMPLS, "decode": DECODE_IMPLS}.items():
            for impl in impls:
                name = f"{call} by {impl} on {device}"
                if impl in COMPILED and not compiled:
                    yield f"{name}: not tried, it is compiled first (info --compile)"
                elif impl != "auto":
                    yield f"{name}: {verdict(run_problem(call, impl, device))}"


def interpreter(has_triton: bool) -> Iterator[str]:
    """Whether Triton's kernels are interpreted here, and what that cannot do."""
    on = os.environ.get("TRITON_INTERPRET") == "1"
    yield (
        f"Triton interpreter: {'on' if on else 'off'} "
        "(TRITON_INTERPRET=1 before triton is imported runs the kernels on the CPU, for tests)"
    )
    if has_triton:
        yield "  limits: 0.5 ms per program, bfloat16 computed in float32, no autotuning, no CUDA graphs"
        yield f"  range() over runtime values: {verdict(range_problem())}"


def range_problem() -> str | None:
    """The pair of versions whose interpreter cannot loop over a runtime count, None for any other."""
    triton, numpy = (release(installed_version(name)) for name in ("triton", "numpy"))
    if triton < (3, 9) and numpy >= (2, 4):
        return "triton < 3.9 with numpy >= 2.4, our kernels use while instead"
    return None


def release(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def verdict(problem: str | None, cure: str | None = None) -> str:
    """In words, with the cure if there is a problem."""
    if problem is None:
        return "works"
    return f"does not work: {problem}" + (f" ({cure})" if cure else "")


def import_problem(modules: tuple[str, ...]) -> str | None:
    """First line of what goes wrong when the modules are imported, None if nothing does."""
    for name in modules:
        try:
            import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            return first_line(error)
    return None


def installed_version(name: str) -> str:
    """Version of a distribution, or that there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """Devices to try."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def run_problem(call: str, impl: str, device: str) -> str | None:
    """First line of what goes wrong in one small call on the device, None if it gives the right numbers."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a fallback to another implementation is announced by a warning
            found = small_case(call, impl, device).cpu()
        error = (found - small_case(call, "reference", "cpu")).abs().max().item()
    except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError, Warning) as error:
        return first_line(error)
    # TF32 products have 10 bits of mantissa; a wrong mask or scale is off by a tenth and more
    return None if error < 1e-2 and torch.isfinite(found).all() else f"its result is off by {error:.1e}"


def small_case(call: str, impl: str, device: str) -> "Tensor":
    """Two heads of 16 over eight tokens, ranks (2, 1, 1), from a fixed seed."""
    import torch

    from .torch.functional import tpa_attention, tpa_decode_factors

    generator = torch.Generator().manual_seed(0)
    queries = 1 if call == "decode" else 8
    shapes = [(queries, 2, 2), (queries, 2, 16), (8, 1, 2), (8, 1, 16), (8, 1, 2), (8, 1, 16)]
    aq, bq, ak, bk, av, bv = (
        torch.randn(1, *shape, generator=generator).to(device=device) for shape in shapes
    )
    if call == "decode":
        return cast("Tensor", tpa_decode_factors(aq, bq, ak, bk, av, bv, impl=impl))
    return cast("Tensor", tpa_attention(aq, bq, ak, bk, av, bv, impl=impl))


def first_line(error: BaseException) -> str:
    """Of its message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
