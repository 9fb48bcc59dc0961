"""DTensor parameters in two processes: what ranks compute from their shards is what one process computes.

The truth is the same optimiser on whole tensors. Shapes with uneven and empty shards are among all cases: of
(1, 6) sharded by rows, the second of two ranks holds nothing.
"""

import pytest
import torch
from torch import nn

from mars_optim.torch import MARS, UpdateRule
from mars_optim.torch.directions import orthogonal_directions

SHAPES = ((5, 4), (1, 6), (6, 1), (3, 8), (2, 3, 3, 2), (5,))
MATRICES = tuple(shape for shape in SHAPES if len(shape) > 1)
STEPS = 4
# float64: sums over shards and over whole tensors round differently, in the last of 16 digits
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
# The limit of a call is for a busy machine; the work takes seconds.
PATIENCE = 240


def whole(seed, shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def as_whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


# ---- norms and orthogonal factors of shards


FACTORS = [
    ("shampoo", "newton_schulz", False, "auto"),
    ("m", "newton_schulz", False, "owner"),
    ("m", "newton_schulz", False, "gather"),
    ("shampoo", "svd", False, "gather"),
    ("shampoo", "newton", False, "owner"),
    ("m", "newton_schulz", True, "owner"),
    ("shampoo", "newton_schulz", True, "gather"),
]


def factor_rule(kind, solver, batched):
    return UpdateRule(kind=kind, lr=1.0, beta1=0.9, orthogonalizer=solver, batched=batched)


def reductions(rank, world_size):
    """Boxes, norms and orthogonal factors of every shape, from the parts of two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    from mars_optim.torch.distributed import sharded_directions
    from mars_optim.torch.shards import Layout, local_part, own_norm, squared_norms

    mesh = init_device_mesh("cpu", (world_size,))
    found = {}
    for name, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("copies", Replicate())):
        tensors = whole(0, MATRICES)
        split = [distribute_tensor(tensor, mesh, [placement]) for tensor in tensors]
        layouts = [Layout.of(d) for d in split]
        parts = [local_part(d, d) for d in split]
        found[name, "boxes"] = [
            torch.equal(tensor[layout.own_box()], part)
            for tensor, layout, part in zip(tensors, layouts, parts, strict=True)
        ]
        found[name, "norms"] = squared_norms(parts, layouts)
        stacks = squared_norms(parts, layouts, batched=True)
        found[name, "stack"] = own_norm(stacks[-1], layouts[-1], True)
        for kind, solver, batched, how in FACTORS:
            directions = sharded_directions(parts, layouts, factor_rule(kind, solver, batched), how)
            found[name, kind, solver, batched, how] = [
                DTensor.from_local(
                    part, mesh, [placement], run_check=False, shape=d.shape, stride=d.stride()
                ).full_tensor()
                for part, d in zip(directions, split, strict=True)
            ]
    return found


def test_norms_and_orthogonal_factors_of_shards_are_those_of_whole_matrices(run_distributed):
    tensors = whole(0, MATRICES)
    for rank, found in enumerate(run_distributed(reductions, 2, timeout=PATIENCE)):
        for name in ("rows", "columns", "copies"):
            assert all(found[name, "boxes"])
            norms = [norm.item() for norm in found[name, "norms"]]
            assert norms == pytest.approx([t.square().sum().item() for t in tensors], rel=1e-14)
            stack = torch.linalg.vector_norm(tensors[-1], dim=(-2, -1), keepdim=True)
            own = {"rows": (slice(rank, rank + 1),), "columns": (slice(None), slice(2 * rank, 2 * rank + 2))}
            torch.testing.assert_close(found[name, "stack"], stack[own.get(name, ())], **ROUNDING)
            for kind, solver, batched, how in FACTORS:
                torch.testing.assert_close(
                    found[name, kind, solver, batched, how],
                    orthogonal_directions(tensors, factor_rule(kind, solver, batched)),
                    **ROUNDING,
                    msg=lambda m, case=(rank, name, kind, solver, batched, how): f"{case}: {m}",
                )


def test_matrices_are_owned_so_that_no_rank_has_more_to_do_than_another():
    distributed = pytest.importorskip("mars_optim.torch.distributed")
    # m^2 n of sides m <= n, as views of two dimensions: 4, 64, 16, 36, 12, together 132
    shapes, costs = [(1, 4), (4, 4), (4, 2, 1), (2, 9), (3, 2)], [4, 64, 16, 36, 12]
    owners = distributed.owners_of(shapes, 2)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert sorted(load) == [64, 68]
    # a stack of four 2 x 9 matrices counts four times, 144, and leaves the rest, 16, to the other rank
    assert distributed.owners_of([(4, 2, 9), (2, 4)], 2, batched=True) == [0, 1]


# ---- steps on DTensors

OPTIONS = {
    **{f"{kind}": {"mars_type": kind} for kind in ("adamw", "lion", "shampoo", "m", "sgd")},
    **{
        f"{kind} exact": {"mars_type": kind, "is_approx": False}
        for kind in ("adamw", "lion", "shampoo", "m", "sgd")
    },
    "gathered": {"mars_type": "m", "distributed": "gather", "orthogonalize": "svd"},
    "owned by svd": {"mars_type": "shampoo", "distributed": "owner", "orthogonalize": "svd"},
    "cautious": {"cautious": True, "decay_mode": "cautious", "amsgrad": True},
    "cautious lion": {"mars_type": "lion", "cautious": True},
    "stacks": {"matrix_view": "batch"},
    "stacks of shampoo": {"mars_type": "shampoo", "matrix_view": "batch", "cautious": True},
    "global clip": {"clip_scope": "global", "clip": 3.0, "decay_mode": "l2"},
    "global clip of m": {"mars_type": "m", "clip_scope": "global", "matrix_view": "batch"},
    "no clip": {"mars_type": "shampoo", "clip": None, "memory_efficient": True},
    "second moment of g": {"second_moment": "grad", "optimize_1d": True, "maximize": True},
    "low precision": {"state_dtype": torch.bfloat16, "prev_grad_dtype": torch.bfloat16},
}


def options_of(name):
    common = {"lr": 0.02, "lr_1d": 0.01, "weight_decay": 0.1, "gamma": 0.1, "prev_grad_init": "zero"}
    return common | OPTIONS[name]


def stepped(tensors, optimizer_options, distribute, steps=STEPS):
    """MARS after a few steps on given gradients; `distribute` turns whole tensors into what is stepped."""
    dtype = tensors[0].dtype
    shapes = [tensor.shape for tensor in tensors]
    params = [nn.Parameter(tensor) for tensor in distribute(tensors)]
    optimizer = MARS(params, **optimizer_options)
    for step in range(steps):
        for param, grad in zip(params, distribute(whole(10 + step, shapes, dtype)), strict=True):
            param.grad = grad
        exact = not optimizer_options.get("is_approx", True)
        optimizer.step(prev_grads=distribute(whole(20 + step, shapes, dtype)) if exact else None)
    return optimizer, params


def alone(name, dtype=torch.float64):
    options = {key: value for key, value in options_of(name).items() if key != "distributed"}
    return [p.detach() for p in stepped(whole(0, dtype=dtype), options, lambda tensors: tensors)[1]]


def distributions(world_size):
    """Ways to spread the tensors of `SHAPES`: all by rows, all by columns, or each by one of many layouts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    flat = init_device_mesh("cpu", (world_size,))
    # HSDP on two ranks: two copies of one shard, and one copy of two shards
    copies = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("replicate", "shard"))
    shards = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("replicate", "shard"))
    mixed = [
        (flat, [Shard(0)]),
        (shards, [Replicate(), Shard(1)]),
        None,
        (copies, [Replicate(), Shard(0)]),
        (flat, [Shard(2)]),
        (shards, [Replicate(), Shard(0)]),
    ]

    def along(axis):
        return lambda tensors: [
            distribute_tensor(t, flat, [Shard(axis if t.ndim > axis else 0)]) for t in tensors
        ]

    def each_its_own(tensors):
        return [
            t.clone() if where is None else distribute_tensor(t, *where)
            for t, where in zip(tensors, mixed, strict=True)
        ]

    return {"rows": along(0), "columns": along(1), "mixed": each_its_own}


WHERE = ("rows", "columns", "mixed")
IN_FLOAT32 = ("adamw", "lion", "sgd exact", "shampoo", "m")
EVERY_STEP = [
    *((where, name) for where in WHERE for name in OPTIONS),
    *((where, name, "float32") for where in WHERE for name in IN_FLOAT32),
]
# every type with an empty shard, by rows (1, 6) and by columns (6, 1), and beside plain tensors and copies
TYPICAL_STEPS = [
    *(("rows", name) for name in ("adamw exact", "lion", "shampoo", "m", "sgd")),
    *(("columns", name) for name in ("adamw", "shampoo exact", "gathered")),
    *(
        ("mixed", name)
        for name in ("adamw exact", "lion exact", "owned by svd", "stacks", "global clip of m")
    ),
    ("mixed", "m", "float32"),
]


def steps_of(rank, world_size, cases):
    found, distribute = {}, distributions(world_size)
    for case in cases:
        where, name, *single = case
        dtype = torch.float32 if single else torch.float64
        optimizer, params = stepped(whole(0, dtype=dtype), options_of(name), distribute[where])
        found[case] = [as_whole(p) for p in params]
        for param in params:
            for value in optimizer.state[param].values():
                placements = getattr(value, "placements", None)
                assert value.ndim == 0 or placements == getattr(param, "placements", None)
    return found


@pytest.mark.parametrize(
    "cases", [TYPICAL_STEPS, pytest.param(EVERY_STEP, marks=pytest.mark.slow)], ids=["typical", "every"]
)
def test_steps_on_shards_equal_those_on_whole_tensors(run_distributed, cases):
    found, other = run_distributed(steps_of, 2, cases, timeout=PATIENCE)
    assert found.keys() == set(cases)
    for case, params in found.items():
        _, name, *single = case
        expected = alone(name, torch.float32 if single else torch.float64)
        assert not any(
            torch.equal(e, t) for e, t in zip(expected, whole(0, dtype=expected[0].dtype), strict=True)
        )
        for param, same, truth in zip(params, other[case], expected, strict=True):
            # every rank holds the same; plain parameters too, though each rank steps its own copy
            torch.testing.assert_close(param, same, rtol=0, atol=0)
            # float32: the steps are of size 0.02, known to 24 bits, through sums in another order
            limits = {"rtol": 1e-6, "atol": 1e-6} if single else ROUNDING
            torch.testing.assert_close(param, truth, **limits, msg=lambda m, case=case: f"{case}: {m}")


COUNTED = ("adamw", "shampoo", "gathered", "no clip", "blockwise")


def steps_along_misplaced_gradients(rank, world_size):
    """Parameters sharded by rows whose gradients come whole, as partial sums, or sharded by columns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))

    def misplaced(tensor, index):
        if index % 3 == 0:
            return distribute_tensor(tensor, mesh, [Replicate()])
        if index % 3 == 1:
            return distribute_tensor(tensor, mesh, [Shard(1)])
        return DTensor.from_local(tensor / world_size, mesh, [Partial()])

    found = {}
    for name in ("adamw exact", "shampoo", "global clip"):
        params = [nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in whole(0)]
        optimizer = MARS(params, **options_of(name))
        optimizer.stats()
        for step in range(STEPS):
            for index, (param, grad) in enumerate(zip(params, whole(10 + step), strict=True)):
                param.grad = misplaced(grad, index)
            h = [distribute_tensor(t, mesh, [Shard(0)]) for t in whole(20 + step)]
            optimizer.step(prev_grads=h if name == "adamw exact" else None)
        found[name] = [as_whole(p) for p in params]
        assert optimizer.stats()["correction_ratio"] > 0
    return found


def test_gradients_may_be_placed_otherwise_than_their_parameters(run_distributed):
    found, _ = run_distributed(steps_along_misplaced_gradients, 2, timeout=PATIENCE)
    for name, params in found.items():
        torch.testing.assert_close(params, alone(name), **ROUNDING)


def communication(rank, world_size):
    """How often each collective runs in one step."""
    from torch.distributed.tensor.debug import CommDebugMode

    counts = {}
    for where, distribute in distributions(world_size).items():
        for name in COUNTED:
            options = options_of("m") | {"distributed": name} if name == "blockwise" else options_of(name)
            optimizer, _ = stepped(whole(0), options, distribute, steps=1)
            if rank == 0:
                optimizer.stats()  # measured from now on, and must not wait for the other rank
            with CommDebugMode() as mode:
                optimizer.step()
            called = {str(operation): count for operation, count in mode.get_comm_counts().items()}
            counts[where, name] = {
                kind: sum(count for operation, count in called.items() if kind in operation.replace("_", ""))
                for kind in ("allreduce", "alltoall", "allgather")
            }
            assert sum(called.values()) == sum(counts[where, name].values())
    return counts


def test_a_step_needs_one_all_reduce_of_all_norms_per_mesh(run_distributed):
    counts, _ = run_distributed(communication, 2, timeout=PATIENCE)
    for where, meshes in (("rows", 1), ("columns", 1), ("mixed", 2)):
        found = {name: tuple(counts[where, name].values()) for name in COUNTED}
        # (all-reduces, all-to-alls, all-gathers); one more all-reduce is for the momenta (1, 6) and (6, 1)
        assert found["adamw"] == (meshes, 0, 0)
        assert found["shampoo"] == (meshes + 1, 2, 0)
        assert found["no clip"] == (1, 2, 0)
        assert found["blockwise"] == (meshes, 0, 0)
        # all other matrices, of which "mixed" shards two
        assert found["gathered"] == (meshes + 1, 0, 2 if where == "mixed" else 3)


def blockwise_step(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    distribute = lambda tensors: [distribute_tensor(t, mesh, [Shard(0)]) for t in tensors]  # noqa: E731
    options = {"mars_type": "m", "clip": None, "distributed": "blockwise", "gamma": 0.0}
    return [as_whole(p) for p in stepped(whole(0), options, distribute)[1]]


def test_blockwise_takes_every_shard_for_a_matrix_of_its_own(run_distributed):
    found, _ = run_distributed(blockwise_step, 2, timeout=PATIENCE)
    for tensor, index in ((found[0], 0), (found[3], 3)):

        def shard(rank, index=index):
            return lambda tensors: [tensors[index].chunk(2)[rank]]

        options = {"mars_type": "m", "clip": None, "gamma": 0.0}
        apart = [stepped(whole(0), options, shard(rank))[1][0].detach() for rank in (0, 1)]
        torch.testing.assert_close(tensor, torch.cat(apart), **ROUNDING)


def spread_over_four(mesh):
    """Layouts on two mesh dimensions, one of them the interleaved shards of FSDP2 over tensor parallelism."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placements = [
        [Shard(0), Shard(1)],
        [Replicate(), Shard(1)],
        [Shard(0), Replicate()],
        [Shard(1), Shard(1)],
        [Shard(2), Shard(0)],
    ]

    def interleaved(tensor):
        linear = nn.Linear(*reversed(tensor.shape), bias=False)
        linear.weight = nn.Parameter(distribute_tensor(tensor, mesh["tp"], [Shard(0)]))
        fully_shard(linear, mesh=mesh["dp"])
        return linear.weight.detach()

    def distribute(tensors):
        regular = [
            distribute_tensor(t, mesh, where) for t, where in zip(tensors[:-1], placements, strict=True)
        ]
        return [*regular, interleaved(tensors[-1])]

    return distribute


def steps_on_four(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = {}
    for name in ON_FOUR:
        found[name] = [
            as_whole(p) for p in stepped(whole(0, FOUR_SHAPES), options_of(name), spread_over_four(mesh))[1]
        ]
    return found


ON_FOUR = ("adamw", "shampoo", "gathered", "cautious")
FOUR_SHAPES = (*MATRICES, (8, 3))


@pytest.mark.slow  # four processes
def test_steps_on_meshes_of_two_dimensions_equal_those_on_whole_tensors(run_distributed):
    for found in run_distributed(steps_on_four, 4, timeout=PATIENCE):
        for name in ON_FOUR:
            options = {key: value for key, value in options_of(name).items() if key != "distributed"}
            _, expected = stepped(whole(0, FOUR_SHAPES), options, lambda tensors: tensors)
            for param, truth in zip(found[name], expected, strict=True):
                torch.testing.assert_close(
                    param, truth.detach(), **ROUNDING, msg=lambda m, n=name: f"{n}: {m}"
                )


# ---- what is refused


def refusals(rank, world_size):
    """Messages of the errors, and whether anything had changed by then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    rows = [Shard(0)]

    def refused(param, state=None, prev_grads=None):
        param = nn.Parameter(param)
        param.grad = torch.ones_like(param)
        optimizer = MARS([param], is_approx=prev_grads is None)
        before = param.detach().to_local().clone()
        optimizer.state[param] = dict(state or {})
        with pytest.raises(ValueError) as caught:
            optimizer.step(prev_grads=prev_grads)
        return str(caught.value), torch.equal(
            param.detach().to_local(), before
        ) and "step" not in optimizer.state[param]

    matrix = torch.ones(4, 3)
    return {
        "real": refused(distribute_tensor(matrix + 0j, mesh, rows)),
        "replicated": refused(DTensor.from_local(matrix, mesh, [Partial()])),
        "placements": refused(distribute_tensor(matrix, mesh, rows), prev_grads=[matrix]),
        "placed": refused(distribute_tensor(matrix, mesh, rows), state={"exp_avg": torch.zeros(4, 3)}),
    }


def test_what_cannot_be_stepped_on_shards_is_refused_before_anything_changes(run_distributed):
    (found,) = run_distributed(refusals, 1, timeout=PATIENCE)
    words = {
        "real": "a DTensor parameter must be real, got dtype torch.complex64",
        "replicated": "a parameter must be replicated or sharded, got placements (Partial(sum),)",
        "placements": "prev_grads for parameter #0 must have placements (Shard(dim=0),), got None",
        "placed": "the state 'exp_avg' must be placed like its parameter, "
        "(Shard(dim=0),), got a plain tensor",
    }
    for case, (message, unchanged) in found.items():
        assert message == words[case]
        assert unchanged


def test_an_unknown_way_to_distribute_is_refused():
    with pytest.raises(ValueError, match=r"distributed must be one of 'auto', .*, got 'ring'"):
        MARS([nn.Parameter(torch.ones(2, 2))], distributed="ring")
