"""Time and memory of bsseval.evaluate and of museval.evaluate, on the same songs: ``python benchmarks/scoring.py``.

Every measurement is a process of its own, of this file too; those to be compared alternate. The report,
docs/scores.md, is written whole.
"""

import argparse
import json
import os
import statistics
import sys

import numpy as np
import work
from report import HERE, ROOT, execute, machine, origin, ratio_of, spread, table, warn_if_busy

PACKAGES = ("numpy", "scipy", "numba", "museval")
REPORT = """\
# Scores

Written by `{command}` on {date}, at commit {commit}. Do not edit.

BSSEval v4 of four stereo sources at 44.1 kHz, frames of 1 s: `bsseval.evaluate` against museval {museval}, both with
as many threads as the row says, BLAS included. Noise in double precision: how long it takes does not depend on what
is heard. Numbers are medians over {rounds} rounds, in parentheses the smallest and the largest; memory is the peak of
the whole process, of which references and estimates are {input:.2f} MiB per second of audio. Ratios are museval's
time over ours, and our memory over museval's.

## Machine

{machine}

{versions}

## Songs

{songs}

Largest difference between both sides' scores: {difference:.1e} dB.
"""


def score(clock, side, seconds, threads):
    """A side's work: {metric: …} of a song, timed without imports and compilation."""
    audio = work.audio(4, seconds, 0).transpose(0, 2, 1).astype(np.float64)
    references, estimates = audio, audio + 0.3 * audio[::-1]
    estimates += work.audio(4, seconds, 1).transpose(0, 2, 1)
    if side == "ours":
        import bsseval
        import kernels.threads

        kernels.threads.set_threads(threads)
        evaluate = bsseval.evaluate
        evaluate(references[:2, :4000], estimates[:2, :4000])  # compiles
    else:
        import museval

        evaluate = museval.evaluate
    return np.array(clock("evaluate", evaluate, references, estimates)).tolist()


def run(side, seconds, threads):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": str(threads)}
    options = json.dumps({"work": "score", "side": side, "seconds": seconds, "threads": threads})
    return json.loads(execute([sys.executable, HERE / "scoring.py", options], environment).splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side per measurement")
    parser.add_argument("--seconds", type=int, nargs="+", default=[30, 60, 240])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="a song of 10 s, once; writes no report")
    args = parser.parse_args()
    rounds, lengths = (1, [10]) if args.quick else (args.rounds, args.seconds)
    warn_if_busy()
    computer, rows, difference = machine(), [], 0
    for seconds in lengths:
        for threads in args.threads:
            reports = {"ours": [], "museval": []}
            for i in range(rounds):
                for side in list(reports)[:: -1 if i % 2 else 1]:
                    print(f"{seconds} s, {threads} threads: {side}, round {i + 1} of {rounds}", file=sys.stderr)
                    reports[side].append(run(side, seconds, threads))
            times = [[report["times"]["evaluate"][0] for report in some] for some in reports.values()]
            peaks = [statistics.median(report["peak"] for report in some) for some in reports.values()]
            ours, theirs = (np.array(some[0]["result"]) for some in reports.values())
            difference = max(difference, np.abs(ours - theirs).max())
            rows.append([f"{seconds} s, {threads} threads", *(f"{spread(t, '.2f')} s" for t in times)])
            rows[-1] += [f"{1 / ratio_of(*times):.1f}", *(f"{peak / 2**20:.0f} MiB" for peak in peaks)]
            rows[-1].append(f"{peaks[0] / peaks[1]:.2f}")
    if difference > 1e-6:
        sys.exit(f"scores of ours and of museval differ by {difference:.1e} dB: they did not do the same work")
    versions = reports["ours"][0]["versions"]
    report = REPORT.format(
        **origin(),
        museval=versions["museval"],
        rounds=rounds,
        machine=computer,
        input=2 * 4 * 2 * work.RATE * 8 / 2**20,
        versions=table(["", "version"], [list(pair) for pair in versions.items()]),
        songs=table(["", "ours", "museval", "ratio", "memory: ours", "museval", "ratio"], rows),
        difference=difference,
    )
    print(report)
    if not args.quick:
        (ROOT / "docs" / "scores.md").write_text(report)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        work.main({"score": score}, PACKAGES)
    else:
        main()
