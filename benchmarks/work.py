"""What the sides of the measurements share: the sizes, the audio, a clock, and how they report.

A side is a script that does one piece of work in a process of its own, described by a JSON object as its only
argument, and prints {"result": …, "times": {name: seconds of every repetition}, "peak": bytes, "versions": …}.
"""

import hashlib
import importlib.metadata
import json
import os
import pickle
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

RATE, N_FFT, N_HOP, MAX_BIN, HIDDEN_SIZE = 44100, 4096, 1024, 1487, 512
LR, WEIGHT_DECAY = 1e-3, 1e-5
TARGETS = ["vocals", "drums", "bass", "other"]

# Trainings of all targets: of each step its targets, options of the joint network, and the loss.
JOINT = {
    "separate": (TARGETS[:1], {}, "mse"),
    "side by side": (TARGETS, {"crossing": False}, "mse"),
    "bridges": (TARGETS, {"crossing": True}, "mse"),
    "X-UMX": (TARGETS, {"crossing": True}, "xumx"),
}

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
    """Batches from a folder of songs, drawn by data.py, which knows no network.

    Mixtures (batch_size, 2, nb_timesteps), targets (batch_size, 1, 2, nb_timesteps): there is one target.
    """

    def __init__(self, songs, target, seq_dur, samples_per_track, batch_size, seed):
        from data import DataIterator, MusdbSource

        common = {"target": [target], "root": songs, "is_wav": True, "seed": seed}
        self.train = MusdbSource(
            **common, seq_dur=seq_dur, samples_per_track=samples_per_track, augmentations=["gain", "channelswap"]
        )
        self.valid = MusdbSource(**common, split="valid")
        self.iterator = DataIterator(self.train, batch_size)
        self.shape = (batch_size, 2, self.train.nb_timesteps)

    def epoch(self, number):
        for x, y in self.iterator.epoch(number):
            yield x.data, np.stack([one.data for one in y], axis=1)

    def validation(self):
        """Whole songs, (mixture, target)."""
        return self.valid.items()


class ServedExcerpts:
    """`Excerpts` of our interpreter for torch's, which lacks what they are made with: each when it is asked for.

    Args:
        python: our interpreter
        arguments: as of Excerpts
    """

    def __init__(self, python, **arguments):
        command = [python, __file__, json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def epoch(self, number):
        return self._items(f"epoch {number}")

    def validation(self):
        return self._items("validation")

    def _items(self, request):
        self._ask(request)
        while True:
            self._ask("next")
            if (item := pickle.load(self.process.stdout)) is None:
                return
            yield item

    def _ask(self, request):
        self.process.stdin.write(f"{request}\n".encode())
        self.process.stdin.flush()


def serve(excerpts, requests, answers):
    """Answer what `ServedExcerpts` asks for: an item, or None after the last one."""
    items = iter(())
    for request in requests:
        name, *numbers = request.split()
        if name == "next":
            pickle.dump(next(items, None), answers)
            answers.flush()
        else:
            items = iter(getattr(excerpts, name)(*map(int, numbers)))


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


def read(batches, nb_batches):
    """Receive batches of (mixtures, targets), as fast as they come.

    Returns:
        seconds and, of all processes, CPU seconds per excerpt; CPU seconds of this thread per batch but the first;
        bytes of memory of all processes while the last batch is there; shape and mean square of its mixtures
    """

    def cpu():
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    count, own, begun, start = 0, [], cpu(), time.perf_counter()
    for number, (x, _) in enumerate(batches):
        count, own = count + len(x), [*own[:1], time.thread_time()]
        if number == nb_batches - 1:
            elapsed = time.perf_counter() - start
            memory, shape, level = memory_in_use(), list(x.shape), float((x**2).mean())
    result = {"seconds": elapsed / count, "cpu": (cpu() - begun) / count}
    result["own"] = (own[-1] - own[0]) / max(1, nb_batches - 1)
    return {**result, "memory": memory, "shape": shape, "level": level}


def memory_in_use():
    """Bytes that this process and those that it has started hold; what several share counts once."""
    total, pending = 0, [os.getpid()]
    while pending:
        folder = Path("/proc", str(pending.pop()))
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            pending += [int(pid) for path in folder.glob("task/*/children") for pid in path.read_text().split()]
        except OSError:  # it has ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


class Clock:
    """Durations by name; `wait`, a function without arguments, returns when the device has nothing left to do."""

    def __init__(self):
        self.times, self.wait = {}, lambda: None

    def add(self, name, seconds):
        self.times.setdefault(name, []).append(seconds)

    def __call__(self, name, function, *arguments):
        self.wait()
        start = time.perf_counter()
        result = function(*arguments)
        self.wait()
        self.add(name, time.perf_counter() - start)
        return result


def main(works, packages):
    """Do the work that the command line names; `works` maps names to functions of a clock and options.

    Options may hold `sizes`, for the constants above.
    """
    options, clock = json.loads(sys.argv[1]), Clock()
    globals().update(options.pop("sizes", {}))
    result = works[options.pop("work")](clock, **options)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = max(usage.ru_maxrss for usage in usages) * 1024  # of the largest process
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions = {"Python": platform.python_version(), **versions}
    print(json.dumps({"result": result, "times": clock.times, "peak": peak, "versions": versions}))


if __name__ == "__main__":
    serve(Excerpts(**json.loads(sys.argv[1])), sys.stdin, sys.stdout.buffer)
