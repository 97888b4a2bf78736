# SPDX-License-Identifier: MIT
"""torch.compile and torch.export: one graph, the same bits."""

from __future__ import annotations

import subprocess
import sys

import libflashkda
import pytest
import torch
from recurrence import make
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


class Prefill(torch.nn.Module):
    def forward(self, q, k, v, g, beta, A_log, dt_bias, state):
        out, state = libflashkda.prefill(q * 1, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, gate="sigmoid",
                                         lower_bound=-5.0, beta_mode="sigmoid", qk_norm=True, initial_state=state,
                                         output_final_state=True)
        return out * 2, state


class ChunkKda(torch.nn.Module):
    def forward(self, q, k, v, g, beta, A_log, dt_bias, state):
        return libflashkda.chunk_kda(q * 1, k, v, g, beta, use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True,
                                     use_beta_sigmoid_in_kernel=True, A_log=A_log, dt_bias=dt_bias.flatten(),
                                     initial_state=state, output_final_state=True, return_intermediate_states=True)


class Fwd(torch.nn.Module):
    """Writes to what it made, and to an argument."""

    def forward(self, q, k, v, g, beta, A_log, dt_bias, state):
        out = torch.empty_like(v)
        libflashkda.fwd(q * 1, k, v, g, beta, 0.1, out, A_log, dt_bias, None, state, state)
        return out + 1


def arguments(device, T=70):
    problem = make(T=T, initial_state=torch.float32, K=64, V=64).to(device)
    options = problem.options
    return [*problem.inputs, options["A_log"], options["dt_bias"], options["initial_state"]]



def flatten(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("module", [Prefill, ChunkKda, Fwd])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_same_bits(module, backend, device):
    eager, recorded = arguments(device), arguments(device)
    expected = flatten(module()(*eager))
    results = flatten(torch.compile(module(), fullgraph=True, backend=backend)(*recorded))
    for x, y in zip(results, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    for x, y in zip(recorded, eager, strict=True):  # what was written, and what was not
        assert torch.equal(x, y)


def test_dynamic_shapes(device):
    compiled = torch.compile(Prefill(), fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (70, 90, 33):
        here = arguments(device, T)
        for x, y in zip(compiled(*here), Prefill()(*here), strict=True):
            assert torch.equal(x, y)


def test_state_pool_in_place(device):
    """One tensor is read and written through two arguments."""

    def step(pool, indices, *inputs):
        return libflashkda.prefill(*inputs, initial_state=pool, final_state=pool, state_indices=indices)[0]

    inputs = [x.contiguous() for x in make(B=2, gate="none", beta_mode="given").to(device).inputs]
    pools = [torch.ones(4, 2, 64, 64, device=device) for _ in range(2)]
    indices = torch.tensor([3, 1], dtype=torch.int32, device=device)
    expected = step(pools[0], indices, *inputs)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="inductor")(pools[1], indices, *inputs), expected)
    assert torch.equal(*pools)
    assert (pools[0][[0, 2]] == 1).all()


@pytest.mark.parametrize("module", [Prefill, ChunkKda, Fwd])
def test_export(module, device):
    eager, recorded = arguments(device), arguments(device)
    exported = torch.export.export(module(), tuple(recorded))
    results = flatten(exported.module()(*recorded))
    for x, y in zip(results, flatten(module()(*eager)), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(recorded, eager, strict=True):
        assert torch.equal(x, y)


def test_ops_are_well_formed(device):
    q, k, v, g, beta, A_log, dt_bias, state = arguments(device)
    options = {"gate": 2, "lower_bound": -5.0, "beta_mode": 1, "scale": 0.0, "flags": 1}
    torch.library.opcheck(torch.ops.libflashkda.prefill.default,
                          (q, k, v, g, beta, A_log, dt_bias, None, state, None, None, True), options)
    torch.library.opcheck(torch.ops.libflashkda.prefill_into.default,
                          (q, k, v, g, beta, A_log, dt_bias, torch.empty_like(v), None, state, torch.empty_like(state),
                           *[None] * 18), options)


@pytest.mark.parametrize("v_first", [True, False])
def test_fake_and_meta_tensors(v_first):
    problem = make(lengths=[20, 30], V=32, initial_state=torch.bfloat16, v_first=v_first)
    expected = libflashkda.prefill(*problem.inputs, **problem.options, output_final_state=True)
    meta = problem.to("meta")
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x) for x in problem.inputs]
        options = {name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                   for name, value in problem.options.items()}
        fake = libflashkda.prefill(*inputs, **options, output_final_state=True)
    for results in fake, libflashkda.prefill(*meta.inputs, **meta.options, output_final_state=True):
        for x, y in zip(results, expected, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()


def test_bad_input_of_a_compiled_call():
    here = arguments("cpu")
    here[3] = here[3][..., :60].contiguous()
    with pytest.raises(ValueError, match=r"g has shape \[1, 70, 2, 60\]"):
        torch.compile(Prefill(), fullgraph=True, backend="aot_eager")(*here)


LOAD = """
import {imports}
assert hasattr(torch.ops.libflashkda, "prefill") and hasattr(torch.ops.libflashkda, "decode")
program = torch.export.load({path!r}).module()
inputs = torch.load({inputs!r})
with torch.no_grad():
    expected = libflashkda.prefill(*inputs, gate="none")
    assert torch.equal(program(*inputs), expected)
"""


@pytest.mark.parametrize("imports", ["torch, libflashkda", "libflashkda, torch"])
def test_a_saved_program_runs_where_the_package_is_imported(imports, tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, *inputs):
            return libflashkda.prefill(*inputs, gate="none")

    inputs = make(gate="none", beta_mode="given").inputs
    path, data = str(tmp_path / "program.pt2"), str(tmp_path / "inputs.pt")
    torch.export.save(torch.export.export(Layer(), inputs), path)
    torch.save(inputs, data)
    subprocess.run([sys.executable, "-c", LOAD.format(imports=imports, path=path, inputs=data)], check=True)


def test_imported_before_torch():
    script = """
import libflashkda
import torch
def f(x, beta):
    return libflashkda.prefill(x, x, x, x, beta)
with torch.no_grad():
    x, beta = -torch.ones(1, 3, 1, 4), torch.ones(1, 3, 1)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="eager")(x, beta), f(x, beta))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
