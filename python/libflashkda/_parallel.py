# SPDX-License-Identifier: MIT
"""Context parallel: sequences that lie on several ranks of a torch.distributed group. docs/parallel.md explains it.

A state is stored as X = S^T [V, K]. A run of tokens takes X to X M + B. A slot is a contiguous range of tokens on one rank;
a rank has one, two (zigzag), more or none. Of a slot only its last sequence can go on elsewhere and only its first can come
from elsewhere, so each slot gives one summary [B; M] and waits for one state.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import _C
from ._backward import INPUT_OF, new_gradients
from ._torch import LIBRARY

_HEADER = 4  # floats in front of a message: magic, status (0 is good), rank, number of the call
_MAGIC = 1263.5
_EXCHANGES = ("auto", "allgather", "transposed", "chain", "exact")
_FINALS = ("local", "everywhere")
_REQUIRED = ("q", "k", "v", "g", "beta")
_INPUTS = (*_REQUIRED, "A_log", "dt_bias", "initial_state")


class _Slot:
    """rows: its sequences, (global index, begin, end). before, after: the slots with earlier tokens of its first sequence and
    with later ones of its last, in order; empty where that sequence begins or ends here. place: among its rank's slots."""

    def __init__(self, index: int, rank: int, begin: int, end: int):
        self.index, self.rank, self.begin, self.end = index, rank, begin, end
        self.rows: list[tuple[int, int, int]] = []
        self.before: list[_Slot] = []
        self.after: list[_Slot] = []
        self.place = self.first_row = 0


def _partition(tokens: Any, total: int, world: int) -> list[tuple[int, int]]:
    """(rank, tokens) of every slot, in the order of the sequence."""
    if tokens == "even":
        return [(r, total * (r + 1) // world - total * r // world) for r in range(world)]
    if tokens == "zigzag":
        count = 2 * world
        return [(min(i, count - 1 - i), total * (i + 1) // count - total * i // count) for i in range(count)]
    if isinstance(tokens, str):
        raise ValueError(f"tokens is {tokens!r}; expected 'even', 'zigzag', a number for each rank or (rank, number) pairs")
    slots = [pair if isinstance(pair, tuple) else (i, pair) for i, pair in enumerate(tokens)]
    slots = [(int(rank), int(count)) for rank, count in slots]
    if not all(0 <= rank < world and count >= 0 for rank, count in slots):
        raise ValueError(f"tokens is {tokens}; expected ranks from 0 to {world - 1} and numbers of 0 or more")
    if sum(count for _, count in slots) != total:
        raise ValueError(f"tokens adds up to {sum(count for _, count in slots)}; expected cu_seqlens's last value, {total}")
    return slots


class _Shape:
    """What all ranks have in common: sizes of a message follow from it."""

    def __init__(self, HV: int, H: int, K: int, V: int, k_first: bool, device: torch.device, options: str):
        self.HV, self.H, self.K, self.V, self.k_first, self.device, self.options = HV, H, K, V, k_first, device, options

    def key(self) -> tuple[Any, ...]:
        return (self.HV, self.H, self.K, self.V, self.k_first, self.device, self.options)

    def state(self, heads: int | None = None) -> tuple[int, int, int]:
        heads = self.HV if heads is None else heads
        return (heads, self.K, self.V) if self.k_first else (heads, self.V, self.K)

    def summary(self, heads: int | None = None) -> tuple[int, int, int]:
        heads = self.HV if heads is None else heads
        return (heads, self.K, self.V + self.K) if self.k_first else (heads, self.V + self.K, self.K)

    def split(self, summaries: Any) -> tuple[Any, Any]:
        """B and M of summaries [.., HV, V + K, K]."""
        return summaries.split([self.V, self.K], -1 if self.k_first else -2)


def _numbers(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


class ContextParallel:
    """Who has which tokens of a packed batch whose sequences may lie on several ranks.

    Every rank of the group makes one with the same arguments. It reads nothing from a device and communicates only in
    calls. Each rank then calls prefill(..., parallel=cp) with its own tokens, [1, cp.tokens, ..].

    Args:
        cu_seqlens: of all tokens of all ranks, [N + 1] values from 0 on that never fall: a list, or a tensor in host memory.
        group: a torch.distributed process group; None: the default one.
        tokens: "even": each rank has one range, of the same length or one token less; "zigzag": rank r has ranges r and
            2 W - 1 - r of 2 W; or the number of tokens of each rank, 0 among them; or (rank, number) pairs, any ranges in
            the order of the tokens.
        conv_size: of the short convolution, for halo().

    Attributes:
        tokens: how many this rank has; they lie in its tensors in the order of its ranges.
        cu_seqlens: int64 [rows + 1]: boundaries of this rank's rows, the sequences, or pieces of them, that it has.
        sequences: of each row, which of all sequences it belongs to.
        ends: of each row, whether its sequence ends here.
    """

    def __init__(self, cu_seqlens: Any, group: Any = None, tokens: Any = "even", conv_size: int = 4):
        ends = cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else list(cu_seqlens)
        if not ends or ends[0] != 0 or any(b < a for a, b in itertools.pairwise(ends)):
            raise ValueError(f"cu_seqlens is {ends[:8]}; expected values from 0 that never fall")
        self._start(group, conv_size)
        self._count = len(ends) - 1
        parts = _partition(tokens, ends[-1], self.world)
        begins = itertools.accumulate((count for _, count in parts), initial=0)
        self._slots = [_Slot(i, rank, begin, begin + count) for i, ((rank, count), begin) in enumerate(zip(parts, begins))]
        self._fingerprint = _numbers(repr((ends, parts)))
        self._place_rows(ends)
        self._finish()

    def _start(self, group: Any, conv_size: int) -> None:
        self.group, self.conv_size = group, conv_size
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._agreed: dict[Any, _Shape] = {}
        self._last: _Shape | None = None
        self._on_device: dict[Any, _OnDevice] = {}
        self._pending: list[tuple[Any, Any]] = []  # headers on their way from a GPU, and what says that they are here

    def _place_rows(self, ends: list[int]) -> None:
        full = [s for s in self._slots if s.end > s.begin]
        for n, (a, b) in enumerate(itertools.pairwise(ends)):
            if a == b:  # an empty sequence belongs to where it would begin
                home = next((s for s in full if s.begin <= a < s.end), full[-1] if full else self._slots[0])
                home.rows.append((n, a, a))
                continue
            on = [s for s in full if s.begin < b and a < s.end]
            for i, s in enumerate(on):
                s.rows.append((n, max(a, s.begin), min(b, s.end)))
                if i:
                    s.before = on[:i]
                if i + 1 < len(on):
                    s.after = on[i + 1:]

    def _finish(self) -> None:
        """What follows from the slots and their rows."""
        self._mine = [s for s in self._slots if s.rank == self.rank]
        by_rank = [[s for s in self._slots if s.rank == r] for r in range(self.world)]
        self._width = max(1, *map(len, by_rank))  # slots in a rank's message
        for slots in by_rank:
            for place, s in enumerate(slots):
                s.place = place
        boundaries, self.sequences, self.ends, at = [0], [], [], 0
        for s in self._mine:
            s.first_row = len(self.sequences)
            for i, (n, _, b) in enumerate(s.rows):
                self.sequences.append(n)
                self.ends.append(not (s.after and i + 1 == len(s.rows)))
                boundaries.append(at + b - s.begin)
            at += s.end - s.begin
        self.tokens = at
        self.cu_seqlens = torch.tensor(boundaries)

    @classmethod
    def of_fla(cls, context: Any, T: int) -> ContextParallel:
        """From what flash-linear-attention's build_cp_context() makes; T: tokens of this rank. It says how many ranks
        (zigzag: slots) the rank's own first and last sequence reach to, and no more: chains are numbers."""
        cp = cls.__new__(cls)
        cp._start(context.group, context.conv1d_kernel_size or 1)
        cp._count = None
        W, zigzag = cp.world, context.layout == "zigzag"
        owners = [*range(W), *reversed(range(W))] if zigzag else [*range(W)]
        length = T // 2 if zigzag else T
        cp._slots = [_Slot(i, rank, i * length, (i + 1) * length) for i, rank in enumerate(owners)]
        cp._fingerprint = _numbers(f"fla {context.layout}")
        before = context.pre_num_ranks_by_part if zigzag else (context.pre_num_ranks,)
        after = context.post_num_ranks_by_part if zigzag else (context.post_num_ranks,)
        ends = context.cu_seqlens_cpu
        ends = (context.cu_seqlens if ends is None else ends).tolist()
        at = 0
        for s, b, a in zip([s for s in cp._slots if s.rank == cp.rank], before, after):
            s.before, s.after = cp._slots[s.index - b:s.index], cp._slots[s.index + 1:s.index + 1 + a]
            inside = [x for x in ends if at <= x <= at + length]
            s.rows = [(0, x - at + s.begin, y - at + s.begin) for x, y in itertools.pairwise(inside)]
            at += length
        cp._finish()
        cp.cu_seqlens = torch.tensor(ends)
        return cp

    def take(self, x: Any, dim: int = 1) -> Any:
        """This rank's part of a tensor that has all tokens in a dimension."""
        return torch.cat([x.narrow(dim, s.begin, s.end - s.begin) for s in self._mine] or [x.narrow(dim, 0, 0)], dim)

    # ---- Collectives ------------------------------------------------------------------------------------------------

    def _gather(self, x: Any) -> Any:
        """x of every rank, [W, *x.shape]."""
        every = torch.empty(self.world * x.numel(), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(every, x.reshape(-1), group=self.group)
        return every.view(self.world, *x.shape)

    def _agree(self, shape: _Shape | None, failure: Exception | None, device: torch.device) -> _Shape:
        """Raises the same error on every rank if they differ in what makes their messages. Its own messages have one size
        whatever is wrong. On a GPU, which would have to wait for it, it runs once for every shape."""
        if device.type == "cuda" and self._last is not None and (shape is None or shape.key() in self._agreed):
            return self._last if shape is None else self._agreed[shape.key()]
        numbers = [0] * 6 if shape is None else [shape.HV, shape.H, shape.K, shape.V, int(shape.k_first),
                                                 _numbers(shape.options)]
        mine = [_numbers(_C.VERSION), self._fingerprint, *numbers, int(failure is not None)]
        rows = self._gather(torch.tensor(mine, device=device)).tolist()
        failed = [r for r, row in enumerate(rows) if row[-1]]
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(f"context parallel: rank {failed[0]} failed in front of the exchange; its own error says why")
        names = ["libflashkda's version", "the partition (cu_seqlens and tokens)", "HV", "H", "K", "V", "state_layout",
                 "gate, modes, exchange or what gradients are asked for"]
        for name, column in zip(names, zip(*rows)):
            if len(set(column)) > 1:
                shown = f": {list(column)}" if name in ("HV", "H", "K", "V") else ""
                raise ValueError(f"context parallel: {name} differs between ranks{shown}")
        assert shape is not None
        self._agreed[shape.key()] = self._last = shape
        return shape

    def check(self) -> None:
        """On CUDA: waits for the last exchange and raises what CPU tensors would have raised at once."""
        if self._pending:
            self._pending[-1][1].synchronize()
        self._check_pending()

    def _check_pending(self) -> None:
        while self._pending and self._pending[0][1].query():
            *headers, mine = self._pending.pop(0)[0].tolist()
            self._check_headers(headers, mine[3])

    def _check_headers(self, headers: list[list[float]], call: float) -> None:
        for i, (magic, status, rank, theirs) in enumerate(headers):
            if magic != _MAGIC or rank != i // self._width or theirs != call:
                raise RuntimeError(f"context parallel: what came from rank {i // self._width} is no summary of this call; "
                                   "the ranks are not in step")
            if status != 0:
                raise RuntimeError(f"context parallel: rank {i // self._width} failed in front of the exchange; its own "
                                   "error says why")

    def _look_at(self, headers: Any, at: _OnDevice) -> None:
        """Headers [W * width, 4] as they came. The host does not wait for a GPU's: check() reads them, or the next call."""
        if headers.device.type != "cuda":
            self._check_headers(headers.tolist(), at.call)
        elif not torch.cuda.is_current_stream_capturing():
            self._check_pending()
            copy = torch.empty((len(headers) + 1, _HEADER), pin_memory=True)
            copy.copy_(torch.cat([headers, at.header[:1]]), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((copy, event))

    def _tell(self, failed: bool | None, known: Exception | None) -> Exception | None:
        """After a chain, for the ranks that it has not told: the error of this rank if any rank failed. failed: did this one?
        None: it is not known on the host."""
        if failed is not None:
            for r, (status,) in enumerate(self._gather(torch.tensor([int(failed)])).tolist()):
                if status and known is None:
                    known = RuntimeError(f"context parallel: rank {r} failed in front of the exchange; its own error says why")
        return known

    def _at(self, device: torch.device) -> _OnDevice:
        if device not in self._on_device:
            self._on_device[device] = _OnDevice(self, device)
        return self._on_device[device]

    # ---- The short convolution --------------------------------------------------------------------------------------

    @torch.compiler.disable
    def halo(self, x: Any, past: Any = None) -> Any:
        """The conv_size - 1 inputs in front of each of this rank's rows, for a short convolution.

        Args:
            x: [1, tokens, C]: this rank's inputs of the convolution, or of the projection before it.
            past: [rows, conv_size - 1, C]: the inputs before sequences that begin here; None: zeros.

        Returns:
            [rows, conv_size - 1, C], differentiable with respect to x and past: of a sequence that comes from other ranks its
            last inputs there, from several ranks where their parts are shorter, and what stood in front of it; else `past`.
        """
        if self._count is None:
            raise ValueError("halo() is called with what fla's context says, which fla's own convolution takes")
        return _Halo.apply(x, past, self)

    def _halo_sources(self, size: int) -> tuple[list[Any], list[Any], list[Any]]:
        """Where rows come from. Each slot that goes on gives a tail, the last `size` inputs of its last sequence, with those of
        `past` where it begins here. tails: (place of the tail's row in [width, size], token of this rank). pasts: (place,
        row, place in `size`). heads: (row, place in `size`, number of the tail's row in [W, width, size])."""
        tails, pasts, heads, at = [], [], [], 0

        def begins(slot: _Slot) -> bool:
            return not slot.before or len(slot.rows) > 1

        for s in self._mine:
            at += s.end - s.begin
            _, begin, end = s.rows[-1] if s.rows else (0, 0, 0)
            for i in range(size if s.after else 0):
                place = s.place * size + size - 1 - i
                if i < end - begin:
                    tails.append((place, at - 1 - i))
                elif begins(s):
                    pasts.append((place, s.first_row + len(s.rows) - 1, size - 1 - i + end - begin))
            missing = size
            for j in reversed(s.before):
                _, begin, end = j.rows[-1]  # of the same sequence
                count = missing if begins(j) else min(missing, end - begin)
                for i in range(count):
                    number = (j.rank * self._width + j.place) * size + size - 1 - i
                    heads.append((s.first_row, missing - 1 - i, number))
                missing -= count
        return tails, pasts, heads

    # ---- Prefill ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def prefill(self, tensors: dict[str, Any], output_final_state: bool, options: dict[str, Any], exchange: str = "auto",
                final: str = "local") -> Any:
        """What flash_kda.prefill(parallel=) does: tensors and options by their names in the library."""
        if exchange not in _EXCHANGES:
            raise ValueError(f"exchange is {exchange!r}; expected {' or '.join(map(repr, _EXCHANGES))}")
        if final not in _FINALS:
            raise ValueError(f"final is {final!r}; expected {' or '.join(map(repr, _FINALS))}")
        if final == "everywhere" and self._count is None:
            raise ValueError("final is 'everywhere' with fla's context, which does not number all sequences; expected 'local'")
        device = getattr(tensors["q"], "device", torch.device("cpu") if self._last is None else self._last.device)
        shape = failure = None
        if self._count is None and exchange == "transposed":
            raise ValueError("exchange is 'transposed' with fla's context, which knows chains of this rank alone; expected "
                             "'auto', 'allgather' or 'chain'")
        differentiated = LIBRARY.differentiated(*map(tensors.get, _INPUTS))
        if exchange == "auto":
            exchange = ("allgather" if final == "everywhere" or 2 < self.world <= 4 else
                        "chain" if self.world == 2 else "allgather" if self._count is None else "transposed")
        try:
            shape = self._shape_of(tensors, options, f"{exchange} {final} {differentiated}")
        except Exception as error:  # the others are told, instead of left waiting
            failure = error
        shape = self._agree(shape, failure, device)
        call = _Call(self, shape, exchange, options)
        if differentiated and failure is None:
            out, states = _Prefill.apply(call, *map(tensors.get, _INPUTS))
        else:
            out, states = call.forward(tensors, failure)
        if final == "everywhere":
            states = _Everywhere.apply(states, self)
        return (out, states) if output_final_state else out

    def _shape_of(self, tensors: dict[str, Any], options: dict[str, Any], how: str) -> _Shape:
        for name in _REQUIRED:
            LIBRARY.check(tensors[name], name)
        q, v = tensors["q"], tensors["v"]
        if q.ndim != 4 or v.ndim != 4:
            raise ValueError(f"q has {q.ndim} dimensions and v has {v.ndim}; expected 4")
        if q.shape[0] != 1 or q.shape[1] != self.tokens:
            raise ValueError(f"q has shape {list(q.shape)}; expected [1, {self.tokens}, H, K], the tokens of rank {self.rank}")
        said = [options["gate"], options["beta_mode"], options["flags"], options["lower_bound"], options["scale"], how]
        return _Shape(v.shape[2], q.shape[2], q.shape[3], v.shape[3],
                      options["state_layout"] == _C.STATE_LAYOUTS["k_first"], q.device, repr(said))


class _OnDevice:
    """Index tensors and headers of a plan on one device."""

    def __init__(self, cp: ContextParallel, device: torch.device):
        def tensor(values: Any, dtype: Any = torch.int32) -> Any:
            return torch.tensor(values, dtype=dtype, device=device)

        W, width, mine = cp.world, cp._width, cp._mine
        incoming, outgoing = [-1] * width, [-1] * width
        for s in mine:
            if s.before:
                incoming[s.place] = s.first_row
            if s.after:
                outgoing[s.place] = s.first_row + len(s.rows) - 1
        self.cu_seqlens = cp.cu_seqlens.to(device)
        self.incoming_rows, self.outgoing_rows = tensor(incoming), tensor(outgoing)
        self.incoming = [(row, place) for place, row in enumerate(incoming) if row >= 0]
        self.outgoing = [(row, place) for place, row in enumerate(outgoing) if row >= 0]
        self.pairs = [(tensor([row for row, _ in pairs], torch.int64), tensor([place for _, place in pairs], torch.int64))
                      for pairs in (self.incoming, self.outgoing)]
        number = {s.index: s.rank * width + s.place for s in cp._slots}

        def padded(rows: list[list[int]]) -> Any:
            longest = max(1, *map(len, rows))
            return tensor([row + [-1] * (longest - len(row)) for row in rows])

        # Of the rank's own slots, for a rank that has all summaries.
        before, after = [[] for _ in range(width)], [[] for _ in range(width)]
        for s in mine:
            before[s.place] = [number[j.index] for j in s.before]
            after[s.place] = [number[j.index] for j in reversed(s.after)]
        self.chains = (padded(before), padded(after))
        self.own = tensor([[place] for place in range(width)])
        # Of all sequences that cross a border, for a rank that has all slots' summaries of some heads: what state each slot
        # waits for is that before some link. fla's context knows chains of the rank's own slots alone.
        walks = [[s, *s.after] for s in cp._slots if s.after and (not s.before or len(s.rows) > 1)]
        self.walks = []
        for there in (True, False):
            rows = [[number[s.index] for s in (walk if there else reversed(walk))] for walk in walks]
            at = [(r, i, n) for r, row in enumerate(rows) for i, n in enumerate(row) if i]
            self.walks.append((padded(rows) if rows else None, *(tensor([a[i] for a in at], torch.int64) for i in range(3))))
        self.header = torch.zeros(width, _HEADER, device=device)
        self.header[:, 0], self.header[:, 2] = _MAGIC, cp.rank
        self.call = 0.0

    def next_header(self, status: int) -> Any:
        self.call = (self.call + 1) % 2**20
        if self.call == 0:
            self.header[:, 3] = 0
        else:
            self.header[:, 3] += 1
        header = self.header.clone()
        header[:, 1] = status
        return header


def _fold(shape: _Shape, bias: Any, transitions: Any, chains: Any, adjoint: bool, states: Any = None, prefixes: Any = None,
          initial_state: Any = None) -> None:
    with torch.no_grad():
        LIBRARY.run(_C.fold, {"bias": bias, "transitions": transitions, "chains": chains, "initial_state": initial_state,
                              "states": states, "prefixes": prefixes},
                    {"flags": _C.FOLD_ADJOINT if adjoint else 0, "state_layout": int(shape.k_first)}, None)


class _Call:
    """One prefill and, if it is differentiated, what its backward needs."""

    def __init__(self, cp: ContextParallel, shape: _Shape, exchange: str, options: dict[str, Any]):
        self.cp, self.shape, self.exchange, self.options = cp, shape, exchange, options
        self.at = cp._at(shape.device)
        self.incoming: Any = None  # [width, HV, V, K]
        self.transitions: Any = None  # of all slots: of all heads, or of the rank's own
        self.own: Any = None  # of the rank's own slots

    def _empty(self, *shape: int) -> Any:
        return torch.empty(shape, device=self.shape.device)

    # ---- Forward ----------------------------------------------------------------------------------------------------

    def forward(self, tensors: dict[str, Any], failure: Exception | None) -> tuple[Any, Any]:
        cp, shape = self.cp, self.shape
        with torch.no_grad():
            if self.exchange == "exact":
                return self._run_in_turn(tensors, failure)
            half = None
            message = self._message(shape.summary())
            try:
                if failure is None:
                    half = self._begin(tensors, message[:, _HEADER:].unflatten(1, shape.summary()))
            except Exception as error:
                failure = error
            self._close(message, failure)
            self.own = shape.split(message[:, _HEADER:].unflatten(1, shape.summary()))[1]
            self.incoming = self._exchange(message, shape.summary(), failure)
            if failure is not None:
                raise failure
            return self._finish(half)

    def _message(self, shape: tuple[int, int, int]) -> Any:
        return torch.zeros(self.cp._width, _HEADER + shape[0] * shape[1] * shape[2], device=self.shape.device)

    def _close(self, message: Any, failure: Exception | None) -> None:
        """A rank that failed still sends a message of the size that others wait for."""
        if failure is not None:
            message.fill_(float("nan"))
        message[:, :_HEADER] = self.at.next_header(int(failure is not None))

    def _begin(self, tensors: dict[str, Any], summaries: Any) -> Any:
        cp, shape, at = self.cp, self.shape, self.at
        q, v, initial_state = tensors["q"], tensors["v"], tensors["initial_state"]
        rows = len(cp.sequences)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        dtype = torch.float32 if initial_state is None else initial_state.dtype
        final_state = torch.empty((rows, *shape.state()), dtype=dtype, device=q.device)
        call = {**tensors, "out": out, "final_state": final_state, "cu_seqlens": at.cu_seqlens,
                "incoming_rows": at.incoming_rows, "outgoing_rows": at.outgoing_rows, "summaries": summaries}
        workspace = self._workspace(_C.prefill_half_workspace_size, call)
        LIBRARY.run(_C.prefill_half, call, {**self.options, "phase": _C.PHASES["begin"]}, workspace)
        return call, workspace

    def _workspace(self, size: Any, call: dict[str, Any]) -> Any:
        size = LIBRARY.run(size, call, {**self.options, "phase": _C.PHASES["begin"]}, None)
        return torch.empty(max(size, 1), dtype=torch.uint8, device=self.shape.device)

    def _finish(self, half: Any) -> tuple[Any, Any]:
        call, workspace = half
        call["incoming"] = self.incoming
        LIBRARY.run(_C.prefill_half, call, {**self.options, "phase": _C.PHASES["finish"]}, workspace)
        return call["out"], call["final_state"]

    # ---- Exchange ---------------------------------------------------------------------------------------------------

    def _exchange(self, message: Any, part: tuple[int, int, int], failure: Exception | None, adjoint: bool = False) -> Any:
        """From each slot's message, a header and a summary of shape `part`, the state that each of the rank's slots waits
        for. adjoint: summaries are B' alone, and M's are those that were kept."""
        way = {"allgather": self._by_allgather, "transposed": self._by_transposing}.get(self.exchange, self._by_chain)
        try:
            return way(message, part, adjoint)
        except RuntimeError:
            if failure is None:
                raise
            raise failure from None

    def _parts(self, summaries: Any, adjoint: bool) -> Any:
        """B of summaries; keeps their M."""
        if adjoint:
            return summaries
        bias, self.transitions = self.shape.split(summaries)
        return bias

    def _by_allgather(self, message: Any, part: tuple[int, int, int], adjoint: bool) -> Any:
        cp, shape = self.cp, self.shape
        every = cp._gather(message).flatten(0, 1)
        cp._look_at(every[:, :_HEADER], self.at)
        bias = self._parts(every[:, _HEADER:].unflatten(1, part), adjoint)
        states = self._empty(cp._width, *shape.state())
        _fold(shape, bias, self.transitions, self.at.chains[adjoint], adjoint, states=states)
        return states

    def _by_transposing(self, message: Any, part: tuple[int, int, int], adjoint: bool) -> Any:
        """Summaries by heads: each rank gets those of every slot for some heads, finds the states in front of all slots and
        sends them back."""
        cp, shape = self.cp, self.shape
        W, width, (HV, rows, columns) = cp.world, cp._width, part
        shares = [HV * (i + 1) // W - HV * i // W for i in range(W)]
        h, one = shares[cp.rank], _HEADER + shares[cp.rank] * rows * columns
        header, body = message[:, :_HEADER], message[:, _HEADER:].unflatten(1, part)
        send = torch.cat([torch.cat([header, heads.flatten(1)], 1).flatten() for heads in body.split(shares, 1)])
        take = self._empty(W * width * one)
        dist.all_to_all_single(take, send, [width * one] * W, [width * (_HEADER + n * rows * columns) for n in shares],
                               group=cp.group)
        take = take.view(W * width, one)
        cp._look_at(take[:, :_HEADER], self.at)
        back = torch.zeros(W * width, *shape.state(h), device=message.device)
        chains, row, link, number = self.at.walks[adjoint]
        if h:
            bias = self._parts(take[:, _HEADER:].unflatten(1, (h, rows, columns)), adjoint)
            if chains is not None:
                prefixes = self._empty(*chains.shape, *shape.state(h))
                _fold(shape, bias, self.transitions, chains, adjoint, prefixes=prefixes)
                back[number] = prefixes[row, link]
        matrix = width * shape.K * shape.V
        states = self._empty(matrix * HV)
        dist.all_to_all_single(states, back.flatten(), [n * matrix for n in shares], [h * matrix] * W, group=cp.group)
        return torch.cat([heads.view(width, *shape.state(n)) for n, heads in
                          zip(shares, states.split([n * matrix for n in shares]))], 1)

    def _by_chain(self, message: Any, part: tuple[int, int, int], adjoint: bool) -> Any:
        """Each slot waits for the state before it and sends on the one after it."""
        cp, shape = self.cp, self.shape
        bias = self._parts(message[:, _HEADER:].unflatten(1, part), adjoint)
        transitions = self.own if adjoint else self.transitions
        states = self._empty(cp._width, *shape.state())
        status = message[:, 1].clone()

        def step(slot: _Slot, given: Any, header: Any) -> Any:
            place = slice(slot.place, slot.place + 1)
            if given is not None:
                states[place] = given
            after = self._empty(1, *shape.state())
            _fold(shape, bias[place], transitions[place], self.at.own[:1], adjoint, states=after,
                  initial_state=None if given is None else states[place])
            if header is not None:
                status[place] += header[1]
            return after, status[place]

        failed = self._hop(step, adjoint, lambda slot, given: states[slot.place:slot.place + 1].copy_(given))
        failed = cp._tell(bool(message[0, 1]) if status.device.type != "cuda" else None, failed)
        if failed is not None:
            raise failed
        return states

    def _hop(self, step: Any, adjoint: bool, keep: Any) -> Exception | None:
        """Walks the chains of all slots in order, or backwards. step(slot, state that came in or None, its header or None):
        the state to send on and a status; keep(slot, state): where nothing is sent on."""
        cp, shape = self.cp, self.shape
        size = shape.HV * shape.K * shape.V
        sending, failed, here = [], None, {}
        for s in reversed(cp._slots) if adjoint else cp._slots:
            source, target = (s.after[:1], s.before[-1:]) if adjoint else (s.before[-1:], s.after[:1])
            if s.rank != cp.rank or not (source or target):
                continue
            given = header = None
            if source:
                if source[0].rank == cp.rank:
                    message = here.pop(s.index)
                else:
                    message = self._empty(_HEADER + size)
                    dist.recv(message, group=cp.group, group_src=source[0].rank)
                given, header = message[_HEADER:].view(1, *shape.state()), message[:_HEADER]
                if header.device.type != "cuda":
                    magic, status, rank, call = header.tolist()
                    if magic != _MAGIC or rank != source[0].rank or call != self.at.call:
                        failed = failed or RuntimeError(f"context parallel: what came from rank {source[0].rank} is no state "
                                                        "of this call; the ranks are not in step")
                    elif status:
                        failed = failed or RuntimeError("context parallel: a rank failed in front of the exchange; its own "
                                                        "error says why")
            if not target:
                keep(s, given)
                continue
            state, status = step(s, given, header)
            message = torch.cat([self.at.header[0], state.flatten()])
            message[1] = float(failed is not None) + status.sum()
            if target[0].rank == cp.rank:
                here[target[0].index] = message
            else:
                sending.append((dist.isend(message, group=cp.group, group_dst=target[0].rank), message))
        for work, _ in sending:
            work.wait()
        return failed

    # ---- One after the other ----------------------------------------------------------------------------------------

    def _run_in_turn(self, tensors: dict[str, Any], failure: Exception | None) -> tuple[Any, Any]:
        """Each slot runs once, from its true state: as one process would."""
        cp, shape, at = self.cp, self.shape, self.at
        at.next_header(int(failure is not None))
        initial, rows = tensors["initial_state"], len(cp.sequences)
        v = tensors["v"]
        failures = [failure]
        out = final = None
        try:
            out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
            states = torch.zeros(rows, *shape.state(), device=shape.device)
            if initial is not None:
                states.copy_(initial)
            final = torch.empty((rows, *shape.state()), device=shape.device)
        except Exception as error:
            failures[0] = failures[0] or error
        self.incoming = torch.zeros(cp._width, *shape.state(), device=shape.device)
        offsets = dict(zip((s.index for s in cp._mine),
                           itertools.accumulate((s.end - s.begin for s in cp._mine), initial=0)))

        def step(slot: _Slot, given: Any, header: Any) -> Any:
            nan = torch.full((1, *shape.state()), float("nan"), device=shape.device)
            if given is not None:
                self.incoming[slot.place] = given[0]
            if failures[0] is not None:
                return nan, torch.ones(1, device=shape.device)
            try:
                self._run_slot(slot, tensors, out, states, final, offsets[slot.index])
            except Exception as error:
                failures[0] = error
                return nan, torch.ones(1, device=shape.device)
            last = slot.first_row + len(slot.rows)
            return final[last - 1:last], torch.zeros(1, device=shape.device)

        failed = self._hop(step, False, lambda slot, given: step(slot, given, None))
        for s in cp._mine:
            if failures[0] is None and s.rows and not (s.before or s.after):
                step(s, None, None)
        failed = cp._tell(failures[0] is not None if shape.device.type != "cuda" else None, failed)
        if failures[0] or failed:
            raise failures[0] or failed
        return out, final if initial is None else final.to(initial.dtype)

    def _run_slot(self, slot: _Slot, tensors: dict[str, Any], out: Any, states: Any, final: Any, offset: int) -> None:
        cp = self.cp
        length, first, last = slot.end - slot.begin, slot.first_row, slot.first_row + len(slot.rows)
        if slot.before:
            states[first] = self.incoming[slot.place]
        part = {name: tensors[name].narrow(1, offset, length) for name in _REQUIRED}
        ends = (cp.cu_seqlens[first:last + 1] - offset).to(self.shape.device)
        LIBRARY.run(_C.prefill, {**part, "A_log": tensors["A_log"], "dt_bias": tensors["dt_bias"],
                                 "out": out.narrow(1, offset, length), "cu_seqlens": ends,
                                 "initial_state": states[first:last], "final_state": final[first:last]}, self.options, None)

    # ---- Backward ---------------------------------------------------------------------------------------------------

    def backward(self, tensors: dict[str, Any], wanted: list[str], d_out: Any, d_final_state: Any) -> dict[str, Any]:
        """Gradients of the rank's inputs; those of A_log and dt_bias are sums over its own tokens."""
        cp, shape, at = self.cp, self.shape, self.at
        failure = None
        made: dict[str, Any] = {}
        half = None
        message = self._message(shape.state())
        summaries = message[:, _HEADER:].unflatten(1, shape.state())
        (into, into_place), (outof, outof_place) = at.pairs
        with torch.no_grad():
            try:
                if self.exchange == "exact":  # which has made no summaries
                    own = torch.zeros(cp._width, *shape.summary(), device=shape.device)
                    self._begin(tensors, own)
                    self.own = shape.split(own)[1]
                initial = self._initial_states(tensors["initial_state"], into, into_place)
                d_out = torch.zeros_like(tensors["v"]) if d_out is None else d_out.contiguous()
                d_final = None if d_final_state is None else d_final_state.float().contiguous()
                given = {name: tensor for name, tensor in tensors.items() if name != "initial_state"}
                made = new_gradients(LIBRARY, {**given, "initial_state": initial}, wanted, int(shape.k_first))
                call = {**given, "initial_state": initial, "cu_seqlens": at.cu_seqlens, "d_out": d_out,
                        "d_final_state": d_final, **made, "incoming_rows": at.incoming_rows,
                        "outgoing_rows": at.outgoing_rows, "summaries": summaries}
                workspace = self._workspace(_C.backward_half_workspace_size, call)
                LIBRARY.run(_C.backward_half, call, {**self.options, "phase": _C.PHASES["begin"]}, workspace)
                half = call, workspace
                border = self._empty(cp._width, *shape.state()).zero_()
                if d_final is not None and at.outgoing:  # of the state at the border, which the caller may have used
                    border[outof_place] = d_final[outof]
                    passed = torch.zeros_like(border)
                    _fold(shape, summaries, self.own, at.own, True, states=passed, initial_state=border)
                    summaries.copy_(passed)
            except Exception as error:
                failure = error
            self._close(message, failure)
            R = self._exchange(message, shape.state(), failure, adjoint=True)
            if failure is not None:
                raise failure
            call, workspace = half
            call["incoming"] = R + border
            LIBRARY.run(_C.backward_half, call, {**self.options, "phase": _C.PHASES["finish"]}, workspace)
            if "d_initial_state" in made and at.incoming:
                made["d_initial_state"][into] = 0  # which was not read
        return made

    def _initial_states(self, initial_state: Any, into: Any, place: Any) -> Any:
        rows = len(self.cp.sequences)
        states = torch.zeros(rows, *self.shape.state(), device=self.shape.device)
        if initial_state is not None:
            states.copy_(initial_state)
        if self.at.incoming:
            states[into] = self.incoming[place]
        return states


class _Prefill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> Any:
        tensors = dict(zip(_INPUTS, inputs))
        out, final_state = call.forward(tensors, None)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.call = call
        return out, final_state

    @staticmethod
    def backward(ctx: Any, d_out: Any, d_final_state: Any) -> Any:
        tensors = dict(zip(_INPUTS, ctx.saved_tensors))
        needed = dict(zip(_INPUTS, ctx.needs_input_grad[1:]))
        wanted = [name for name, of in INPUT_OF.items() if needed[of]]
        made = ctx.call.backward(tensors, wanted, d_out, d_final_state)
        of = {INPUT_OF[name]: gradient for name, gradient in made.items()}
        dtype = None if tensors["initial_state"] is None else tensors["initial_state"].dtype
        if "initial_state" in of:
            of["initial_state"] = of["initial_state"].to(dtype)
        return None, *map(of.get, _INPUTS)


class _Everywhere(torch.autograd.Function):
    """The final states of all sequences, on every rank, from those of each rank's rows."""

    @staticmethod
    def forward(ctx: Any, states: Any, cp: ContextParallel) -> Any:
        ctx.cp, ctx.rows = cp, states.shape[0]
        mine = torch.zeros(cp._count, *states.shape[1:], dtype=torch.float32, device=states.device)
        for row, (n, ends) in enumerate(zip(cp.sequences, cp.ends)):
            if ends:
                mine[n] = states[row]
        dist.all_reduce(mine, group=cp.group)  # each is one rank's, 0 elsewhere
        return mine.to(states.dtype)

    @staticmethod
    def backward(ctx: Any, d_states: Any) -> Any:
        cp = ctx.cp
        total = d_states.float().contiguous()
        dist.all_reduce(total, group=cp.group)
        mine = torch.zeros(ctx.rows, *total.shape[1:], device=total.device)
        for row, (n, ends) in enumerate(zip(cp.sequences, cp.ends)):
            if ends:
                mine[row] = total[n]
        return mine.to(d_states.dtype), None


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, past: Any, cp: ContextParallel) -> Any:
        size, C, rows = cp.conv_size - 1, x.shape[2], len(cp.sequences)
        if x.ndim != 3 or x.shape[:2] != (1, cp.tokens):
            raise ValueError(f"x has shape {list(x.shape)}; expected [1, {cp.tokens}, C]")
        tails, pasts, heads = cp._halo_sources(size)
        mine = x.new_zeros(cp._width * size, C)
        if tails:
            mine[[place for place, _ in tails]] = x[0, [token for _, token in tails]]
        if pasts and past is not None:
            tail, row, place = map(list, zip(*pasts))
            mine[tail] = past[row, place].to(x.dtype)
        every = cp._gather(mine).flatten(0, 1)
        result = x.new_zeros(rows, size, C) if past is None else past.clone()
        result[[s.first_row for s in cp._mine if s.before]] = 0
        if heads:
            row, place, number = map(list, zip(*heads))
            result[row, place] = every[number]
        ctx.cp, ctx.tails, ctx.pasts, ctx.heads, ctx.has_past = cp, tails, pasts, heads, past is not None
        return result

    @staticmethod
    def backward(ctx: Any, d: Any) -> Any:
        cp, size, C = ctx.cp, ctx.cp.conv_size - 1, d.shape[2]
        every = d.new_zeros(cp.world * cp._width * size, C)
        if ctx.heads:
            row, place, number = map(list, zip(*ctx.heads))
            every.index_put_((torch.tensor(number, device=d.device),), d[row, place], accumulate=True)
        dist.all_reduce(every, group=cp.group)
        mine = every.view(cp.world, cp._width * size, C)[cp.rank]
        dx = d.new_zeros(1, cp.tokens, C)
        if ctx.tails:
            dx[0, [token for _, token in ctx.tails]] = mine[[place for place, _ in ctx.tails]]
        d_past = None
        if ctx.has_past:
            d_past = d.clone()
            d_past[[s.first_row for s in cp._mine if s.before]] = 0
            if ctx.pasts:
                tail, row, place = map(list, zip(*ctx.pasts))
                d_past[row, place] += mine[tail]
        return dx, d_past, None
