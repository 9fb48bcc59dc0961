import json
import multiprocessing.connection
import os
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tenfold_tools import testing
from tenfold_tools.testing import WorkerError

pytest_plugins = ["pytester"]

torch = pytest.importorskip("torch")


def sum_of_ranks(rank, world_size, offset):
    import torch.distributed as dist

    total = torch.tensor([float(rank + offset)])
    dist.all_reduce(total)
    return rank, world_size, total


def add_rank_in_place(rank, world_size, values):
    values += rank + 1
    return values


def fail_on_rank_one(rank, world_size):
    import torch.distributed as dist

    if rank == 1:
        raise ValueError("the shard of rank 1 is empty")
    dist.barrier()


def die_on_rank_zero(rank, world_size):
    import torch.distributed as dist

    if rank == 0:
        os._exit(17)
    dist.barrier()


def never_reach_the_barrier(rank, world_size, pid_file):
    import torch.distributed as dist

    Path(f"{pid_file}.{rank}").write_text(str(os.getpid()))
    if rank == 0:
        return
    dist.barrier()


def return_a_lambda(rank, world_size):
    return lambda: rank


def square_all(values):
    import triton
    import triton.language as tl

    @triton.jit
    def square_kernel(x, y, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0)
        tl.store(y + at, value * value, mask=at < n)

    out = torch.full_like(values, -1.0)
    square_kernel[(triton.cdiv(values.numel(), 8),)](values, out, values.numel(), BLOCK=8)
    return out


def process_and_variable():
    return os.getpid(), os.environ.get("TRITON_INTERPRET")


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_rank_returns_its_value_and_they_share_a_collective(run_distributed):
    # ranks 0, 1, 2 with offset 10: 10 + 11 + 12
    assert run_distributed(sum_of_ranks, 3, 10) == [(rank, 3, torch.tensor([33.0])) for rank in range(3)]


def test_ranks_do_not_share_the_memory_of_their_arguments(run_distributed):
    values = torch.zeros(3)
    got = run_distributed(add_rank_in_place, 2, values)
    assert [value.tolist() for value in got] == [[1.0] * 3, [2.0] * 3]
    assert values.tolist() == [0.0] * 3


def test_a_failing_rank_is_named_with_its_error_and_line_while_the_other_hangs(run_distributed):
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        run_distributed(fail_on_rank_one, 2, timeout=300)
    message = str(caught.value)
    assert message.startswith("rank 1 of 2 failed:\nTraceback (most recent call last):")
    assert "in fail_on_rank_one" in message
    assert "ValueError: the shard of rank 1 is empty" in message
    assert "rank 0 of 2 was still running and was stopped" in message
    assert "_workers.py" not in message
    # not a speed test: only that the time limit of 300 s was not waited for
    assert time.monotonic() - start < 150


def test_a_rank_that_dies_is_named_with_its_exit_code(run_distributed):
    with pytest.raises(
        WorkerError, match=r"rank 0 of 2 failed:\n.*died without a Python error, exit code 17"
    ):
        run_distributed(die_on_rank_zero, 2, timeout=300)


def test_a_hanging_rank_is_stopped_at_the_limit_and_shown_where_it_was(run_distributed, tmp_path):
    run_distributed(
        sum_of_ranks, 1, 0
    )  # pays for importing torch, which the short limit below does not allow for
    with pytest.raises(WorkerError) as caught:
        run_distributed(never_reach_the_barrier, 2, tmp_path / "pid", timeout=8)
    message = str(caught.value)
    assert message.startswith("not finished after 8 s\nrank 0 of 2 returned\nrank 1 of 2 was here:\n")
    assert "in never_reach_the_barrier" in message
    assert not any(exists(int(file.read_text())) for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_value_that_cannot_be_pickled_is_an_error_of_its_rank(run_distributed):
    with pytest.raises(WorkerError, match=r"(?s)rank 0 of 1 failed:.*lambda"):
        run_distributed(return_a_lambda, 1)


def test_only_functions_that_another_process_can_import_are_accepted(run_distributed):
    def nested(rank, world_size):
        return rank

    for function in (nested, lambda *ranks: ranks, 3):
        with pytest.raises(TypeError, match="function must be defined at the top level of a module"):
            run_distributed(function)


def test_arguments_that_cannot_be_pickled_are_refused(run_distributed):
    with pytest.raises(TypeError, match="the arguments must be picklable"):
        run_distributed(sum_of_ranks, 1, lambda: 0)


@pytest.mark.parametrize(("nprocs", "timeout"), [(0, 60), (2, 0)])
def test_process_count_and_limit_must_be_positive(run_distributed, nprocs, timeout):
    with pytest.raises(ValueError, match=r"(nprocs must be >= 1|timeout must be > 0 seconds), got 0"):
        run_distributed(sum_of_ranks, nprocs, 1, timeout=timeout)


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_functions_of_a_test_module_are_found_in_every_import_mode(pytester, mode):
    folder = pytester.mkdir("checks")
    (folder / "truth.py").write_text("ANSWER = 42\n")
    (folder / "test_inner.py").write_text(
        "import sys; sys.path.insert(0, __file__.rsplit('/', 1)[0])\n"
        "from dataclasses import dataclass\n"
        "from truth import ANSWER\n"
        "@dataclass\n"
        "class Point:\n"
        "    x: int\n"
        "def shift(rank, world_size, point):\n"
        "    return Point(point.x + ANSWER + rank)\n"
        "def test_values_come_back(run_distributed):\n"
        "    assert run_distributed(shift, 2, Point(1)) == [Point(43), Point(44)]\n"
    )
    pytester.runpytest(f"--import-mode={mode}", "checks").assert_outcomes(passed=1)


def test_the_failure_of_a_rank_is_what_pytest_prints(pytester):
    pytester.makepyfile(
        """
        def broken(rank, world_size):
            print("rank", rank, "speaks")
            assert rank == 0, f"rank {rank} disagrees"
            return rank

        def test_broken(run_distributed):
            run_distributed(broken)
        """
    )
    result = pytester.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*rank 1 of 2 failed:*", "E*AssertionError: rank 1 disagrees*"])


def test_a_gpu_test_is_skipped_with_the_reason(pytester, monkeypatch):
    monkeypatch.setattr(testing, "why_no_gpu", lambda framework: f"no GPU for {framework} in this room")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_default(): raise SystemExit

        @pytest.mark.gpu("jax")
        def test_jax(): raise SystemExit
        """
    )
    result = pytester.runpytest("-rs", "--strict-markers")
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines_random(["*no GPU for torch in this room*", "*no GPU for jax in this room*"])


def test_a_gpu_test_runs_where_there_is_a_gpu(pytester, monkeypatch):
    monkeypatch.setattr(testing, "why_no_gpu", lambda _framework: None)
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_it(): pass")
    pytester.runpytest().assert_outcomes(passed=1)


def test_a_gpu_marker_for_an_unknown_framework_is_an_error(pytester):
    pytester.makepyfile("import pytest\n@pytest.mark.gpu('tpu')\ndef test_it(): pass")
    result = pytester.runpytest()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the gpu marker takes 'torch' or 'jax', got 'tpu'*"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_reason_says_which_torch_sees_no_gpu():
    assert testing.why_no_gpu("torch").startswith(f"needs a GPU, torch {torch.__version__} sees none")


def test_the_reason_says_that_a_framework_is_missing(monkeypatch):
    monkeypatch.setattr(testing.importlib.util, "find_spec", lambda _name: None)
    testing.why_no_gpu.cache_clear()
    assert testing.why_no_gpu("jax") == "needs a GPU through jax, which is not installed"
    testing.why_no_gpu.cache_clear()


def test_loading_the_plugin_and_running_no_gpu_test_imports_no_framework(pytester):
    pytester.makepyfile(
        """
        import sys
        import pytest

        def test_light():
            assert not {"torch", "jax", "triton"} & set(sys.modules)

        @pytest.mark.gpu
        def test_heavy(): pass
        """
    )
    pytester.runpytest_subprocess("-k", "light").assert_outcomes(passed=1, deselected=1)


def test_triton_kernels_run_on_the_cpu(triton_interpreter):
    pytest.importorskip("triton")
    values = torch.arange(-5.0, 6.0)
    # products of small integers are exact; 11 is no multiple of the block of 8
    assert torch.equal(triton_interpreter(square_all, values), values * values)


def test_the_interpreter_is_one_other_process_for_all_tests(triton_interpreter):
    first, second = triton_interpreter(process_and_variable), triton_interpreter(process_and_variable)
    assert first == second
    assert first[0] != os.getpid()
    assert first[1] == "1"
    assert "TRITON_INTERPRET" not in os.environ


def test_an_error_in_the_interpreter_is_shown_and_the_next_call_works(triton_interpreter):
    with pytest.raises(WorkerError, match=r"(?s)in loads.*JSONDecodeError"):
        triton_interpreter(json.loads, "{")
    assert triton_interpreter(json.loads, "{}") == {}


def test_a_call_that_hangs_in_the_interpreter_is_stopped(triton_interpreter):
    before = triton_interpreter(os.path.realpath, "/proc/self")
    with pytest.raises(WorkerError, match=r"(?s)not finished after 3 s.*in wait"):
        triton_interpreter(multiprocessing.connection.wait, [], 600, timeout=3)
    assert triton_interpreter(os.path.realpath, "/proc/self") != before


def test_triton_tests_are_skipped_where_triton_is_missing(pytester):
    pytester.makeconftest(
        """
        import importlib.util
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "triton" else find_spec(name, *a)
        """
    )
    pytester.makepyfile("def test_it(triton_interpreter): raise SystemExit")
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs triton, which is not installed*"])


def test_the_plugin_is_found_by_its_entry_point():
    (plugin,) = entry_points(group="pytest11", name="tenfold")
    assert plugin.load() is testing
