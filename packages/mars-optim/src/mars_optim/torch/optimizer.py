"""MARS: a variance-reduced gradient in front of AdamW, Lion, Shampoo, Muon or SGD.

Each step replaces the gradient g_t of a matrix by c_t = g_t + gamma beta1 / (1 - beta1) (g_t - h_t), clips
it to norm 1 and hands it to the base optimiser. In the approximate form h_t is the previous step's
gradient, which the optimiser keeps; in the exact form it is the gradient of the current batch at the
previous parameters, which the caller supplies in one of the four ways of `exact.py`. Vectors and scalars
get plain AdamW.

The class owns options, state and validation; the mathematics is in `functional.py`.

Source: Yuan et al. 2025 (arXiv 2411.10438); Liu et al. 2025 (arXiv 2510.21800).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import take_step
from .buckets import Bucket, Bucketing, global_norms, squares_of_shards
from .correction import norm_of, working_dtype
from .exact import ExactForm
from .options import (
    check_choice,
    check_options,
    resolved_decay,
    resolved_ratio,
)
from .orthogonalize import QUINTIC
from .state import keep_gradients, own_part, restore_state

_LARGEST_QUIET_GAMMA = 0.2


class MARS(Bucketing, ExactForm, torch.optim.Optimizer):
    """Optimiser of all MARS types, in the approximate (default) and the exact form.

    Every argument except `distributed`, `foreach`, `fused` and `preset` is a default for the key of the same
    name in `param_groups`, may differ between groups and is read again at each step, so schedulers may change
    it. `torch.compile` traces a step of the approximate form on plain tensors without graph breaks; a Python
    lr that changes compiles again, so give it a tensor lr.

    Args:
        params: parameters, named parameters, or param groups. A group may also set `algorithm`: "mars"
            corrects all its tensors, "adamw" none, None (default) those that are matrices.
        lr: learning rate eta, >= 0; a number or a tensor of one element. lr=0 needs lr_1d_ratio.
        betas: (beta1, beta2), decay of the momentum and of the second moment, in [0, 1). beta1 may be a
            tensor of one element. Tensors are read at each step, which waits for the device they are on
            unless capturable=True.
        eps: added to the root of the second moment, >= 0.
        weight_decay: lambda of tensors under MARS, >= 0. None is 0.1 for "mars-m" and 0 for the other types.
        amsgrad: divide by the running maximum of the second moment.
        gamma: strength of the correction, >= 0; 0 is the base optimiser, 1 in the exact form is STORM.
        is_approx: True takes the previous gradient for h_t, False the gradient at the previous parameters.
        mars_type: "mars-adamw", "mars-lion", "mars-shampoo", "mars-m" or "mars-sgd" (the prefix may be left
            out).
        optimize_1d: put vectors and scalars under MARS too, with betas and weight_decay; orthogonalised types
            treat them as "mars-adamw".
        lr_1d: learning rate of plain AdamW at the start; only its ratio to lr is kept, so schedules move
            both. It is absolute: lr=1e-3 alone leaves it at 3e-3, a ratio of 3.
        betas_1d: betas of plain AdamW.
        weight_decay_1d: weight decay of plain AdamW. A group that sets weight_decay=0.0 and not this gets 0.
        clip: largest norm of a corrected gradient, > 0; None does not clip.
        clip_scope: "tensor" clips each tensor, "global" all tensors under MARS by their common norm.
        prev_grad_init: "current" takes h_1 = g_1, so c_1 = g_1; "zero" takes h_1 = 0, as the release does.
        matrix_ndim: ">=2" counts every tensor of two or more dimensions as a matrix, "==2" only those of two.
        matrix_view: "flatten" orthogonalises (shape[0], the rest); "batch" treats leading dimensions as a
            batch of matrices, each with its own norm and factor (stacked experts).
        second_moment: "corrected" averages the squares of the clipped c_t, "grad" those of g_t (SuperAdam).
        decay_mode: "decoupled" removes eta lambda x, "independent" lambda eta / (eta at construction) x,
            "cautious" decouples where the step points to zero, "l2" adds lambda x to the gradient.
        cautious: drop entries of the step that disagree in sign with the gradient (arXiv 2411.16085).
        orthogonalize: "newton_schulz", "svd", "newton" or "cubic"; see `polar`.
        ns_steps: Newton-Schulz steps, >= 1.
        ns_coefficients: coefficients of the Newton-Schulz polynomial.
        ns_dtype: dtype of Newton-Schulz products; None: bfloat16 on CUDA, float32 on CPU, float64 for
            float64.
        scale: factor of orthogonal updates: "none", "sqrt_ratio" (default of mars-shampoo), "rms" (default of
            mars-m), or a number.
        memory_efficient: keep no previous gradient; needs clip=None, the approximate form and another type
            than "mars-adamw". The same trajectory while gamma is constant.
        state_dtype: dtype of exp_avg and exp_avg_sq; None: that of the parameter, float32 for half precision.
        prev_grad_dtype: dtype of last_grad; None: that of the gradient.
        stochastic_rounding: round bfloat16 parameters up or down at random, right in the mean, so that small
            steps are not lost; see `generator` of `step`.
        steal_grad: take .grad itself as the previous gradient instead of copying it, and leave None; needs
            the approximate form and prev_grad_dtype=None. A step refuses gradients whose memory belongs to
            others (buckets of DDP or FSDP) or that autograd still tracks.
        lr_1d_ratio: lr of plain AdamW over lr; None: lr_1d / lr.
        distributed: how sharded (DTensor) momenta are orthogonalised: "owner" (what "auto" chooses) sends
            each matrix to one rank and the factor back, "gather" repeats the work on every rank, and
            "blockwise" takes each shard alone, which is another algorithm.
        preset: None, or "official", which sets prev_grad_init="zero", matrix_ndim="==2", bfloat16
            Newton-Schulz, the AdamW epsilon of the MARS-M release, and lets weight_decay_1d rule every
            plain-AdamW tensor.
        foreach: one call per operation and list; None: wherever the tensors are plain, dense and real.
        fused: True does the elementwise part of a step in one pass: by C++ kernels on the CPU, compiled at
            the first step on this machine (seconds, needs a C++ compiler), by Triton kernels on CUDA. Where
            they are not available a warning says why and lists are used. None, like False, never uses them:
            nobody should wait for a compiler unasked, and the CUDA kernels have not been measured yet.
            Sharded parameters are stepped by lists whatever foreach and fused say.
        capturable: keep the step counters on the device and read nothing back, so that a CUDA graph can hold
            the step. Take a step before capturing. A tensor lr or beta1 on the device is read again at each
            replay; on the CPU it is fixed at capture. Orthogonalised types need "newton_schulz".
        maximize: ascend instead of descend.

    Raises:
        ValueError: for a value outside its range, naming the argument, the rule and the value.
        TypeError: for a value of the wrong type.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float | Tensor, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        amsgrad: bool = False,
        gamma: float = 0.025,
        is_approx: bool = True,
        mars_type: str = "mars-adamw",
        optimize_1d: bool = False,
        lr_1d: float = 3e-3,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float = 0.1,
        *,
        clip: float | None = 1.0,
        clip_scope: str = "tensor",
        prev_grad_init: str = "current",
        matrix_ndim: str = ">=2",
        matrix_view: str = "flatten",
        second_moment: str = "corrected",
        decay_mode: str = "decoupled",
        cautious: bool = False,
        orthogonalize: str = "newton_schulz",
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        ns_dtype: torch.dtype | None = None,
        scale: str | float | None = None,
        memory_efficient: bool = False,
        state_dtype: torch.dtype | None = None,
        prev_grad_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        steal_grad: bool = False,
        lr_1d_ratio: float | None = None,
        distributed: str = "auto",
        preset: str | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        maximize: bool = False,
    ) -> None:
        if preset not in (None, "official"):
            raise ValueError(f"preset must be None or 'official', got {preset!r}")
        if foreach not in (None, True, False):
            raise TypeError(f"foreach must be None, True or False, got {foreach!r}")
        if fused not in (None, True, False):
            raise TypeError(f"fused must be None, True or False, got {fused!r}")
        if foreach and fused:
            raise ValueError("foreach and fused must not both be True: each chooses the backend")
        if foreach and isinstance(lr, Tensor) and not capturable:
            raise ValueError("a tensor lr with foreach=True needs capturable=True, got capturable=False")
        if preset == "official":
            prev_grad_init, matrix_ndim = "zero", "==2"
            ns_dtype = torch.bfloat16 if ns_dtype is None else ns_dtype
        check_choice("distributed", distributed, ("auto", "gather", "owner", "blockwise"))
        self._preset = preset
        self._distributed = distributed
        self._foreach = foreach
        self._fused = fused
        self._default_weight_decay = weight_decay
        self._warned_of_gamma = False
        self._last_divisors: list[Tensor] = []
        self._last_ratios: list[Tensor] | None = None
        self._forget_references()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": resolved_decay(weight_decay, mars_type),
            "amsgrad": amsgrad,
            "gamma": gamma,
            "is_approx": is_approx,
            "mars_type": mars_type,
            "optimize_1d": optimize_1d,
            "betas_1d": betas_1d,
            "weight_decay_1d": weight_decay_1d,
            "clip": clip,
            "clip_scope": clip_scope,
            "prev_grad_init": prev_grad_init,
            "matrix_ndim": matrix_ndim,
            "matrix_view": matrix_view,
            "second_moment": second_moment,
            "decay_mode": decay_mode,
            "cautious": cautious,
            "orthogonalize": orthogonalize,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "scale": scale,
            "memory_efficient": memory_efficient,
            "state_dtype": state_dtype,
            "prev_grad_dtype": prev_grad_dtype,
            "stochastic_rounding": stochastic_rounding,
            "steal_grad": steal_grad,
            "lr_1d_ratio": resolved_ratio(lr, lr_1d, lr_1d_ratio),
            "capturable": capturable,
            "maximize": maximize,
            "algorithm": None,
        }
        check_options({**defaults, "construction_lr": float(lr)})
        super().__init__(params, defaults)

    @classmethod
    def official(cls, params: Iterable[Any], **options: Any) -> "MARS":
        """The optimiser with `preset="official"`: what the released code does, to rounding."""
        return cls(params, preset="official", **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options it leaves out take the constructor's values. See the class for `algorithm`.

        Raises:
            ValueError: for an option outside its range; nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        options = {**self.defaults, **param_group}
        if "weight_decay" not in param_group:
            options["weight_decay"] = resolved_decay(self._default_weight_decay, options["mars_type"])
        undecayed = param_group.get("weight_decay") == 0 and self._preset != "official"
        if undecayed and "weight_decay_1d" not in param_group:
            options["weight_decay_1d"] = 0.0  # a group that asks for no decay means all its tensors
        if "lr_1d" in param_group and "lr_1d_ratio" not in param_group:
            options["lr_1d_ratio"] = resolved_ratio(options["lr"], options["lr_1d"], None)
        options.pop("lr_1d", None)
        options.setdefault("construction_lr", float(options["lr"]))
        check_options(options)
        self._warn_of_gamma(options)
        super().add_param_group(options)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        prev_grads: Sequence[Tensor | None] | Mapping[Any, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Update every parameter that has a gradient, and remember what the next correction needs.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss. In the
                exact form it is called twice, first at the previous parameters, unless h_t is there
                already.
            prev_grads: h_t for the exact form, a sequence aligned with the parameters of all groups or a
                dict from parameters or their names to tensors.
            generator: source of the random bits of `stochastic_rounding`, on the device of the parameters;
                None: torch's default one. Replicas (DDP, HSDP) must pass generators in equal states, or
                they drift apart.

        Returns:
            The closure's (last) value, or None.

        Raises:
            RuntimeError: in the exact form after the first step when no h_t was supplied; for sparse
                gradients; for gradients that must not be stolen; while a CUDA graph is captured without
                capturable=True.
            ValueError: if `prev_grads` does not match the parameters.
        """
        if prev_grads is not None:
            self._accept_prev_grads(prev_grads)
        loss = self._evaluate(closure)
        if self._reference_overflowed():
            self._forget_references()
            return loss
        self._check_capture()
        for group in self.param_groups:
            self._warn_of_gamma(group)
            self._check_gradients(group)
        if self._last_ratios is not None:
            self._last_ratios.clear()
        buckets = [bucket for group in self.param_groups for bucket in self._buckets(group)]
        squares = squares_of_shards(buckets)
        norms = global_norms(buckets, squares)
        divisors: list[Tensor] = []
        for bucket in buckets:
            divisors += self._update(bucket, norms, squares, generator)
        self._last_divisors[:] = divisors  # torch.compile keeps this, but no assignment to an optimizer
        if self._is_exact():
            self._after_step({id(param) for bucket in buckets for param in bucket.params})
        return loss

    def reset_correction(self) -> None:
        """Take c_t = g_t at the next step of every parameter: after a jump of the learning rate or the data.

        Raises:
            RuntimeError: with memory_efficient=True, which keeps no previous gradient to forget.
        """
        if any(group["memory_efficient"] for group in self.param_groups):
            raise RuntimeError(
                "reset_correction() needs the previous gradient that memory_efficient=True does not keep"
            )
        super().reset_correction()

    def stats(self) -> dict[str, float]:
        """Statistics of the last step; reading them waits for the device, not reading them costs nothing.

        Returns:
            `clipped`: fraction of the corrected gradients that were clipped (0 without clipping or before a
            step).
            `correction_ratio`: mean of ||a (g - h)|| / ||g|| over corrected tensors with g != 0. It costs
            two norms per tensor, so it is measured only from the first call of this method on, and NaN
            before.
        """
        divisors = [d for divisor in self._last_divisors for d in divisor.flatten().tolist()]
        ratios = [float(ratio) for ratio in self._last_ratios or []]
        ratios = [ratio for ratio in ratios if not math.isnan(ratio)]
        if self._last_ratios is None:
            self._last_ratios = []
        return {
            "clipped": sum(d > 1 for d in divisors) / len(divisors) if divisors else 0.0,
            "correction_ratio": sum(ratios) / len(ratios) if ratios else math.nan,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimiser or of the released code.

        Unlike torch's, the state keeps its dtypes (float32 averages of bfloat16 parameters) and shares no
        memory with `state_dict`. An integer `step` is converted; options that the checkpoint's groups lack
        keep their present values, with one warning that lists them.
        """
        before = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        self._forget_references()
        missing: set[str] = set()
        for group, known in zip(self.param_groups, before, strict=True):
            missing |= known.keys() - group.keys()
            for name, value in known.items():
                group.setdefault(name, value)
        restore_state(self, state_dict)
        if missing:
            warnings.warn(
                f"the state_dict lacks the options {', '.join(sorted(missing))}; they keep their values",
                UserWarning,
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        own = ["_preset", "_distributed", "_foreach", "_fused", "_default_weight_decay", "_warned_of_gamma"]
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last_divisors = []
        self._last_ratios = None
        self._forget_references()

    def _check_capture(self) -> None:
        if torch.compiler.is_compiling() or not torch.cuda.is_available():
            return
        if torch.cuda.is_current_stream_capturing() and not all(g["capturable"] for g in self.param_groups):
            raise RuntimeError("a CUDA graph can only capture step() with capturable=True in every group")

    def _update(
        self,
        bucket: Bucket,
        norms: dict[torch.device, Tensor],
        squares: dict[int, Tensor],
        generator: torch.Generator | None,
    ) -> list[Tensor]:
        """Step one bucket; returns what its corrected gradients were divided by."""
        rule, group, params, grads = bucket.rule, bucket.group, bucket.params, bucket.grads
        if self._last_ratios is not None:
            for g, h in zip(grads, bucket.references or [], strict=False):
                g, h = own_part(g), own_part(h)
                self._last_ratios.append(rule.correction_factor * norm_of(g - h) / norm_of(g))
        if not group["is_approx"]:
            self._remember_params(group, params)
        norm = norms.get(params[0].device) if group["clip_scope"] == "global" else None
        norm = None if norm is None else norm.to(working_dtype(params[0].dtype))
        lists = (
            params,
            grads,
            bucket.references,
            bucket.exp_avgs,
            bucket.exp_avg_sqs,
            bucket.max_exp_avg_sqs,
            bucket.steps,
        )
        stores = None if group["steal_grad"] or not bucket.stores else bucket.stores
        if bucket.spread:
            from .distributed import mars_sharded

            how = self._distributed
            divisors = mars_sharded(*lists, rule, norm=norm, squares=squares, how=how, generator=generator)
        else:
            copied = stores if bucket.backend.fused else None
            divisors = take_step(bucket.backend, *lists, rule, norm=norm, stores=copied, generator=generator)
            stores = None if bucket.backend.fused else stores
        if stores is not None:
            keep_gradients(stores, grads)
        elif group["steal_grad"] and bucket.stores:
            for param, grad in zip(params, grads, strict=True):
                self.state[param]["last_grad"], param.grad = grad, None
        return divisors

    def _warn_of_gamma(self, group: Mapping[str, Any]) -> None:
        if self._warned_of_gamma or not (group["is_approx"] and group["gamma"] > _LARGEST_QUIET_GAMMA):
            return
        self._warned_of_gamma = True
        warnings.warn(
            f"gamma={group['gamma']} with is_approx=True adds noise; only the exact form "
            f"reduces variance, so keep gamma <= {_LARGEST_QUIET_GAMMA} or set is_approx=False",
            UserWarning,
            stacklevel=5,
        )
