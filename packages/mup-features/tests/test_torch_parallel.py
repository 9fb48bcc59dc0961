"""Two gloo processes train as one: DDP, and fully_shard before and after apply_mup."""

import warnings

import pytest
import torch
from models import MLP, Transformer, build, on_meta
from torch import nn

from mup_features import apply_mup, infer_roles, param_groups

STEPS, BATCH = 5, 8


def data(kind, step):
    generator = torch.Generator().manual_seed(100 + step)
    if kind is Transformer:
        return (
            torch.randint(0, 32, (BATCH, 16), generator=generator),
            torch.randint(0, 32, (BATCH, 16), generator=generator),
        )
    return (
        torch.randn(BATCH, 8, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (BATCH,), generator=generator),
    )


def train(model, kind, roles, rank, world_size, form):
    """Losses of the ranks' own halves of each batch."""
    optimizer = torch.optim.AdamW(param_groups(model, roles, 0.01, 0.1, form=form))
    losses = []
    for step in range(STEPS):
        inputs, target = (x.chunk(world_size)[rank] for x in data(kind, step))
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh(kind, form, base="real"):
    model = build(kind, 64)
    of_base = build(kind, 16, 1) if base == "real" else on_meta(kind, 16)
    return model, infer_roles(model, of_base), {"form": form}


def single(kind, form):
    model, roles, options = fresh(kind, form)
    apply_mup(model, roles, **options)
    losses = train(model, kind, roles, 0, 1, form)
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings():
        # torch says of gloo that its all-gather copies
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (2,))
        for block in getattr(model, "blocks", []):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def parallel(rank, world_size, kind, form, order):
    """Losses, full parameters, and what apply_mup found on shards."""
    model, roles, options = fresh(kind, form)
    if order == "ddp":
        apply_mup(model, roles, **options)
        model = nn.parallel.DistributedDataParallel(model)
    elif order == "mup, shard":
        apply_mup(model, roles, **options)
        shard(model)
    else:
        shard(model)
        assert infer_roles(model, build(kind, 16, 1)) == roles
        if order == "shard, mup from meta":
            roles = infer_roles(model, on_meta(kind, 16))
        apply_mup(model, roles, **options)
        before = [parameter.full_tensor().clone() for parameter in model.parameters()]
        apply_mup(model, roles, **options)
        after = [parameter.full_tensor() for parameter in model.parameters()]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    losses = train(model, kind, roles, rank, world_size, form)
    inner = model.module if order == "ddp" else model
    full = {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        for name, p in inner.named_parameters()
    }
    return losses, full, "mup_form" in inner.state_dict()


def compare(run_distributed, kind, form, order):
    losses, parameters = single(kind, form)
    ranks = run_distributed(parallel, 2, kind, form, order)
    for step in range(STEPS):
        # the mean over two halves in another order of float64 sums; AdamW divides by small roots
        assert abs(sum(rank[0][step] for rank in ranks) / 2 - losses[step]) < 1e-9
    for _, full, marked in ranks:
        assert marked
        for name, parameter in parameters.items():
            assert torch.allclose(full[name], parameter, rtol=0, atol=1e-7), name


@pytest.mark.slow
def test_two_ddp_processes_train_as_one(run_distributed):
    compare(run_distributed, MLP, "mult", "ddp")


def test_scaled_before_sharding_two_processes_train_as_one(run_distributed):
    compare(run_distributed, Transformer, "symmetric", "mup, shard")


def test_scaled_after_sharding_two_processes_train_as_one(run_distributed):
    compare(run_distributed, Transformer, "symmetric", "shard, mup")


def test_the_default_initialisation_is_recognised_on_shards(run_distributed):
    compare(run_distributed, MLP, "pure", "shard, mup from meta")
