"""C1's truth: RoPE as dense matrices, and what rotating the rows of B leaves of it.

    RoPE(Q_t) = Q_t T_t = s_Q A_Q^T (B_Q T_t),    RoPE(Q_t) RoPE(K_s)^T = Q_t T_{t-s} K_s^T      (Theorem 3.1)

T_t is written down entry by entry, without the package's `rope`. At order p a row of B is a Kronecker
product b (x) c (x) .. with b running fastest, and the rotation of its D features is I (x) T_t with T_t of the
width of b (Theorem C.1). Everything is float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tpa_attention.config import RopeConfig
from tpa_attention.torch.factors import kronecker_rows, materialize
from tpa_attention.torch.reference import factored_logits
from tpa_attention.torch.rope import rope

# widths of the parts of a row of B, whose product is D = 24
ORDERS = {2: (24,), 3: (6, 4), 4: (4, 3, 2)}
TOKENS, HEADS, RANKS = 7, 5, (3, 2)
SHIFT = 41


@dataclass(frozen=True)
class Setting:
    """One convention of RoPE and one order of the factors.

    Attributes:
        order: p; a row of B has p - 1 parts.
        layout: "half" or "interleaved".
        sign: -1 or 1.
        fraction: share of the features that turn.
    """

    order: int
    layout: str
    sign: int
    fraction: float


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors of one setting.

    Attributes:
        rows: RoPE on the rows of B against Q_t T_t on all heads.
        scores: logits of rotated factors against s Q_t T_{t-s} K_s^T.
        shift: logits against those with every position moved by the same number.
    """

    rows: float
    scores: float
    shift: float


def settings() -> Iterator[Setting]:
    """All orders, layouts and signs, with full and partial rotation."""
    for order in ORDERS:
        for layout in ("half", "interleaved"):
            for sign in (-1, 1):
                for fraction in (1.0, 0.5):
                    yield Setting(order, layout, sign, fraction)


def rotation_matrix(position: int, width: int, turning: int, setting: Setting) -> Tensor:
    """T_t of (3.4): a 2 x 2 rotation per pair of the leading features, the identity on the rest."""
    matrix = torch.eye(width, dtype=torch.float64)
    for i in range(turning // 2):
        angle = torch.tensor(position * 10000.0 ** (-2 * i / turning), dtype=torch.float64)
        x, y = (i, i + turning // 2) if setting.layout == "half" else (2 * i, 2 * i + 1)
        cos, sin = angle.cos(), setting.sign * angle.sin()
        matrix[x, x], matrix[y, x] = cos, -sin  # (q T)_x = q_x cos - q_y sin
        matrix[x, y], matrix[y, y] = sin, cos
    return matrix


def errors(setting: Setting, seed: int) -> Errors:
    """What rotating the factors does to random queries and keys at random positions.

    Args:
        setting: convention and order.
        seed: of the factors and positions.
    """
    generator = torch.Generator().manual_seed(seed)
    config = RopeConfig(layout=setting.layout, sign=setting.sign, fraction=setting.fraction)
    widths = ORDERS[setting.order]
    positions = torch.randperm(64, generator=generator)[:TOKENS]

    def draw(rank: int, width: int) -> Tensor:
        return torch.randn(1, TOKENS, rank, width, dtype=torch.float64, generator=generator)

    heads = [draw(rank, HEADS) for rank in RANKS]
    parts = [[draw(rank, width) for width in widths] for rank in RANKS]
    plain = [
        materialize(a, kronecker_rows(b))[0] for a, b in zip(heads, parts, strict=True)
    ]  # Q, K: (T, H, D)

    def turned(at: Tensor) -> list[Tensor]:
        return [kronecker_rows([rope(b[0], at, config), *b[1:]]) for b in parts]

    def logits(at: Tensor) -> Tensor:
        bq, bk = turned(at)
        return factored_logits(heads[0], bq, heads[1], bk)[0]

    def dense(position: int) -> Tensor:
        turn = rotation_matrix(position, widths[0], config.rotary_dim(widths[0]), setting)
        return torch.kron(torch.eye(prod(widths[1:]), dtype=torch.float64), turn)

    scale = prod(widths) ** -0.5
    rows = scores = 0.0
    rotated = [materialize(a, b)[0] for a, b in zip(heads, turned(positions), strict=True)]
    ours = logits(positions)
    for t, at in enumerate(positions.tolist()):
        for whole, turn in zip(plain, rotated, strict=True):
            rows = max(rows, _largest(turn[t] - whole[t] @ dense(at)))
        for s, other in enumerate(positions.tolist()):
            expected = scale * torch.einsum("hd,de,he->h", plain[0][t], dense(at - other), plain[1][s])
            scores = max(scores, _largest(ours[:, t, s] - expected))
    return Errors(rows, scores, _largest(logits(positions + SHIFT) - ours))


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())
