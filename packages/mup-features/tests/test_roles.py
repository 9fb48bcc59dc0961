"""Roles from shapes: every layout, every ambiguity, overrides, and random widths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mup_features.roles import Layout, Role, at_base_width, role_of, roles_from_shapes
from mup_features.shapes import BaseShape

TORCH_LINEAR = Layout("linear", fan_in=(1,), fan_out=(0,), default_fan=((1,),))
FLAX_KERNEL = Layout("linear", fan_in=(0,), fan_out=(1,), default_fan=((0,),))
TORCH_CONV = Layout("conv", fan_in=(1,), fan_out=(0,), default_fan=((1, 2, 3),))
FLAX_CONV = Layout("conv", fan_in=(-2,), fan_out=(-1,), default_fan=((0, 1, 2),))
EMBEDDING = Layout("embedding", fan_out=(1,))
VECTOR = Layout("vector", fan_out=(0,))
FREE = Layout("free")

widths = st.integers(1, 512)


@given(n=widths, n_in=widths, n0=widths, n0_in=widths)
def test_a_kernel_has_the_role_of_its_transpose(n, n_in, n0, n0_in):
    torch_role = role_of("w", (n, n_in), (n0, n0_in), layout=TORCH_LINEAR)
    assert torch_role == role_of("w", (n_in, n), (n0_in, n0), layout=FLAX_KERNEL)
    assert torch_role.fan_in_mult == n_in / n0_in
    assert torch_role.fan_out_mult == n / n0
    grown = (n_in != n0_in, n != n0)
    assert torch_role.kind == {(True, True): "hidden", (True, False): "output"}.get(grown, "input")


@given(n=widths, n_in=widths, n0=widths, n0_in=widths)
def test_marked_widths_keep_their_role_at_any_size(n, n_in, n0, n0_in):
    base = BaseShape((n0, n0_in), width=(0, 1))
    role = role_of("w", (n, n_in), base, layout=TORCH_LINEAR)
    assert (role.kind, role.fan_in_mult, role.fan_out_mult) == ("hidden", n_in / n0_in, n / n0)


@given(n=widths, n0=widths, kernel=st.integers(1, 7))
def test_the_kernel_size_of_a_convolution_is_no_width(n, n0, kernel):
    role = role_of("w", (n, n, kernel, kernel), (n0, n0, kernel, kernel), layout=TORCH_CONV)
    assert role == role_of("w", (kernel, kernel, n, n), (kernel, kernel, n0, n0), layout=FLAX_CONV)
    assert role.fan_in_mult == role.fan_out_mult == role.default_fan_mult == n / n0
    assert not role.matrix


def test_a_depthwise_convolution_is_input_like():
    role = role_of("w", (64, 1, 3, 3), (16, 1, 3, 3), layout=TORCH_CONV)
    assert (role.kind, role.fan_in_mult, role.fan_out_mult) == ("input", 1.0, 4.0)


def test_a_kernel_split_into_heads_has_the_fan_of_its_product():
    split = Layout("linear", fan_in=(0,), fan_out=(1, 2))
    role = role_of("query", (64, 8, 8), (16, 4, 4), layout=split)
    assert (role.kind, role.fan_in_mult, role.fan_out_mult) == ("hidden", 4.0, 4.0)


def test_an_embedding_grows_in_its_features_only():
    role = role_of("e", (100, 64), (100, 16), layout=EMBEDDING)
    assert (role.kind, role.fan_out_mult, role.matrix, role.scalable) == ("input", 4.0, False, True)


def test_a_bias_follows_the_default_fan_of_its_weight():
    roles = roles_from_shapes(
        {"w": (64, 128), "b": (64,)},
        {"w": (16, 16), "b": (16,)},
        {"w": TORCH_LINEAR, "b": Layout("vector", fan_out=(0,), default_of="w")},
    )
    assert (roles["b"].kind, roles["b"].fan_out_mult, roles["b"].default_fan_mult) == ("input", 4.0, 8.0)
    assert not roles["b"].scalable


def test_a_default_that_divides_by_a_sum_of_fans_grows_with_the_sum():
    xavier = Layout("linear", fan_in=(1,), fan_out=(0,), default_fan=((0,), (1,)))
    assert role_of("w", (64, 8), (16, 8), layout=xavier).default_fan_mult == 72 / 24


def test_positions_are_input_like_where_a_readout_would_have_its_width_first():
    assert role_of("positions", (10, 64), (10, 16), layout=FREE).kind == "input"
    assert role_of("positions", (1, 10, 64), (1, 10, 16), layout=Layout("free", out_in=True)).kind == "input"


def test_an_override_by_layout_has_its_fan_in_as_default_fan():
    experts = Layout("linear", fan_in=(2,), fan_out=(1,))
    role = roles_from_shapes(
        {"experts": (8, 128, 64)}, {"experts": (8, 32, 32)}, {"experts": FREE}, overrides={"experts": experts}
    )["experts"]
    assert (role.fan_in_mult, role.fan_out_mult, role.default_fan_mult) == (2.0, 4.0, 2.0)


def test_the_readout_bias_has_no_width():
    role = role_of("b", (10,), (10,), layout=VECTOR)
    assert (role.kind, role.fan_in_mult, role.fan_out_mult) == ("input", 1.0, 1.0)


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 197, 64), (64,), (64, 1, 1)])
def test_a_free_parameter_whose_width_stands_last_is_input_like(shape):
    base = tuple(16 if size == 64 else size for size in shape)
    role = role_of("p", shape, base, layout=FREE)
    assert (role.kind, role.fan_out_mult, role.scalable) == ("input", 4.0, False)


@pytest.mark.parametrize(
    ("shape", "base", "layout", "rule"),
    [
        ((64, 64), (16, 16), FREE, "which is the fan-in"),
        ((64, 64, 64), (16, 16, 16), FREE, "at most two"),
        ((64, 10), (16, 10), FREE, "whether the layer sums"),
        ((10, 64), (10, 16), Layout("free", out_in=True), "whether the layer sums"),
        ((120, 64), (100, 16), EMBEDDING, "axis 0 of an embedding parameter is no width"),
        ((64, 64, 5, 5), (16, 16, 3, 3), TORCH_CONV, "axis 2 of a conv parameter is no width"),
        ((64, 64), (16,), TORCH_LINEAR, "numbers of dimensions differ"),
        ((64, 0), (16, 4), TORCH_LINEAR, "empty"),
        ((64, 12), BaseShape((16, 10), width=(0,)), TORCH_LINEAR, "stale"),
    ],
)
def test_what_cannot_be_decided_names_the_parameter_and_both_shapes(shape, base, layout, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        role_of("block.0.w", shape, base, layout=layout)
    base_sizes = base.sizes if isinstance(base, BaseShape) else base
    for part in ("'block.0.w'", str(shape), str(base_sizes)):
        assert part in str(caught.value)


def test_an_ambiguous_parameter_is_told_how_to_override():
    with pytest.raises(ValueError, match=r"overrides=\{'w': Layout\('linear'"):
        role_of("w", (64, 64), (16, 16), layout=FREE)
    with pytest.raises(ValueError, match=r"overrides=\{'w': 'input'\}"):
        role_of("w", (64, 10), (16, 10), layout=FREE)


def roles_of_two(overrides, shape=(64, 64)):
    base = tuple(16 if size != 10 else 10 for size in shape)
    return roles_from_shapes(
        {"a.w": shape, "b.w": shape},
        {"a.w": base, "b.w": base},
        {"a.w": FREE, "b.w": FREE},
        overrides=overrides,
    )


def test_the_first_matching_override_counts():
    roles = roles_of_two({"a.*": Role("output", fan_in_mult=7.0), "*": "hidden"})
    assert roles["a.w"] == Role("output", fan_in_mult=7.0)
    assert (roles["b.w"].kind, roles["b.w"].fan_in_mult, roles["b.w"].fan_out_mult) == ("hidden", 4.0, 4.0)


def test_an_override_may_be_a_kind_or_a_layout():
    roles = roles_of_two({"a.w": "output", "b.w": Layout("linear", fan_in=(0,), fan_out=(1,))}, (64, 10))
    assert (roles["a.w"].kind, roles["a.w"].fan_in_mult, roles["a.w"].fan_out_mult) == ("output", 4.0, 1.0)
    assert (roles["b.w"].kind, roles["b.w"].fan_in_mult) == ("output", 4.0)


def test_hidden_of_unequal_growth_needs_a_layout():
    with pytest.raises(ValueError, match="grew equally"):
        roles_from_shapes({"w": (64, 32)}, {"w": (16, 16)}, {"w": FREE}, overrides={"w": "hidden"})


def test_an_override_without_parameter_is_a_spelling_error():
    with pytest.raises(ValueError, match=r"'c\.\*', which matches no parameter"):
        roles_of_two({"*": "hidden", "c.*": "input"})


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"got 'readout' for 'a\.w'"):
        roles_of_two({"*": "readout"})


def test_missing_parameters_are_named_on_both_sides():
    with pytest.raises(ValueError, match=r"the base lacks 'new'; the model lacks 'old'"):
        roles_from_shapes({"new": (4,)}, {"old": (4,)}, {"new": VECTOR})


def test_at_base_width_no_multiplier_differs_from_one():
    assert at_base_width([Role("hidden"), Role("input")])
    assert not at_base_width([Role("hidden"), Role("input", fan_out_mult=2.0)])


@pytest.mark.parametrize(
    "bad",
    [{"kind": "readout"}, {"fan_in_mult": 0.0}, {"fan_out_mult": float("nan")}, {"default_fan_mult": -1.0}],
)
def test_a_role_of_impossible_values_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Role(**{"kind": "hidden", **bad})


def test_a_layout_with_an_axis_on_both_sides_is_refused():
    with pytest.raises(ValueError, match="no axis in common"):
        Layout("linear", fan_in=(0,), fan_out=(0,))
    with pytest.raises(ValueError, match="owner must be one of"):
        Layout("dense")
