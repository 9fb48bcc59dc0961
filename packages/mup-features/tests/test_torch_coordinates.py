"""Coordinate checks of torch models parametrized by hand: muP is flat, the standard one is not."""

import pytest
import torch
from torch import nn

from mup_features.torch.coordinates import coordinate_check

WIDTHS = (32, 128, 512)
BASE = 32


def batch(seed, step):
    generator = torch.Generator().manual_seed(1000 * seed)
    return torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)


class Scaled(nn.Linear):
    """A readout with a multiplier."""

    multiplier = 1.0

    def forward(self, x):
        return super().forward(self.multiplier * x)


def mlp(width):
    """Standard initialization, no biases, so that the table of the rates is short."""
    return nn.Sequential(
        nn.Linear(8, width, bias=False),
        nn.Tanh(),
        nn.Linear(width, width, bias=False),
        nn.Tanh(),
        Scaled(width, 4, bias=False),
    )


def by_hand(width):
    """MuP by its table, rates as roles."""
    m = width / BASE
    model = mlp(width)
    with torch.no_grad():
        model[4].weight.mul_(m**0.5)
    model[4].multiplier = 1.0 / m
    return model, [1.0, 1.0 / m, 1.0]


def adam(model, factors=(1.0, 1.0, 1.0)):
    groups = [{"params": [p], "lr": 0.01 * f} for p, f in zip(model.parameters(), factors, strict=True)]
    return torch.optim.Adam(groups)


def check(model_fn, **changed):
    settings = {"optimizer_fn": adam, "steps": 3} | changed
    return coordinate_check(model_fn, batch, WIDTHS, range(4), **settings)


def test_mup_by_hand_passes_and_the_standard_parametrization_fails():
    good, bad = check(by_hand).verdict(), check(mlp).verdict()
    assert good.passed, str(good)
    assert bad.outcome == "FAIL"
    # Adam moves the hidden layer by about n^1 * rate, the output by the same again
    assert {"2", "4"} <= {judged.module for judged in bad.judged if judged.outcome == "FAIL"}


def test_modules_are_named_as_in_the_model_and_the_readout_is_the_output():
    report = check(by_hand, steps=1)
    assert report.modules == ("0", "2", "4")
    assert report.outputs == ("4",)


@pytest.mark.parametrize(("record", "expected"), [("rms", 2.5**0.5), ("l1", 1.5)])
def test_sizes_and_changes_are_those_of_the_activations(record, expected):
    def model_fn(width):
        model = nn.Linear(1, 2 * width, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([1.0, -2.0]).repeat(width)[:, None])
        return model

    report = coordinate_check(
        model_fn,
        always((torch.ones(1, 1), torch.zeros(1, 1))),
        (1, 2),
        [0],
        1,
        # the gradient is 1 everywhere: every weight and every activation moves by -0.5
        optimizer_fn=lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
        loss_fn=lambda model, batch: model(batch[0]).sum(),
        record=record,
    )
    assert report.modules == ("(model)",)
    assert report.sizes[0, 0, 0, 0] == pytest.approx(expected, rel=1e-7)  # float32 activations
    assert report.changes[:, 0, :, 0].tolist() == [[0.0, 0.5], [0.0, 0.5]]


class Awkward(nn.Module):
    """A dictionary out, a tuple inside, a module called twice, dropout, writing in place, free parameters."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.twice = nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.ones(width))
        self.unused = nn.Linear(width, 3)

    def forward(self, x):
        h, _ = self.attention(*3 * [self.embed(x)])
        h = self.drop(self.twice(self.twice(h))).mul_(2.0)
        return {"loss": h.mean(), "logits": (h * self.gain) @ self.embed.weight.T}


def always(value):
    def fixed(*_):
        return value

    return fixed


def tokens(seed, step):
    return torch.arange(5)[None]


def token_loss(model, batch):
    return model(batch)["logits"].square().mean()


def awkward(**changed):
    settings = {
        "optimizer_fn": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": token_loss,
        "progress": False,
    }
    return coordinate_check(Awkward, tokens, (4, 8), [0, 1], 2, **(settings | changed))


def test_tuples_dictionaries_repeated_calls_and_unused_modules_are_handled():
    report = awkward()
    assert report.modules == ("embed", "attention", "twice", "(model)")
    assert report.outputs == ("(model)",)
    assert (report.changes[:, :, 0] == 0.0).all()  # dropout is off while measuring
    assert (report.changes[:, :, 1:] > 0.0).all()


def test_activations_are_copied_before_anything_writes_into_them():
    report = coordinate_check(
        lambda width: nn.Sequential(nn.Linear(4, width), nn.ReLU(inplace=True), nn.Linear(width, 4)),
        always((torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 4))),
        (8, 16),
        [0],
        1,
        optimizer_fn=adam_of_all,
        modules=["0", "1"],
    )
    assert (report.sizes[..., 0] > 1.1 * report.sizes[..., 1]).all()  # ReLU drops about half of the squares


def test_a_module_whose_inputs_change_shape_is_refused():
    calls = []

    def growing(model, batch):
        calls.append(None)
        return model(torch.ones(len(calls), 4)).square().mean()

    with pytest.raises(
        ValueError, match=r"0 must keep the shapes of its activations from step to step, got \[\(1,"
    ):
        coordinate_check(
            lambda width: nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4)),
            tokens,
            (4, 8),
            [0],
            1,
            optimizer_fn=adam_of_all,
            loss_fn=growing,
        )


def test_patterns_choose_modules():
    assert awkward(modules=["tw*", "drop"]).modules == ("twice", "drop", "(model)")
    with pytest.raises(ValueError, match="pattern 'layers' matches none of embed, attention"):
        awkward(modules=["layers"])


def test_hooks_modes_and_random_state_are_left_as_they_were():
    models = []

    def model_fn(width):
        model = Awkward(width)
        model.drop.eval()
        models.append(model)
        return model

    before = torch.get_rng_state()
    coordinate_check(model_fn, tokens, (4, 8), [7], 1, optimizer_fn=adam_of_all, loss_fn=token_loss)
    assert torch.equal(torch.get_rng_state(), before)
    for model in models:
        assert [name for name, m in model.named_modules() if not m.training] == ["drop"]
        assert not any(m._forward_hooks for m in model.modules())


def adam_of_all(model):
    return torch.optim.Adam(model.parameters())


def test_hooks_are_gone_after_a_forward_pass_that_failed():
    models = []

    def model_fn(width):
        models.append(mlp(width))
        return models[-1]

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        coordinate_check(
            model_fn, always((torch.ones(2, 3), torch.ones(2, 4))), (4, 8), [0], optimizer_fn=adam
        )
    assert not any(m._forward_hooks for m in models[0].modules())
    assert models[0].training


def test_the_same_seeds_give_the_same_report():
    first, second = awkward(), awkward()
    assert first.to_json() == second.to_json()


def test_divergence_is_kept_and_fails():
    def wild(model):
        return torch.optim.SGD(model.parameters(), lr=1e30)

    verdict = check(mlp, optimizer_fn=wild, loss_fn=lambda model, b: model(b[0]).square().mean()).verdict()
    assert verdict.outcome == "FAIL"
    assert "not finite" in verdict.reasons[0]


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="model_fn must return a module or"):
        check(always("model"))
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        check(mlp, steps=0)
    with pytest.raises(ValueError, match=r"same modules at every width, 1.* differ at 128"):
        check(
            lambda width: nn.Sequential(*[nn.Linear(8, 8) for _ in range(1 + width // 64)]),
            optimizer_fn=adam_of_all,
            loss_fn=lambda model, b: model(b[0]).sum(),
        )
    with pytest.raises(
        ValueError, match=r"batch must be a pair \(inputs, targets\) or loss_fn given, got int"
    ):
        coordinate_check(mlp, always(3), (4, 8), [0], optimizer_fn=adam)
