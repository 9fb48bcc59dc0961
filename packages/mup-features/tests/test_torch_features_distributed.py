"""Two gloo processes end with the snapshot of one: sharded samples, sharded features, DTensors."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mup_features.metrics import compare
from mup_features.torch.features import FeatureRecorder

D, n, N = 4, 24, 7


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, n), nn.Tanh(), nn.Linear(n, n), nn.Tanh(), nn.Linear(n, 2)).double()


def inputs():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def parts(snapshot):
    """All numbers of a snapshot."""
    found = {"keys": snapshot.sample_keys}
    for name, layer in snapshot.layers.items():
        found |= {f"{name}:{part}": value for part, value in vars(layer).items() if value is not None}
    return found


def record(model, batches, **options):
    init = build(7)
    kept = FeatureRecorder(model, bounds=(-1.0, 1.0), **options).snapshot(batches, "t")
    light = FeatureRecorder(model, keep_features=False, passes=2, **options)
    before = FeatureRecorder(init, **options).snapshot(batches, "init")
    by_model, by_snapshot = (light.snapshot(batches, "t", reference) for reference in (init, before))
    return [parts(kept), parts(by_model), parts(by_snapshot)]


def of_samples(rank, world_size, replicated):
    # Uneven shards: rank 0 has batches of 3 and 2 samples, rank 1 one of 2.
    own = [inputs()[:3], inputs()[3:5]] if rank == 0 else [inputs()[5:]]
    if replicated:
        return [parts(FeatureRecorder(DistributedDataParallel(build())).snapshot(own, "t"))]
    return record(build(), own, shard="samples")


def of_parameters(rank, world_size):
    """FSDP2: forward passes communicate, so both ranks have one batch, of 5 and 2 samples."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build()
    mesh = init_device_mesh("cpu", (world_size,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    own = inputs()[:5] if rank == 0 else inputs()[5:]
    return [parts(FeatureRecorder(model).snapshot([own], "t"))]


def of_features(rank, world_size):
    """A tensor parallel MLP: the first layer holds a shard of its outputs, uneven ones."""
    whole, own = build(), slice(0, 9) if rank == 0 else slice(9, n)

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(D, own.stop - own.start).double()
            self.fc.weight.data, self.fc.bias.data = whole[0].weight[own], whole[0].bias[own]

        def forward(self, x):
            return torch.tanh(self.fc(x))

    options = {"layers": ["fc"], "when": "pre", "shard": "features"}
    model = Parallel()
    before = FeatureRecorder(model, **options).snapshot([inputs()], "t")
    with torch.no_grad():
        model.fc.bias += 1
    light = FeatureRecorder(model, keep_features=False, passes=2, **options)
    after = light.snapshot([inputs()], "t", before)
    report = compare(before, after)
    return [parts(before), parts(after), report.measures["fc.output"]]


def of_dtensors(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world_size,))
    colwise = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    model = parallelize_module(build()[:2], mesh, {"0": colwise})
    snapshot = FeatureRecorder(model, ["0"], "both").snapshot([inputs()], "t")
    assert Replicate() not in model[0](inputs()).placements
    return [parts(snapshot)]


def assert_ranks_agree_and_equal(ranks, expected):
    for found in zip(*ranks, strict=True):
        for name, value in found[0].items():
            assert np.array_equal(value, found[1][name]), name
    for found, single in zip(ranks[0], expected, strict=True):
        assert set(found) == set(single)
        for name, value in single.items():
            # float64 sums in another order.
            assert np.asarray(found[name]) == pytest.approx(np.asarray(value), rel=1e-11, abs=1e-11), name


def test_ranks_with_uneven_samples_end_with_the_snapshot_of_all(run_distributed):
    expected = record(build(), [inputs()], shard=None)
    assert_ranks_agree_and_equal(run_distributed(of_samples, 2, False), expected)


def test_replicated_models_shard_their_samples_without_being_asked(run_distributed):
    expected = [parts(FeatureRecorder(build()).snapshot([inputs()], "t"))]
    assert_ranks_agree_and_equal(run_distributed(of_samples, 2, True), expected)


def test_fully_sharded_models_shard_their_samples_without_being_asked(run_distributed):
    expected = [parts(FeatureRecorder(build()).snapshot([inputs()], "t"))]
    assert_ranks_agree_and_equal(run_distributed(of_parameters, 2), expected)


def test_ranks_with_uneven_features_end_with_the_snapshot_of_all(run_distributed):
    ranks = run_distributed(of_features, 2)
    model = build()
    options = {"layers": ["0"], "when": "pre"}
    before = FeatureRecorder(model, **options).snapshot([inputs()], "t")
    with torch.no_grad():
        model[0].bias += 1
    after = FeatureRecorder(model, keep_features=False, **options).snapshot([inputs()], "t", before)
    rename = lambda found: {name.replace("0.output", "fc.output"): v for name, v in found.items()}  # noqa: E731
    expected = [rename(parts(before)), rename(parts(after)), compare(before, after).measures["0.output"]]
    assert_ranks_agree_and_equal(ranks, expected)
    assert ranks[0][2]["absolute_change"] == pytest.approx(1, rel=1e-12)


def test_outputs_that_are_dtensors_are_gathered(run_distributed):
    model = build()[:2]
    expected = FeatureRecorder(model, ["0"], "pre").snapshot([inputs()], "t")
    found = run_distributed(of_dtensors, 2)
    assert np.array_equal(found[0][0]["0.output:gram"], found[1][0]["0.output:gram"])
    assert found[0][0]["0.output:gram"] == pytest.approx(expected.layers["0.output"].gram, rel=1e-12)
