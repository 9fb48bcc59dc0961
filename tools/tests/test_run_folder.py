"""The folder of a training run: what is refused, what survives, how it ends on a signal."""

import json
import os
import signal

import pytest

torch = pytest.importorskip("torch")

from tenfold_tools import run_folder  # noqa: E402
from tenfold_tools.run_folder import RunError, RunFolder, Signals, UsageError  # noqa: E402


def trained(value):
    """A model and an optimizer that has state."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_checkpoint_brings_model_and_optimizer_back_to_the_bit(tmp_path):
    model, optimizer = trained(0)
    RunFolder(tmp_path / "run", resume=False, writes=True).save(
        model, optimizer, step=3, note=["a", (1, 2.5)]
    )
    loaded = RunFolder(tmp_path / "run", resume=True, writes=True).load()
    other, its_optimizer = trained(1)
    run_folder.restore(other, its_optimizer, loaded)
    assert loaded["step"] == 3
    assert loaded["note"] == ["a", (1, 2.5)]
    for mine, saved in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, saved)
        for key, value in optimizer.state[saved].items():
            assert torch.equal(its_optimizer.state[mine][key], value)


def test_a_folder_is_resumed_only_if_it_holds_a_run_and_begun_only_if_it_holds_none(tmp_path):
    with pytest.raises(UsageError, match=r"--resume needs a checkpoint, and .*checkpoint.pt does not exist"):
        RunFolder(tmp_path, resume=True, writes=True)
    RunFolder(tmp_path, resume=False, writes=True).save(*trained(0))
    with pytest.raises(UsageError, match="holds a run; continue it with --resume"):
        RunFolder(tmp_path, resume=False, writes=True)


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, resume=False, writes=True)
    folder.save(*trained(0), step=1)

    def broken(_content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        folder.save(*trained(0), step=2)
    assert folder.load()["step"] == 1


def test_a_damaged_checkpoint_is_an_error_of_usage(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"checkpoint.pt cannot be read"):
        RunFolder(tmp_path, resume=True, writes=True).load()


def test_lines_of_steps_that_run_again_and_lines_cut_short_are_dropped(tmp_path):
    folder = RunFolder(tmp_path, resume=False, writes=True)
    for step in (1, 2, 3):
        folder.record(step=step, loss=0.5)
    with folder.log.open("a") as file:
        file.write('{"step": 1, "lo')
    folder.forget_after(2)
    assert [json.loads(line)["step"] for line in folder.log.read_text().splitlines()] == [1, 2]


def test_a_process_that_does_not_write_leaves_no_file(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False, writes=False)
    folder.record(step=1)
    folder.save(*trained(0))
    folder.finish({"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_the_summary_of_a_run_is_read_and_asked_for(tmp_path):
    with pytest.raises(UsageError, match="holds no finished run"):
        run_folder.summary_in(tmp_path)
    RunFolder(tmp_path, resume=False, writes=True).finish({"loss": 1.5})
    assert run_folder.summary_in(tmp_path) == {"loss": 1.5}


def test_changed_settings_are_named():
    run_folder.refuse_other_settings({"lr": 1, "old": 2}, {"lr": 1})
    with pytest.raises(UsageError, match="cannot change settings: lr 1 -> 2, new None -> 3"):
        run_folder.refuse_other_settings({"lr": 1}, {"lr": 2, "new": 3})


def test_signals_are_noted_inside_and_handled_as_before_outside():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("error", "status"), [(UsageError, 2), (RunError, 1)])
def test_errors_are_one_line_and_a_status(error, status, capsys):
    def main():
        raise error("what is wrong")

    assert run_folder.run_as_script(main, "train.py") == status
    assert capsys.readouterr().err == "train.py: error: what is wrong\n"
    assert run_folder.run_as_script(lambda: 0, "train.py") == 0
