"""Makes tests/data/golden_recipe_*.npz, for tests/test_recipe.py: trainings by openunmix 1.3.0.

    python make_recipe.py OUT_DIR [--live]

Runs in the environment of make_cases.py, besides ffmpeg. The loop is that of the reference's scripts/train.py, in
double precision: what the reference means, rather than how it rounds. Its dataset class draws the excerpts, but with
the random numbers that our data.py would draw, so that a new randomness.SCHEME needs new files. A file holds the
options, the initial weights (of one LSTM layer: torch's dropout, which is between layers, cannot be had from ours),
losses and learning rates of each epoch, and the weights of the best one. With --live, longer songs, larger networks.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2]))  # of our own modules, only randomness.py

from make_cases import arrays, make_used, statistics
from openunmix import data, model, transforms, utils
from songs import RATE, write_songs

import randomness

COMMON = {"batch_size": 4, "samples_per_track": 3, "seed": 5, "epochs": 3, "lr": 2e-3}
# Decay pulls input_mean with a force of its own: without, its gradient is rounding noise, of which Adam makes steps.
COMMON.update(weight_decay=0.01, lr_decay_patience=0, lr_decay_gamma=0.4)
CASES = {
    "stereo": dict(target="bass", nb_channels=2, unidirectional=False, source_augmentations=["gain", "channelswap"]),
    "mono": dict(target="accompaniment", nb_channels=1, unidirectional=True, source_augmentations=[]),
}
GOLDEN = {"nfft": 512, "nhop": 256, "hidden_size": 8, "seq_dur": 0.25}
# With many weights some have a gradient that is rounding; at a lower rate their random steps are short.
LIVE = {"nfft": 4096, "nhop": 1024, "hidden_size": 64, "seq_dur": 2.0, "lr": 1e-4}
LIVE_TIMES = 6  # as long as the golden songs


class Excerpts:
    """The reference's training data, for an epoch of ours; draws as data.py does: see randomness.STREAMS."""

    def __init__(self, root, seed, target, seq_dur, samples_per_track, source_augmentations):
        self.seed, self.augmentations = seed, source_augmentations
        self.dataset = data.MUSDBDataset(
            target,
            root,
            is_wav=True,
            seq_duration=seq_dur,
            samples_per_track=samples_per_track,
            random_track_mix=True,
            source_augmentations=self.augment,
        )

    def item(self, epoch, index):
        self.key = {"seed": self.seed, "epoch": epoch, "index": index}
        self.sources = iter(self.dataset.mus.setup["sources"])
        with mock.patch.object(data, "random", self):
            return self.dataset[index]

    def choice(self, tracks):
        self.key["source"] = next(self.sources)
        self.draw = randomness.random_stream("draw", **self.key)
        return tracks[self.draw.integers(len(tracks))]

    def uniform(self, start, stop):
        return round(self.draw.uniform(start, round(stop * RATE))) / RATE

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


def train(root, network, options):
    """The functions train, valid and main of scripts/train.py.

    Returns:
        losses and learning rates of every epoch, and the network's state after the best
    """
    names = ("seed", "target", "seq_dur", "samples_per_track", "source_augmentations")
    excerpts = Excerpts(root, **{name: options[name] for name in names})
    valid_dataset = data.MUSDBDataset(
        options["target"], root, is_wav=True, split="valid", seq_duration=None, samples_per_track=1
    )
    encoder = torch.nn.Sequential(
        transforms.make_filterbanks(options["nfft"], options["nhop"])[0],
        model.ComplexNorm(mono=options["nb_channels"] == 1),
    ).double()
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
            for x, y in valid_dataset:
                Y_hat, Y = network(encoder(x[None].double())), encoder(y[None].double())
                losses.update(torch.nn.functional.mse_loss(Y_hat, Y).item(), Y.size(1))
        results["valid_loss_history"].append(losses.avg)
        scheduler.step(losses.avg)
        if losses.avg == min(results["valid_loss_history"]):
            best = {name: tensor.float() if tensor.ndim else tensor for name, tensor in network.state_dict().items()}
    return {**results, **arrays("best", best)}


def make_recipe(seed, options, times):
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as root:
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
        return {**content, **train(root, network.double(), options)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--live", action="store_true", help="longer songs and larger networks")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    sizes, times = (LIVE, LIVE_TIMES) if args.live else (GOLDEN, 1)
    for seed, (name, options) in enumerate(CASES.items()):
        content = make_recipe(seed, {**COMMON, **sizes, **options}, times)
        np.savez_compressed(args.out_dir / f"{'' if args.live else 'golden_'}recipe_{name}.npz", **content)


if __name__ == "__main__":
    main()
