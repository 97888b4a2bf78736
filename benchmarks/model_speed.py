# SPDX-License-Identifier: MIT
"""Measures a whole model, examples/kimi_linear, beside the same model with MLA in every layer: what a sequence's cache
takes, how long the first token of a long prompt takes, and how fast decode is at the largest batch that fits.

usage: model_speed.py [--build DIR] [--commit NAME] [-o FILE] [--tiny]

The model is the whole Kimi-Linear-48B-A3B in bf16, 98 GB, with random weights. Its experts thus get about equally many
tokens. Caches that decode goes on from are random too; their values do not matter to the time. MLA decodes by the
fastest way that examples/kimi_linear/attention.py has at hand, found anew for each batch. A step is one replay of a
CUDA graph. Its parts are graphs of their own, of one kind of layer's work with all its projections; the rest is what is
left of a step. The largest batch fits beside the weights on one GPU; several GPUs would have more room for caches.

Writes benchmarks/results/DEVICE/model.json, or FILE, after each model ("complete" is false until the end). --tiny: a
tiny model on the CPU, to see that all this runs; it needs FILE. benchmarks/plot.py draws the figure.
"""

import argparse
import gc
import json
import pathlib
import statistics
import sys
import time
import types

import device
import libflashkda
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "kimi_linear"))

import attention  # noqa: E402
import decoder  # noqa: E402
from config import KIMI_LINEAR_48B, TINY  # noqa: E402
from model import KDA, MLA, Cache, Experts, Model  # noqa: E402

WARM_UP = 3
REPEATS_OF_WAYS = 5
WRONG = 1e-2  # error ratio of a way to decode; bf16 weights of the tokens cost about 0.003
FREE = 4 << 30  # bytes that a step and its graph may take beside weights and caches
CHUNK = 8192  # tokens of a prompt at once

FULL = types.SimpleNamespace(
    name="Kimi-Linear-48B-A3B, whole, random weights, bf16", config=KIMI_LINEAR_48B, device="cuda",
    dtype=torch.bfloat16, cache_tokens=[4096 << n for n in range(9)], prompt=131072, decode_tokens=(131072, 1048576),
    repeats=15)
TINY_ONE = types.SimpleNamespace(
    name="tiny", config=TINY, device="cpu", dtype=torch.bfloat16, cache_tokens=[1024, 2048], prompt=100,
    decode_tokens=(1024,), batch_limit=2, repeats=2)


# ---- Time ----------------------------------------------------------------------------------------

def synchronise(on):
    if on == "cuda":
        torch.cuda.synchronize()


def quartiles(times):
    q1, median, q3 = statistics.quantiles(times, n=4)
    return {"min": min(times), "q1": q1, "median": median, "q3": q3, "max": max(times), "repeats": len(times)}


def seconds(call, on, repeats, warm_up=WARM_UP):
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        if on == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return quartiles(times)


# ---- Decode --------------------------------------------------------------------------------------

def error_ratio(x, reference):
    x, reference = x.double(), reference.double()
    return ((x - reference).square().mean() / reference.square().mean()).sqrt().item()


def fastest_way(what, model, cache):
    """The way that decodes MLA's attention fastest in this cache, and how each one did."""
    layer, memory = next((layer.mixer, memory) for layer, memory in zip(model.layers, cache.layers)
                         if isinstance(layer.mixer, MLA))
    latent, lengths = memory.latent, cache.batch.lengths
    q = torch.randn(len(latent), layer.heads, layer.rank + layer.rest, dtype=what.dtype, device=what.device)
    kept = latent[0, :lengths[0]].float()
    exact = (q[0].float() @ kept.T * layer.scale).softmax(-1) @ kept[:, :layer.rank]
    del kept
    at_hand, report = attention.ways()
    times = {}
    for name, way in at_hand.items():
        try:
            error = error_ratio(way(q, latent, lengths, layer.rank, layer.scale)[0], exact)
            if not error <= WRONG:
                report[name] = f"wrong: error ratio {error:.1e}"
                continue
            times[name] = seconds(lambda: way(q, latent, lengths, layer.rank, layer.scale), what.device,
                                  REPEATS_OF_WAYS, 1)["median"]
            report[name] = {"seconds": times[name], "error": error}
        except Exception as problem:  # of any kind: a way that cannot run here is one way less
            report[name] = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
    if not times:
        sys.exit(f"no way to decode MLA runs here: {report}")
    best = min(times, key=times.get)
    return best, at_hand[best], report


def fill(cache, tokens):
    """Random sequences of so many tokens in every slot."""
    for slot in range(len(cache.filled)):
        cache.begin(slot)
        cache.place(slot, tokens)
        for layer in cache.layers:
            for tensor in layer.tensors():
                tensor[slot].normal_(0, 0.5)


def parts_of(model, cache):
    """Calls that do one kind of work of a step each."""
    x = torch.randn(len(cache.filled), model.config.hidden_size, dtype=model.dtype, device=model.device)
    pairs = list(zip(model.layers, cache.layers))

    def mixers(kind):
        of_kind = [(layer.mixer, memory) for layer, memory in pairs if isinstance(layer.mixer, kind)]
        return lambda: [mixer.decode(x, memory, cache.batch) for mixer, memory in of_kind]

    experts = [layer.feed_forward for layer in model.layers if isinstance(layer.feed_forward, Experts)]
    parts = {"attention": mixers(MLA), "experts": lambda: [layer(x) for layer in experts]}
    return parts | ({"kda": mixers(KDA)} if any(isinstance(layer.mixer, KDA) for layer in model.layers) else {})


def largest_batch(what, model, tokens):
    """Sequences that fit."""
    size = cache_bytes(model, tokens)
    clean(what)
    fit = (torch.cuda.mem_get_info()[0] - FREE) // size if what.device == "cuda" else what.batch_limit
    if fit < 1:
        sys.exit(f"not one sequence of {tokens:,} tokens fits, which takes {size / 1e9:.1f} GB")
    return fit


def measure_decode(what, model, tokens, batch):
    cache = Cache(model, batch, tokens)
    fill(cache, tokens - 1 - what.repeats - WARM_UP)  # the parts run where these steps end
    name, cache.batch.attend, ways = fastest_way(what, model, cache)
    run = decoder.Decoder(model, cache)
    run.tokens.random_(model.config.vocab_size)
    step = seconds(run.run, what.device, what.repeats)
    split = {part: seconds(decoder.capture(call, model.device), what.device, what.repeats)["median"]
             for part, call in parts_of(model, cache).items()}
    split["rest"] = step["median"] - sum(split.values())
    return {"tokens": tokens, "batch": batch, "seconds": step, "tokens_per_second": batch / step["median"],
            "split": split, "attention": name, "ways": ways, "cache_bytes": cache.nbytes()}


# ---- The rest ------------------------------------------------------------------------------------

def cache_bytes(model, tokens):
    """Bytes of one sequence's cache, as allocated."""
    return Cache(model, 1, tokens).nbytes()


def first_token(what, model):
    """Seconds from a prompt to its first token."""
    cache = Cache(model, 1, what.prompt)
    prompt = torch.randint(model.config.vocab_size, (what.prompt,), device=what.device)
    for part in (prompt[:2 * CHUNK], prompt):  # the first to warm up
        cache.begin(0)
        synchronise(what.device)
        begin = time.perf_counter()
        model.prefill(part, cache, 0, CHUNK).argmax().item()
        taken = time.perf_counter() - begin
    return {"tokens": what.prompt, "chunk": CHUNK, "seconds": taken}


def measure(what, config):
    model = Model(config, what.device, what.dtype)
    model.randomise()
    result = {"full_attention_layers": len(config.full_attn_layers), "layers": config.num_hidden_layers,
              "parameters": sum(p.numel() for p in model.parameters()),
              "weight_bytes": sum(p.nbytes for p in model.parameters()),
              "cache_bytes": {tokens: cache_bytes(model, tokens) for tokens in what.cache_tokens},
              "first_token": first_token(what, model), "decode": []}
    for tokens in what.decode_tokens:
        for batch in sorted({1, largest_batch(what, model, tokens)}):
            result["decode"].append(measure_decode(what, model, tokens, batch))
            print_decode(result["decode"][-1])
            clean(what)
    return result


def clean(what):
    gc.collect()
    if what.device == "cuda":
        torch.cuda.empty_cache()


def print_decode(measured):
    split = ", ".join(f"{part} {took * 1e3:.2f}" for part, took in measured["split"].items())
    print(f"  decode at {measured['tokens']:8,} tokens, batch {measured['batch']:3}: "
          f"{measured['seconds']['median'] * 1e3:7.2f} ms a step ({split}), "
          f"{measured['tokens_per_second']:8.1f} tokens/s, attention by {measured['attention']}", flush=True)


def summary(results):
    """Kimi Linear in terms of the model with MLA alone."""
    ours, theirs = results["kimi_linear"], results["mla"]

    def rates(result):  # by batch, the largest last
        return {measured["tokens"]: measured["tokens_per_second"] for measured in result["decode"]}

    sizes = theirs["cache_bytes"]
    return {"cache_saved": {tokens: 1 - size / sizes[tokens] for tokens, size in ours["cache_bytes"].items()},
            "throughput": {tokens: rate / rates(theirs)[tokens] for tokens, rate in rates(ours).items()},
            "first_token": theirs["first_token"]["seconds"] / ours["first_token"]["seconds"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="where flashkda is (build)")
    parser.add_argument("--commit", help="what was built, where git cannot tell")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    what = TINY_ONE if options.tiny else FULL
    if options.tiny and not options.output:
        parser.error("--tiny needs -o FILE")
    gpu = None if options.tiny else device.describe(options.build.resolve())
    if options.tiny:
        torch.set_num_threads(1)
    path = options.output or device.results(gpu) / "model.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"version": libflashkda.__version__, "commit": device.commit(options.commit), "device": gpu,
             "python": sys.version.split()[0], "torch": torch.__version__, "model": what.name}
    results = {}
    with torch.inference_mode():
        for name, config in (("kimi_linear", what.config), ("mla", what.config.with_mla_alone())):
            print(f"{name}: {len(config.full_attn_layers)} of {config.num_hidden_layers} layers have MLA", flush=True)
            begin = time.perf_counter()
            results[name] = measure(what, config)
            clean(what)
            print(f"  first token of {what.prompt:,} after {results[name]['first_token']['seconds']:.2f} s; "
                  f"measured in {time.perf_counter() - begin:.0f} s", flush=True)
            path.write_text(json.dumps({**about, "complete": False, "results": results}, indent=2) + "\n")
    told = summary(results)
    for tokens, saved in told["cache_saved"].items():
        size = results["kimi_linear"]["cache_bytes"][tokens]
        print(f"{tokens:9,} tokens: cache {size / 1e9:.3f} GB, {saved:.1%} less")
    for tokens, ratio in told["throughput"].items():
        print(f"{tokens:9,} tokens: {ratio:.2f} times the tokens/s at the largest batches")
    print(f"first token {told['first_token']:.2f} times as fast")
    path.write_text(json.dumps({**about, "complete": True, "results": results, "summary": told}, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
