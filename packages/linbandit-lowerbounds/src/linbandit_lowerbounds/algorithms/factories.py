"""What all factories of algorithms share: caching, and the label that results and plots carry."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from inspect import signature
from numbers import Real
from typing import Any, ParamSpec

from linbandit_lowerbounds.environment import Algorithm

P = ParamSpec("P")
_CONSTANTS = ("delta", "lam", "R", "X", "S_theta")


def factory(make: Callable[P, Algorithm]) -> Callable[P, Algorithm]:
    """Decorator: equal arguments give the same object, so that a program is compiled once for each setting.

    It also fills in `Algorithm.config`, by which a resumed simulation recognises its learner, and adds to its
    name the constants of its confidence radius that are not the defaults.

    Args:
        make: a function of keyword arguments that returns an `Algorithm`.
    """
    untyped: Callable[..., Algorithm] = make
    defaults = {
        name: parameter.default
        for name, parameter in signature(make).parameters.items()
        if parameter.default is not parameter.empty
    }

    def build(**settings: Any) -> Algorithm:
        config = ", ".join(f"{name}={_described(value)}" for name, value in settings.items())
        made = untyped(**settings)
        changed = {
            name: settings[name]
            for name in _CONSTANTS
            if name in defaults and settings[name] != defaults[name]
        }
        return made._replace(config=f"{make.__name__}({config})", name=_noted(made.name, changed))

    cached = lru_cache(maxsize=None)(build)

    @wraps(make)
    def wrapper(*args: P.args, **settings: P.kwargs) -> Algorithm:
        if args:
            raise TypeError(f"{make.__name__} takes keyword arguments only, got {args!r}")
        # In one order and with the defaults: equal settings are one learner, however they are spelled.
        complete: dict[str, Any] = dict(sorted((defaults | settings).items()))
        if any(isinstance(value, bool) != isinstance(defaults.get(n), bool) for n, value in complete.items()):
            return build(**complete)  # True equals 1.0 to the cache; the factory tells them apart
        try:
            return cached(**complete)
        except TypeError:
            # Unhashable values cannot be cached; wrong ones raise here what the factory itself says.
            return build(**complete)

    return wrapper


def named(name: str, *, radius_scale: float = 1.0, preset: str = "", **settings: tuple[Any, Any]) -> str:
    """The label of an algorithm, such as "SAVE (theory, radius x 0.01, explore first)".

    A scaled radius is always in it: nothing is tuned in silence.

    Args:
        name: the algorithm.
        radius_scale: factor on the radius, named unless it is 1.
        preset: "theory" or "practical" where there are both.
        settings: name -> (value, default); named when they differ.
    """
    notes = [preset] if preset else []
    if radius_scale != 1.0:
        notes.append(f"radius x {radius_scale:g}")
    notes += [
        f"{key.replace('_', ' ')} {value:g}"
        if isinstance(value, float)
        else f"{key.replace('_', ' ')} {value}"
        for key, (value, default) in settings.items()
        if value != default
    ]
    return f"{name} ({', '.join(notes)})" if notes else name


def _noted(name: str, constants: dict[str, Any]) -> str:
    notes = [f"{key} {value:g}" for key, value in constants.items() if f"{key} {value:g}" not in name]
    if not notes:
        return name
    start = f"{name[:-1]}, " if name.endswith(")") else f"{name} ("
    return f"{start}{', '.join(notes)})"


def _described(value: Any) -> str:
    # The repr of functions holds addresses, which another process does not share.
    if isinstance(value, Algorithm):
        return value.config
    # 1, 1.0 and NumPy's one are equal settings.
    return repr(float(value)) if isinstance(value, Real) and not isinstance(value, bool) else repr(value)
