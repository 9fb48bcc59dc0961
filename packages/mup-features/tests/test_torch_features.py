"""The recorder: what it captures from real modules, every way to record it, and that it leaves no trace."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mup_features import metrics
from mup_features.metrics import compare
from mup_features.torch.features import FeatureRecorder

N, D, n = 6, 4, 32


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 2))


@pytest.fixture
def X():  # noqa: N802
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


def by_hand(model, X):
    """Outputs of all modules of a Sequential, by name."""
    found = {}
    for name, module in model.named_children():
        X = module(X)
        found[name] = X.detach().double().numpy()
    return found


def close(first, second, rtol=1e-9):
    """Two snapshots whose Grams agree."""
    assert list(first.layers) == list(second.layers)
    for name, layer in first.layers.items():
        assert second.layers[name].gram == pytest.approx(layer.gram, rel=rtol, abs=rtol)


def moved(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return other


def test_auto_takes_inputs_of_weight_layers_as_post_and_outputs_as_pre_activations(model, X):
    outputs = by_hand(model, X)
    post = FeatureRecorder(model).snapshot([X], "init")
    pre = FeatureRecorder(model, when="pre").snapshot([X], "init")
    both = FeatureRecorder(model, when="both").snapshot([X], "init")
    assert list(post.layers) == ["2.input", "4.input"] and list(pre.layers) == ["0.output", "2.output"]
    assert list(both.layers) == ["0.output", "2.input", "2.output", "4.input"]
    for key, source in [("0.output", "0"), ("2.input", "1"), ("2.output", "2"), ("4.input", "3")]:
        # The float32 features are the same bits; only the order of the float64 sum differs.
        assert both.layers[key].gram == pytest.approx(metrics.gram(outputs[source]), rel=1e-13, abs=1e-13)
        assert np.array_equal(both.layers[key].features, outputs[source])


def test_patterns_take_other_modules_by_what_goes_in_and_comes_out(model, X):
    outputs = by_hand(model, X)
    found = FeatureRecorder(model, layers=["1", "3*"], when="both").snapshot([X], "t")
    assert list(found.layers) == ["1.input", "1.output", "3.input", "3.output"]
    assert np.array_equal(found.layers["1.input"].features, outputs["0"])
    assert np.array_equal(found.layers["3.output"].features, outputs["3"])
    readout = FeatureRecorder(model, layers="4", when="pre").snapshot([X], "t")
    assert np.array_equal(readout.layers["4.output"].features, outputs["4"])


@pytest.mark.parametrize("batches", [[6], [4, 2], [1, 2, 3]])
@pytest.mark.parametrize("passes", [1, 3, 40])
def test_batches_and_passes_change_nothing_but_memory(model, X, batches, passes):
    whole = FeatureRecorder(model).snapshot(X, "t")
    split = FeatureRecorder(model, passes=passes).snapshot(list(X.split(batches)), "t")
    # A GEMM may round a row differently for another batch size.
    close(whole, split, rtol=1e-6)
    assert split.layers["4.input"].features.shape == (N, n)


def test_in_place_activations_do_not_reach_recorded_preactivations(X):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, n), nn.ReLU(inplace=True), nn.Linear(n, 1))
    found = FeatureRecorder(model, layers=["0", "1"], when="both").snapshot([X], "t")
    h = model[0](X).detach().numpy()
    assert np.array_equal(found.layers["0.output"].features, h)
    assert np.array_equal(found.layers["1.input"].features, h)
    assert np.array_equal(found.layers["1.output"].features, np.maximum(h, 0))
    assert found.layers["1.output"].dead == np.mean((h <= 0).all(0)) > 0


@pytest.mark.parametrize("kind", ["snapshot", "model"])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_reference_makes_light_snapshots_comparable(model, X, kind, passes):
    later = moved(model)
    batches = list(X.split([4, 2]))
    kept = compare(*(FeatureRecorder(m).snapshot(batches, "t") for m in (model, later)))
    before = FeatureRecorder(model).snapshot(batches, "init")
    recorder = FeatureRecorder(later, keep_features=False, passes=passes)
    after = recorder.snapshot(batches, "end", before if kind == "snapshot" else model)
    assert all(layer.features is None for layer in after.layers.values())
    light = FeatureRecorder(model, keep_features=False).snapshot(batches, "init")
    report = compare(light, after)
    for name, expected in kept.measures.items():
        for measure in ("change", "absolute_change", "joint_lambda_min", "cka"):
            assert report.measures[name][measure] == pytest.approx(expected[measure], rel=1e-7, abs=1e-9)


def test_modes_gradients_and_hooks_are_as_before(model, X):
    model.append(nn.Dropout(0.9)).append(nn.Linear(2, 1))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with FeatureRecorder(model, when="both") as recorder:
        first = recorder.snapshot([X], "t")
        assert [module.training for module in model.modules()] == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        close(first, recorder.snapshot([X], "t"), rtol=0)
        model(X).sum().backward()
        assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="has ended"):
        recorder.snapshot([X], "t")


def test_a_failing_forward_pass_leaves_no_hook_and_no_mode(model, X):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        FeatureRecorder(model).snapshot([X[:, :3]], "t")
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_compiled_models_are_recorded_eagerly_with_a_warning(model, X):
    plain = FeatureRecorder(model, when="both").snapshot([X], "t")
    compiled = torch.compile(model, backend="eager")
    expected = compiled(X)
    with pytest.warns(UserWarning, match="the model is compiled"):
        found = FeatureRecorder(compiled, when="both").snapshot([X], "t")
    close(plain, found, rtol=0)
    model[2].compile(backend="eager")
    with pytest.warns(UserWarning, match="the model is compiled"):
        close(plain, FeatureRecorder(model, when="both").snapshot([X], "t"), rtol=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(X), expected)


def test_transformer_layers_are_seen_through_their_fused_path_and_shared_inputs_once():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = torch.randn(3, 5, 8)
    snapshot = FeatureRecorder(nn.Sequential(layer, nn.Linear(8, 2)), when="both").snapshot([tokens], "t")
    for key in ("0.linear1.input", "0.linear1.output", "0.linear2.input", "1.input"):
        assert key in snapshot.layers
    assert torch.backends.mha.get_fastpath_enabled()

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.q, self.k = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, ids):
            x = self.embed(ids)
            return self.q(x) @ self.k(x).transpose(1, 2)

    found = FeatureRecorder(Heads(), when="both").snapshot([torch.randint(0, 7, (3, 5))], "t")
    assert list(found.layers) == ["embed.output", "q.input", "q.output"]


def test_extra_axes_are_flattened_averaged_or_made_samples():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 25, 2))
    images = torch.randn(2, 3, 5, 5)
    maps = conv[0](images).detach().numpy()
    record = lambda reduce: (  # noqa: E731
        FeatureRecorder(conv, "0", "pre", reduce=reduce).snapshot([images], "t").layers["0.output"].features
    )
    assert np.array_equal(record("flatten"), maps.reshape(2, -1))
    assert record("mean") == pytest.approx(maps.mean((2, 3)), rel=1e-5, abs=1e-7)
    assert np.array_equal(record("tokens"), maps.transpose(0, 2, 3, 1).reshape(-1, 4))
    assert np.array_equal(record(lambda t: t[:, :, 0, 0]), maps[:, :, 0, 0])
    linear = nn.Linear(3, 6)
    tokens = torch.randn(2, 5, 3)
    found = FeatureRecorder(linear, "", "pre", reduce="mean").snapshot([tokens], "t").layers
    assert found[".output"].features == pytest.approx(linear(tokens).mean(1).detach().numpy(), abs=1e-6)


def test_a_shared_module_has_one_entry_for_each_call(X):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.out = nn.Linear(D, D), nn.Linear(D, 1)

        def forward(self, x):
            return self.out(torch.tanh(self.fc(torch.tanh(self.fc(x)))))

    found = FeatureRecorder(Twice(), when="both").snapshot([X], "t")
    assert list(found.layers) == ["fc.output", "fc.input#2", "fc.output#2", "out.input"]


def test_a_sketch_keeps_inner_products_and_is_the_same_for_any_batches(X):
    wide = nn.Sequential(nn.Linear(D, 4_000), nn.Tanh(), nn.Linear(4_000, 1))
    exact = FeatureRecorder(wide).snapshot([X], "t").layers["2.input"]
    record = lambda batches, seed: (  # noqa: E731
        FeatureRecorder(wide, max_features=1000, seed=seed).snapshot(batches, "t").layers["2.input"]
    )
    found, again, other = record([X], 0), record(list(X.split(2)), 0), record([X], 1)
    assert (found.width, found.sketch, found.features.shape) == (4_000, 1000, (N, 1000))
    assert again.gram == pytest.approx(found.gram, rel=1e-5, abs=1e-5)
    scale = np.sqrt(np.outer(np.diag(exact.gram), np.diag(exact.gram)))
    # Errors have sd sqrt((1 + cos^2) / 1000) <= 0.045 of the norms; 5 sd for 21 entries.
    for sketch in (found, other):
        assert np.abs(sketch.gram - exact.gram).max() < 0.22 * scale.max()
    assert np.abs(other.gram - found.gram).max() > 1e-4


def test_sketches_of_different_seeds_are_not_compared(X):
    wide = nn.Sequential(nn.Linear(D, 64), nn.Tanh(), nn.Linear(64, 1))
    first = FeatureRecorder(wide, max_features=8).snapshot([X], "first")
    other = FeatureRecorder(wide, max_features=8, seed=1)
    with pytest.raises(
        ValueError, match=r"one \(width, sketch\) .*\(8, 'torch', 0\)\) and .* 'torch', 1\)\)"
    ):
        compare(first, other.snapshot([X], "other"))
    with pytest.raises(ValueError, match=r"must have .* \(64, \(8, 'torch', 1\)\), got \(64, .* 0\)\)"):
        other.snapshot([X], "other", reference=first)
    wider = nn.Sequential(nn.Linear(D, 96), nn.Tanh(), nn.Linear(96, 1))
    with pytest.raises(ValueError, match="must have 64 features as the model, got 96"):
        other.snapshot([X], "other", reference=wider)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_grams_are_sums_of_exact_products_in_every_precision(dtype, X):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, n), nn.Tanh(), nn.Linear(n, 1)).to(dtype)
    layer = FeatureRecorder(model).snapshot([X.to(dtype)], "t").layers["2.input"]
    x = torch.tanh(model[0](X.to(dtype))).detach().double().numpy()
    assert layer.gram == pytest.approx(x @ x.T / n, rel=1e-13, abs=1e-14)
    assert layer.gram.dtype == np.float64


def test_batches_may_be_pairs_mappings_or_anything_with_a_forward(model, X):
    expected = FeatureRecorder(model).snapshot([X], "t")
    y = torch.zeros(N)
    close(expected, FeatureRecorder(model).snapshot([(X, y)], "t"), rtol=0)
    close(expected, FeatureRecorder(model).snapshot([{"input": X}], "t"), rtol=0)
    own = FeatureRecorder(model, forward=lambda m, batch: m(batch["x"]))
    close(expected, own.snapshot([{"y": y, "x": X}], "t"), rtol=0)


def test_saturated_entries_are_counted(model, X):
    found = FeatureRecorder(model, bounds=(-1.0, 1.0)).snapshot([100 * X], "t").layers["2.input"]
    x = by_hand(model, 100 * X)["1"]
    assert found.saturated == np.mean(np.abs(x) >= 0.98) > 0.5


def test_shuffled_samples_are_noticed(model, X):
    first = FeatureRecorder(model).snapshot([X], "init")
    with pytest.raises(ValueError, match="the inputs differ"):
        compare(first, FeatureRecorder(model).snapshot([X.flip(0)], "end"))
    sources = iter([[X], [X.flip(0)]])

    class Shuffling:
        def __iter__(self):
            return iter(next(sources))

    loader = Shuffling()
    with pytest.raises(ValueError, match="same samples in each pass"):
        FeatureRecorder(model, passes=2).snapshot(_Twice(loader), "t")


class _Twice:
    """A loader whose first iter() is only the recorder's look whether it can be repeated."""

    def __init__(self, loader):
        self.loader, self.asked = loader, False

    def __iter__(self):
        if not self.asked:
            self.asked = True
            return iter(())
        return iter(self.loader)


def test_bad_input_is_refused_by_name(model, X):
    for options, message in [
        ({"when": "after"}, "when must be .*, got 'after'"),
        ({"layers": "fc*"}, r"'fc\*' matches none"),
        ({"reduce": "max"}, "reduce must be .*, got 'max'"),
        ({"max_features": 0}, "max_features must be >= 1 or None, got 0"),
        ({"passes": 0}, "passes must be >= 1, got 0"),
        ({"bounds": (1, -1)}, r"bounds must be .*, got \(1, -1\)"),
        ({"shard": "rows"}, "shard must be .*, got 'rows'"),
        ({"shard": "samples"}, "needs an initialised torch.distributed process group"),
    ]:
        with pytest.raises(ValueError, match=message):
            FeatureRecorder(model, **options)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
        FeatureRecorder(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a module with a weight"):
        FeatureRecorder(nn.Tanh())
    recorder = FeatureRecorder(model)
    for batches, message in [([], "at least one batch"), ([X * torch.nan], "'2.input' must be finite")]:
        with pytest.raises(ValueError, match=message):
            recorder.snapshot(batches, "t")
    with pytest.raises(ValueError, match="iterable 2 times"):
        FeatureRecorder(model, passes=2).snapshot(iter([X]), "t")
    small = FeatureRecorder(model).snapshot([X[:4]], "small")
    with pytest.raises(ValueError, match=r"reference of layer '2.input' must have shape \(6, 32\), got \(4"):
        recorder.snapshot([X], "t", small)
    with pytest.raises(ValueError, match="one number of features in all batches, got 12 and 20"):
        FeatureRecorder(nn.Linear(3, 4), "", "pre").snapshot([torch.ones(1, 3, 3), torch.ones(1, 5, 3)], "t")
    with pytest.raises(ValueError, match="reduce must return a tensor"):
        FeatureRecorder(model, reduce=lambda t: t.sum()).snapshot([X], "t")
    with pytest.raises(ValueError, match="of '6' none is"):
        unused = nn.ModuleList([nn.Linear(1, 1)])
        holder = nn.Sequential(*model)
        holder.register_module("6", unused)
        FeatureRecorder(holder, "6", forward=lambda _, x: model(x)).snapshot([X], "t")
