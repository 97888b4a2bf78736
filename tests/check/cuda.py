# SPDX-License-Identifier: MIT
"""Everything that needs a GPU, in one go: the check program on level cuda, short and long cases; the captured inputs;
and the short cases again under each tool of compute-sanitizer, where that is installed. On a GPU with a level of its
own all of that runs in every other way, too: see FORCED.

usage: cuda.py [--build DIR] [--quick] [--only JOB ...] [--seed N] [--commit NAME] [-o FILE]      (./dev check-cuda)

A few jobs run side by side, on every GPU there is; what each printed is kept in DIR/check-cuda/. Writes a summary to
benchmarks/results/DEVICE/check.json, or FILE, as each job ends; with --only it writes nothing unless FILE is given, in
which the other jobs then stay as they are, each with the commit that it ran on. "passed" is of the jobs that ran,
"complete" if all there are did. Exit status: 0 if every job that ran now passed. Needs the standard library alone.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import device  # noqa: E402

# With their own options. The check program makes wrong calls on purpose and looks at every status itself.
TOOL_OPTIONS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "initcheck": [], "synccheck": []}
TOOLS = list(TOOL_OPTIONS)
# Values of FLASH_KDA_CUDA for prefill: the portable level, then Hopper's schedules.
FORCED = {"-sm80": "sm80", "-general": "sm90/general/5", "-persistent": "sm90/persistent", "-cluster": "sm90/cluster/1",
          "-split": "sm90/cluster/3", "-stream_k": "sm90/stream_k"}
DECODE = "-decode"
DECODE_FORCED = {DECODE + "-sm80": "sm80"}
BACKWARD = "-backward"
BACKWARD_FORCED = {BACKWARD + "-sm80": "sm80"}
# The halves of prefill and backward, and fold: neither has long cases.
PARALLEL, FOLD = "-parallel", "-fold"
PARALLEL_FORCED = {PARALLEL + "-sm80": "sm80"}
JOBS = ([name + what for name in ("short", "long", "captured", *TOOLS)
         for what in ("", *FORCED, DECODE, *DECODE_FORCED, BACKWARD, *BACKWARD_FORCED)]
        + [name + what for name in ("short", *TOOLS) for what in (PARALLEL, *PARALLEL_FORCED, FOLD)])
# Not on Hopper: initcheck does not count copies in bulk from shared memory as writes, so that it finds fault with all that
# prepare leaves. That backward reads nothing unwritten is what its cases show, with one filling of the workspace and another.
BLIND = {"initcheck" + BACKWARD}
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
TOOL_FOUND_ERRORS = 99  # exit status
# Jobs at once on a GPU. It gives processes their turns by time, so that small calls of many wait for each other most of
# it: beside 15 others the short cases of decode had not ended after 290 s, alone they end within a minute.
SIDE_BY_SIDE = 4
LONG_JOBS = ("racecheck", "long" + DECODE, "long" + BACKWARD)  # minutes; they begin first


def commands(build, seed, quick, op):
    """The commands of every job of one operation. Under a sanitizer the quick cases, without guards: see --bare."""
    check = [build / "flashkda_check", "--level", "cuda", "--seed", str(seed), "--op", op]
    some = ["--quick"] if quick else []
    jobs = {"short": [[*check, *some]]}
    if op in ("prefill", "decode", "backward"):
        jobs["long"] = [[*check, "--long", *some]]
        captured = sorted((ROOT / "data").glob("*.safetensors"))
        how = ["--decode"] if op == "decode" else []
        jobs["captured"] = [[build / "flashkda", "run", path, "--backend", "cuda", "--check", *how]
                            for path in captured]
    if op == "backward":  # whose program is bench: it times nothing that is wrong
        jobs["captured"] = [[build / "flashkda", "bench", "--backend", "cuda", "--backward", "--captured", path,
                             "--tokens", "2000", "--heads", "4"] for path in captured]
    for tool in TOOLS if SANITIZER else []:
        jobs[tool] = [[SANITIZER, "--tool", tool, *TOOL_OPTIONS[tool], "--error-exitcode", str(TOOL_FOUND_ERRORS),
                       *check, "--quick", "--bare"]]
    return jobs


def all_jobs(build, gpu, seed, quick):
    """Names to commands and what they get in their environment."""
    jobs = {}
    for op, what, every_way in (("prefill", "", FORCED), ("decode", DECODE, DECODE_FORCED),
                                ("backward", BACKWARD, BACKWARD_FORCED), ("parallel", PARALLEL, PARALLEL_FORCED),
                                ("fold", FOLD, {})):
        wanted = commands(build, seed, quick, op)
        jobs |= {name + what: (command, {}) for name, command in wanted.items()}
        if gpu["compute_capability"].startswith("9."):
            jobs |= {name + way: (command, {"FLASH_KDA_CUDA": forced})
                     for name, command in wanted.items() for way, forced in every_way.items()}
            jobs = {name: job for name, job in jobs.items() if name not in BLIND}
    return dict(sorted(jobs.items(), key=lambda job: not job[0].startswith(LONG_JOBS)))


class Job:
    """Commands that run one after another while other jobs run too."""

    def __init__(self, name, wanted, environment, log):
        self.name, self.wanted, self.environment, self.path = name, list(wanted), environment, log
        self.file, self.begin, self.gpu, self.process, self.statuses = None, None, None, None, []

    def start(self, gpu):
        self.file, self.begin, self.gpu = self.path.open("w"), time.monotonic(), gpu

    def running(self):
        if self.process and self.process.poll() is None:
            return True
        if self.process:
            self.statuses.append(self.process.returncode)
            self.process = None
        if not self.wanted:
            return False
        self.process = subprocess.Popen(self.wanted.pop(0), stdout=self.file, stderr=subprocess.STDOUT,
                                        env=os.environ | self.environment | {"CUDA_VISIBLE_DEVICES": self.gpu})
        return True

    def result(self):
        """What the job printed and how it ended, in numbers."""
        self.file.close()
        text = self.path.read_text(errors="replace")
        result = {"good": bool(self.statuses) and not any(self.statuses),
                  "seconds": round(time.monotonic() - self.begin, 1), "exit_statuses": self.statuses}
        counts = re.findall(r"^(\d+) passed, (\d+) failed$", text, re.M)
        if counts:
            result["passed"], result["failed"] = (int(n) for n in counts[-1])
        elif not self.name.startswith("captured"):
            result["good"] = False  # it ended before its summary
        else:
            result["passed"], result["failed"] = self.statuses.count(0), len(self.statuses) - self.statuses.count(0)
        result["failures"] = re.findall(r"^FAIL (.*)$", text, re.M)
        if self.name.startswith("long"):
            result["measured"] = dict(re.findall(r"^ok   cuda +(.*?): ((?:out|dq) .*)$", text, re.M))
        if self.name.split("-")[0] in TOOLS:
            summary = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", text, re.M)
            result["summary"] = summary[-1] if summary else None
            result["good"] &= bool(summary) and not any(int(n) for n in re.findall(r"\d+", summary[-1]))
        return result


def visible_gpus(count):
    """What CUDA_VISIBLE_DEVICES calls each of them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def run(jobs, gpus, folder, write):
    """Runs all jobs, some side by side on each of the GPUs. As each ends, prints a line and has all results until then
    written."""
    folder.mkdir(exist_ok=True)
    waiting = [Job(name, wanted, environment, folder / f"{name}.log") for name, (wanted, environment) in jobs.items()]
    free, going, results = gpus * SIDE_BY_SIDE, [], {}
    while waiting or going:
        while waiting and free:
            going.append(waiting.pop(0))
            going[-1].start(free.pop(0))
        for job in list(going):
            if job.running():
                continue
            going.remove(job)
            free.append(job.gpu)
            result = results[job.name] = job.result()
            print(f"{job.name:15} {'passed' if result['good'] else 'FAILED'}: {result.get('passed', 0)} cases passed,"
                  f" {result.get('failed', 0)} failed, {result['seconds']} s"
                  + (f"; {result['summary']}" if result.get("summary") else "")
                  + ("" if result["good"] else f"; see {job.path}"), flush=True)
            for failure in result["failures"][:10]:
                print(f"    {failure}")
            write(results)
        time.sleep(0.1)
    return results


def earlier(path):
    """Names to results of the jobs of an earlier run that left this file, if it is there."""
    if not path or not path.exists():
        return {}
    summary = json.loads(path.read_text())
    return {name: {"commit": summary["commit"]} | result for name, result in summary["jobs"].items() if result}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="where the programs are (build)")
    parser.add_argument("--quick", action="store_true", help="fewer short cases and shorter long ones")
    parser.add_argument("--only", nargs="+", choices=JOBS, help="these jobs alone")
    parser.add_argument("--seed", type=int, default=1, help="of all inputs (1)")
    parser.add_argument("--commit", help="what was built, where git cannot tell")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="the summary")
    return parser.parse_args()


def main():
    options = arguments()
    build = options.build.resolve()
    gpus = device.describe_all(build)
    gpu = gpus[0]
    os.environ.pop("FLASH_KDA_CUDA", None)  # a job's name says which way it goes
    jobs = all_jobs(build, gpu, options.seed, options.quick)
    if not SANITIZER:
        print("compute-sanitizer is not installed: memcheck, racecheck, initcheck and synccheck do NOT run")
    if options.only:
        jobs = {name: job for name, job in jobs.items() if name in options.only}
    if not jobs:
        sys.exit("no job is left to run")
    path = options.output or (None if options.only else device.results(gpu) / "check.json")
    commit = device.commit(options.commit)

    kept = earlier(path) if options.only else {}

    def write(ran):
        if not path:
            return
        results = {name: result for name, result in kept.items() if name not in BLIND} | {name: result | {"commit": commit} for name, result in ran.items()}
        summary = {
            "passed": all(result["good"] for result in results.values()),
            "complete": set(results) >= set(JOBS) - BLIND,
            "commit": commit,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "device": gpu,
            "seed": options.seed,
            "quick": options.quick,
            "jobs": {name: results.get(name) for name in JOBS},  # null: did not run
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=2) + "\n")

    results = run(jobs, visible_gpus(len(gpus)), build / "check-cuda", write)
    passed = all(result["good"] for result in results.values())
    if path:
        print(f"wrote {path}")
    print("all passed" if passed else "NOT all passed")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
