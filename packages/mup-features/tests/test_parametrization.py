"""Presets, gauge, classifier, alignment exponents; the numbers are those of the papers' tables."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mup_features import Parametrization, classify
from mup_features.exponents import Abc, alignment_exponents, regime_of

SIZES_AND_RATES = {  # exponents of n in Var(W) and in the effective SGD rate: input, hidden, output
    "mup": ((0, -1, -2), (1, 0, -1)),
    "ip": ((0, -2, -2), (1, 0, -1)),
    "ntp": ((0, -1, -1), (0, -1, -1)),
    "sp": ((0, -1, -1), (-1, -1, -1)),
    "sp_const": ((0, -1, -1), (0, 0, 0)),
}


@pytest.mark.parametrize("name", SIZES_AND_RATES)
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_presets_have_the_sizes_and_rates_of_the_table(name, depth):
    sizes, rates = SIZES_AND_RATES[name]
    width = 32
    parametrization = Parametrization(name)
    spread = [0, *[1] * (depth - 1), 2]
    assert parametrization.variances(width, depth) == [float(width) ** sizes[i] for i in spread]
    assert parametrization.rates(width, depth, 0.5) == [0.5 * float(width) ** rates[i] for i in spread]
    v, e = parametrization.layer_exponents(depth)
    assert [*v] == [-sizes[i] for i in spread]
    assert [*e] == [-rates[i] for i in spread]


def test_mean_field_is_ip_with_one_hidden_layer():
    assert Parametrization("mfp").variances(8, 1) == Parametrization("ip").variances(8, 1)
    with pytest.raises(ValueError, match="depth must be 1 for 'mfp', got 2"):
        Parametrization("mfp").variances(8, 2)


@pytest.mark.parametrize(
    ("name", "r", "stable", "learns", "vanishes"),
    [
        ("mup", 0.0, True, True, False),
        ("ntp", 0.5, True, False, False),
        ("sp", 0.5, True, False, False),
        ("sp_const", -1.0, False, False, False),
        ("mfp", 0.0, True, True, False),
        ("ip", 0.0, False, False, True),
    ],
)
def test_the_regime_of_each_preset(name, r, stable, learns, vanishes):
    regime = classify(name)
    assert (regime.r, regime.stable) == (r, stable)
    assert (regime.feature_learning, regime.init_vanishing) == (learns, vanishes)
    assert regime.kernel == (stable and not learns)
    assert regime.reasons


def yang_hu_r(a, b, c):
    """The published formula, for one c; a and b of layers 1..L+1."""
    first = [2.0 * a_l + (1.0 if layer == 0 else 0.0) for layer, a_l in enumerate(a[:-1])]
    return min(a[-1] + b[-1], 2.0 * a[-1] + c) + c - 1.0 + min(first)


exponent = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0])


@given(data=st.data(), depth=st.integers(1, 4), c=exponent)
def test_equal_rates_give_the_published_formula(data, depth, c):
    a, b = (np.array(data.draw(st.lists(exponent, min_size=depth + 1, max_size=depth + 1))) for _ in "ab")
    regime = regime_of(a, b, np.full(depth + 1, c))
    assert regime.r == pytest.approx(yang_hu_r(a, b, c), abs=1e-12)
    size = a + b
    stable = (
        size[0] == 0
        and all(size[1:-1] == 0.5)
        and size[-1] >= 0.5
        and regime.r >= 0
        and 2 * a[-1] + c >= 1
        and size[-1] + regime.r >= 1
    )
    assert regime.stable == stable
    assert regime.nontrivial == (size[-1] + regime.r == 1 or 2 * a[-1] + c == 1)


@given(data=st.data(), optimizer=st.sampled_from(["sgd", "adam", "sign", "adafactor", "muon"]))
def test_the_gauge_changes_neither_sizes_nor_rates_nor_regime(data, optimizer):
    parametrization = Parametrization(data.draw(st.sampled_from(list(SIZES_AND_RATES))), optimizer=optimizer)
    moved = parametrization.gauge(data.draw(st.tuples(exponent, exponent, exponent)))
    for depth in (1, 4):
        assert np.allclose(moved.layer_exponents(depth), parametrization.layer_exponents(depth), atol=1e-12)
        assert moved.classify(depth) == parametrization.classify(depth)


def measured_changes(a, b, c, width, seed):
    """Changes of h^1..h^L and f in one SGD step of a linear net on one input of norm one, with chi = 1."""
    rng = np.random.default_rng(seed)
    n, depth = float(width), len(a) - 1
    shapes = [(width, 4), *[(width, width)] * (depth - 1), (1, width)]
    weights = [rng.standard_normal(shape) * n ** -(a[i] + b[i]) for i, shape in enumerate(shapes)]
    signals = [np.full(4, 0.5)]
    for weight in weights:
        signals.append(weight @ signals[-1])
    backward, moved = np.ones(1), list(weights)
    for i in reversed(range(depth + 1)):
        moved[i] = weights[i] - n ** -(c[i] + 2 * a[i]) * np.outer(backward, signals[i])
        backward = weights[i].T @ backward
    x, changes = signals[0], []
    for weight, before in zip(moved, signals[1:], strict=True):
        x = weight @ x
        changes.append(np.sqrt(np.mean((x - before) ** 2)))
    return changes


@pytest.mark.parametrize(
    "c",
    [
        (0.0, 0.0, 0.0, 0.0),
        (0.5, 0.0, 0.0, 0.0),
        (0.5, 1.0, 0.25, 0.0),
        (1.0, 0.5, 0.5, 0.5),
        (2.0, 0.25, 1.0, 0.0),
    ],
)
def test_features_move_with_the_exponent_of_rates_of_their_own(c):
    a, b = (np.array(x) for x in ((-0.5, 0.0, 0.0, 0.5), (0.5, 0.5, 0.5, 0.5)))
    widths = (128, 256, 512)
    sizes = [
        [np.mean([measured_changes(a, b, c, n, seed)[layer] for seed in range(4)]) for layer in range(3)]
        for n in widths
    ]
    slopes = np.polyfit(np.log(widths), np.log(sizes), 1)[0]
    # the largest change among layers; four nets per width leave about 0.05 in a slope over two octaves
    assert -slopes.max() == pytest.approx(regime_of(a, b, np.array(c)).r, abs=0.15)


def test_mup_has_the_rates_of_full_alignment():
    a, b, c = Parametrization("mup").exponents(3)
    assert [*alignment_exponents(a, b, optimizer="sgd")] == [*c] == [0, 0, 0, 0]
    assert [*alignment_exponents(a, b, optimizer="adam")] == [0.5, 1, 1, 0.5]
    assert [*alignment_exponents(a, b, optimizer="adafactor")] == [0, 0.5, 0.5, 0]
    assert [*alignment_exponents(a, b, optimizer="muon")] == [0.5, 0, 0, 0.5]


def test_no_alignment_raises_hidden_and_readout_rates_by_the_root_of_the_width():
    for optimizer in ("sgd", "adam", "sign", "adafactor"):
        full = Parametrization("mup", optimizer=optimizer).rates(16, 3, 1.0)
        none = Parametrization("mup", optimizer=optimizer, alignment="none").rates(16, 3, 1.0)
        assert np.allclose(np.divide(none, full), [1, 4, 4, 4], rtol=1e-12)
    mixed = Parametrization("mup", alignment=(1.0, 0.5, 1.0)).rates(16, 3, 1.0)
    assert np.allclose(mixed, [16, 1, 4, 1 / 16], rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "sign", "adafactor", "muon"])
@pytest.mark.parametrize("name", ["mup", "ntp", "sp"])
def test_rates_from_alignment_learn_features_where_the_update_has_its_own_size(name, optimizer):
    regime = Parametrization(name, optimizer=optimizer).classify(3)
    assert regime.r == 0.0
    # a readout of size n^{-1/2} that meets features moved by order one makes the output explode
    assert regime.stable == (name == "mup")


@pytest.mark.parametrize("form", ["mult", "pure", "symmetric"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adafactor", "sign", "muon"])
@pytest.mark.parametrize("alignment", ["full", "none", (0.75, 0.5)])
def test_the_forms_of_mup_have_one_effective_size_and_rate(form, optimizer, alignment):
    n, depth = 64, 2
    parametrization = Parametrization("mup", form=form, optimizer=optimizer, alignment=alignment)
    power = {"sgd": 2, "adafactor": 0}.get(optimizer, 1)
    for i, role in enumerate(("input", "hidden", "output")):
        fans = (3 if role == "input" else n, 5 if role == "output" else n)
        multiplier = parametrization.multiplier(role, *fans)
        size = parametrization.init_std(role, *fans) * multiplier
        assert size**2 == pytest.approx(parametrization.variances(n, depth)[i], rel=1e-12)
        rate = parametrization.lr(role, 0.1, *fans) * multiplier**power
        assert rate == pytest.approx(parametrization.rates(n, depth, 0.1)[i], rel=1e-12)


@pytest.mark.parametrize("name", ["ntp", "sp", "ip", "sp_const"])
def test_layers_of_other_presets_have_the_sizes_and_rates_of_the_table(name):
    parametrization = Parametrization(name)
    for i, role in enumerate(("input", "hidden", "output")):
        multiplier = parametrization.multiplier(role, 64, 64)
        assert (parametrization.init_std(role, 64, 64) * multiplier) ** 2 == pytest.approx(
            parametrization.variances(64, 2)[i], rel=1e-12
        )
        assert parametrization.lr(role, 0.1, 64, 64) * multiplier**2 == pytest.approx(
            parametrization.rates(64, 2, 0.1)[i], rel=1e-12
        )


@pytest.mark.parametrize("name", ["mup", "ip", "ntp", "sp", "sp_const"])
def test_at_base_width_every_preset_is_the_standard_network(name):
    parametrization = Parametrization(name, base_width=64)
    assert parametrization.variances(64, 2) == [1.0, 1 / 64, 1 / 64]
    assert parametrization.rates(64, 2, 0.1) == [0.1, 0.1, 0.1]
    for role, std in (("input", 1.0), ("hidden", 1 / 8), ("output", 1 / 8)):
        assert parametrization.init_std(role, 64, 64) == std
        assert parametrization.multiplier(role, 64, 64) == 1.0
        assert parametrization.lr(role, 0.1, 64, 64) == 0.1


def test_sigma_and_input_scale_enter_the_variances():
    parametrization = Parametrization("mup", sigma=(2.0, 3.0, 4.0), input_scale="fan_in")
    assert parametrization.variances(4, 3, input_dim=10) == [0.4, 9 / 4, 9 / 4, 1.0]
    assert parametrization.init_std("input", 10, 4) == pytest.approx(2 / np.sqrt(10), rel=1e-15)
    per_layer = Parametrization("ntp", sigma=(1.0, 2.0, 3.0, 4.0, 5.0))
    assert per_layer.variances(1, 4) == [1, 4, 9, 16, 25]
    with pytest.raises(ValueError, match="input_dim must be >= 1"):
        parametrization.variances(4, 3)


def test_the_first_step_of_ip_llr_is_larger_and_mup_like():
    parametrization = Parametrization("ip_llr")
    assert [*parametrization.first_step_exponents(1)] == [0, 0]
    assert [*parametrization.first_step_exponents(2)] == [0.5, 0, 0.5]
    assert [*parametrization.first_step_exponents(4)] == [1.5, 1, 1, 1, 1.5]
    assert parametrization.rates(16, 2, 1.0, step=0) == [64, 1, 1 / 4]
    assert parametrization.rates(16, 2, 1.0, step=1) == Parametrization("ip").rates(16, 2, 1.0)
    assert not Parametrization("ip").first_step_exponents(3).any()


def test_variants_of_ip_start_with_biases_or_means():
    assert Parametrization("ip_noncentered").means(8, 2) == [0, 1 / 8, 1 / 8]
    assert Parametrization("ip_bias").bias_variances(2) == [1, 1, 0]
    assert not any(Parametrization("mup").means(8, 2) + Parametrization("mup").bias_variances(2))
    assert Parametrization("ip_bias").variances(8, 3) == Parametrization("ip").variances(8, 3)


def test_custom_exponents_per_place_or_layer():
    custom = Parametrization(Abc((0, 0, 1), (0, 0.5, 0), (-1, 0, -1)))
    assert custom.variances(8, 4) == Parametrization("mup").variances(8, 4)
    assert custom.rates(8, 4, 1.0) == Parametrization("mup").rates(8, 4, 1.0)
    free_rate = Parametrization(Abc((0, 0, 1), (0, 0.5, 0)), optimizer="adam")
    assert free_rate.rates(8, 2, 1.0) == Parametrization("mup", optimizer="adam").rates(8, 2, 1.0)
    layers = Parametrization(Abc((0, 0, 0, 0, 1), (0, 0.5, 0.5, 0.5, 0), (-1, 0, 0, 0, -1)))
    assert layers.classify().feature_learning
    with pytest.raises(ValueError, match="a must hold 3 numbers"):
        layers.variances(8, 2)


def test_dictionaries_bring_the_same_parametrization_back():
    for parametrization in (
        Parametrization("mup", base_width=64, form="pure", optimizer="adam", alignment=(0.5, 1.0)),
        Parametrization(Abc((0, 0, 1), (0, 0.5, 0)), sigma=(1.0, 2.0, 3.0), input_scale="fan_in"),
    ):
        text = json.dumps(parametrization.to_dict())
        assert Parametrization.from_dict(json.loads(text)) == parametrization
    with pytest.raises(ValueError, match="unknown keys"):
        Parametrization.from_dict({"name": "mup", "width": 3})


def test_the_table_shows_sizes_and_rates():
    rows = Parametrization("mup").table().splitlines()
    assert rows[2:] == [
        "| input | 1 | eta n | -0.5 | 0.5 | 0 |",
        "| hidden | n^-1 | eta | 0 | 0.5 | 0 |",
        "| output | n^-2 | eta n^-1 | 0.5 | 0.5 | 0 |",
    ]
    assert "(n/64)^-2" in Parametrization("ip", base_width=64).table()
    assert len(Parametrization("mfp").table().splitlines()) == 4


@pytest.mark.parametrize(
    ("kwargs", "rule"),
    [
        ({"name": "mu_p"}, r"name must be one of mup, .*got 'mu_p'"),
        ({"name": "mup", "base_width": 0}, "base_width must be an integer >= 1 or None, got 0"),
        ({"name": "mup", "sigma": -1.0}, "sigma must be finite and >= 0"),
        ({"name": "mup", "optimizer": "lion"}, "optimizer must be one of"),
        ({"name": "mup", "alignment": "half"}, "alignment must be 'full', 'none'"),
        ({"name": "mup", "alignment": 0.3}, r"alignment must lie in \[0.5, 1\], got 0.3"),
        ({"name": "mup", "form": "odd"}, "form must be one of"),
        ({"name": "ntp", "form": "pure"}, "form must be 'mult' unless"),
        ({"name": "mup", "input_scale": "d"}, "input_scale must be 'fan_in' or None"),
    ],
)
def test_values_out_of_range_are_refused(kwargs, rule):
    with pytest.raises(ValueError, match=rule):
        Parametrization(**kwargs)


def test_widths_depths_and_roles_out_of_range_are_refused():
    parametrization = Parametrization("mup")
    with pytest.raises(ValueError, match="width must be >= 1, got 0"):
        parametrization.variances(0, 2)
    with pytest.raises(ValueError, match="depth must be an integer >= 1, got 0"):
        parametrization.rates(8, 0, 1.0)
    with pytest.raises(ValueError, match="role must be one of input, hidden, output, got 'readout'"):
        parametrization.lr("readout", 0.1, 8, 8)
    with pytest.raises(ValueError, match="fan_in must be >= 1, got 0"):
        parametrization.init_std("hidden", 0, 8)
    with pytest.raises(ValueError, match="at least two finite exponents"):
        Abc((float("nan"), 0.0), (0.0, 0.0))
    with pytest.raises(TypeError, match="a string or an Abc, got float"):
        Parametrization(1.0)  # pyright: ignore[reportArgumentType]
