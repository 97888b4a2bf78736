# SPDX-License-Identifier: MIT
"""examples/kimi_linear/ against transformers' Kimi Linear, 5.19 or later, which loads our checkpoint."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
from kimi_linear_plain import randomise
from recurrence import FP32, error_ratio

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "kimi_linear"))

import checkpoint  # noqa: E402
import config as configs  # noqa: E402
from generate import generate  # noqa: E402
from model import Cache, Model  # noqa: E402

pytestmark = pytest.mark.library("transformers")


@pytest.fixture(scope="module")
def ours() -> Model:
    model = Model(configs.TINY, "cpu", torch.float32)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    """Their model, from our checkpoint, on torch's own operations: fla's are for a GPU."""
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(ours, folder, shards=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fla", None)
        from transformers import KimiLinearConfig, KimiLinearForCausalLM
        from transformers.models.kimi_linear import modeling_kimi_linear

    assert modeling_kimi_linear.chunk_kimi_delta_attention.__wrapped__.__module__ == modeling_kimi_linear.__name__
    config = KimiLinearConfig.from_pretrained(folder, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model, report = KimiLinearForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32,
                                                          output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(configs.TINY.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))


def assert_close(logits, expected):
    ratio = error_ratio(logits, expected.double().numpy())
    assert ratio <= 2 * FP32, f"error ratio {ratio:.3g}"  # each has its own


@pytest.mark.parametrize("chunks", [[70], [1, 30, 2, 37]])
def test_prefill(theirs, ours, prompts, chunks):
    with torch.inference_mode():
        expected = theirs(prompts[:1]).logits[0]
    cache = Cache(ours, 1, 70)
    cache.begin(0)
    assert_close(ours.logits(torch.cat([ours(part, cache, 0) for part in prompts[0].split(chunks)])), expected)


def test_decode(theirs, ours, prompts):
    cache = Cache(ours, 2, 70)
    for slot, prompt in enumerate(prompts):
        cache.begin(slot)
        ours(prompt[:64], cache, slot)
    with torch.inference_mode():
        expected = theirs(prompts[:, :64], use_cache=True)
        for t in range(64, 70):
            expected = theirs(prompts[:, t:t + 1], past_key_values=expected.past_key_values, use_cache=True)
            assert_close(ours.step(prompts[:, t], cache), expected.logits[:, 0])
            for slot in range(2):
                cache.place(slot, t + 1)


def test_generate(theirs, ours, prompts):
    expected = theirs.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None,
                               attention_mask=torch.ones_like(prompts))
    assert torch.equal(generate(ours, list(prompts), 8), expected[:, 70:])
