"""Train a network for one target: ``python train.py --context cudnn --target bass --root MUSDB18``.

Writes into the output folder: <target>.h5 (best weights), <target>.json (arguments, versions, losses),
<target>.png (loss curves), <target>.checkpoint.npz (all that resuming needs), separator.json, monitor/.
Of several targets at once, files are named <target>+<target>….
"""

from __future__ import annotations  # unions, on Python 3.9

import json
import logging
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

if __name__ == "__main__":
    logging.getLogger("nnabla").setLevel(logging.WARNING)  # else its import is announced

import nnabla as nn
import numpy as np
from nnabla.monitor import Monitor, MonitorSeries
from tqdm import tqdm

import context
import data
import folders
import functions
import trained
import utils
import weights
from args import train_parser
from solvers import Adam
from trained import Model
from utils import UsageError

# Options of our own network, and those that shape the course of a training.
NETWORK = ("hidden_size", "bandwidth", "unidirectional")
RECIPE = (
    "seq_dur",
    "samples_per_track",
    "source_augmentations",
    "batch_size",
    "lr",
    "lr_decay_patience",
    "lr_decay_gamma",
    "weight_decay",
    "seed",
)


# --------------------------------------------------------------------------------- one epoch


class Graph:
    """The static graph of the loss for one shape of audio; graphs of a model share its parameters.

    The loss is the mean squared error in the domain of the network, summed over its targets.
    """

    def __init__(self, model: Model, shape: tuple, test: bool):
        self.x, self.y = nn.Variable(shape), [nn.Variable(shape) for _ in model.targets]
        estimates = model.estimates(model.represent(self.x), test).values()
        errors = [functions.squared_error(y_hat, model.represent(y)) for y_hat, y in zip(estimates, self.y)]
        self.loss = sum(errors[1:], errors[0])

    def forward(self, x: np.ndarray, y: np.ndarray, **clear) -> None:
        """The loss of mixtures (nb_samples, nb_channels, nb_timesteps) and targets (nb_samples, nb_targets, …)."""
        self.x.d = x
        for k, variable in enumerate(self.y):
            variable.d = y[:, k]
        self.loss.forward(**clear)


def train_epoch(graph_of: Callable, batches: Iterable, solver) -> float:
    """One step of the solver per batch; returns the mean of the batches' losses."""
    losses = utils.AverageMeter()
    for x, y in batches:
        graph = graph_of(x.shape)
        solver.zero_grad()
        graph.forward(x, y, clear_no_need_grad=True)
        graph.loss.backward(clear_buffer=True)
        solver.update()
        losses.update(float(graph.loss.d))
    return losses.average


def validate(model: Model, source: data.MusdbSource) -> float:
    """Mean of the losses of whole tracks."""
    losses = utils.AverageMeter()
    for track in source.tracks:
        x, y = source.whole_track(track)
        graph = Graph(model, (1,) + x.shape, test=True)  # tracks differ in length: a graph each, freed at once
        graph.forward(x[None], y[None], clear_buffer=True)
        losses.update(float(graph.loss.d))
    return losses.average


def seed_epoch(seed: int, epoch: int) -> None:
    """Make an epoch's dropout depend on (seed, epoch) alone, so that a resumed run repeats it; 0: initial weights."""
    if epoch == 0:
        rng = utils.random_stream("initial weights", seed=seed)
    else:
        rng = utils.random_stream("dropout", seed=seed, epoch=epoch)
    nn.random.prng = np.random.RandomState(rng.integers(2**32, size=4))
    nn.random.set_function_seed(int(rng.integers(2**31)))


# ------------------------------------------------------------------------------------- files


def save_checkpoint(path: Path, model: Model, solver, meta: dict) -> None:
    arrays = {f"parameters/{name}": value for name, value in model.get_parameters().items()}
    arrays.update({f"solver/{name}": value for name, value in solver.get_state().items()})
    arrays.update({f"statistics/{name}": value for name, value in model.description.get("statistics", {}).items()})
    with utils.atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, meta=np.array(json.dumps(meta)), **arrays)


def load_checkpoint(path: str | Path, name: str) -> tuple:
    """Read a checkpoint file, or that of `name` in a folder: (path, parameters, solver state, meta)."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / f"{name}.checkpoint.npz"
    try:
        with np.load(path) as archive:
            meta = json.loads(str(archive["meta"]))
            groups = {"parameters": {}, "solver": {}, "statistics": {}}
            for key in archive.files:
                group, _, array = key.partition("/")
                if array:
                    groups[group][array] = archive[key]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error}") from None
    scheme = meta["log"].get("randomness", 1)
    if scheme != data.RANDOMNESS:
        raise UsageError(
            f"{path} drew its random numbers by scheme {scheme}, this version draws them by scheme {data.RANDOMNESS}: "
            "finish it with the version that began it, or go on from its weights with --model"
        )
    if groups["statistics"]:
        meta["log"]["network"]["statistics"] = groups["statistics"]
    return path, groups["parameters"], groups["solver"], meta


def check_output(output: Path, model: Model, name: str) -> None:
    """UsageError if the weights of this training cannot lie in the folder beside what is there."""
    folders.check_config(output, model.config)
    for target in model.targets:
        path = folders.weights_of(output, target)
        if path and path.name != f"{name}.h5":
            raise UsageError(f"{path} holds weights of {target} already: use another --output")


def bring_best(checkpoint: Path, output: Path, name: str) -> None:
    """Copy the best weights of a training that goes on in another folder."""
    best, copy = checkpoint.with_name(f"{name}.h5"), output / f"{name}.h5"
    if not best.is_file():
        raise UsageError(f"there is no {best}, the best weights so far, beside {checkpoint.name}")
    if copy.exists() and copy.read_bytes() != best.read_bytes():
        raise UsageError(f"{copy} is of another training, or of this one later on: use another --output")
    if not copy.exists():
        with utils.atomic_path(copy) as temporary:
            shutil.copyfile(best, temporary)


# ----------------------------------------------------------------- what earlier trainings decided


def adopt(settings: dict, given: set, recorded: dict, origin: str | Path) -> None:
    """Take settings from a recorded run; options that are given and ask for something else are an error."""
    for name, value in recorded.items():
        if name in given and settings[name] != value:
            raise UsageError(f"{_option(name)} {settings[name]}: {origin} was trained with {value}")
        settings[name] = value


def adopt_network(settings: dict, given: set, description: dict, origin: str | Path) -> None:
    """Take the options of a network from its description."""
    recorded = {"nfft": description["n_fft"], "nhop": description["n_hop"], "nb_channels": description["nb_channels"]}
    options = description["options"]
    if description["class"] in trained.OWN:
        recorded.update({name: options[name] for name in ("hidden_size", "unidirectional")})
        rate, n_fft, max_bin = description["sample_rate"], description["n_fft"], options["max_bin"]
        if "bandwidth" not in given:
            settings["bandwidth"] = (max_bin - 1) * rate / n_fft
        elif utils.bandwidth_to_max_bin(rate, n_fft, settings["bandwidth"]) != max_bin:
            raise UsageError(f"--bandwidth {settings['bandwidth']}: {origin} reads {max_bin} bins")
    adopt(settings, given, recorded, origin)
    settings["network_options"] = None if description["class"] in trained.OWN else options


def _option(name):
    return "--" + name.replace("_", "-")


def load_model(settings: dict, targets: list, network: trained.Network | None) -> Model:
    """The trained model of --model, with all of the targets and no others."""
    models, _ = trained.load_models(settings["model"], targets, network=network, quiet=settings["quiet"])
    if len(models) > 1 or set(models[0].targets) != set(targets):
        have = " and ".join(" ".join(model.targets) for model in models)
        raise UsageError(f"{settings['model']} has networks of {have}, not one of {' '.join(targets)}")
    return models[0]


def describe(settings: dict, targets: list, network: trained.Network | None, sample_rate: int) -> tuple:
    """Description and class of the network that a new training asks for."""
    description = {"targets": targets, "sample_rate": sample_rate, "nb_channels": settings["nb_channels"]}
    description.update(n_fft=settings["nfft"], n_hop=settings["nhop"])
    if network:
        return {**description, "class": network.name, "options": network.options or {}}, network.cls
    max_bin = utils.bandwidth_to_max_bin(sample_rate, settings["nfft"], settings["bandwidth"])
    options = {"hidden_size": settings["hidden_size"], "nb_layers": 3, "max_bin": max_bin}
    options["unidirectional"] = settings["unidirectional"]
    return {**description, "class": "OpenUnmix", "options": options}, trained.OWN["OpenUnmix"]


# ------------------------------------------------------------------------------------- pictures


def plot_losses(path: Path, log: dict) -> None:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(log["train_loss_history"]) + 1)
    axes.plot(epochs, log["train_loss_history"], ".-", label="training")
    axes.plot(epochs, log["valid_loss_history"], ".-", label="validation")
    axes.axvline(log["best_epoch"], color="gray", lw=0.8, ls=":", label=f"best epoch ({log['best_epoch']})")
    axes.set(xlabel="epoch", ylabel="mean squared error", yscale="log", title=" + ".join(log["network"]["targets"]))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    with utils.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def write_log(output: Path, name: str, log: dict) -> None:
    utils.write_json(output / f"{name}.json", log)
    plot_losses(output / f"{name}.png", log)


# -------------------------------------------------------------------------------------- main


@utils.command
def main(argv=None):
    options, given = train_parser(data.AUGMENTATIONS).parse(argv)
    args, quiet = vars(options), options.quiet
    args["targets"] = targets = args["targets"] or [args["target"]]
    folders.check_targets(targets)
    args["target"] = name = folders.name_of(targets)
    if args["network"] and (own := sorted(given & set(NETWORK))):
        raise UsageError(f"{_option(own[0])} is an option of our own network: --network-options has those of --network")
    network = trained.read_network(args["network"], args["network_options"])

    device = context.use(args["context"], args["device_id"], args["plain"], args["threads"])
    nn.set_default_context(device)

    # what an earlier run decided
    model = resumed = None
    if args["checkpoint"] and args["model"]:
        raise UsageError("--checkpoint continues a training, --model starts one from trained weights: give one of them")
    if args["checkpoint"]:
        resumed, parameters, solver_state, meta = load_checkpoint(args["checkpoint"], name)
        adopt(args, given, {key: meta["log"]["args"][key] for key in RECIPE}, resumed)
        description = meta["log"]["network"]
        if given & {"target", "targets"} and set(targets) != set(description["targets"]):
            raise UsageError(f"{resumed} trains {' '.join(description['targets'])}, not {' '.join(targets)}")
        cls = trained.class_of(resumed, description, network)
        if network and description["class"] in trained.OWN:
            raise UsageError(f"{resumed} is of a network of our own, not of {network.name}: leave out --network")
        adopt_network(args, given, description, resumed)
    elif args["model"]:
        model = load_model(args, targets, network)
        description = model.description
        adopt_network(args, given, description, args["model"])
    if resumed or model:
        args["targets"] = targets = description["targets"]  # in the network's order
        args["target"] = name = folders.name_of(targets)
    print(f"Training {' and '.join(targets)} on {device.backend[0].split(':')[0]}", flush=True)

    # data; the statistics come first, from tracks that nothing else reads meanwhile
    seq_dur = args["seq_dur"] if args["seq_dur"] > 0 else None
    if seq_dur is None and args["batch_size"] != 1:
        raise UsageError("--seq-dur 0 trains on whole tracks, which differ in length: use --batch-size 1")
    musdb = {"target": targets, "root": args["root"], "is_wav": args["is_wav"], "quiet": quiet}
    train_source = data.MusdbSource(
        **musdb,
        split="train",
        seq_dur=seq_dur,
        samples_per_track=args["samples_per_track"],
        augmentations=args["source_augmentations"],
        seed=args["seed"],
    )
    valid_source = data.MusdbSource(**musdb, split="valid")
    rate, nb_channels = train_source.sample_rate, train_source.nb_channels
    shortest = min(track.nb_timesteps for track in train_source.tracks + valid_source.tracks)
    if min(shortest, train_source.nb_timesteps or shortest) < args["nfft"]:
        raise UsageError(f"a track, or --seq-dur {seq_dur}, is shorter than one frame of --nfft {args['nfft']} samples")
    if (resumed or model) and description["sample_rate"] != rate:
        origin = resumed or args["model"]
        raise UsageError(f"{origin} is for {description['sample_rate']} Hz, the tracks have {rate} Hz")
    if args["nb_channels"] == 2 and nb_channels != 2:
        raise UsageError(f"the tracks have {nb_channels} channel(s): use --nb-channels 1")

    # model and solver
    seed_epoch(args["seed"], 0)  # the initial weights; epochs count from 1
    try:
        if resumed:
            model = Model(description, cls, parameters)
        elif model is None:
            description, cls = describe(args, targets, network, rate)
            statistics = None
            if trained.arguments(cls)[0] & set(trained.STATISTICS):
                values = data.statistics(train_source.tracks, args["nfft"], args["nhop"], quiet)
                statistics = dict(zip(trained.STATISTICS, values))
            model = Model(description, cls, statistics=statistics)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if model.domain == "audio" and args["nb_channels"] != nb_channels:
        raise UsageError(f"the tracks have {nb_channels} channels, the network takes audio of {args['nb_channels']}")
    output = utils.writable_folder(args["output"])
    check_output(output, model, name)

    graphs = {}

    def graph_of(shape):  # the last batch of an epoch may be smaller
        if shape not in graphs:
            graphs[shape] = Graph(model, shape, test=False)
        return graphs[shape]

    solver = Adam(model.variables(), args["lr"], args["weight_decay"])
    scheduler = utils.ReduceLROnPlateau(args["lr"], args["lr_decay_gamma"], args["lr_decay_patience"])
    stopping = utils.EarlyStopping(args["patience"])

    log = {"train_loss_history": [], "valid_loss_history": [], "train_time_history": [], "lr_history": []}
    log.update(best_epoch=0, epochs_trained=0)
    if resumed:
        bring_best(resumed, output, name)
        folders.write_config(output, model.config, targets)
        solver.set_state(solver_state)
        scheduler.state, stopping.state, log = meta["scheduler"], meta["stopping"], meta["log"]
        solver.lr = scheduler.state["lr"]
    network = {key: value for key, value in model.description.items() if key != "statistics"}
    log.update(args=args, network=network, randomness=data.RANDOMNESS, **utils.run_metadata())

    monitor = Monitor(str(output / "monitor" / name))
    series = {key: MonitorSeries(key, monitor, verbose=False) for key in ("training loss", "validation loss")}
    for epoch, losses in enumerate(zip(log["train_loss_history"], log["valid_loss_history"]), 1):
        for monitored, loss in zip(series.values(), losses):
            monitored.add(epoch, loss)
    if resumed:  # which may have ended before it wrote them
        write_log(output, name, log)
        if stopping.stop or log["epochs_trained"] >= args["epochs"]:
            more = "--patience" if stopping.stop else "--epochs, the total,"
            print(f"{resumed} has {log['epochs_trained']} epochs: nothing is left to train, {more} decides it")

    # the epochs
    iterator = data.DataIterator(train_source, args["batch_size"], args["nb_workers"])
    last = log["epochs_trained"] if stopping.stop else args["epochs"]
    epochs = tqdm(range(log["epochs_trained"] + 1, last + 1), "Epochs", disable=quiet)
    for epoch in epochs:
        start = time.time()
        seed_epoch(args["seed"], epoch)
        batches = tqdm(iterator.epoch(epoch), f"Epoch {epoch}", len(iterator), leave=False, disable=quiet)
        train_loss = train_epoch(graph_of, batches, solver)
        valid_loss = validate(model, valid_source)
        if not np.isfinite(valid_loss):
            raise OSError(f"the validation loss of epoch {epoch} is {valid_loss}: try a smaller --lr")
        log["lr_history"].append(solver.lr)
        solver.lr = scheduler.step(valid_loss)
        improved = stopping.step(valid_loss)

        log["train_loss_history"].append(train_loss)
        log["valid_loss_history"].append(valid_loss)
        log["train_time_history"].append(time.time() - start)
        log.update(epochs_trained=epoch, best_loss=stopping.state["best"])
        log.update(num_bad_epochs=stopping.state["num_bad_epochs"])
        if improved:
            log["best_epoch"] = epoch
            weights.save(output / f"{name}.h5", model.get_parameters(), model.description)
            folders.write_config(output, model.config, targets)  # with the targets, now that they have weights
        meta = {"log": log, "scheduler": scheduler.state, "stopping": stopping.state}
        save_checkpoint(output / f"{name}.checkpoint.npz", model, solver, meta)
        write_log(output, name, log)
        for monitored, loss in zip(series.values(), (train_loss, valid_loss)):
            monitored.add(epoch, loss)
        epochs.set_postfix(train_loss=f"{train_loss:.4g}", valid_loss=f"{valid_loss:.4g}")
        if stopping.stop:
            print(f"Stopped early: no better validation loss in {stopping.patience} epochs")
            break
    print(f"Best validation loss {log['best_loss']:.6g} in epoch {log['best_epoch']}: {output / name}.h5")


if __name__ == "__main__":
    main()
