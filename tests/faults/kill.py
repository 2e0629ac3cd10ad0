"""Commands killed at random moments: what they leave is whole, and who repeats them gets what was to be.

Trainings are killed up to three times each, by SIGKILL or SIGTERM, half of them while they save within epochs too, and
then finished: the weights, the checkpoint, the log aside from times must be those of a training that nobody killed,
and no other file may be there. The same for separations, evaluations, conversions, decoded stems and synthetic songs.
Half of the moments are drawn from the whole life of a process, imports included; half while a file is being written.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time

import common
from common import Case


class Job:
    """A command that is killed.

    Args:
        name: of the kind
        script, arguments: the command, which works in a folder of its own
        unfinished: endings of files that change while it works
    """

    def __init__(self, name, script, arguments, unfinished=()):
        self.name, self.script, self.arguments = name, script, [str(argument) for argument in arguments]
        self.unfinished = unfinished

    def make(self, folder):
        """What is left by one run that nobody kills, and how long it takes."""
        common.fresh(folder)
        begin = time.monotonic()
        outcome = common.run(self.script, self.arguments, folder)
        if problem := outcome.problem(0):
            raise SystemExit(f"{self.name}: without any kill: {problem}")
        self.expected, self.life = common.contents(folder), time.monotonic() - begin

    def broken(self, folder):
        """What is there, and neither temporary nor what was to be."""
        found = {name: value for name, value in common.contents(folder).items() if not name.endswith(self.unfinished)}
        wrong = [name for name, value in found.items() if self.expected.get(name, "none") != value]
        return [name for name in wrong if not common.is_temporary(name) and not name.endswith("/")]


def jobs(folder, only):
    """The kinds with these words in their name; a model and stems are made if one of them needs them."""
    songs, model, stems = folder / "songs", folder / "model", folder / "stems"
    train = [*common.TRAIN, "--root", songs, "--output", "out"]
    within = [*train, "--samples-per-track", 8, "--epochs", 3, "--checkpoint-every", 0]
    growing = (".h5", ".npz", ".json", ".png", ".txt")
    song = next(songs.glob("test/*/mixture.wav"))
    test = ["--model", model, "--residual", "rest", *common.SMALL]
    separate = [song, "--outdir", "out", *test]
    evaluate = ["--root", songs, "--is-wav", "--evaldir", "scores", "--outdir", "out", *test]
    kinds = [
        Job("train, between epochs", "train.py", [*train, "--epochs", 6], growing),
        Job("train, within epochs", "train.py", within, growing),
        Job("separate", "separate.py", separate),
        Job("separate flac", "separate.py", [*separate, "--ext", "flac"]),
        Job("evaluate", "evaluate.py", evaluate, ("summary.json", "scores.png")),
        Job("weights, folder", "weights.py", [model, "converted", "--to", "pth"]),
        Job("weights, file", "weights.py", [model / "bass.h5", "converted.pth"]),
        Job("decode", "data.py", ["--root", stems, "--target", "bass", "--seq-dur", 1, "--quiet"]),
        Job("synthesize", "synthesize.py", ["songs", "--train", 2, "--valid", 1, "--test", 0, "--duration", 2]),
    ]
    kinds = [job for job in kinds if only in job.name]
    if any(str(model) in " ".join(job.arguments) for job in kinds):
        outcome = common.run("train.py", [*common.TRAIN, "--root", songs, "--output", model, "--epochs", 1], folder)
        if problem := outcome.problem(0):
            raise SystemExit(f"no model: {problem}")
    if any(str(stems) in job.arguments for job in kinds):
        common.stems(songs, stems)
    return kinds


def killed(job, folder, rng, errors, number, again):
    """Start the command and kill it; returns its status, None if it did not end when it was asked to."""
    process = common.start(job.script, [*job.arguments, *again], folder, errors)
    try:
        if rng.random() < 0.5:
            moment = rng.uniform(0, 1.1 * job.life)
            process.wait(moment)
        else:
            # while a file is written: after the k-th that is seen, a moment later
            wanted, seen, end = rng.randrange(1, 12), set(), time.monotonic() + 2 * job.life
            while process.poll() is None and len(seen) < wanted and time.monotonic() < end:
                seen.update(path.name for path in folder.rglob(".*.partial"))
                time.sleep(0.0005)
            process.wait(rng.choice([0.0001, 0.001, 0.01]))
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        if not common.ends(process, 20):
            return None
    return process.returncode


def case(job, folder, seed):
    """One command, killed some times and then finished; returns a Case."""
    rng = random.Random(seed)
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    kind, folder = f"{job.name}, {number.name}", common.fresh(folder / f"case-{seed}")
    kills, again = 0, []
    for _ in range(rng.randrange(1, 4)):
        with tempfile.TemporaryFile("w+") as errors:
            status = killed(job, folder, rng, errors, number, again)
            outcome = common.Outcome(status or 0, common.read_back(errors), status is None)
        # 143 from our handler; or before Python has it, and after it has taken it back
        asked = (143,) if number == signal.SIGTERM else ()
        if outcome.status != -number and (problem := outcome.problem(0, *asked)):
            return Case(kind, "BAD end", f"seed {seed}: {problem}")
        kills += outcome.status != 0
        left = [name for name in common.contents(folder) if common.is_temporary(name)]
        if left and outcome.status in (0, 143):
            return Case(kind, "BAD leftover", f"seed {seed}: {left[0]} after status {outcome.status}")
        if broken := job.broken(folder):
            return Case(kind, "BAD file", f"seed {seed}: {broken[0]} after a kill")
        again = common.again(job.script, folder)
        if outcome.status == 0:
            break
    for repetition in range(2):  # the second one finds all done
        outcome = common.run(job.script, [*job.arguments, *again], folder)
        found, expected = common.contents(folder), dict(job.expected)
        if number == signal.SIGTERM and job.name == "train, between epochs":
            # a signal saves a checkpoint within an epoch: the one before the last is that one then
            found.pop("out/bass.checkpoint.before.npz", None), expected.pop("out/bass.checkpoint.before.npz", None)
        differs = common.difference(found, expected)
        if problem := outcome.problem(0):
            if outcome.status == 2 and not differs and job.name == "weights, folder":  # which it never overwrites
                break
            return Case(kind, "BAD repetition", f"seed {seed}: {problem}")
        if differs:
            return Case(kind, "BAD result", f"seed {seed}, {kills} kills, repetition {repetition}: {differs}")
        again = common.again(job.script, folder)
    return Case(kind, "good" if kills else "good, ended before")


def main():
    options = common.options(__doc__, 100, "trainings that are killed; the other commands half as often")
    with common.workplace() as folder:
        kinds = jobs(folder, options.only)
        for job in kinds:
            job.make(folder / "reference")
        cases = []
        for job in kinds:
            runs = options.runs / 2 if job.script == "train.py" else options.runs / 14
            cases += [(job, options.seed + len(cases) + k) for k in range(max(1, round(runs)))]
        random.Random(0).shuffle(cases)

        def one(pair):
            job, seed = pair
            result = case(job, folder / "cases", seed)
            if not result.result.startswith("BAD"):
                common.fresh(folder / "cases" / f"case-{seed}").rmdir()
            return result

        return common.count("kill", one, cases, options)


if __name__ == "__main__":
    sys.exit(main())
