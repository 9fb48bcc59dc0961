"""The exact form: four ways to supply h_t, the gradient of the current batch at the previous parameters.

1. `with opt.at_previous_params(): loss(batch).backward()`, then the batch's own backward and `opt.step()`.
2. `opt.step(closure)`: the closure is called at the previous and at the current parameters.
3. Look-ahead, the order of the release: backward of the NEXT batch, `opt.record_next_batch_grad()`, clear,
   backward of the current batch, `opt.step()`. Or the current batch first: backward, `opt.fold()`, clear,
   backward of the next batch, `opt.step()`, which needs one buffer less.
4. `opt.step(prev_grads=...)`.

Ways 1 and 2 keep a copy of the previous parameters, way 3 one or two gradients, way 4 nothing. At t = 1 no
h is needed, and all ways give the same trajectory to rounding.

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithm 1 and Remark 3.3.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .correction import gradient_correction, working_dtype
from .exchange import copy_all, swap
from .gradients import objective_gradient
from .options import path_of
from .state import on_any_rank, own_part, remember_gradient

_FOUR_WAYS = (
    "the exact form (is_approx=False) needs the gradient of this batch at the previous parameters; "
    "supply it by (1) `with opt.at_previous_params(): loss.backward()`, (2) `opt.step(closure)`, "
    "(3) `opt.record_next_batch_grad()` or `opt.fold()` in the step before, or (4) `opt.step(prev_grads=...)`"
)
_NOTHING_HELD = (
    "clip_grad_norm_pair_() found no gradient at the previous parameters in the optimizer: call it between "
    "`with opt.at_previous_params(): ...` or `opt.record_next_batch_grad()` and `opt.step()`; give what "
    "`opt.step(prev_grads=...)` gets as a sequence; `opt.step(closure)` leaves no place for it"
)


class ExactForm:
    """Mixin of `MARS` and `VarianceReduced`: collects h_t and hands it to the step.

    Groups must hold is_approx, gamma, prev_grad_init and prev_grad_dtype. The methods that read more of a
    group speak of MARS's; the wrapper, whose groups belong to another optimiser, has its own.
    """

    if TYPE_CHECKING:
        param_groups: list[dict[str, Any]]
        state: defaultdict[Tensor, Any]

    @contextmanager
    def at_previous_params(
        self,
        *,
        replay_rng: bool = False,
        module: torch.nn.Module | None = None,
        update_buffers: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        by_pointer: bool = False,
    ) -> Iterator[None]:
        """Parameters hold x_{t-1} inside; on exit the gradients become h_t and the parameters come back.

        Works with gradient accumulation, autocast and DDP: whatever backward calls the body makes add up in
        .grad. A tensor without gradient on exit counts as gradient zero. At t = 1 the body runs at x_1 and
        its gradients are dropped. If the body raises, the parameters are restored and the state is as
        before.

        FSDP2 keeps the root's parameters gathered after a forward pass without backward, such as an
        evaluation, and would not see x_{t-1}: pass `module`, or call its `reshard()` after such passes.

        Args:
            replay_rng: random numbers drawn inside are drawn again after exit, so dropout masks agree (CPU,
                and the devices of the parameters).
            module: model whose buffers (BatchNorm statistics) are restored on exit, and which FSDP2 reshards
                on entry and exit.
            update_buffers: keep what the body did to the buffers of `module`.
            scaler: GradScaler by which the loss of the body is scaled; the gradients are divided by its
                scale. A step whose h_t overflowed is skipped.
            by_pointer: let plain parameters point at x_{t-1} instead of copying it in and out. For bodies
                that reach parameters through their modules alone: a captured CUDA graph, a view or NumPy
                array held from before, or weights flattened for cuDNN would silently read x_t.

        Raises:
            RuntimeError: when no group is exact, when gradients are there on entry, or when parameters
                after their first step have no stored predecessor (the step before used another way;
                `reset_correction()` restarts from here).
        """
        self._require_exact("at_previous_params()")
        params = self._all_params()
        left = [p.grad for p in params if p.grad is not None]
        if left and bool(on_any_rank([own_part(grad).any() for grad in left], left)):
            raise RuntimeError(
                "at_previous_params() needs gradients that are None or zero on entry: call zero_grad()"
            )
        with self._previous_params_pass(replay_rng, module, update_buffers, scaler, by_pointer):
            yield

    @torch.no_grad()
    def record_next_batch_grad(self, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Keep .grad, the next batch's gradient at the current parameters, as the h of the next step (way 3).

        Call it once per step, after the next batch's backward and before the current batch's step; then clear
        the gradients. After a step that GradScaler skipped, what was recorded before it is the h of this one.

        Args:
            scaler: GradScaler by which the next batch's loss was scaled.

        Raises:
            RuntimeError: when no group is exact.
        """
        self._require_exact("record_next_batch_grad()")
        for group, param in self._exact_params():
            if not self._corrects(param, group):
                continue
            state = self.state.get(param, {})
            if "previous_grad" in state:
                state["last_grad"] = state.pop("previous_grad")
            if param.grad is not None:
                remember_gradient(
                    self.state[param], "previous_grad", _unscaled(param.grad, scaler), param, group
                )
            elif "step" in state:
                remember_gradient(state, "previous_grad", torch.zeros_like(param), param, group)

    def update_previous_grad(self) -> None:
        """The release's name of `record_next_batch_grad`."""
        self.record_next_batch_grad()

    def update_last_grad(self) -> None:
        """The release's second call after a step: the recorded gradient becomes `last_grad`.

        `step()` has done so already unless it was skipped (GradScaler), so calling it is never needed after
        a step and never wrong.
        """
        for _, param in self._exact_params():
            state = self.state.get(param, {})
            if "previous_grad" in state:
                state["last_grad"] = state.pop("previous_grad")

    @torch.no_grad()
    def fold(self) -> None:
        """Turn .grad, the current batch's gradient, into c_t inside the h buffer (way 3 with one buffer).

        Then clear the gradients, run the next batch's backward at the same parameters and call `step()`,
        which uses c_t and keeps the new gradient as the next h. Not for use with GradScaler,
        which would unscale the next batch's gradient alone.

        Raises:
            RuntimeError: when a group is not exact, when fold() was called twice, when the h of this step is
                missing, or with options that need g_t itself (second_moment="grad", cautious=True).
        """
        if self._folded:
            raise RuntimeError("fold() was called twice without a step in between")
        for group in self.param_groups:
            if group["is_approx"]:
                raise RuntimeError("fold() needs is_approx=False in every group")
            if self._reads_plain_gradient(group):
                raise RuntimeError(
                    'fold() keeps c_t alone, but second_moment="grad" and cautious=True need g_t'
                )
        folded = []
        for group, param in self._exact_params():
            if param.grad is not None:
                folded.append((group, param, self._folding(group, param, param.grad)))
        for group, param, gradient in folded:
            remember_gradient(self.state[param], "last_grad", gradient, param, group)
            self._folded.add(id(param))

    def reset_correction(self) -> None:
        """Take c_t = g_t at every parameter's next step: after a jump of the learning rate or the data."""
        self._forget_references()
        for state in self.state.values():
            for name in ("last_grad", "previous_grad", "prev_param"):
                state.pop(name, None)
            if "step" in state:
                state["correction_reset"] = True

    def _corrects(self, param: Tensor, group: dict[str, Any], /) -> bool:
        """Whether the tensor's gradient is corrected at all."""
        return path_of(param, group) != "plain"

    def _reads_plain_gradient(self, group: dict[str, Any], /) -> bool:
        """Whether the step reads g_t beside c_t."""
        return group["second_moment"] == "grad" or group["cautious"]

    def _needs_previous_point(self, group: dict[str, Any], /) -> bool:
        """Whether h_t depends on x_{t-1} itself, whatever way supplied it."""
        return group["decay_mode"] == "l2" and not group["is_approx"]

    def _reference(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """h_t: given (exact), remembered (approximate) or, at the first step, by `prev_grad_init`."""
        state = self.state.get(param, {})
        if state.get("correction_reset", False):
            return grad
        if "step" not in state:
            return grad if group["prev_grad_init"] == "current" else torch.zeros_like(grad)
        if group["is_approx"]:
            return state.get("last_grad", grad)
        return self._exact_reference(param)

    def _folding(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> Tensor:
        """The corrected gradient, or the plain one of a tensor that is not corrected."""
        g = objective_gradient(param, grad, param, group)
        reference = self._reference(param, grad, group) if self._corrects(param, group) else grad
        if reference is grad:
            return g
        previous = self.state.get(param, {}).get("prev_param")
        h = objective_gradient(param, reference, previous, group)
        return gradient_correction(g, h, beta1=group["betas"][0], gamma=group["gamma"])

    def _folded_gradient(self, param: Tensor) -> Tensor | None:
        return self.state[param]["last_grad"] if id(param) in self._folded else None

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Call the closure, before that at the previous parameters if the exact form still lacks its h."""
        if closure is None:
            return None
        if self._source is None and self._is_exact() and not self._folded:
            if self._lacks_reference():
                for param in self._all_params():
                    if param.grad is not None:
                        param.grad.zero_()
                with self._previous_params_pass(True, None, False, None, False), torch.enable_grad():
                    closure()
            elif not any("last_grad" in state or "previous_grad" in state for state in self.state.values()):
                self._source = "previous parameters"  # the first step: remember x_1 for the second
        with torch.enable_grad():
            return closure()

    def _lacks_reference(self) -> bool:
        corrected = [param for group, param in self._exact_params() if self._corrects(param, group)]
        states = [self.state.get(param, {}) for param in corrected]
        return any("step" in s and "last_grad" not in s and "correction_reset" not in s for s in states)

    def _exact_reference(self, param: Tensor) -> Tensor:
        if self._source is not None and id(param) in self._pending:
            return self._pending[id(param)]
        if self._source == "previous parameters":
            return torch.zeros_like(param)
        if self._source is None and "last_grad" in self.state[param]:
            return self.state[param]["last_grad"]
        raise RuntimeError(_FOUR_WAYS)

    def _held_references(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The h_t of the coming step that are held for these tensors: the memory the step will read."""
        self._require_exact("clip_grad_norm_pair_(..., optimizer)")
        if self._folded:
            raise RuntimeError("clip_grad_norm_pair_() must come before fold(), which mixes g_t with h_t")
        wanted = {id(param) for param in params if param.grad is not None}
        held = []
        for group, param in self._exact_params():
            state = self.state.get(param, {})
            restarts = "step" not in state or "correction_reset" in state  # h_t is g_t itself or 0
            if id(param) not in wanted or restarts or not self._corrects(param, group):
                continue
            if id(param) in self._pending:
                held.append(self._pending[id(param)])
            elif self._source is None:
                if "last_grad" not in state:
                    raise RuntimeError(_NOTHING_HELD)
                held.append(state["last_grad"])
        return held

    def _accept_prev_grads(self, prev_grads: Sequence[Tensor | None] | Mapping[Any, Tensor]) -> None:
        """Check and keep the h of way 4."""
        self._require_exact("step(prev_grads=...)")
        params = self._all_params()
        names = self._names()
        if isinstance(prev_grads, Mapping):
            known = {id(p): p for p in params} | {name: p for p, name in zip(params, names, strict=True)}
            given = []
            for key, value in prev_grads.items():
                param = known.get(id(key) if isinstance(key, Tensor) else key)
                if param is None:
                    shown = "a tensor that is not a parameter" if isinstance(key, Tensor) else repr(key)
                    raise ValueError(f"prev_grads must have parameters or their names as keys, got {shown}")
                given.append((param, value))
        else:
            if len(prev_grads) != len(params):
                raise ValueError(
                    f"prev_grads must have one entry per parameter ({len(params)}), got {len(prev_grads)}"
                )
            given = list(zip(params, prev_grads, strict=True))
        name_of = {id(p): name for p, name in zip(params, names, strict=True)}
        for param, value in given:
            if value is not None:
                require_like(param, value, name_of[id(param)])
        pending = {id(param): value.detach() for param, value in given if value is not None}
        for group, param in self._exact_params():
            needs = param.grad is not None and "step" in self.state.get(param, {})
            if needs and id(param) not in pending and self._corrects(param, group):
                raise ValueError(
                    f"prev_grads must have a tensor for parameter {name_of[id(param)]}, got none"
                )
        self._pending, self._source = pending, "prev_grads"

    @contextmanager
    def _previous_params_pass(
        self,
        replay_rng: bool,
        module: torch.nn.Module | None,
        update_buffers: bool,
        scaler: torch.amp.GradScaler | None,
        by_pointer: bool,
    ) -> Iterator[None]:
        params = self._all_params()
        for param in params:
            state = self.state.get(param, {})
            if "step" in state and "prev_param" not in state and "correction_reset" not in state:
                raise RuntimeError(
                    "no previous parameters are stored, because the step before used neither "
                    "at_previous_params() nor a closure; call reset_correction() to start from here"
                )
        self._forget_references()
        _reshard(module)
        devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
        random_state = (
            (torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}) if replay_rng else None
        )
        buffers = [] if module is None or update_buffers else [(b, b.clone()) for b in module.buffers()]
        had_gradient = [param.grad is not None for param in params]
        moved = [(p, self.state[p]["prev_param"]) for p in params if "prev_param" in self.state.get(p, {})]
        finished = False
        swap(moved, by_pointer=by_pointer)
        try:
            yield
            finished = True
        finally:
            swap(moved, by_pointer=by_pointer)
            if finished:
                self._keep_pending(params, scaler)
            for param, had in zip(params, had_gradient, strict=True):
                if had and param.grad is not None:
                    param.grad.zero_()
                else:
                    param.grad = None
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            _reshard(module)
        if random_state is not None:
            torch.set_rng_state(random_state[0])
            for device, device_state in random_state[1].items():
                torch.cuda.set_rng_state(device_state, device)

    @torch.no_grad()
    def _keep_pending(self, params: list[Tensor], scaler: torch.amp.GradScaler | None) -> None:
        pending = {id(p): _unscaled(p.grad, scaler) for p in params if p.grad is not None}
        if scaler is not None and pending:
            given = list(pending.values())
            self._overflow = on_any_rank([~torch.isfinite(own_part(h)).all() for h in given], given)
        self._pending, self._source = pending, "previous parameters"

    def _reference_overflowed(self) -> bool:
        return self._overflow is not None and bool(self._overflow)

    def _remember_params(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Copy x_t for the steps that ask for the previous parameters; called just before they change."""
        if not self._needs_previous_point(group) and self._source != "previous parameters":
            for param in params:
                self.state[param].pop("prev_param", None)
            return
        kept = []
        for param in params:
            state = self.state[param]
            if "prev_param" not in state:
                state["prev_param"] = torch.empty_like(param)
            kept.append(state["prev_param"])
        copy_all(kept, params)

    def _after_step(self, updated: set[int]) -> None:
        """Consume the h of this step and promote the one recorded for the next."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                if id(param) in updated:
                    state.pop("correction_reset", None)
                elif "prev_param" in state:
                    state["prev_param"].copy_(param.detach())  # a skipped tensor stood still
                if group["is_approx"]:
                    continue
                if self._folded and self._corrects(param, group) and "step" in state:
                    h = torch.zeros_like(param) if param.grad is None else param.grad
                    remember_gradient(state, "last_grad", h, param, group)
                elif "previous_grad" in state:
                    state["last_grad"] = state.pop("previous_grad")
                elif id(param) in updated:
                    state.pop("last_grad", None)
        self._forget_references()

    def _forget_references(self) -> None:
        """No h is pending: at construction, after a step, after loading."""
        self._pending: dict[int, Tensor] = {}
        self._source: str | None = None
        self._overflow: Tensor | None = None
        self._folded: set[int] = set()

    def _require_exact(self, caller: str) -> None:
        if not self._is_exact():
            raise RuntimeError(f"{caller} needs a group with is_approx=False")

    def _is_exact(self) -> bool:
        return not all(group["is_approx"] for group in self.param_groups)

    def _exact_params(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(g, p) for g in self.param_groups if not g["is_approx"] for p in g["params"]]

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _names(self) -> list[str]:
        """The parameters' names, or their positions where they have none."""
        names: list[str] = []
        for group in self.param_groups:
            unnamed = [f"#{len(names) + i}" for i in range(len(group["params"]))]
            names += group.get("param_names", unnamed)
        return names


def _reshard(module: torch.nn.Module | None) -> None:
    """Let FSDP2 forget the parameters it gathered, which hide what happens to the shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if module is None or fsdp is None:
        return
    for part in module.modules():
        if isinstance(part, fsdp.FSDPModule):
            part.reshard()  # pyright: ignore[reportCallIssue]


def require_like(param: Tensor, value: Tensor, name: str) -> None:
    """Raise ValueError unless an entry of prev_grads has the shape, dtype, ... of its parameter."""
    for what in ("shape", "dtype", "device", "placements"):  # plain tensors have no placements
        pair: list[Any] = [getattr(tensor, what, None) for tensor in (param, value)]
        wanted, got = pair
        if wanted != got:
            wanted, got = (tuple(wanted), tuple(got)) if what == "shape" else (wanted, got)
            raise ValueError(f"prev_grads for parameter {name} must have {what} {wanted}, got {got}")


def _unscaled(grad: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    """A copy of the gradient without the scale of the loss, which half precision could not divide by."""
    if scaler is None:
        return grad.clone()
    wide = grad if grad.is_complex() else grad.to(working_dtype(grad.dtype))
    return wide * (1.0 / scaler.get_scale())
