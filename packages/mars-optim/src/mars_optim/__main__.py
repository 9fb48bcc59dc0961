"""`python -m mars_optim info`: versions, and which extras and backends work here or why not.

An extra works when its modules import; a backend works on a device when it really makes a step there.
"""

import argparse
import platform
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from . import __version__

EXTRAS = {
    "torch": ("torch", "jaxtyping"),
    "jax": ("jax", "optax", "jaxtyping"),
    "hf": ("torch", "jaxtyping", "transformers", "accelerate"),
}
# the values of the options `foreach` and `fused`
BACKENDS = {"for-loop": (False, False), "foreach": (True, False), "fused": (False, True)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; those of the process if None.

    Returns:
        0. Unknown words end the process with status 2 and a usage line, as argparse does.
    """
    parser = argparse.ArgumentParser(prog="python -m mars_optim", description="MARS optimisers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show versions and which extras and backends work")
    parser.parse_args(arguments)
    sys.stdout.writelines(f"{line}\n" for line in info())
    return 0


def info() -> Iterator[str]:
    """Lines that describe this installation."""
    yield f"mars-optim {__version__}, Python {platform.python_version()}, NumPy {version('numpy')}"
    usable = {}
    for extra, modules in EXTRAS.items():
        problem = _import_problem(modules)
        usable[extra] = problem is None
        found = ", ".join(f"{name} {_installed_version(name)}" for name in modules)
        cure = f'pip install "mars-optim[{extra}]"'
        yield f"extra [{extra}]: {found}: {_verdict(problem, cure)}"
    if not usable["torch"]:
        yield "backends: none without the extra [torch]"
        return
    for device in _devices():
        for name, (foreach, fused) in BACKENDS.items():
            yield f"backend {name} on {device}: {_verdict(_step_problem(device, foreach, fused))}"


def _verdict(problem: str | None, cure: str | None = None) -> str:
    if problem is None:
        return "works"
    return f"does not work: {problem}" + (f" ({cure})" if cure else "")


def _import_problem(modules: tuple[str, ...]) -> str | None:
    """First line of what goes wrong when the modules are imported, None if nothing does."""
    for name in modules:
        try:
            import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            return _first_line(error)
    return None


def _installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _step_problem(device: str, foreach: bool, fused: bool) -> str | None:
    """First line of what goes wrong in one step on the device, None if nothing does."""
    import warnings

    import torch

    from .torch import MARS

    try:
        matrix = torch.nn.Parameter(torch.ones(2, 2, device=device))
        matrix.grad = torch.ones_like(matrix)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a fallback to another backend is announced by a warning
            MARS([matrix], foreach=foreach, fused=fused).step()
    except (RuntimeError, ValueError, Warning) as error:
        return _first_line(error)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
