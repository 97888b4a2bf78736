# SPDX-License-Identifier: MIT
"""Trains the small model of examples/train.py from the same start on the same text in several ways: with KDA by this
library, by the recurrence in plain torch, by flash-linear-attention. Their losses must lie on each other.

usage: training_curve.py [--device cpu|cuda] [--ways WAY,WAY..] [--steps N] [--commit NAME] [-o FILE]

On a CPU libflashkda and recurrence, 30 steps in fp32; on a GPU libflashkda and fla, 300 steps in bf16. Writes
benchmarks/results/cpu/training.json, or that of the GPU, or FILE, and a figure of it where matplotlib is installed.
Exit status 1 if two curves lie further apart than they may. Needs torch, the installed package, and fla for that way.
"""

import argparse
import json
import pathlib
import platform
import statistics
import sys
import time

import device
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import libflashkda  # noqa: E402
import train  # noqa: E402
from kda_layer import KDALayer  # noqa: E402

# What is trained where, and how far the losses of a step may differ, in nats a byte: middle of all steps, and any. In
# bf16 they part as those of two roundings do.
PLANS = {
    "cpu": {"ways": "libflashkda,recurrence", "steps": 30, "batch": 4, "tokens": 192,
            "model": {"width": 64, "heads": 2, "head_dim": 32, "layers": 2}, "middle": 1e-5, "any": 1e-4},
    "cuda": {"ways": "libflashkda,fla", "steps": 300, "batch": 8, "tokens": 2048,
             "model": {"width": 512, "heads": 4, "head_dim": 128, "layers": 4}, "middle": 0.02, "any": 0.1},
}


class Recurrence(KDALayer):
    """Token by token, in plain torch; torch finds its gradients."""

    def attend(self, q, k, v, g, beta, state):
        q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        bias = self.dt_bias.view(self.value_heads, -1)
        decay = (-self.A_log.exp()[:, None] * torch.nn.functional.softplus(g + bias)).exp()
        step, q, outputs = beta.sigmoid(), q * q.shape[-1] ** -0.5, []
        S = q.new_zeros(*q.shape[:1], *v.shape[2:3], q.shape[3], v.shape[3])
        for t in range(q.shape[1]):
            S = decay[:, t, :, :, None] * S
            u = step[:, t, :, None] * (v[:, t] - (k[:, t, :, None] @ S)[:, :, 0])
            S = S + k[:, t, :, :, None] * u[:, :, None]
            outputs.append((q[:, t, :, None] @ S)[:, :, 0])
        return torch.stack(outputs, 1), S


class Fla(KDALayer):
    def attend(self, q, k, v, g, beta, state):
        from fla.ops.kda import chunk_kda

        return chunk_kda(q, k, v, g, beta, A_log=self.A_log, dt_bias=self.dt_bias, use_qk_l2norm_in_kernel=True,
                         use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, output_final_state=True)


class Libflashkda(KDALayer):
    def attend(self, q, k, v, g, beta, state):
        return libflashkda.chunk_kda(q, k, v, g, beta, A_log=self.A_log, dt_bias=self.dt_bias,
                                     use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                                     use_beta_sigmoid_in_kernel=True, output_final_state=True)


WAYS = {"libflashkda": Libflashkda, "recurrence": Recurrence, "fla": Fla}


def run(way, plan, steps, where):
    """Losses. The time of a step is printed alone: curves may be drawn beside other programs."""
    torch.manual_seed(0)
    model = train.Model(**plan["model"], layer=WAYS[way]).to(where)
    losses, ends = [], [time.perf_counter()]
    for step, loss in enumerate(train.train(model, steps, plan["batch"], plan["tokens"]), 1):
        losses.append(round(loss, 7))
        ends.append(time.perf_counter())
        if step == 1 or step % (steps // 10 or 1) == 0:
            print(f"{way:12} step {step:4}: {loss:.4f} nats a byte", flush=True)
    print(f"{way:12} {statistics.median(b - a for a, b in zip(ends, ends[1:])) * 1e3:.1f} ms a step", flush=True)
    return {"losses": losses}


def apart(curves):
    """How far the losses of a step are apart: in the middle of all steps, and at most."""
    distances = [max(losses) - min(losses) for losses in zip(*(curve["losses"] for curve in curves.values()))]
    return {"middle": statistics.median(distances), "any": max(distances)}


def draw(measured, path):
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no figure, for matplotlib is not installed")
        return
    pyplot.rcParams.update({"svg.hashsalt": "flashkda", "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False})
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    styles = [{"linewidth": 4, "color": "#e3bf97"}, {"linewidth": 1.2, "color": "#4878a8"},
              {"linewidth": 1.2, "color": "#6a9f58", "linestyle": "--"}]
    for (way, curve), style in zip(measured["curves"].items(), styles):
        axes.plot(range(1, len(curve["losses"]) + 1), curve["losses"], label=way, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a byte")
    axes.legend(frameon=False)
    axes.set_title(f"One model trained in {len(measured['curves'])} ways, on {measured['device']}:\n"
                   f"at most {measured['apart']['any']:.0e} nats apart", fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("\n")[4].removeprefix("usage: "))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=PLANS)
    parser.add_argument("--ways", help="of " + ", ".join(WAYS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--commit", help="what is installed, where git cannot tell")
    parser.add_argument("-o", "--output", type=pathlib.Path)
    options = parser.parse_args()
    plan, cuda = PLANS[options.device], options.device == "cuda"
    steps = options.steps or plan["steps"]
    curves = {way: run(way, plan, steps, options.device) for way in (options.ways or plan["ways"]).split(",")}
    distance = apart(curves)
    name = torch.cuda.get_device_name() if cuda else f"a CPU, level {libflashkda._C.cpu_level()}"
    print(f"apart: {distance['middle']:.2g} nats in the middle, {distance['any']:.2g} at most")
    path = options.output or (device.results({"name": name}) if cuda else ROOT / "benchmarks" / "results" / "cpu"
                              ) / "training.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {"version": libflashkda.__version__, "commit": device.commit(options.commit), "device": name,
                "python": platform.python_version(), "torch": torch.__version__, "steps": steps, "batch": plan["batch"],
                "tokens": plan["tokens"], "model": plan["model"], "apart": distance,
                "may_be_apart": {key: plan[key] for key in distance}, "curves": curves}
    path.write_text(json.dumps(measured, indent=2) + "\n")
    print(f"wrote {path}")
    draw(measured, path.with_suffix(".svg"))
    if any(distance[key] > plan[key] for key in distance):
        sys.exit(f"the curves are {distance} nats apart; they may be {measured['may_be_apart']}")


if __name__ == "__main__":
    main()
