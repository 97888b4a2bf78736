# SPDX-License-Identifier: MIT
"""fwd() and get_workspace_size(): FlashKDA's interface, and what is accepted beyond it."""

from __future__ import annotations

import inspect
import math

import libflashkda
import numpy
import pytest
import torch
from recurrence import assert_close, captured, in_layout, make, solve

pytestmark = pytest.mark.usefixtures("no_grad")


def test_signatures():
    """FlashKDA's, by name, order and default."""
    parameters = inspect.signature(libflashkda.fwd).parameters.values()
    assert [p.name for p in parameters] == ["q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias",
                                            "lower_bound", "initial_state", "final_state", "cu_seqlens"]
    assert [p.default for p in parameters][10:] == [None] * 3
    assert all(p.default is p.empty for p in list(parameters)[:10])
    assert str(inspect.signature(libflashkda.get_workspace_size)).startswith("(T_total: 'int', H: 'int', N: 'int' = 1)")


def flash_problem(**options):
    return make(**{"gate": "sigmoid", "beta_mode": "sigmoid", "qk_norm": True, "lower_bound": -5.0, "K": 128, "V": 128,
                   **options})


def run(problem, device, state_dtype=torch.float32, scale=None):
    """fwd() on a problem, its results compared. Returns them."""
    expected, states, _ = solve(problem)
    here = problem.to(device)
    o = here.options
    out = torch.empty_like(here.v)
    initial = o.get("initial_state")
    dtype = state_dtype if initial is None else initial.dtype
    final = torch.empty(states.swapaxes(-1, -2).shape, dtype=dtype, device=device)
    scale = problem.q.shape[-1] ** -0.5 if scale is None else scale
    assert libflashkda.fwd(*here.inputs, scale, out, o.get("A_log"), o.get("dt_bias"), o.get("lower_bound"), initial,
                           final, o.get("cu_seqlens")) is None
    description = libflashkda.prefill_describe(*here.inputs, **o)
    assert_close(out, expected, description)
    assert_close(final, in_layout(states, "v_first"), description)
    return out, final


@pytest.mark.parametrize("lengths", [None, [10, 60, 1, 40], [0, 30, 0]])
@pytest.mark.parametrize("initial_state", [None, torch.float32, torch.bfloat16])
def test_what_flashkda_takes(lengths, initial_state, device):
    run(flash_problem(B=1 if lengths else 2, lengths=lengths, initial_state=initial_state), device)


def test_captured(device):
    problem, expected, state = captured("sigmoid")
    out, final = run(problem, device)
    description = libflashkda.prefill_describe(*problem.to(device).inputs, **problem.to(device).options)
    assert_close(out, expected.double().numpy(), description)
    assert_close(final, state.double().numpy(), description)


@pytest.mark.parametrize("more", [
    {"gate": "softplus"},
    {"K": 64, "V": 64},
    {"K": 60, "V": 100},
    {"H": 2, "HV": 6},
    {"dtype": torch.float32},
    {"lower_bound": -0.5},
], ids=str)
def test_what_it_takes_beyond(more, device):
    if more.get("gate") == "softplus":
        more = {**more, "lower_bound": None}
    run(flash_problem(**more), device)


def test_without_gate_parameters(device):
    problem = flash_problem()
    problem.options.update(A_log=None, dt_bias=None)
    run(problem, device)


def test_int32_sequences_and_strides(device):
    problem = flash_problem(lengths=[20, 30])
    expected = run(problem, device)
    problem.options["cu_seqlens"] = problem.options["cu_seqlens"].int()
    problem.q, problem.k, problem.v, problem.g = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.q, problem.k, problem.v, problem.g))
    for x, y in zip(run(problem, device), expected):
        assert torch.equal(x, y)


def test_states_in_place_and_of_two_dtypes():
    problem = flash_problem(initial_state=torch.float32)
    out, final = run(problem, "cpu")
    again, state = torch.empty_like(out), problem.options["initial_state"].clone()
    libflashkda.fwd(*problem.inputs, 128**-0.5, again, problem.options["A_log"], problem.options["dt_bias"], -5.0, state,
                    state)
    assert torch.equal(again, out) and torch.equal(state, final)
    rounded = torch.empty_like(final, dtype=torch.bfloat16)
    libflashkda.fwd(*problem.inputs, 128**-0.5, again, problem.options["A_log"], problem.options["dt_bias"], -5.0,
                    problem.options["initial_state"], rounded)
    assert torch.equal(rounded, final.bfloat16())


def test_scale_zero_and_lower_bound_zero():
    problem = flash_problem(dtype=torch.float32)
    out = torch.full_like(problem.v, 7)
    libflashkda.fwd(*problem.inputs, 0, out, None, None, -5.0)
    assert (out == 0).all()
    libflashkda.fwd(*problem.inputs, 0.5, out, problem.options["A_log"], problem.options["dt_bias"], 0)
    never_forget = make(dtype=torch.float32, K=128, V=128, gate="none", scale=0.5)
    never_forget.q, never_forget.k, never_forget.v, never_forget.beta = problem.q, problem.k, problem.v, problem.beta
    never_forget.g = torch.zeros_like(problem.g)
    assert_close(out, solve(never_forget)[0], "fp32")


def test_numpy():
    problem = flash_problem(dtype=torch.float32)
    inputs = [x.numpy() for x in problem.inputs]
    out = numpy.empty_like(inputs[2])
    A_log, dt_bias = problem.options["A_log"].numpy(), problem.options["dt_bias"].numpy()
    libflashkda.fwd(*inputs, 1 / math.sqrt(128), out, A_log, dt_bias, -5.0)
    assert_close(torch.from_numpy(out), solve(problem)[0], "fp32")


def test_workspace_size(device):
    """Enough for every call with such sizes; what fwd() itself takes."""
    needed = 0
    for lengths in [[500], [499, 1], [250, 250]]:
        problem = flash_problem(lengths=lengths, H=3).to(device)
        needed = max(needed, libflashkda.prefill_workspace_size(*problem.inputs, **problem.options))
        if device == "cpu" and torch.cuda.is_available():
            continue  # the sizes are those of the GPU's backend there
        assert needed <= libflashkda.get_workspace_size(500, 3, len(lengths))
    assert libflashkda.get_workspace_size(T_total=0, H=1, N=1) >= 0


@pytest.mark.parametrize("sizes, name", [((-1, 1, 1), "T_total"), ((1, 0, 1), "H"), ((1, 1, 0), "N"),
                                         ((1, 1, 1 << 40), "N")])
def test_workspace_of_no_size(sizes, name):
    with pytest.raises(ValueError, match=rf"^{name} is "):
        libflashkda.get_workspace_size(*sizes)
