"""ResNet-18 on CIFAR-10 or CIFAR-100 under AdamW, Muon and MARS: best test accuracy beside the published.

    python experiments/cifar.py --data cifar-10-batches-bin --optimizer mars-adamw --exact --out runs/exact

The folder must hold the BINARY version of the data set (data_batch_1.bin ... test_batch.bin, or train.bin
and test.bin); the Python version is a pickle and is never read. As in the paper: 200 epochs of batches of
128, random crops and flips, a tenth of the rate after half and after three quarters of the epochs. The
paper reports the best rate of a grid from 1e-5 to 1e-1 without naming it: the default rates are ordinary
values and no more, so run a grid over --lr. Muon is MARS-Shampoo with beta1 = 0.95, gamma = 0.05 and no
clip (eqs. 3.22-3.25).

The exact form makes a second pass at the previous parameters; BatchNorm's running statistics do not see it.
One process, on the GPU if there is one. `--resume` continues at the last finished epoch, on the CPU bit for
bit.

Source: Yuan et al. 2025 (arXiv 2411.10438), Section 4 and Appendix E.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from tqdm import tqdm

from mars_optim.torch import MARS, build_param_groups
from tenfold_tools.run_folder import (
    RunError,
    RunFolder,
    Signals,
    UsageError,
    refuse_other_settings,
    restore,
    run_as_script,
    write_lines,
)

RATES = {"adamw": 1e-3, "muon": 2e-2, "mars-adamw": 3e-3, "mars-lion": 3e-4, "mars-shampoo": 2e-2}
PUBLISHED = {  # best test accuracy in per cent on CIFAR-10 and CIFAR-100
    "adamw": (94.81, 73.70),
    "muon": (95.08, 74.64),
    "mars-adamw approx": (95.29, 76.97),
    "mars-adamw exact": (95.26, 77.38),
    "mars-shampoo exact": (94.98, 75.83),
    "mars-lion exact": (94.98, 76.15),
}


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "cifar.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the binary version")
    add("--out", type=Path, required=True, help="folder of this run")
    add("--optimizer", choices=RATES, default="mars-adamw")
    add("--exact", action="store_true", help="exact form of a mars optimizer")
    add("--lr", type=float, help="learning rate; see above")
    add("--weight-decay", type=float, default=5e-4)
    add("--gamma", type=float, default=0.025, help="strength of the correction")
    add("--epochs", type=int, default=200)
    add("--batch", type=int, default=128)
    add("--width", type=int, default=64, help="channels of the first stage; 64 is ResNet-18")
    add("--stop-at", type=int, help="leave after this epoch")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.lr = RATES[args.optimizer] if args.lr is None else args.lr
    if not (args.lr > 0 and math.isfinite(args.lr)):
        raise UsageError(f"--lr must be finite and > 0, got {args.lr}")
    if args.exact and not args.optimizer.startswith("mars"):
        raise UsageError(f"--exact needs a mars optimizer, got {args.optimizer}")
    for name in ("epochs", "batch", "width"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be >= 1, got {getattr(args, name)}")
    return args


# ------------------------------------------------------------------------------------------------- data


def read_folder(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Training set, test set and number of classes; images are uint8 (images, 3, 32, 32)."""
    if (folder / "train.bin").is_file():  # CIFAR-100: a coarse label, then the fine one
        return read([folder / "train.bin"], 2, 100), read([folder / "test.bin"], 2, 100), 100
    parts = sorted(folder.glob("data_batch_*.bin"))
    if parts:
        return read(parts, 1, 10), read([folder / "test_batch.bin"], 1, 10), 10
    if (folder / "data_batch_1").exists() or (folder / "train").exists():
        raise UsageError(f"{folder} holds the Python version of the data set; the binary version is needed")
    raise UsageError(f"{folder} holds neither data_batch_*.bin (CIFAR-10) nor train.bin (CIFAR-100)")


def read(paths: Sequence[Path], labels: int, classes: int) -> tuple[Tensor, Tensor]:
    """Images and labels of binary files: `labels` bytes, the last being the class, then 3 x 32 x 32."""
    records = []
    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path} does not exist")
        raw = np.fromfile(path, np.uint8)
        if len(raw) == 0 or len(raw) % (labels + 3072):
            raise UsageError(f"{path} must hold records of {labels + 3072} bytes, got {len(raw)} bytes")
        records.append(raw.reshape(-1, labels + 3072))
        largest = records[-1][:, labels - 1].max()
        if largest >= classes:
            raise UsageError(f"{path} must hold labels below {classes}, got {largest}")
    whole = torch.from_numpy(np.concatenate(records))
    return whole[:, labels:].reshape(-1, 3, 32, 32), whole[:, labels - 1].long()


def cropped_and_flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels, black at the border, and mirrored half of the time."""
    count, device = len(images), images.device
    shifts = torch.randint(9, (2, count, 1), generator=generator).to(device)
    mirrored = torch.randint(2, (count, 1), generator=generator).to(device)
    pixels = torch.arange(32, device=device)
    rows, columns = shifts[0] + pixels, shifts[1] + torch.where(mirrored == 1, 31 - pixels, pixels)
    sample, channel = torch.arange(count, device=device), torch.arange(3, device=device)
    # Indexed in this order the result is contiguous: channels-last images crash a strided convolution of
    # torch 2.15 on the CPU.
    where = (
        sample[:, None, None, None],
        channel[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None],
    )
    return F.pad(images, (4, 4, 4, 4))[where]


# ---------------------------------------------------------------------------------- model and optimizer


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with the stem for images of 32 x 32: one 3 x 3 convolution, no pooling."""

    def __init__(self, classes: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # layers draw from the global generator; overwritten below
            self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            self.stem_norm = nn.BatchNorm2d(width)
            widths = [width, width, 2 * width, 4 * width, 8 * width]
            self.blocks = nn.Sequential()
            for stage in range(4):
                self.blocks.append(Block(widths[stage], widths[stage + 1], stride=1 if stage == 0 else 2))
                self.blocks.append(Block(widths[stage + 1], widths[stage + 1], stride=1))
            self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, mode="fan_out", nonlinearity="relu", generator=generator
                )
        for parameter in self.head.parameters():
            nn.init.uniform_(parameter, -(widths[-1] ** -0.5), widths[-1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, 32, 32)."""
        x = self.blocks(F.relu(self.stem_norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> MARS | torch.optim.AdamW:
    """Convolutions under MARS, as matrices where they are orthogonalised; vectors at the release's 3e-3."""
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    muon, beta = args.optimizer == "muon", 0.95
    mars_type = "mars-shampoo" if muon else args.optimizer
    return MARS(
        build_param_groups(model, mars_type, weight_decay=args.weight_decay),
        args.lr,
        (beta, 0.99),
        gamma=1 - beta if muon else args.gamma,
        is_approx=not args.exact,
        clip=None if muon else 1.0,
        prev_grad_init="zero" if muon else "current",
        lr_1d=3e-3,
        weight_decay_1d=args.weight_decay,
    )


# -------------------------------------------------------------------------------------------------- run


def main(argv: Sequence[str]) -> int:
    args = options(argv)
    (images, labels), (test_images, test_labels), classes = read_folder(args.data)
    folder = RunFolder(args.out, resume=args.resume, writes=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels, test_images, test_labels = (
        part.to(device) for part in (images, labels, test_images, test_labels)
    )
    deviation, mean = torch.std_mean(images.float(), (0, 2, 3), keepdim=True)
    deviation = deviation.clamp(min=1.0)  # a channel of one value
    initial = torch.Generator().manual_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed + 1)  # of the data: its state goes into the checkpoint
    model = ResNet18(classes, args.width, initial).to(device)
    optimizer = build_optimizer(model, args)
    exact = optimizer if isinstance(optimizer, MARS) and args.exact else None

    names = ("optimizer", "exact", "lr", "weight_decay", "gamma", "epochs", "batch", "width", "seed")
    settings = {name: getattr(args, name) for name in names} | {"classes": classes}
    epoch, accuracies = 0, []
    if args.resume:
        checkpoint = folder.load()
        refuse_other_settings(checkpoint["settings"], settings)
        restore(model, optimizer, checkpoint)
        order.set_state(checkpoint["order"])
        epoch, accuracies = checkpoint["epoch"], checkpoint["accuracies"]
        folder.forget_after(epoch)
    folder.record(step=epoch, event="resume" if args.resume else "start", **settings)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model((inputs - mean) / deviation), targets)

    @torch.no_grad()
    def evaluate() -> float:
        """Accuracy on the test set, in per cent."""
        model.eval()
        correct = 0
        for inputs, targets in zip(test_images.split(1000), test_labels.split(1000), strict=True):
            logits = model((inputs - mean) / deviation)
            correct += int((logits.argmax(1) == targets).sum())
        model.train()
        return 100 * correct / len(test_labels)

    last = min(args.stop_at or args.epochs, args.epochs)
    bar = tqdm(total=args.epochs, initial=epoch, disable=not sys.stderr.isatty(), unit="epoch")
    with Signals() as signals, bar:
        while epoch < last:
            rate = args.lr * 0.1 ** ((epoch >= args.epochs // 2) + (epoch >= args.epochs * 3 // 4))
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = []
            for batch in torch.randperm(len(images), generator=order).split(args.batch):
                inputs = cropped_and_flipped(images[batch.to(device)], order)
                targets = labels[batch.to(device)]
                optimizer.zero_grad()
                if exact is not None:
                    with exact.at_previous_params(module=model):
                        loss_of(inputs, targets).backward()
                loss = loss_of(inputs, targets)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                if signals.received:  # this epoch is lost, the checkpoint is of the one before
                    return 128 + signals.received
            epoch += 1
            loss = torch.stack(losses).mean().item()
            if not math.isfinite(loss):
                raise RunError(f"the loss is {loss} in epoch {epoch}; the checkpoint is of the one before")
            accuracies.append(evaluate())
            folder.record(step=epoch, loss=loss, lr=rate, test_accuracy=accuracies[-1])
            folder.save(
                model,
                optimizer,
                order=order.get_state(),
                epoch=epoch,
                accuracies=accuracies,
                settings=settings,
            )
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", best=f"{max(accuracies):.2f}")
    if epoch == args.epochs:
        form = "exact" if args.exact else "approx"
        arm = f"{args.optimizer} {form}" if args.optimizer.startswith("mars") else args.optimizer
        published = {name: pair[classes == 100] for name, pair in PUBLISHED.items()}
        best = max(accuracies)
        folder.finish({"arm": arm, **settings, "best_test_accuracy": best, "published": published})
        write_lines(
            [
                f"{arm} on CIFAR-{classes}, lr {args.lr:g}: best test accuracy {best:.2f} %",
                "published: " + ", ".join(f"{name} {value:.2f}" for name, value in published.items()),
            ]
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_as_script(lambda: main(sys.argv[1:]), "cifar.py"))
