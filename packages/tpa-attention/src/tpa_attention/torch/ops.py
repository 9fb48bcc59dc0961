"""The operators of the package in torch.library, so that torch.compile and torch.export see one node each.

    decode(aq, bq, ak, bk, av, bv, seq_lens=None, block_table=None, bias=None, window=None,
           scale=1.0, out_scale=1.0, k_scale=None, v_scale=None, num_splits=None) -> (out, lse)

This is the contract between `functional.py`, which checks what users pass, and the kernels, which read memory:

- N = 1..16 query tokens: aq (B, N, R_Q, H) and bq (B, N, R_Q, D), bq rotated; aq None: bq is Q itself, (B, N, H, D).
- Cached factors as views with any strides, nothing is copied: ak (B, M, R_K, H), bk (B, M, R_K, D), av (B, M, R_V, H),
  bv (B, M, R_V, E). `RecordLayout.views` gives them for records, `expand` for parts that no token carries.
- With block_table (B, blocks) int32 they are pages: (num_blocks, block_size, R, ...), and M = blocks * block_size.
- seq_lens (B,) integers on the device, None: all M tokens are valid. Query n stands at seq_len - N + n and sees
  itself and what precedes it, `window` keys at most. What lies past seq_len is never read.
- bias: floating, (B, H, N, M) by `expand`; enters once, -inf forbids.
- scale: the whole factor of the logits, s_Q s_K / sqrt(D). out_scale: s_V. Nothing is scaled a second time.
- k_scale (B, M, R_K), v_scale (B, M, R_V) float32, paged alike: the product of the scales of a row of A and of B,
  for quantised factors (int8, float8_e4m3fn); None: factors are as they are.
- num_splits: parts of the cache that are read in parallel; None: chosen from the shapes alone, so a CUDA graph
  can hold the call.
- out (B, N, H, E) has the dtype of bq; lse (B, N, H), natural logarithm of the scaled logits, is float32, float64
  for float64. A row without any valid key: 0 and -inf.

Source: Zhang et al. 2025 (arXiv 2501.06425), Algorithms 2-3.
"""
