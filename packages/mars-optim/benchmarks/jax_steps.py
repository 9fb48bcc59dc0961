"""One jitted step of mars_optim.jax and of optax on the parameters and gradients of the torch optimisers.

The step is what a training loop compiles: update and apply, parameters and state donated. XLA takes every
core that the process may use, whatever OMP_NUM_THREADS says, so rows of JAX compare with rows of JAX (their
counterparts are optax's) and with torch only where the process is pinned (`taskset -c 0`) or on a GPU.
Compilation falls into the warm-up.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from contenders import Contender, Shapes, Step, gradient_of, is_hidden, too_much_arithmetic
from torch import Tensor

ADAMW = "optax.adamw jit"
MUON = "optax.contrib.muon jit, adamw on the rest"
MARS_M = "mars_optim.jax mars-m jit, adamw on the rest"
RATE = 3e-3


def jax_contenders(shapes: Shapes, device: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """Contenders of JAX, and what is missing here with the reason."""
    # jax would else keep three quarters of a GPU's memory for itself; read when jax is first used
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
        import optax.contrib

        from mars_optim.jax import mars

        kind, _, index = device.partition(":")
        place = jax.devices(kind)[int(index or 0)]
    except (ImportError, RuntimeError) as problem:
        missing = "not installed" if isinstance(problem, ImportError) else "not usable here"
        return {}, dict.fromkeys(
            (ADAMW, "mars_optim.jax jit", MUON), f"{missing}: {str(problem).splitlines()[0]}"
        )

    def jitted(transformation: Any) -> Callable[[list[Tensor]], Step]:
        return lambda params: jitted_step(transformation, params, place)

    lineup = {ADAMW: Contender(jitted(optax.adamw(RATE, weight_decay=0.0)), 7)}
    for mars_type, clip, streams in (("mars-adamw", 1.0, 9), ("mars-adamw", None, 9), ("mars-lion", 1.0, 7)):
        build = jitted(mars(RATE, mars_type, clip=clip))
        lineup[f"mars_optim.jax {mars_type} jit, clip={clip}"] = Contender(build, streams, ADAMW)

    reason = too_much_arithmetic(shapes, device)
    if reason is not None:
        return lineup, dict.fromkeys((MARS_M, MUON), reason)
    labels = ["hidden" if is_hidden(shape) else "rest" for shape in shapes]

    def on_hidden(transformation: Any) -> Callable[[list[Tensor]], Step]:
        return jitted(optax.partition({"hidden": transformation, "rest": optax.adamw(RATE)}, labels))

    lineup[MARS_M] = Contender(on_hidden(mars(RATE, "mars-m")), None, MUON)
    if not hasattr(optax.contrib, "muon"):
        return lineup, {MUON: "not available: this optax has none"}
    lineup[MUON] = Contender(on_hidden(optax.contrib.muon(RATE)), None, ADAMW)
    return lineup, {}


def jitted_step(transformation: Any, params: list[Tensor], place: Any) -> Step:
    """A function that makes one step and returns the new parameters, which may still be being computed."""
    import jax
    import optax

    def update(values: list[Any], state: Any, gradients: list[Any]) -> tuple[list[Any], Any]:
        updates, state = transformation.update(gradients, state, values)
        return optax.apply_updates(values, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    with jax.default_device(place):
        values = [array_of(param) for param in params]
        gradients = [array_of(gradient_of(param)) for param in params]
        carried = (values, transformation.init(values))

    def step() -> list[Any]:
        nonlocal carried
        carried = compiled(*carried, gradients)
        return carried[0]

    return step


def array_of(tensor: Tensor) -> Any:
    """A copy as an array of JAX: XLA writes into buffers that are donated to it."""
    import jax.numpy as jnp

    return jnp.array(tensor.detach().to("cpu", torch.float32).numpy(), copy=True)


def wait(value: Any) -> None:
    """Wait for arrays of JAX; steps of torch return nothing and need no waiting here.

    The arrays of one call become ready together, so the last is asked.
    """
    if value:
        value[-1].block_until_ready()
