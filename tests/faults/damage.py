"""Damaged files in place of good ones, for whole commands: refused in one line, or without any influence.

One file of a model, of a training or of a data set is flipped, cut, emptied, made another kind of file, a folder, a
pipe, JSON of another shape. A command that uses it has to end with status 2, one line, and nothing changed; or with
status 0 and the results that it has without the damage. (Audio carries no checksum: what is changed in the songs of a
data set may change results.)
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import common
from common import Case

# ------------------------------------------------------------------------------------------ damages


def flip(path, rng):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 10])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_head(path, rng):
    """In the first bytes, where formats say what follows."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(len(data), 512))] = rng.randrange(256)
    path.write_bytes(data)


def flip_end(path, rng):
    data = bytearray(path.read_bytes())
    data[-1 - rng.randrange(min(len(data), 512))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice([rng.randrange(len(data)), len(data) - 1, 1])])


def cut_out(path, rng):
    data = path.read_bytes()
    start, stop = sorted(rng.sample(range(len(data) + 1), 2))
    path.write_bytes(data[:start] + data[stop:])


def lengthen(path, rng):
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"\0" * 4096, path.read_bytes(), rng.randbytes(99)]))


def zeros(path, rng):
    """A block of zeros, as a disk that lost power leaves it."""
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data)) // 512 * 512
    size = min(rng.choice([512, 4096, len(data)]), len(data) - start)
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def empty(path, rng):
    path.write_bytes(b"")


def garbage(path, rng):
    path.write_bytes(rng.randbytes(rng.choice([1, 100, 10_000])))


def another(path, rng):
    """Another file's content, of another kind."""
    alike = {path.suffix, ".h5", ".pth"}  # of weights, the content decides
    others = sorted(other for other in path.parents[1].rglob("*") if other.is_file() and other.suffix not in alike)
    path.write_bytes(rng.choice(others or [Path(__file__)]).read_bytes())


def folder(path, rng):
    path.unlink()
    path.mkdir()


def pipe(path, rng):
    path.unlink()
    os.mkfifo(path)


def loop(path, rng):
    path.unlink()
    path.symlink_to(path.name)


def device(path, rng):
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full"]))


def sparse(path, rng):
    """As large as no disk, of zeros that take no room."""
    os.truncate(path, 2**40)


def missing(path, rng):
    path.unlink()


def shape(path, rng):
    """JSON of another shape: all of it, or a value somewhere in it."""
    values = [None, [], {}, "", "x", "\ud800", 0, -1, 0.5, 2**31, 10**30, 1e308, float("nan"), True, [[]], {"a": 1}]
    values += ["../x", "/", "a/b", "\0", [1, 2], ["bass", "bass"], ["../bass"]]
    tree = json.loads(path.read_text())
    if rng.random() < 0.2:
        text = rng.choice([json.dumps(rng.choice(values)), "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "nonsense"])
        path.write_text(text)
        return
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(values)
    path.write_text(json.dumps(tree))


BYTES = (flip, flip, flip, flip_head, flip_end, cut, cut_out, lengthen, zeros, empty, garbage, another)
KINDS = (folder, pipe, loop, device, sparse, missing)

# ------------------------------------------------------------------------------------------ commands


class Use(NamedTuple):
    """A command that uses files.

    Files are relative to the folder where it works: those whose damage must be without influence, or be noticed; those
    of which it can be neither, since they are taken as they are. It also writes those in `output`.
    """

    name: str
    script: str
    arguments: list
    checked: list
    taken: list = []
    output: str = "none/"


def uses(folder) -> list:
    songs, song = folder / "songs", next((folder / "songs").glob("test/*/mixture.wav"))
    train = [*common.TRAIN, "--root", songs, "--output", "out"]
    model, config = ["model/bass.h5", "model/bass.json", "model/separator.json"], ["--residual", "rest", *common.SMALL]
    names = ("bass.checkpoint.npz", "bass.checkpoint.before.npz", "bass.h5", "bass.json", "separator.json", "bass.png")
    output = [f"out/{name}" for name in names] + ["out/monitor/bass/training-loss.series.txt"]
    track = next((folder / "songs").glob("train/*")).relative_to(folder)
    tracks = [f"{track}/{name}.wav" for name in ("mixture", "bass", "drums")]
    data = ["--root", "songs", "--is-wav", "--target", "bass", "--seq-dur", 1, "--quiet"]
    new = [*common.TRAIN, "--root", "songs", "--output", "new", "--epochs", 1]
    return [
        Use("train --checkpoint", "train.py", [*train, "--epochs", 3, "--checkpoint", "out"], output, output="out/"),
        Use("train --model", "train.py", [*train[:-1], "new", "--epochs", 1, "--model", "model"], model),
        Use("separate", "separate.py", [song, "--outdir", "stems", "--model", "model", *config], model),
        Use("separate, file", "separate.py", [song, "--outdir", "stems", "--model", model[0], *config], model[:1]),
        Use("weights, folder", "weights.py", ["model", "converted", "--to", "pth"], [model[0], model[2]], model[1:2]),
        Use("weights, file", "weights.py", ["model/bass.h5", "converted.pth"], model[:1]),
        Use("weights, torch", "weights.py", ["torch/bass.pth", "converted.h5"], ["torch/bass.pth"]),
        Use("data", "data.py", data, [], tracks),
        Use("train", "train.py", new, [], tracks),
        Use("evaluate", "evaluate.py", evaluate(songs), ["scores/summary.json", *scored(folder)], output="scores/"),
    ]


def evaluate(songs):
    options = ["--root", songs, "--is-wav", "--evaldir", "scores", "--model", "model", "--residual", "rest"]
    return [*options, *common.SMALL]


def scored(folder):
    return [f"scores/test/{path.name}.json" for path in (folder / "songs" / "test").iterdir()]


def prepare(folder) -> Path:
    """A folder that each case gets a copy of: model/, torch/, out/ after two of three epochs, scores/, songs/."""
    place = common.fresh(folder / "pristine")
    train = ["train.py", [*common.TRAIN, "--root", folder / "songs", "--epochs", 1, "--output", "model"]]
    more = ["train.py", [*common.TRAIN, "--root", folder / "songs", "--epochs", 2, "--output", "out"]]
    torch = ["weights.py", ["model/bass.h5", "torch/bass.pth"]]
    (place / "torch").mkdir()
    for script, arguments in (train, more, torch, ["evaluate.py", evaluate(folder / "songs")]):
        outcome = common.call(script, arguments, place)
        if problem := outcome.problem(0):
            raise SystemExit(f"{script}: without any damage: {problem}")
    shutil.copytree(folder / "songs", place / "songs")
    shutil.rmtree(place / "cache", ignore_errors=True)
    return place


def case(use, damage, name, seed, pristine, expected) -> Case:
    place = pristine.parent / f"case{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(pristine, place)
    path = place / name
    damage(path, random.Random(seed))

    def without():
        """All but what was damaged, and what cannot be said of it."""
        found = common.contents(place)
        return {key: value for key, value in found.items() if key != name and not key.startswith((name + "/", "cache"))}

    before = without()
    outcome = common.call(use.script, use.arguments, place)
    kind, what = use.name, f"{damage.__name__} {name} (seed {seed})"
    # what cannot be read is bad input, what cannot be written a failure
    if problem := outcome.problem(0, 2, *([1] if damage in KINDS and name.startswith(use.output) else [])):
        return Case(kind, "BAD end", f"{what}: {problem}")
    after = without()
    if outcome.status == 1:
        return Case(kind, "failed")
    if outcome.status:
        # folders aside: one that holds nothing may be new, or have lost what was damaged
        kept, was = ({key: value for key, value in found.items() if key[-1] != "/"} for found in (after, before))
        changed = common.difference(kept, was)
        return Case(kind, "BAD change", f"{what}: {changed}; {outcome.errors!r}") if changed else Case(kind, "refused")
    if wrong := common.difference(
        after, {key: value for key, value in expected.items() if key in after or key != name}
    ):
        if name in use.checked:
            return Case(kind, "BAD result", f"{what}: {wrong}")
        return Case(kind, "taken")
    return Case(kind, "unharmed")


def main():
    options = common.options(__doc__, 2000, "damages")
    common.warm_up("train.py", "separate.py", "evaluate.py", "weights.py", "data.py")
    with common.workplace() as folder:
        pristine = prepare(folder)
        kinds = [use for use in uses(folder) if options.only in use.name]
        expected = {}
        for use in kinds:
            place = folder / "expected"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(pristine, place)
            if problem := common.call(use.script, use.arguments, place).problem(0):
                raise SystemExit(f"{use.name}: without any damage: {problem}")
            expected[use.name] = common.contents(place)
            expected[use.name] = {
                key: value for key, value in expected[use.name].items() if not key.startswith("cache")
            }
        rng, cases = random.Random(options.seed), []
        for k in range(options.runs):
            use = kinds[k % len(kinds)]
            name = rng.choice(use.checked + use.taken)
            damages = (BYTES, BYTES, KINDS, (shape,)) if name.endswith(".json") else (BYTES, BYTES, KINDS)
            cases.append((use, rng.choice(rng.choice(damages)), name, options.seed + k))
        return common.count("damage", lambda each: case(*each, pristine, expected[each[0].name]), cases, options)


if __name__ == "__main__":
    sys.exit(main())
