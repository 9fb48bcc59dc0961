"""Which parameters MARS should treat how, and how gamma changes while training.

`build_param_groups` sorts a model's parameters into groups: embedding and output-head matrices must not be
orthogonalised, so under mars-shampoo and mars-m they go to AdamW; patterns move whatever else the user names.
`GammaScheduler` writes gamma = fn(step) into every group, as learning-rate schedulers write lr.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

from torch import nn

ORTHOGONALISED = ("mars-shampoo", "mars-m")
ELEMENTWISE = ("mars-adamw", "mars-lion", "mars-sgd")
HEAD_NAMES = ("lm_head", "head", "classifier", "unembed")


def build_param_groups(
    model: nn.Module,
    mars_type: str = "mars-adamw",
    *,
    weight_decay: float = 0.0,
    adamw_patterns: Sequence[str] = (),
    no_decay_patterns: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for `MARS`, each with `algorithm`, `mars_type` and `param_names` set.

    `algorithm` is "adamw" or None, by which the optimiser corrects the matrices of the group.

    A parameter goes to AdamW if a pattern of `adamw_patterns` matches one of its names or, for the types that
    orthogonalise, if it is an embedding or an output head: the weight of an nn.Embedding or nn.EmbeddingBag
    and whatever is tied to it, what the model's `get_output_embeddings()` (Hugging Face) or
    `get_classifier()` (timm) returns, and an nn.Linear called lm_head, head, classifier or unembed. An output
    head with another name needs a pattern. Tied parameters appear once and frozen ones not at all. Which path
    a vector takes is left to the optimizer (`optimize_1d`).

    Args:
        model: the module to be trained.
        mars_type: one of the five types, with or without the prefix "mars-".
        weight_decay: decay of the decayed groups, >= 0; AdamW groups get it as `weight_decay_1d` too. Vectors
            in a MARS group decay by the optimizer's `weight_decay_1d`, or not at all if this is 0.
        adamw_patterns: shell patterns ("*.router.*") of full parameter names that go to AdamW.
        no_decay_patterns: shell patterns of full parameter names that are not decayed.

    Returns:
        At most four groups (MARS or AdamW, decayed or not), those without parameters left out.

    Raises:
        TypeError: if model is no nn.Module or patterns are given as one string.
        ValueError: if mars_type is unknown, weight_decay is negative or not finite, a pattern matches no
            parameter, or no parameter requires a gradient.
    """
    mars_type = _full_type(mars_type)
    _validate(model, weight_decay, adamw_patterns=adamw_patterns, no_decay_patterns=no_decay_patterns)
    aliases = _names_of_trainable_parameters(model)
    if not aliases:
        raise ValueError("model must have at least one parameter that requires a gradient, got none")
    for argument, patterns in (("adamw_patterns", adamw_patterns), ("no_decay_patterns", no_decay_patterns)):
        _check_that_all_match(argument, patterns, aliases)
    kept_from_orthogonalisation = set(_embeddings_and_heads(model)) if mars_type in ORTHOGONALISED else set()

    members: dict[tuple[str, bool], dict[str, nn.Parameter]] = {}
    for parameter, names in aliases.items():
        by_adamw = parameter in kept_from_orthogonalisation or _matches(names, adamw_patterns)
        decayed = not _matches(names, no_decay_patterns)
        members.setdefault(("adamw" if by_adamw else "mars", decayed), {})[names[0]] = parameter
    return [
        _group(algorithm, mars_type, weight_decay if decayed else 0.0, members[algorithm, decayed])
        for algorithm in ("mars", "adamw")
        for decayed in (True, False)
        if (algorithm, decayed) in members
    ]


def _group(
    algorithm: str, mars_type: str, weight_decay: float, parameters: dict[str, nn.Parameter]
) -> dict[str, Any]:
    group: dict[str, Any] = {
        "params": list(parameters.values()),
        "param_names": list(parameters),
        # None, not "mars", which would put vectors under MARS too
        "algorithm": None if algorithm == "mars" else algorithm,
        "mars_type": mars_type,
        "weight_decay": weight_decay,
    }
    if algorithm == "adamw":  # matrices on the AdamW path: the decay of vectors is not meant for them
        group["weight_decay_1d"] = weight_decay
    return group


def _names_of_trainable_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every trainable parameter once, in the model's order, with all names it is reachable by."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    return names


def _embeddings_and_heads(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of embeddings and output heads; a tied head is the embedding's own parameter."""
    for name, module in model.named_modules(remove_duplicate=False):
        is_head = isinstance(module, nn.Linear) and name.rpartition(".")[2] in HEAD_NAMES
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or is_head:
            yield from module.parameters(recurse=False)
    for method in ("get_output_embeddings", "get_classifier"):
        head = getattr(model, method)() if callable(getattr(model, method, None)) else None
        if isinstance(head, nn.Module):
            yield from head.parameters()


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _full_type(mars_type: str) -> str:
    known = (*ELEMENTWISE, *ORTHOGONALISED)
    for full in known:
        if mars_type in (full, full.removeprefix("mars-")):
            return full
    raise ValueError(f"mars_type must be one of {', '.join(known)} (or without 'mars-'), got {mars_type!r}")


def _validate(model: object, weight_decay: float, **patterns: Sequence[str]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be finite and >= 0, got {weight_decay!r}")
    for argument, value in patterns.items():
        if isinstance(value, str):
            raise TypeError(f"{argument} must be a sequence of patterns, got the single string {value!r}")


def _check_that_all_match(
    argument: str, patterns: Sequence[str], aliases: dict[nn.Parameter, list[str]]
) -> None:
    for pattern in patterns:
        if not any(_matches(names, (pattern,)) for names in aliases.values()):
            some = ", ".join(names[0] for names in list(aliases.values())[:5])
            raise ValueError(
                f"{argument}: {pattern!r} matches no trainable parameter; the names start with {some}"
            )


@runtime_checkable
class HasParamGroups(Protocol):
    """Anything with `param_groups`: an optimizer or a wrapper of one."""

    param_groups: list[dict[str, Any]]


class GammaScheduler:
    """Sets `gamma` of every parameter group to fn(step): at once for step 0, then at each `step()`.

    Call `step()` after the optimizer's. The function itself is not part of `state_dict`: build the scheduler
    with the same function before loading.

    Args:
        optimizer: a `MARS` optimizer, or anything whose `param_groups` hold `gamma`.
        fn: maps the number of finished steps (0, 1, ...) to a finite gamma >= 0.

    Raises:
        ValueError: if a group has no gamma, or fn returns one that is negative or not finite.
    """

    def __init__(self, optimizer: HasParamGroups, fn: Callable[[int], float]) -> None:
        if not all("gamma" in group for group in optimizer.param_groups):
            raise ValueError("optimizer must have gamma in every param group, as MARS has")
        self.optimizer = optimizer
        self.fn = fn
        self._write(0)

    @classmethod
    def constant(cls, optimizer: HasParamGroups, gamma: float) -> "GammaScheduler":
        """The same gamma at every step.

        Args:
            optimizer: as for the class.
            gamma: the value, finite and >= 0.
        """
        return cls(optimizer, lambda _: gamma)

    @classmethod
    def linear(cls, optimizer: HasParamGroups, start: float, end: float, steps: int) -> "GammaScheduler":
        """From start to end in a straight line over the given steps, end afterwards.

        Args:
            optimizer: as for the class.
            start: gamma of the first step, finite and >= 0.
            end: gamma after `steps` steps, finite and >= 0.
            steps: length of the change, >= 1.
        """
        fraction = _fraction_of(steps, start=start, end=end)
        return cls(optimizer, lambda step: start + (end - start) * fraction(step))

    @classmethod
    def cosine(cls, optimizer: HasParamGroups, start: float, end: float, steps: int) -> "GammaScheduler":
        """From start to end along half a cosine over the given steps, end afterwards.

        Args:
            optimizer: as for the class.
            start: gamma of the first step, finite and >= 0.
            end: gamma after `steps` steps, finite and >= 0.
            steps: length of the change, >= 1.
        """
        fraction = _fraction_of(steps, start=start, end=end)
        return cls(optimizer, lambda step: end + (start - end) * (1 + math.cos(math.pi * fraction(step))) / 2)

    def step(self) -> None:
        """Move on by one step and write the new gamma into every group."""
        self._write(self.last_step + 1)

    def state_dict(self) -> dict[str, Any]:
        """The number of finished steps."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, and write that gamma.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            ValueError: if it does not hold exactly `last_step`, an integer >= 0.
        """
        step = state_dict.get("last_step")
        if set(state_dict) != {"last_step"} or not isinstance(step, int) or step < 0:
            raise ValueError(f"state_dict must hold just last_step, an integer >= 0, got {state_dict!r}")
        self._write(step)

    def _write(self, step: int) -> None:
        gamma = float(self.fn(step))
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"fn must return a finite gamma >= 0, got {gamma!r} at step {step}")
        self.last_step = step
        for group in self.optimizer.param_groups:
            group["gamma"] = gamma


def _fraction_of(steps: int, *, start: float, end: float) -> Callable[[int], float]:
    """Validate a schedule and return step -> finished fraction in [0, 1]."""
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps!r}")
    for name, value in (("start", start), ("end", end)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return lambda step: min(step / steps, 1.0)
