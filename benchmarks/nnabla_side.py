"""Our side of the measurements, and native NNabla's: the same code with `plain`."""

import contextlib
import itertools
import sys
import time
from pathlib import Path

import nnabla as nn
import nnabla.functions as F
import numpy as np
import work

import args
import context
import data
import files
import folders
import fourier
import functions as graph_functions
import losses
import solvers
import train as training
import trained
import weights
from evaluate import main as evaluate_main
from separator import Separator
from solvers import Adam
from train import Graph, seed_nnabla, train_step, validate


def label_functions():
    """From now on, note which of functions.py each function of NNabla's graph belongs to: the dict returned.

    One of ours may call another one: the outer one counts.
    """
    labels = {}

    def wrap(name, graph_function):
        def wrapped(*arguments, **options):
            known = set(labels)
            output = graph_function(*arguments, **options)
            label = " ".join(dict.fromkeys([name, options.get("name", name)]))
            output.visit(lambda function: function in known or labels.update({function: label}))
            return output

        return wrapped

    for name in {label.split()[0] for label in work.FUNCTIONS} - {"Adam"}:
        setattr(graph_functions, name, wrap(name, getattr(graph_functions, name)))
    return labels


def make_model(targets, parameters=None, statistics=None, **options):
    options.update(hidden_size=work.HIDDEN_SIZE, max_bin=work.MAX_BIN)
    name = "JointOpenUnmix" if "crossing" in options else "OpenUnmix"
    description = {"class": name, "options": options, "targets": targets, "nb_channels": 2}
    description.update(sample_rate=work.RATE, n_fft=work.N_FFT, n_hop=work.N_HOP)
    return trained.Model(description, trained.OWN[name], parameters, statistics)


def make_training(nb_samples, seconds, threads, plain, device="cpu"):
    nn.set_default_context(context.use(device, plain=plain, threads=threads))
    x, y = (work.audio(nb_samples, seconds, seed) for seed in (1, 2))
    model = make_model(["vocals"])
    graph = Graph(model, x.shape, test=False)
    return x, y[:, None], graph, Adam(model.variables(), work.LR, work.WEIGHT_DECAY)


def prepared(x, y):
    """A batch as a worker hands it over."""
    return nn.NdArray.from_numpy_array(x), [nn.NdArray.from_numpy_array(one) for one in np.moveaxis(y, 1, 0)]


def step(clock, nb_samples, seconds, warm_up, repeat, threads, plain=False):
    """Training steps as train.py does them."""

    def whole_step(number):
        seed_nnabla("dropout", seed=0, epoch=1, step=number)
        train_step(graph, x, y, solver)

    start = time.perf_counter()
    x, y, graph, solver = make_training(nb_samples, seconds, threads, plain)
    x, y = prepared(x, y)
    for i in range(warm_up + repeat):
        if i == warm_up:
            clock.times.clear()
        clock("step", whole_step, i)
        if i == 0:
            first = time.perf_counter() - start
    clock.add("first", first)


def joint(clock, songs, kind, nb_samples, seconds, warm_up, repeat, threads):
    """Training steps with the batches that they read, of a kind in `work.JOINT`; "separate" is one of its networks."""
    context.use("cpu", threads=threads)
    targets, options, loss = work.JOINT[kind]
    common = {"root": songs, "is_wav": True, "target": targets, "seed": 0, "augmentations": ["gain", "channelswap"]}
    source = data.MusdbSource(**common, seq_dur=seconds, samples_per_track=64)
    source.stacked = True
    model = make_model(targets, **options)
    graph = Graph(model, (nb_samples, 2, source.nb_timesteps), False, losses.LOSSES[loss])
    solver = Adam(model.variables(), work.LR, work.WEIGHT_DECAY)
    iterator = data.DataIterator(source, nb_samples, data.default_workers(is_gpu=False))
    batches = itertools.chain.from_iterable(map(iterator.epoch, itertools.count(1)))
    batches = (batch for batch in batches if batch[0].shape[0] == nb_samples)

    def whole_step():
        train_step(graph, *next(batches), solver)

    for i in range(warm_up + repeat):
        clock("warm-up" if i < warm_up else "step", whole_step)
    batches.close()


def functions(clock, nb_samples, seconds, warm_up, repeat, threads, plain=False, device="cpu"):
    """Each function within a training step. The plain form of one is several functions of NNabla's."""
    labels = label_functions()
    x, y, graph, solver = make_training(nb_samples, seconds, threads, plain, device)
    x, y = prepared(x, y)
    sums, started = {}, []

    def hooks(phase):
        def after(function):
            clock.wait()
            name = f"{labels[function]} {phase}"
            sums[name] = sums.get(name, 0) + time.perf_counter() - started[-1]

        return {"function_pre_hook": lambda function: started.append(time.perf_counter()), "function_post_hook": after}

    def whole_step():
        graph.forward(x, y, clear_no_need_grad=True, **hooks("forward"))
        solver.zero_grad()
        graph.loss.backward(clear_buffer=True, **hooks("backward"))
        clock("Adam forward", solver.update)

    for i in range(warm_up + repeat):
        if i == warm_up:
            clock.times.clear()
        clock("step", whole_step)
        for name, duration in sums.items():
            clock.add(name, duration)
        sums.clear()


def transform(clock, nb_samples, seconds, repeat, threads):
    """The STFT of stereo audio in native functions: NNabla's own, and that of fourier.py."""
    context.use("cpu", plain=True, threads=threads)
    x = work.audio(nb_samples, seconds, 1)
    x = nn.Variable.from_numpy_array(x.reshape(-1, x.shape[2]))
    theirs = F.stft(x, work.N_FFT, work.N_HOP, work.N_FFT, window_type="hanning", center=False)
    graphs = {"F.stft": F.sink(*theirs), "fourier": F.sink(*fourier.transform(x, work.N_FFT, work.N_HOP))}
    for _ in range(repeat):
        for name, graph in graphs.items():
            clock(name, graph.forward, True)


def train(clock, songs, output, target, initial, dropout, lr, epochs, threads, **recipe):
    """A training as train.py does it, of which every step's loss is kept; `initial` is a file of weights or None."""
    context.use("cpu", threads=threads)
    excerpts = work.Excerpts(songs, target, **recipe)
    seed_nnabla("initial weights", seed=recipe["seed"])
    if initial:
        model = make_model([target], weights.load(initial), dropout=dropout)
    else:
        found = data.statistics(excerpts.train.mixtures(), work.N_FFT, work.N_HOP)
        model = make_model([target], statistics=dict(zip(trained.STATISTICS, found)), dropout=dropout)
    graph = Graph(model, excerpts.shape, test=False)
    solver = Adam(model.variables(), lr, work.WEIGHT_DECAY)

    def step(x, y):
        return float(train_step(graph, x, y, solver).data)

    tracks = data.DataIterator(excerpts.valid, 1)
    result = work.train(clock, excerpts, epochs, step, lambda: validate(model, tracks.items()))
    output = files.writable_folder(output)
    weights.save(output / f"{target}.h5", model.get_parameters(), model.description)
    folders.write_config(output, model.config, model.targets)
    return result


def read(clock, arguments, batch_size, nb_workers, nb_batches):
    """Whole epochs of a training set, given by options of train.py, once all is compiled."""
    nn.set_default_context(context.use("cpu"))
    options, given = args.train_parser().parse(arguments)
    settings = vars(options)
    targets = data.choose_targets(settings, given)
    settings = {name: settings[name] for name in ("dataset", "seed", "nb_channels", *data.OPTIONS)}
    source = clock("open", lambda: data.open_split("train", targets=targets, **settings))
    iterator = data.DataIterator(source, batch_size, nb_workers)
    next(iterator.epoch(1))
    epochs = range(2, 2 + -(-nb_batches["ours"] // len(iterator)))
    batches = ((x.data, y) for epoch in epochs for x, y in iterator.epoch(epoch))
    return work.read(batches, len(epochs) * len(iterator))


def host(clock, arguments, pause):
    """What train.py's main thread does in a step for which a device, that nobody waits for, takes `pause` seconds.

    Returns seconds per step, the median over all but the first ones: of CPU, and that go by.
    """
    left, durations = None, []

    class Device:
        """The loss of a graph that is run elsewhere."""

        shape, data = (), nn.NdArray.from_numpy_array(np.ones((), np.float32))

        def forward(self, **clear):
            nonlocal left
            now = time.thread_time(), time.perf_counter()
            durations.append([b - a for a, b in zip(left or now, now)])
            time.sleep(pause)
            left = time.thread_time(), time.perf_counter()

        def backward(self, **clear):
            pass

    class ElsewhereGraph(Graph):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.loss = Device()

    def update(solver):
        solver.step += 1

    training.Graph, training.validate, solvers._Adam.update = ElsewhereGraph, lambda *_: 1.0, update
    with contextlib.redirect_stdout(sys.stderr):
        training.main(arguments)
    return np.median(durations[len(durations) // 4 :], axis=0).tolist()


def evaluate(clock, arguments):
    """The command evaluate.py; returns seconds per minute of audio and process, by part."""
    evaluate_main(arguments)
    return files.read_json(Path(arguments[arguments.index("--evaldir") + 1], "summary.json"))["seconds_per_minute"]


def separate(clock, folder, seconds, threads, nb_songs=1):
    """Songs of so many seconds, together; returns some samples of all stems."""
    start = time.perf_counter()
    separator, songs = make_separator(folder, threads), work.audio(nb_songs, seconds, 1)
    separator(songs[0, :, : work.RATE], work.RATE)
    clock.add("first", time.perf_counter() - start)
    stems = clock("separate", lambda: list(separator.together(songs, work.RATE)))
    return [[song[target][:, :: work.RATE].tolist() for target in work.TARGETS] for song in stems]


def stream(clock, folder, seconds, threads):
    """A recording that comes, and whose stems go, piece by piece."""
    separator, nb_timesteps = make_separator(folder, threads), int(seconds * work.RATE)
    separator(work.audio(1, 1, 1)[0], work.RATE)

    def read(start, stop):
        return np.random.default_rng(start).standard_normal((2, stop - start), np.float32)

    clock("separate", lambda: sum(stems.shape[2] for _, stems in separator.stream(read, 2, nb_timesteps)))


def make_separator(folder, threads):
    context.use("cpu", threads=threads)
    return Separator.load(folder, work.TARGETS, niter=1, context="cpu")


if __name__ == "__main__":
    works = {"step": step, "functions": functions, "separate": separate, "train": train}
    works.update(evaluate=evaluate, joint=joint, read=read, stream=stream, transform=transform, host=host)
    work.main(works, ["nnabla", "numpy", "scipy", "numba"])
