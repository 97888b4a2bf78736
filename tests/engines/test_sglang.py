# SPDX-License-Identifier: MIT
"""The kernels of integrations/sglang with SGLang's own classes, beside the recurrence in fp64.

SGLang's engine is not run: its CPU and CUDA kernels are packages of their own. Its dispatcher is, with a stand-in for the
one kernel that it imports.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import os
import sys
import types
from unittest import mock

import pytest
import torch
from recurrence import assert_close, in_layout, make, solve

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

import libflashkda  # noqa: E402
import libflashkda_sglang  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SLOTS = 8
GATES = pytest.mark.parametrize("gate", [{"gate": "softplus"}, {"gate": "sigmoid", "lower_bound": -5.0}], ids=str)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def kernel():
    from libflashkda_sglang.kernel import FlashKDAKernel

    return FlashKDAKernel()


def pool(problem, slots):
    """Slots with the problem's states, and NaN in the others."""
    states = problem.options["initial_state"]
    pool = torch.full((SLOTS, *states.shape[1:]), torch.nan)
    pool[slots] = states
    return pool


def gate_args(problem):
    """As SGLang's layer has them."""
    o = problem.options
    return {"A_log": o["A_log"].view(1, 1, -1, 1), "dt_bias": o["dt_bias"].flatten(), "lower_bound": o.get("lower_bound")}


def assert_pool(states, slots, expected, description):
    assert_close(states[slots], in_layout(expected, "v_first"), description)
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert states[others].isnan().all()


@GATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extend(kernel, gate, dtype):
    lengths, slots = [70, 1, 300], [5, 1, 3]
    problem = make(lengths=lengths, initial_state=torch.float32, dtype=dtype, HV=4, **gate)
    expected, finals, _ = solve(problem)
    states = pool(problem, slots)
    o = problem.options
    out, snapshots = kernel.extend(
        *problem.inputs, ssm_states=states, cache_indices=torch.tensor(slots, dtype=torch.int32),
        query_start_loc=o["cu_seqlens"].int(), beta_is_raw=True, extend_seq_lens_cpu=lengths, layer_id=3, **gate_args(problem))
    description = libflashkda.prefill_describe(*problem.inputs, **o)
    assert snapshots is None and out.dtype == dtype
    assert_close(out, expected, description)
    assert_pool(states, slots, finals, description)


@GATES
@pytest.mark.parametrize("packed", [False, True], ids=["decode", "packed_decode"])
def test_decode(kernel, gate, packed):
    slots, B = [5, 1, 3], 3
    problem = make(B=B, T=1, initial_state=torch.float32, HV=4, **gate)
    expected, finals, _ = solve(problem)
    states = pool(problem, slots)
    q, k, v, g, beta = (x.transpose(0, 1) for x in problem.inputs)
    # A row of padding at the end, as in a batch of a fixed size.
    q, k, v, g, beta = (torch.cat([x, torch.full_like(x[:, :1], torch.nan)], 1) for x in (q, k, v, g, beta))
    shared = {"ssm_states": states, "cache_indices": torch.tensor([*slots, -1], dtype=torch.int32), **gate_args(problem)}
    if packed:
        mixed = torch.cat([x[0].flatten(1) for x in (q, k, v)], 1)
        out = kernel.packed_decode(mixed, g[0].flatten(1), beta[0][:, None], scale=64 ** -0.5, num_v_heads=4, head_v_dim=64,
                                   replayssm_d=None, **shared)
    else:
        out = kernel.decode(q, k, v, g[0].flatten(1)[:, None], beta[0], query_start_loc=torch.arange(5, dtype=torch.int32),
                            **shared)
    assert out.shape == (1, B + 1, 4, 64)
    assert_close(out[:, :B].transpose(0, 1), expected, "fp32")
    assert_pool(states, slots, finals, "fp32")


def test_what_stays_tritons(kernel, monkeypatch):
    """Snapshots inside of prompts, drafts, and the ring of buffered decode."""
    called = []
    theirs = type(kernel).__mro__[1]
    assert theirs.__name__ == "TritonKDAKernel"
    for name in ("extend", "packed_decode"):
        monkeypatch.setattr(theirs, name, lambda self, *arguments, **keywords: called.append(keywords))
    problem = make(lengths=[3], initial_state=torch.float32)
    shared = {"ssm_states": pool(problem, [1]), "cache_indices": torch.tensor([1]), **gate_args(problem)}
    for more in ({"return_intermediate_states": True}, {"is_spec_decode": True}, {"track_state": torch.zeros(1)}):
        kernel.extend(*problem.inputs, query_start_loc=problem.options["cu_seqlens"], **shared, **more)
        assert more.items() <= called[-1].items()
    kernel.packed_decode(torch.zeros(1, 384), torch.zeros(1, 128), torch.zeros(1, 2), scale=1.0, num_v_heads=2, head_v_dim=64,
                         replayssm_d=torch.zeros(1), **shared)
    assert len(called) == 4 and type(kernel).target_verify is theirs.target_verify


# ---- The plug-in ---------------------------------------------------------------------------------


class StandIn(types.ModuleType):
    """A module that has every name, and nothing behind it."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """SGLang's package of kernels, which its modules import from."""

    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "sgl_kernel" else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture
def hooks():
    from sglang.srt.layers.attention.linear.kernels import kda_triton
    from sglang.srt.plugins.hook_registry import HookRegistry

    theirs = kda_triton.TritonKDAKernel
    HookRegistry.reset()
    yield HookRegistry
    HookRegistry.reset()
    for module in list(sys.modules.values()):
        if getattr(module, "TritonKDAKernel", None) is not None and module.__name__.startswith("sglang"):
            module.TritonKDAKernel = theirs


def test_dispatcher(hooks, monkeypatch):
    """SGLang's dispatcher takes the kernels for its default backend."""
    monkeypatch.setattr(sys, "meta_path", [StandIns(), *sys.meta_path])
    from libflashkda_sglang.kernel import FlashKDAKernel
    from sglang.srt.layers.attention.linear import kda_backend
    from sglang.srt.layers.attention.linear.utils import LinearAttnKernelBackend

    libflashkda_sglang.register()
    hooks.apply_hooks()
    triton = LinearAttnKernelBackend.TRITON
    dispatcher = kda_backend.KDAKernelDispatcher(triton, triton, triton)
    assert type(dispatcher.decode_kernel) is type(dispatcher.extend_kernel) is FlashKDAKernel
    assert dispatcher.supports_packed_decode and dispatcher.supports_packed_decode_safe_gate
    problem = make(B=2, T=1, initial_state=torch.float32, gate="sigmoid", lower_bound=-5.0)
    states = pool(problem, [2, 4])
    q, k, v, g, beta = (x.transpose(0, 1) for x in problem.inputs)
    out = dispatcher.decode(q, k, v, g[0].flatten(1), beta[0], ssm_states=states, cache_indices=torch.tensor([2, 4]),
                            query_start_loc=torch.arange(3), **gate_args(problem))
    assert_close(out.transpose(0, 1), solve(problem)[0], "fp32")


def test_an_unknown_version(hooks, monkeypatch, caplog):
    monkeypatch.setattr("sglang.version.__version__", "0.9.0")
    with caplog.at_level(logging.WARNING, "libflashkda_sglang"):
        libflashkda_sglang.register()
    assert caplog.messages == ["libflashkda's plug-in is written for SGLang 0.5, and this is 0.9.0, so it changes nothing; a "
                               "newer plug-in may know it"]
    assert not hooks._hooks
