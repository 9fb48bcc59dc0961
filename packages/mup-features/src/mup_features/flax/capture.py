"""Sees what the modules of an nnx model take in and put out, without changing the model.

    def sizes(name, module, args, output): ...

    with capture(model, sizes):
        model(x)

nnx modules have no hooks, and `sow` would have to be written into the user's code and leaves variables in the
model. But `module(x)` looks up `type(module).__call__`: while the context is open, the classes of the watched
modules have a `__call__` that passes on and then reports. Objects, variables and graph definitions stay as
they are. Only objects that belong to the given model report, under their path in it ("blocks.0.fc").

Inside `jax.jit` the reported arrays are tracers of that function and may be returned from it. A transform
within the model (nnx.jit, nnx.scan, nnx.remat, nnx.vmap) runs on copies of its modules, whose values must not
leave it: these do not report.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from flax import nnx

Report = Callable[[str, nnx.Module, tuple[Any, ...], Any], None]

# The classes are shared by the whole process, so one context at a time patches them; a second one in the same
# thread (a model inside a model) nests.
_PATCHING = threading.RLock()


def named_modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every module of a model by its path, parts joined by dots; the model itself is "".

    A module that can be reached on several ways has the path that nnx visits first.

    Raises:
        TypeError: if model is no nnx.Module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")
    found = {
        ".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


@contextmanager
def capture(model: nnx.Module, report: Report, names: Collection[str] | None = None) -> Iterator[None]:
    """Calls `report(name, module, args, output)` after each call of a module of the model.

    Modules report in the order in which their calls end, once for every call. The classes are restored when
    the context closes, also after an error. Other threads that open a context wait; calling modules of the
    same classes from other threads is harmless.

    Args:
        model: the model; for jit, the one that was merged inside the traced function.
        report: gets the path, the module, the positional arguments of its call, and its output.
        names: paths to watch; None watches all modules that can be called.

    Raises:
        TypeError: if model is no nnx.Module.
        ValueError: if a name is no module of the model.
    """
    modules = named_modules(model)
    unknown = sorted(set(names or ()) - set(modules))
    if unknown:
        raise ValueError(f"names must be paths of modules of the model, got {unknown[0]!r}")
    watched = {id(module): name for name, module in modules.items() if names is None or name in names}
    classes = {type(module) for module in modules.values() if id(module) in watched and callable(module)}
    # An object whose call is already being reported: its class may call `super().__call__`, patched as well.
    active: set[int] = set()
    thread = threading.get_ident()

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            name = watched.get(id(module))
            if name is None or id(module) in active or threading.get_ident() != thread:
                return original(module, *args, **kwargs)
            active.add(id(module))
            try:
                output = original(module, *args, **kwargs)
            finally:
                active.discard(id(module))
            report(name, module, args or tuple(kwargs.values()), output)
            return output

        return call

    with _PATCHING:
        # vars(): what the class itself defines; an inherited __call__ is removed again, not written down.
        before = {cls: vars(cls).get("__call__") for cls in classes}
        originals = {cls: cls.__call__ for cls in classes}
        try:
            for cls in classes:
                cls.__call__ = wrapped(originals[cls])
            yield
        finally:
            for cls, own in before.items():
                if own is None:
                    del cls.__call__
                else:
                    cls.__call__ = own


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Sorts "blocks.2" before "blocks.10"."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
