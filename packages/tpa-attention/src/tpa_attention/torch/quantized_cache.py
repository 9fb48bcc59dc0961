"""A factor cache in eight bits, read by the decode kernel as it lies.

A record is [B: R * D bytes | A: R * H bytes | pad to 16], and beside it one float32 per rank, the product of
the scales of its two rows (`quantization`). Keys and values exist in higher precision inside a tile of the
kernel alone. Bytes per token and side: R (D + H) + pad + 4 R, against 2 R (D + H) in bfloat16.

`decode` reads in place: the kernel on CUDA, elsewhere blocks of tokens, each in floating point for as long as
it is used. `append` answers layers that want all records, and for that returns them in the floating type, at
the price of reading the cache as if it were not quantised.

Source: Zhang et al. 2025 (arXiv 2501.06425), Section 3 (what is cached).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tpa_attention.config import ModelConfig
from tpa_attention.torch import arguments, blockwise, dispatch, ops
from tpa_attention.torch.cache import CacheLayout, FactorCache, layout_of
from tpa_attention.torch.factors import RecordLayout, logit_scale, rank_factor
from tpa_attention.torch.hidden_history import REWIND
from tpa_attention.torch.layers import TPAttention
from tpa_attention.torch.masks import split_mask
from tpa_attention.torch.model import attention
from tpa_attention.torch.quantization import TYPES, check_kind, quantize_factors


class QuantizedFactorCache(FactorCache):
    """`FactorCache` whose numbers take one byte each, and four bytes of scale per token, rank and side.

    Args:
        config: a `CacheLayout`, a `ModelConfig`, or a layer or model with the attribute `cache_layout`.
        batch: sequences, >= 1.
        max_len: capacity in tokens, >= 1.
        kind: "int8" or "fp8_e4m3".
        records: layouts of the K and V records, needed for a bare `CacheLayout`; those of the attention
            layers if None.
        device: where the buffers live; the default device if None.
        dtype: floating type that `append` returns; the default dtype if None.
        fixed_shape: as in `FactorCache`.
        rewind: as in `FactorCache`.

    Raises:
        TypeError: if `config` has no cache layout, the records are not known (a `CacheLayout`, or layers that
            cache no factors) or `dtype` is not floating.
        ValueError: if a number is out of range, `kind` is another word, or the records do not fit the layout.
    """

    def __init__(
        self,
        config: CacheLayout | ModelConfig | Any,
        batch: int,
        max_len: int,
        *,
        kind: str = "int8",
        records: tuple[RecordLayout, RecordLayout] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        fixed_shape: bool = False,
        rewind: int = REWIND,
    ) -> None:
        check_kind(kind)
        layout = layout_of(config)
        k_record, v_record = records or _records_of(config)
        if not isinstance(k_record, RecordLayout) or not isinstance(v_record, RecordLayout):
            raise TypeError(
                "records must be two RecordLayouts where config has no TPAttention layer, "
                f"got {records!r} with {type(config)}"
            )
        numbers = k_record.numbers, v_record.numbers
        if numbers != (layout.k_numbers, layout.v_numbers):
            raise ValueError(
                f"records must hold {layout.k_numbers} and {layout.v_numbers} numbers, got {numbers}"
            )
        self.kind = kind
        self.records = k_record, v_record
        super().__init__(layout, batch, max_len, device, dtype, fixed_shape=fixed_shape, rewind=rewind)

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        super()._allocate(device, dtype)
        self._dtype = dtype
        layers = range(self.layout.num_layers)
        rows = (self.batch, self.max_len)
        with torch.inference_mode(False):
            # float8 lacks indexed writes on some devices, so all bytes are kept as int8
            widths = self.layout.widths(torch.int8)
            self._k, self._v = (
                [torch.zeros(*rows, width, device=device, dtype=torch.int8) for _ in layers]
                for width in widths
            )
            self._k_scale, self._v_scale = (
                [torch.ones(*rows, _scales_per_token(record), device=device) for _ in layers]
                for record in self.records
            )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the records that `append` takes and returns."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all records and scales, padding included."""
        return super().nbytes + sum(s.numel() * s.itemsize for s in (*self._k_scale, *self._v_scale))

    @torch.no_grad()
    def append(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B M Pk"], Float[Tensor, "B M Pv"], Int[Tensor, " B"] | None]:
        """`write`, and then the records of all tokens in `dtype`, with their number per sequence or None."""
        lengths = self.write(layer, k, v, positions)
        return *self.read(layer, 0, self.extent(layer)), lengths

    @torch.no_grad()
    def write(
        self,
        layer: int,
        k: Float[Tensor, "B T Wk"],
        v: Float[Tensor, "B T Wv"],
        positions: Int[Tensor, "B T"] | None = None,
    ) -> Int[Tensor, " B"] | None:
        """Quantise T records and write them behind those of each sequence; return the lengths or None.

        Raises:
            IndexError: if there is no such layer.
            ValueError: if a shape does not fit, or the tokens do not; nothing has been written then.
        """
        self._check_layer(layer)
        for name, records, numbers in (("k", k, self.layout.k_numbers), ("v", v, self.layout.v_numbers)):
            self._check_records(name, records, numbers, max(numbers, records.shape[-1]), k.shape[1])
        self._check_room(layer, k.shape[1])
        place = self._lengths[layer][:, None] + torch.arange(k.shape[1], device=self.device)
        (k, k_scale), (v, v_scale) = (
            self._packed(record, x) for record, x in zip(self.records, (k, v), strict=True)
        )
        self._write(self._k_scale[layer], k_scale, place, layer)  # counted with the records, which come next
        self._write(self._v_scale[layer], v_scale, place, layer)
        return super().append(layer, k, v, positions)[2]

    def extent(self, layer: int, new: int = 0) -> int:
        """M, the keys that masks speak of, once `new` more tokens are written."""
        self._check_layer(layer)
        return self.max_len if self.fixed_shape else self._used[layer] + new

    def valid(self, layer: int) -> Int[Tensor, " B"] | None:
        """Tokens of each sequence, the cache's own memory; None where all sequences are equally long."""
        self._check_layer(layer)
        return self._lengths[layer] if self.fixed_shape or self._ragged[layer] else None

    def read(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Records of K and V of the tokens in [first, last), in `dtype`."""
        self._check_layer(layer)
        k, v = (
            self._floating(record, buffer[layer][:, first:last], scales[layer][:, first:last])
            for record, buffer, scales in zip(self.records, (self._k, self._v), self._scales, strict=True)
        )
        return k, v

    def decodes(self, records: tuple[RecordLayout, RecordLayout]) -> bool:
        """Whether records of these layouts are those kept here, with both factors of K and V."""
        return records == self.records and all(record.has_a and record.has_b for record in records)

    def decode(
        self,
        layer: int,
        aq: Float[Tensor, "B N RQ H"] | None,
        bq: Float[Tensor, "B N RQ D"],
        records: tuple[RecordLayout, RecordLayout] | None = None,
        *,
        free_a: tuple[Tensor, Tensor] | None = None,
        attn_bias: Tensor | None = None,
        window: int | None = None,
        scale: float | None = None,
        rank_scale: bool = True,
        num_splits: int | None = None,
        impl: str = "auto",
    ) -> tuple[Float[Tensor, "B N H E"], Float[Tensor, "B N H"]]:
        """Attention of the newest N tokens, already written, to the layer's cache; read in place.

        Args:
            layer: index in [0, num_layers).
            aq: head factors of the queries, or None for a full Q in `bq`.
            bq: feature factors of the queries, rotated.
            records: layouts of the K and V records, if given those of the cache.
            free_a: None; records without A are not decoded in place.
            attn_bias: boolean (True = attend) or floating, broadcastable to (B, H, N, M) with M =
                `extent(layer)`.
            window: keys i with 0 <= t - i < window are seen.
            scale: factor of the logits, D^-0.5 if None.
            rank_scale: whether Q, K and V carry 1/R.
            num_splits: as in `tpa_decode`.
            impl: "auto", "blockwise" or "triton", as in `tpa_decode`.

        Returns:
            Outputs and log-sum-exps.

        Raises:
            ValueError: if the records lack a factor, or what is given does not fit.
        """
        self._check_layer(layer)
        k_record, v_record = self.records
        if free_a is not None or not self.decodes(self.records if records is None else records):
            raise ValueError(
                f"records must hold both factors of K and V to be decoded in place, and be {self.records}, "
                f"got {records}"
            )
        if impl not in ("auto", "blockwise", "triton"):
            raise ValueError(f"impl must be 'auto', 'blockwise' or 'triton', got {impl!r}")
        used, heads = self.extent(layer), k_record.heads
        arguments.check_mask("attn_bias", attn_bias, (*bq.shape[:1], heads, bq.shape[1], used), "B, H, N, M")
        if dispatch.chosen(impl, aq, bq) == "triton":
            factor = 1 / k_record.rank if rank_scale else 1.0
            return ops.decode(
                *(aq, bq, *self._bytes(layer, 0, used), self._lengths[layer]),
                bias=_expanded_bias(attn_bias, (*bq.shape[:1], heads, bq.shape[1], used)),
                window=window,
                scale=logit_scale(scale, bq.shape[-1]) * rank_factor(aq, rank_scale) * factor,
                out_scale=1 / v_record.rank if rank_scale else 1.0,
                k_scale=self._k_scale[layer][:, :used],
                v_scale=self._v_scale[layer][:, :used],
                num_splits=num_splits,
            )
        return blockwise.decode_loaded(
            *(aq, bq, lambda first, last: self._factors(layer, first, last)),
            (used, k_record.rank, v_record.rank, heads, v_record.width),
            seq_lens=self.valid(layer),
            attn_bias=attn_bias,
            window=window,
            scale=scale,
            rank_scale=rank_scale,
        )

    def _bytes(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A_K, B_K, A_V, B_V of these tokens as they lie."""
        parts = [
            part
            for record, buffer in zip(self.records, (self._k, self._v), strict=True)
            for part in _parts(record, buffer[layer][:, first:last].view(TYPES[self.kind]))
            if part is not None
        ]
        ak, bk, av, bv = parts
        return ak, bk, av, bv

    def _factors(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same in float32, with the scales in A."""
        ak, bk, av, bv = (part.to(torch.float32) for part in self._bytes(layer, first, last))
        k_scale, v_scale = (scales[layer][:, first:last].unsqueeze(-1) for scales in self._scales)
        return ak * k_scale, bk, av * v_scale, bv

    def reorder(self, beam_idx: Int[Tensor, " B"]) -> None:
        """Sequence i becomes what sequence `beam_idx[i]` was; see `FactorCache.reorder`."""
        super().reorder(beam_idx)
        index = beam_idx.to(self.device)
        for scales in self._scales:
            for scale in scales:
                scale.copy_(scale.index_select(0, index))

    def state_dict(self) -> dict[str, Tensor]:
        """As `FactorCache.state_dict`, with the bytes of the records as int8, and their scales."""
        state = super().state_dict()
        for layer, used in enumerate(self._lengths.amax(dim=1).tolist()):
            state[f"k_scale.{layer}"] = self._k_scale[layer][:, :used].clone()
            state[f"v_scale.{layer}"] = self._v_scale[layer][:, :used].clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over stored tokens of the same kind; see `FactorCache.load_state_dict`."""
        names = [f"{name}_scale.{layer}" for name in "kv" for layer in range(self.layout.num_layers)]
        scales = [state[name] for name in names]
        super().load_state_dict(state)
        for buffer, scale in zip([*self._k_scale, *self._v_scale], scales, strict=True):
            buffer[:, : scale.shape[1]] = scale

    @property
    def _scales(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._k_scale, self._v_scale

    def _packed(self, record: RecordLayout, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes of records as int8, and their scales."""
        if record.numbers == 0:
            return x.new_zeros(*x.shape[:2], 0, dtype=torch.int8), x.new_ones(*x.shape[:2], 0)
        a, b, scale = quantize_factors(*record.views(x), self.kind)
        given = [part.view(torch.int8).flatten(2) for part in (b, a) if part is not None]
        padding = record.padded(1) - record.numbers
        return torch.nn.functional.pad(torch.cat(given, dim=-1), (0, padding)), scale

    def _floating(self, record: RecordLayout, bytes_: Tensor, scale: Tensor) -> Tensor:
        """Records in `dtype`; the whole scale goes into A, or into B where there is no A."""
        if record.numbers == 0:
            return bytes_[..., :0].to(self.dtype)
        a, b = (
            None if part is None else part.to(torch.float32)
            for part in _parts(record, bytes_.view(TYPES[self.kind]))
        )
        if a is not None:
            a = a * scale.unsqueeze(-1)
        elif b is not None:
            b = b * scale.unsqueeze(-1)
        return record.pack(*(None if part is None else part.to(self.dtype) for part in (a, b)))


def _records_of(config: CacheLayout | ModelConfig | Any) -> tuple[RecordLayout | None, RecordLayout | None]:
    """Layouts of the K and V records of the attention layers of a configuration, a layer or a model."""
    if isinstance(config, ModelConfig):
        config = attention(config, device="meta", dtype=None, generator=None)
    modules = config.modules() if isinstance(config, torch.nn.Module) else ()
    layer = next((module for module in modules if isinstance(module, TPAttention)), None)
    return (None, None) if layer is None else (layer.k_record, layer.v_record)


def _scales_per_token(record: RecordLayout) -> int:
    """One per rank, none where the record holds nothing."""
    return record.rank if record.numbers else 0


def _expanded_bias(attn_bias: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask as the operator takes it: floating, expanded."""
    mask, bias = split_mask(attn_bias)
    if mask is not None:
        bias = torch.where(mask, 0.0, -torch.inf)
    return None if bias is None else bias.expand(shape)


def _parts(record: RecordLayout, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A and B inside records of one byte per number, as `RecordLayout.views` shows them in floating ones."""
    b, a = x[..., : record.b_numbers], x[..., record.b_numbers : record.numbers]
    return (
        a.unflatten(-1, (record.rank, record.heads)) if record.has_a else None,
        b.unflatten(-1, (record.rank, record.width)) if record.has_b else None,
    )
