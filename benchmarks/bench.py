"""Time and memory of ours, of native NNabla and of torch's openunmix, on the same work: ``make bench``.

Every measurement is a process of its own (nnabla_side.py, torch_side.py); those to be compared alternate, so that a
machine that changes its pace changes it for all. The report, docs/performance.md, is written whole.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import work

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

REPORT = """\
# Performance

Written by `make bench` (`{command}`) on {date}, at commit {commit}. Do not edit.

**ours** is this repository; **native** the same model with `--plain`, made of NNabla's own functions only; **torch**
the reference, openunmix 1.3.0. All have {threads} threads. The model has hidden size 512 and three bidirectional
layers, reads 1487 bins of STFTs of 4096 samples every 1024, and works on stereo at 44.1 kHz in single precision.

Numbers are medians over {rounds} rounds of alternating processes, in parentheses the smallest and the largest.
Ratios are of medians: below 1, ours is the faster, or the smaller. Memory is the peak of the whole process.

## Machine

{machine}

{versions}

## Training step

STFTs of mixture and target, forward, loss, backward, Adam with weight decay; excerpts of 6 s. Ours is the function
that `train.py` calls, which also copies the batch into the graph; torch's is the loop of openunmix' `train.py`.

{steps}

## Functions

In milliseconds, at batch {batch}; backward includes the gradients of parameters. Ours are timed within a step. torch's
stand alone, cut from `OpenUnmix.forward`, on inputs of the memory layout that they have there.

{functions}

## Native NNabla

A training step at batch 1 of {native_seconds} s, small enough for native NNabla. Ours is {factor:.0f} times as fast.

{native}

## Separation

Four stems, with one iteration of the Wiener filter, from audio in memory to audio in memory; models are loaded.
Stems of ours and of torch's, from the same weights, differ by {difference:.0e} of the largest sample.

{songs}

## Cold start

From the model to the end of the first training step (batch 1, 6 s), and from files of weights to the first separated
second. With an empty cache, as after installation, our functions are compiled first, once.

{cold}
"""


# ---------------------------------------------------------------------------------------- processes


def run(side, reference, environment=None, **options):
    """One process of a side; returns what it reports."""
    script, python, path = HERE / "nnabla_side.py", sys.executable, ROOT
    if side == "torch":  # with our stand-in for torchaudio
        script, python, path = HERE / "torch_side.py", reference, ROOT / "tests" / "reference"
    elif side == "native":
        options.update(plain=True, repeat=1)
    environment = {**os.environ, **(environment or {}), "PYTHONPATH": str(path)}
    command = [str(python), str(script), json.dumps(options)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{shlex.join(command)}\n{process.stderr}\nfailed with status {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def alternate(rounds, sides, reference, **options):
    """{side: its reports as one, with the times of all rounds}; every other round goes backwards."""
    reports = {side: [] for side in sides}
    for i in range(rounds):
        for side in sides[:: -1 if i % 2 else 1]:
            said = " ".join(f"{key} {value}" for key, value in options.items() if key in ("nb_samples", "seconds"))
            print(f"{options['work']} {said}: {side}, round {i + 1} of {rounds}", file=sys.stderr, flush=True)
            reports[side].append(run(side, reference, **options))
    return {
        side: {
            **some[0],
            "times": {name: sum((report["times"][name] for report in some), []) for name in some[0]["times"]},
            "peak": statistics.median(report["peak"] for report in some),
        }
        for side, some in reports.items()
    }


# ------------------------------------------------------------------------------------------ report


def table(header, rows):
    """A table in Markdown that is readable as it is."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = ([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def ratio_of(a, b):
    return statistics.median(a) / statistics.median(b)


def whole_table(other, work_name, cases):
    """Time and memory of `work_name` as a whole; `cases` maps the first cell to the reports of ours and the other."""
    rows = []
    for case, reports in cases.items():
        times, peaks = ([reports[side][key] for side in ("ours", other)] for key in ("times", "peak"))
        times = [some[work_name] for some in times]
        rows.append([case, *(f"{statistics.median(t):.3f} s ({min(t):.3f}–{max(t):.3f})" for t in times)])
        rows[-1] += [f"{ratio_of(*times):.3f}", *(f"{peak / 2**20:.0f} MiB" for peak in peaks)]
        rows[-1].append(f"{peaks[0] / peaks[1]:.2f}")
    return table(["", "ours", other, "ratio", "memory: ours", other, "ratio"], rows)


def function_table(other, reports):
    rows = []
    for name, does in work.FUNCTIONS.items():
        row = [f"`{name}`: {does}"]
        for phase in ("forward", "backward"):
            times = [reports[side]["times"].get(f"{name} {phase}", []) for side in ("ours", other)]
            row += [f"{statistics.median(t) * 1e3:.1f}" if t else "" for t in times]
            row.append(f"{ratio_of(*times):.3f}" if all(times) else "")
        rows.append(row)
    return table(["", "forward: ours", other, "ratio", "backward: ours", other, "ratio"], rows)


def machine():
    """What the numbers depend on, as a list in Markdown."""
    info = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in info.items()}
    extensions = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in info.get("flags", "").split()]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    settings = [f"{k}={v}" for k, v in os.environ.items() if k.startswith(("OMP_", "OPENBLAS_", "MKL_", "NUMBA_"))]
    return "\n".join(
        [
            f"- {info.get('model name', platform.machine())} (model {info.get('model', '?')}), "
            f"{len(os.sched_getaffinity(0))} cores, {', '.join(extensions)}",
            f"- {memory:.0f} GiB memory, {platform.platform()}, load {os.getloadavg()[0]:.1f} before",
            f"- environment: {' '.join(settings) or 'no settings of OpenMP, OpenBLAS, MKL or Numba'}",
        ]
    )


# --------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side per measurement")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs; writes no report")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--reference", default=ROOT / ".venv-reference" / "bin" / "python", help="torch's interpreter")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    repeats = {1: 2, 2: 1} if args.quick else {1: 20, 4: 8, 16: 4}  # training steps of a process, by batch
    batch, native_seconds, lengths = max(repeats), *((1, (10,)) if args.quick else (3, (60, 180)))

    def compare(*sides, **options):
        return alternate(rounds, sides, args.reference, threads=args.threads, **options)

    if os.getloadavg()[0] > 0.5:  # OpenMP's threads spin while they wait for one that lost its core
        print("The machine is busy: torch will look much slower than it is", file=sys.stderr)
    computer = machine()  # before our own load
    sizes = {n: {"nb_samples": n, "seconds": 6, "warm_up": 2, "repeat": repeat} for n, repeat in repeats.items()}
    steps = {f"batch {n}": compare("ours", "torch", work="step", **size) for n, size in sizes.items()}
    functions = compare("ours", "torch", work="functions", **sizes[batch])
    small = {"nb_samples": 1, "seconds": native_seconds, "warm_up": 1, "repeat": 10}
    native = compare("ours", "native", work="functions", **small)
    cold = {}
    with tempfile.TemporaryDirectory() as folder:
        run("torch", args.reference, work="weights", folder=folder)
        song = {"work": "separate", "folder": folder}
        songs = {f"{seconds} s": compare("ours", "torch", seconds=seconds, **song) for seconds in lengths}
        for name, options in {"step": {"work": "step", **sizes[1]}, "separate": {"seconds": 1, **song}}.items():
            with tempfile.TemporaryDirectory() as cache:
                cache = {"NUMBA_CACHE_DIR": cache}
                cold[name] = run("ours", None, cache, threads=args.threads, **options)["times"]["first"]

    stems = [[np.array(reports[side]["result"]) for side in ("ours", "torch")] for reports in songs.values()]
    difference = max(abs(ours - torch).max() / abs(torch).max() for ours, torch in stems)
    if difference > 1e-4:
        sys.exit(f"stems of ours and of torch differ by {difference:.1e}: they did not do the same work")
    versions = [functions[side]["versions"] for side in ("ours", "torch")]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    firsts = {"training step": [cold["step"], steps["batch 1"]["ours"]["times"]["first"]]}
    firsts["separation"] = [cold["separate"], next(iter(songs.values()))["ours"]["times"]["first"]]
    report = REPORT.format(
        command=shlex.join(["python", *sys.argv]),
        date=time.strftime("%Y-%m-%d"),
        commit=subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        threads=args.threads,
        rounds=rounds,
        machine=computer,
        versions=table(
            ["", "ours, native", "torch"],
            [[name, *(some.get(name, "") for some in versions)] for name in {**versions[0], **versions[1]}],
        ),
        steps=whole_table("torch", "step", steps),
        batch=batch,
        functions=function_table("torch", functions),
        native_seconds=native_seconds,
        factor=ratio_of(*(native[side]["times"]["step"] for side in ("native", "ours"))),
        native=whole_table("native", "step", {"step": native}) + "\n\n" + function_table("native", native),
        difference=difference,
        songs=whole_table("torch", "separate", songs),
        cold=table(
            ["", "empty cache", "later"],
            [[name, *(f"{statistics.median(t):.1f} s" for t in both)] for name, both in firsts.items()],
        ),
    )
    print(report)
    if not args.quick:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "performance.md").write_text(report)


if __name__ == "__main__":
    main()
