"""What the sides of the measurements share: the sizes, the audio, a clock, and how they report.

A side is a script that does one piece of work in a process of its own, described by a JSON object as its only
argument, and prints {"result": …, "times": {name: seconds of every repetition}, "peak": bytes, "versions": …}.
"""

import hashlib
import importlib.metadata
import json
import platform
import resource
import sys
import time

import numpy as np

RATE, N_FFT, N_HOP, MAX_BIN, HIDDEN_SIZE = 44100, 4096, 1024, 1487, 512
LR, WEIGHT_DECAY = 1e-3, 1e-5
TARGETS = ["vocals", "drums", "bass", "other"]

# The graph functions in the network's order, by function and parameter scope; both sides use these names.
FUNCTIONS = {
    "spectrogram": "STFT and magnitude, of mixture and target",
    "input_affine fc1": "crop, shift, scale, affine",
    "batch_normalization fc1": "batch normalization, tanh",
    "lstm": "three bidirectional layers, dropout",
    "affine fc2": "affine of LSTM and skip connection",
    "batch_normalization fc2": "batch normalization, ReLU",
    "affine fc3": "affine to all bins",
    "mask fc3": "batch normalization, scale, mean, ReLU, times mixture",
    "squared_error": "mean squared error",
    "Adam": "with weight decay",
}


def audio(nb_samples, seconds, seed):
    """Stereo noise (nb_samples, 2, nb_timesteps): how long the work takes does not depend on what is heard."""
    return 0.1 * np.random.default_rng(seed).standard_normal((nb_samples, 2, int(seconds * RATE)), np.float32)


class Excerpts:
    """Batches from a folder of songs, the same in both interpreters: drawn by data.py, which knows no network.

    Mixtures (batch_size, 2, nb_timesteps), targets (batch_size, 1, 2, nb_timesteps): there is one target.
    """

    def __init__(self, songs, target, seq_dur, samples_per_track, batch_size, seed):
        from data import AUGMENTATIONS, DataIterator, MusdbSource

        common = {"target": [target], "root": songs, "is_wav": True, "seed": seed}
        self.train = MusdbSource(
            **common, seq_dur=seq_dur, samples_per_track=samples_per_track, augmentations=AUGMENTATIONS
        )
        self.valid = MusdbSource(**common, split="valid")
        self.epoch = DataIterator(self.train, batch_size).epoch
        self.shape = (batch_size, 2, self.train.nb_timesteps)

    def validation(self):
        """Whole songs, (mixture, target)."""
        return (self.valid.whole_track(track) for track in self.valid.tracks)


def train(clock, excerpts, epochs, step, validate):
    """The loop of both trainings.

    Args:
        step: function of (x, y) that returns the loss; validate: function that returns the validation loss
    Returns:
        the loss of every step, the validation loss of every epoch, and a checksum of all excerpts
    """
    losses, validation, checksum = [], [], hashlib.sha256()
    for epoch in range(1, epochs + 1):
        for x, y in excerpts.epoch(epoch):
            losses.append(clock("step", step, x, y))
            checksum.update(x)
            checksum.update(y)
        validation.append(clock("validation", validate))
    return {"losses": losses, "validation": validation, "excerpts": checksum.hexdigest()}


class Clock:
    """Durations by name."""

    def __init__(self):
        self.times = {}

    def add(self, name, seconds):
        self.times.setdefault(name, []).append(seconds)

    def __call__(self, name, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        self.add(name, time.perf_counter() - start)
        return result


def main(works, packages):
    """Do the work that the command line names; `works` maps names to functions of a clock and options."""
    options, clock = json.loads(sys.argv[1]), Clock()
    result = works[options.pop("work")](clock, **options)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = max(usage.ru_maxrss for usage in usages) * 1024  # of the largest process
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions = {"Python": platform.python_version(), **versions}
    print(json.dumps({"result": result, "times": clock.times, "peak": peak, "versions": versions}))
