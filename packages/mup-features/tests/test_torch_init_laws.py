"""How apply_mup finds out by which law a model was initialised, and what it does about each law."""

import pytest
import torch
from models import MLP, build, on_meta
from torch import nn

from mup_features import apply_mup, infer_roles
from mup_features.torch._init_laws import root_mean_square

FORMS = ("mult", "pure", "symmetric")


def test_the_initial_sizes_do_not_depend_on_the_width_except_as_the_table_says():
    base = build(MLP, 64, 1)
    for width in (128, 512):
        model = build(MLP, width)
        apply_mup(model, infer_roles(model, base))
        m = width / 64
        expected = {"fc1.weight": 1, "fc2.weight": m**-0.5, "fc3.weight": m**-0.5, "readout.weight": 1}
        for name, factor in expected.items():
            measured = root_mean_square(model.get_parameter(name)) / root_mean_square(
                base.get_parameter(name)
            )
            # four standard errors of a uniform sample of the smaller tensor
            assert measured == pytest.approx(factor, rel=4 * 0.45 / base.get_parameter(name).numel() ** 0.5)


class ConstantLaw(nn.Module):
    """All weights normal with one standard deviation at every width, as GPT-2 does; biases zero."""

    def __init__(self, width, std=0.02):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
        )
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_initialisation_is_recognised_and_rescaled(form):
    plain = build(ConstantLaw, 64)
    model = build(ConstantLaw, 64)
    apply_mup(model, infer_roles(model, build(ConstantLaw, 16, 1)), form=form)
    factors = {"mult": (1, 1 / 2, 1), "pure": (1, 1 / 2, 1 / 4), "symmetric": (1 / 2, 1 / 2, 1 / 2)}[form]
    for layer, factor in zip((0, 2, 4), factors, strict=True):
        assert torch.equal(model.layers[layer].weight, factor * plain.layers[layer].weight)
        assert not model.layers[layer].bias.any()


def test_without_the_base_models_entries_only_torchs_default_is_recognised():
    model = build(ConstantLaw, 64)
    roles = infer_roles(model, on_meta_constant(16))
    with pytest.raises(ValueError, match=r"'layers\.2\.weight' has root mean square .* pass init='constant'"):
        apply_mup(model, roles)
    assert torch.equal(model.layers[2].weight, build(ConstantLaw, 64).layers[2].weight)
    apply_mup(model, roles, init="constant")
    assert torch.equal(model.layers[2].weight, build(ConstantLaw, 64).layers[2].weight / 2)


def on_meta_constant(width):
    with torch.device("meta"):
        return ConstantLaw(width)


def test_a_normal_initialisation_of_the_default_size_is_not_taken_for_the_default():
    model = build(ConstantLaw, 64, std=(3 * 64) ** -0.5)
    with pytest.raises(ValueError, match=r"which is not the framework's default \(0\.07216"):
        apply_mup(model, infer_roles(model, on_meta_constant(16)))


def test_an_initialisation_of_neither_law_is_named():
    model, base = build(ConstantLaw, 256, std=0.02), build(ConstantLaw, 16, std=0.05)
    with pytest.raises(ValueError, match=r"'layers\.0\.weight' has root mean square .* fits neither"):
        apply_mup(model, infer_roles(model, base))


def test_each_parameter_may_follow_a_law_of_its_own():
    def mixed(width, seed):
        model = build(MLP, width, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            nn.init.normal_(model.fc2.weight, std=0.02)
        return model

    plain = mixed(64, 0)
    model = mixed(64, 0)
    apply_mup(model, infer_roles(model, mixed(16, 1)))
    assert torch.equal(model.fc2.weight, plain.fc2.weight / 2)
    assert torch.equal(model.fc3.weight, plain.fc3.weight)
    given = mixed(64, 0)
    apply_mup(given, infer_roles(given, on_meta(MLP, 16)), init={"fc2.*": "constant", "*": "fan_in"})
    assert torch.equal(given.fc2.weight, model.fc2.weight)
    with pytest.raises(ValueError, match=r"init has no pattern for parameter 'fc1\.weight'"):
        apply_mup(mixed(64, 0), infer_roles(given, on_meta(MLP, 16)), init={"fc2.*": "constant"})


class ShrinkingInput(nn.Module):
    """An embedding of size 1/sqrt(d) and Glorot's law elsewhere: both shrink the first layers with width."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.enter = nn.Embedding(32, width), nn.Linear(16, width)
        self.hidden, self.readout = nn.Linear(width, width), nn.Linear(width, 4)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        for layer in (self.enter, self.hidden, self.readout):
            nn.init.xavier_uniform_(layer.weight)


def test_first_layers_that_shrink_with_width_get_their_size_at_base_width():
    model, plain, base = (build(ShrinkingInput, width) for width in (256, 256, 64))
    apply_mup(model, infer_roles(model, base))
    assert torch.equal(model.embed.weight, 2 * plain.embed.weight)
    assert torch.equal(model.enter.weight, 2 * plain.enter.weight)
    assert torch.equal(model.hidden.weight, plain.hidden.weight)
    assert torch.equal(model.readout.weight, 2 * plain.readout.weight)


def test_too_few_entries_to_tell_the_laws_apart_ask_for_one():
    def tiny(width, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Linear(width, 1, bias=False)

    model = tiny(4, 0)
    with pytest.raises(ValueError, match="init must be given"):
        apply_mup(model, infer_roles(model, tiny(2, 1)))


def test_a_parameter_that_is_zero_in_one_model_only_is_named():
    model, base = build(MLP, 64), build(MLP, 16)
    nn.init.zeros_(base.fc2.weight)
    with pytest.raises(ValueError, match=r"'fc2\.weight' .* one is zero"):
        apply_mup(model, infer_roles(model, base))
