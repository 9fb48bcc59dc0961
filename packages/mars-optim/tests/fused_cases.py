"""One step of a fused backend beside the loop on the same tensors: what the tests of both are made of."""

from dataclasses import dataclass, field
from typing import Any

import torch

from mars_optim.torch import UpdateRule, mars

SHAPES = ((6, 4), (3, 8), (5,), (2, 3, 3, 2), (1, 4), (7, 1), (1,), (4097, 3), (1023,))
MATRICES = ((6, 4), (3, 8), (2, 3, 3, 2), (1, 4), (7, 1), (130, 33))
KINDS = ("adamw", "lion", "sgd", "shampoo", "m")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no clip": {"clip": None},
    "never clipped": {"clip": 1e6},
    "no reference": {"gamma": 0.0},
    "batched": {"batched": True},
    "cautious decay": {"cautious_decay": True},
    "cautious": {"cautious": True},
}
ADAMW_VARIANTS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "second moment of g": {"second_moment": "grad"},
    "eps before correction": {"eps_before_correction": True, "eps": 0.1},
}
QUASI_HYPERBOLIC: dict[str, Any] = {"clip": None, "quasi_hyperbolic": True, "gamma": 0.3}
RULES = [
    *((kind, name, VARIANTS[name]) for kind in KINDS for name in VARIANTS),
    *(("adamw", name, ADAMW_VARIANTS[name]) for name in ADAMW_VARIANTS),
    *((kind, "memory efficient", QUASI_HYPERBOLIC) for kind in KINDS[1:]),
]
# one step on entries of order one: a few rounding errors of each
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6}
# parameters in half precision are rounded once from float32 values that agree: at most to the next number
ROUNDED = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Case:
    """Tensors and rule of one step; everything follows from the seed."""

    kind: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] | None = None
    dtype: torch.dtype = torch.float64
    grad_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None
    store_dtype: torch.dtype | None = None
    storing: bool = True
    common_norm: float | None = None
    seed: int = 0

    @property
    def rule(self) -> UpdateRule:
        base = {"lr": 0.1, "beta1": 0.9, "beta2": 0.97, "gamma": 0.05, "clip": 1.0, "decay": 0.02}
        return UpdateRule(kind=self.kind, **{**base, **self.options})

    def lists(self) -> dict[str, Any]:
        """Parameters, gradients, references, state, step counters, and buffers for the gradients."""
        generator = torch.Generator().manual_seed(self.seed)
        orthogonal = self.kind in ("shampoo", "m")
        shapes = self.shapes or (MATRICES if orthogonal else SHAPES)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def draw(dtype):
            drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            return [tensor.to(dtype) for tensor in drawn]

        gradient = self.grad_dtype or self.dtype
        state = self.state_dtype or wide
        rule = self.rule
        amsgrad = rule.has_second_moment and rule.amsgrad
        params, grads, averages = draw(self.dtype), draw(gradient), draw(state)
        references = draw(self.store_dtype or gradient)
        second = [tensor.square() for tensor in draw(state)] if rule.has_second_moment else []
        largest = [tensor.square() for tensor in draw(state)] if amsgrad else []
        steps = [torch.tensor(float(3 + i % 2)) for i in range(len(shapes))]
        corrected = rule.correction_factor != 0 and not rule.quasi_hyperbolic
        return {
            "params": params,
            "grads": grads,
            "references": references if corrected else None,
            "exp_avgs": averages,
            "exp_avg_sqs": second,
            "max_exp_avg_sqs": largest,
            "steps": steps,
            "rule": rule,
            "norm": None if self.common_norm is None else torch.tensor(self.common_norm, dtype=wide),
        }


def by_loop(case: Case) -> dict[str, list[torch.Tensor]]:
    """Everything that changes, after one step of the loop; the remembered gradients are copies."""
    lists = case.lists()
    norm = lists.pop("norm")
    divisors = mars(**lists, norm=norm)
    stores = [g.to(case.store_dtype or g.dtype) for g in lists["grads"]] if case.storing else []
    return _changed(lists, divisors, stores)


def by_backend(backend, case: Case, device: str = "cpu") -> dict[str, list[torch.Tensor]]:
    """The same after one step of `backend`, which stores over the references where there are some."""
    lists = case.lists()
    for name in ("params", "grads", "references", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        lists[name] = None if lists[name] is None else [tensor.to(device) for tensor in lists[name]]
    lists["norm"] = None if lists["norm"] is None else lists["norm"].to(device)
    stores = lists["references"] or [torch.full_like(g, torch.nan) for g in lists["grads"]]
    divisors = backend(**lists, stores=stores if case.storing else None)
    changed = _changed(lists, divisors, stores if case.storing else [])
    return {name: [tensor.cpu() for tensor in tensors] for name, tensors in changed.items()}


def assert_agree(
    actual: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]], *, rounds: bool = True
) -> None:
    """Compare what a backend left with what the loop left; counters and copies must be equal.

    With rounds=False a copy of another dtype may be the next number in half precision.
    """
    assert actual.keys() == expected.keys()
    # arithmetic is in the working dtype of the parameters, however wide the state
    working = torch.float64 if expected["params"][0].dtype == torch.float64 else torch.float32
    for name, tensors in expected.items():
        assert len(actual[name]) == len(tensors), name
        for a, e in zip(actual[name], tensors, strict=True):
            tolerance = ROUNDED.get(e.dtype) or max(TOLERANCES[e.dtype], TOLERANCES[working])
            exact = name in ("steps", "grads") or (name == "stores" and (rounds or e.dtype not in ROUNDED))
            torch.testing.assert_close(
                a, e, rtol=0 if exact else tolerance, atol=0 if exact else tolerance, equal_nan=True
            )


def _changed(lists, divisors, stores):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
    return {**{name: lists[name] for name in names}, "divisors": divisors, "stores": stores}
