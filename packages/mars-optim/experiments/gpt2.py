"""GPT-2 from scratch on your own tokens: AdamW, Muon and the MARS optimizers at the paper's settings.

    torchrun --standalone --nproc-per-node 8 experiments/gpt2.py --train train.bin --val val.bin \
        --size small --optimizer mars-adamw --exact --out runs/exact

A token file is a flat array of uint16, as nanoGPT's `prepare.py` writes it. Without torchrun one process
runs, on the CPU if there is no GPU. The model is nanoGPT's GPT-2: no biases, no dropout, tied head,
vocabulary padded to 50304. Batch, schedule, clipping, betas, decay and rates are those of the authors'
configurations; there is no rate for mars-lion and mars-shampoo, which need --lr. To tune, run one folder
per rate and name the others in --against: the summary then gives the verdict on "MARS beats AdamW by 0.03".

The exact form runs forward and backward at the previous parameters first (way 1), so a step costs two
gradients: the log counts `tokens` of the data and `tokens_evaluated`. Muon is MARS-Shampoo with beta1 =
0.95, gamma = 0.05 and no clip, which is the same update (eqs. 3.22-3.25), and so runs sharded too.

Every rank draws the whole batch's positions from one generator and takes its share: a run does not depend
on the number of processes except by rounding, and `--resume` continues it, on one CPU process bit for bit.
Ctrl-C ends after the step in progress, with a checkpoint.

Source: Yuan et al. 2025 (arXiv 2411.10438), Section 4; Liu et al. 2025 (arXiv 2510.21800) for mars-m.
"""

import argparse
import math
import os
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from gpt2_settings import TRAJECTORY, options, report, summary_of, verdict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from mars_optim.torch import MARS, build_param_groups, clip_grad_norm_pair_
from tenfold_tools.run_folder import (
    RunError,
    RunFolder,
    Signals,
    UsageError,
    refuse_other_settings,
    restore,
    run_as_script,
    summary_in,
    whole,
    write_lines,
)
from tenfold_tools.workloads import ByteGPT, GPTConfig, warmup_cosine

# ------------------------------------------------------------------------------------------------- data


class Tokens:
    """A token file, mapped and not read as a whole."""

    def __init__(self, path: Path, context: int, vocabulary: int) -> None:
        if not path.is_file():
            raise UsageError(f"{path} does not exist")
        if path.stat().st_size % 2:
            raise UsageError(f"{path} must hold uint16 tokens, got an odd number of bytes")
        if path.stat().st_size // 2 < context + 1:
            raise UsageError(f"{path} must hold more than {context} tokens, got {path.stat().st_size // 2}")
        self.path, self.context, self.vocabulary = path, context, vocabulary
        self.data: NDArray[np.uint16] = np.memmap(path, np.uint16, "r")

    def windows(self, starts: list[int]) -> Tensor:
        """Rows of context + 1 tokens."""
        rows = np.stack([self.data[start : start + self.context + 1] for start in starts])
        if rows.max() >= self.vocabulary:
            raise UsageError(f"{self.path} must hold tokens below {self.vocabulary}, got {rows.max()}")
        return torch.from_numpy(rows.astype(np.int64))


# ---------------------------------------------------------------------------------- model and optimizer


def sharded_or_replicated(model: ByteGPT, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The module to call: the model, sharded in place, or a wrapper that averages its gradients."""
    if args.compile:
        for block in model.blocks:
            block.compile()
    if not dist.is_initialized():
        return model
    if args.parallel == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = args.precision == "bfloat16"
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> MARS | torch.optim.AdamW:
    """Each at its published betas and decay; rates of vectors and embeddings follow that of matrices."""
    if args.optimizer == "adamw":
        by_decay = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(by_decay, lr=args.lr, betas=(0.9, 0.95))
    if args.optimizer == "muon":
        groups = build_param_groups(model, "mars-shampoo")
        for group in groups:
            if group["algorithm"] == "adamw":  # embeddings
                group["weight_decay"] = group["weight_decay_1d"] = 0.1
        beta = 0.95
        return MARS(
            groups, args.lr, (beta, 0.99), gamma=1 - beta, clip=None, prev_grad_init="zero", lr_1d_ratio=0.15
        )
    decay = 0.1 if args.optimizer == "mars-m" else 0.01
    groups = build_param_groups(model, args.optimizer, weight_decay=decay)
    return MARS(
        groups,
        args.lr,
        gamma=args.gamma,
        is_approx=not args.exact,
        mars_type=args.optimizer,
        lr_1d_ratio=1.0 if args.optimizer == "mars-m" else 0.5,
        fused=args.fused or None,
    )


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, in nats, shaped as targets; float32 whatever the logits are."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return flat.view_as(targets)


# -------------------------------------------------------------------------------------------------- run


def main(argv: list[str]) -> int:
    args = options(argv, __doc__)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    args.precision = args.precision or ("bfloat16" if device.type == "cuda" else "float32")
    if args.parallel == "fsdp2" and not dist.is_initialized():
        raise UsageError("--parallel fsdp2 needs torchrun")
    if args.batch % (world * args.micro_batch):
        raise UsageError(
            f"--batch must be a multiple of processes x micro-batch = {world} x {args.micro_batch}, "
            f"got {args.batch}"
        )
    train, val = (Tokens(path, args.context, args.vocabulary) for path in (args.train, args.val))
    others = [summary_in(path) for path in args.against]
    folder = RunFolder(args.out, resume=args.resume, writes=rank == 0)

    initial = torch.Generator().manual_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed + 1)  # of the data: its state goes into the checkpoint
    config = GPTConfig(args.width, args.layers, args.heads, args.context, args.vocabulary)
    model = ByteGPT(config, initial).to(device)
    net = sharded_or_replicated(model, args, device)
    optimizer = build_optimizer(model, args)
    exact = optimizer if isinstance(optimizer, MARS) and args.exact else None
    rate = warmup_cosine(args.steps, args.warmup, args.min_lr / args.lr)
    losses_of = torch.compile(token_losses) if args.compile else token_losses
    # FSDP2 casts by its own policy
    half = args.precision == "bfloat16" and args.parallel == "ddp"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)

    settings = {name: getattr(args, name) for name in TRAJECTORY}
    step, evaluations = 0, []
    if args.resume:
        checkpoint = folder.load()
        refuse_other_settings(checkpoint["settings"], settings)
        restore(model, optimizer, checkpoint)
        order.set_state(checkpoint["order"])
        step, evaluations = checkpoint["step"], checkpoint["evaluations"]
        folder.forget_after(step)
        del checkpoint  # its file, mapped, would be kept beside the next ones
    folder.record(step=step, event="resume" if args.resume else "start", world=world, **settings)

    def add_gradient(rows: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss over the batch; only the last part communicates."""
        parts, total = rows.split(args.micro_batch), torch.zeros((), device=device)
        for index, part in enumerate(parts):
            with synchronised(net, index == len(parts) - 1):
                with autocast:
                    loss = losses_of(net(part[:, :-1]), part[:, 1:]).mean() / len(parts)
                loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate() -> float:
        """Mean loss over consecutive windows of the whole file; every rank makes equally many passes."""
        count = (len(val.data) - 1) // args.context
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for first in range(rank, math.ceil(count / world) * world, world * args.micro_batch):
            mine = [first + world * i for i in range(args.micro_batch)]
            rows = val.windows([i % count * args.context for i in mine]).to(device)
            real = torch.tensor([i < count for i in mine], device=device)
            with autocast:
                losses = losses_of(model(rows[:, :-1]), rows[:, 1:]).mean(1)[real]
            total += torch.stack((losses.double().sum(), real.sum().double()))
        if isinstance(model, FSDPModule):
            model.reshard()  # a pass without backward leaves the root's parameters gathered
        total = summed(total)
        return (total[0] / total[1]).item()

    tokens, passes = args.batch * args.context, 2 if args.exact else 1
    last, received, since, at = min(args.stop_at or args.steps, args.steps), 0.0, time.perf_counter(), step
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0 or not sys.stderr.isatty(), unit="step")
    with Signals() as signals, bar:
        while step < last and not received:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate(step)
            starts = torch.randint(len(train.data) - args.context, (args.batch,), generator=order)
            rows = train.windows(starts[rank::world].tolist()).to(device)
            optimizer.zero_grad()
            if exact is not None:
                with exact.at_previous_params(module=model):
                    add_gradient(rows)
            loss = add_gradient(rows)
            if exact is not None:
                norm = clip_grad_norm_pair_(model.parameters(), exact, 1.0)  # h_t by g_t's factor
            else:
                norm = whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            step += 1
            # One exchange per step: the loss, and whether any rank was told to stop.
            loss, received = summed(torch.stack((loss / world, loss.new_tensor(signals.received)))).tolist()
            if not math.isfinite(loss):
                raise RunError(f"the loss is {loss} at step {step}; {folder.checkpoint} is as before")
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            if step % args.log_every == 0:
                now = time.perf_counter()
                folder.record(
                    step=step,
                    loss=loss,
                    lr=args.lr * rate(step - 1),
                    grad_norm=norm.item(),
                    tokens=step * tokens,
                    tokens_evaluated=step * tokens * passes,
                    tokens_per_second=(step - at) * tokens / (now - since),
                )
                since, at = now, step
            if step % args.eval_every == 0 or step == args.steps:
                evaluations.append([step, evaluate()])
                folder.record(step=step, val_loss=evaluations[-1][1], tokens=step * tokens)
            if step % args.checkpoint_every == 0 or step == last or received:
                folder.save(
                    model,
                    optimizer,
                    order=order.get_state(),
                    step=step,
                    evaluations=evaluations,
                    settings=settings,
                )
    if step == args.steps:
        summary = summary_of(args, evaluations)
        summary["verdict"], summary["reason"] = verdict([*others, summary], summary["arm"])
        folder.finish(summary)
        if rank == 0:
            write_lines(report(summary))
    return 128 + (signals.received or signal.SIGINT) if received else 0


def synchronised(net: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Whether the backward pass inside exchanges gradients with the other ranks."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(now)
    return net.no_sync() if isinstance(net, DistributedDataParallel) and not now else nullcontext()


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


if __name__ == "__main__":
    status = run_as_script(lambda: main(sys.argv[1:]), "gpt2.py")
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
