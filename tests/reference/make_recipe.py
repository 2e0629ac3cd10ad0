"""Makes tests/data/golden_recipe_*.npz, for tests/test_recipe.py: trainings by openunmix 1.3.0.

    python make_recipe.py OUT_DIR [--live]

Runs in the environment of make_cases.py, besides ffmpeg. The loop is that of the reference's scripts/train.py, in
double precision: what the reference means, rather than how it rounds. Its dataset class draws the excerpts, but with
the random numbers that our data.py would draw, so that a new randomness.SCHEME needs new files. A file holds the
options, the initial weights (of one LSTM layer: torch's dropout, which is between layers, cannot be had from ours),
mixtures and targets of the first epoch, losses and learning rates of each, and the weights of the best one. With
--live, longer songs, larger networks.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2]))  # of our own modules, only randomness.py

from make_cases import arrays, floored, make_used, statistics
from openunmix import data, model, transforms, utils
from sklearn.preprocessing import StandardScaler
from songs import RATE, SPARSE, write_layout, write_songs

import randomness

COMMON = {"batch_size": 4, "samples_per_track": 3, "seed": 5, "epochs": 3, "lr": 2e-3}
# Decay pulls input_mean with a force of its own: without, its gradient is rounding noise, of which Adam makes steps.
COMMON.update(weight_decay=0.01, lr_decay_patience=0, lr_decay_gamma=0.4)
FOLDERS = {name: value for name, value in COMMON.items() if name != "samples_per_track"}
# batches of two make more gradients that are rounding: see LIVE
FOLDERS.update(nb_channels=2, unidirectional=False, batch_size=2, lr=1e-4)
BOTH = ["gain", "channelswap"]
CASES = {
    "stereo": dict(target="bass", nb_channels=2, unidirectional=False, source_augmentations=BOTH),
    "mono": dict(target="accompaniment", nb_channels=1, unidirectional=True, source_augmentations=[]),
    "aligned": dict(dataset="aligned", target="drums", input_file="mixture.wav", output_file="drums.wav"),
    "sourcefolder": dict(
        dataset="sourcefolder",
        target="bass",
        target_dir="bass",
        interferer_dirs=["vocals", "drums"],
        nb_train_samples=10,
        nb_valid_samples=3,
        source_augmentations=BOTH,
    ),
    "trackfolder_fix": dict(
        dataset="trackfolder_fix",
        target="vocals",
        target_file="vocals.wav",
        interferer_files=["drums.wav", "other.wav"],
        random_track_mix=True,
        source_augmentations=BOTH,
    ),
    "trackfolder_fix_same": dict(
        dataset="trackfolder_fix",
        target="other",
        target_file="other.wav",
        interferer_files=["bass.wav"],
        source_augmentations=["gain"],
    ),
    "trackfolder_var": dict(
        dataset="trackfolder_var",
        target="vocals",
        target_file="vocals.wav",
        random_interferer_mix=True,
        silence_missing=True,
        source_augmentations=BOTH,
    ),
    "trackfolder_var_same": dict(
        dataset="trackfolder_var", target="bass", target_file="bass.wav", source_augmentations=BOTH[1:]
    ),
}
GOLDEN = {"nfft": 512, "nhop": 256, "hidden_size": 8, "seq_dur": 0.25}
# With many weights some have a gradient that is rounding; at a lower rate their random steps are short.
LIVE = {"nfft": 4096, "nhop": 1024, "hidden_size": 64, "seq_dur": 2.0, "lr": 1e-4}
LIVE_TIMES = 6  # as long as the golden songs


def datasets(root, options):
    """The reference's training and validation sets, as its load_datasets makes them."""
    kind, seq_dur = options.get("dataset", "musdb"), options["seq_dur"]
    if kind == "musdb":
        common = {"target": options["target"], "root": root, "is_wav": True}
        return (
            data.MUSDBDataset(
                **common, seq_duration=seq_dur, samples_per_track=options["samples_per_track"], random_track_mix=True
            ),
            data.MUSDBDataset(**common, split="valid", seq_duration=None, samples_per_track=1),
        )
    ours, theirs = {"random_chunks": True, "seq_duration": seq_dur}, {"seq_duration": None}
    if kind == "aligned":
        cls, names = data.AlignedDataset, ("input_file", "output_file")
        theirs["seq_duration"] = seq_dur
    elif kind == "sourcefolder":
        cls, names = data.SourceFolderDataset, ("target_dir", "interferer_dirs")
        theirs.update(seq_duration=seq_dur, random_chunks=True, nb_samples=options["nb_valid_samples"])
        ours["nb_samples"] = options["nb_train_samples"]
    elif kind == "trackfolder_fix":
        cls, names = data.FixedSourcesTrackFolderDataset, ("target_file", "interferer_files")
        ours["random_track_mix"] = options.get("random_track_mix", False)
    else:
        cls, names = data.VariableSourcesTrackFolderDataset, ("target_file",)
        ours["random_interferer_mix"] = options.get("random_interferer_mix", False)
        ours["silence_missing_targets"] = theirs["silence_missing_targets"] = options.get("silence_missing", False)
    common = {"root": root, **{name: options[name] for name in names}}
    pair = cls(split="train", **common, **ours), cls(split="valid", **common, **theirs)
    for one in pair:  # in an order that does not depend on the file system
        for name in ("tuple_paths", "tracks"):
            if hasattr(one, name):
                getattr(one, name).sort(key=lambda item: str(item["path"] if isinstance(item, dict) else item))
    return pair


class Excerpts:
    """The reference's training data, for an epoch of ours; draws as ours do: see randomness.STREAMS."""

    def __init__(self, dataset, options):
        self.seed, self.augmentations = options["seed"], options.get("source_augmentations", [])
        self.dataset, self.options, self.load_audio = dataset, options, data.load_audio
        if hasattr(dataset, "source_augmentations"):
            dataset.source_augmentations = self.augment

    def sources(self):
        """Names by which what an item draws is drawn, in the reference's order."""
        kind = self.options.get("dataset", "musdb")
        if kind == "musdb":
            return list(self.dataset.mus.setup["sources"])
        if kind == "aligned":
            return ["pair"]
        if kind == "sourcefolder":
            return self.dataset.source_folders
        return ["target", *(self.dataset.interferer_files if kind == "trackfolder_fix" else ["interferers"])]

    def item(self, epoch, index):
        self.key = {"seed": self.seed, "epoch": epoch, "index": index}
        self.drawing, self.has_chosen = iter(self.sources()), False
        with mock.patch.object(data, "random", self), mock.patch.object(data, "load_audio", self.load):
            return self.dataset[index]

    def begin(self):
        self.key["source"] = next(self.drawing)
        self.draw = randomness.random_stream("draw", **self.key)

    def choice(self, tracks):
        self.begin()
        self.has_chosen = True
        return tracks[self.draw.integers(len(tracks))]

    def uniform(self, start, stop):
        if not self.has_chosen:  # the track is that of the item
            self.begin()
        self.has_chosen = False
        # where openunmix rounds down, it is not to meet a float that is less than a whole number
        return (round(self.draw.uniform(start, round(stop * RATE))) + self.within_a_sample()) / RATE

    def within_a_sample(self):
        return 0 if "dataset" not in self.options else 0.25

    def load(self, path, **options):
        if self.options["dataset"] != "sourcefolder":
            self.key["source"] = "target" if path.name == self.options.get("target_file") else path.name
        return self.load_audio(path, **options)

    def augment(self, audio):
        for name in self.augmentations:
            number = torch.tensor([randomness.random_stream("augmentation", **self.key, name=name).random()])
            with (
                mock.patch.object(torch, "rand", lambda _, number=number: number),
                mock.patch.object(torch.Tensor, "uniform_", lambda _, number=number: number),
            ):
                audio = getattr(data, f"_augment_{name}")(audio)
        return audio

    def epoch(self, epoch, batch_size):
        order = randomness.random_stream("order", seed=self.seed, epoch=epoch).permutation(len(self.dataset))
        for start in range(0, len(order), batch_size):
            items = [self.item(epoch, index) for index in order[start : start + batch_size]]
            yield [torch.stack(audio) for audio in zip(*items)]


def folder_statistics(dataset, options):
    """The function get_statistics of scripts/train.py; without augmentations, as it means to be."""
    found = copy.copy(dataset)
    found.random_chunks = found.random_track_mix = found.random_interferer_mix = False
    if not isinstance(found, data.SourceFolderDataset):
        found.seq_duration = None
    excerpts = Excerpts(found, {**options, "source_augmentations": []})
    encoder = torch.nn.Sequential(
        transforms.make_filterbanks(options["nfft"], options["nhop"])[0], model.ComplexNorm()
    ).double()
    scaler = StandardScaler()
    for index in range(len(found)):
        mixture, _ = excerpts.item(0, index)
        scaler.partial_fit(encoder(mixture[None].double()).mean(1)[0].T.numpy())
    return {"mean": scaler.mean_, "std": floored(scaler.scale_)}


def train(root, network, options):
    """The functions train, valid and main of scripts/train.py.

    Returns:
        excerpts of the first epoch, losses and learning rates of every one, and the network's state after the best
    """
    train_dataset, valid_dataset = datasets(root, options)
    excerpts = Excerpts(train_dataset, options)
    encoder = torch.nn.Sequential(
        transforms.make_filterbanks(options["nfft"], options["nhop"])[0],
        model.ComplexNorm(mono=options["nb_channels"] == 1),
    ).double()
    drawn = [excerpts.item(1, index) for index in range(len(train_dataset))]
    drawn = np.stack([[audio[:, ::SPARSE].numpy() for audio in item] for item in drawn])
    optimizer = torch.optim.Adam(network.parameters(), lr=options["lr"], weight_decay=options["weight_decay"])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=options["lr_decay_gamma"], patience=options["lr_decay_patience"], cooldown=10
    )
    results = {"train_loss_history": [], "valid_loss_history": [], "lr_history": []}
    for epoch in range(1, options["epochs"] + 1):
        results["lr_history"].append(optimizer.param_groups[0]["lr"])
        losses = utils.AverageMeter()
        network.train()
        for x, y in excerpts.epoch(epoch, options["batch_size"]):
            optimizer.zero_grad()
            Y_hat, Y = network(encoder(x.double())), encoder(y.double())
            loss = torch.nn.functional.mse_loss(Y_hat, Y)
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), Y.size(1))
        results["train_loss_history"].append(losses.avg)

        losses = utils.AverageMeter()
        network.eval()
        with torch.no_grad():
            for x, y in map(valid_dataset.__getitem__, range(len(valid_dataset))):
                Y_hat, Y = network(encoder(x[None].double())), encoder(y[None].double())
                losses.update(torch.nn.functional.mse_loss(Y_hat, Y).item(), Y.size(1))
        results["valid_loss_history"].append(losses.avg)
        scheduler.step(losses.avg)
        if losses.avg == min(results["valid_loss_history"]):
            best = {name: tensor.float() if tensor.ndim else tensor for name, tensor in network.state_dict().items()}
    return {"excerpts": drawn, **results, **arrays("best", best)}


def make_recipe(seed, options, times):
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as root:
        if "dataset" in options:
            root = write_layout(root, options["dataset"], times)
            found = folder_statistics(datasets(root, options)[0], options)
        else:
            write_songs(root, times)
            found = statistics(root, options["nfft"], options["nhop"])
        network = model.OpenUnmix(
            nb_bins=options["nfft"] // 2 + 1,
            nb_channels=options["nb_channels"],
            hidden_size=options["hidden_size"],
            nb_layers=1,
            unidirectional=options["unidirectional"],
            input_mean=found["mean"],
            input_scale=found["std"],
            max_bin=utils.bandwidth_to_max_bin(RATE, options["nfft"], 16000),
        )
        make_used(network, torch.Generator().manual_seed(seed))
        content = {"options": json.dumps(options), "times": times, **arrays("initial", network.state_dict())}
        content.update({f"statistics/{name}": found[name] for name in ("mean", "std")})
        return {**content, **train(root, network.double(), options)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--live", action="store_true", help="longer songs and larger networks")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    sizes, times = (LIVE, LIVE_TIMES) if args.live else (GOLDEN, 1)
    for seed, (name, options) in enumerate(CASES.items()):
        content = make_recipe(seed, {**(FOLDERS if "dataset" in options else COMMON), **sizes, **options}, times)
        np.savez_compressed(args.out_dir / f"{'' if args.live else 'golden_'}recipe_{name}.npz", **content)


if __name__ == "__main__":
    main()
