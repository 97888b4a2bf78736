# SPDX-License-Identifier: MIT
"""What a person runs: python -m libflashkda, python -m libflashkda.plot, the examples in Python."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import libflashkda
import libflashkda.__main__ as info
import numpy
import pytest
import safetensors.torch
import torch
from libflashkda import _C, _problem_file, plot
from recurrence import BF16_ANY, BF16_MARGIN, DATA, error_ratio, log_decay, make, solve

pytestmark = pytest.mark.filterwarnings("ignore:Triton is not supported on current platform")

ROOT = pathlib.Path(__file__).parents[2]
BENCHMARKS = sorted(path for path in (ROOT / "benchmarks" / "results").rglob("*.json")
                    if {"results", "machine"} <= json.loads(path.read_text()).keys())
PNG = b"\x89PNG\r\n"
matplotlib = pytest.mark.library("matplotlib")


def run(*arguments, **more):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **more)


# ---- python -m libflashkda -------------------------------------------------------------------------


def test_info():
    result = run("-m", "libflashkda")
    assert result.returncode == 0, result.stderr
    rows = torch.empty(1, 4096, 8, 128, dtype=torch.bfloat16)
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"version    {libflashkda.__version__}, Python 3.")
    assert lines[1] == f"levels     {' '.join(_C.cpu_levels())}; chosen: {_C.cpu_level()}"
    for name in ("reference", "cpu", "cuda"):
        missing = not _C.backend_available(_C.BACKENDS[name])
        assert name in lines[2] and (f"{name} (not available)" in lines[2]) == missing
    for name in ("torch", "numpy"):
        assert f"{name} {importlib.metadata.version(name)}" in lines[3]
    assert lines[5].strip() == f"cpu in bf16: {libflashkda.prefill_describe(*[rows] * 4, rows[..., 0])}"
    assert len(lines) == 6 + 2 * torch.cuda.device_count()


def test_help():
    result = run("-m", "libflashkda", "--help")
    assert result.returncode == 0 and "as `flashkda info` prints it" in result.stdout.replace("\n", " ")
    assert run("-m", "libflashkda", "--verbose").returncode == 2


@pytest.mark.cuda
def test_info_of_a_gpu():
    lines = run("-m", "libflashkda").stdout.splitlines()
    assert torch.cuda.get_device_name(0) in lines[6] and lines[7].strip().startswith("cuda:0 in bf16: cuda: level sm")


def test_info_of_a_forced_level():
    result = run("-m", "libflashkda", env={**os.environ, "FLASH_KDA_CPU": "generic"})
    assert "; chosen: generic\n" in result.stdout and "cpu: level generic, " in result.stdout
    result = run("-m", "libflashkda", env={**os.environ, "FLASH_KDA_CPU": "sse"})
    assert result.returncode == 1 and not result.stdout
    assert "the environment variable FLASH_KDA_CPU is sse; expected" in result.stderr


@pytest.mark.parametrize("numpy_version, line", [("2", "cpu in fp32: cpu: level "), (None, "torch or numpy is needed")])
def test_info_without_torch(monkeypatch, capsys, numpy_version, line):
    monkeypatch.setattr(info, "_versions", lambda: dict.fromkeys(info._LIBRARIES) | {"numpy": numpy_version})
    monkeypatch.setattr(sys, "argv", ["libflashkda"])
    info.main()
    printed = capsys.readouterr().out
    assert "torch (not found)" in printed and printed.splitlines()[-1].strip().startswith(line)


# ---- Problem files -------------------------------------------------------------------------------


def save(problem, path, metadata=None, drop=(), bare=False):
    """A problem as the program flashkda would write it. bare: without the dimension B, and N."""
    o = problem.options
    tensors = dict(zip(("q", "k", "v", "g", "beta"), problem.inputs))
    tensors |= {name: o[name] for name in ("A_log", "dt_bias", "cu_seqlens", "initial_state") if name in o}
    if bare:
        leading = ("q", "k", "v", "g", "beta", *(() if "cu_seqlens" in o else ("initial_state",)))
        tensors |= {name: tensors[name][0].clone() for name in leading if name in tensors}
    said = {"gate": o["gate"], "beta": o["beta_mode"], "qk_norm": str(o["qk_norm"]).lower(),
            "state_layout": o["state_layout"]} | {name: str(o[name]) for name in ("lower_bound", "scale") if name in o}
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if name not in drop}, path,
                                said if metadata is None else metadata)
    return str(path)


PROBLEMS = [
    {"gate": "softplus"},
    {"B": 2, "gate": "sigmoid", "lower_bound": -3.0, "dtype": torch.float32, "scale": 0.5},
    {"gate": "none", "beta_mode": "given", "qk_norm": False, "initial_state": torch.float32},
    {"lengths": [30, 0, 50], "initial_state": torch.bfloat16, "v_first": False, "HV": 4},
]


@pytest.mark.parametrize("more, bare", [*((more, False) for more in PROBLEMS),
                                        *((more, True) for more in PROBLEMS if "B" not in more)], ids=str)
def test_a_file_is_the_problem(more, bare, tmp_path):
    problem = make(**more)
    read = _problem_file.read(save(problem, tmp_path / "problem.safetensors", bare=bare))
    options = {name: value for name, value in read.options.items() if not isinstance(value, numpy.ndarray)}
    assert options == {name: value for name, value in problem.options.items() if not isinstance(value, torch.Tensor)}
    arrays = dict(zip(("q", "k", "v", "g", "beta"), read.inputs)) | read.options
    arrays |= {"cu_seqlens": read.cu_seqlens, "initial_state": read.initial_state}
    for name, tensor in [*zip(("q", "k", "v", "g", "beta"), problem.inputs), *problem.options.items()]:
        if isinstance(tensor, torch.Tensor):
            assert arrays[name].shape == tensor.shape
            assert (arrays[name].astype("float64") == tensor.double().numpy()).all(), name


def test_what_a_file_means_that_does_not_say(tmp_path):
    problem = make(gate="sigmoid", lower_bound=-1.0)
    read = _problem_file.read(save(problem, tmp_path / "silent.safetensors", {"gate": "sigmoid", "scale": ""}))
    silent = {"gate": "sigmoid", "lower_bound": -5.0, "beta_mode": "sigmoid", "qk_norm": True,
              "state_layout": "v_first"}
    assert {name: read.options[name] for name in read.options if name not in ("A_log", "dt_bias")} == silent


# ---- python -m libflashkda.plot --------------------------------------------------------------------


@pytest.mark.parametrize("more", PROBLEMS, ids=str)
def test_log_decay(more):
    problem = make(**more)
    options = {name: value.numpy() if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16 else value
               for name, value in problem.options.items()}
    expected = log_decay(problem).numpy()
    assert error_ratio(plot.log_decay(problem.g.float().numpy(), **options), expected) < 1e-6


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("more", PROBLEMS, ids=str)
def test_trace(more, step, tmp_path):
    problem = make(**more)
    read = _problem_file.read(save(problem, tmp_path / "problem.safetensors"))
    decays = numpy.exp(log_decay(problem).numpy()).mean(3)
    _, finals, inner = solve(problem, every=1)
    spans = plot.sequences(read)
    assert len(spans) == len(finals)
    for n, (b, start, end) in enumerate(spans):
        states = numpy.array([*inner[n], finals[n]])
        points = list(plot.trace(read, n, step))
        assert [token for token, _, _ in points] == [min(t + step, end) for t in range(start, end, step)]
        for token, decay, norm in points:
            first = start + (token - 1 - start) // step * step
            assert decay == pytest.approx(decays[b, first:token].mean(0), rel=1e-5)
            assert norm == pytest.approx(numpy.linalg.norm(states[token - start], axis=(1, 2)), rel=1e-4)


@matplotlib
@pytest.mark.parametrize("gate", ["softplus", "sigmoid"])
def test_plot_of_an_input(gate, tmp_path):
    result = run("-m", "libflashkda.plot", DATA / f"small_{gate}.safetensors", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"drew small_{gate}.png\n"
    assert (tmp_path / f"small_{gate}.png").read_bytes().startswith(PNG)


@matplotlib
def test_lines(tmp_path):
    read = _problem_file.read(save(make(lengths=[300, 0, 500, 1], K=8, V=8, HV=3, H=1), tmp_path / "p.safetensors"))
    decay, norm = plot.draw_problem(read, "p").axes
    assert "2 tokens" in decay.get_ylabel() and "4 sequences" in norm.get_xlabel()
    for axes, place in ((decay, 1), (norm, 2)):
        lines = [line for line in axes.lines if line.get_label().startswith("head")]
        assert [line.get_label() for line in lines] == ["head 0", "head 1", "head 2"] * 3
        for i, line in enumerate(lines):
            points = list(plot.trace(read, (0, 2, 3)[i // 3], 2))
            assert list(line.get_xdata()) == [point[0] for point in points]
            assert list(line.get_ydata()) == [point[place][i % 3] for point in points]


def result_of(name, level, seconds, **peers):
    timed = {"seconds": {"median": seconds}, "gflops": 6 / seconds} if seconds else {}
    return {"name": name, "level": level, "threads": None, "case": {"out_dtype": "bf16"}, **timed,
            "peers": {peer: None if time is None else {"seconds": {"median": time} if time else None}
                      for peer, time in peers.items()}}


def test_rates():
    assert plot.rates(result_of("a", "sm90", 2, fla=4, flashkda=None)) == {"level sm90": 3, "fla": 1.5}
    assert plot.rates(result_of("a", "sm90", 2, fla=0)) == {"level sm90": 3, "fla": None}
    assert plot.rates(result_of("a", "sm90", None, fla=4)) == {"level sm90": None, "fla": None}


def widths(figure):
    return [bar.get_width() for bar in figure.axes[0].patches if bar.get_width()]


@matplotlib
def test_bars():
    measured = {"machine": {"device": {"name": "A GPU"}}, "commit": "abc", "date": "2026-01-01T",
                "results": [result_of("a", "sm90", 2, fla=4), result_of("b", "sm90", None, fla=4)]}
    figure = plot.draw_benchmark(measured)
    axes, = figure.axes
    assert widths(figure) == [3, 1.5]
    assert [text.get_text() for text in axes.texts] == ["3", "2", "wrong, not timed", "wrong, not timed"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["level sm90", "fla"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a, bf16 output", "b, bf16 output"]


@matplotlib
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.parent.name)
def test_plot_of_what_was_measured(path, tmp_path):
    measured = json.loads(path.read_text())
    expected = [rate for result in measured["results"] for rate in plot.rates(result).values() if rate]
    assert len(expected) >= len(measured["results"])
    assert sorted(widths(plot.draw_benchmark(measured))) == pytest.approx(sorted(expected))
    result = run("-m", "libflashkda.plot", path, "-o", tmp_path / "bars.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "bars.png").read_bytes().startswith(PNG)


BAD = {
    "absent.safetensors": (None, "No such file"),
    "noise.safetensors": (b"\xff" * 100, "no safetensors file"),
    "check.json": (b'{"passed": true}', "holds no benchmark; expected what flashkda bench writes"),
    "list.json": (b"[]", "holds no benchmark"),
    "text.json": (b"speed", "Expecting value"),
}


@matplotlib
@pytest.mark.parametrize("name", BAD)
def test_files_that_are_none(name, tmp_path):
    contents, sentence = BAD[name]
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    result = run("-m", "libflashkda.plot", name, "-o", "out.png", cwd=tmp_path)
    assert result.returncode == 1 and not (tmp_path / "out.png").exists()
    assert result.stderr.startswith(f"{name}: ") and sentence in result.stderr and result.stderr.count("\n") == 1


WRONG = [
    ({"drop": ("g", "beta")}, "has no tensor 'g' and no 'beta'"),
    ({"metadata": {"beta": "sigmoid"}}, "metadata does not say the gate"),
    ({"metadata": {"gate": "relu"}}, "gate is 'relu'; expected 'none' or 'softplus' or 'sigmoid'"),
    ({"metadata": {"gate": "softplus", "qk_norm": "yes"}}, "metadata qk_norm is 'yes'; expected true or false"),
    ({"metadata": {"gate": "softplus", "beta": "tanh"}}, "beta_mode is 'tanh'; expected"),
]


@matplotlib
@pytest.mark.parametrize("how, sentence", WRONG, ids=str)
def test_problems_that_are_wrong(how, sentence, tmp_path):
    save(make(), tmp_path / "p.safetensors", **how)
    result = run("-m", "libflashkda.plot", "p.safetensors", cwd=tmp_path)
    assert result.returncode == 1 and not (tmp_path / "p.png").exists()
    assert result.stderr.startswith(f"p.safetensors: {sentence}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["matplotlib", "safetensors", "ml_dtypes"])
def test_a_package_is_missing(package, tmp_path):
    path = DATA / "small_softplus.safetensors"
    script = f"import sys; sys.modules['{package}'] = None; from libflashkda import plot; plot.main()"
    result = run("-c", script, path, cwd=tmp_path)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    assert result.stderr.startswith(f"libflashkda.plot needs {package}, which is not installed")
    assert result.stderr.count("\n") == 1


# ---- examples/ -----------------------------------------------------------------------------------

def test_first():
    result = run(ROOT / "examples" / "first.py")
    assert result.returncode == 0, result.stderr
    words, number = result.stdout.rsplit(" ", 1)
    assert words == "the last token's first output is" and 0 < abs(float(number)) < 10



def test_serve(device):
    result = run(ROOT / "examples" / "serve.py", "--device", device)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(f"on {device}: every sequence is what one prefill makes of it\n")
    assert result.stdout.count("is done") == 10


def test_layer(device):
    result = run(ROOT / "examples" / "kda_layer.py", "--device", device)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(f"on {device}: the same in parts as in one go\n")


# As in conftest.py: torch's threads do not pay here.
ONE_THREAD = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def test_train():
    result = run(ROOT / "examples" / "train.py", "--device", "cpu", "--steps", "15", **ONE_THREAD)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("on cpu: it learns\n")


def test_training_curves(tmp_path):
    """What the benchmark makes of few steps: this library's losses are the plain recurrence's."""
    path = tmp_path / "curves.json"
    result = run(ROOT / "benchmarks" / "training_curve.py", "--device", "cpu", "--steps", "4", "-o", path, **ONE_THREAD)
    assert result.returncode == 0, result.stdout + result.stderr
    measured = json.loads(path.read_text())
    ours, plain = (measured["curves"][way]["losses"] for way in ("libflashkda", "recurrence"))
    assert len(ours) == 4 and ours[3] < ours[0] - 0.1
    assert ours == pytest.approx(plain, abs=1e-5) and measured["apart"]["any"] < 1e-5
    assert path.with_suffix(".svg").read_text().startswith("<?xml")


def layers(monkeypatch):
    """fla's layer and the example's, with the same weights."""
    from fla.layers.kda import KimiDeltaAttention

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import kda_layer

    torch.manual_seed(0)
    theirs = KimiDeltaAttention(hidden_size=256, head_dim=128, num_heads=2, num_v_heads=4, layer_idx=0).eval()
    ours = kda_layer.KDALayer(256, heads=2, value_heads=4)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.library("fla")
def test_layer_takes_flas_weights(monkeypatch):
    theirs, ours = layers(monkeypatch)
    y, _ = ours(torch.randn(1, 5, 256))
    assert y.shape == (1, 5, 256) and y.isfinite().all()


@pytest.mark.cuda
@pytest.mark.library("fla")
def test_layer_is_flas(monkeypatch):
    """Two layers that round to bf16 on their own, several times."""
    theirs, ours = (layer.to("cuda", torch.bfloat16) for layer in layers(monkeypatch))
    x = torch.randn(2, 300, 256, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        expected, _, _ = theirs(x)
        y, _ = ours(x)
    assert error_ratio(y, expected.double().cpu().numpy()) <= 2 * (BF16_MARGIN * BF16_ANY + 2 * 1.65e-3)


@pytest.mark.library("fla")
def test_fla_switch(device):
    result = run(ROOT / "examples" / "fla_switch.py", "--device", device)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "chunk_kda -> flash_kda" in result.stderr
    assert ("error ratio to fla's own kernels" in result.stdout) == (device == "cuda")


def test_fla_switch_without_fla():
    script = f"import sys, runpy; sys.modules['fla'] = None; runpy.run_path({str(ROOT / 'examples/fla_switch.py')!r})"
    result = run("-c", script)
    assert result.returncode == 1 and result.stderr.startswith("this example needs flash-linear-attention")
