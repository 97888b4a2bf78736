# SPDX-License-Identifier: MIT
"""MLA's attention: over whole heads for a prompt, and over the latents alone for the next token.

A way of decode() takes q [B, H, rank + rest], absorbed into the latents' space; latent [B, tokens, rank + rest], whose
first `rank` numbers are also the values; lengths int32 [B], on the device: how many tokens of each sequence count, one
at least; rank and scale. It returns [B, H, rank]. It reads no device memory on the host, so a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
from typing import Callable

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

try:
    import triton
    import triton.language as tl
except ImportError:  # on a CPU torch comes without it
    triton = None

Decode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [1, H, T, D] are the last of the tokens of k [1, H, S, D] and v [1, H, S, V]. Returns [1, H, T, V]."""
    width = v.shape[-1]
    v = functional.pad(v, (0, q.shape[-1] - width))  # torch's flash attention takes one head dim
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]),
                                                   scale=scale)[..., :width]


# ---- Ways to decode ------------------------------------------------------------------------------

def _counts(latent: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[B, tokens]: which tokens count."""
    return torch.arange(latent.shape[1], device=latent.device) < lengths[:, None]


def sdpa(q: torch.Tensor, latent: torch.Tensor, lengths: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """torch's scaled_dot_product_attention, by the backend that it chooses; all heads are queries of one key head."""
    keys = latent[:, None]
    return functional.scaled_dot_product_attention(q[:, None], keys, keys[..., :rank], scale=scale,
                                                   attn_mask=_counts(latent, lengths)[:, None, None])[:, 0]


PIECE = 1024  # tokens: a cache holds a multiple


def matmul(q: torch.Tensor, latent: torch.Tensor, lengths: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """Two batched matrix products, the second over pieces of the tokens so that it fills a GPU."""
    wide = {"out_dtype": torch.float32} if q.is_cuda else {}
    scores = torch.bmm(q, latent.mT, **wide).float().mul_(scale)
    scores.masked_fill_(~_counts(latent, lengths)[:, None], -torch.inf)
    weights = scores.softmax(-1).to(q.dtype).unflatten(2, (-1, PIECE)).transpose(1, 2)  # [B, pieces, H, PIECE]
    values = latent.unflatten(1, (-1, PIECE))[..., :rank]
    parts = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1), **wide)
    return parts.unflatten(0, weights.shape[:2]).sum(1, dtype=torch.float32).to(q.dtype)


def flash_mla(q: torch.Tensor, latent: torch.Tensor, lengths: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """DeepSeek's FlashMLA. A cache is its paged one, with pages of 64 tokens that lie in order."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    pages = latent.unflatten(1, (-1, 64)).flatten(0, 1)[:, :, None]
    table = torch.arange(len(pages), dtype=torch.int32, device=q.device).view(len(q), -1)
    metadata, splits = get_mla_metadata(lengths, q.shape[1], 1)
    out, _ = flash_mla_with_kvcache(q[:, None], pages, table, lengths, rank, metadata, splits, softmax_scale=scale)
    return out[:, 0]


if triton:

    @triton.jit(do_not_specialize=("heads", "pieces"))
    def _attend_piece(q, latent, lengths, partial, sums, log2_scale, heads, pieces, q_stride, latent_stride,
                      RANK: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):
        """One piece of a sequence: partial [B, pieces, heads, RANK], and sums: log2 of what its weights sum up to.

        Everything is transposed, tokens or columns by heads: 32 heads are few rows of a matrix instruction, and many
        columns."""
        piece, b = tl.program_id(0), tl.program_id(1)
        length = tl.load(lengths + b)
        share = tl.cdiv(tl.cdiv(length, pieces), TOKENS) * TOKENS
        first = piece * share
        last = tl.minimum(first + share, length)
        head, column, rest, token = tl.arange(0, HEADS), tl.arange(0, RANK), tl.arange(0, REST), tl.arange(0, TOKENS)
        there = (head < heads)[None, :]
        row = q + b * q_stride + head[None, :] * (RANK + REST)
        q_column = tl.load(row + column[:, None], mask=there, other=0.0)
        q_rest = tl.load(row + RANK + rest[:, None], mask=there, other=0.0)
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        out = tl.zeros([RANK, HEADS], tl.float32)
        for start in range(first, last, TOKENS):
            inside = (start + token < last)[:, None]
            tokens = latent + b.to(tl.int64) * latent_stride + (start + token).to(tl.int64)[:, None] * (RANK + REST)
            values = tl.load(tokens + column[None, :], mask=inside, other=0.0)
            others = tl.load(tokens + RANK + rest[None, :], mask=inside, other=0.0)
            scores = tl.dot(values, q_column, input_precision="ieee")
            scores = tl.dot(others, q_rest, scores, input_precision="ieee")
            scores = tl.where(inside, scores * log2_scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            weights = tl.exp2(scores - new_top[None, :])
            before = tl.exp2(top - new_top)
            total = total * before + tl.sum(weights, 0)
            out = tl.dot(tl.trans(values), weights.to(values.dtype), out * before[None, :], input_precision="ieee")
            top = new_top
        some = total > 0  # else the sequence has fewer pieces
        out = out / tl.where(some, total, 1.0)[None, :]
        place = (b.to(tl.int64) * pieces + piece) * heads + head
        tl.store(partial + place[None, :] * RANK + column[:, None], out, mask=there)
        tl.store(sums + place, tl.where(some, top + tl.log2(total), float("-inf")), mask=head < heads)

    @triton.jit(do_not_specialize=("heads", "pieces"))
    def _add_pieces(partial, sums, out, heads, pieces, RANK: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
                    AT_ONCE: tl.constexpr):
        head, b = tl.program_id(0), tl.program_id(1)
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        first = b.to(tl.int64) * pieces * heads + head  # pieces of a head lie `heads` apart
        every = tl.arange(0, PIECES)
        logs = tl.load(sums + first + every * heads, mask=every < pieces, other=float("-inf"))
        top = tl.max(logs, 0)
        total = tl.sum(tl.exp2(logs - top), 0)
        mean = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, pieces, AT_ONCE):
            piece = start + tl.arange(0, AT_ONCE)
            place = first + piece * heads
            weight = tl.exp2(tl.load(sums + place, mask=piece < pieces, other=float("-inf")) - top)
            part = tl.load(partial + place[:, None] * RANK + column[None, :], mask=(piece < pieces)[:, None], other=0.0)
            mean += tl.sum(weight[:, None] * part, 0)
        tl.store(out + (b * heads + head) * RANK + column, mean / total)


def _triton(q: torch.Tensor, latent: torch.Tensor, lengths: torch.Tensor, rank: int, scale: float, *, tokens: int,
            warps: int, stages: int, ctas: int) -> torch.Tensor:
    """A kernel in Triton that reads the latents once. ctas: as many pieces as give each multiprocessor so many CTAs."""
    B, H, width = q.shape
    q = q.contiguous()
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    pieces = max(1, min(ctas * processors // B, latent.shape[1] // tokens))
    partial = torch.empty(B, pieces, H, rank, dtype=torch.float32, device=q.device)
    sums = torch.empty(B, pieces, H, dtype=torch.float32, device=q.device)
    out = torch.empty(B, H, rank, dtype=q.dtype, device=q.device)
    _attend_piece[pieces, B](q, latent, lengths, partial, sums, scale * 1.4426950408889634, H, pieces, q.stride(0),
                             latent.stride(0), RANK=rank, REST=width - rank, HEADS=max(16, 1 << (H - 1).bit_length()),
                             TOKENS=tokens, num_warps=warps, num_stages=stages)
    columns = min(64, rank)
    _add_pieces[H, B, rank // columns](partial, sums, out, H, pieces, RANK=rank, COLUMNS=columns,
                                       PIECES=1 << (pieces - 1).bit_length(), AT_ONCE=16)
    return out


def ways() -> tuple[dict[str, Decode], dict[str, str]]:
    """Those that are at hand, by name; and why the others are not."""
    at_hand: dict[str, Decode] = {"matmul": matmul, "sdpa": sdpa}
    missing = {}
    if triton:
        for tokens, warps, stages, ctas in ((64, 4, 2, 1), (64, 4, 2, 4), (64, 8, 2, 1), (64, 8, 2, 4), (32, 4, 3, 2),
                                            (32, 4, 3, 8)):
            at_hand[f"triton, {tokens} tokens, {warps} warps, {stages} stages, {ctas} CTAs"] = functools.partial(
                _triton, tokens=tokens, warps=warps, stages=stages, ctas=ctas)
    else:
        missing["triton"] = "Triton is not installed"
    try:
        import flash_mla as _  # noqa: F401
        at_hand["flash_mla"] = flash_mla
    except ImportError as error:
        missing["flash_mla"] = f"FlashMLA is not at hand: {error}"
    return at_hand, missing
