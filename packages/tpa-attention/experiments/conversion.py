"""C10: attention layers as TPA, exactly and with fewer ranks than key-value heads.

    exact       R >= G: the converted layer is the same function of its input
    truncated   ||W - W^|| / ||W|| = sqrt(sum_{i>R} sigma_i^2 / sum sigma_i^2), W the h x (D d) heads

The singular values come from NumPy, and the error is that of the weights which the converted layer holds,
not what its report says; the report is compared beside.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tpa_attention.torch.baselines import GQA
from tpa_attention.torch.convert import mha_to_tpa
from tpa_attention.torch.layers import TPAttention

D_MODEL, HEADS, HEAD_DIM, TOKENS = 40, 8, 6, 29
GROUPS = {"MHA": 8, "GQA, 4 groups": 4, "GQA, 2 groups": 2, "MQA": 1}
# The worked weights W[i,j,l] = sin(1.1 i + 0.3 j (1+i) + 0.2 l^1.5), and their errors at ranks 1 to 4
WORKED_SHAPE = (6, 4, 10)
WORKED_ERRORS = (0.7879460349364, 0.4919142595083, 0.3266933050992, 0.0896671661666)


@dataclass(frozen=True)
class Truncation:
    """Errors of one rank.

    Attributes:
        rank: R of K and V.
        formula: from NumPy's singular values.
        held: of the weights in the converted layer.
        reported: by the conversion.
    """

    rank: int
    formula: float
    held: float
    reported: float

    @property
    def disagreement(self) -> float:
        """Largest relative difference to the formula."""
        return max(abs(error / self.formula - 1) for error in (self.held, self.reported))


@torch.no_grad()
def exact_error(groups: int, q_rank: int | None, seed: int) -> float:
    """Relative difference of outputs when the rank is the number of key-value heads (float64).

    Args:
        groups: G.
        q_rank: h to factor the queries too, None to leave them.
        seed: of weights and hidden states.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = GQA(
        *(D_MODEL, HEADS, HEAD_DIM, groups), zero_init_output=False, dtype=torch.float64, generator=generator
    )
    converted, _ = mha_to_tpa(
        *(layer.q.weight, layer.k.weight, layer.v.weight, layer.o.weight, HEADS, groups),
        k_rank=groups,
        v_rank=groups,
        q_rank=q_rank,
        rope=layer.rope,
    )
    x = torch.randn(2, TOKENS, D_MODEL, dtype=torch.float64, generator=generator)
    expected = layer(x)
    return float((converted(x) - expected).norm() / expected.norm())


def random_weights(seed: int) -> NDArray[np.float64]:
    """Heads (h, D, d) with singular values that fall by half from one to the next."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(HEADS, HEADS)))
    right, _ = np.linalg.qr(rng.normal(size=(HEAD_DIM * D_MODEL, HEADS)))
    heads = left * 0.5 ** np.arange(HEADS) @ right.T
    return heads.astype(np.float64).reshape(HEADS, HEAD_DIM, D_MODEL)


def worked_weights() -> NDArray[np.float64]:
    """The spec's example."""
    i, j, n = np.meshgrid(*map(np.arange, WORKED_SHAPE), indexing="ij")
    return np.sin(1.1 * i + 0.3 * j * (1 + i) + 0.2 * n**1.5)


@torch.no_grad()
def truncate(heads: NDArray[np.float64], rank: int) -> Truncation:
    """Keys and values of the given weights at a rank below h.

    Args:
        heads: (h, D, d).
        rank: R_K = R_V.
    """
    h, width, d = heads.shape
    flat = torch.from_numpy(heads.reshape(h * width, d))
    output = torch.zeros(d, h * width, dtype=torch.float64)
    layer, report = mha_to_tpa(flat, flat, flat, output, h, h, k_rank=rank, v_rank=rank)
    sigma = np.linalg.svd(heads.reshape(h, -1), compute_uv=False)
    formula = np.sqrt(np.square(sigma[rank:]).sum() / np.square(sigma).sum())
    found = held_weights(layer, rank)
    held = np.linalg.norm(heads - found) / np.linalg.norm(heads)
    return Truncation(rank, float(formula), float(held), report.layers[0].k.weight_error)


def held_weights(layer: TPAttention, rank: int) -> NDArray[np.float64]:
    """W^_i = (1/R) sum_r a_{r,i} V_r of the keys, from the layer's own parameters."""
    a = layer.a_k.rows(None)[0, 0].numpy()
    b = layer.b_k.matrix.numpy().reshape(rank, layer.head_dim, layer.d_model)
    return np.einsum("rh,rnd->hnd", a, b) / rank
