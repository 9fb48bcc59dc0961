"""Other implementations of MARS, and apex: timed where they can be imported, named as missing where not.

What they do in a step, read in their sources; all run the approximate mars-adamw with lr 3e-3, betas 0.95 and
0.99, eps 1e-8, gamma 0.025, no decay of matrices and each tensor clipped to norm 1, and AdamW with betas 0.9
and 0.95 on vectors:

- pytorch_optimizer `MARS`: lists, or one tensor at a time with a host sync for each clip. Counts every first
  gradient as 1 + a times itself and adds 1e-15 below the root. Copies the momentum and the gradient.
- timm `Mars`: one tensor at a time without host sync. Multiplies by the decay even when it is zero.
- the authors' file: one tensor at a time, a host sync for each clip. Stores a reference to .grad and copies
  nothing, which moves one stream less and goes wrong where .grad is reused. Their second file does lists only
  when vectors get MARS too (`optimize_1d=True`), and squares g_t instead of c_t there.
- apex `FusedAdam`: AdamW in CUDA kernels over all tensors.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contenders import Contender
from torch import Tensor

MARS_STREAMS, ADAMW_STREAMS = 9, 7
# the paper's defaults, spelled out because timm's differ
HYPERPARAMETERS: dict[str, Any] = {
    "lr": 3e-3,
    "betas": (0.95, 0.99),
    "eps": 1e-8,
    "gamma": 0.025,
    "weight_decay": 0.0,
    "betas_1d": (0.9, 0.95),
}


def peer_contenders(
    device: str, official: Sequence[Path] = ()
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The peers that work here, and the others with the reason.

    Args:
        device: where the parameters are.
        official: files of the authors to load; this EXECUTES them.
    """
    lineup: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    finders: dict[str, Callable[[], dict[str, Contender]]] = {
        "pytorch_optimizer MARS": pytorch_optimizer,
        "timm Mars": timm,
        "apex FusedAdam": lambda: apex(device),
    }
    finders |= {f"official MARS ({path.name})": lambda path=path: official_file(path) for path in official}
    if not official:
        absent["official MARS"] = "not given: its file is named by --official"
    for name, find in finders.items():
        try:
            lineup |= find()
        except ImportError as problem:
            absent[name] = f"not installed: {problem}"
        except Unusable as problem:
            absent[name] = f"not usable here: {problem}"
    return lineup, absent


class Unusable(Exception):  # noqa: N818 - says what is wrong, not that we failed
    """A peer is there and cannot run on this machine."""


def pytorch_optimizer() -> dict[str, Contender]:
    """MARS of the package pytorch-optimizer, by lists and one by one."""
    from pytorch_optimizer import MARS

    def build(foreach: bool) -> Callable[[list[Tensor]], Callable[[], Any]]:
        return lambda params: MARS(params, mars_type="adamw", foreach=foreach, **HYPERPARAMETERS).step

    name = f"pytorch_optimizer {version('pytorch-optimizer')} MARS"
    return {
        f"{name} foreach": Contender(build(True), MARS_STREAMS),
        f"{name} for-loop": Contender(build(False), MARS_STREAMS, "AdamW for-loop"),
    }


def timm() -> dict[str, Contender]:
    """Mars of the package timm, which imports torchvision."""
    try:
        from timm.optim.mars import Mars
    except RuntimeError as problem:  # a torchvision built for another torch
        raise Unusable(str(problem).splitlines()[0]) from None

    def build(params: list[Tensor]) -> Callable[[], Any]:
        return Mars(params, mars_type="adamw", **HYPERPARAMETERS).step

    return {f"timm {version('timm')} Mars": Contender(build, MARS_STREAMS, "AdamW for-loop")}


def apex(device: str) -> dict[str, Contender]:
    """AdamW of NVIDIA apex, for CUDA only."""
    from apex.optimizers import FusedAdam

    if not device.startswith("cuda"):
        raise Unusable("it runs on CUDA only")
    return {"apex FusedAdam": Contender(lambda params: FusedAdam(params).step, ADAMW_STREAMS, "AdamW fused")}


def official_file(path: Path) -> dict[str, Contender]:
    """The class `MARS` in a file of the authors' release (mars.py, mars_fused.py)."""
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise Unusable(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "MARS"):
        raise Unusable(f"{path} has no class MARS")
    release = module.MARS

    def build(by_lists: bool) -> Callable[[list[Tensor]], Callable[[], Any]]:
        options = {"foreach": True, "optimize_1d": True} if by_lists else {}
        return lambda params: release(params, **HYPERPARAMETERS, **options).step

    name = f"official MARS ({path.name})"
    lineup = {name: Contender(build(False), MARS_STREAMS, "AdamW for-loop")}
    if "foreach" in inspect.signature(release).parameters:
        lineup[f"{name} foreach, vectors too"] = Contender(build(True), MARS_STREAMS)
    return lineup
