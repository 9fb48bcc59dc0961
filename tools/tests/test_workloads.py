"""workloads.py: models compute what they should, batches cover the data, training trains, seeds rule."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the workloads are torch modules")

import torch.nn.functional as F  # noqa: E402, N812
from torch import nn  # noqa: E402

from tenfold_tools import data, workloads  # noqa: E402

SMALL = workloads.GPTConfig(width=16, layers=2, heads=2, context=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


BUILDERS = {
    "gpt": lambda generator: workloads.ByteGPT(SMALL, generator),
    "mlp": lambda generator: workloads.DigitsMLP(generator),
    "cnn": lambda generator: workloads.DigitsCNN(generator),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_generator_alone_decides_the_weights(name):
    global_state = torch.get_rng_state()
    first, second, other = (list(BUILDERS[name](seeded(seed)).parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(parameter.isfinite().all() for parameter in first)
    assert torch.equal(global_state, torch.get_rng_state())


def test_the_gpt_has_the_parameters_of_its_description():
    config = workloads.GPTConfig()
    model = workloads.ByteGPT(config, seeded())
    width = config.width
    per_block = 12 * width**2 + 2 * width  # 4 attention and 8 network matrices of width^2, two norms
    expected = (256 + config.context) * width + config.layers * per_block + width
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert [name for name, _ in model.named_parameters() if "bias" in name] == []


def test_the_gpt_starts_with_nanogpts_deviations():
    model = workloads.ByteGPT(workloads.GPTConfig(width=128, layers=8), seeded())
    block = model.blocks[0]
    for weight, deviation in [
        (model.tokens.weight, 0.02),
        (block.mlp_in.weight, 0.02),
        (block.mlp_out.weight, 0.02 / 4),
        (block.attention_out.weight, 0.02 / 4),
    ]:
        # 16384 or more samples: relative standard error of the deviation at most 0.6 %, five of them allowed
        assert weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert torch.equal(block.mlp_norm.weight, torch.ones(128))


def test_the_gpt_starts_near_the_uniform_loss():
    model = workloads.ByteGPT(workloads.GPTConfig(), seeded())
    batch = next(workloads.token_windows(np.arange(256, dtype=np.uint8), context=64))
    # logits start with deviation about 0.02 sqrt(width) = 0.16, which moves the loss by about its square
    assert workloads.cross_entropy(model, batch).item() == pytest.approx(math.log(256), abs=0.1)


def test_the_gpt_never_looks_ahead():
    model = workloads.ByteGPT(SMALL, seeded())
    tokens = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5] = 200
    before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5:], after[0, 5:])


def test_attention_is_softmax_of_scaled_products():
    block = workloads.ByteGPT(SMALL, seeded()).blocks[0].double()
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=seeded(3))
    q, k, v = block.attention_in(x)[0].chunk(3, dim=-1)
    heads = []
    for start in (0, 8):
        part = slice(start, start + 8)
        scores = q[:, part] @ k[:, part].T / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, part])
    # float64 sums of some ten terms
    torch.testing.assert_close(block._attend(x)[0], torch.cat(heads, -1), rtol=1e-12, atol=1e-14)


def test_the_head_is_tied_to_the_embedding():
    model = workloads.ByteGPT(SMALL, seeded())
    x = model.norm(torch.zeros(1, 16))
    assert torch.equal(F.linear(x, model.tokens.weight), torch.zeros(1, 256))
    model.tokens.weight.grad = None
    model(torch.zeros(1, 1, dtype=torch.int64))[0, 0, 77].backward()
    assert model.tokens.weight.grad[77].abs().sum() > 0  # token 77 was never read, only predicted


def test_the_mlp_is_affine_maps_with_relu_between():
    model = workloads.DigitsMLP(seeded(), widths=(3, 4, 2))
    x = torch.randn(5, 3, generator=seeded(1))
    first, second = model.layers
    expected = (x @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    # float32 rounding of sums of four terms
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert first.weight.abs().max() <= 1 / math.sqrt(3)
    assert first.bias.abs().max() <= 1 / math.sqrt(3)


def test_the_cnn_reads_rows_of_64_as_images():
    model = workloads.DigitsCNN(seeded(), channels=(3, 5))
    x = torch.rand(2, 64, generator=seeded(1))
    image = F.max_pool2d(
        F.conv2d(x.view(2, 1, 8, 8), model.first.weight, model.first.bias, padding=1).relu(), 2
    )
    image = F.max_pool2d(F.conv2d(image, model.second.weight, model.second.bias, padding=1).relu(), 2)
    assert image.shape == (2, 5, 2, 2)
    torch.testing.assert_close(model(x), F.linear(image.flatten(1), model.last.weight, model.last.bias))
    assert model.second.weight.abs().max() <= 1 / math.sqrt(27)


def test_token_batches_predict_the_next_token_and_reach_every_start():
    tokens = np.arange(12, dtype=np.uint8)
    starts = set()
    for inputs, targets in workloads.token_batches(tokens, steps=40, batch=4, context=8, generator=seeded()):
        assert inputs.shape == targets.shape == (4, 8)
        assert torch.equal(targets, inputs + 1)
        assert int(targets.max()) <= 11
        starts |= set(inputs[:, 0].tolist())
    assert starts == {0, 1, 2, 3}  # 160 draws miss one of four with probability below 1e-19


def test_token_windows_cover_the_text_once():
    tokens = np.arange(27, dtype=np.uint8)
    batches = list(workloads.token_windows(tokens, context=5, batch=2))
    assert [len(inputs) for inputs, _ in batches] == [2, 2, 1]
    assert torch.cat([inputs.flatten() for inputs, _ in batches]).tolist() == list(range(25))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    assert len(list(workloads.token_windows(tokens, context=5, batch=2, limit=3))) == 2


def test_sample_batches_keep_inputs_and_targets_together():
    inputs = torch.arange(6.0)[:, None]
    batches = list(workloads.sample_batches(inputs, torch.arange(6), steps=30, batch=4, generator=seeded()))
    assert len(batches) == 30
    assert all(torch.equal(x[:, 0], y.float()) for x, y in batches)
    assert set(torch.cat([y for _, y in batches]).tolist()) == set(range(6))


def digits_run(seed=0, steps=150, **options):
    inputs, targets = (torch.from_numpy(array) for array in data.digits())
    generator = seeded(seed)
    model = workloads.DigitsMLP(generator)
    batches = workloads.sample_batches(inputs.float(), targets, steps=steps, batch=32, generator=generator)
    losses = workloads.train(model, torch.optim.Adam(model.parameters(), lr=3e-3), batches, **options)
    return losses, workloads.evaluate(model, [(inputs.float(), targets)])


def test_training_on_the_digits_learns_them():
    losses, (loss, accuracy) = digits_run(rate=workloads.linear_decay(150))
    assert losses[0] == pytest.approx(math.log(10), abs=0.2)  # ten classes, small random logits
    assert loss < 0.5
    assert accuracy > 0.85  # chance is 0.1; linear models reach 0.95 when trained to the end


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    assert digits_run(seed=1, steps=20) == digits_run(seed=1, steps=20)
    assert digits_run(seed=1, steps=20) != digits_run(seed=2, steps=20)


def one_weight(gradient, lr=1.0, **options):
    """Train a single weight whose loss has the given constant gradient, for three steps of SGD."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batches = [(torch.full((1, 1), float(gradient)), torch.zeros(1))] * 3
    losses = workloads.train(model, optimizer, batches, loss=lambda m, b: m(b[0]).sum(), **options)
    return model.weight.item(), losses, optimizer


def test_train_applies_rate_to_the_learning_rate_at_entry():
    weight, losses, optimizer = one_weight(1.0, lr=0.5, rate=lambda step: [1.0, 0.5, 0.25][step])
    assert weight == pytest.approx(-0.875, rel=1e-6)
    assert losses == pytest.approx([0.0, -0.5, -0.75], rel=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_train_clips_the_gradient_norm():
    # torch divides by the norm plus 1e-6
    assert one_weight(4.0, clip_norm=1.0)[0] == pytest.approx(-3.0, rel=1e-5)
    assert one_weight(4.0)[0] == pytest.approx(-12.0, rel=1e-6)


def test_before_backward_sees_cleared_gradients_and_every_batch():
    model = nn.Linear(1, 1, bias=False)
    seen = []

    def note(batch):
        seen.append((batch[1].item(), model.weight.grad is None))

    batches = [(torch.ones(1, 1), torch.tensor([value])) for value in (1.0, 2.0)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    workloads.train(model, optimizer, batches, loss=lambda m, b: m(b[0]).sum(), before_backward=note)
    assert seen == [(1.0, True), (2.0, True)]


def test_evaluate_weighs_every_target_alike_and_restores_the_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    inputs, targets = torch.randn(5, 2, generator=seeded()), torch.tensor([0, 1, 0, 1, 1])
    whole = workloads.evaluate(model, [(inputs, targets)])
    parts = workloads.evaluate(model, [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])])
    # the same five float32 losses, summed in another order
    assert parts == pytest.approx(whole, rel=1e-6)
    assert model.training


def test_schedules_take_their_textbook_values():
    linear = workloads.linear_decay(4)
    assert [linear(step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = workloads.warmup_cosine(6, 2, floor=0.1)
    expected = [
        0.5,
        1.0,
        1.0,
        0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2,
        0.55,
        0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2,
    ]
    assert [cosine(step) for step in range(6)] == pytest.approx(expected, rel=1e-12)
    assert cosine(6) == cosine(60) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: workloads.GPTConfig(width=10, heads=4), "width must be a multiple of heads, got 10 and 4"),
        (lambda: workloads.GPTConfig(layers=0), "layers must be >= 1, got 0"),
        (
            lambda: workloads.ByteGPT(SMALL, seeded())(torch.zeros(1, 9, dtype=torch.int64)),
            "at most context = 8",
        ),
        (lambda: workloads.DigitsMLP(seeded(), widths=(64,)), r"widths must be .* got \(64,\)"),
        (lambda: workloads.DigitsCNN(seeded(), channels=(0, 3)), r"channels must be .* got \(0, 3\)"),
        (
            lambda: next(
                workloads.token_batches(
                    np.zeros(8, np.uint8), steps=1, batch=1, context=8, generator=seeded()
                )
            ),
            "tokens must be longer than context = 8, got 8",
        ),
        (
            lambda: next(workloads.token_windows(np.zeros(8, np.uint8), context=8)),
            "longer than context = 8, got 8",
        ),
        (
            lambda: next(
                workloads.sample_batches(torch.zeros(2), torch.zeros(3), steps=1, batch=1, generator=seeded())
            ),
            "equally many, >= 1, got 2 and 3",
        ),
        (lambda: workloads.evaluate(nn.Linear(1, 1), []), "at least one target, got none"),
        (lambda: workloads.linear_decay(0), "steps must be > warmup >= 0, got steps=0"),
        (lambda: workloads.warmup_cosine(5, 5), "steps must be > warmup >= 0, got steps=5 and warmup=5"),
        (lambda: workloads.warmup_cosine(5, 1, floor=2.0), r"floor must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
