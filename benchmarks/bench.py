"""Time and memory of ours, of native NNabla and of torch's openunmix, on the same work: ``make bench``.

Every measurement is a process of its own (nnabla_side.py, torch_side.py); those to be compared alternate, so that a
machine that changes its pace changes it for all. The report, docs/performance.md, is written whole.
"""

import argparse
import math
import statistics
import sys
import tempfile

import numpy as np
import work
from report import (
    ROOT,
    add_options,
    execute,
    machine,
    origin,
    ratio_of,
    run,
    spread,
    table,
    versions_table,
    warn_if_busy,
)

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
that `train.py` calls, given a batch as its workers prepare it; torch's is the loop of openunmix' `train.py`.

{steps}

## Joint step

A step of four targets, with the batches that it reads: four separate trainings, their networks side by side
(`--targets`), with X-UMX's bridges (`--crossing`), and with its loss, too (`--loss xumx`). What networks side by side
have in common is the mixture: how it is read, and its spectrogram, which at batch {batch} is {share:.1%} of a separate
step, so that sharing it leaves {left:.3f} of four. `python benchmarks/bench.py --joint` measures this alone.

{joint}

## Functions

In milliseconds, at batch {batch}; backward includes the gradients of parameters. Ours are timed within a step. torch's
stand alone, cut from `OpenUnmix.forward`, on inputs of the memory layout that they have there.

{functions}

## Native NNabla

A training step at batch 1 of {native_seconds} s, small enough for native NNabla. Ours is {factor:.0f} times as fast.

{native}

## Native transform

The STFT of a batch of {batch}, stereo, 6 s, in native functions: NNabla's own, F.stft, a convolution, and the two
matrix products of `fourier.py`, the form for a GPU; in turns within a process. Operations are those of the products.
`python benchmarks/bench.py --transform` measures this alone.

{transform}

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


def alternate(rounds, sides, reference, **options):
    """{side: its reports as one, with times and results of all rounds}; every other round goes backwards."""
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
            "results": [report["result"] for report in some],
        }
        for side, some in reports.items()
    }


# ------------------------------------------------------------------------------------------ report


def whole_table(other, work_name, cases):
    """Time and memory of `work_name` as a whole; `cases` maps the first cell to the reports of ours and the other."""
    rows = []
    for case, reports in cases.items():
        times, peaks = ([reports[side][key] for side in ("ours", other)] for key in ("times", "peak"))
        times = [some[work_name] for some in times]
        rows.append([case, *(f"{spread(t, '.3f')} s" for t in times)])
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


def joint_table(rounds, repeats, threads):
    """Of `work.JOINT`, in alternating processes."""
    rows = []
    with tempfile.TemporaryDirectory() as songs:
        lengths = ("--train", "4", "--valid", "1", "--test", "0", "--duration", "20")
        execute([sys.executable, ROOT / "synthesize.py", songs, *lengths, "--quiet"])
        for n, repeat in repeats.items():
            times, peaks = ({kind: [] for kind in work.JOINT} for _ in range(2))
            size = {"nb_samples": n, "seconds": 6.0, "warm_up": 2, "repeat": repeat}
            for i in range(rounds):
                for kind in list(work.JOINT)[:: -1 if i % 2 else 1]:
                    print(f"joint step {n}: {kind}, round {i + 1} of {rounds}", file=sys.stderr, flush=True)
                    report = run("ours", None, work="joint", songs=songs, kind=kind, threads=threads, **size)
                    factor = 4 if kind == "separate" else 1
                    times[kind] += [factor * seconds for seconds in report["times"]["step"]]
                    peaks[kind].append(report["peak"])
            row = [f"batch {n}", f"{spread(times['separate'], '.3f')} s"]
            for kind, other in (("side by side", "separate"), ("bridges", "side by side"), ("X-UMX", "side by side")):
                row += [f"{spread(times[kind], '.3f')} s", f"{ratio_of(times[kind], times[other]):.3f}"]
            rows.append([*row, f"{statistics.median(peaks['X-UMX']) / 2**20:.0f} MiB"])
    header = ["", "four separate", "side by side", "ratio to these", "bridges", "to side by side"]
    return table([*header, "X-UMX", "to side by side", "its memory"], rows)


def transform_table(nb_samples, threads):
    """F.stft and fourier.py: of frames of N samples N (N + 2) products, or 2 N (P + Q + 2) with P = Q = √N."""
    times = run("ours", None, work="transform", nb_samples=nb_samples, seconds=6.0, repeat=3, threads=threads)["times"]
    n, nb_frames = work.N_FFT, 2 * nb_samples * ((6 * work.RATE - work.N_FFT) // work.N_HOP + 1)
    products = {"F.stft": n * (n + 2), "fourier": 2 * n * (2 * math.isqrt(n) + 2)}
    rows = [["time", *(f"{spread(times[name], '.2f')} s" for name in products)]]
    rows[0].append(f"{ratio_of(times['fourier'], times['F.stft']):.3f}")
    rows.append(["operations", *(f"{2e-9 * nb_frames * count:.1f} GFLOP" for count in products.values())])
    rows[1].append(f"{products['fourier'] / products['F.stft']:.3f}")
    return table(["", *products, "ratio"], rows)


# --------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side per measurement")
    parser.add_argument("--joint", action="store_true", help="joint steps alone; writes no report")
    parser.add_argument("--transform", action="store_true", help="the native transform alone; writes no report")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it runs; writes no report")
    add_options(parser)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    repeats = {1: 2, 2: 1} if args.quick else {1: 20, 4: 8, 16: 4}  # training steps of a process, by batch
    batch, native_seconds, lengths = max(repeats), *((1, (10,)) if args.quick else (3, (60, 180)))

    def compare(*sides, **options):
        return alternate(rounds, sides, args.reference, threads=args.threads, **options)

    warn_if_busy()
    joint = {4: 2} if args.quick else {4: 8, 16: 4}
    if args.joint:
        print(joint_table(rounds, joint, args.threads))
        return
    if args.transform:
        print(transform_table(batch, args.threads))
        return
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
    firsts = {"training step": [cold["step"], steps["batch 1"]["ours"]["times"]["first"]]}
    firsts["separation"] = [cold["separate"], next(iter(songs.values()))["ours"]["times"]["first"]]
    times = functions["ours"]["times"]  # of both spectrograms, the mixture's and the target's
    share = statistics.median(times["spectrogram forward"]) / 2 / statistics.median(times["step"])
    report = REPORT.format(
        **origin(),
        share=share,
        left=1 - 0.75 * share,
        threads=args.threads,
        rounds=rounds,
        machine=computer,
        versions=versions_table(*(functions[side]["versions"] for side in ("ours", "torch")), "ours, native"),
        steps=whole_table("torch", "step", steps),
        joint=joint_table(rounds, joint, args.threads),
        batch=batch,
        functions=function_table("torch", functions),
        native_seconds=native_seconds,
        factor=ratio_of(*(native[side]["times"]["step"] for side in ("native", "ours"))),
        native=whole_table("native", "step", {"step": native}) + "\n\n" + function_table("native", native),
        transform=transform_table(batch, args.threads),
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
