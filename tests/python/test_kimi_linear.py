# SPDX-License-Identifier: MIT
"""examples/kimi_linear/ against the same model in fp64, token by token; benchmarks/model_speed.py."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from kimi_linear_plain import Plain, randomise
from recurrence import FP32, error_ratio

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "kimi_linear"
sys.path.insert(0, str(EXAMPLE))

import attention  # noqa: E402
import checkpoint  # noqa: E402
import config as configs  # noqa: E402
from decoder import Decoder  # noqa: E402
from generate import generate, main  # noqa: E402
from model import Cache, Model  # noqa: E402

TOKENS = 45


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(configs.TINY, "cpu", torch.float32)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def plain(model) -> Plain:
    return Plain(model.config, dict(model.public()))


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(configs.TINY.vocab_size, (TOKENS,), generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def exact(plain, prompts) -> list[torch.Tensor]:
    return [plain.logits(prompt.tolist()) for prompt in prompts]


def assert_close(logits, expected):
    ratio = error_ratio(logits, expected.numpy())
    assert ratio <= FP32, f"error ratio {ratio:.3g}"


@pytest.mark.parametrize("chunks", [[TOKENS], [1, 20, 2, 22]])
def test_prefill(model, prompts, exact, chunks):
    cache = Cache(model, 3, TOKENS)
    cache.begin(1)
    hidden = [model(part, cache, 1) for part in prompts[0].split(chunks)]
    assert_close(model.logits(torch.cat(hidden)), exact[0])


def test_prefill_says_the_last_token(model, prompts, exact):
    cache = Cache(model, 1, TOKENS)
    cache.begin(0)
    assert_close(model.prefill(prompts[0], cache, 0, chunk=16), exact[0][-1])


def test_decode(model, prompts, exact):
    """Two sequences of different lengths with an empty slot between them, where another sequence was before."""
    cache = Cache(model, 3, TOKENS)
    for slot, (prompt, length) in {0: (prompts[0], 20), 1: (prompts[0], 9), 2: (prompts[1], 3)}.items():
        cache.begin(slot)
        model.prefill(prompt[:length], cache, slot)
    cache.leave(1)
    cache.begin(2)  # anew
    model.prefill(prompts[1][:5], cache, 2)
    for step in range(20):
        tokens = torch.stack([prompts[0][20 + step], torch.tensor(0), prompts[1][5 + step]])
        with torch.inference_mode():
            logits = model.step(tokens, cache)
        assert_close(logits[0], exact[0][20 + step])
        assert_close(logits[2], exact[1][5 + step])
        for slot in (0, 2):
            cache.place(slot, cache.filled[slot] + 1)


def test_generate(model, plain, prompts):
    parts = [prompts[0][:17], prompts[1][:6]]
    assert generate(model, parts, 8, chunk=10).tolist() == [plain.generate(part.tolist(), 8) for part in parts]


def test_a_full_slot(model, prompts):
    cache = Cache(model, 1, 10)
    with pytest.raises(ValueError, match=r"nobody is in slot 0; expected begin\(0\) first"):
        model(prompts[0][:5], cache, 0)
    cache.begin(0)
    with pytest.raises(ValueError, match="slot 0 has 0 tokens and gets 11 more; the cache has room for 10"):
        model(prompts[0][:11], cache, 0)
    decoder = Decoder(model, cache)
    model(prompts[0][:9], cache, 0)
    decoder.step()
    with pytest.raises(ValueError, match="slot 0 has 10 tokens and gets 1 more"):
        decoder.step()


def test_a_decoder_leaves_the_cache_alone(model, prompts, exact):
    cache = Cache(model, 1, TOKENS)
    cache.begin(0)
    model(prompts[0][:20], cache, 0)
    decoder = Decoder(model, cache)
    assert decoder.tokens.tolist() == [0]
    assert_close(model.logits(model(prompts[0][20:-1], cache, 0)), exact[0][20:-1])
    with torch.inference_mode():
        decoder.tokens.copy_(prompts[0][-1:])
    assert decoder.step().tolist() == [exact[0][-1].argmax()] and cache.filled == [TOKENS]


@pytest.mark.cuda
def test_decode_on_a_gpu_is_prefill():
    """A CUDA graph's steps, and one prefill of all that they went through, each in bf16."""
    model = Model(configs.TINY, "cuda")
    randomise(model)
    with torch.inference_mode():
        for layer in model.layers[configs.TINY.first_k_dense_replace:]:  # or a rounding would choose other experts
            layer.feed_forward.bias.copy_(10 * torch.arange(configs.TINY.num_experts))
    prompts = [torch.randint(model.config.vocab_size, (length,), device="cuda") for length in (33, 70)]
    out = generate(model, prompts, 12, chunk=32)
    cache = Cache(model, 1, 100)
    for prompt, tokens in zip(prompts, out):
        cache.begin(0)
        logits = model.logits(model(torch.cat([prompt, tokens[:-1]]), cache, 0))[len(prompt) - 1:].float()
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        # Either rounds on its own, so that among nearly equal logits the largest may be another. In bf16 on a CPU they
        # are up to 0.07 apart; the largest of these logits is about 3 from a random one.
        assert (logits.amax(1) - chosen <= 0.2 * logits.std(1)).all()


# ---- Attention over latents ------------------------------------------------------------------------

WAYS = f"""
import sys, torch
sys.path.insert(0, {str(EXAMPLE)!r})
import attention
torch.manual_seed(0)
rank, rest, scale = 64, 16, 0.3
q, latent = torch.randn(2, 3, rank + rest), torch.randn(2, 1024, rank + rest)
lengths = torch.tensor([1, 700], dtype=torch.int32)
at_hand, missing = attention.ways()
for name, way in at_hand.items():
    out = way(q, latent, lengths, rank, scale).double()
    for b, length in enumerate(lengths):
        kept = latent[b, :length].double()
        expected = (q[b].double() @ kept.T * scale).softmax(-1) @ kept[:, :rank]
        assert (out[b] - expected).norm() <= 1e-5 * expected.norm(), (name, b)
    print(name)
for name, why in missing.items():
    print(name, "is missing:", why)
"""


@pytest.mark.library("triton")
def test_ways_to_attend():
    """Triton's kernels on the CPU, by its interpreter, which a process must choose before it imports them."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", WAYS], capture_output=True, text=True,
                            env=os.environ | {"TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["matmul", "sdpa"] and sum(line.startswith("triton") for line in lines) == 6
    assert any(line.startswith("flash_mla") for line in lines)


# ---- Checkpoints -----------------------------------------------------------------------------------

def test_the_published_model():
    config = configs.KIMI_LINEAR_48B
    with torch.device("meta"):
        model = Model(config, "meta")
        tensors = dict(model.public())
    assert sum(parameter.numel() for parameter in model.parameters()) == 49_122_681_728
    assert sum(tensor.numel() for tensor in tensors.values()) == 49_122_681_728
    assert tensors["model.layers.0.self_attn.A_log"].shape == (1, 1, 32, 1)
    assert tensors["model.layers.0.self_attn.q_conv1d.weight"].shape == (4096, 1, 4)
    assert tensors["model.layers.26.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 2304)
    assert tensors["model.layers.26.block_sparse_moe.experts.255.w2.weight"].shape == (2304, 1024)
    # Seven layers of MLA and twenty of KDA; at 1M tokens three quarters less than 27 of MLA.
    assert Cache(model, 1, 1 << 20).nbytes() == 7 * 576 * 2 * (1 << 20) + 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2)


@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoint(model, prompts, tmp_path, shards):
    checkpoint.save(model, tmp_path, shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    loaded = checkpoint.load(tmp_path, dtype=torch.float32)
    assert loaded.config == model.config
    tensors = dict(loaded.public())
    for name, tensor in model.public():
        assert torch.equal(tensors[name], tensor), name


def test_a_checkpoint_is_wrong(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path)
    checkpoint.save(model, tmp_path)
    path = tmp_path / checkpoint.ONE
    tensors = safetensors.torch.load_file(path)
    head = tensors.pop("lm_head.weight")
    safetensors.torch.save_file(tensors | {"tail": head}, path)
    with pytest.raises(ValueError, match="1 tensors are missing, lm_head.weight for one; 1 tensors are unknown, tail"):
        checkpoint.load(tmp_path)
    safetensors.torch.save_file(tensors | {"lm_head.weight": head[:5]}, path)
    with pytest.raises(ValueError, match=r"lm_head.weight is \[5, 64\]; expected \[256, 64\]"):
        checkpoint.load(tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | {"mla_use_nope": False}))
    with pytest.raises(ValueError, match="mla_use_nope is False; expected True"):
        checkpoint.load(tmp_path)


# ---- Programs --------------------------------------------------------------------------------------

def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)


def test_program(model, tmp_path, monkeypatch, capsys):
    checkpoint.save(model, tmp_path)
    arguments = ["--checkpoint", tmp_path, "--device", "cpu", "--count", 5, 1, 2, 3]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
    main()
    in_bf16 = checkpoint.load(tmp_path)
    expected = generate(in_bf16, [torch.tensor([1, 2, 3])], 5)[0].tolist()
    assert capsys.readouterr().out.split() == [str(token) for token in expected]


@pytest.mark.library("matplotlib")
def test_model_speed(tmp_path):
    path, figure = tmp_path / "model.json", tmp_path / "model.svg"
    result = run(ROOT / "benchmarks" / "model_speed.py", "--tiny", "-o", path)
    assert result.returncode == 0, result.stderr
    measured = json.loads(path.read_text())
    parts_of = {"kimi_linear": {"attention", "kda", "experts", "rest"}, "mla": {"attention", "experts", "rest"}}
    for name, parts in parts_of.items():
        decode = measured["results"][name]["decode"]
        assert [(m["tokens"], m["batch"]) for m in decode] == [(1024, 1), (1024, 2)]
        assert all(m["split"].keys() == parts and m["ways"]["matmul"]["error"] < 1e-2 for m in decode)
    assert measured["summary"]["cache_saved"]["2048"] > 0.5
    result = run(ROOT / "benchmarks" / "plot.py", path, figure)
    assert result.returncode == 0, result.stderr
    assert "the largest batch that fits" in figure.read_text()
