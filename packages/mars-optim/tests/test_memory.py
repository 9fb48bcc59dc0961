"""Bytes of state per parameter, on live state after several steps, and the temporaries of a step by lists.

Counted is the memory behind every state tensor that has an entry per element of the parameter; step counters
are left out. Expected numbers are 4 bytes times the buffers of the spec's section e.
"""

import weakref

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from mars_optim.torch import MARS  # noqa: E402

TYPES = ("mars-adamw", "mars-lion", "mars-shampoo", "mars-m", "mars-sgd")
LINEAR = TYPES[1:]
BF16 = torch.bfloat16
BACKENDS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}

APPROXIMATE = [
    ({"mars_type": "mars-adamw"}, 12),  # m, v, h
    *(({"mars_type": kind}, 8) for kind in LINEAR),  # m, h
    *(({"mars_type": kind, "clip": None, "memory_efficient": True}, 4) for kind in LINEAR),  # e
    ({"amsgrad": True}, 16),
    ({"prev_grad_dtype": BF16}, 10),
    ({"mars_type": "mars-lion", "prev_grad_dtype": BF16}, 6),
    ({"state_dtype": BF16}, 8),
    ({"steal_grad": True}, 12),
    ({"dtype": BF16}, 10),  # m and v in float32, h as the gradient
    ({"dtype": BF16, "mars_type": "mars-lion"}, 6),
    ({"dtype": BF16, "mars_type": "mars-lion", "clip": None, "memory_efficient": True}, 4),
    ({"dtype": torch.float64}, 24),
]


def parameters(shapes=((24, 16), (16, 40)), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def bytes_per_parameter(optimizer):
    """Memory of the per-element state over the number of parameters; nothing else may be large."""
    memory, count = {}, 0
    for param, state in optimizer.state.items():
        count += param.numel()
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim > 0:
                assert value.shape == param.shape, f"{name} has shape {tuple(value.shape)}"
                storage = value.untyped_storage()
                memory[storage.data_ptr()] = storage.nbytes()
    return sum(memory.values()) / count


def after_steps(options, steps=4, shapes=((24, 16), (16, 40))):
    options = dict(options)
    params = parameters(shapes, options.pop("dtype", torch.float32))
    optimizer = MARS(params, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("options", "expected"), APPROXIMATE, ids=str)
@pytest.mark.filterwarnings("ignore:fused")  # without kernels fused falls back to lists, whose state counts
def test_the_approximate_form_keeps_the_bytes_of_the_spec(options, expected, backend):
    _, optimizer = after_steps({**options, **BACKENDS[backend]})
    assert bytes_per_parameter(optimizer) == expected


def test_state_does_not_grow_with_the_number_of_steps():
    sizes = {bytes_per_parameter(after_steps({}, steps)[1]) for steps in (1, 2, 7)}
    assert sizes == {12}


@pytest.mark.parametrize(("optimize_1d", "expected"), [(False, 8), (True, 12)])
def test_vectors_keep_a_previous_gradient_only_under_mars(optimize_1d, expected):
    _, optimizer = after_steps({"optimize_1d": optimize_1d}, shapes=((30,), (7,)))
    assert bytes_per_parameter(optimizer) == expected


def test_stealing_leaves_no_gradient_beside_the_state():
    params, optimizer = after_steps({"steal_grad": True})
    assert bytes_per_parameter(optimizer) == 12
    assert all(param.grad is None for param in params)


# ------------------------------------------------------------------------------------------ the exact form
#
# The least state is that of way 4, where the caller holds h_t: m and v, or m alone. Ways 1 and 2 add to it
# the previous parameters, 4 bytes; the h_t of their extra pass lives from that pass to the step only. Way 3
# adds the h_t of the next step, in the official order a second one between its two backward passes.

EXACT = [({"mars_type": "mars-adamw"}, 8), *(({"mars_type": kind}, 4) for kind in LINEAR)]


def exact_optimizer(options):
    params = parameters()
    return params, MARS(params, is_approx=False, **options)


@pytest.mark.parametrize(("options", "least"), EXACT, ids=str)
def test_the_exact_form_keeps_no_previous_gradient_when_h_is_given(options, least):
    params, optimizer = exact_optimizer(options)
    for step in range(4):
        set_gradients(params, step)
        optimizer.step(prev_grads=[torch.ones_like(param) for param in params])
    assert bytes_per_parameter(optimizer) == least


@pytest.mark.parametrize(("options", "least"), EXACT, ids=str)
def test_way_1_adds_the_previous_parameters(options, least):
    params, optimizer = exact_optimizer(options)
    for step in range(4):
        with optimizer.at_previous_params():
            set_gradients(params, step)
        set_gradients(params, step + 10)
        optimizer.step()
        optimizer.zero_grad()
    assert bytes_per_parameter(optimizer) == least + 4


@pytest.mark.parametrize(("options", "least"), EXACT, ids=str)
def test_way_2_adds_the_previous_parameters(options, least):
    params, optimizer = exact_optimizer(options)
    for step in range(4):
        optimizer.step(lambda step=step: set_gradients(params, step))
    assert bytes_per_parameter(optimizer) == least + 4


@pytest.mark.parametrize(("options", "least"), EXACT, ids=str)
def test_way_3_adds_one_gradient_and_the_official_order_two_until_the_step(options, least):
    params, optimizer = exact_optimizer(options)
    for step in range(4):
        set_gradients(params, step + 1)
        optimizer.update_previous_grad()
        set_gradients(params, step)
        before = bytes_per_parameter(optimizer)
        optimizer.step()
        optimizer.update_last_grad()
        assert bytes_per_parameter(optimizer) == least + 4
    assert before == least + 8


@pytest.mark.parametrize(("options", "least"), EXACT, ids=str)
def test_way_3_with_fold_needs_one_gradient_at_all_times(options, least):
    params, optimizer = exact_optimizer(options)
    for step in range(4):
        set_gradients(params, step)
        optimizer.fold()
        folded = bytes_per_parameter(optimizer)
        set_gradients(params, step + 1)
        optimizer.step()
        assert bytes_per_parameter(optimizer) == least + 4
    assert folded == least + 4


def test_the_gradient_of_way_3_is_given_back_once_it_was_used():
    params, optimizer = exact_optimizer({})
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 2)
    optimizer.record_next_batch_grad()  # for the step after the next
    optimizer.step(prev_grads=[torch.ones_like(param) for param in params])
    assert bytes_per_parameter(optimizer) == 12
    optimizer.step()
    assert bytes_per_parameter(optimizer) == 8


# ----------------------------------------------------------------------------------------- temporaries


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations create and that are alive at the same time, at most.

    Memory counts from when an operation returns a tensor whose storage is new until that storage is freed:
    exact and the same on every run, unlike the resident set. What an operation uses within itself is unseen.
    """

    def __init__(self, *known):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._alive += size
            self.peak = max(self.peak, self._alive)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key, size):
        self._known.discard(key)
        self._alive -= size


def lists_of_temporaries(options):
    """Peak of a later step over the size of the list of parameters."""
    params, optimizer = after_steps(options, shapes=((64, 64),) * 20)
    set_gradients(params, 99)
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    known = [value for value in state if isinstance(value, torch.Tensor)]
    with Allocations(*params, *(param.grad for param in params), *known) as allocations:
        optimizer.step()
    return allocations.peak / sum(param.numel() * param.element_size() for param in params)


# norms and divisors: at most four numbers beside each tensor of 4096
SCALARS = 4 / 4096


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("mars_type", ["mars-adamw", "mars-lion", "mars-sgd"])
def test_a_step_by_lists_needs_one_list_of_temporaries(mars_type, clip):
    lists = lists_of_temporaries({"mars_type": mars_type, "clip": clip, "foreach": True})
    assert 1 <= lists <= 1 + SCALARS


@pytest.mark.parametrize(
    "options", [{"amsgrad": True}, {"second_moment": "grad"}, {"weight_decay": 0.1}], ids=str
)
def test_options_of_mars_adamw_need_no_second_list(options):
    assert lists_of_temporaries({"foreach": True, **options}) <= 1 + SCALARS


@pytest.mark.parametrize("mars_type", ["mars-adamw", "mars-lion", "mars-sgd"])
def test_a_step_one_by_one_needs_temporaries_of_a_few_tensors(mars_type):
    # at most four tensors of the twenty at a time: c_t, its clipped form, the root, the direction
    assert lists_of_temporaries({"mars_type": mars_type, "foreach": False}) <= 4 / 20 + SCALARS


# ------------------------------------------------------------------------------------------------- jax

JAX = [
    ({"mars_type": "mars-adamw"}, 12),
    *(({"mars_type": kind}, 8) for kind in LINEAR),
    ({"amsgrad": True}, 16),
    ({"prev_grad_dtype": "bfloat16"}, 10),
    ({"is_approx": False}, 8),
    ({"is_approx": False, "keep_prev_params": True}, 12),
    ({"dtype": "bfloat16"}, 10),
    ({"dtype": "bfloat16", "mars_type": "mars-lion"}, 6),
]


@pytest.mark.parametrize(("options", "expected"), JAX, ids=str)
def test_the_state_of_jax_keeps_the_same_bytes(options, expected):
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    from mars_optim.jax import mars

    options = dict(options)
    params = [jax.numpy.ones((24, 16), options.pop("dtype", "float32"))]
    transformation = mars(1e-3, **options)
    state = transformation.init(params)
    given = {} if options.get("is_approx", True) else {"prev_grads": params}
    for _ in range(3):
        _, state = transformation.update(params, state, params, **given)
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert all(leaf.shape == params[0].shape for leaf in leaves)
    assert sum(leaf.nbytes for leaf in leaves) / params[0].size == expected


@pytest.mark.parametrize("options", [{}, {"is_approx": False, "keep_prev_params": True}], ids=str)
def test_the_correction_of_jax_alone_keeps_one_buffer(options):
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    from mars_optim.jax import mars_correction

    params = [jax.numpy.ones((24, 16))]
    state = mars_correction(**options).init(params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim > 0) / params[0].size == 4
