"""What a conversion accepts: every rule raises, with the argument's name, before anything is computed."""

from torch import Tensor

from tpa_attention import _checks
from tpa_attention.config import RopeConfig


def check_heads(num_heads: int, num_kv_heads: int, ranks: dict[str, int | None]) -> None:
    """Counts are positive, G divides h, ranks are at most h; q_rank alone may be None."""
    _checks.positive_int("num_heads", num_heads)
    _checks.positive_int("num_kv_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
    for name, rank in ranks.items():
        if name == "q_rank" and rank is None:
            continue
        _checks.positive_int(name, rank)
        if rank is not None and rank > num_heads:
            raise ValueError(f"{name} must not exceed num_heads, got {rank} and {num_heads}")


def check_weights(given: dict[str, Tensor], num_heads: int, num_kv_heads: int) -> None:
    """Finite floating matrices of one type whose shapes fit."""
    for name, w in given.items():
        if not w.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {w.dtype}")
        if w.ndim != 2 or 0 in w.shape:
            raise ValueError(f"{name} must be a matrix that is not empty, got shape {tuple(w.shape)}")
        if (w.dtype, w.device) != (given["w_q"].dtype, given["w_q"].device):
            raise ValueError(
                f"{name} must have the type and device of w_q, {given['w_q'].dtype} on "
                f"{given['w_q'].device}, got {w.dtype} on {w.device}"
            )
    rows, d = given["w_q"].shape
    if rows % num_heads:
        raise ValueError(f"w_q must have a multiple of num_heads = {num_heads} rows, got {rows}")
    value_rows = given["w_v"].shape[0]
    if value_rows % num_kv_heads:
        raise ValueError(f"w_v must have a multiple of num_kv_heads = {num_kv_heads} rows, got {value_rows}")
    expected = {
        "w_k": (num_kv_heads * (rows // num_heads), d),
        "w_v": (value_rows, d),
        "w_o": (d, num_heads * (value_rows // num_kv_heads)),
    }
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            shapes = ", ".join(f"{other} {tuple(w.shape)}" for other, w in given.items())
            raise ValueError(
                f"{name} must have shape {shape} with {num_heads} heads and {num_kv_heads} key-value heads, "
                f"got {shapes}"
            )
    for name, w in given.items():
        if not bool(w.isfinite().all()):
            raise ValueError(f"{name} must be finite, got inf or nan among its {w.numel()} numbers")


def check_rope(rope: RopeConfig, head_dim: int) -> None:
    """A rotation that turns heads of this width."""
    if not isinstance(rope, RopeConfig):
        raise TypeError(f"rope must be a RopeConfig (RopeConfig.none() for none), got {rope!r}")
    rope.rotary_dim(head_dim)


def check_calibration(calibration: Tensor | None, d: int, refine_steps: int, a_bias: bool | None) -> None:
    """Finite hidden states of width d where a refinement needs them, and contextual factors for it."""
    _checks.whole_number("refine_steps", refine_steps)
    if a_bias not in (None, True, False):
        raise TypeError(f"a_bias must be True, False or None, got {a_bias!r}")
    if refine_steps and a_bias is False:
        raise ValueError(f"a_bias must not be False for a refinement, got refine_steps={refine_steps}")
    if calibration is None:
        if refine_steps:
            raise ValueError(f"calibration must be given for a refinement, got refine_steps={refine_steps}")
        return
    if not calibration.is_floating_point():
        raise TypeError(f"calibration must be a floating tensor, got {calibration.dtype}")
    if calibration.ndim not in (2, 3) or calibration.shape[-1] != d or calibration.numel() == 0:
        raise ValueError(
            f"calibration must have shape (B, T, {d}) or (T, {d}) and hold tokens, "
            f"got {tuple(calibration.shape)}"
        )
    if not bool(calibration.isfinite().all()) or not bool(calibration.any()):
        raise ValueError("calibration must be finite and not all zero, got tokens that are not")
