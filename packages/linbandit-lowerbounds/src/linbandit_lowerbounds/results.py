"""What a simulation hands back, and the state it can go on from; both are saved as npz without pickles."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int


class Checkpoints(NamedTuple):
    """Running sums of every run at some rounds.

    Args:
        rounds: numbers of finished rounds, increasing.
        regret: regret after so many rounds.
        variance_sum: sum of sigma_k^2 after so many rounds.
    """

    rounds: Int[np.ndarray, " n"]
    regret: Float[np.ndarray, "n seeds"]
    variance_sum: Float[np.ndarray, "n seeds"]


@dataclass(frozen=True)
class State:
    """Where a simulation stands; give it to `simulate(..., resume=)` with otherwise the same arguments.

    Args:
        rounds: finished rounds.
        leaves: arrays of learner, instance, adversary and sums.
        identity: fingerprint of the simulation it belongs to.
    """

    rounds: int
    leaves: tuple[np.ndarray, ...]
    identity: str

    @classmethod
    def of(cls, rounds: int, carry: Any, identity: str) -> State:
        """Copies the pytree of a simulation to the host.

        Args:
            rounds: finished rounds.
            carry: the pytree.
            identity: fingerprint of the simulation.
        """
        return cls(rounds, tuple(_plain(leaf) for leaf in jax.tree.leaves(carry)), identity)

    def restore(self, like: Any, identity: str) -> tuple[int, Any]:
        """The pytree again.

        Args:
            like: a pytree of the same structure, with shapes and types.
            identity: fingerprint of the simulation that goes on.

        Returns:
            The finished rounds and the pytree.

        Raises:
            ValueError: if the state belongs to another simulation.
        """
        leaves, structure = jax.tree.flatten(like)
        fits = len(leaves) == len(self.leaves) and all(
            _is_key(want) or (want.shape, want.dtype) == (have.shape, have.dtype)
            for want, have in zip(leaves, self.leaves, strict=True)
        )
        if identity != self.identity or not fits:
            raise ValueError(
                "resume must come from the same learner (all settings), instance, adversary, key, n_seeds, "
                "mode and floating point type; this state belongs to another simulation"
            )
        restored = [
            jax.random.wrap_key_data(jnp.asarray(have)) if _is_key(want) else jnp.asarray(have)
            for want, have in zip(leaves, self.leaves, strict=True)
        ]
        return self.rounds, jax.tree.unflatten(structure, restored)


@dataclass(frozen=True)
class Result:
    """Outcome of a simulation, one entry for each run.

    Args:
        algorithm: name of the learner.
        rounds: finished rounds.
        sees_theta: the learner is a yardstick that knows theta.
        regret: sum over rounds of max <theta, x> - <theta, x_k>, from means, not from noisy rewards.
        variance_sum: sum of sigma_k^2.
        self_certificate: sum of min(range, 2 beta ||x_k||), the learner's own bound on its regret while its
            confidence sets hold; None for learners without a radius.
        rounds_stopped: rounds with sigma_k = 0.
        checkpoints: running sums, if recorded.
        state: where to go on from.
    """

    algorithm: str
    rounds: int
    sees_theta: bool
    regret: Float[np.ndarray, " seeds"]
    variance_sum: Float[np.ndarray, " seeds"]
    self_certificate: Float[np.ndarray, " seeds"] | None
    rounds_stopped: Int[np.ndarray, " seeds"]
    checkpoints: Checkpoints | None
    state: State = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to an npz file, atomically.

        Args:
            path: the file; its folder must exist.
        """
        arrays: dict[str, Any] = {
            "algorithm": self.algorithm,
            "rounds": self.rounds,
            "sees_theta": self.sees_theta,
            "regret": self.regret,
            "variance_sum": self.variance_sum,
            "rounds_stopped": self.rounds_stopped,
            "identity": self.state.identity,
            "state_rounds": self.state.rounds,
        }
        if self.self_certificate is not None:
            arrays["self_certificate"] = self.self_certificate
        if self.checkpoints is not None:
            arrays |= {f"checkpoints_{name}": value for name, value in self.checkpoints._asdict().items()}
        arrays |= {f"state_{i:04d}": leaf for i, leaf in enumerate(self.state.leaves)}
        path = Path(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            try:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Result:
        """Reads what `save` wrote; nothing is unpickled.

        Args:
            path: the file.

        Raises:
            ValueError: if it is no such file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = dict(file)
            leaves = tuple(found[f"state_{i:04d}"] for i in range(sum(name[6:].isdigit() for name in found)))
            state = State(int(found["state_rounds"]), leaves, str(found["identity"]))
            checkpoints = None
            if "checkpoints_rounds" in found:
                checkpoints = Checkpoints(*(found[f"checkpoints_{name}"] for name in Checkpoints._fields))
            return cls(
                algorithm=str(found["algorithm"]),
                rounds=int(found["rounds"]),
                sees_theta=bool(found["sees_theta"]),
                regret=found["regret"],
                variance_sum=found["variance_sum"],
                self_certificate=found.get("self_certificate"),
                rounds_stopped=found["rounds_stopped"],
                checkpoints=checkpoints,
                state=state,
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"path must be a file written by Result.save, got {path!s}: {error}") from error


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
