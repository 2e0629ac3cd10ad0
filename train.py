"""Train Open-Unmix for one target: ``python train.py --context cudnn --target bass --root MUSDB18``.

Writes into the output folder: <target>.h5 (best weights), <target>.json (arguments, versions, losses),
<target>.png (loss curves), <target>.checkpoint.npz (all that resuming needs), separator.json, monitor/.
"""

import json
import shutil
import time
import zipfile
from pathlib import Path

import nnabla as nn
import numpy as np
from nnabla.monitor import Monitor, MonitorSeries
from tqdm import tqdm

import data
import functions
import kernels
import pretrained
import utils
import weights
from args import train_parser
from model import OpenUnmix
from solvers import Adam
from utils import UsageError

# The arguments that shape the network, and those that, besides, shape the course of a training.
ARCHITECTURE = ("nfft", "nhop", "hidden_size", "bandwidth", "nb_channels", "unidirectional")
RECIPE = ARCHITECTURE + (
    "target",
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
    """The static graph of the loss for one shape of audio; graphs share their parameters."""

    def __init__(self, net, shape, test):
        self.x, self.y = nn.Variable(shape), nn.Variable(shape)
        self.loss = functions.squared_error(net(self.x, test), net.spectrogram(self.y))

    def forward(self, x, y, **clear):
        self.x.d, self.y.d = x, y
        self.loss.forward(**clear)


def train_epoch(graph_of, batches, solver):
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


def validate(net, source):
    """Mean of the losses of whole tracks."""
    losses = utils.AverageMeter()
    for track in source.tracks:
        x, y = source.whole_track(track)
        graph = Graph(net, (1,) + x.shape, test=True)  # tracks differ in length: a graph each, freed at once
        graph.forward(x[None], y[None], clear_buffer=True)
        losses.update(float(graph.loss.d))
    return losses.average


def seed_epoch(seed, epoch):
    """Make an epoch's dropout depend on (seed, epoch) alone, so that a resumed run repeats it."""
    state = np.random.SeedSequence((seed, epoch)).generate_state(2)
    nn.random.prng = np.random.RandomState(state[0])
    nn.random.set_function_seed(int(state[1] % 2**31))


# ------------------------------------------------------------------------------------- files


def save_checkpoint(path, solver, meta):
    arrays = {f"parameters/{name}": value for name, value in weights.get_parameters().items()}
    arrays.update({f"solver/{name}": value for name, value in solver.get_state().items()})
    with utils.atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, meta=np.array(json.dumps(meta)), **arrays)


def load_checkpoint(path, target):
    """Read a checkpoint file, or that of `target` in a folder: (path, parameters, solver state, meta)."""
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / f"{target}.checkpoint.npz"
    try:
        with np.load(path) as archive:
            meta = json.loads(str(archive["meta"]))
            groups = {"parameters": {}, "solver": {}}
            for key in archive.files:
                group, _, name = key.partition("/")
                if name:
                    groups[group][name] = archive[key]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error}") from None
    return path, groups["parameters"], groups["solver"], meta


def load_model(model, target, quiet):
    """A trained model to fine-tune, a folder or a published one by name.

    Returns:
        its parameters, the arguments it was trained with as far as known, its sample rate
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        patterns = (f"{target}.h5", f"{target}.pth", f"{target}-*.pth")
        files = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        if not files:
            raise UsageError(f"no weights of the target {target!r} ({target}.h5 or {target}*.pth) in {folder}")
        file, config = files[0], utils.read_json(folder / "separator.json")
        recorded = utils.read_json(folder / f"{target}.json").get("args", {})
    elif model in pretrained.MODELS:
        file, config, recorded = (
            pretrained.fetch(model, [target], quiet=quiet)[target],
            pretrained.MODELS[model].config,
            {},
        )
    else:
        raise UsageError(f"unknown model {model!r}: neither a folder, nor {', '.join(pretrained.MODELS)}")
    try:
        parameters = weights.load(file)
        sizes = weights.describe(parameters)
    except ValueError as error:
        raise UsageError(str(error)) from None
    recorded.update({name: sizes[name] for name in ("hidden_size", "nb_channels", "unidirectional")})
    recorded.update(nfft=2 * (sizes["nb_bins"] - 1), nhop=config.get("nhop"))
    return parameters, recorded, config.get("sample_rate")


def adopt(settings, parser, recorded, names, origin):
    """Take the named settings from a recorded run; options that ask for something else are an error."""
    for name in names:
        if name not in recorded:
            continue
        if settings[name] not in (recorded[name], parser.get_default(name)):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {settings[name]}: {origin} was trained with {recorded[name]}")
        settings[name] = recorded[name]


def plot_losses(path, log):
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(log["train_loss_history"]) + 1)
    axes.plot(epochs, log["train_loss_history"], ".-", label="training")
    axes.plot(epochs, log["valid_loss_history"], ".-", label="validation")
    axes.axvline(log["best_epoch"], color="gray", lw=0.8, ls=":", label=f"best epoch ({log['best_epoch']})")
    axes.set(xlabel="epoch", ylabel="mean squared error", yscale="log", title=log["args"]["target"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    with utils.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def write_separator_config(path, net, target):
    """separator.json; keeps the targets that were trained into the same folder before."""
    config = dict(net.separator_config, targets=[target])
    if path.exists():
        earlier = utils.read_json(path)
        for key, value in net.separator_config.items():
            if earlier.get(key, value) != value:
                raise UsageError(f"{path} says {key} = {earlier[key]}, not {value}: use another --output")
        config["targets"] = sorted({target, *earlier.get("targets", [])})
    utils.write_json(path, config)


# -------------------------------------------------------------------------------------- main


@utils.command
def main(argv=None):
    parser = train_parser()
    args = vars(parser.parse_args(argv))
    target, quiet = args["target"], args["quiet"]

    # what an earlier run decided
    trained = resumed = None
    if args["checkpoint"] and args["model"]:
        raise UsageError("--checkpoint continues a training, --model starts one from trained weights: give one of them")
    if args["checkpoint"]:
        resumed, trained, solver_state, meta = load_checkpoint(args["checkpoint"], target)
        adopt(args, parser, meta["log"]["args"], RECIPE, resumed)
        if meta["log"]["epochs_trained"] >= args["epochs"]:
            raise UsageError(f"{resumed} has {meta['log']['epochs_trained']} epochs already: raise --epochs, the total")
    elif args["model"]:
        trained, recorded, sample_rate = load_model(args["model"], target, quiet)
        adopt(args, parser, recorded, ARCHITECTURE, args["model"])

    context = utils.extension_context(args["context"], args["device_id"])
    nn.set_default_context(context)
    utils.set_plain(args["plain"])
    kernels.set_threads(args["threads"])
    print(f"Training {target} on {context.backend[0].split(':')[0]}", flush=True)

    # data; the statistics come first, from tracks that nothing else reads meanwhile
    seq_dur = args["seq_dur"] if args["seq_dur"] > 0 else None
    if seq_dur is None and args["batch_size"] != 1:
        raise UsageError("--seq-dur 0 trains on whole tracks, which differ in length: use --batch-size 1")
    musdb = {"target": target, "root": args["root"], "is_wav": args["is_wav"], "quiet": quiet}
    train_source = data.MusdbSource(
        **musdb,
        split="train",
        seq_dur=seq_dur,
        samples_per_track=args["samples_per_track"],
        augmentations=args["source_augmentations"],
        seed=args["seed"],
    )
    valid_source = data.MusdbSource(**musdb, split="valid")
    shortest = min(track.frames for track in train_source.tracks + valid_source.tracks)
    if min(shortest, train_source.nb_timesteps or shortest) < args["nfft"]:
        raise UsageError(f"a track, or --seq-dur {seq_dur}, is shorter than one frame of --nfft {args['nfft']} samples")
    if args["model"] and sample_rate != train_source.sample_rate:
        raise UsageError(f"{args['model']} is for {sample_rate} Hz, the tracks have {train_source.sample_rate} Hz")
    if args["nb_channels"] == 2 and train_source.nb_channels != 2:
        raise UsageError(f"the tracks have {train_source.nb_channels} channel(s): use --nb-channels 1")
    output = utils.writable_folder(args["output"])

    # model and solver
    sizes = weights.describe(trained) if trained else {}
    max_bin = utils.bandwidth_to_max_bin(train_source.sample_rate, args["nfft"], args["bandwidth"])
    mean = std = None
    if trained is None:
        mean, std = data.statistics(train_source.tracks, args["nfft"], args["nhop"], quiet)
    nn.clear_parameters()
    seed_epoch(args["seed"], 0)  # the initial weights; epochs count from 1
    try:
        net = OpenUnmix(
            n_fft=args["nfft"],
            n_hop=args["nhop"],
            hidden_size=args["hidden_size"],
            nb_channels=args["nb_channels"],
            sample_rate=train_source.sample_rate,
            nb_layers=sizes.get("nb_layers", 3),
            input_mean=mean,
            input_scale=std,
            max_bin=sizes.get("max_bin", max_bin),
            unidirectional=args["unidirectional"],
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    graphs = {}

    def graph_of(shape):  # the last batch of an epoch may be smaller
        if shape not in graphs:
            graphs[shape] = Graph(net, shape, test=False)
        return graphs[shape]

    if seq_dur is not None:
        graph_of((args["batch_size"], train_source.nb_channels, train_source.nb_timesteps))
    if trained is not None:
        weights.set_parameters(trained)
    solver = Adam(nn.get_parameters(), args["lr"], args["weight_decay"])
    scheduler = utils.ReduceLROnPlateau(args["lr"], args["lr_decay_gamma"], args["lr_decay_patience"])
    stopping = utils.EarlyStopping(args["patience"])

    log = {"train_loss_history": [], "valid_loss_history": [], "train_time_history": [], "lr_history": []}
    log.update(best_epoch=0, epochs_trained=0)
    if resumed:
        solver.set_state(solver_state)
        scheduler.state, stopping.state, log = meta["scheduler"], meta["stopping"], meta["log"]
        solver.lr = scheduler.state["lr"]
        best = resumed.with_name(f"{target}.h5")
        if best.exists() and not (output / best.name).exists():
            shutil.copy(best, output / best.name)
    log.update(args=args, **utils.run_metadata())
    write_separator_config(output / "separator.json", net, target)

    monitor = Monitor(str(output / "monitor" / target))
    series = {key: MonitorSeries(key, monitor, verbose=False) for key in ("training loss", "validation loss")}
    for epoch, losses in enumerate(zip(log["train_loss_history"], log["valid_loss_history"]), 1):
        for one, loss in zip(series.values(), losses):
            one.add(epoch, loss)

    # the epochs
    iterator = data.DataIterator(train_source, args["batch_size"], args["nb_workers"])
    epochs = tqdm(range(log["epochs_trained"] + 1, args["epochs"] + 1), "Epochs", disable=quiet)
    for epoch in epochs:
        start = time.time()
        seed_epoch(args["seed"], epoch)
        batches = tqdm(iterator.epoch(epoch), f"Epoch {epoch}", len(iterator), leave=False, disable=quiet)
        train_loss = train_epoch(graph_of, batches, solver)
        valid_loss = validate(net, valid_source)
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
            weights.save(output / f"{target}.h5", weights.get_parameters())
        meta = {"log": log, "scheduler": scheduler.state, "stopping": stopping.state}
        save_checkpoint(output / f"{target}.checkpoint.npz", solver, meta)
        utils.write_json(output / f"{target}.json", log)
        plot_losses(output / f"{target}.png", log)
        for one, loss in zip(series.values(), (train_loss, valid_loss)):
            one.add(epoch, loss)
        epochs.set_postfix(train_loss=f"{train_loss:.4g}", valid_loss=f"{valid_loss:.4g}")
        if stopping.stop:
            print(f"Stopped early: no better validation loss in {stopping.patience} epochs")
            break
    print(f"Best validation loss {log['best_loss']:.6g} in epoch {log['best_epoch']}: {output / target}.h5")


if __name__ == "__main__":
    main()
