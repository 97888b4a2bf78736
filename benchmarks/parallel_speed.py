# SPDX-License-Identifier: MIT
"""One sequence on several GPUs: is it right, and how long does it take beside one GPU?

usage: parallel_speed.py [--ranks N] [--cpu] [--quick] [--commit NAME] [-o FILE]

Needs torch, the package libflashkda and N (2) GPUs, which it drives by a process each and NCCL; --cpu: processes on the CPU
with gloo and small sizes, to try the script itself. First the proof: outputs, final states and gradients of all ranks beside
one GPU's and the fp64 oracle's. Then times: one GPU and N, for each exchange and for uneven parts; begin and finish apart;
the same step with a local copy in place of the exchange, whose difference is the share of communication; messages alone;
fla's cp_context beside it, where fla is installed. Writes benchmarks/results/DEVICE/parallel.json after every part
("complete" is false until the end); with --cpu or --quick nothing unless FILE is given. Exit status 1 if anything is wrong.
"""

import argparse
import datetime
import json
import pathlib
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import device
import flash_kda
from libflashkda import _parallel

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXCHANGES = ("allgather", "transposed", "chain", "exact")
MESSAGES = (2**19, 2**21, 2**22, 2**23, 3 * 2**22, 25 * 2**20)  # bytes of a rank
#: Error ratios to one GPU, both of which round products to bf16.
ALLOWED = {"out": 8e-3, "state": 8e-3, "gradient": 2e-2}
REGIMES = {"slow": (-7, 1), "captured-like": (-4, 2), "strong": (0, 1)}  # mean and deviation of the raw gate


def ratio(x, expected):
    x, expected = x.double(), expected.double()
    return ((x - expected).square().mean() / expected.square().mean().clamp_min(1e-300)).sqrt().item()


def problem(place, tokens, heads, regime, dtype=torch.bfloat16):
    """The same on every rank: made on the CPU's generator in one order."""
    r = torch.Generator(place).manual_seed(tokens + heads)
    mean, deviation = REGIMES[regime]

    def n(*shape):
        return torch.randn(*shape, generator=r, device=place)

    x = [n(1, tokens, heads, 128), n(1, tokens, heads, 128), n(1, tokens, heads, 128),
         mean + deviation * n(1, tokens, heads, 128), n(1, tokens, heads)]
    weights = {"A_log": torch.rand(heads, generator=r, device=place), "dt_bias": torch.zeros(heads, 128, device=place)}
    options = {"gate": "sigmoid", "lower_bound": -5.0, "qk_norm": True, "beta_mode": "sigmoid"}
    return [t.to(dtype) for t in x], weights, options


class Rank:
    """One process: its place, and the clock that all share."""

    def __init__(self, options, rank):
        self.options, self.rank, self.cuda = options, rank, not options.cpu
        self.place = torch.device("cuda", rank) if self.cuda else torch.device("cpu")
        self.results = {}

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def milliseconds(self, f, repeats=20):
        """Median of the slowest rank's times; every call starts behind a barrier."""
        times = []
        for i in range(repeats + 3):
            self.wait()
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                f()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                start = time.perf_counter()
                f()
                times.append((time.perf_counter() - start) * 1e3)
        times = torch.tensor(times[3:], device=self.place)
        dist.all_reduce(times, dist.ReduceOp.MAX)
        return times.median().item()

    def write(self, part, rows, complete=False):
        if self.rank:
            return
        self.results[part] = rows
        if self.options.path:
            self.options.path.write_text(json.dumps(
                {"commit": device.commit(self.options.commit), "date": datetime.date.today().isoformat(),
                 "ranks": dist.get_world_size(), "device": self.name(), "torch": torch.__version__, **self.results,
                 "complete": complete}, indent=2) + "\n")

    def name(self):
        return torch.cuda.get_device_name() if self.cuda else "cpu"

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)


def partitions(W):
    yield "even", "even"
    yield "zigzag", "zigzag"
    yield "uneven", [3] + [1] * (W - 1)


def prove(rank):
    """Outputs, states and gradients of all ranks beside one GPU's; outputs of a short problem beside the oracle's."""
    W, rows = dist.get_world_size(), []
    tokens, heads = (512, 2) if rank.options.cpu else (8192, 8)
    for regime in REGIMES:
        x, weights, options = problem(rank.place, tokens, heads, regime)
        leaf = [t.requires_grad_() for t in x]
        out, state = flash_kda.prefill(*leaf, **weights, **options, output_final_state=True)
        d_out = torch.randn(out.shape, generator=torch.Generator(rank.place).manual_seed(1), device=rank.place).to(out.dtype)
        expected = torch.autograd.grad(out, leaf, d_out)
        small, small_weights, _ = problem(rank.place, 256, 2, regime)
        oracle = flash_kda.prefill(*[t.cpu() for t in small], **{n: w.cpu() for n, w in small_weights.items()}, **options,
                                   backend="reference", out=torch.empty(1, 256, 2, 128))
        for (name, parts), exchange in ((p, e) for p in partitions(W) for e in EXCHANGES):
            shares = parts if isinstance(parts, str) else [tokens * s // sum(parts) for s in parts]
            if not isinstance(shares, str):
                shares[-1] = tokens - sum(shares[:-1])
            cp = flash_kda.ContextParallel([0, tokens], tokens=shares)
            mine = [cp.take(t.detach()).requires_grad_() for t in x]
            o, s = flash_kda.prefill(*mine, **weights, **options, output_final_state=True, parallel=cp, exchange=exchange)
            gradients = torch.autograd.grad(o, mine, cp.take(d_out))
            cp_small = flash_kda.ContextParallel([0, 256])
            o_small = flash_kda.prefill(*map(cp_small.take, small), **small_weights, **options, parallel=cp_small,
                                        exchange=exchange)
            cp.check()
            errors = [ratio(o, cp.take(out)), ratio(s[-1], state[0]) if cp.ends and cp.ends[-1] else 0.0,
                      max(ratio(g, cp.take(e)) for g, e in zip(gradients, expected)),
                      ratio(o_small.cpu(), cp_small.take(oracle))]
            worst = torch.tensor(errors, device=rank.place, dtype=torch.float64)
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            named = dict(zip(("out", "state", "gradient", "to_oracle"), worst.tolist()))
            passed = all(named[n] <= most for n, most in ALLOWED.items()) and named["to_oracle"] <= 1e-2
            rows.append({"regime": regime, "partition": name, "exchange": exchange, "passed": passed, **named})
            rank.say(f"{'ok  ' if passed else 'FAIL'} {regime:13} {name:7} {exchange:10} "
                     + ", ".join(f"{n} {e:.1e}" for n, e in named.items()))
    rank.write("proof", rows)
    return all(r["passed"] for r in rows)


def halves(rank, tokens, heads):
    """Begin and finish apart, on each GPU alone, of a range that comes in and goes on."""
    x, weights, options = problem(rank.place, tokens, heads, "slow")
    cp = flash_kda.ContextParallel([0, 3 * tokens], group=dist.new_group([rank.rank], use_local_synchronization=True),
                                   tokens=[(0, 3 * tokens)])
    s = cp._slots[0]
    # The middle of three ranges: a plan of one rank with both neighbours.
    s.end, s.rows = tokens, [(0, 0, tokens)]
    s.before = s.after = [s]
    cp._finish()
    from libflashkda._prefill import _options

    numbers = _options("sigmoid", -5.0, "sigmoid", True, None, "v_first", "auto", 0, False, 0)
    del numbers["checkpoint_every"]
    tensors = {**dict(zip(("q", "k", "v", "g", "beta"), x)), **weights, "initial_state": None}
    call = _parallel._Call(cp, cp._shape_of(tensors, numbers, ""), "allgather", numbers)
    summaries = torch.zeros(1, *call.shape.summary(), device=rank.place)
    call.incoming = torch.zeros(1, *call.shape.state(), device=rank.place)
    with torch.no_grad():
        whole = rank.milliseconds(lambda: flash_kda.prefill(*x, **weights, **options, output_final_state=True))
        half = call._begin(tensors, summaries)
        begin = rank.milliseconds(lambda: call._begin(tensors, summaries))
        finish = rank.milliseconds(lambda: call._finish(half))
    rank.say(f"halves of {tokens} tokens, {heads} heads: whole {whole:.3f} ms, begin {begin:.3f}, finish {finish:.3f}: "
             f"{(begin + finish) / whole:.3f} times")
    return {"tokens": tokens, "heads": heads, "whole_ms": whole, "begin_ms": begin, "finish_ms": finish}


def messages(rank):
    W, rows = dist.get_world_size(), []
    for size in MESSAGES[:2] if rank.options.cpu else MESSAGES:
        x = torch.zeros(size // 4, device=rank.place)
        every = torch.empty(W * size // 4, device=rank.place)
        peer = rank.rank ^ 1

        def hop():
            if rank.rank % 2 == 0 and peer < W:
                dist.send(x, peer)
            elif rank.rank % 2:
                dist.recv(x, peer)

        row = {"bytes": size,
               "allgather_us": 1e3 * rank.milliseconds(lambda: dist.all_gather_into_tensor(every, x)),
               "alltoall_us": 1e3 * rank.milliseconds(lambda: dist.all_to_all_single(every[:len(x) // W * W], x[:len(x) // W * W])),
               "send_us": 1e3 * rank.milliseconds(hop)}
        rows.append(row)
        rank.say(f"message of {size} bytes: all-gather {row['allgather_us']:.0f} us, all-to-all {row['alltoall_us']:.0f}, "
                 f"send {row['send_us']:.0f}")
    return rows


def steps(rank, tokens, heads, regime, backward):
    """One sequence: one GPU, then all, by exchange; and with a local copy in place of the exchange."""
    W, place = dist.get_world_size(), rank.place
    x, weights, options = problem(place, tokens, heads, regime)
    rows = []

    def step(tensors, **how):
        leaf = [t.detach().requires_grad_(backward) for t in tensors]
        out = flash_kda.prefill(*leaf, **weights, **options, **how)
        if backward:
            out.backward(out.detach())

    row = {"tokens": tokens, "heads": heads, "regime": regime, "backward": backward}
    one = rank.milliseconds(lambda: step(x))
    for parts in ["even"] + ([[61] + [39] * (W - 1)] if heads >= 64 and W == 2 else []):
        shares = parts if parts == "even" else [tokens * p // sum(parts) for p in parts]
        if parts != "even":
            shares[-1] = tokens - sum(shares[:-1])
        cp = flash_kda.ContextParallel([0, tokens], tokens=shares)
        mine = list(map(cp.take, x))
        for exchange in EXCHANGES:
            if exchange == "exact" and backward:
                continue
            ms = rank.milliseconds(lambda: step(mine, parallel=cp, exchange=exchange))
            found = {**row, "parts": parts, "exchange": exchange, "one_ms": one, "ms": ms, "efficiency": one / W / ms}
            if exchange == "allgather":
                gather, cp._gather = cp._gather, lambda m: m.expand(W, *m.shape).contiguous()
                look, cp._look_at = cp._look_at, lambda headers, at: None
                agree, cp._agree = cp._agree, lambda shape, failure, where: shape
                found["local_copy_ms"] = rank.milliseconds(lambda: step(mine, parallel=cp, exchange=exchange))
                cp._gather, cp._look_at, cp._agree = gather, look, agree
                found["communication"] = 1 - found["local_copy_ms"] / ms
            rows.append(found)
            rank.say(f"{tokens} tokens, {heads} heads, {regime}{', backward' if backward else ''}, {parts}, {exchange}: "
                     f"one {one:.3f} ms, {W} {ms:.3f} ms, efficiency {found['efficiency']:.0%}"
                     + (f", of it communication {found['communication']:.0%}" if "communication" in found else ""))
    return rows


def beside_fla(rank, tokens, heads):
    """fla's own kernels and ours, both with fla's context."""
    try:
        import fla.ops.kda
        from fla.ops.cp import build_cp_context
    except ImportError:
        rank.say("fla is not installed: not measured")
        return []
    x, weights, _ = problem(rank.place, tokens, heads, "slow")
    context = build_cp_context(torch.tensor([0, tokens], device=rank.place), dist.group.WORLD,
                               cu_seqlens_cpu=torch.tensor([0, tokens]))
    cp = flash_kda.ContextParallel([0, tokens])
    mine = list(map(cp.take, x))
    how = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
           "safe_gate": True, "lower_bound": -5.0, "cp_context": context, **weights}
    rows = []
    with torch.no_grad():
        for name, function in (("fla", fla.ops.kda.chunk_kda), ("libflashkda", flash_kda.chunk_kda)):
            ms = rank.milliseconds(lambda: function(*mine, **how))
            rows.append({"tokens": tokens, "heads": heads, "who": name, "ms": ms})
            rank.say(f"{tokens} tokens, {heads} heads, fla's context, {name}: {ms:.3f} ms")
    return rows


def run(index, options, store):
    if not options.cpu:
        torch.cuda.set_device(index)
    torch.set_num_threads(1)
    dist.init_process_group("gloo" if options.cpu else "nccl", init_method=f"file://{store}/store", rank=index,
                            world_size=options.ranks, timeout=datetime.timedelta(seconds=120))
    rank = Rank(options, index)
    good = prove(rank)
    small = options.cpu or options.quick
    sizes = [(256, 2)] if options.cpu else [(8192, 8)] if options.quick else [(8192, h) for h in (8, 16, 32, 64)]
    rank.write("halves", [halves(rank, *size) for size in sizes])
    rank.write("messages", messages(rank))
    cases = [(512, 2, "slow")] if options.cpu else [(16384, 8, "slow")] if options.quick else [
        (tokens, heads, regime) for tokens in (65536, 1048576) for heads in (8, 32, 64) for regime in REGIMES
        if tokens * heads <= 2**25]
    rank.write("prefill", [row for case in cases for row in steps(rank, *case, backward=False)])
    trained = cases if small else [(65536, 8, "slow"), (65536, 32, "slow")]
    rank.write("training", [row for case in trained for row in steps(rank, *case, backward=True)])
    if not options.cpu:
        rank.write("fla", [row for heads in (8, 32) for row in beside_fla(rank, 8192 * options.ranks, heads)])
    rank.write("passed", good, complete=True)
    dist.barrier()
    dist.destroy_process_group()
    if not good:
        sys.exit(1)


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[2].removeprefix("usage: "))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--commit")
    parser.add_argument("-o", dest="path", type=pathlib.Path)
    options = parser.parse_args()
    if not options.cpu and torch.cuda.device_count() < options.ranks:
        sys.exit(f"{torch.cuda.device_count()} GPUs are here; expected {options.ranks}, or --cpu")
    if not (options.path or options.cpu or options.quick):
        options.path = device.results({"name": torch.cuda.get_device_name()}) / "parallel.json"
    with tempfile.TemporaryDirectory() as store:
        mp.spawn(run, (options, store), options.ranks)


if __name__ == "__main__":
    main()
