# SPDX-License-Identifier: MIT
"""chunk_kda(): fla's interface, every flag of it."""

from __future__ import annotations

import inspect
import itertools

import libflashkda
import numpy
import pytest
import torch
from recurrence import assert_close, in_layout, make, solve

pytestmark = pytest.mark.usefixtures("no_grad")


def run(problem, device, **more):
    """chunk_kda() on a problem, its output and final states compared. Returns all that it returns."""
    here = problem.to(device)
    o = here.options
    expected, states, _ = solve(problem)
    more = {"output_final_state": True, **more}
    gate = {} if o["gate"] == "none" else {"A_log": o["A_log"], "dt_bias": o["dt_bias"].flatten()}
    results = libflashkda.chunk_kda(
        *here.inputs, scale=o.get("scale"), initial_state=o.get("initial_state"), cu_seqlens=o.get("cu_seqlens"),
        use_qk_l2norm_in_kernel=o["qk_norm"], use_gate_in_kernel=o["gate"] != "none",
        use_beta_sigmoid_in_kernel=o["beta_mode"] != "given", allow_neg_eigval=o["beta_mode"] == "twice_sigmoid",
        lower_bound=o.get("lower_bound") if o["gate"] == "sigmoid" else None,
        state_v_first=o["state_layout"] == "v_first", **gate, **more)
    description = libflashkda.prefill_describe(*here.inputs, **o)
    assert results[0].dtype == problem.q.dtype
    assert_close(results[0], expected, description)
    if more["output_final_state"]:
        assert results[1].dtype == torch.float32
        assert_close(results[1], in_layout(states, o["state_layout"]), description)
    else:
        assert results[1] is None
    return results


@pytest.mark.parametrize("gate, lower_bound", [("none", None), ("softplus", None), ("sigmoid", -5.0)])
@pytest.mark.parametrize("beta_mode", ["given", "sigmoid", "twice_sigmoid"])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("v_first", [True, False])
def test_flags(gate, lower_bound, beta_mode, qk_norm, v_first, device):
    problem = make(gate=gate, lower_bound=lower_bound, beta_mode=beta_mode, qk_norm=qk_norm, v_first=v_first,
                   initial_state=torch.float32, K=64, V=32)
    assert len(run(problem, device, safe_gate=gate == "sigmoid")) == 2


@pytest.mark.parametrize("more", [
    {"B": 2},
    {"H": 1, "HV": 4},
    {"lengths": [30, 0, 50]},
    {"dtype": torch.float32},
    {"dtype": torch.float16},
    {"K": 100, "V": 36},
    {"K": 256, "V": 64},
    {"scale": 0.25},
], ids=str)
def test_shapes_and_dtypes(more, device):
    run(make(**{"v_first": False, **more}), device, output_final_state=False)


@pytest.mark.library("fla")
def test_signature_is_flas():
    import fla.ops.kda

    theirs = inspect.signature(inspect.unwrap(fla.ops.kda.chunk_kda)).parameters
    ours = inspect.signature(libflashkda.chunk_kda).parameters
    shared = [(p.name, p.default) for p in theirs.values() if p.kind is not p.VAR_KEYWORD]
    assert [(p.name, p.default) for p in itertools.islice(ours.values(), len(shared))] == shared


def test_gate_parameters_of_other_shapes(device):
    """Checkpoints keep A_log as [1, 1, HV, 1]; dt_bias comes flat or not; a lower bound needs no A_log."""
    problem = make().to(device)
    A_log, dt_bias = problem.options["A_log"], problem.options["dt_bias"]
    flags = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    expected, _ = libflashkda.chunk_kda(*problem.inputs, **flags, A_log=A_log, dt_bias=dt_bias)
    again, _ = libflashkda.chunk_kda(*problem.inputs, **flags, A_log=A_log[None, None, :, None],
                                     dt_bias=dt_bias.flatten())
    assert torch.equal(again, expected)
    problem = make(gate="sigmoid", lower_bound=-3.0)
    problem.options.update(A_log=None, dt_bias=None)
    out, _ = libflashkda.chunk_kda(*problem.to(device).inputs, **flags, lower_bound=-3.0)
    assert_close(out, solve(problem)[0], libflashkda.prefill_describe(*problem.to(device).inputs, **problem.options))


def test_rows_that_are_not_contiguous_are_copied(device):
    problem = make(lengths=[20, 30]).to(device)
    flags = {**problem.options, "use_gate_in_kernel": True}
    del flags["gate"], flags["beta_mode"], flags["qk_norm"], flags["state_layout"]
    expected, _ = libflashkda.chunk_kda(*problem.inputs, **flags)
    views = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in problem.inputs[:4]]
    assert torch.equal(libflashkda.chunk_kda(*views, problem.beta, **flags)[0], expected)


def test_bf16_initial_state(device):
    problem = make(initial_state=torch.bfloat16, v_first=False)
    run(problem, device)


# ---- Intermediate states -------------------------------------------------------------------------


def expected_states(problem, chunk_size):
    """[chunks of all sequences, HV, .., ..]"""
    _, _, inner = solve(problem, every=chunk_size)
    return in_layout(numpy.array([state for sequence in inner for state in sequence]), problem.options["state_layout"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_size", [32, 64])
@pytest.mark.parametrize("v_first", [True, False])
@pytest.mark.parametrize("initial_state", [None, torch.float32])
def test_intermediate_states(dtype, chunk_size, v_first, initial_state, device):
    problem = make(B=2, T=150, V=32, dtype=dtype, v_first=v_first, initial_state=initial_state)
    _, _, h = run(problem, device, return_intermediate_states=True, chunk_size=chunk_size)
    chunks = -(-150 // chunk_size)
    assert h.shape[:2] == (2, chunks) and h.dtype == dtype
    expected = expected_states(problem, chunk_size)
    here = problem.to(device)
    assert_close(h.flatten(0, 1), expected, libflashkda.prefill_describe(*here.inputs, **here.options))


@pytest.mark.parametrize("lengths", [[64, 65, 0, 10, 128, 0], [0, 0], [0, 5], [200]])
@pytest.mark.parametrize("initial_state", [None, torch.float32])
@pytest.mark.parametrize("sizes_from", ["device", "cpu", "graph"])
def test_intermediate_states_of_packed_sequences(lengths, initial_state, sizes_from, device):
    problem = make(lengths=lengths, V=32, v_first=False, initial_state=initial_state)
    more = {"device": {}, "cpu": {"cu_seqlens_cpu": problem.options["cu_seqlens"]},
            "graph": {"use_graph": True, "max_num_seqs": len(lengths)}}[sizes_from]
    _, _, h = run(problem, device, return_intermediate_states=True, **more)
    rows = sum(-(-length // 64) for length in lengths)
    if sizes_from == "graph" and device == "cuda":
        assert h.shape[1] == -(-sum(lengths) // 64) + len(lengths) - 1
        h = h[:, :rows]
    assert h.shape == (1, rows, 2, 64, 32) and h.dtype == torch.bfloat16
    if rows:
        here = problem.to(device)
        description = libflashkda.prefill_describe(*here.inputs, **here.options)
        assert_close(h[0], expected_states(problem, 64), description)


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("exception, message, more", [
    (NotImplementedError, "cp_context", {"cp_context": object(), "return_intermediate_states": True}),
    (TypeError, "^cp_context is of type", {"cp_context": object()}),
    (ValueError, "^A_log is None", {"use_gate_in_kernel": True}),
    (ValueError, "^lower_bound is None",
     {"use_gate_in_kernel": True, "safe_gate": True, "A_log": torch.zeros(2)}),
    (ValueError, "^lower_bound is -6", {"use_gate_in_kernel": True, "lower_bound": -6.0}),
    (ValueError, "^allow_neg_eigval", {"allow_neg_eigval": True}),
    (ValueError, "^chunk_size is 16", {"chunk_size": 16}),
    (ValueError, "^state_v_first", {"state_v_first": True, "transpose_state_layout": True}),
    (ValueError, "^cu_seqlens has 2 values", {"cu_seqlens": torch.tensor([0, 70]), "use_graph": True,
                                               "max_num_seqs": 2}),
    (TypeError, "head_first", {"head_first": True}),
    (ValueError, "^initial_state has shape", {"initial_state": torch.zeros(3, 2, 64, 64)}),
    (ValueError, "^initial_state has shape", {"initial_state": torch.zeros(3, 2, 64, 64), "output_final_state": True,
                                              "return_intermediate_states": True, "cu_seqlens": torch.tensor([0, 70])}),
    (ValueError, "^dt_bias has ", {"use_gate_in_kernel": True, "A_log": torch.zeros(2), "dt_bias": torch.zeros(5)}),
], ids=str)
def test_refused(exception, message, more):
    problem = make()
    with pytest.raises(exception, match=message):
        libflashkda.chunk_kda(*problem.inputs, **more)


def test_former_name_of_state_v_first():
    problem = make(V=32)
    with pytest.deprecated_call():
        _, state = libflashkda.chunk_kda(*problem.inputs, transpose_state_layout=True, output_final_state=True)
    assert state.shape == (1, 2, 32, 64)
