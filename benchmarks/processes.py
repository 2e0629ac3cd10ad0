"""Time per epoch by several processes on this machine's CPU: ``python benchmarks/processes.py``.

Each training is train.py's, on synthetic songs: batches of 16 excerpts of 6 s, hidden size 512, one epoch to warm up
and one that is timed, by all together on all cores. Trainings take turns, so that a machine that changes its pace
changes it for all.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from report import ROOT, execute, ratio_of, spread, table, warn_if_busy

TRAINING = ["--target", "bass", "--is-wav", "--context", "cpu", "--epochs", "2", "--quiet"]


def epoch(nb_processes, songs, options):
    """Seconds of the second epoch, with its validation."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, ROOT / "train.py", "--root", songs, "--output", output, *TRAINING, *options]
        if nb_processes > 1:
            start = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", nb_processes]
            command = [*start, *command]
        execute(command)
        return json.loads(Path(output, "bass.json").read_text())["train_time_history"][1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many, the first to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each number")
    parser.add_argument("--steps", type=int, default=8, help="batches per epoch")
    parser.add_argument("--quick", action="store_true", help="to see that it runs: a small network, one round")
    options = parser.parse_args()
    own, rounds = ["--samples-per-track", str(8 * options.steps)], options.rounds
    if options.quick:
        own, rounds = ["--samples-per-track", "8", "--hidden-size", "16", "--seq-dur", "1"], 1
    warn_if_busy()
    with tempfile.TemporaryDirectory() as songs:
        execute([sys.executable, ROOT / "synthesize.py", songs, "--train", 2, "--valid", 2, "--test", 0, "--quiet"])
        times = {nb_processes: [] for nb_processes in options.processes}
        for _ in range(rounds):
            for nb_processes, seconds in times.items():
                seconds.append(epoch(nb_processes, songs, own))
    first = times[options.processes[0]]
    rows = [[str(nb), spread(seconds, ".2f"), f"{ratio_of(seconds, first):.2f}"] for nb, seconds in times.items()]
    print(table(["processes", "seconds per epoch", "ratio"], rows))
    nb_cores, steps = len(os.sched_getaffinity(0)), 1 if options.quick else options.steps
    per_step = statistics.median(first) / steps
    print(f"{nb_cores} cores; {steps} steps per epoch and 2 validation songs; {per_step:.2f} s per step")


if __name__ == "__main__":
    main()
