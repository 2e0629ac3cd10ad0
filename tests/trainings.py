"""Trainings of a tiny network, as a user runs them, and how to compare what they leave."""

import json

import numpy as np

import train

TINY = ["--nfft", "1024", "--nhop", "512", "--hidden-size", "8", "--seq-dur", "0.3", "--batch-size", "4"]
TINY += ["--samples-per-track", "3", "--is-wav", "--context", "cpu", "--quiet", "--target", "bass"]
TINY += ["--nb-workers", "0"]  # so that tests know what is read when
NB_STEPS = 3  # per epoch, of nine excerpts: the last batch is smaller


def run(songs, output, *options):
    """Train; later options win over TINY's. Returns the log."""
    train.main([*TINY, "--root", str(songs), "--output", str(output), "--epochs", "1", *map(str, options)])
    target = options[options.index("--target") + 1] if "--target" in options else "bass"
    return json.loads((output / f"{target}.json").read_text())


def as_numpy(batches):
    """Batches of a DataIterator, as arrays of NumPy: mixtures, and targets (nb_samples, nb_targets, …)."""
    return [(x.data, np.stack([one.data for one in y], axis=1)) for x, y in batches]


def state(output):
    with np.load(output / "bass.checkpoint.npz") as archive:
        return {name: archive[name] for name in archive.files if name != "meta"}


def differs(a, b):
    return any(a[name].shape != b[name].shape or (a[name] != b[name]).any() for name in a)


def without_times(log):
    return {key: value for key, value in log.items() if key not in ("args", "train_time_history")}


def assert_same_state(a, b):
    a, b = state(a), state(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def assert_same(a, b):
    """Two folders hold the same training, but for times: state, weights, losses."""
    assert_same_state(a, b)
    assert (a / "bass.h5").read_bytes() == (b / "bass.h5").read_bytes()
    assert without_times(*logs(a)) == without_times(*logs(b))
    for name in ("training", "validation"):
        series = f"monitor/bass/{name}-loss.series.txt"
        assert (a / series).read_text() == (b / series).read_text()


def logs(output):
    return [json.loads((output / "bass.json").read_text())]


def litter(folder):
    """Files that only a process at work may have."""
    return [path for path in folder.rglob(".*") if path.is_file()]
