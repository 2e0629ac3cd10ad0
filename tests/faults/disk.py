"""A disk that fills at each of many levels, for each kind of file: what is written whole is there, or nothing is lost.

A writer, or a whole command, finds an earlier version of its files, and room for a part of the new ones only. It has
to end well, with the new files, or with one line and status 1, with files that are each the old or the new one, and
nothing besides. The limit is one of the system's for the size of a file (EFBIG, the same in all else as a full disk),
which needs no rights; with --full also a small file system that is full (ENOSPC), for which one must be root, or be
allowed to have name spaces of one's own.
"""

import ctypes
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import common
from common import Case, Outcome


class Writer:
    """Something that writes files into a folder, which is the current one, too.

    Args:
        name: of the kind
        work: function of the folder
        earlier: function of a folder, makes what is there before
        transient: endings of files that change while it works
    """

    is_command = False

    def __init__(self, name, work, earlier=lambda folder: None, transient=()):
        self.name, self.work, self.earlier, self.transient = name, work, earlier, transient

    def work_again(self, folder):
        """What a user does who has made room."""
        self.work(folder)

    def make(self, folder):
        """Learn what is there before and after, and how large it becomes."""
        self.old_folder, new = common.fresh(folder / "old"), common.fresh(folder / "new")
        self.earlier(self.old_folder)
        shutil.copytree(self.old_folder, new, dirs_exist_ok=True)
        outcome = common.forked(lambda: (os.chdir(new), self.work(new)))
        if problem := outcome.problem(0):
            raise SystemExit(f"{self.name}: with room enough: {problem}")
        self.old, self.new = common.contents(self.old_folder), common.contents(new)
        sizes = [path.stat().st_size for path in new.rglob("*") if path.is_file()]
        self.largest, self.total = max(sizes), sum(-(size // -4096) * 4096 for size in sizes)

    def judge(self, outcome: Outcome, folder, make_room) -> tuple:
        """What came of it, as result and detail of a `Case`."""
        found = common.contents(folder)
        if problem := outcome.problem(0, 1, *[2] * outcome.errors.startswith("data.py")):  # which lists what it finds
            return "BAD end", problem
        if outcome.status == 0:
            wrong = common.difference(found, self.new)
            return ("BAD success", wrong) if wrong else ("good", "")
        if (
            "cannot" not in outcome.errors
            and "File too large" not in outcome.errors
            and "No space" not in outcome.errors
        ):
            return "BAD line", outcome.errors
        for name, value in found.items():
            if name.endswith("/") or name.endswith(self.transient):
                continue
            if value not in (self.old.get(name), self.new.get(name)):
                return "BAD file", f"{name}, after {outcome.errors!r}"
        if lost := [name for name in self.old if name not in found and not name.endswith("/")]:
            return "BAD loss", lost[0]
        make_room()
        again = common.forked(lambda: (os.chdir(folder), self.work_again(folder)))
        if wrong := again.problem(0) or common.difference(common.contents(folder), self.new):
            return "BAD repetition", f"{wrong}, after {outcome.errors!r}"
        return "refused", ""


class Command(Writer):
    """One of the scripts."""

    is_command = True

    def __init__(self, name, script, *arguments, **more):
        super().__init__(name, self._call, **more)
        self.script, self.arguments = script, [str(argument) for argument in arguments]

    def _call(self, folder, again=()):
        os.environ.update(common.environment(folder))
        sys.argv[0] = self.script
        common.MAINS[self.script]([*self.arguments, *again])

    def work_again(self, folder):
        self._call(folder, common.again(self.script, folder))


def reporting(function):
    """A writer that raises OSError ends as commands do."""
    import utils

    return utils.command(lambda folder: function(Path(folder)))


def writers(folder) -> list:
    """All kinds of files, and then all commands."""
    import numpy as np

    import audio
    import files
    import outputs
    import trained
    import weights

    songs = folder / "songs"
    short = ["--duration", 2, "--quiet"]
    train_it = ["--root", songs, "--output", "out", *common.TRAIN]
    for name, epochs in (("one", 1), ("two", 2)):
        place = common.fresh(folder / name)
        outcome = common.call("train.py", [*train_it, "--epochs", epochs], place)
        if outcome.status:
            raise SystemExit(outcome.errors)
    model = folder / "one" / "out"
    song = next(songs.glob("test/*/mixture.wav"))
    (model_,), _ = trained.load_models(str(model), ["bass"])
    parameters = model_.get_parameters()
    changed = {name: value * np.float32(1.5) for name, value in parameters.items()}
    log = files.read_json(model / "bass.json")
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 30_000)).astype(np.float32)

    def both(name, write, old, new):
        return Writer(name, reporting(lambda place: write(place, new)), lambda place: write(place, old))

    def stem(ext, subtype):
        def write(place, samples):
            with files.atomic_path(place / f"stem.{ext}") as temporary:
                audio.write(temporary, [samples], samples.shape, 8000, ext.upper(), subtype)

        return write

    def json(place, value):
        files.write_json(place / "bass.json", value)

    def h5(place, values):
        weights.save(place / "bass.h5", values, model_.description)

    def pth(place, values):
        weights.save(place / "bass.pth", values)

    def picture(place, value):
        outputs.plot_losses(place / "bass.png", value)

    longer = {**log, "train_loss_history": [1.0, 2.0], "valid_loss_history": [2.0, 1.0]}
    resume, growing = [*train_it, "--epochs", 2, "--checkpoint", "out"], ("bass.json", ".npz", ".png", ".txt")
    test = ["--model", model, "--residual", "rest", *common.SMALL]
    separate = [song, "--outdir", "out", *test]
    evaluate = ["--root", songs, "--is-wav", "--evaldir", "scores", "--outdir", "out", *test]

    def trained_once(place):
        shutil.copytree(model, place / "out")

    def separated(place):
        (place / "out").mkdir()
        for path in ("bass.wav", "rest.wav", "bass.flac", "rest.flac"):
            (place / "out" / path).write_bytes(b"an older stem")

    stems = common.stems(songs, folder / "stems")
    return [
        both("h5", h5, parameters, changed),
        both("pth", pth, parameters, changed),
        both("json", json, log, longer),
        both("png", picture, log, longer),
        both("stem.wav", stem("wav", "FLOAT"), noise[:, :20_000], noise),
        both("stem.flac", stem("flac", "PCM_24"), noise[:, :20_000], noise),
        Command("train", "train.py", *train_it, "--epochs", 1, transient=growing),
        Command("train, resumed", "train.py", *resume, earlier=trained_once, transient=growing),
        Command("separate", "separate.py", *separate, earlier=separated),
        Command("separate flac", "separate.py", *separate, "--ext", "flac", earlier=separated),
        Command("evaluate", "evaluate.py", *evaluate, transient=("summary.json", "scores.png")),
        Command("weights, file", "weights.py", model / "bass.h5", "bass.pth"),
        Command("weights, folder", "weights.py", model, "converted", "--to", "pth"),
        Command("decode", "data.py", "--root", stems, "--target", "bass", "--seq-dur", 1, "--quiet"),
        Command("synthesize", "synthesize.py", "songs", "--train", 1, "--valid", 0, "--test", 0, *short),
    ]


# ------------------------------------------------------------------------------------------ levels


def limited(writer, folder, level) -> Case:
    """With files that can have `level` of what the largest has, at most."""
    place = folder / f"{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(writer.old_folder, place)
    size = round(level * writer.largest)

    def work():
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        writer.work(place)

    result, detail = writer.judge(common.forked(work), place, lambda: None)
    return Case(f"{writer.name}, limit", result, f"{size} bytes: {detail}")


def full(writer, folder, level) -> Case:
    """On a file system with room for `level` of what is written."""
    place = folder / f"{os.getpid()}"
    place.mkdir(exist_ok=True)
    size = 2**20 + 8 * writer.total
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(place).encode(), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")
    try:
        shutil.copytree(writer.old_folder, place / "work")
        free = os.statvfs(place)
        room = round(level * writer.total) // 4096 * 4096
        with open(place / "filler", "wb") as stream:
            stream.write(bytes(max(0, free.f_bavail * free.f_bsize - room)))

        def work():
            os.chdir(place / "work")
            writer.work(place / "work")

        result, detail = writer.judge(common.forked(work), place / "work", (place / "filler").unlink)
    finally:
        libc.umount2(str(place).encode(), 2)
    return Case(f"{writer.name}, disk", result, f"{room} bytes free: {detail}")


def may_mount() -> bool:
    """Start this program again where it may make file systems, which nobody else sees; False if there is no way."""
    if os.environ.get("FAULTS_UNSHARED"):
        return True
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        return False
    os.environ["FAULTS_UNSHARED"] = "1"
    os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv])


def main():
    options = common.options(
        __doc__, 300, "levels for each kind of file; a tenth of them for commands", full="on full disks, too"
    )
    ways = [limited]
    if options.full:
        if not may_mount():
            raise SystemExit("disk: --full needs file systems of its own (unshare -rm), which this machine refuses")
        ways.append(full)
    common.warm_up("train.py", "separate.py", "evaluate.py", "weights.py", "data.py", "synthesize.py")
    with common.workplace() as folder:
        kinds = [writer for writer in writers(folder) if options.only in writer.name]
        rng, cases = random.Random(options.seed), []
        for k, writer in enumerate(kinds):
            writer.make(folder / f"reference{k}")
            runs = max(1, options.runs // 10) if writer.is_command else options.runs
            for way in ways:
                for k in range(runs):
                    # evenly over the whole range, each somewhere in its part; most of a command's files are small
                    level = (k + rng.random()) / runs
                    cases.append((way, writer, 1.05 * level ** (1 + 2 * writer.is_command * rng.random())))
        rng.shuffle(cases)
        return common.count("disk", lambda case: case[0](case[1], folder, case[2]), cases, options)


if __name__ == "__main__":
    sys.exit(main())
