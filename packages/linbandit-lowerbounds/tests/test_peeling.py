import jax.numpy as jnp
import numpy as np
import pytest
import reference_bounds as reference
from hypothesis import given
from hypothesis import strategies as st

from linbandit_lowerbounds.peeling import (
    group_index,
    groups,
    lower_thresholds,
    number_of_groups,
    split_dims,
    upper_thresholds,
)

unit = st.floats(0, 1)
powers = st.integers(0, 60).map(lambda n: 2.0**-n)
sequences = st.lists(st.one_of(unit, powers), min_size=2, max_size=70)


def test_worked_example_puts_exact_powers_of_two_into_the_lower_group():
    peeling = groups(np.array([0, 0.1, 0.125, 0.13, 0.25, 0.26, 0.5, 1]))
    assert peeling.index.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert peeling.L == 4
    assert peeling.counts.tolist() == [3, 2, 2, 1]
    assert peeling.thresholds.tolist() == [0.0, 0.125, 0.25, 0.5]
    assert peeling.dims.tolist() == [0, 0, 0, 0]


@given(sequences, st.integers(1, 200), st.sampled_from(["equal", "occupied", "best"]))
def test_groups_partition_the_rounds_and_dims_sum_to_d(sigma, d, dims):
    peeling = groups(sigma, d, dims=dims)
    assert peeling.counts.sum() == len(sigma)
    assert len(peeling.counts) == len(peeling.dims) == len(peeling.thresholds) == peeling.L
    assert (np.bincount(peeling.index, minlength=peeling.L) == peeling.counts).all()
    assert peeling.dims.sum() == d
    assert (peeling.dims >= 0).all()


@given(st.lists(st.one_of(unit, powers), min_size=64, max_size=64))
def test_groups_equal_exact_fractions_when_the_horizon_is_a_power_of_two(sigma):
    assert groups(sigma).index.tolist() == [reference.group_of(s, 64) for s in sigma]


@given(sequences)
def test_every_sigma_lies_between_its_thresholds(sigma):
    peeling = groups(sigma)
    noise = np.array(sigma)
    above = upper_thresholds(len(sigma))
    assert (noise <= above[peeling.index]).all()
    assert (noise[peeling.index > 0] > peeling.thresholds[peeling.index[peeling.index > 0]]).all()


@given(st.integers(2, 2**40))
def test_number_of_groups_is_exact(K):
    assert number_of_groups(K) == reference.number_of_groups(K)
    assert 2 ** (number_of_groups(K) - 2) < K <= 2 ** (number_of_groups(K) - 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("K", [3, 10, 1000, 2**20, 2**29, 2**29 - 1])
def test_a_sigma_of_two_to_the_i_over_k_falls_in_group_i(K, dtype):
    i = np.arange(number_of_groups(K) - 1)
    sigma = (dtype(1) / dtype(K)) * dtype(2) ** i.astype(dtype)
    assert sigma.dtype == dtype
    assert group_index(sigma, K).tolist() == i.tolist()
    just_above = np.nextafter(sigma, dtype(1))
    assert group_index(just_above, K).tolist() == (i + 1).tolist()


def test_half_precision_can_be_grouped_although_it_cannot_hold_one_over_k():
    sigma = np.array([0.0, 2.0**-20, 1.0], np.float16)
    assert group_index(sigma, 2**29).tolist() == [0, 9, 29]


def test_jax_arrays_give_the_same_groups_as_numpy():
    sigma = np.random.default_rng(0).uniform(size=100).astype(np.float32)
    assert groups(jnp.asarray(sigma)).index.tolist() == groups(sigma).index.tolist()


def test_equal_dims_leave_low_groups_empty_when_d_is_small():
    assert split_dims(3, np.ones(5, int), lower_thresholds(16), "equal").tolist() == [0, 0, 1, 1, 1]
    assert split_dims(12, np.ones(5, int), lower_thresholds(16), "equal").tolist() == [2, 2, 2, 3, 3]


@given(st.lists(st.integers(0, 5), min_size=5, max_size=5), st.integers(1, 40))
def test_equal_and_occupied_dims_equal_dealing_one_by_one(counts, d):
    thresholds = lower_thresholds(16)
    assert split_dims(d, np.array(counts), thresholds, "equal").tolist() == reference.equal_dims(
        d, range(5), 5
    )
    occupied = [i for i in range(1, 5) if counts[i]] or [0]
    assert split_dims(d, np.array(counts), thresholds, "occupied").tolist() == reference.equal_dims(
        d, occupied, 5
    )


def test_best_gives_all_of_d_to_the_group_with_the_largest_bound():
    sigma = np.concatenate([np.full(200, 0.3), np.full(56, 1.0)])
    assert groups(sigma, 5, dims="best").dims.tolist() == [
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        5,
    ]  # sqrt(56)/2 > sqrt(200)/4
    assert groups(sigma, 8, dims="best").dims.tolist() == [0, 0, 0, 0, 0, 0, 0, 8, 0]  # 56 < 1.5 * 64
    assert groups(sigma, 20, dims="best").dims.tolist() == [0, 0, 0, 0, 0, 0, 0, 20, 0]  # 200/4 > 56/2


def test_explicit_dims_are_kept_and_give_d():
    assert groups(np.ones(8), dims=[0, 1, 2, 3]).dims.tolist() == [0, 1, 2, 3]
    assert groups(np.ones(8), 6, dims=np.array([0, 1, 2, 3])).dims.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: groups([0.5, 1.1]), ValueError, r"sigma must lie in \[0, 1\]"),
        (lambda: groups([0.5, np.nan]), ValueError, r"sigma must lie in \[0, 1\]"),
        (lambda: groups([0.5]), ValueError, "K >= 2"),
        (lambda: groups(["a", "b"]), TypeError, "sigma must be an array of numbers"),
        (lambda: groups(["0.5", "1"]), TypeError, "sigma must be an array of numbers"),
        (lambda: groups(np.array([0.5, 1j])), TypeError, "sigma must be an array of numbers"),
        (lambda: groups([[0.5], [0.1, 1.0]]), TypeError, "sigma must be an array of numbers"),
        (lambda: groups(np.ones(4), 0), ValueError, "d must be >= 1"),
        (lambda: groups(np.ones(4), 2.5), TypeError, "d must be an integer"),
        (lambda: groups(np.ones(4), 3, dims="all"), ValueError, "dims must be one of"),
        (lambda: groups(np.ones(4), dims="all"), ValueError, "dims must be one of"),
        (lambda: groups(np.ones(4), 3, dims=[1, 2]), ValueError, "one entry for each of the L = 3 groups"),
        (lambda: groups(np.ones(4), 3, dims=[1, 1, 2]), ValueError, "dims must sum to d = 3"),
        (lambda: groups(np.ones(4), dims=[0, 0, 0]), ValueError, "dims must sum to d >= 1"),
        (lambda: groups(np.ones(4), 3, dims=[-1, 2, 2]), ValueError, "dims must be >= 0"),
        (lambda: groups(np.ones(4), 3, dims=[1.0, 1.0, 1.0]), TypeError, "dims must be integers"),
        (lambda: number_of_groups(1), ValueError, "K must be >= 2"),
        (lambda: group_index([-0.1], 4), ValueError, r"sigma must lie in \[0, 1\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_raises_with_the_arguments_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
