# SPDX-License-Identifier: MIT
"""How an engine marks its sequences: those that start from zero, padding that names a slot, int64 indices. Each call is
compared with one that says the same without."""

from __future__ import annotations

import libflashkda
import numpy
import pytest
import torch
from recurrence import Problem, make

pytestmark = pytest.mark.usefixtures("no_grad")

FRESH = [True, False, True, True]  # has_initial_state


def pools(problem, slots, device):
    """A pool of states with zeros where a sequence starts from zero, and the same with NaN there."""
    clean = torch.randn(6, *problem.options["initial_state"].shape[1:], generator=torch.Generator().manual_seed(1))
    marked = clean.clone()
    for slot, has in zip(slots, FRESH, strict=True):
        if not has and slot >= 0:
            clean[slot], marked[slot] = 0, torch.nan
    return clean.to(device), marked.to(device)


def problem_of(T, device):
    problem = make(B=4, T=T, initial_state=torch.float32).to(device)
    return problem, {name: value for name, value in problem.options.items() if name != "initial_state"}


def run(operation, problem, options, pool, **more):
    if operation == "decode":
        return libflashkda.decode(*problem.inputs, pool, **options, **more)
    return libflashkda.prefill(*problem.inputs, **options, initial_state=pool, final_state=pool, **more)[0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32])
@pytest.mark.parametrize("operation, T", [("prefill", 70), ("decode", 3)])
def test_sequences_from_zero(operation, T, dtype, device):
    problem, options = problem_of(T, device)
    slots = torch.tensor([5, 1, 3, 0], dtype=torch.int32, device=device)
    clean, marked = pools(problem, slots.tolist(), device)
    expected = run(operation, problem, options, clean, state_indices=slots)
    out = run(operation, problem, options, marked, state_indices=slots,
              has_initial_state=torch.tensor(FRESH, device=device).to(dtype))
    assert torch.equal(out, expected) and torch.equal(marked, clean)


@pytest.mark.parametrize("padding", [0, 4, 99])
@pytest.mark.parametrize("operation, T", [("prefill", 70), ("decode", 3)])
def test_padding_names_a_slot(operation, T, padding, device):
    problem, options = problem_of(T, device)
    clean, marked = (pools(problem, [5, 1, 3, 2], device)[0] for _ in range(2))
    narrow, wide = (torch.tensor([5, none, 3, none], device=device) for none in (-1, padding))
    outs = [torch.full_like(problem.v, 7.0) for _ in range(2)]
    run(operation, problem, options, clean, state_indices=narrow.int(), out=outs[0])
    run(operation, problem, options, marked, state_indices=wide, padding_slot=padding, out=outs[1])
    assert wide.dtype == torch.int64
    assert torch.equal(*outs) and torch.equal(marked, clean)
    assert (outs[1][[1, 3]] == 7).all()


def test_wide_indices_of_a_verification(device):
    problem, options = problem_of(2, device)
    narrow, wide = (pools(problem, [5, 1, 3, 0], device)[0] for _ in range(2))
    arguments = {"state_indices": torch.tensor([[0, 1], [2, -1], [4, 5], [-1, -1]], device=device),
                 "num_accepted_tokens": torch.tensor([2, 1, 1, 1], device=device),
                 "accepted": torch.tensor([1, 2, 0, 1], device=device)}
    outs = [torch.zeros_like(problem.v) for _ in range(2)]
    run("decode", problem, options, wide, **arguments, out=outs[0])
    run("decode", problem, options, narrow, **{name: x.int() for name, x in arguments.items()}, out=outs[1])
    assert torch.equal(*outs) and torch.equal(narrow, wide)


def test_numpy():
    problem, options = problem_of(70, "cpu")
    problem.q, problem.k, problem.v, problem.g, problem.beta = (x.float() for x in problem.inputs)
    slots = torch.tensor([5, 1, 3, 0])
    clean, marked = pools(problem, slots.tolist(), "cpu")
    expected = run("prefill", problem, options, clean, state_indices=slots, padding_slot=3)
    options = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    states = marked.numpy()
    out, _ = libflashkda.prefill(*(x.numpy() for x in problem.inputs), **options, initial_state=states, final_state=states,
                                 state_indices=slots.numpy(), padding_slot=3, has_initial_state=numpy.array(FRESH))
    rows = [0, 1, 3]
    assert numpy.array_equal(out[rows], expected.numpy()[rows]) and torch.equal(marked, clean)


@pytest.mark.library("jax")
def test_jax():
    import jax.numpy

    problem, options = problem_of(70, "cpu")
    clean, marked = pools(problem, [0, 1, 2, 3], "cpu")
    expected = libflashkda.prefill(*problem.inputs, **options, initial_state=clean[:4])
    options = {name: jax.numpy.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    inputs = [jax.numpy.asarray(x.float().numpy()).astype("bfloat16") for x in problem.inputs]
    out = libflashkda.prefill(*inputs, **options, initial_state=jax.numpy.asarray(marked[:4].numpy()),
                              has_initial_state=jax.numpy.asarray(FRESH))
    assert numpy.array_equal(numpy.asarray(out.astype("float32")), expected.float().numpy())


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("operation, T", [("prefill", 70), ("decode", 3)])
def test_compiled(operation, T, backend, device):
    torch.compiler.reset()
    problem, options = problem_of(T, device)
    weights = options.pop("A_log"), options.pop("dt_bias")
    slots, has = torch.tensor([5, 0, 3, 0], device=device), torch.tensor(FRESH, device=device)

    def step(pool, slots, has, out, A_log, dt_bias, *inputs):
        run(operation, Problem(*inputs), {**options, "A_log": A_log, "dt_bias": dt_bias}, pool, state_indices=slots,
            has_initial_state=has, padding_slot=0, out=out)
        return out * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        pool, out = pools(problem, [5, 1, 3, 0], device)[1], torch.zeros_like(problem.v)
        results.append((function(pool, slots, has, out, *weights, *problem.inputs), pool.nan_to_num()))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_gradients_from_zero_are_refused():
    problem, options = problem_of(70, "cpu")
    problem.q.requires_grad_()
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="has_initial_state is given where a gradient"):
        libflashkda.prefill(*problem.inputs, **options, initial_state=torch.zeros(4, 2, 64, 64),
                            has_initial_state=torch.tensor(FRESH))


@pytest.mark.parametrize("operation, T", [("prefill", 70), ("decode", 3)])
@pytest.mark.parametrize("more, exception, sentence", [
    ({"has_initial_state": torch.ones(3, dtype=torch.bool)}, ValueError, "has_initial_state has shape"),
    ({"has_initial_state": torch.ones(4)}, ValueError, "has_initial_state has dtype float32; expected int32, bool or int8"),
    ({"has_initial_state": FRESH}, TypeError, "has_initial_state is of type"),
    ({"padding_slot": -1}, ValueError, "padding_slot is -1; expected a slot"),
    ({"padding_slot": 0, "state_indices": None}, ValueError, "padding_slot is given without state_indices"),
    ({"padding_slot": 0.5}, TypeError, "padding_slot is 0.5; expected an integer"),
    ({"padding_slot": 1, "state_indices": torch.tensor([2, 2, 1, 0])}, ValueError, "a slot that is used twice"),
], ids=str)
def test_errors(more, exception, sentence, operation, T):
    problem, options = problem_of(T, "cpu")
    pool = torch.zeros(4, 2, 64, 64)
    with pytest.raises(exception, match=sentence):
        run(operation, problem, options, pool, **{"state_indices": torch.arange(4), **more})
    assert (pool == 0).all()


def test_no_flags_without_states():
    problem, options = problem_of(70, "cpu")
    with pytest.raises(ValueError, match="has_initial_state is given without initial_state"):
        libflashkda.prefill(*problem.inputs, **options, has_initial_state=torch.tensor(FRESH))
