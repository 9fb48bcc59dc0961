"""A GPU plays the same games as the CPU."""

import jax
import numpy as np
import pytest

from linbandit_lowerbounds import (
    FixedSet,
    LeastLoadedInstance,
    Prefixed,
    Switching,
    VarianceScaledHypercube,
    greedy,
    lin_ts,
    oful,
    required_dimension,
    save,
    simulate,
    weighted_oful_plus,
)

SIGMA = np.linspace(0.1, 1.0, 64)
KEY = jax.random.key(2)


@pytest.mark.gpu(framework="jax")
@pytest.mark.parametrize(
    "algorithm",
    [oful(), lin_ts(), weighted_oful_plus(), save(preset="practical"), greedy()],
    ids=lambda algorithm: algorithm.name,
)
@pytest.mark.parametrize("kind", ["fixed", "hypercube"])
def test_a_gpu_plays_like_the_cpu(x64, algorithm, kind):
    regrets = []
    for platform in ("cpu", "gpu"):
        with jax.default_device(jax.devices(platform)[0]):
            if kind == "fixed":
                # Actions of different lengths: equal ones would tie in the first round.
                actions = np.random.default_rng(0).uniform(-1.0, 1.0, (6, 4))
                instance = FixedSet(actions, horizon=64)
            else:
                instance = VarianceScaledHypercube(SIGMA, 4)
            result = simulate(algorithm, instance, Prefixed(SIGMA), key=KEY, n_seeds=32, progress=False)
        regrets.append(result.regret)
    if kind == "fixed":
        # Rounding decides now and then between two actions, and then it is another run.
        assert np.isclose(*regrets, rtol=1e-9, atol=1e-9).mean() >= 0.95
    spread = np.std(regrets[0]) / np.sqrt(32)
    assert abs(np.mean(regrets[0]) - np.mean(regrets[1])) < 6 * spread


@pytest.mark.gpu(framework="jax")
def test_thousands_of_blocks_run_on_a_gpu():
    d = required_dimension(20_000, 0.1, "least_loaded")
    instance = LeastLoadedInstance(20_000, d, 0.1)
    result = simulate(greedy(), instance, Switching(200.0), key=KEY, n_seeds=64, horizon=2000, progress=False)
    np.testing.assert_allclose(result.variance_sum, 200.0)
    assert (result.regret > 0.0).all()
