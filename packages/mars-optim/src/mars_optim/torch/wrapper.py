"""The MARS correction and clip in front of any torch optimiser.

    c_t  = g_t + gamma beta1 / (1 - beta1) (g_t - h_t),   c~_t = c_t / max(1, ||c_t|| / clip)

The base optimiser takes its step along c~_t in place of g_t and keeps its own momentum, preconditioner and
decay. With AdamW this is MARS-AdamW, with Muon MARS-Shampoo, with SGD and momentum MARS-SGD; with SOAP,
schedule-free or a distributed Shampoo it is a method that has no class of its own.

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithm 1.
"""

# pyright: reportPrivateImportUsage=false
# torch._foreach_* carry an underscore but are what torch.optim and its users build on

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .corrected import CorrectedList, Options, add, clip_all
from .correction import gradient_correction, working_dtype
from .exact import ExactForm
from .options import check_choice, check_non_negative
from .state import restore_state

_PREFIX = "mars_"  # marks the wrapper's entries in a state_dict that also holds the base's
_LARGEST_QUIET_GAMMA = 0.2
_CHOICES = {"clip_scope": ("tensor", "global"), "prev_grad_init": ("current", "zero")}


class VarianceReduced(ExactForm, torch.optim.Optimizer):
    """Any torch optimiser, stepping along the corrected and clipped gradient in place of .grad.

    `step` shows c~_t to the base optimiser and puts .grad back afterwards, also when the base raises. Every
    tensor is corrected; a group with gamma=0 and clip=None is left to the base alone. Gradients in half
    precision are corrected and clipped in float32 and rounded once, because .grad has the parameter's dtype.

    The param groups are the base's own, so learning-rate schedulers may attach to either. The options from
    gamma on are kept in them under their own names, may differ between groups and are read at each step, so
    `GammaScheduler` works; `state` holds the wrapper's tensors, `base.state` the base's, `state_dict()` both.
    The exact form (is_approx=False) takes h_t in any of the four ways of `MARS`: `at_previous_params()`,
    `step(closure)`, `record_next_batch_grad()` or `fold()`, `step(prev_grads=...)`.

    Recipes (the base's momentum decay is read from it, so gamma keeps its meaning):

        VarianceReduced(torch.optim.AdamW(params, lr=3e-3, betas=(0.95, 0.99)))      # MARS-AdamW
        VarianceReduced(torch.optim.Muon(matrices, lr=0.02, nesterov=False))         # MARS-Shampoo
        VarianceReduced(SOAP(params, lr=3e-3, betas=(0.95, 0.95)))                   # MARS on SOAP
        VarianceReduced(AdamWScheduleFree(params, lr=3e-3))  # call train() and eval() on the wrapper

    Args:
        base: an optimiser instance whose `step()` works without a closure (so not LBFGS).
        beta1: momentum decay of the base in [0, 1); None reads `betas[0]` or else `momentum` from the group
            at each step. 0 makes the correction vanish.
        gamma: strength of the correction, >= 0; 0 leaves the clip alone, 1 in the exact form is STORM.
        clip: largest norm of a corrected gradient, > 0; None does not clip.
        is_approx: True takes the previous gradient for h_t, False the gradient at the previous parameters.
        clip_scope: "tensor" clips each tensor, "global" all tensors by their common norm.
        prev_grad_init: "current" takes h_1 = g_1, so c_1 = g_1; "zero" takes h_1 = 0.
        prev_grad_dtype: dtype of the kept gradients; None: that of the gradient.

    Raises:
        TypeError: if base is no torch optimiser, or for an option of the wrong type.
        ValueError: for an option outside its range; if beta1 is None and a group of base has neither betas
            nor momentum; if base needs a closure or has group options of the wrapper's names.

    Source: Yuan et al. 2025, Algorithm 1, eqs 3.2-3.5.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        beta1: float | None = None,
        gamma: float = 0.025,
        clip: float | None = 1.0,
        is_approx: bool = True,
        *,
        clip_scope: str = "tensor",
        prev_grad_init: str = "current",
        prev_grad_dtype: torch.dtype | None = None,
    ) -> None:
        options = {
            "gamma": gamma,
            "clip": clip,
            "is_approx": is_approx,
            "clip_scope": clip_scope,
            "prev_grad_init": prev_grad_init,
            "prev_grad_dtype": prev_grad_dtype,
        }
        _check_base(base, options)
        _check_options(options)
        if beta1 is not None:
            _check_beta1(beta1)
        for group in base.param_groups:
            _beta1_of(group, beta1)
        self.base = base
        self.beta1 = beta1
        self._options = options
        # the constructor of Optimizer would make groups of its own; this is how torch builds one from parts
        super().__setstate__({"defaults": {**base.defaults, **options}, "state": defaultdict(dict)})
        self._forget_references()
        _warn_of_noise(options)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups; options that a checkpoint of the bare base lacks are put back."""
        groups = self.base.param_groups
        for group in groups:
            for name, value in self._options.items():
                group.setdefault(name, value)
        return groups

    @param_groups.setter
    def param_groups(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, groups: list[dict[str, Any]]
    ) -> None:
        self.base.param_groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; options of the wrapper that it leaves out take the constructor's values.

        Raises:
            ValueError: for an option outside its range; nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        options = {name: param_group.get(name, value) for name, value in self._options.items()}
        _check_options(options)
        _beta1_of({**self.base.defaults, **param_group}, self.beta1)
        self.base.add_param_group({**param_group, **options})
        _warn_of_noise(options)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        prev_grads: Sequence[Tensor | None] | Mapping[Any, Tensor] | None = None,
    ) -> Any:
        """Correct and clip the gradients, let the base step along them, and put the gradients back.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss. In the
                exact form it is called twice, first at the previous parameters, unless h_t is there
                already. The base is called without it.
            prev_grads: h_t for the exact form, a sequence aligned with the parameters of all groups or a
                dict from parameters or their names to tensors.

        Returns:
            The closure's (last) value, or None.

        Raises:
            RuntimeError: in the exact form after the first step when no h_t was supplied; for sparse
                gradients.
            ValueError: if `prev_grads` does not match the parameters.
        """
        if prev_grads is not None:
            self._accept_prev_grads(prev_grads)
        loss = self._evaluate(closure)
        if self._reference_overflowed():
            self._forget_references()
            return loss
        lists = self._lists()
        for each in lists:
            each.correct()
        clip_all(lists)
        shown = {id(p): c for each in lists for p, c in zip(each.params, each.take_shown(), strict=True)}
        for each in lists:
            self._remember_params(each.group, each.params)
        with self._gradients_replaced(shown):
            self.base.step()
        for each in lists:
            states = [self.state[param] for param in each.params]
            _count_step(states)
            if each.options.remembers:
                each.remember(states)
        self._after_step(set(shown))
        return loss

    def train(self) -> None:
        """Put a base that has modes (schedule-free) into its training mode."""
        getattr(self.base, "train", _do_nothing)()

    def eval(self) -> None:
        """Put a base that has modes (schedule-free) into its evaluation mode."""
        getattr(self.base, "eval", _do_nothing)()

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict, with the wrapper's tensors under names that start with "mars_"."""
        both = self.base.state_dict()
        state = {key: dict(entry) for key, entry in both["state"].items()}
        for key, entry in super().state_dict()["state"].items():
            state.setdefault(key, {}).update({_PREFIX + name: value for name, value in entry.items()})
        return {**both, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of the wrapper, or of the bare base, with which the correction starts afresh.

        The wrapper's tensors keep their dtypes and share no memory with `state_dict`.
        """
        own: dict[Any, dict[str, Any]] = {}
        base: dict[Any, dict[str, Any]] = {}
        for key, entry in state_dict["state"].items():
            for name, value in entry.items():
                side, name_there = (own, name[len(_PREFIX) :]) if name.startswith(_PREFIX) else (base, name)
                side.setdefault(key, {})[name_there] = value
        self.base.load_state_dict({**state_dict, "state": base})
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        self.state = defaultdict(
            dict, {p: dict(own[i]) for i, p in zip(ids, self._all_params(), strict=True) if i in own}
        )
        restore_state(self, {"param_groups": state_dict["param_groups"], "state": own})
        self._forget_references()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("base", "beta1", "defaults", "state", "_options")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_references()

    def _lists(self) -> list[CorrectedList]:
        """What this step corrects. Raises for whatever is missing or wrong; changes nothing."""
        lists: dict[object, CorrectedList] = {}
        for group in self.param_groups:
            options = self._options_of(group)
            for param in group["params"]:
                grad = self._folded_gradient(param) if self._folded else param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise RuntimeError(
                        f"VarianceReduced needs dense gradients, got one of layout {grad.layout}"
                    )
                reference = None if self._folded else self._reference(param, grad, group)
                if reference is grad or options.factor == 0:
                    reference = None
                elif reference is not None and reference.shape != grad.shape:
                    shapes = f"{tuple(grad.shape)} and {tuple(reference.shape)}"
                    raise ValueError(f"gradient and reference must have the same shape, got {shapes}")
                add(lists, options, group, param, grad, reference)
        return list(lists.values())

    def _options_of(self, group: dict[str, Any]) -> Options:
        beta1 = float(_beta1_of(group, self.beta1))
        _check_beta1(beta1)
        check_non_negative("gamma", group["gamma"])
        return Options(
            factor=group["gamma"] * beta1 / (1 - beta1),
            clip=group["clip"],
            by_common_norm=group["clip_scope"] == "global",
            remembers=group["is_approx"],
            prev_grad_dtype=group["prev_grad_dtype"],
        )

    def _folding(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Tensor:
        """The unclipped c_t; the gradient itself where h_t is the same."""
        reference = self._reference(param, grad, group)
        if reference is grad:
            return _widened(grad)
        beta1 = float(_beta1_of(group, self.beta1))
        wide = _widened(grad)
        return gradient_correction(wide, reference.to(wide.dtype), beta1=beta1, gamma=group["gamma"])

    @contextmanager
    def _gradients_replaced(self, shown: dict[int, Tensor]) -> Iterator[None]:
        """Inside, .grad is what is shown, and None where nothing is; the caller's gradients come back."""
        own = [(param, param.grad) for param in self._all_params()]
        try:
            for param, grad in own:
                corrected = shown.get(id(param))
                if corrected is not grad:
                    param.grad = corrected
            yield
        finally:
            for param, grad in own:
                param.grad = grad

    def _corrects(self, _param: Tensor, _group: dict[str, Any], /) -> bool:
        return True

    def _reads_plain_gradient(self, _group: dict[str, Any], /) -> bool:
        return False

    def _needs_previous_point(self, _group: dict[str, Any], /) -> bool:
        return False


def _widened(grad: Tensor) -> Tensor:
    return grad if grad.is_complex() else grad.to(working_dtype(grad.dtype))


def _do_nothing() -> None:
    """What the modes of an optimiser without modes do."""


def _count_step(states: list[dict[str, Any]]) -> None:
    for state in states:
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
    steps = [state["step"] for state in states]
    if all(step.is_cpu for step in steps):
        # as in torch.optim: adding a number would make a tensor of it for every step counter
        torch._foreach_add_(steps, torch.tensor(1.0), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def _beta1_of(group: Mapping[str, Any], beta1: float | None) -> Any:
    """The momentum decay of a group: the given one, or what the base calls it."""
    if beta1 is not None:
        return beta1
    if "betas" in group:
        return group["betas"][0]
    if "momentum" in group:
        return group["momentum"]
    raise ValueError("beta1 must be given where the base's groups hold neither betas nor momentum, got None")


def _check_base(base: object, options: Mapping[str, Any]) -> None:
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base must be a torch.optim.Optimizer instance, got {base!r}")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"base must have a step() that works without a closure, got {type(base).__name__}")
    taken = sorted({name for group in base.param_groups for name in group if name in options})
    if taken:
        raise ValueError(
            "base must not have param group options of the wrapper's names (one that was wrapped or corrects "
            f"by itself?), got {', '.join(taken)}"
        )


def _check_options(options: Mapping[str, Any]) -> None:
    check_non_negative("gamma", options["gamma"])
    clip, dtype = options["clip"], options["prev_grad_dtype"]
    if clip is not None:
        check_non_negative("clip", clip)
        if clip == 0:
            raise ValueError("clip must be finite and > 0 (None turns clipping off), got 0")
    if not isinstance(options["is_approx"], bool):
        raise TypeError(f"is_approx must be True or False, got {options['is_approx']!r}")
    for name, choices in _CHOICES.items():
        check_choice(name, options[name], choices)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"prev_grad_dtype must be None or a torch.dtype, got {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"prev_grad_dtype must be a real floating point dtype, got {dtype!r}")


def _check_beta1(beta1: object) -> None:
    if isinstance(beta1, bool) or not isinstance(beta1, int | float):
        raise TypeError(f"beta1 must be None or a Python number, got {beta1!r}")
    if not 0 <= beta1 < 1 or math.isnan(beta1):
        raise ValueError(f"beta1 must be in [0, 1), got {beta1!r}")


def _warn_of_noise(options: Mapping[str, Any]) -> None:
    if options["is_approx"] and options["gamma"] > _LARGEST_QUIET_GAMMA:
        warnings.warn(
            f"gamma={options['gamma']} with is_approx=True adds noise; only the exact form "
            f"reduces variance, so keep gamma <= {_LARGEST_QUIET_GAMMA} or set is_approx=False",
            UserWarning,
            stacklevel=3,
        )
