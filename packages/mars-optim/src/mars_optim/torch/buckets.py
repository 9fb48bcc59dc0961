"""Buckets: tensors of one group that are stepped together, in aligned lists.

`Bucketing` checks the gradients, allocates state and makes the buckets of a step; `optimizer.py` hands them
to a backend. For a thousand small tensors this is where the time of a step goes, so the loop over parameters
asks each question once per group where it can.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import Backend, choose_backend
from .correction import norm_of
from .exact import ExactForm
from .gradients import corrected_gradient, objective_gradient
from .options import check_scheduled, has_second_moment, is_matrix, keeps_plain_average, paths_of, rule_of
from .rule import UpdateRule
from .state import gradient_buffer, is_dtensor, prepare_state, require_own_memory


@dataclass(kw_only=True)
class Bucket:
    """Tensors of one group, path, type, dtype and device: one call of a backend.

    Args:
        rule: what to do.
        group: their param group.
        corrected: whether they follow MARS rather than plain AdamW.
        backend: what does the step.
        params: parameters x_t.
        grads: gradients g_t, as the mathematics sees them.
        references: h_t; None where nothing is corrected.
        exp_avgs: momenta.
        exp_avg_sqs: second moments, empty for kinds without.
        max_exp_avg_sqs: their running maxima, empty without amsgrad.
        steps: step counters.
        stores: where the gradients are kept for the next step, empty if they are not.
    """

    rule: UpdateRule
    group: dict[str, Any]
    corrected: bool
    backend: Backend
    params: list[Tensor]
    grads: list[Tensor]
    references: list[Tensor] | None
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    stores: list[Tensor]

    @property
    def clipped(self) -> bool:
        """Whether the corrected gradients are clipped."""
        return self.corrected and self.rule.clip is not None

    @property
    def spread(self) -> bool:
        """Whether the parameters are DTensors."""
        return is_dtensor(self.params[0])


class Bucketing(ExactForm):
    """Mixin of `MARS`: from param groups to the buckets of one step."""

    if TYPE_CHECKING:
        param_groups: list[dict[str, Any]]
        state: defaultdict[Tensor, Any]
        _foreach: bool | None
        _fused: bool | None
        _preset: str | None

    def _check_gradients(self, group: dict[str, Any]) -> None:
        """Raise for whatever is missing or wrong, before anything changes."""
        check_scheduled(group)
        paths, steals = paths_of(group), group["steal_grad"]
        exact = not (group["is_approx"] or self._folded)
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(f"MARS needs dense gradients, got one of layout {grad.layout}")
            corrected = paths[is_matrix(param, group)] != "plain" if exact or steals else False
            if corrected and steals:
                require_own_memory(grad)
            reference = self._reference(param, grad, group) if exact and corrected else None
            if type(grad) is not Tensor and (is_dtensor(param) or is_dtensor(grad)):
                from .shards import require_placement

                batched = group["matrix_view"] == "batch"
                require_placement(param, grad, reference, self.state.get(param, {}), batched=batched)

    def _init_group(
        self,
        group: dict[str, Any],
        paths: list[str],
        params: list[Tensor],
        grads: list[Tensor],
        references: list[Tensor | None],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor | None],
        max_exp_avg_sqs: list[Tensor | None],
        steps: list[Tensor],
    ) -> None:
        """Fill the lists with what the group's step reads and writes, allocating what is not there yet.

        torch.compile knows the method of this name: it runs it once, untraced, when it compiles, and reads
        the tensors in the lists anew at each call. So nothing is computed here that changes between steps.
        """
        path_of_matrices, path_of_others = paths_of(group)[True], paths_of(group)[False]
        least, most = (2, 2) if group["matrix_ndim"] == "==2" else (2, math.inf)
        is_approx, amsgrad, states = group["is_approx"], group["amsgrad"], self.state
        for param in group["params"]:
            folded = self._folded_gradient(param) if self._folded else None
            grad = folded if self._folded else param.grad
            if grad is None:
                continue
            path = path_of_matrices if least <= param.ndim <= most else path_of_others
            corrected = path != "plain"
            state = states[param]
            remembers = corrected and is_approx and not keeps_plain_average(path, group)
            reference = None
            if corrected and not is_approx and folded is None:
                reference = self._reference(param, grad, group)
            if "exp_avg" not in state or (remembers and "last_grad" not in state):
                self._start(state, param, grad, path, group, remembers)
            second = has_second_moment(path)
            if second and ("exp_avg_sq" not in state or (amsgrad and "max_exp_avg_sq" not in state)):
                prepare_state(state, param, grad, path, group)  # the options have changed
            if is_approx and "prev_param" in state:
                del state["prev_param"]  # of an exact step before; it would be out of date in the next one
            paths.append(path)
            params.append(param)
            grads.append(grad)
            references.append(state["last_grad"] if remembers else reference)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"] if second else None)
            max_exp_avg_sqs.append(state["max_exp_avg_sq"] if second and amsgrad else None)
            steps.append(state["step"])

    def _start(
        self,
        state: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        path: str,
        group: dict[str, Any],
        remembers: bool,
    ) -> None:
        """The state of a first step, or of the first after `reset_correction`."""
        g = objective_gradient(param, grad, param, group)
        first = "step" not in state
        prepare_state(state, param, g, path, group)
        if remembers and "last_grad" not in state:
            last_grad = gradient_buffer(state, "last_grad", g, param, group)
            if first and group["prev_grad_init"] == "zero":
                last_grad.zero_()
            else:
                last_grad.copy_(g)
            state.pop("correction_reset", None)

    def _buckets(self, group: dict[str, Any]) -> list[Bucket]:
        paths: list[str] = []
        lists: tuple[list[Any], ...] = ([], [], [], [], [], [], [])
        self._init_group(group, paths, *lists)
        kinds = positions_by_kind(paths, lists[0])
        if len(kinds) == 1:
            return [self._bucket(group, paths[0], *lists)]
        return [
            self._bucket(group, paths[members[0]], *([tensors[i] for i in members] for tensors in lists))
            for members in kinds.values()
        ]

    def _bucket(
        self,
        group: dict[str, Any],
        path: str,
        params: list[Tensor],
        grads: list[Tensor],
        references: list[Tensor | None],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> Bucket:
        rule = rule_of(group, path, official=self._preset == "official")
        # as the first, so all: they share path and group
        h: list[Any] | None = None if references[0] is None else list(references)
        stores = [] if h is None or not group["is_approx"] else h
        if is_dtensor(params[0]):
            from .shards import placed_like

            placed = [placed_like(param, grad) for param, grad in zip(params, grads, strict=True)]
            if h is not None:
                triples = zip(params, h, grads, placed, strict=True)
                h = [own if x is grad else placed_like(param, x) for param, x, grad, own in triples]
            grads = placed
        if not self._folded and (group["maximize"] or group["decay_mode"] == "l2"):
            grads, h = self._objective_gradients(group, params, grads, h)
        return Bucket(
            rule=rule.for_device(params[0].device),
            group=group,
            corrected=path != "plain",
            backend=choose_backend(params[0], foreach=self._foreach, fused=self._fused),
            params=params,
            grads=grads,
            references=h if rule.corrects else None,
            exp_avgs=exp_avgs,
            exp_avg_sqs=exp_avg_sqs if rule.has_second_moment else [],
            max_exp_avg_sqs=max_exp_avg_sqs if rule.has_second_moment and rule.amsgrad else [],
            steps=steps,
            stores=stores,
        )

    def _objective_gradients(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        references: list[Tensor] | None,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """The gradients of what is minimised; in the approximate form the kept ones are such already."""
        pairs = list(zip(params, grads, strict=True))
        g = [objective_gradient(param, grad, param, group) for param, grad in pairs]
        if references is None or group["is_approx"]:
            return g, references
        h = []
        for (param, grad), own, reference in zip(pairs, g, references, strict=True):
            previous = self.state[param].get("prev_param")  # None at a first step that starts from h = 0
            h.append(own if reference is grad else objective_gradient(param, reference, previous, group))
        return g, h


def positions_by_kind(paths: Sequence[str], params: Sequence[Tensor]) -> dict[tuple[object, ...], list[int]]:
    """Positions of the tensors that can share a call, by path, type, dtype and device."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, (path, param) in enumerate(zip(paths, params, strict=True)):
        kinds.setdefault((path, type(param), param.dtype, param.device), []).append(i)
    return kinds


def squares_of_shards(buckets: Iterable[Bucket]) -> dict[int, Tensor]:
    """Squared norms of the whole corrected gradients that are clipped and spread over several ranks."""
    spread = [bucket for bucket in buckets if bucket.clipped and bucket.spread]
    if not spread:
        return {}
    from .distributed import squares_of_corrected

    return squares_of_corrected((b.params, b.grads, b.references, b.rule) for b in spread)


def global_norms(buckets: Sequence[Bucket], shards: dict[int, Tensor]) -> dict[torch.device, Tensor]:
    """The common norm of all corrected gradients whose groups clip globally, on every device."""
    shared = [b for b in buckets if b.clipped and b.group["clip_scope"] == "global"]
    squares = []
    for bucket in shared:
        if bucket.spread:
            squares += [shards[id(param)].sum() for param in bucket.params]
            continue
        references = bucket.references or [None] * len(bucket.params)
        for param, g, h in zip(bucket.params, bucket.grads, references, strict=True):
            squares.append(norm_of(corrected_gradient(param, g, h, bucket.rule)).double().square())
    if not squares:
        return {}
    total = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
    devices = {bucket.params[0].device for bucket in shared}
    return {device: total.to(device) for device in devices}
