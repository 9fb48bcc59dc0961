"""T6 from scratch on your own tokens, with any of the paper's attention mechanisms at equal parameters.

    torchrun --standalone --nproc-per-node 8 experiments/train_lm.py --preset medium --mechanism tpa \
        --data DIR --out runs/medium-tpa

    python experiments/train_lm.py prepare --out DIR --encoding gpt2 --val-tokens 10000000 FOLDER_OF_TEXT
    python experiments/train_lm.py --preset byte --data stdlib --out runs/byte       # minutes on one GPU

Presets small, medium, large and xl are the paper's: AdamW (0.9, 0.95), decay 0.1 on all parameters, clipping
at 1, 2000 steps of warm-up and a cosine over 100,000 steps of 480 sequences of 1024 tokens, bf16 autocast.
--batch, --steps and so on change that for smaller budgets. --parallel ddp copies the model to every process,
fsdp2 shards it. Without torchrun one process runs, on the CPU if there is no GPU.

A run does not depend on the number of processes but by rounding. --resume continues it, on the same machine
and number of processes bit for bit; Ctrl-C ends after the step in progress, with a checkpoint. The weights
in `checkpoint.pt` under "model" load into `tpa_attention.T6` and `T6ForCausalLM`.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 5.1, Appendix H; the authors' configurations.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from shards import Corpus, open_corpus, prepare
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from train_settings import TRAJECTORY, model_config, options, padded_vocabulary, schedule

from tenfold_tools.run_folder import (
    RunError,
    RunFolder,
    Signals,
    UsageError,
    refuse_other_settings,
    restore,
    run_as_script,
)
from tpa_attention import accounting
from tpa_attention.config import TrainingRecipe
from tpa_attention.torch.model import T6, T6Block, param_groups
from tpa_attention.torch.parallel import fsdp2_plan

PAPER_VOCABULARY = 50304
RECOMPILATIONS = 8  # of one block for reasons other than its index


def main(argv: list[str]) -> int:
    """Train, or `prepare` shards; the exit status."""
    if argv[:1] == ["prepare"]:
        return prepare(argv[1:])
    args = options(argv, __doc__)
    device = join_processes(args)
    corpus = open_corpus(args.data, args.context)
    args.vocabulary = args.vocabulary or padded_vocabulary(corpus.vocabulary or PAPER_VOCABULARY)
    if corpus.vocabulary is not None and args.vocabulary < corpus.vocabulary:
        raise UsageError(
            f"--vocabulary must be at least the encoding's {corpus.vocabulary}, got {args.vocabulary}"
        )
    folder = RunFolder(args.out, resume=args.resume, writes=rank() == 0)
    return Training(args, device, corpus, folder).run()


def join_processes(args: argparse.Namespace) -> torch.device:
    """Join torchrun's processes, if there are any, and take this one's device.

    Raises:
        UsageError: if options and processes do not fit.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a GPU that torch sees, and there is none")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if args.parallel == "fsdp2" and not dist.is_initialized():
        raise UsageError("--parallel fsdp2 needs torchrun")
    if args.batch % (world() * args.micro_batch):
        raise UsageError(
            "--batch must be a multiple of processes x micro-batch = "
            f"{world()} x {args.micro_batch}, got {args.batch}"
        )
    args.precision = args.precision or ("bfloat16" if on_gpu else "float32")
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    return device


class Training:
    """One run: model, optimizer, position in the data, and the loop over steps.

    Args:
        args: the options, complete.
        device: of this process.
        corpus: what is read.
        folder: what is written.

    Raises:
        UsageError: if the run in the folder began with other settings.
    """

    def __init__(
        self, args: argparse.Namespace, device: torch.device, corpus: Corpus, folder: RunFolder
    ) -> None:
        self.args, self.device, self.corpus, self.folder = args, device, corpus, folder
        self.config, self.schedule = model_config(args), schedule(args)
        generator = torch.Generator().manual_seed(args.seed)
        self.model = T6(self.config, generator=generator).to(device)
        self.net = distributed(self.model, args, device)
        self.optimizer = adamw(self.model, self.schedule, device)
        self.losses_of = torch.compile(token_losses) if args.compile else token_losses
        half = args.precision == "bfloat16" and args.parallel == "ddp"  # FSDP2 casts by its own policy
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        self.settings = {name: getattr(args, name) for name in TRAJECTORY}
        self.settings["data"] = corpus.train.fingerprint
        self.step, self.evaluations = 0, []
        if args.resume:
            self.continue_run()
        event = "resume" if args.resume else "start"
        self.folder.record(
            step=self.step,
            event=event,
            world=world(),
            parameters=accounting.model_params(self.config),
            heads=self.config.num_attention_heads,
            cached_numbers_per_token_and_layer=accounting.cache_numbers(self.config),
            **self.settings,
        )

    def continue_run(self) -> None:
        """Take up the checkpoint."""
        checkpoint = self.folder.load()
        refuse_other_settings(checkpoint["settings"], self.settings)
        restore(self.model, self.optimizer, checkpoint)
        self.step, self.evaluations = checkpoint["step"], checkpoint["evaluations"]
        self.folder.forget_after(self.step)

    def run(self) -> int:
        """Train to the end, to --stop-at or to a signal; the exit status."""
        args, folder = self.args, self.folder
        last, received = min(args.stop_at or args.steps, args.steps), 0.0
        since, at = time.perf_counter(), self.step
        with Signals() as signals, progress() as bar:
            task = bar.add_task("training", total=args.steps, completed=self.step)
            while self.step < last and not received:
                loss, norm, received = self.train_step(signals)
                bar.update(task, completed=self.step, description=f"loss {loss:.3f}")
                if self.step % args.log_every == 0:
                    now = time.perf_counter()
                    speed = (self.step - at) * args.batch * args.context / (now - since)
                    self.log(loss, norm, speed)
                    since, at = now, self.step
                if self.step % args.eval_every == 0 or self.step == args.steps:
                    self.evaluations.append([self.step, self.evaluate()])
                    folder.record(step=self.step, val_loss=self.evaluations[-1][1])
                if self.step % args.checkpoint_every == 0 or self.step == last or received:
                    self.save()
        if self.step == args.steps:
            folder.finish(self.summary())
        return 128 + (signals.received or signal.SIGINT) if received else 0

    def train_step(self, signals: Signals) -> tuple[float, float, float]:
        """One step of the optimizer: the mean loss, the gradient's norm, and whether any rank is to stop.

        Raises:
            RunError: if the loss is not finite; the checkpoint is as before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(self.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        parts = list(self.micro_batches())
        for index, part in enumerate(parts):
            with synchronised(self.net, index == len(parts) - 1):
                with self.autocast:
                    loss = self.losses_of(self.net(part[:, :-1]), part[:, 1:]).mean() / len(parts)
                loss.backward()
            total += loss.detach()
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip))
        # one exchange per step: the loss, and whether any rank was told to stop
        mean, received = summed(torch.stack((total / world(), total.new_tensor(signals.received)))).tolist()
        if not math.isfinite(mean):
            raise RunError(f"the loss is {mean} at step {self.step}; {self.folder.checkpoint} is as before")
        self.optimizer.step()
        self.step += 1
        return mean, norm.item(), received

    def micro_batches(self) -> Iterator[Tensor]:
        """This rank's share of the step's sequences, each a window and the token after it."""
        first = self.step * self.args.batch
        mine = range(first + rank(), first + self.args.batch, world())
        windows = self.corpus.train.order(mine, self.args.seed)
        for start in range(0, len(windows), self.args.micro_batch):
            rows = self.corpus.train.rows(
                windows[start : start + self.args.micro_batch], self.args.vocabulary
            )
            yield rows.to(self.device, non_blocking=True)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per token over the first held-out windows; every rank makes as many passes."""
        count = min(self.corpus.val.windows, self.args.eval_windows)
        size = self.args.micro_batch
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for first in range(rank(), math.ceil(count / world()) * world(), world() * size):
            mine = [first + world() * i for i in range(size)]
            rows = self.corpus.val.rows([window % count for window in mine], self.args.vocabulary)
            rows = rows.to(self.device)
            real = torch.tensor([window < count for window in mine], device=self.device)
            with self.autocast:
                losses = self.losses_of(self.model(rows[:, :-1]), rows[:, 1:]).mean(1)[real]
            total += torch.stack((losses.double().sum(), real.sum().double()))
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # a pass without backward leaves the root's parameters gathered
        total = summed(total)
        return (total[0] / total[1]).item()

    def log(self, loss: float, norm: float, speed: float) -> None:
        """One line of metrics."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        self.folder.record(
            step=self.step,
            loss=loss,
            lr=self.schedule.learning_rate(self.step - 1),
            grad_norm=norm,
            tokens=self.step * self.args.batch * self.args.context,
            tokens_per_second=speed,
            peak_bytes=peak,
        )

    def save(self) -> None:
        """Write the checkpoint; every rank must call it."""
        self.folder.save(
            self.model,
            self.optimizer,
            step=self.step,
            sequences=self.step * self.args.batch,  # where the data goes on
            evaluations=self.evaluations,
            settings=self.settings,
        )

    def summary(self) -> dict[str, object]:
        """What a finished run says of itself."""
        return {
            **self.settings,
            "parameters": accounting.model_params(self.config),
            "heads": self.config.num_attention_heads,
            "cached_numbers_per_token_and_layer": accounting.cache_numbers(self.config),
            "tokens": self.step * self.args.batch * self.args.context,
            "val_loss": self.evaluations[-1][1],
            "evaluations": self.evaluations,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        }


# -------------------------------------------------------------------------------------------------- pieces


def distributed(model: T6, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The module to call: the model, sharded in place, or a wrapper that averages its gradients."""
    if args.parallel == "fsdp2":
        half = args.precision == "bfloat16"
        policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32)
        mesh = init_device_mesh(device.type, (world(),))
        if args.compile:
            blocks = [module for module in model.modules() if isinstance(module, T6Block)]
            torch._dynamo.config.recompile_limit = len(blocks) + RECOMPILATIONS  # the index is a constant
            for block in blocks:
                block.compile()
        return fsdp2_plan(model, mesh, mp_policy=policy)
    if args.compile:
        model.compile()
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def adamw(model: nn.Module, recipe: TrainingRecipe, device: torch.device) -> torch.optim.AdamW:
    """The paper's optimizer; decay acts on every parameter."""
    groups = param_groups(model, recipe.weight_decay)
    fused = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=fused)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, in nats, shaped as targets; float32 whatever the logits are."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return flat.view_as(targets)


def progress() -> Progress:
    """A bar on rank 0's terminal, nothing where nobody watches."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    watched = rank() == 0 and sys.stderr.isatty()
    return Progress(*columns, console=Console(stderr=True, quiet=not watched), disable=not watched)


def synchronised(net: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Whether the backward pass inside exchanges gradients with the other ranks."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(now)
    return net.no_sync() if isinstance(net, DistributedDataParallel) and not now else nullcontext()


def rank() -> int:
    """This process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered; then every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    status = run_as_script(lambda: main(sys.argv[1:]), "train_lm.py")
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
