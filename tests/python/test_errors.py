# SPDX-License-Identifier: MIT
"""Bad input: an exception of the right type, whose sentence names the argument, and nothing written."""

from __future__ import annotations

import libflashkda
import numpy
import pytest
import torch
from recurrence import make

UNTOUCHED = 7.0


@pytest.fixture
def call(device):
    """The arguments of a valid call that writes out, final_state and checkpoints."""
    problem = make(lengths=[30, 40], K=64, V=32, initial_state=torch.float32).to(device)
    names = ("q", "k", "v", "g", "beta")
    return {**dict(zip(names, problem.inputs)), **problem.options,
            "out": torch.full_like(problem.v, UNTOUCHED),
            "final_state": torch.full((2, 2, 32, 64), UNTOUCHED, device=device),
            "checkpoints": torch.full((2, 2, 32, 64), UNTOUCHED, device=device),
            "checkpoint_offsets": torch.tensor([5, 7], device=device)}


def test_the_call_is_valid(call):
    with torch.no_grad():
        libflashkda.prefill(**call)
    assert not any((call[name] == UNTOUCHED).all() for name in ("out", "final_state", "checkpoints"))


def zeros(*shape, **more):
    """Of a call, the same argument with another shape or dtype."""
    return lambda old: torch.zeros(shape or old.shape, **{"dtype": old.dtype, "device": old.device, **more})


INDEX = {"dtype": torch.int32}

BAD = [
    # shapes
    ("q", zeros(1, 70, 2), ValueError, "q has 3 dimensions"),
    ("k", zeros(1, 70, 2, 60), ValueError, r"k has shape \[1, 70, 2, 60\]"),
    ("v", zeros(1, 70, 3, 32), ValueError, "v has HV = 3"),
    ("g", zeros(1, 70, 1, 64), ValueError, "g has shape"),
    ("beta", zeros(1, 70), ValueError, "beta has 2 dimensions"),
    ("A_log", zeros(3), ValueError, "A_log has shape"),
    ("dt_bias", zeros(128), ValueError, "dt_bias has 1 dimensions"),
    ("out", zeros(1, 70, 2, 64), ValueError, "out has shape"),
    ("initial_state", zeros(2, 2, 64, 32), ValueError, "initial_state has shape"),
    ("final_state", zeros(3, 2, 32, 64), ValueError, "final_state has shape"),
    ("checkpoints", zeros(2, 2, 32, 60), ValueError, "checkpoints has shape"),
    ("checkpoint_offsets", zeros(3), ValueError, "checkpoint_offsets has shape"),
    # dtypes
    ("q", zeros(dtype=torch.float64), ValueError, "q has dtype float64; expected float32, float16 or bfloat16"),
    ("beta", zeros(dtype=torch.int32), ValueError, "beta has dtype"),
    ("initial_state", zeros(dtype=torch.float16), ValueError, "initial_state has dtype"),
    ("cu_seqlens", zeros(dtype=torch.float32), ValueError, "cu_seqlens has dtype float32; expected int32 or int64"),
    ("v", zeros(dtype=torch.complex64), ValueError, "v has dtype complex64"),
    ("beta", zeros(dtype=torch.bool), ValueError, "beta has dtype bool"),
    ("k", zeros(dtype=torch.float8_e4m3fn), ValueError, "k has dtype float8_e4m3fn"),
    # strides and overlap
    ("q", lambda old: old.mT.contiguous().mT, ValueError, "q has stride 70|q has stride 2 in its last"),
    ("out", lambda old: old[:, :1].expand(old.shape), ValueError, "out has stride 0"),
    # numbers and words
    ("gate", lambda old: "relu", ValueError, "gate is 'relu'"),
    ("beta_mode", lambda old: None, ValueError, "beta_mode is None"),
    ("state_layout", lambda old: "kv", ValueError, "state_layout is 'kv'"),
    ("backend", lambda old: "tpu", ValueError, "backend is 'tpu'"),
    ("scale", lambda old: float("nan"), ValueError, "scale is "),
    ("scale", lambda old: "1", TypeError, "scale is '1'"),
    ("num_threads", lambda old: -1, ValueError, "num_threads is -1"),
    ("num_threads", lambda old: 1 << 80, ValueError, "num_threads is "),
    ("checkpoint_every", lambda old: 16, ValueError, "checkpoints is given with both checkpoint_every"),
    ("checkpoint_every", lambda old: 1.5, TypeError, "checkpoint_every is 1.5"),
    # no arrays
    ("q", lambda old: None, TypeError, "q is of type"),
    ("q", lambda old: [1.0], TypeError, "q is of type"),
    ("k", lambda old: None, ValueError, "k is NULL"),
    ("k", lambda old: [1.0], TypeError, "k is of type"),
    ("v", lambda old: 3, TypeError, "v is of type"),
    ("out", lambda old: "out", TypeError, "out is of type"),
    ("g", lambda old: old.float().cpu().numpy(), TypeError, "g is of type"),
    ("v", lambda old: old.float().cpu().numpy(), TypeError, "v is of type"),
    ("cu_seqlens", lambda old: [0, 30, 70], TypeError, "cu_seqlens is of type"),
    ("gate", lambda old: ["softplus"], ValueError, r"gate is \['softplus'\]"),
    ("gate", lambda old: numpy.zeros(2), ValueError, "gate is array"),
    ("scale", lambda old: torch.ones(2), TypeError, "scale is of type"),
    # tensors of another kind
    ("k", lambda old: old.to("meta"), ValueError, "k cannot be read"),
    ("g", lambda old: old.to_sparse(), ValueError, "g cannot be read"),
    # scratch memory
    ("workspace", lambda old: torch.zeros(3), ValueError, "workspace has 12 bytes|workspace is on DLPack device"),
    ("workspace", lambda old: torch.zeros(1 << 20)[::2], ValueError, "workspace has strides|workspace is on DLPack"),
    ("workspace", lambda old: 7, TypeError, "workspace is of type"),
]


def refuse(call, change, exception, message):
    arguments = {**call, **change}
    with torch.no_grad(), pytest.raises(exception, match=f"^({message})"):
        libflashkda.prefill(**arguments)
    for name in ("out", "final_state", "checkpoints"):
        assert (call[name] == UNTOUCHED).all(), f"{name} was written"


@pytest.mark.parametrize("name, bad, exception, message", BAD, ids=[f"{name}-{message}" for name, *_, message in BAD])
def test_refused(call, name, bad, exception, message):
    refuse(call, {name: bad(call.get(name))}, exception, message)


@pytest.mark.parametrize("change, message", [
    ({"gate": "sigmoid"}, "lower_bound is None"),
    ({"gate": "sigmoid", "lower_bound": -5.1}, "lower_bound is -5.1"),
    ({"gate": "sigmoid", "lower_bound": 0}, "lower_bound is 0"),
    ({"gate": "none"}, "A_log is given"),
    ({"checkpoint_offsets": None}, "checkpoints is given with neither"),
    ({"final_state": None, "output_final_state": True,
      "state_indices": torch.zeros(2, dtype=torch.int32)}, "final_state is None with state_indices"),
])
def test_refused_together(call, change, message):
    refuse(call, change, ValueError, message)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("change, message", [
    ({"cu_seqlens": torch.tensor([0, 30, 60])}, "cu_seqlens ends at 60"),
    ({"cu_seqlens": torch.tensor([0, 80, 70])}, r"cu_seqlens\[1\] is 80"),
    ({"cu_seqlens": torch.tensor([1, 30, 70])}, r"cu_seqlens\[0\] is 1"),
    ({"checkpoint_offsets": torch.tensor([5, 41])}, "checkpoint_offsets of sequence 1 holds 41"),
    ({"state_indices": torch.tensor([0, 2], dtype=torch.int32)}, r"state_indices\[1\] is 2"),
    ({"state_indices": torch.tensor([1, 1], dtype=torch.int32)}, r"state_indices\[1\] is 1, a slot that is used twice"),
])
def test_contents_of_host_memory(call, change, message):
    refuse(call, change, ValueError, message)


def test_overlap(call):
    memory = torch.full((1, 71, 2, 32), UNTOUCHED, dtype=torch.bfloat16, device=call["q"].device)
    refuse(call, {"out": memory[:, 1:], "v": memory[:, :-1]}, ValueError, "out overlaps v")
    assert (memory == UNTOUCHED).all()
    refuse(call, {"final_state": call["checkpoints"]}, ValueError, "final_state overlaps checkpoints")


def test_freed_memory(call):
    call["v"].untyped_storage().resize_(0)
    refuse(call, {}, ValueError, "v has data NULL")


def test_freed_workspace(call):
    workspace = torch.zeros(1 << 22, dtype=torch.uint8, device=call["q"].device)
    workspace.untyped_storage().resize_(0)
    refuse(call, {"workspace": workspace}, ValueError, "workspace is NULL")


def test_workspace_that_overlaps(call):
    workspace = torch.zeros(1 << 22, dtype=torch.uint8, device=call["q"].device)
    v = workspace[1 << 12:][:2 * call["v"].numel()].view(torch.bfloat16).view(call["v"].shape)
    refuse(call, {"workspace": workspace, "v": v}, ValueError, "workspace overlaps v")


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["k", "A_log", "out", "cu_seqlens", "initial_state", "checkpoint_offsets",
                                  "workspace"])
@pytest.mark.parametrize("device", ["cuda"])
def test_mixed_devices(call, name):
    call["workspace"] = torch.zeros(1 << 22, dtype=torch.uint8, device="cuda")
    refuse(call, {name: call[name].cpu()}, ValueError, f"{name} is on DLPack device 1:0; expected 2:0, where q is")


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda"])
def test_backend_of_another_device(call):
    refuse(call, {"backend": "cpu"}, NotImplementedError, "q is on DLPack device 2:0, where backend cpu does not work")


@pytest.mark.parametrize("device", ["cpu"])
def test_backend_that_is_not_here(call):
    refuse(call, {"backend": "cuda"}, NotImplementedError, "(backend is cuda|q is on DLPack device 1:0)")


# ---- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "beta", "A_log", "initial_state", "out"])
def test_gradients_are_refused(call, name):
    arguments = {**call, name: call[name].clone().requires_grad_()}
    with pytest.raises(NotImplementedError, match=f"^{name} requires grad"):
        libflashkda.prefill(**arguments)
    assert (call["final_state"] == UNTOUCHED).all()
    with torch.no_grad():
        libflashkda.prefill(**arguments)
    assert not (call["final_state"] == UNTOUCHED).all()


def test_gradients_elsewhere():
    problem = make()
    problem.v.requires_grad_()
    with pytest.raises(NotImplementedError, match="^v requires grad"):
        libflashkda.fwd(*problem.inputs, 1.0, torch.empty_like(problem.v), None, None, -5.0)


def test_no_tensor_that_requires_grad_needs_no_mode(call):
    """Grad mode is torch's default; it alone is no reason to refuse."""
    libflashkda.prefill(**call)
    with torch.inference_mode():
        libflashkda.prefill(**call)


# ---- Every entry ----------------------------------------------------------------------------------


def everywhere():
    """Each entry with arguments that are right, where results are new arrays, whose shape and dtype are others'."""
    problem = make(T=8, dtype=torch.float32, initial_state=torch.float32)
    o = problem.options
    inputs = dict(zip(("q", "k", "v", "g", "beta"), problem.inputs))
    parameters = {"A_log": o["A_log"], "dt_bias": o["dt_bias"]}
    start = {"initial_state": o["initial_state"]}
    ends = {"cu_seqlens": torch.tensor([0, 8])}
    new = {**inputs, **parameters, **start, **ends, "gate": "softplus", "output_final_state": True}
    step = {**inputs, **parameters, "gate": "softplus", "state": o["initial_state"],
            "state_indices": torch.tensor([0], dtype=torch.int32)}
    return {libflashkda.prefill: new, libflashkda.prefill_describe: new, libflashkda.prefill_workspace_size: new,
            libflashkda.decode: step, libflashkda.decode_describe: step,
            libflashkda.fwd: {**inputs, **parameters, **start, **ends, "scale": 1.0, "lower_bound": None,
                              "out": torch.empty(problem.v.shape)},
            libflashkda.chunk_kda: {**inputs, **parameters, **start, **ends, "use_gate_in_kernel": True,
                                    "cu_seqlens_cpu": torch.tensor([0, 8]), "return_intermediate_states": True}}


ARRAYS = [(entry, name) for entry, call in everywhere().items() for name, x in call.items() if isinstance(x, torch.Tensor)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("entry, name", ARRAYS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_arguments_of_the_wrong_kind_are_named(entry, name, no_grad):
    call = everywhere()[entry]
    entry(**call)
    wrong = [([1.0, 2.0], TypeError), ("words", TypeError), (3, TypeError), (call[name].to_sparse(), ValueError),
             (call[name].to(torch.complex64), ValueError), (torch.nested.nested_tensor([torch.ones(2)]), ValueError)]
    if name != "q":  # of which the others must be
        wrong += [(call[name].numpy(), TypeError)]
    for value, exception in wrong:
        with pytest.raises(exception, match=f"^{name} "):
            entry(**{**call, name: value})


@pytest.mark.parametrize("ends", [[0, 90, 10, 100], [0, 1 << 40], [0, -200, 100], [5, 100], [0, 99], [], [[0, 100]]], ids=str)
@pytest.mark.parametrize("argument", ["cu_seqlens", "cu_seqlens_cpu"])
def test_ends_that_size_the_intermediate_states(argument, ends, device, no_grad):
    """They are looked at before anything of such a size is made."""
    q, k, v, g, beta = make(T=100).to(device).inputs
    values = torch.tensor(ends, dtype=torch.int64)
    right = torch.tensor([0, 100], device=device)
    given = {"cu_seqlens": values.to(device)} if argument == "cu_seqlens" else {"cu_seqlens": right, argument: values}
    with pytest.raises(ValueError, match=f"^{argument} (is|has)"):
        libflashkda.chunk_kda(q, k, v, g, beta, **given, return_intermediate_states=True)


def test_ends_on_the_cpu_that_are_others(no_grad):
    q, k, v, g, beta = make(T=100).inputs
    with pytest.raises(ValueError, match="^cu_seqlens_cpu differs"):
        libflashkda.chunk_kda(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 30, 100]),
                              cu_seqlens_cpu=torch.tensor([0, 65, 100]), return_intermediate_states=True)


def test_lower_bound_of_fwd(no_grad):
    problem = make()
    with pytest.raises(TypeError, match="^lower_bound is of type"):
        libflashkda.fwd(*problem.inputs, 1.0, torch.empty_like(problem.v), None, None, torch.ones(2))


# ---- Other libraries -----------------------------------------------------------------------------


def numpy_inputs():
    return [x.numpy() for x in make(dtype=torch.float32).inputs]


def test_numpy_arrays_that_cannot_be_written():
    inputs = numpy_inputs()
    out = numpy.full_like(inputs[2], UNTOUCHED)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="^out "):
        libflashkda.prefill(*inputs, out=out)
    assert (out == UNTOUCHED).all()
    for x in inputs:
        x.flags.writeable = False
    libflashkda.prefill(*inputs)


MODES = {"gate": "softplus", "beta_mode": "sigmoid", "qk_norm": True}


def bf16_inputs():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return [x.astype(ml_dtypes.bfloat16) for x in numpy_inputs()]


@pytest.mark.parametrize("modern", [True, False], ids=["numpy's DLPack 1", "before it"])
@pytest.mark.parametrize("inputs", [numpy_inputs, bf16_inputs])
def test_numpy_inputs_that_cannot_be_written(inputs, modern, monkeypatch):
    """Before numpy 2.1 none of them could be lent by DLPack."""
    library = libflashkda._libraries.library_of(numpy.zeros(1))
    if not modern:
        monkeypatch.setattr(library, "modern", False)
        monkeypatch.setattr(library, "dlpack_arguments", {})
    q, k, v, g, beta = inputs()
    k = k[:, :1]
    expected = libflashkda.prefill(q, numpy.ascontiguousarray(numpy.broadcast_to(k, q.shape)), v, g, beta, **MODES)
    frozen = numpy.frombuffer(q.tobytes(), q.dtype).reshape(q.shape)
    assert not frozen.flags.writeable
    assert numpy.array_equal(libflashkda.prefill(frozen, numpy.broadcast_to(k, q.shape), v, g, beta, **MODES), expected)
    state = numpy.zeros((1, 2, 64, 64), "float32")
    tokens = [x[:, :4] for x in (q, q, v, g, beta)]
    expected = libflashkda.decode(*tokens, state, **MODES, keep_state=True)
    state.flags.writeable = False
    assert numpy.array_equal(libflashkda.decode(*tokens, state, **MODES, keep_state=True), expected)
    with pytest.raises(ValueError, match="^state (is read-only|cannot be read)"):
        libflashkda.decode(*tokens, state)
    assert (state == 0).all()


def test_masked_arrays():
    q, k, v, g, beta = numpy_inputs()
    masked = numpy.ma.masked_greater(v, 1)
    with pytest.raises(TypeError, match="^v is a masked array"):
        libflashkda.prefill(q, k, masked, g, beta)
    with pytest.raises(TypeError, match="^q is a masked array"):
        libflashkda.prefill(numpy.ma.masked_greater(q, 1), k, v, g, beta)
    with pytest.raises(TypeError, match="^state is a masked array"):
        libflashkda.decode(*(x[:, :4] for x in (q, k, v, g, beta)), numpy.ma.zeros((1, 2, 64, 64), "float32"))
    with pytest.raises(TypeError, match="^out is a masked array"):
        libflashkda.fwd(q, k, v, g, beta, 1.0, masked, None, None, -5.0)
    plain = libflashkda.prefill(q, k, masked.data, g, beta, **MODES)
    assert numpy.array_equal(plain, libflashkda.prefill(q, k, v, g, beta, **MODES))


def test_numpy_arrays_of_other_kinds():
    q, k, v, g, beta = numpy_inputs()
    with pytest.raises(ValueError, match="^k cannot be read"):
        libflashkda.prefill(q, k.astype(">f4"), v, g, beta)
    with pytest.raises(ValueError, match="^k has stride -"):
        libflashkda.prefill(q, k[:, ::-1], v, g, beta)
    with pytest.raises(ValueError, match="^g has dtype"):
        libflashkda.prefill(q, k, v, g.view(numpy.uint32), beta)
    with pytest.raises(ValueError, match="^g has dtype"):
        libflashkda.prefill(q, k, v, g.astype(numpy.uint16), beta)
    with pytest.raises(TypeError, match="^beta is of type"):
        libflashkda.prefill(q, k, v, g, torch.from_numpy(beta))
    with pytest.raises(TypeError, match="^q is of type"):
        libflashkda.prefill(memoryview(q), k, v, g, beta)
    with pytest.raises(TypeError, match="^q is of type.*expected a torch.Tensor"):
        libflashkda.chunk_kda(q, k, v, g, beta)
    with pytest.raises(TypeError, match="^beta is of type.*expected a torch.Tensor"):
        libflashkda.chunk_kda(*make().inputs[:4], beta)


@pytest.mark.library("jax")
def test_jax():
    import jax

    inputs = [jax.device_put(x, jax.devices("cpu")[0]) for x in numpy_inputs()]
    with pytest.raises(ValueError, match="^out is given with jax arrays"):
        libflashkda.prefill(*inputs, out=inputs[2])
    with pytest.raises(ValueError, match="^out is given with jax arrays"):
        libflashkda.fwd(*inputs, 1.0, inputs[2], None, None, -5.0)
    with pytest.raises(TypeError, match="^k is of type"):
        libflashkda.prefill(inputs[0], numpy_inputs()[1], *inputs[2:])
    with pytest.raises(TypeError, match="^q is traced"):
        jax.jit(libflashkda.prefill)(*inputs)


# ---- The extension, which takes names ------------------------------------------------------------


def named(v, **more):
    x = torch.rand(1, 3, 2, 4)
    return {"q": x, "k": x, "v": v, "g": -x, "beta": x[..., 0], **more}


@pytest.mark.parametrize("function", ["prefill", "decode"])
def test_names_in_any_order(function):
    tensors, options = named(torch.rand(1, 3, 2, 4)), {"scale": 0.5, "flags": libflashkda._C.QK_NORM}
    tensors["initial_state" if function == "prefill" else "state"] = torch.ones(1, 2, 4, 4)
    outs = []
    for order in (1, -1):
        out = torch.full((1, 3, 2, 4), torch.nan)
        given = dict([*tensors.items(), ("out", out)][::order])
        given = {"".join(name): array for name, array in given.items()}  # not the objects that the extension knows
        if function == "decode":
            given["state"] = given["state"].clone()
        written = getattr(libflashkda._C, function)(given, dict([*options.items()][::order]), None, None)
        assert any(array is out for array in written) and out.isfinite().all()
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.parametrize("function", ["prefill", "prefill_describe", "decode", "decode_describe"])
def test_names_that_are_not(function):
    call = getattr(libflashkda._C, function)
    tensors = named(torch.rand(1, 3, 2, 4))
    operation = function.partition("_")[0]
    with pytest.raises(TypeError, match=f"{operation} takes nothing named 'checkpoint'"):
        call({**tensors, "checkpoint": None}, {}, None, None)
    with pytest.raises(TypeError, match=f"{operation} takes nothing named 'q'"):
        call(tensors, {"q": 1}, None, None)
    with pytest.raises(TypeError, match="is given; expected a dict from names"):
        call(tensors, (1, 2), None, None)
    with pytest.raises(TypeError, match="3 arguments; expected tensors, options, stream and workspace"):
        call(tensors, {}, None)
    with pytest.raises(ValueError, match="q is NULL"):
        call({**tensors, "q": None}, {}, None, None)
