"""C2's pairs: MHA, MQA and GQA by torch's own attention, and the same weights as tensor product attention.

Section 4 writes each of them as TPA with head factors that do not read the token, R = G ranks and
a_g = G mask_g; the G of 1/R cancels. The other side is matrix products, dense rotation matrices
(`rotation.py`) and `torch.nn.functional.scaled_dot_product_attention`: nothing of this package.
"""

from dataclasses import dataclass

import torch
from rotation import Setting, rotation_matrix
from torch import Tensor
from torch.nn import functional

from tpa_attention.torch.baselines import GQA

D_MODEL, HEADS, HEAD_DIM, TOKENS, BATCH = 48, 12, 8, 33, 2
GROUPS = {"MHA": 12, "MQA": 1, "GQA, 3 groups": 3, "GQA, 4 groups": 4}
PAPERS_ROTATION = Setting(order=2, layout="half", sign=-1, fraction=1.0)


@dataclass(frozen=True)
class Case:
    """One mechanism as TPA.

    Attributes:
        mechanism: a key of GROUPS.
        kv_only: whether Q stays unfactored; otherwise R_Q = h with a_i = h e_i.
        dtype: of weights and tokens.
    """

    mechanism: str
    kv_only: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """For figures and tables."""
        return f"{self.mechanism}, {'KV-only' if self.kv_only else 'R_Q = h'}"


def cases(dtype: torch.dtype) -> list[Case]:
    """Every mechanism with both forms of the query."""
    return [Case(mechanism, kv_only, dtype) for mechanism in GROUPS for kv_only in (False, True)]


@torch.no_grad()
def difference(case: Case, seed: int) -> float:
    """Largest absolute difference of the layers' outputs, which are of size 1.

    Args:
        case: the mechanism.
        seed: of the weights and the hidden states.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = GQA(
        *(D_MODEL, HEADS, HEAD_DIM, GROUPS[case.mechanism]),
        zero_init_output=False,
        dtype=torch.float64,
        generator=generator,
    ).to(case.dtype)
    x = torch.randn(BATCH, TOKENS, D_MODEL, dtype=torch.float64, generator=generator).to(case.dtype)
    ours = weights.as_tpa(kv_only=case.kv_only)(x)
    return float((ours - by_torch(weights, x)).abs().max())


def by_torch(weights: GQA, x: Tensor) -> Tensor:
    """The layer by torch's attention: heads, dense RoPE, softmax, W^O."""
    turns = torch.stack(
        [rotation_matrix(t, HEAD_DIM, HEAD_DIM, PAPERS_ROTATION) for t in range(x.shape[1])]
    ).to(x.dtype)

    def heads(linear: torch.nn.Linear) -> Tensor:
        return (x @ linear.weight.T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)  # (B, heads, T, D)

    q, k = (torch.einsum("bhtd,tde->bhte", heads(linear), turns) for linear in (weights.q, weights.k))
    out = functional.scaled_dot_product_attention(
        q, k, heads(weights.v), is_causal=True, enable_gqa=weights.num_kv_heads < HEADS
    )
    return out.transpose(1, 2).flatten(2) @ weights.o.weight.T
