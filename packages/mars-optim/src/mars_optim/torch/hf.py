"""MARS in the Hugging Face Trainer, the exact form included.

    Trainer(..., optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, lr=3e-3))   # approximate form
    MARSTrainer(..., optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, lr=3e-3, is_approx=False))
    MARSTrainer(..., optimizers=(VarianceReduced(base, is_approx=False), None))

The exact form needs the gradient h_t of this step's batch at the previous parameters. `MARSTrainer` computes
it before the batch's own gradient, over all micro-batches of the step when gradients accumulate.

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithm 1.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .exact import ExactForm
from .optimizer import MARS
from .param_groups import build_param_groups

try:
    from accelerate.utils import DistributedType
    from transformers import Trainer
except ModuleNotFoundError as error:
    raise ImportError(
        f'mars_optim.torch.hf needs {error.name}, which is not installed: pip install "mars-optim[hf]"',
        name=error.name,
    ) from error

_SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP", "XLA")


class TrainerMARS(MARS):
    """MARS on the Trainer's two groups, each split into tensors for the correction and for plain AdamW.

    Args:
        params: groups with `params` and `weight_decay`, as the Trainer makes them.
        adamw_params: the tensors that plain AdamW takes; their group's decay is theirs.
        options: arguments of `MARS`.
    """

    def __init__(
        self, params: Sequence[dict[str, Any]], *, adamw_params: Sequence[Tensor], **options: Any
    ) -> None:
        routed = {id(param) for param in adamw_params}
        groups: list[dict[str, Any]] = []
        for group in params:
            corrected = [param for param in group["params"] if id(param) not in routed]
            plain = [param for param in group["params"] if id(param) in routed]
            if corrected:
                groups.append({**group, "params": corrected})
            if plain:
                decay = group["weight_decay"]
                groups.append({**group, "params": plain, "algorithm": "adamw", "weight_decay_1d": decay})
        super().__init__(groups, **options)


def optimizer_cls_and_kwargs(
    model: torch.nn.Module, *, adamw_patterns: Sequence[str] = (), **options: Any
) -> tuple[type[MARS], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes to train `model` with MARS.

    The Trainer decides what decays: matrices by `TrainingArguments.weight_decay`, biases and norms not at all
    (their group says weight_decay=0, which MARS takes to mean weight_decay_1d=0 as well). For the types that
    orthogonalise, embeddings and output heads go to plain AdamW and decay as the Trainer says. The Trainer
    does not pass its learning rate on: lr is an option here, and its schedule multiplies it.

    Args:
        model: the model that the Trainer gets.
        adamw_patterns: shell patterns of parameter names that go to plain AdamW.
        options: arguments of `MARS` other than params and weight_decay.

    Raises:
        TypeError: for an option that MARS does not have.
        ValueError: for an option outside its range, for weight_decay, or for a pattern that matches nothing.
    """
    if "weight_decay" in options:
        raise ValueError(
            "weight_decay must be set in TrainingArguments, whose groups override it, "
            f"got {options['weight_decay']!r}"
        )
    unknown = sorted(options.keys() - (inspect.signature(MARS).parameters.keys() - {"params"}))
    if unknown:
        raise TypeError(f"options must be arguments of MARS, got {', '.join(unknown)}")
    MARS([torch.nn.Parameter(torch.zeros(1))], **options)  # raises for a value out of range
    mars_type = options.get("mars_type", "mars-adamw")
    groups = build_param_groups(model, mars_type, adamw_patterns=adamw_patterns)
    plain = [param for group in groups if group["algorithm"] == "adamw" for param in group["params"]]
    return (TrainerMARS, {**options, "adamw_params": plain}) if plain else (MARS, options)


class MARSTrainer(Trainer):
    """Trainer for `MARS` and `VarianceReduced` in the exact form; with other optimisers a plain Trainer.

    Before the first micro-batch of a step, all its micro-batches run forward and backward at the previous
    parameters. Both gradients accumulate, are reduced under DDP, and are clipped to `max_grad_norm` each by
    its own norm, as in the paper's runs. Dropout masks are the same in both passes, and buffers end as if
    there had been one. The cost is a second forward and backward pass per step; `compute_loss` is called in
    both. Sharded training (FSDP, DeepSpeed) must call `at_previous_params()` in a loop of its own.
    """

    _upcoming: Sequence[Any] = ()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of one step, which `training_step` needs to see at once."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._upcoming = batches
        return batches, num_items_in_batch

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of a micro-batch, before the first one of a step also for h_t.

        Raises:
            RuntimeError: in the exact form under FSDP, DeepSpeed or another sharded backend.
        """
        batches, self._upcoming = self._upcoming, ()
        optimizer = self._exact_optimizer()
        if batches and optimizer is not None:
            self._previous_pass(optimizer, model, batches, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)

    def _previous_pass(
        self, optimizer: ExactForm, model: torch.nn.Module, batches: Sequence[Any], num_items_in_batch: Any
    ) -> None:
        """Leave h_t of all micro-batches with the optimiser."""
        backend = self.accelerator.distributed_type
        if DistributedType(backend).name in _SHARDED:
            raise RuntimeError(
                f"MARSTrainer trains in the exact form on one process or under DDP, not {backend}"
            )
        scaler, max_norm = self.accelerator.scaler, self.args.max_grad_norm
        module = self.accelerator.unwrap_model(model)
        with optimizer.at_previous_params(replay_rng=True, module=module, scaler=scaler):
            for batch in batches[:-1]:
                self.training_step(model, batch, num_items_in_batch)
            with _reducing(model):
                self.training_step(model, batches[-1], num_items_in_batch)
            if max_norm:
                scale = 1.0 if scaler is None else scaler.get_scale()
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm * scale)

    def _exact_optimizer(self) -> ExactForm | None:
        """The optimiser inside accelerate's wrappers, if any of its groups is exact."""
        optimizer: Any = self.optimizer
        while not isinstance(optimizer, ExactForm):
            if not hasattr(optimizer, "optimizer"):
                return None
            optimizer = optimizer.optimizer
        exact = not all(group["is_approx"] for group in optimizer.param_groups)
        return optimizer if exact else None


@contextmanager
def _reducing(model: torch.nn.Module) -> Iterator[None]:
    """Inside, DDP reduces the gradients, though the Trainer has it wait for the step's last micro-batch."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before = model.require_backward_grad_sync
    model.require_backward_grad_sync = True
    try:
        yield
    finally:
        model.require_backward_grad_sync = before
