"""Train a network for one target, or several: ``python train.py --context cudnn --target bass --root MUSDB18``.

Writes into the output folder: <target>.h5 (best weights), <target>.json (arguments, versions, losses),
<target>.png (loss curves), <target>.checkpoint.npz (all that resuming needs), separator.json, monitor/ (the losses as
NNabla's monitors write them). Of several targets at once, files are named <target>+<target>….
"""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import utils

if __name__ == "__main__":
    utils.start()  # before imports that take long

import nnabla as nn
import numpy as np
from tqdm import tqdm

import checkpoint
import communicator
import context
import data
import files
import folders
import losses
import randomness
import solvers
import trained
import weights
from args import train_parser
from checkpoint import Keeper
from outputs import bring_best, check_new, check_output, write_log
from trained import Model
from utils import UsageError

NETWORK = ("hidden_size", "bandwidth", "unidirectional", "crossing")  # options of our own network


# --------------------------------------------------------------------------------- one epoch


class Graph:
    """The static graph of a loss for one shape of audio; graphs of a model share its parameters."""

    @context.exclusive()
    def __init__(self, model: Model, shape: tuple, test: bool, loss: Callable = losses.mse):
        self.x, self.y = nn.Variable(shape), [nn.Variable(shape) for _ in model.targets]
        self.loss = loss(losses.Signals(model, self.x, dict(zip(model.targets, self.y)), test))

    @context.exclusive()
    def forward(self, x: nn.NdArray | np.ndarray, y: list[nn.NdArray] | np.ndarray, **clear) -> None:
        """The loss of a batch of `data.DataIterator`, whose arrays become those of the graph: nothing is copied.

        Or of NumPy's arrays, mixtures (nb_samples, nb_channels, nb_timesteps) and targets (nb_samples, nb_targets, …).
        """
        if isinstance(x, np.ndarray):
            x, *y = (nn.NdArray.from_numpy_array(np.asarray(one, np.float32)) for one in (x, *np.moveaxis(y, 1, 0)))
        for variable, array in zip((self.x, *self.y), (x, *y)):
            variable.data = array
        self.loss.forward(**clear)


@context.exclusive()
def train_step(
    graph: Graph, x: nn.NdArray, y: list[nn.NdArray], solver, average: Callable = lambda loss: None
) -> nn.NdArray:
    """One step of the solver; returns the loss before it, on the device. Arguments as of `Graph.forward`.

    Args:
        average: makes gradients and the loss those of a batch of which (x, y) is a part: `Alone.averaging`
    """
    solver.zero_grad()
    graph.forward(x, y, clear_no_need_grad=True)
    graph.loss.backward(clear_buffer=True)
    average(graph.loss.data)
    solver.update()
    loss = nn.NdArray(graph.loss.shape)
    loss.copy_from(graph.loss.data)
    return loss


def loss_of(model: Model, x: nn.NdArray, y: list[nn.NdArray], loss: Callable) -> float:
    """Of a batch, in validation."""
    graph = Graph(model, x.shape, True, loss)  # tracks differ in length: a graph each, gone when this returns
    graph.forward(x, y, clear_buffer=True)
    return float(graph.loss.d)


def validate(
    model: Model, tracks: Iterable, loss: Callable = losses.mse, merge: Callable[[list], list] = lambda values: values
) -> float:
    """Mean of the losses of a validation set, batches as of `Graph.forward`.

    Args:
        merge: makes values of all tracks of those of some: `Alone.merge`
    """
    values = merge([loss_of(model, x, y, loss) for x, y in tracks])
    return sum(values) / len(values)


def seed_nnabla(purpose: str, **key: int) -> None:
    """Make all that NNabla and our functions draw from here on depend on this purpose and key alone."""
    rng = randomness.random_stream(purpose, **key)
    nn.random.prng = np.random.RandomState(rng.integers(2**32, size=4))
    nn.random.set_function_seed(int(rng.integers(2**31)))


def seed_dropout(rank: int, **key: int) -> None:
    """The same for a step, by seed, epoch and step; of several processes, the first draws what one alone would."""
    if rank:
        seed_nnabla("dropout of a rank", rank=rank, **key)
    else:
        seed_nnabla("dropout", **key)


# ----------------------------------------------------------------- what earlier trainings decided


def adopt(settings: dict, given: set, recorded: dict, origin: str | Path) -> None:
    """Take settings from a recorded run; options that are given and ask for something else are an error."""
    for name, value in recorded.items():
        if name in given and settings[name] != value:
            raise UsageError(f"{_option(name)} {settings[name]}: {origin} was trained with {value}")
        settings[name] = value


def adopt_network(settings: dict, given: set, model: Model, origin: str | Path) -> None:
    """Take the options of a network from it."""
    recorded = {"nfft": model.n_fft, "nhop": model.n_hop, "nb_channels": model.nb_channels}
    own = model.name in trained.OWN
    if own:
        recorded.update(hidden_size=model.net.hidden_size, unidirectional=model.net.unidirectional)
        recorded["crossing"] = getattr(model.net, "crossing", False)
        rate, n_fft, max_bin = model.sample_rate, model.n_fft, model.net.max_bin
        if "bandwidth" not in given:
            settings["bandwidth"] = (max_bin - 1) * rate / n_fft
        elif utils.bandwidth_to_max_bin(rate, n_fft, settings["bandwidth"]) != max_bin:
            raise UsageError(f"--bandwidth {settings['bandwidth']}: {origin} reads {max_bin} bins")
    adopt(settings, given, recorded, origin)
    settings["network_options"] = None if own else model.description["options"]


def _option(name):
    return "--" + name.replace("_", "-")


def continued_model(resumed: checkpoint.Checkpoint, targets: list | None, network: trained.Network | None) -> Model:
    """The model of a checkpoint; targets and network, if they are given, must be its own."""
    description = resumed.state["log"]["network"]
    if targets and set(targets) != set(description["targets"]):
        raise UsageError(f"{resumed.path} trains {' '.join(description['targets'])}, not {' '.join(targets)}")
    cls = trained.class_of(resumed.path, description, network)
    if network and description["class"] in trained.OWN:
        raise UsageError(f"{resumed.path} is of a network of our own, not of {network.name}: leave out --network")
    try:
        return Model(description, cls, resumed.parameters)
    except ValueError as error:
        raise UsageError(f"{resumed.path}: {error}") from None


def averaged_model(model: Model, resumed: checkpoint.Checkpoint | None) -> Model:
    """A model like this one, for averages of its weights."""
    try:
        return Model(model.description, type(model.net), resumed.average if resumed else model.get_parameters())
    except ValueError as error:
        raise UsageError(f"{resumed.path}: its averages: {error}") from None


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
    if len(targets) == 1:
        if settings["crossing"]:
            raise UsageError("--crossing bridges the networks of several --targets")
        return {**description, "class": "OpenUnmix", "options": options}, trained.OWN["OpenUnmix"]
    options["crossing"] = settings["crossing"]
    return {**description, "class": "JointOpenUnmix", "options": options}, trained.OWN["JointOpenUnmix"]


# -------------------------------------------------------------------------------------- main


@utils.command
def main(argv=None):
    processes = communicator.start()
    options, given = train_parser([*data.AUGMENTATIONS, data.REMIX], losses.LOSSES).parse(argv)
    args, quiet = vars(options), options.quiet
    args["targets"] = targets = data.choose_targets(args, given)
    folders.check_targets(targets)
    args["target"] = name = folders.name_of(targets)
    if args["network"] and (own := sorted(given & set(NETWORK))):
        raise UsageError(f"{_option(own[0])} is an option of our own network: --network-options has those of --network")
    network = trained.read_network(args["network"], args["network_options"])
    if own_loss := losses.read(args["loss"]):
        args["loss"] = own_loss.name

    device_id, threads = args["device_id"], args["threads"] or processes.cores
    if processes.size > 1:
        if "device_id" in given:
            raise UsageError("--device-id is for one process alone: several on a machine have the GPUs 0, 1, …")
        device_id = processes.local_rank
    device = context.use(args["context"], device_id, args["plain"], threads)
    nn.set_default_context(device)
    processes.use(device)
    context.pin(device)
    is_gpu = not device.backend[0].startswith("cpu")

    # what an earlier run decided
    model = resumed = None
    if args["checkpoint"] and (args["model"] or args["overwrite"]):
        raise UsageError("--checkpoint continues a training, --model and --overwrite begin one: give one of them")
    if args["checkpoint"]:
        resumed = processes.first(checkpoint.load, args["checkpoint"], name)
        log, origin = resumed.state["log"], resumed.path
        adopt(args, given, {key: log["args"][key] for key in checkpoint.RECIPE + checkpoint.DATASET}, origin)
        data.choose_targets(args, given)  # once more, of the dataset of the beginning
    loss = losses.choose(args["loss"], {name: args[name] for name in losses.OPTIONS}, given, own_loss)
    seed_nnabla("initial weights", seed=args["seed"])
    if resumed:
        model = continued_model(resumed, targets if given & {"target", "targets"} else None, network)
    elif args["model"]:
        model, origin = processes.on_each_machine(load_model, args, targets, network), args["model"]
    if model:
        adopt_network(args, given, model, origin)
        args["targets"] = targets = model.targets  # in the network's order
        args["target"] = name = folders.name_of(targets)
    output = Path(args["output"])
    if not resumed and not args["overwrite"]:
        processes.first(check_new, output, name)
    together = f", in {processes.size} processes" if processes.size > 1 else ""
    print(f"Training {' and '.join(targets)} on {device.backend[0].split(':')[0]}{together}", flush=True)

    # data; the statistics come first, from tracks that nothing else reads meanwhile
    if args["nfft"] % 2 or args["nhop"] > args["nfft"] // 2:
        raise UsageError(f"--nfft {args['nfft']} --nhop {args['nhop']}: a window is even, a hop at most half of it")
    seq_dur = args["seq_dur"] if args["seq_dur"] > 0 else None
    if seq_dur is None and args["batch_size"] != processes.size:
        each = ", one for each process" if processes.size > 1 else ""
        raise UsageError(
            f"--seq-dur 0 trains on whole tracks, which differ in length: use --batch-size {processes.size}{each}"
        )
    if args["batch_size"] < processes.size:
        raise UsageError(f"--batch-size {args['batch_size']} is that of all {processes.size} processes together")
    names = ("dataset", "seed", "nb_channels", "quiet", *data.OPTIONS)
    settings = {name: args[name] for name in names}
    train_source, valid_source = processes.on_each_machine(data.load, targets=targets, **settings)
    for note in train_source.notes + valid_source.notes:
        print(note, file=sys.stderr)
    rate, nb_channels = train_source.sample_rate, train_source.nb_channels
    shortest = min(train_source.shortest(), valid_source.shortest())
    if shortest < args["nfft"]:
        raise UsageError(f"a track, or --seq-dur {seq_dur}, is shorter than one frame of --nfft {args['nfft']} samples")
    if model and model.sample_rate != rate:
        raise UsageError(f"{origin} is for {model.sample_rate} Hz, the tracks have {rate} Hz")
    if args["nb_workers"] is None:
        args["nb_workers"] = data.default_workers(is_gpu, processes.cores)
    iterator = data.DataIterator(train_source, args["batch_size"], args["nb_workers"], processes)
    validation = data.DataIterator(valid_source, 1, args["nb_workers"], processes)

    # model and solver
    if not model:
        description, cls = describe(args, targets, network, rate)
        statistics = None
        if trained.arguments(cls)[0] & set(trained.STATISTICS):
            values = processes.first(data.statistics, train_source.mixtures(), args["nfft"], args["nhop"], quiet)
            statistics = dict(zip(trained.STATISTICS, values))
        try:
            model = Model(description, cls, statistics=statistics)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if model.domain == "audio" and args["nb_channels"] != nb_channels:
        raise UsageError(f"the tracks have {nb_channels} channels, the network takes audio of {args['nb_channels']}")
    losses.check(args["loss"], loss, model, (1, nb_channels, shortest))
    processes.equalize(model.variables(False))
    solver = solvers.Adam(model.variables(), args["lr"], args["weight_decay"])
    kept = averaged_model(model, resumed) if args["ema"] else model  # whose weights are validated and saved
    scheduler = utils.ReduceLROnPlateau(args["lr"], args["lr_decay_gamma"], args["lr_decay_patience"])
    stopping = utils.EarlyStopping(args["patience"])
    progress = {"epoch": 1, "steps": 0, "loss": 0.0, "seconds": 0.0}  # of the epoch: see checkpoint.py
    if resumed:
        try:
            solver.set_state(resumed.solver)
        except ValueError as error:
            raise UsageError(f"{origin}: {error}") from None
        scheduler.state, stopping.state, progress = (
            resumed.state[key] for key in ("scheduler", "stopping", "progress")
        )
        solver.lr = scheduler.state["lr"]
        if progress["steps"] > len(iterator):
            raise UsageError(f"{origin} has {progress['steps']} steps of an epoch, which these tracks do not give")
    else:
        log = {"train_loss_history": [], "valid_loss_history": [], "train_time_history": [], "lr_history": []}
        log.update(best_epoch=0, epochs_trained=0)
    average = processes.averaging(solver.parameters, model.variables(False))
    merge = functools.partial(processes.merge, nb_items=len(valid_source))
    described = {key: value for key, value in model.description.items() if key != "statistics"}
    log.update(
        args=args, network=described, randomness=randomness.SCHEME, processes=processes.size, **utils.run_metadata()
    )
    state = {"log": log, "scheduler": scheduler.state, "stopping": stopping.state, "progress": progress}

    with contextlib.ExitStack() as held:

        def prepare():
            files.writable_folder(output)
            for target in targets:
                held.enter_context(files.claimed(output / f".{target}.lock", f"training {target} into {output}"))
            if resumed:
                bring_best(origin, log["best_epoch"] > 0, output, name)
            elif not args["overwrite"]:
                check_new(output, name)  # again: another may have come first
            check_output(output, model, name)
            if log["best_epoch"]:  # the training may have ended before it wrote them
                folders.write_config(output, model.config, targets)
                write_log(output, name, log)

        processes.first(prepare)
        if stopping.stop or log["epochs_trained"] >= args["epochs"]:
            more = "--patience" if stopping.stop else "--epochs, the total,"
            print(f"{origin} has {log['epochs_trained']} epochs: nothing is left to train, {more} decides it")

        # the epochs
        asked = held.enter_context(utils.postponed())
        held.enter_context(np.errstate(all="ignore"))  # a training that diverges ends with a line
        every = 60 * args["checkpoint_every"]
        path, unread = checkpoint.path_of(output, name), utils.Losses(progress, processes.any)
        keeper = Keeper(path, model, kept, solver, state, unread.settle, every, asked, resumed and origin, processes)
        # the last batch of an epoch may be smaller; of whole tracks, each has another shape
        graph_of = functools.lru_cache(maxsize=2)(lambda shape: Graph(model, shape, False, loss))
        last = log["epochs_trained"] if stopping.stop else args["epochs"]
        epochs = tqdm(range(log["epochs_trained"] + 1, last + 1), "Epochs", disable=quiet)
        for epoch in epochs:
            start, bar = time.time() - progress["seconds"], {"leave": False, "disable": quiet}
            begun = progress["steps"]
            batches = iterator.epoch(epoch, progress["steps"])
            batches = tqdm(batches, f"Epoch {epoch}", len(iterator), initial=progress["steps"], **bar)
            for x, y in keeper.between(batches):
                with context.exclusive():
                    if not is_gpu or progress["steps"] == begun:  # whose generator each seed makes anew, which waits
                        seed_dropout(processes.rank, seed=args["seed"], epoch=epoch, step=progress["steps"])
                    share = processes.share(iterator.nb_samples(progress["steps"]))
                    unread.add(train_step(graph_of(x.shape), x, y, solver, functools.partial(average, share)))
                    if args["ema"]:
                        solvers.average(kept.variables(False), model.variables(False), args["ema"], solver.step)
                progress["seconds"] = time.time() - start

            unread.settle()
            seed_dropout(0, seed=args["seed"], epoch=epoch, step=progress["steps"])
            train_loss = progress["loss"] / progress["steps"]
            valid_loss = validate(kept, keeper.between(validation.items()), loss, merge)
            if not np.isfinite(valid_loss):
                raise OSError(f"the validation loss of epoch {epoch} is {valid_loss}: try a smaller --lr")

            keeper.begin()
            log["lr_history"].append(solver.lr)
            solver.lr = scheduler.step(valid_loss)
            improved = stopping.step(valid_loss)
            log["train_loss_history"].append(train_loss)
            log["valid_loss_history"].append(valid_loss)
            log["train_time_history"].append(time.time() - start)
            log.update(epochs_trained=epoch, best_loss=stopping.state["best"])
            log.update(num_bad_epochs=stopping.state["num_bad_epochs"])
            progress.update(epoch=epoch + 1, steps=0, loss=0.0, seconds=0.0)
            if improved:
                log["best_epoch"] = epoch
                processes.first(weights.save, output / f"{name}.h5", kept.arrays(), kept.description)
                # with the targets, now that they have weights
                processes.first(folders.write_config, output, model.config, targets)
            keeper.save()
            processes.first(write_log, output, name, log)
            epochs.set_postfix(train_loss=f"{train_loss:.4g}", valid_loss=f"{valid_loss:.4g}")
            if stopping.stop:
                print(f"Stopped early: no better validation loss in {stopping.patience} epochs")
                break
    print(f"Best validation loss {log['best_loss']:.6g} in epoch {log['best_epoch']}: {output / name}.h5")


if __name__ == "__main__":
    main()
