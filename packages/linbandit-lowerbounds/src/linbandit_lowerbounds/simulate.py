"""Many runs of one learner on one instance: a loop over rounds, vectorised over seeds.

    for chunk of rounds:                      (Python: progress, checkpoints, interruption)
        draw contexts and noise of the chunk  (independent of what is learned)
        for round in chunk:                   (one compiled loop)
            sigma -> decision set -> choice -> reward -> regret, for all seeds at once

Randomness: one key. Streams for theta, rounds, learner and adversary are folded from it, then the number of
the round; run s takes entry s of what a round draws. (Theta and the learner's `init` have streams of their
own, folded with the number of the run.) So two learners meet identical theta, decision sets and noise, and
run s is the same however many runs there are. Memory does not grow with the number of rounds unless
`record="all"`.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Key
from tqdm import tqdm

from . import checks
from .adversaries import Prefixed
from .compiled import FAULTS, Carry, Mode, Plan, chunk_length, draw_chunk, play_chunk, start_runs, streams_of
from .environment import Adversary, Algorithm, Instance, Spec
from .results import Checkpoints, Result, State

Record = Literal["total", "checkpoints", "all"]

_F32_STATE = 1_000_000
_SAVE_SECONDS = 60.0


def simulate(
    algorithm: Algorithm,
    instance: Instance,
    adversary: Adversary | None = None,
    *,
    key: Key[Array, ""],
    n_seeds: int,
    horizon: int | None = None,
    record: Record = "total",
    mode: Mode = "block",
    unroll: int = 1,
    sharding: NamedSharding | None = None,
    resume: State | Result | None = None,
    save_to: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Plays `n_seeds` independent runs, each with its own theta and noise.

    Args:
        algorithm: the learner.
        instance: the environment.
        adversary: who chooses sigma_k; None plays the sequence that the instance was built for.
        key: a `jax.random.key`; the same key gives the same theta, decision sets and noise to every learner.
        n_seeds: number of runs, >= 1.
        horizon: play only the first so many rounds; by default all that the instance has.
        record: "total" keeps the sums, "checkpoints" also the sums at rounds on a logarithmic grid, "all" at
            every round.
        mode: "block" keeps one Gram matrix for each orthogonal block, "dense" one for all coordinates; the
            same choices, to rounding.
        unroll: rounds in one step of the compiled loop, >= 1; worth trying on GPUs.
        sharding: spreads the runs over the devices of a one-dimensional mesh; None uses the default device.
        resume: a finished part of the same simulation (`Result` or `Result.state`), continued bit for bit.
        save_to: npz file for the result so far, written about once a minute and at the end; after an
            interruption go on with `resume=Result.load(save_to)`.
        progress: show a bar on terminals.

    Returns:
        Regret, total variance and more for every run.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, learner, adversary and instance do not suit each other
            (who may see what), `resume` belongs to another simulation, or, found while playing, sigma left
            [0, 1], a decision set was empty, or an action was played that is not offered.
    """
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            "algorithm must be an Algorithm, as factories return it (oful(), not oful); Python objects are "
            f"played by play_object; got {algorithm!r}"
        )
    checks.random_key("key", key)
    n_seeds = checks.count("n_seeds", n_seeds)
    unroll = checks.count("unroll", unroll)
    checks.one_of("record", record, ("total", "checkpoints", "all"))
    checks.one_of("mode", mode, ("block", "dense"))
    if not isinstance(resume, State | Result | None):
        raise TypeError(f"resume must be a Result or its state, got {type(resume).__name__}")
    if save_to is not None:
        checks.file_in_folder("save_to", save_to)
    adversary = adversary_of(instance, adversary)
    last = checks.count("horizon", instance.horizon if horizon is None else horizon)
    spec = match(algorithm, instance, adversary, last)
    _warn_float32(algorithm, spec)
    place = _placement(sharding, n_seeds)
    plan = Plan(algorithm, mode, n_seeds, unroll, record != "total", sharding)
    spec = spec.in_one_block() if mode == "dense" else spec
    identity = fingerprint(plan, instance, adversary, key)
    streams = streams_of(key)

    first, earlier = 0, None
    if resume is None:
        carry = start_runs(plan, instance, adversary, spec, streams)
    else:
        state, earlier = (resume.state, resume.checkpoints) if isinstance(resume, Result) else (resume, None)
        like = jax.eval_shape(partial(start_runs, plan), instance, adversary, spec, streams)
        first, carry = state.restore(like, identity)
        if first > last:
            raise ValueError(f"horizon must be >= {first}, the rounds already played, got {last!r}")
    carry = place(carry)
    chunk = chunk_length(plan, instance, adversary, spec)
    wanted = checkpoint_rounds(instance.horizon) if record == "checkpoints" else None
    played, traces = [], []

    def so_far() -> Result:
        return collect(plan, carry, first, identity, earlier, played, traces)

    saved = time.monotonic()
    with tqdm(
        total=last, initial=first, unit="round", disable=None if progress else True, leave=False
    ) as bar:
        while first < last:
            start = first - first % chunk
            low, high = first - start, min(chunk, last - start)
            drawn = draw_chunk(plan, chunk, instance, adversary, spec, streams, start)
            carry, trace = play_chunk(plan, chunk, instance, adversary, carry, drawn, start, low, high)
            if trace is not None:
                rounds = np.arange(start + low, start + high) + 1
                kept = rounds if wanted is None else rounds[np.isin(rounds, wanted)]
                played.append(kept)
                traces.append(tuple(np.asarray(rows)[kept - start - 1] for rows in trace))
            bar.update(high - low)
            first = start + high
            if save_to is not None and time.monotonic() - saved > _SAVE_SECONDS:
                so_far().save(save_to)
                saved = time.monotonic()
    result = so_far()
    if save_to is not None:
        result.save(save_to)
    return result


def match(algorithm: Algorithm, instance: Instance, adversary: Adversary, horizon: int) -> Spec:
    """Checks who sees what, and returns what the learner is told.

    Args:
        algorithm: the learner.
        instance: the environment.
        adversary: the chooser of sigma_k.
        horizon: rounds to be played.

    Raises:
        ValueError: if a participant asks for information that the protocol does not give it.
    """
    if adversary.sees not in ("nothing", "history", "decision_set"):
        raise ValueError(
            f'an adversary sees "nothing", "history" or "decision_set", {type(adversary).__name__} asks for '
            f"{adversary.sees!r}; the parameter theta is shown to none"
        )
    if adversary.sees == "decision_set" and instance.uses_sigma:
        raise ValueError(
            f"{type(adversary).__name__} chooses sigma after the decision set, but "
            f"{type(instance).__name__} builds the decision set from sigma; use a weak adversary or an "
            "instance such as RandomContexts"
        )
    if algorithm.needs_sigma not in ("never", "after", "before", "upfront"):
        raise ValueError(
            f'needs_sigma must be "never", "after", "before" or "upfront", got {algorithm.needs_sigma!r}'
        )
    if horizon > instance.horizon:
        raise ValueError(f"horizon must be <= {instance.horizon}, that of the instance, got {horizon!r}")
    if isinstance(adversary, Prefixed) and adversary.sigma.shape[0] < horizon:
        raise ValueError(f"sigma must cover {horizon} rounds, got {adversary.sigma.shape[0]}")
    if algorithm.needs_sigma == "upfront":
        if not isinstance(adversary, Prefixed):
            raise ValueError(
                f"{algorithm.name} needs the whole sequence before the first round, which only a Prefixed "
                f"adversary has, got {type(adversary).__name__}"
            )
        return instance.spec(adversary.sigma)
    return instance.spec()


def fingerprint(plan: Plan, instance: Instance, adversary: Adversary, key: Key[Array, ""]) -> str:
    """Names a simulation up to its horizon: learner, instance, adversary, key, number of runs and mode.

    Args:
        plan: learner, mode and number of runs.
        instance: the environment.
        adversary: the chooser of sigma_k.
        key: the key.
    """
    leaves, structure = jax.tree.flatten((instance, adversary))
    digest = hashlib.sha256(repr((structure, plan.algorithm.config, plan.mode, plan.n_seeds)).encode())
    for leaf in [*leaves, jax.random.key_data(key)]:
        array = np.asarray(leaf)
        digest.update(repr((array.shape, array.dtype)).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def checkpoint_rounds(horizon: int) -> Int[np.ndarray, " n"]:
    """Rounds of the logarithmic grid: about 16 for each factor of two, and the last.

    Args:
        horizon: number of rounds of the instance.
    """
    steps = 16 * int(np.ceil(np.log2(max(horizon, 2)))) + 1
    return np.unique(np.round(np.geomspace(1, horizon, steps)).astype(int))


# ---------------------------------------------------------------------------------------------- surroundings


def adversary_of(instance: Instance, adversary: Adversary | None) -> Adversary:
    """The given adversary, or the sequence that the instance was built for.

    Args:
        instance: the environment.
        adversary: the chooser of sigma_k, or None.

    Raises:
        TypeError: if one of them is something else, or its class is not registered as a pytree.
        ValueError: if there is no adversary and no sequence.
    """
    _participant("instance", instance, Instance)
    if adversary is not None:
        _participant("adversary", adversary, Adversary)
    if adversary is not None:
        return adversary
    if instance.prefix is None:
        raise ValueError(f"adversary must be given: {type(instance).__name__} has no sequence of its own")
    return Prefixed(instance.prefix)


def _participant(name: str, value: object, base: type) -> None:
    if not isinstance(value, base):
        raise TypeError(f"{name} must be an {base.__name__}, got {value!r}")
    if jax.tree_util.all_leaves([value]):
        raise TypeError(
            f"{name} must be a pytree: decorate {type(value).__name__} with @register(arrays=...)"
        )


def _warn_float32(algorithm: Algorithm, spec: Spec) -> None:
    if jnp.zeros(()).dtype == jnp.float32 and (
        algorithm.name.startswith("SAVE") or spec.horizon * spec.block_dim > _F32_STATE
    ):
        warnings.warn(
            f"{algorithm.name}: {spec.horizon} rounds in {spec.block_dim} dimensions in float32, where "
            "rank-one updates drift; jax.enable_x64 gives float64",
            stacklevel=3,
        )


def _placement(sharding: NamedSharding | None, n_seeds: int) -> Callable[[Carry], Carry]:
    if sharding is None:
        return lambda carry: carry
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"sharding must be a jax.sharding.NamedSharding, got {sharding!r}")
    devices = sharding.mesh.size
    if len(sharding.spec) != 1 or n_seeds % devices:
        raise ValueError(
            f"sharding must split one axis, the runs, and n_seeds be a multiple of its {devices} devices, "
            f"got {sharding.spec} and {n_seeds!r}"
        )
    return lambda carry: jax.device_put(carry, sharding)


def collect(
    plan: Plan,
    carry: Carry,
    rounds: int,
    identity: str,
    earlier: Checkpoints | None,
    played: list[np.ndarray],
    traces: list[tuple[np.ndarray, np.ndarray]],
) -> Result:
    """The outcome of all runs so far, on the host.

    Args:
        plan: the learner, and whether running sums were kept.
        carry: the runs.
        rounds: finished rounds.
        identity: as `fingerprint` gives it.
        earlier: checkpoints of the part before, if the simulation was resumed.
        played: numbers of finished rounds of the kept sums, one array for each chunk.
        traces: regret and total variance at those rounds.

    Raises:
        ValueError: if learner, adversary or instance did what the protocol does not allow.
    """
    faults = np.asarray(carry.fault)
    if faults.any():
        run = int(np.argmax(faults > 0))
        raise ValueError(f"{FAULTS[faults[run] - 1]}, first in run {run} ({plan.algorithm.name})")
    checkpoints = None
    if plan.traced:
        nothing = np.zeros((0, plan.n_seeds), carry.regret.total.dtype)
        parts = [Checkpoints(np.zeros(0, int), nothing, nothing) if earlier is None else earlier]
        parts += [Checkpoints(at, *trace) for at, trace in zip(played, traces, strict=True)]
        checkpoints = Checkpoints(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    certified = plan.algorithm.width is not None
    return Result(
        algorithm=plan.algorithm.name,
        rounds=rounds,
        sees_theta=plan.algorithm.reveal is not None,
        regret=np.asarray(carry.regret.total),
        variance_sum=np.asarray(carry.variance.total),
        self_certificate=np.asarray(carry.certificate.total) if certified else None,
        rounds_stopped=np.asarray(carry.stopped),
        checkpoints=checkpoints,
        state=State.of(rounds, carry, identity),
    )
