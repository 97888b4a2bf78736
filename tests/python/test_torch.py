# SPDX-License-Identifier: MIT
"""What torch brings around a call: autocast, threads, streams, graphs, the caching allocator."""

from __future__ import annotations

import concurrent.futures

import libflashkda
import numpy
import pytest
import torch
from recurrence import assert_close, make, solve

pytestmark = pytest.mark.usefixtures("no_grad")


def test_autocast_changes_nothing(device):
    problem = make(dtype=torch.float32).to(device)
    expected = libflashkda.prefill(*problem.inputs, **problem.options)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(libflashkda.prefill(*problem.inputs, **problem.options), expected)


def test_threads(device):
    problems = [make(T=100 + i, seed=i).to(device) for i in range(4)]
    expected = [libflashkda.prefill(*p.inputs, **p.options) for p in problems]

    def work(i):
        with torch.no_grad():
            return [libflashkda.prefill(*problems[i].inputs, **problems[i].options) for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for results, right in zip(pool.map(work, range(4)), expected, strict=True):
            assert all(torch.equal(x, right) for x in results)


# ---- CUDA ----------------------------------------------------------------------------------------

A_SECOND = 1_500_000_000  #: in cycles


@pytest.mark.cuda
def test_current_stream_without_waiting():
    """The call queues after what its stream has still to do, and returns before that is done."""
    problem = make().to("cuda")
    expected = libflashkda.prefill(*problem.inputs, **problem.options)
    late = problem.v.clone().zero_()
    out = torch.empty_like(problem.v)
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_SECOND)
        late.copy_(problem.v)
        libflashkda.prefill(problem.q, problem.k, late, problem.g, problem.beta, **problem.options, out=out)
        done.record()
    assert not done.query()
    torch.cuda.default_stream().synchronize()  # where nothing of the call is
    assert not done.query()
    done.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.cuda
def test_page_locked_memory():
    problem = make()
    expected = libflashkda.prefill(*problem.inputs, **problem.options)
    pinned = [problem.q.pin_memory(), *problem.inputs[1:4], problem.beta.pin_memory()]
    assert torch.equal(libflashkda.prefill(*pinned, **problem.options), expected)


@pytest.mark.cuda
def test_streams_side_by_side():
    problems = [make(T=2000, seed=i, K=128, V=128).to("cuda") for i in range(3)]
    expected = [libflashkda.prefill(*p.inputs, **p.options) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results: list[list[torch.Tensor]] = [[] for _ in problems]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(libflashkda.prefill(*problems[i].inputs, **problems[i].options))
    torch.cuda.synchronize()
    for outs, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for out in outs)


@pytest.mark.cuda
@pytest.mark.parametrize("interface", ["prefill", "fwd", "chunk_kda"])
def test_graph_replay_with_other_sequences(interface):
    splits = [[100, 200, 0], [300, 0, 0], [1, 2, 297]]
    problem = make(lengths=splits[0], gate="sigmoid", lower_bound=-5.0, initial_state=torch.float32, K=128, V=128)
    here = problem.to("cuda")
    o = here.options
    out, state = torch.empty_like(here.v), torch.empty_like(o["initial_state"])
    captured = {}

    def call():
        if interface == "prefill":
            libflashkda.prefill(*here.inputs, **o, out=out, final_state=state)
        elif interface == "fwd":
            libflashkda.fwd(*here.inputs, 128**-0.5, out, o["A_log"], o["dt_bias"], -5.0, o["initial_state"], state,
                            o["cu_seqlens"])
        else:
            captured["results"] = libflashkda.chunk_kda(
                *here.inputs, initial_state=o["initial_state"], output_final_state=True, use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, lower_bound=-5.0, state_v_first=True,
                cu_seqlens=o["cu_seqlens"], A_log=o["A_log"], dt_bias=o["dt_bias"], return_intermediate_states=True,
                use_graph=True)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for lengths in splits:
        problem.options["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        o["cu_seqlens"].copy_(problem.options["cu_seqlens"])
        graph.replay()
        results = captured.get("results", (out, state, None))
        expected, states, inner = solve(problem, every=64)
        description = libflashkda.prefill_describe(*here.inputs, **o)
        assert_close(results[0], expected, description)
        assert_close(results[1], states.swapaxes(-1, -2), description)
        if interface == "chunk_kda":
            chunks = [kept.swapaxes(-1, -2) for sequence in inner for kept in sequence]
            assert_close(results[2][0, :len(chunks)], numpy.array(chunks), description)


@pytest.mark.cuda
def test_scratch_memory_is_torchs_and_goes_back():
    problem = make(T=5000, K=128, V=128).to("cuda")
    out = torch.empty_like(problem.v)

    def call():
        libflashkda.prefill(*problem.inputs, **problem.options, out=out)

    call()
    torch.cuda.synchronize()
    before, held = torch.cuda.memory_stats(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    size = libflashkda.prefill_workspace_size(*problem.inputs, **problem.options)
    assert torch.cuda.memory_allocated() == held
    assert torch.cuda.max_memory_allocated() >= held + size > held
    assert after["num_device_alloc"] == before["num_device_alloc"]
    assert torch.cuda.mem_get_info()[0] == free


@pytest.mark.cuda
@pytest.mark.parametrize("ends", [[0, 99999, 70], [0, -5, 70], [50, 20, 10], [0, 1 << 40, 1 << 50]])
def test_sequences_out_of_range_stay_within(ends):
    """The host does not read device memory; whatever it holds, nothing else is written."""
    problem = make(lengths=[30, 40]).to("cuda")
    problem.options["cu_seqlens"] = torch.tensor(ends, device="cuda")
    memory = torch.full((3, 70, 2, 64), 7.0, dtype=torch.bfloat16, device="cuda")
    states = torch.full((6, 2, 64, 64), 7.0, device="cuda")
    libflashkda.prefill(*problem.inputs, **problem.options, out=memory[1:2], final_state=states[2:4])
    torch.cuda.synchronize()
    assert (memory[[0, 2]] == 7).all() and (states[[0, 1, 4, 5]] == 7).all()


@pytest.mark.cuda
def test_out_of_memory():
    """Every byte but a few is taken: the workspace cannot be had."""
    problem = make(T=20000, H=8, K=128, V=128).to("cuda")
    out = torch.full_like(problem.v, 7)
    torch.cuda.empty_cache()
    size = libflashkda.prefill_workspace_size(*problem.inputs, **problem.options)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size // 2) / total)
    try:
        with pytest.raises(MemoryError, match="^workspace of [0-9]+ bytes on the device of q"):
            libflashkda.prefill(*problem.inputs, **problem.options, out=out)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (out == 7).all()
