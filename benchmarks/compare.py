"""Are this port and torch's openunmix the same system? Both train, separate and are scored on the same synthetic songs.

``make compare`` writes docs/comparison.md and its pictures, see comparison.py. Trainings are processes of
nnabla_side.py and torch_side.py, scores come from the commands that users call: evaluate.py and
``python -m openunmix.evaluate``. What was measured is kept in build/compare/results.json, from which --report writes
the report again.
"""

import argparse
import json
import shutil
import sys

import work
from comparison import CORES, PERTURBATION, SEEDED, SIDES, SLOW_LR, medians, scores_of, write_report
from report import ROOT, add_options, execute, measured, run

PAIR = ("--targets", SEEDED, "--residual", "residual")
PAIR += ("--aggregate", json.dumps({SEEDED: [SEEDED], "accompaniment": ["residual"]}))

FULL = {
    "songs": {"train": 8, "valid": 2, "test": 4, "duration": 40},
    "long songs": {"train": 0, "valid": 0, "test": 2, "duration": 240},
    "recipe": {"seq_dur": 3.0, "batch_size": 8, "samples_per_track": 50},
    "epochs": 6,
    "seeds": 3,
    "rounds": 3,
}
QUICK = {
    "songs": {"train": 3, "valid": 1, "test": 2, "duration": 8},
    "long songs": {"train": 0, "valid": 0, "test": 2, "duration": 12},
    "recipe": {"seq_dur": 1.0, "batch_size": 4, "samples_per_track": 8},
    "epochs": 2,
    "seeds": 2,
    "rounds": 1,
}

# ------------------------------------------------------------------------------------------ measure


class Runs:
    """Trainings and evaluations of both sides, in a folder of their own.

    Args:
        folder: for songs, models and scores; sizes: FULL or QUICK; reference: torch's interpreter
    """

    def __init__(self, folder, sizes, threads, reference):
        self.folder, self.sizes = folder, sizes
        self.threads, self.reference = threads, reference
        shutil.rmtree(folder, ignore_errors=True)
        for songs in ("songs", "long songs"):
            lengths = [word for name, value in sizes[songs].items() for word in (f"--{name}", value)]
            execute([sys.executable, ROOT / "synthesize.py", folder / songs, *lengths, "--quiet"])

    def train(self, side, name, target, **options):
        """One training, from untrained weights unless `initial` is given, without dropout unless it is given."""
        print(f"train {name}: {side}, {target}", file=sys.stderr, flush=True)
        recipe = {**self.sizes["recipe"], "epochs": self.sizes["epochs"], "lr": work.LR, "dropout": 0, "seed": 0}
        if side == "torch":
            recipe["python"] = sys.executable  # which draws the excerpts
        report = run(
            side,
            self.reference,
            work="train",
            songs=str(self.folder / "songs"),
            output=str(self.folder / name / side),
            target=target,
            threads=self.threads,
            **{"initial": None, **recipe, **options},
        )
        kept = {key: report[key] for key in ("peak", "versions")}
        return {**report["result"], **kept, "steps": report["times"].get("step")}

    def train_alike(self, name, target, turn=0, **options):
        """A training of each side, the same but for the side: {side: report}."""
        reports = {side: self.train(side, name, target, **options) for side in SIDES[:: -1 if turn % 2 else 1]}
        if len({report["excerpts"] for report in reports.values()}) > 1:
            sys.exit(f"{name}, {target}: the sides trained with different excerpts")
        return reports

    def evaluate(self, side, model, label, *options, songs="songs"):
        """A side's evaluation of the models in folder/`model`; the scores go to folder/scores/`label`."""
        print(f"evaluate {model}: {side}", file=sys.stderr, flush=True)
        evaldir = self.folder / "scores" / label
        shutil.rmtree(evaldir, ignore_errors=True)
        arguments = [
            "--root",
            self.folder / songs,
            "--is-wav",
            "--cores",
            CORES,
            "--model",
            self.folder / model,
            *options,
        ]
        environment = None
        if side == "ours":  # openunmix' command has no window: it filters whole songs
            arguments += ["--wiener-win-len", 0, "--threads", self.threads, "--context", "cpu", "--quiet"]
        else:  # without, each of its processes would have as many threads as there are cores
            environment = {"OMP_NUM_THREADS": str(max(1, self.threads // CORES))}
        arguments = [str(word) for word in [*arguments, "--evaldir", evaldir]]
        report = run(side, self.reference, environment, work="evaluate", arguments=arguments)
        minutes = self.sizes[songs]["test"] * self.sizes[songs]["duration"] / 60
        return {**report["result"], "whole command": report["seconds"] / minutes, "peak": report["peak"]}


def measure(runs):
    """Everything that the report is made of."""
    untrained = str(runs.folder / "untrained/torch" / f"{SEEDED}.pth")
    runs.train("torch", "untrained", SEEDED, epochs=0)
    scratch = runs.train_alike("scratch", SEEDED, initial=untrained)
    scratch["torch again"] = runs.train("torch", "again", SEEDED, initial=untrained, perturb=PERTURBATION)
    same, seeds = {}, {side: [] for side in SIDES}
    for turn, target in enumerate(work.TARGETS):
        if target != SEEDED:  # that was trained above
            runs.train("torch", "scratch", target, initial=untrained)
        trained = str(runs.folder / "scratch/torch" / f"{target}.pth")
        same[target] = runs.train_alike("same", target, turn, initial=trained, lr=SLOW_LR)
    for number in range(runs.sizes["seeds"]):
        for side in SIDES[:: -1 if number % 2 else 1]:
            name, seed = f"seeds/{number}", 1 + number + runs.sizes["seeds"] * SIDES.index(side)
            report = runs.train(side, name, SEEDED, dropout=0.4, seed=seed)
            runs.evaluate(side, f"{name}/{side}", f"{name}/{side}", *PAIR)
            report["SDR"] = medians(scores_of(runs.folder / "scores" / name / side))[SEEDED]["SDR"]
            seeds[side].append(report)
    runs.evaluate("ours", "same/ours", "own")
    speed = {side: [] for side in SIDES}
    for number in range(runs.sizes["rounds"]):
        for side in SIDES[:: -1 if number % 2 else 1]:
            speed[side].append(runs.evaluate(side, "same/torch", side))
    long = {side: [runs.evaluate(side, "same/torch", f"long/{side}", songs="long songs")] for side in SIDES}
    return {"scratch": scratch, "same": same, "seeds": seeds, "speed": speed, "long": long}


# --------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="minutes, to see that it runs; into build/ only")
    parser.add_argument("--report", action="store_true", help="write the report of the last run again")
    add_options(parser)
    args = parser.parse_args()
    results, folder, page = measured(
        args, "compare", (FULL, QUICK), lambda *where: measure(Runs(*where, args.threads, args.reference))
    )
    fine = write_report(results, folder / "scores", page)
    if not (fine or args.quick):  # which is too short for speed and spread
        sys.exit("ours and torch are further apart than they should be: see the first table")


if __name__ == "__main__":
    main()
