# SPDX-License-Identifier: MIT
"""The layer of integrations/vllm as vLLM calls it, beside the recurrence in fp64.

vLLM's own metadata and class, without its engine, on a CPU and, where there is one, on a GPU. What only a GPU's kernel
does, the convolution of drafts, is done by a stand-in in torch.
"""

from __future__ import annotations

import logging
import types

import libflashkda_vllm
import pytest
import torch
import vllm
from recurrence import FP32, Problem, error_ratio, recurrence
from torch.nn import functional
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

H, D, W, SLOTS = 2, 64, 4, 9
SIZE = H * D


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def module():
    """libflashkda_vllm.layer, which imports vLLM's kernels."""
    from libflashkda_vllm import layer

    return layer


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=[None, -5.0], ids=["softplus", "sigmoid"])
def layer(module, device, request):
    draw = torch.Generator().manual_seed(0)
    layer = module.FlashKDAAttention.__new__(module.FlashKDAAttention)
    torch.nn.Module.__init__(layer)
    layer.prefix, layer.local_num_heads, layer.head_dim = "layer", H, D
    layer.local_projection_size, layer.conv_size = SIZE, W
    layer.gate_lower_bound, layer.num_spec = request.param, 0
    layer.A_log = torch.randn(H, generator=draw).to(device) / 2
    layer.dt_bias = torch.randn(SIZE, generator=draw).to(device)
    weight = torch.randn(3 * SIZE, 1, W, generator=draw).to(device) / 2
    layer.conv1d = types.SimpleNamespace(weight=weight, bias=None)
    layer.o_norm = types.SimpleNamespace(weight=torch.rand(D, generator=draw).to(device) + 0.5, eps=1e-5)
    return layer


@pytest.fixture(params=[True, False], ids=["DS", "SD"])
def states(layer, module, device, request, monkeypatch):
    """Makes states in both of vLLM's layouts; slot 0, which is nobody's, is NaN."""
    def make(drafts=0):
        draw = torch.Generator().manual_seed(1)
        conv = torch.randn(SLOTS, 3 * SIZE, W - 1 + drafts, generator=draw).to(device)
        state = torch.randn(SLOTS, H, D, D, generator=draw).to(device)
        conv[0], state[0] = torch.nan, torch.nan
        layer.num_spec = drafts
        layer.kv_cache = (conv if request.param else conv.mT.contiguous(), state)
        monkeypatch.setattr(module.theirs, "is_conv_state_dim_first", lambda: request.param)
        return conv.cpu().double(), state.cpu().double()
    return make


def forward(layer, module, monkeypatch, device, metadata, rows):
    """Calls it with random inputs, of which rows are real. Gives them, and what it wrote."""
    draw = torch.Generator().manual_seed(2)
    padded = rows + 2
    mixed_qkv = torch.randn(padded, 3 * SIZE + 5, generator=draw)[:, :3 * SIZE]  # as a part of a wider projection
    g1, g2, beta = (torch.randn(*shape, generator=draw) for shape in ((1, padded, H, D), (padded, H, D), (1, padded, H)))
    out = torch.full((1, padded, H, D), 7.0)
    fields = dict.fromkeys(("num_prefills", "num_prefill_tokens", "num_decodes", "num_decode_tokens", "num_spec_decodes",
                            "num_spec_decode_tokens"), 0)
    there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in metadata.items()}
    m = GDNAttentionMetadata(**{**fields, "num_actual_tokens": rows, **there})
    monkeypatch.setattr(module, "get_forward_context", lambda: types.SimpleNamespace(attn_metadata={"layer": m}))
    given = (mixed_qkv, g1, g2, beta)
    written = out.to(device)
    layer._forward(*(x.to(device) for x in given), written)
    assert (written[0, rows:] == 7).all()
    return [mixed_qkv[:rows], g1[0, :rows], g2[:rows], beta[0, :rows]], written[0, :rows].cpu()


def sequence(layer, inputs, history, state):
    """One sequence in fp64: outputs, and after each token the last inputs of the convolutions, and the state."""
    mixed_qkv, g1, g2, beta = (x.double() for x in inputs)
    weight = layer.conv1d.weight[:, 0].cpu().double()
    stream = torch.cat([history, mixed_qkv.T], 1)
    convolved = torch.stack([functional.silu((stream[:, t:t + W] * weight).sum(1)) for t in range(len(mixed_qkv))])
    q, k, v = (x.unflatten(1, (H, D))[None] for x in convolved.split(SIZE, 1))
    gate = ({"gate": "softplus"} if layer.gate_lower_bound is None
            else {"gate": "sigmoid", "lower_bound": layer.gate_lower_bound})
    options = {**gate, "A_log": layer.A_log.cpu(), "dt_bias": layer.dt_bias.cpu().view(H, D), "qk_norm": True,
               "beta_mode": "sigmoid", "initial_state": state[None], "state_layout": "v_first"}
    out, final, inner = recurrence(Problem(q, k, v, g1[None], beta[None], options), every=1)
    normed = functional.rms_norm(out[0], (D,), layer.o_norm.weight.cpu().double(), layer.o_norm.eps) * g2.sigmoid()
    after = [x.mT for x in (*inner[0][1:], final[0])]
    return normed, [stream[:, t + 1:t + W] for t in range(len(mixed_qkv))], after


def assert_close(x, expected):
    ratio = error_ratio(x, expected.numpy())
    allowed = FP32 if x.device.type == "cpu" else 1e-5
    assert ratio <= allowed, f"error ratio {ratio:.3g}"


def assert_slots(layer, module, conv, state, used):
    """What states must hold now: [slots, 3 H D, 3] and [slots, H, D, D]; slots that are not used are as they were."""
    now = layer._convolution_states()[..., :W - 1].cpu(), layer.kv_cache[1].cpu()
    for slot in range(SLOTS):
        if slot in used:
            assert_close(now[0][slot], conv[slot])
            assert_close(now[1][slot], state[slot])
        else:
            assert torch.equal(now[0][slot].isnan(), conv[slot].isnan())
            assert torch.equal(now[0][slot].nan_to_num(), conv[slot].float().nan_to_num())
            assert torch.equal(now[1][slot].nan_to_num(), state[slot].float().nan_to_num())


def test_decode(layer, module, states, monkeypatch, device):
    """A row of padding between two sequences, as in a batch of a fixed size."""
    conv, state = states()
    slots = [4, 0, 2]
    inputs, out = forward(layer, module, monkeypatch, device,
                          {"num_decodes": 3, "num_decode_tokens": 3,
                           "non_spec_state_indices_tensor": torch.tensor(slots, dtype=torch.int32),
                           "non_spec_query_start_loc": torch.arange(4, dtype=torch.int32)}, 3)
    for row, slot in enumerate(slots):
        if slot:
            expected, history, after = sequence(layer, [x[row:row + 1] for x in inputs], conv[slot], state[slot])
            assert_close(out[row:row + 1], expected)
            conv[slot], state[slot] = history[-1], after[-1]
        else:
            assert (out[row] == 7).all()
    assert_slots(layer, module, conv, state, {4, 2})


def test_prefill(layer, module, states, monkeypatch, device):
    """A decode, two new sequences whose slots hold another's remains, one that goes on, and padding without tokens."""
    conv, state = states()
    conv[6], state[6] = torch.nan, torch.nan
    layer._convolution_states()[6], layer.kv_cache[1][6] = torch.nan, torch.nan
    lengths, slots, old = [1, 30, 2, 45, 0], [3, 6, 5, 8, 0], [True, False, False, True, False]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    inputs, out = forward(layer, module, monkeypatch, device,
                          {"num_prefills": 3, "num_prefill_tokens": 77, "num_decodes": 1, "num_decode_tokens": 1,
                           "non_spec_state_indices_tensor": torch.tensor(slots, dtype=torch.int32),
                           "non_spec_query_start_loc": ends, "has_initial_state": torch.tensor(old)}, 78)
    for n, (slot, length) in enumerate(zip(slots, lengths)):
        if length:
            start = int(ends[n])
            history, before = (conv[slot], state[slot]) if old[n] else (torch.zeros(3 * SIZE, W - 1), torch.zeros(H, D, D))
            expected, histories, after = sequence(layer, [x[start:start + length] for x in inputs], history.double(),
                                                  before.double())
            assert_close(out[start:start + length], expected)
            conv[slot], state[slot] = histories[-1], after[-1]
    assert_slots(layer, module, conv, state, {3, 6, 5, 8})


def convolve_drafts(x, conv_state, weight, bias, *, activation, conv_state_indices, num_accepted_tokens, query_start_loc,
                    max_query_len, validate_data, out):
    """What vLLM's kernel does: of a state of W - 1 + drafts inputs, W - 1 from the token accepted last on are history, and
    they and the new inputs are the next state."""
    assert bias is None and activation == "silu" and out.is_contiguous()
    for n, slot in enumerate(conv_state_indices.tolist()):
        start, end = query_start_loc[n:n + 2].tolist()
        first = int(num_accepted_tokens[n]) - 1
        stream = torch.cat([conv_state[slot, :, first:first + W - 1], x[start:end].T], 1)
        for t in range(end - start):
            out[start + t] = functional.silu((stream[:, t:t + W] * weight).sum(1))
        conv_state[slot, :, :stream.shape[1] - 1] = stream[:, 1:]
    return out


@pytest.mark.parametrize("mixed", [False, True], ids=["drafts alone", "beside a prefill"])
def test_verify(layer, module, states, monkeypatch, device, mixed):
    conv, state = states(drafts=2)
    monkeypatch.setattr(module.theirs, "causal_conv1d_update", convolve_drafts)
    slots, accepted, lengths = [[2, 7, 4], [5, 1, 8]], [1, 2], [3, 2]
    rows = 5 + (4 if mixed else 0)
    metadata = {
        "num_spec_decodes": 2, "num_spec_decode_tokens": 5, "spec_sequence_masks": torch.tensor([True, True]),
        "spec_state_indices_tensor": torch.tensor([*slots, [0, 0, 0]], dtype=torch.int32),
        "spec_query_start_loc": torch.tensor([0, 3, 5, 5], dtype=torch.int32),
        "num_accepted_tokens": torch.tensor([*accepted, 1], dtype=torch.int32),
        "spec_token_indx": torch.arange(5, dtype=torch.int32)}
    drafts = list(range(5))
    if mixed:  # tokens 0 to 3 are a prompt's
        drafts = list(range(4, 9))
        metadata |= {"num_prefills": 1, "num_prefill_tokens": 4, "spec_token_indx": torch.arange(4, 9),
                     "non_spec_token_indx": torch.arange(4), "has_initial_state": torch.tensor([False]),
                     "non_spec_state_indices_tensor": torch.tensor([3], dtype=torch.int32),
                     "non_spec_query_start_loc": torch.tensor([0, 4], dtype=torch.int32)}
    inputs, out = forward(layer, module, monkeypatch, device, metadata, rows)
    now = layer.kv_cache[1].cpu()
    start = 0
    for row, taken, length in zip(slots, accepted, lengths):
        rows_of = drafts[start:start + length]
        history = conv[row[0], :, taken - 1:taken + W - 2]
        expected, _, after = sequence(layer, [x[rows_of] for x in inputs], history, state[row[taken - 1]])
        assert_close(out[rows_of], expected)
        for slot, wanted in zip(row, after):
            assert_close(now[slot], wanted)
        start += length
    if mixed:
        nothing = torch.zeros(3 * SIZE, W - 1).double(), torch.zeros(H, D, D).double()
        expected, _, after = sequence(layer, [x[:4] for x in inputs], *nothing)
        assert_close(out[:4], expected)
        assert_close(now[3], after[-1])


def test_a_run_that_measures_memory(layer, module, monkeypatch):
    out = torch.full((1, 3, H, D), 7.0)
    for metadata in (None, {}):
        monkeypatch.setattr(module, "get_forward_context", lambda: types.SimpleNamespace(attn_metadata=metadata))
        layer._forward(*[torch.empty(0)] * 4, out)
    assert (out == 7).all()


# ---- Where it is not installed -------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    registry: dict[str, type] = {}
    monkeypatch.setattr("vllm.model_executor.custom_op.op_registry_oot", registry)
    return registry


def test_an_unknown_version(registry, monkeypatch, caplog):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with caplog.at_level(logging.WARNING, "vllm.plugins.libflashkda"):
        libflashkda_vllm.register()
    assert caplog.messages == ["libflashkda's plug-in is written for vLLM 0.32 and 0.33, and this is 0.99.1, so it changes "
                               "nothing; a newer plug-in may know it"]
    assert not registry


def test_another_plug_in(registry, caplog):
    registry["KimiGatedDeltaNetAttention"] = types.SimpleNamespace
    with caplog.at_level(logging.WARNING, "vllm.plugins.libflashkda"):
        libflashkda_vllm.register()
    assert "types.SimpleNamespace has replaced vLLM's KimiGatedDeltaNetAttention already" in caplog.messages[0]


def test_drafts_on_a_cpu(module, monkeypatch):
    monkeypatch.setattr(module.theirs.KimiGatedDeltaNetAttention, "__init__", lambda self, drafts: vars(self).update(
        num_spec=drafts))
    make = object.__new__(module.FlashKDAAttention).__init__
    make(0)
    with pytest.raises(NotImplementedError, match="speculative decoding is asked for on a CPU"):
        make(3)
    monkeypatch.setattr(module.current_platform, "is_cpu", lambda: False)
    make(15)
    with pytest.raises(ValueError, match="num_speculative_tokens is 16; expected at most 15"):
        make(16)

