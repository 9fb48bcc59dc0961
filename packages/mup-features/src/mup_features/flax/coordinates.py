"""Coordinate check of an nnx model: train it for a few steps at several widths and measure every module.

The same check as `mup_features.torch.coordinates`, with one difference: randomness in flax is explicit, so
`model_fn` gets an `nnx.Rngs` beside the width. The model is measured outside of jit, with dropout off, on the
batch of step 0; modules inside nnx.scan or nnx.remat have no activations of their own there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from mup_features._coordinate_runs import MODEL, Measured, Patterns, chosen, collect
from mup_features.coordinates import CoordReport, Record

from .capture import capture, named_modules

Activations = dict[str, list[jax.Array]]


def coordinate_check(
    model_fn: Callable[[int, nnx.Rngs], Any],
    batch_fn: Callable[[int, int], Any],
    widths: Sequence[int],
    seeds: Sequence[int],
    steps: int = 5,
    *,
    optimizer_fn: Callable[..., nnx.Optimizer],
    loss_fn: Callable[[Any, Any], jax.Array] | None = None,
    record: Record = "rms",
    modules: Patterns = "auto",
    progress: bool = True,
) -> CoordReport:
    """Sizes of activations and of their changes in training, at several widths.

        def model_fn(width, rngs):
            model = Transformer(width, rngs=rngs)
            base, other = (nnx.eval_shape(lambda: Transformer(n, rngs=nnx.Rngs(0))) for n in (64, 32))
            roles = infer_roles(model, base, other)
            return init_rescale(model, roles), roles

        report = coordinate_check(
            model_fn, batch_fn, [64, 128, 256, 512], seeds=range(6),
            optimizer_fn=lambda model, roles: nnx.Optimizer(
                model, mup_transform(optax.adam(1e-3), roles), wrt=nnx.Param
            ),
        )
        report.verdict()

    Args:
        model_fn: called with (width, rngs), returns the model or a pair (model, roles).
        batch_fn: called with (seed, step), returns a batch; the same for the same arguments, and of the same
            data at every width. Real and small: the updates of many unrelated samples in one batch align with
            one another only at widths beyond their number, and slopes below that are not those of the limit.
        widths: at least two, increasing; four octaves give clear slopes.
        seeds: distinct; at least three for a verdict, five or more for a clear one. `nnx.Rngs(seed)` is what
            `model_fn` gets.
        steps: updates, >= 1; at least 2 for a verdict.
        optimizer_fn: called with the model, and with the roles where `model_fn` gave some.
        loss_fn: called with (model, batch), returns the loss; it is jitted. By default a batch is a pair
            (inputs, targets); integer targets mean cross-entropy over the last axis of the output, others
            the squared error.
        record: "rms" or "l1".
        modules: "auto": every module that owns a parameter; or patterns of paths (* for anything). The
            model's own output is always recorded, as "(model)" where no module's output is the same array.
        progress: whether to show a bar; only in a terminal.

    Returns:
        The report; `.verdict()` judges it.

    Raises:
        ValueError: for a bad grid, a pattern that matches nothing, models whose modules differ between
            widths, or a module whose activations change shape between steps.
        TypeError: if `model_fn` gives no module.

    Source: Yang et al. 2022 (arXiv 2203.03466), appendix D.1.
    """
    loss_of = default_loss if loss_fn is None else loss_fn
    gradients: dict[Any, Callable[[Any, Any], Any]] = {}  # jitted once for each filter, not once for each run

    def run(width: int, seed: int) -> list[Measured]:
        model, roles = _unpacked(model_fn(width, nnx.Rngs(seed)))
        optimizer = optimizer_fn(model) if roles is None else optimizer_fn(model, roles)
        wrt = optimizer.wrt
        if wrt not in gradients:
            gradients[wrt] = nnx.jit(nnx.grad(loss_of, argnums=nnx.DiffState(0, wrt)))
        probe = batch_fn(seed, 0)
        start, outputs = _activations(model, lambda: loss_of(model, probe), modules)
        found = [_measure(start, start, outputs, record)]
        for step in range(steps):
            optimizer.update(model, gradients[wrt](model, batch_fn(seed, step)))
            now, _ = _activations(model, lambda: loss_of(model, probe), modules)
            found.append(_measure(now, start, outputs, record))
        return found

    return collect(run, widths, seeds, steps, record, progress=progress)


def default_loss(model: Any, batch: Any) -> jax.Array:
    """Cross-entropy over the last axis for integer targets, else the mean squared error.

    Args:
        model: called with the inputs.
        batch: a pair (inputs, targets).

    Raises:
        ValueError: if the batch is no pair.
    """
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise ValueError(
            f"batch must be a pair (inputs, targets) or loss_fn given, got {type(batch).__name__}"
        )
    inputs, targets = batch
    output = model(inputs)
    if jnp.issubdtype(jnp.asarray(targets).dtype, jnp.integer):
        logs = jax.nn.log_softmax(output, axis=-1)
        return -jnp.mean(jnp.take_along_axis(logs, jnp.asarray(targets)[..., None], axis=-1))
    return jnp.mean((output - targets) ** 2)


def _unpacked(given: Any) -> tuple[Any, Any]:
    model, roles = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model_fn must return a flax.nnx.Module or (module, roles), got {type(given).__name__}"
        )
    return model, roles


def _activations(
    model: Any, forward: Callable[[], Any], modules: Patterns
) -> tuple[Activations, tuple[str, ...]]:
    """What the modules return in one forward pass without dropout, and which of them are the output."""
    named = named_modules(model)
    inside = [name for name in named if name]
    wanted = chosen(inside, _owners(model, inside), modules)
    caught: dict[str, list[jax.Array]] = {}
    last: dict[str, jax.Array] = {}

    def report(path: str, module: Any, arguments: Any, output: Any) -> None:  # noqa: ARG001
        array = _main_array(output)
        if array is not None and not isinstance(array, Tracer):
            last[path or MODEL] = array
            caught.setdefault(path or MODEL, []).append(array)

    with _evaluating(model, named), capture(model, report, {"", *wanted}):
        forward()
    outputs = [name for name in wanted if MODEL in last and last.get(name) is last[MODEL]]
    names = [name for name in caught if name != MODEL]  # in the order in which calls ended
    if MODEL in last and not outputs:
        names.append(MODEL)
        outputs.append(MODEL)
    return {name: caught[name] for name in names}, tuple(outputs)


def _owners(model: Any, names: Sequence[str]) -> list[str]:
    """Modules that own a parameter: for each parameter the longest path to it that is a module's."""
    known, owners = set(names), set()
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        prefixes = (".".join(map(str, path[:length])) for length in range(len(path) - 1, 0, -1))
        owners.add(next((prefix for prefix in prefixes if prefix in known), None))
    return [name for name in names if name in owners]


@contextmanager
def _evaluating(model: Any, named: Mapping[str, Any]) -> Iterator[None]:
    """The model in eval mode; afterwards each flag is what it was, also one that the user had set alone."""
    flags = [(m, {k: v for k, v in vars(m).items() if isinstance(v, bool)}) for m in named.values()]
    model.eval()
    try:
        yield
    finally:
        for module, before in flags:
            for name, value in before.items():
                if getattr(module, name) is not value:
                    setattr(module, name, value)


def _main_array(output: Any) -> jax.Array | None:
    """The array that a module's return value is about: its logits, or the first one that is no scalar."""
    if isinstance(output, jax.Array):
        return output if jnp.issubdtype(output.dtype, jnp.floating) and output.ndim else None
    if isinstance(output, Mapping):
        if "logits" in output:
            return _main_array(output["logits"])
        output = list(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return next((found for entry in output if (found := _main_array(entry)) is not None), None)
    return None


def _measure(now: Activations, start: Activations, outputs: tuple[str, ...], record: Record) -> Measured:
    sizes, changes = {}, {}
    for name, before in start.items():
        after = now.get(name, [])
        if [one.shape for one in after] != [one.shape for one in before]:
            shapes = [[one.shape for one in some] for some in (before, after)]
            raise ValueError(
                f"modules: {name} must keep the shapes of its activations from step to step, "
                f"got {shapes[0]}, then {shapes[1]}; leave it out"
            )
        pairs = [(_wide(a), _wide(b)) for a, b in zip(after, before, strict=True)]
        sizes[name] = _size([a for a, _ in pairs], record)
        changes[name] = _size([a - b for a, b in pairs], record)
    return Measured(sizes, changes, outputs)


def _size(arrays: Sequence[np.ndarray], record: Record) -> float:
    """Root mean square, or mean absolute value, over all entries of all arrays."""
    entries = np.concatenate([array.reshape(-1) for array in arrays])
    # numpy warns of inf and nan; they are measurements here
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(entries**2)) if record == "rms" else np.mean(np.abs(entries)))


def _wide(array: jax.Array) -> np.ndarray:
    """In float64, whatever jax is set to: squares of half-precision activations would overflow or vanish."""
    return np.asarray(array).astype(np.float64)
