"""What a training recipe leaves in its folder: a log, a checkpoint, a summary; and how it ends on a signal.

For the scripts in `experiments/` that train for hours. `log.jsonl` has one JSON object per line,
`checkpoint.pt` whole tensors however they were sharded, so it continues on any number of processes,
`summary.json` appears when the run is done. Files are written beside their place and renamed: an interruption
leaves the checkpoint before it.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class UsageError(Exception):
    """A wrong option or file, in one line."""


class RunError(Exception):
    """A run that cannot go on, in one line."""


def run_as_script(main: Callable[[], int], name: str) -> int:
    """Exit status of main; an error becomes one line on stderr, and status 2 if usage was wrong, else 1.

    Args:
        main: returns its status.
        name: of the script, for the message.
    """
    try:
        return main()
    except (UsageError, RunError) as error:
        sys.stderr.write(f"{name}: error: {error}\n")
        return 2 if isinstance(error, UsageError) else 1


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made if missing.
        resume: continue what it holds; otherwise it must hold no run.
        writes: whether this process writes (rank 0 does).

    Raises:
        UsageError: if a run is there and `resume` is not set, or the reverse.
    """

    def __init__(self, path: Path, *, resume: bool, writes: bool) -> None:
        self.log, self.checkpoint, self.summary = (
            path / name for name in ("log.jsonl", "checkpoint.pt", "summary.json")
        )
        self.writes = writes
        if resume and not self.checkpoint.is_file():
            raise UsageError(f"--resume needs a checkpoint, and {self.checkpoint} does not exist")
        if not resume and self.checkpoint.exists():
            raise UsageError(f"{path} holds a run; continue it with --resume or give another --out")
        if writes:
            path.mkdir(parents=True, exist_ok=True)
            if not resume:
                self.log.unlink(missing_ok=True)  # of a run that ended before its first checkpoint

    def record(self, **entry: Any) -> None:
        """Append one line to the log."""
        if self.writes:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be run again, and a line cut short."""
        if self.writes and self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if logged_step(line) <= step)
            replace_file(self.log, lambda path: path.write_text(kept, encoding="utf-8"))

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary."""
        if self.writes:
            text = json.dumps(summary, indent=2) + "\n"
            replace_file(self.summary, lambda path: path.write_text(text, encoding="utf-8"))

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> None:
        """Write a checkpoint; every rank must call it, because sharded tensors are gathered.

        Args:
            model: its state is saved whole.
            optimizer: likewise.
            more: numbers, strings, tensors, and lists and dictionaries of them.
        """
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}
        content = gathered(content, keep=self.writes)
        if self.writes:
            replace_file(self.checkpoint, lambda path: torch.save(content, path))

    def load(self) -> dict[str, Any]:
        """The checkpoint, its tensors mapped from the file.

        Raises:
            UsageError: if it is no checkpoint.
        """
        try:
            return torch.load(self.checkpoint, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch.load raises many types for a damaged file
            raise UsageError(f"{self.checkpoint} cannot be read: {str(error).splitlines()[0]}") from error


def summary_in(path: Path) -> dict[str, Any]:
    """The summary of another run.

    Args:
        path: its folder.

    Raises:
        UsageError: if the run is not finished.
    """
    try:
        return json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} holds no finished run: {error}") from error


def logged_step(line: str) -> float:
    """The step of a line of the log; infinity for a line that is no entry."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any]) -> None:
    """Put a checkpoint's tensors into a model and an optimizer, sharded as these are.

    Args:
        model: as built for this run.
        optimizer: of its parameters.
        checkpoint: what `RunFolder.load` returned.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(placed_like(tensor, checkpoint["model"][name]))
    saved = checkpoint["optimizer"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: placed_like(parameters[index], value) if has_shape_of(parameters[index], value) else value
            for key, value in entries.items()
        }
        for index, entries in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def refuse_other_settings(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run continues only under the settings that it began with.

    Args:
        saved: settings in the checkpoint.
        now: settings of this call.

    Raises:
        UsageError: naming each setting that differs.
    """
    changed = [f"{key} {saved.get(key)!r} -> {now[key]!r}" for key in now if saved.get(key) != now[key]]
    if changed:
        raise UsageError(f"--resume cannot change settings: {', '.join(changed)}")


class Signals:
    """Inside, SIGINT and SIGTERM only set `received`; the loop asks for it after each step.

    torchrun answers Ctrl-C by SIGTERM to processes that have had their SIGINT, so a second signal changes
    nothing either.
    """

    def __enter__(self) -> "Signals":
        self.received = 0
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number


# ----------------------------------------------------------------------------------------------- details


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file beside its place, then move it there."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    os.replace(beside, path)  # noqa: PTH105 - named as the habit is


def write_lines(rows: Iterable[str]) -> None:
    """Write lines to stdout.

    Args:
        rows: without line ends.
    """
    sys.stdout.write("".join(f"{row}\n" for row in rows))


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered; then every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any, *, keep: bool) -> Any:
    """The structure with whole tensors on the CPU; without tensors where they are not kept."""
    if isinstance(value, Tensor):
        tensor = whole(value.detach())
        return tensor.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gathered(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, keep=keep) for item in value)
    return value


def placed_like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, sharded as `tensor` is."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    return value


def has_shape_of(parameter: Tensor, value: Any) -> bool:
    """Whether an entry of the optimizer's state is sharded as its parameter is."""
    return isinstance(value, Tensor) and value.shape == parameter.shape
