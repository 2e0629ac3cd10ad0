"""The stages of gpu.py that measure: steps, beside those of torch; long songs; reading; train.py; separation."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nnabla_side
import numpy as np
import work
from gpu_checks import LOSS, signals_of
from gpu_work import Samples, check, fact, main, measure, write_songs
from report import ROOT, last_line, run

import weights
from separator import Separator
from train import Graph, seed_nnabla, train_step

STEMS = 1e-5  # absolute, of separated samples

# What work.FUNCTIONS names, in the order of a step.
PARTS = {
    "spectrogram": ["spectrogram"],
    "input": ["input_affine fc1", "batch_normalization fc1"],
    "lstm": ["lstm"],
    "decoder": ["affine fc2", "batch_normalization fc2", "affine fc3", "mask fc3"],
    "loss": ["squared_error"],
}


def torch(sides, **options):
    """What torch's side reports of a piece of work on the same device, without TF32 and with its defaults.

    Where it does not run, None of both, and a row says why, once.
    """
    sizes = {name: getattr(work, name) for name in ("HIDDEN_SIZE", "N_FFT", "N_HOP", "MAX_BIN")}
    on_cpu = sides.name == "cpu"
    options.update(device="cpu" if on_cpu else "cuda", sizes=sizes, threads=1 if on_cpu else None)
    try:
        if sides.torch:
            return [run("torch", sides.torch, modules=sides.modules, tf32=tf32, **options) for tf32 in (False, True)]
    except (SystemExit, OSError) as error:
        fact("no numbers of torch", last_line(str(error)))
    sides.torch = None
    return [None, None]


# -------------------------------------------------------------------------------------------- steps


def steps(sides):
    """Time of training steps, whole and by part, how busy the GPU is meanwhile, and its memory."""
    sizes = sides.sizes
    size = {"nb_samples": sizes.nb_samples, "seconds": sizes.seconds}

    with Samples() as samples:
        reports = torch(sides, work="step", **size, warm_up=sizes.warm_up, repeat=sizes.steps)
    whole = [report and 1e3 * statistics.median(report["times"]["step"]) for report in reports]
    if reports[0]:
        fact("torch's side", ", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items()))
    torch_memory = samples.memory / 2**20 if reports[0] else None
    with Samples() as samples:
        first, later, meanwhile = time_steps(sides, size)
    measure("a step, train.train_step", later, "ms", *whole)
    measure("the first steps, each", first, "ms")
    if not np.isnan(samples.memory):
        measure("memory of the GPU", samples.memory / 2**20, "MiB", torch_memory)
        measure("GPU busy", 100 * meanwhile.busy, "%")

    clock, size = work.Clock(), {**size, "warm_up": min(sizes.warm_up, 2), "repeat": sizes.parts}
    clock.wait = sides.wait
    nnabla_side.functions(clock, **size, threads=None, plain=sides.plain, device=sides.name)
    reports = torch(sides, work="functions", **size)
    found = list(parts([clock.times, *(report and report["times"] for report in reports)]))
    for name, milliseconds in found:
        measure(name, milliseconds[0], "ms", *milliseconds[1:])
    rest = 1e3 * statistics.median(clock.times["step"]) - sum(milliseconds[0] for _, milliseconds in found)
    measure("the rest: the batch into the graph, gradients set to zero", rest, "ms")


def time_steps(sides, size):
    """Milliseconds per step of the first ones, and of those that follow; how busy the GPU is with these.

    The device is waited for at their end only.
    """
    x, y, graph, solver = nnabla_side.make_training(**size, threads=None, plain=sides.plain, device=sides.name)

    def time_some(count):
        sides.wait()
        start = time.perf_counter()
        for _ in range(count):
            train_step(graph, x, y, solver)
        sides.wait()
        return 1e3 * (time.perf_counter() - start) / count

    first = time_some(sides.sizes.warm_up)
    with Samples() as samples:
        return first, time_some(sides.sizes.steps), samples


def parts(times):
    """Name and milliseconds of the parts of a step, of each side; `times`: {what was timed: seconds}, or None."""

    def total(found, phase, names):
        known = [f"{name} {phase}" for name in names]
        return found and 1e3 * sum(statistics.median(found[name]) for name in known if name in found)

    for name, functions in PARTS.items():
        yield f"{name}, forward", [total(found, "forward", functions) for found in times]
    for name, functions in PARTS.items():
        if any(f"{function} backward" in times[0] for function in functions):
            yield f"{name}, backward", [total(found, "backward", functions) for found in times]
    yield "solver", [total(found, "forward", ["Adam"]) for found in times]


# --------------------------------------------------------------------------------------- long songs


def validation(sides):
    """Songs as long as they come, whole, as train.py validates: loss as on the CPU, time, memory."""
    seed_nnabla("initial weights", seed=0)
    model = nnabla_side.make_model(work.TARGETS[:1])

    def loss_of(x, y):
        graph = Graph(model, x.shape, test=True)
        graph.forward(x, y, clear_buffer=True)
        return float(graph.loss.d)

    for number, seconds in enumerate(sides.sizes.validation):
        x, y = signals_of(1, seconds, model.targets)
        song = x, y[model.targets[0]][:, None]
        with sides.tested(), Samples() as samples:
            times = []
            for _ in range(2):
                start = time.perf_counter()
                loss = loss_of(*song)
                times.append(time.perf_counter() - start)
        what = f"a song of {seconds} s"
        measure(f"validation of {what}", min(times), "s")
        samples.tell(what)
        if number == 0:
            with sides.reference():
                check(f"validation loss of {what}", abs(loss / loss_of(*song) - 1), LOSS)


# ------------------------------------------------------------------------------------------ reading


def reading(sides):
    """Excerpts per second, by the number of threads that prepare them."""
    sizes = sides.sizes
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--dataset", "manifest", "--manifest", str(write_songs(Path(folder), *sizes.songs))]
        arguments += ["--target", "vocals", "--seq-dur", str(sizes.seconds)]
        per_track = 1 + sizes.nb_batches * sizes.nb_samples // (sizes.songs[0] - 1)
        arguments += ["--samples-per-track", str(per_track), "--source-augmentations", "gain", "channelswap"]
        for nb_workers in sizes.workers:
            options = {"batch_size": sizes.nb_samples, "nb_batches": {"ours": sizes.nb_batches}}
            found = run("ours", None, work="read", arguments=arguments, nb_workers=nb_workers, **options)["result"]
            measure(f"{nb_workers} worker(s)", 1 / found["seconds"], "excerpts per second")
            if nb_workers:
                measure(f"{nb_workers} worker(s), main thread", 1e3 * found["own"], "ms of CPU per batch")


# ----------------------------------------------------------------------------------------- training


def training(sides):
    """train.py, of two epochs, and once more, interrupted after the first and resumed."""
    sizes = sides.sizes
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = ["--context", sides.name, "--dataset", "manifest", "--manifest", write_songs(folder, *sizes.songs)]
        options += ["--target", "vocals", "--seq-dur", sizes.seconds, "--batch-size", sizes.nb_samples, "--quiet"]
        options += ["--samples-per-track", sizes.samples_per_track, "--hidden-size", work.HIDDEN_SIZE]
        options += ["--nfft", work.N_FFT, "--nhop", work.N_HOP]
        options += ["--plain"] if sides.plain else []

        def train(output, *more):
            command = [sys.executable, ROOT / "train.py", *options, "--output", folder / output, *more]
            process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if process.returncode:
                raise OSError(f"train.py ended with status {process.returncode}: {process.stderr[-1000:]}")
            return json.loads((folder / output / "vocals.json").read_text())

        with Samples() as samples:
            whole = train("whole", "--epochs", "2")
        train("resumed", "--epochs", "1")
        resumed = train("resumed", "--epochs", "2", "--checkpoint", folder / "resumed")
    kinds = ("train_loss_history", "valid_loss_history")
    one, two = (np.array([log[kind] for kind in kinds]) for log in (whole, resumed))
    for kind, values in zip(kinds, one):
        fact(kind.replace("_", " "), ", ".join(f"{value:.6g}" for value in values))
    # on a CPU, bit for bit; what a GPU adds up, in an order of its own, training enlarges
    tolerance = 1e-3 if sides.name == "cudnn" else 0
    check("losses of the resumed training, relative", np.abs(two / one - 1).max(), tolerance)
    nb_steps = -(-sizes.samples_per_track * (sizes.songs[0] - 1) // sizes.nb_samples)
    epoch = whole["train_time_history"][1]
    measure(f"the second epoch, {nb_steps} steps and a validation", epoch, "s")
    measure("the same per step", 1e3 * epoch / nb_steps, "ms")
    samples.tell("train.py")
    if not np.isnan(samples.busy):
        measure("GPU busy, median", 100 * samples.busy, "%")


# --------------------------------------------------------------------------------------- separation


def separation(sides):
    """Stems as those of the CPU; time and memory of a song."""
    sizes = sides.sizes
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        with sides.reference():
            reference = Separator.load(folder, work.TARGETS, context="cpu")
            excerpt = work.audio(1, sizes.excerpt, 1)[0]
            expected = reference(excerpt, work.RATE)
        with sides.tested(), Samples() as samples:
            separator = Separator.load(folder, work.TARGETS, context=sides.name)
            actual = separator(excerpt, work.RATE)
            song, clock = work.audio(1, sizes.song, 1)[0], work.Clock()
            for _ in range(2):
                clock("song", separator, song, work.RATE)
        check(
            f"stems of {sizes.excerpt} s, absolute",
            max(float(np.abs(actual[target] - stem).max()) for target, stem in expected.items()),
            STEMS,
        )
        size = {"work": "separate", "folder": folder, "seconds": sizes.song}
        reports = torch(sides, **size)
    theirs = [report and report["times"]["separate"][0] for report in reports]
    measure(f"four stems of {sizes.song} s, niter 1", min(clock.times["song"]), "s", *theirs)
    samples.tell("separation")


def write_models(folder):
    """Untrained models of all targets, as files that both sides load."""
    config = {"nfft": work.N_FFT, "nhop": work.N_HOP, "nb_channels": 2}
    (folder / "separator.json").write_text(json.dumps({**config, "sample_rate": work.RATE}))
    for number, target in enumerate(work.TARGETS):
        seed_nnabla("initial weights", seed=number)
        parameters = nnabla_side.make_model([target]).get_parameters()
        parameters["fc3/bn/gamma"] *= 10  # so that masks are not all alike
        weights.save(folder / f"{target}.pth", parameters)
        (folder / f"{target}.json").write_text(json.dumps({"args": {**config, "hidden_size": work.HIDDEN_SIZE}}))


if __name__ == "__main__":
    main(dict(steps=steps, validation=validation, reading=reading, training=training, separation=separation))
