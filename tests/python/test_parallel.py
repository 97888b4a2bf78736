# SPDX-License-Identifier: MIT
"""Sequences on several ranks: 2, 3 and 4 processes with gloo give what one process gives."""

import datetime
import itertools
import os
import time

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

import flash_kda  # noqa: E402

H, HV, K, V = 2, 4, 32, 24
LONG, PACKED, EVEN = [0, 200], [0, 37, 37, 61, 160, 161, 200, 200], [0, 50, 50, 62, 192, 192]
SIZES = {2: [150, 50], 3: [101, 1, 98], 4: [63, 2, 0, 135]}
EXCHANGES = ["allgather", "transposed", "chain", "exact"]


def problem(T, N, gate, dtype=torch.float32, seed=0):
    """The same on every rank. Slow gates, so that what comes from other ranks matters."""
    r = torch.Generator().manual_seed(seed)

    def n(*shape):
        return torch.randn(*shape, generator=r)

    g = n(1, T, HV, K) + (0 if gate == "none" else -6)
    if gate == "none":
        g = -0.01 * g.abs()
    x = [n(1, T, H, K), n(1, T, H, K), n(1, T, HV, V), g, n(1, T, HV)]
    weights = {} if gate == "none" else {"A_log": torch.rand(HV, generator=r), "dt_bias": 0.1 * n(HV, K)}
    options = {"gate": gate, "qk_norm": True, "beta_mode": "sigmoid", **({"lower_bound": -5.0} if gate == "sigmoid" else {})}
    return [t.to(dtype) for t in x], weights, options, 0.3 * n(N, HV, V, K)


def ratio(x, expected):
    x, expected = x.double(), expected.double()
    if not expected.numel():
        return 0.0
    return ((x - expected).square().mean() / expected.square().mean().clamp_min(1e-300)).sqrt().item()


def partitions(W):
    yield LONG, "even"
    yield LONG, SIZES[W]
    yield PACKED, SIZES[W]
    yield EVEN, "zigzag"
    yield PACKED, [(W - 1 - i % W, n) for i, n in enumerate([31, 6, 0, 70, 93])]  # any ranges, backwards


def with_poison(states, cp):
    """Rows that come from other ranks are not read."""
    rows = states[cp.sequences].clone()
    for s in cp._mine:
        if s.before:
            rows[s.first_row] = float("nan")
    return rows


def check_forward(W):
    for i, (cu, tokens) in enumerate(partitions(W)):
        gate = ["sigmoid", "softplus", "none"][i % 3]
        x, weights, options, initial = problem(cu[-1], len(cu) - 1, gate)
        options["state_layout"] = "k_first" if i % 2 else "v_first"
        if i % 2:
            initial = initial.mT.contiguous()
        out, final = flash_kda.prefill(*x, **weights, initial_state=initial, output_final_state=True,
                                       cu_seqlens=torch.tensor(cu), **options)
        cp = flash_kda.ContextParallel(cu, tokens=tokens)
        bits = []
        for exchange in [*EXCHANGES, "auto"]:
            mine, states = flash_kda.prefill(*map(cp.take, x), **weights, initial_state=with_poison(initial, cp),
                                             output_final_state=True, parallel=cp, exchange=exchange, **options)
            assert ratio(mine, cp.take(out)) < 1e-5, (tokens, exchange)
            for row, (n, ends) in enumerate(zip(cp.sequences, cp.ends)):
                assert not ends or ratio(states[row], final[n]) < 1e-5, (tokens, exchange)
            bits.append(mine)
        assert all(torch.equal(bits[0], other) for other in bits[1:3])
        _, states = flash_kda.prefill(*map(cp.take, x), **weights, initial_state=with_poison(initial, cp), parallel=cp,
                                      output_final_state=True, final="everywhere", **options)
        assert ratio(states, final) < 1e-5


def check_exact(W):
    """Ranges of whole chunks, one after the other: the bits of one process."""
    x, weights, options, initial = problem(32 * W + 7, 1, "softplus", torch.bfloat16)
    cp = flash_kda.ContextParallel([0, 32 * W + 7], tokens=[32] * (W - 1) + [39])
    out = flash_kda.prefill(*x, **weights, initial_state=initial, **options)
    mine = flash_kda.prefill(*map(cp.take, x), **weights, initial_state=initial[cp.sequences], parallel=cp,
                             exchange="exact", **options)
    assert torch.equal(mine, cp.take(out))


def check_backward(W):
    for i, (cu, tokens) in enumerate(partitions(W)):
        gate = ["softplus", "sigmoid", "none"][i % 3]
        x, weights, options, initial = problem(cu[-1], len(cu) - 1, gate)
        r = torch.Generator().manual_seed(7)
        d_out = torch.randn(1, cu[-1], HV, V, generator=r)
        d_final = torch.randn(initial.shape, generator=r)
        whole = [t.clone().requires_grad_() for t in (*x, *weights.values(), initial)]
        result = flash_kda.prefill(*whole[:5], **dict(zip(weights, whole[5:])), initial_state=whole[-1],
                                   output_final_state=True, cu_seqlens=torch.tensor(cu), **options)
        expected = torch.autograd.grad(result, whole, [d_out, d_final])
        cp = flash_kda.ContextParallel(cu, tokens=tokens)
        # A final state at a border is a result like any other: its gradient is added on the way.
        for exchange in EXCHANGES:
            mine = [t.clone().requires_grad_() for t in (*map(cp.take, x), *weights.values(), with_poison(initial, cp))]
            out, states = flash_kda.prefill(*mine[:5], **dict(zip(weights, mine[5:])), initial_state=mine[-1],
                                            output_final_state=True, parallel=cp, exchange=exchange, **options)
            d_states = d_final[cp.sequences]
            for row, ends in enumerate(cp.ends):
                if not ends:
                    d_states[row] = 0
            found = torch.autograd.grad([out, states], mine, [cp.take(d_out), d_states])
            for name, d, e in zip("qkvgb", found, expected):
                assert ratio(d, cp.take(e)) < 1e-5, (name, tokens, exchange)
            for d, e in zip(found[5:-1], expected[5:-1]):
                total = d.clone()
                dist.all_reduce(total)
                assert ratio(total, e) < 1e-4, (tokens, exchange)
            comes_in = [s.first_row for s in cp._mine if s.before]
            for row, n in enumerate(cp.sequences):
                assert ratio(found[-1][row], 0 * found[-1][row] if row in comes_in else expected[-1][n]) < 1e-5


def check_border_gradient(W):
    """The state at a border as a result: its gradient reaches the ranks before it."""
    T = 60
    x, weights, options, _ = problem(T, 1, "softplus")
    cp = flash_kda.ContextParallel([0, T], tokens="even")
    ends = torch.tensor([s.end for s in cp._slots])
    leaf = [t.clone().requires_grad_() for t in x]
    total = 0
    for e in ends.tolist():
        _, state = flash_kda.prefill(*[t[:, :e] for t in leaf], **weights, output_final_state=True, **options)
        total = total + state.square().sum()
    expected = torch.autograd.grad(total, leaf)
    for exchange in EXCHANGES:
        mine = [cp.take(t).clone().requires_grad_() for t in x]
        _, states = flash_kda.prefill(*mine, **weights, output_final_state=True, parallel=cp, exchange=exchange, **options)
        for d, e in zip(torch.autograd.grad(states.square().sum(), mine), expected):
            assert ratio(d, cp.take(e)) < 1e-5, exchange


def check_halo(W):
    for cu, tokens in [(LONG, SIZES[W]), (PACKED, SIZES[W]), (EVEN, "zigzag"), ([0, 9, 9, 12], [9] + [0] * (W - 2) + [3]),
                       ([0, 3 * W], [2] + [1] * (W - 2) + [2 * W])]:
        T, C = cu[-1], 5
        r = torch.Generator().manual_seed(1)
        x, past, d = torch.randn(1, T, C, generator=r), torch.randn(len(cu) - 1, 3, C, generator=r), None
        cp = flash_kda.ContextParallel(cu, tokens=tokens, conv_size=4)
        mine, mine_past = cp.take(x).requires_grad_(), past[cp.sequences].requires_grad_()
        halo = cp.halo(mine, mine_past)
        whole, whole_past = x.clone().requires_grad_(), past.clone().requires_grad_()
        expected = []
        for s in cp._mine:
            for n, a, _ in s.rows:
                row = torch.cat([whole_past[n], whole[0, cu[n]:a]])[-3:]
                expected.append(row)
        expected = torch.stack(expected) if expected else whole[0, :0, None].expand(0, 3, C) * 1
        assert torch.equal(halo, expected)
        d = torch.randn(W, 16, 3, C, generator=r)[cp.rank, :len(halo)]
        dx, d_past = torch.autograd.grad(halo, [mine, mine_past], d)
        # Every rank's share of the whole gradient, added.
        shares = torch.autograd.grad(expected, [whole, whole_past], d, allow_unused=True)
        shares = [torch.zeros_like(t) if s is None else s for s, t in zip(shares, (whole, whole_past))]
        for share in shares:
            dist.all_reduce(share)
        assert torch.allclose(dx, cp.take(shares[0]))
        begins = [row for s in cp._mine for row, _ in enumerate(s.rows, s.first_row) if row > s.first_row or not s.before]
        assert torch.allclose(d_past[begins], shares[1][cp.sequences][begins])


def check_fla(W):
    build = pytest.importorskip("fla.ops.cp").build_cp_context
    for layout, cu in itertools.product(["contiguous", "zigzag"], [[0, 192], [0, 50, 62, 150, 192]]):
        x, weights, options, initial = problem(192, len(cu) - 1, "softplus")
        leaf = [t.clone().requires_grad_() for t in x]
        out, final = flash_kda.prefill(*leaf, **weights, initial_state=initial, output_final_state=True,
                                       cu_seqlens=torch.tensor(cu), **options)
        d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        expected = torch.autograd.grad(out, leaf, d_out)
        plan = flash_kda.ContextParallel(cu, tokens="zigzag" if layout == "zigzag" else "even")
        context = build(torch.tensor(cu), dist.group.WORLD, conv1d_kernel_size=4, layout=layout)
        assert plan.cu_seqlens.tolist() == context.cu_seqlens.tolist()
        mine = [plan.take(t).clone().requires_grad_() for t in x]
        o, states = flash_kda.chunk_kda(*mine, cp_context=context, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
                                        use_beta_sigmoid_in_kernel=True, output_final_state=True,
                                        initial_state=initial[plan.sequences].mT, **weights)
        assert ratio(o, plan.take(out)) < 1e-5
        for row, (n, ends) in enumerate(zip(plan.sequences, plan.ends)):
            assert not ends or ratio(states[row].mT, final[n]) < 1e-5
        for d, e in zip(torch.autograd.grad(o, mine, plan.take(d_out)), expected):
            assert ratio(d, plan.take(e)) < 1e-5


def fails(f):
    """The sentence that a call ends with, and how long it took."""
    begin = time.monotonic()
    with pytest.raises((ValueError, RuntimeError, TypeError)) as raised:
        f()
    assert time.monotonic() - begin < 20
    return str(raised.value)


def check_failures(W):
    x, weights, options, _ = problem(60, 1, "sigmoid")
    rank = dist.get_rank()
    for exchange in EXCHANGES:
        cp = flash_kda.ContextParallel([0, 60])
        mine = [cp.take(t) for t in x]

        def run(plan=cp, tensors=None, **changed):
            tensors = mine if tensors is None else tensors
            return flash_kda.prefill(*tensors, **{**weights, **options, "exchange": exchange, "parallel": plan, **changed})

        # Ranks that differ in what makes their messages.
        narrow = [t[..., :K // 2].contiguous() if i in (0, 1, 3) else t for i, t in enumerate(mine)]
        bias = {"dt_bias": weights["dt_bias"][:, :K // 2].contiguous()}
        said = fails(lambda: run(tensors=narrow, **bias) if rank == 1 else run())
        assert "K differs between ranks: [32, 16" in said
        other = flash_kda.ContextParallel([0, 60], tokens=[40, 20] + [0] * (W - 2)) if rank == 0 else cp
        said = fails(lambda: run(other, [other.take(t) for t in x]))
        assert "partition" in said and "differs between ranks" in said
        said = fails(lambda: run(beta_mode="given" if rank == 1 else "sigmoid"))
        assert "modes" in said
        # A rank that fails by itself, in front of the exchange: before it is known what it would send, and after.
        said = fails(lambda: run(tensors=[t[:, :-1] for t in mine] if rank == 0 else mine))
        assert ("expected [1, " if rank == 0 else "rank 0 failed in front of the exchange") in said
        strange = [mine[0], mine[1].double(), *mine[2:]]
        said = fails(lambda: run(tensors=strange if rank == 1 else mine))
        assert "k has dtype float64" in said if rank == 1 else "failed in front of the exchange" in said, (exchange, said)
        run()  # and the group still works
    cp = flash_kda.ContextParallel([0, 60])
    assert "exchange is 'ring'" in fails(lambda: flash_kda.prefill(*mine, **weights, **options, parallel=cp, exchange="ring"))
    assert "out is given with parallel" in fails(
        lambda: flash_kda.prefill(*mine, **weights, **options, parallel=cp, out=mine[2]))
    assert "adds up to 59" in fails(lambda: flash_kda.ContextParallel([0, 60], tokens=[59] + [0] * (W - 1)))


CHECKS = [check_forward, check_exact, check_backward, check_border_gradient, check_halo, check_fla, check_failures]


def worker(rank, W, folder, checks):
    torch.set_num_threads(1)
    os.environ["FLASH_KDA_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=W,
                            timeout=datetime.timedelta(seconds=60))
    for check in checks:
        try:
            check(W)
        except pytest.skip.Exception:
            pass
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("W", [2, 3, 4])
def test_parallel(W, tmp_path):
    mp.spawn(worker, (W, str(tmp_path), CHECKS), W)


def dying(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3,
                            timeout=datetime.timedelta(seconds=20))
    x, weights, options, _ = problem(60, 1, "sigmoid")
    cp = flash_kda.ContextParallel([0, 60])
    call = [cp.take(t) for t in x]
    flash_kda.prefill(*call, **weights, **options, parallel=cp)
    if rank == 2:
        os._exit(0)
    fails(lambda: flash_kda.prefill(*call, **weights, **options, parallel=cp))
    os._exit(0)  # the group is lost


def test_a_dying_rank(tmp_path):
    mp.spawn(dying, (str(tmp_path),), 3)


def test_partitions_of_one_rank(tmp_path):
    """A group of one rank is the whole."""
    mp.spawn(alone, (str(tmp_path),), 1)


def alone(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    x, weights, options, initial = problem(100, 1, "sigmoid")
    cp = flash_kda.ContextParallel([0, 100])
    out = flash_kda.prefill(*x, **weights, **options, initial_state=initial)
    assert torch.equal(out, flash_kda.prefill(*x, **weights, **options, initial_state=initial, parallel=cp))
    for refused in ([], [1, 2], [0, 5, 3]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            flash_kda.ContextParallel(refused)
    with pytest.raises(ValueError, match="tokens is 'odd'"):
        flash_kda.ContextParallel([0, 100], tokens="odd")
    dist.destroy_process_group()
