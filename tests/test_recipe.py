"""The recipe of train.py against expected values: openunmix 1.3.0's, torch's, those of a formula.

Where random numbers are compared with their distribution, seeds are fixed and p-values are above 0.001.
"""

import itertools
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from formulas import float64_loss, float64_magnitudes
from reference.songs import RATE, SOURCES, SPARSE, write_layout, write_songs
from scipy import stats
from trainings import as_numpy

import args
import data
import train
import weights

GOLDEN = Path(__file__).parent / "data"
LIMIT = 1e-3


def files(kind):
    live = os.environ.get("OPENUNMIX_REFERENCE")
    return sorted(GOLDEN.glob(f"golden_{kind}*.npz")) + (sorted(Path(live).rglob(f"{kind}*.npz")) if live else [])


def flags(options):
    """A command line from a dict of options, by the names that they have in the log."""
    for name, value in options.items():
        if value is not False:
            yield "--" + name.replace("_", "-")
            yield from map(str, value if isinstance(value, list) else [] if value is True else [value])


def run(root, output, **options):
    """Train on the CPU; returns the log."""
    data = "" if "dataset" in options else "--is-wav"
    train.main([*flags(options), *f"--context cpu --quiet {data} --root {root} --output {output}".split()])
    return json.loads((output / f"{options['target']}.json").read_text())


def checkpoint(output, target="bass"):
    with np.load(output / f"{target}.checkpoint.npz") as archive:
        prefix = "parameters/"
        return {name[len(prefix) :]: archive[name] for name in archive.files if name.startswith(prefix)}


# ------------------------------------------------------------------------- a training by openunmix


class Training:
    """One file of tests/reference/make_recipe.py."""

    def __init__(self, path):
        with np.load(path) as archive:
            self.arrays = dict(archive)
        self.options = json.loads(str(self.arrays["options"]))
        self.target = self.options["target"]

    def state(self, prefix):
        prefix += "/"
        state = {name[len(prefix) :]: a for name, a in self.arrays.items() if name.startswith(prefix)}
        return weights.from_torch(state)

    def write_songs(self, folder):
        times = int(self.arrays["times"])
        if "dataset" in self.options:
            return write_layout(folder, self.options["dataset"], times)
        return write_songs(folder, times)

    def write_model(self, folder, sample_rate=RATE):
        """The initial weights as a folder that --model takes."""
        folder.mkdir()
        weights.save(folder / f"{self.target}.h5", self.state("initial"))
        (folder / f"{self.target}.json").write_text(json.dumps({"args": {}}))
        config = {name: self.options[name] for name in ("nfft", "nhop", "nb_channels")}
        config.update(sample_rate=sample_rate, targets=[self.target])
        (folder / "separator.json").write_text(json.dumps(config))
        return folder


NB_STEPS = 9

# What docs/training.md promises of small networks: of full scale, of a bin's deviation, of the loss.
TOLERANCES = {"excerpts": 1e-6, "statistics": 1e-5, "losses": 5e-6}


@pytest.mark.parametrize(
    "path, plain",
    [(path, plain) for path in files("recipe") for plain in (False, True) if path.parent == GOLDEN or not plain],
    ids=lambda value: getattr(value, "stem", "plain" if value is True else "fast"),
)
def test_losses_and_weights_are_those_of_openunmix(path, plain, tmp_path):
    """Three epochs of three batches: excerpts, their order and mixing, loss, Adam, decay, schedule, validation.

    As in test_reference.py, Adam makes full steps of a gradient that is nothing but rounding: among the many weights
    of the larger networks there are some, and losses follow.
    """
    training = Training(path)
    root = training.write_songs(tmp_path / "songs")
    log = run(root, tmp_path, **training.options, model=training.write_model(tmp_path / "initial"), plain=plain)
    np.testing.assert_allclose(log["lr_history"], training.arrays["lr_history"], rtol=1e-9)
    for name in ("train_loss_history", "valid_loss_history"):
        rtol = TOLERANCES["losses"] if path.parent == GOLDEN else 3e-4
        np.testing.assert_allclose(log[name], training.arrays[name], rtol=rtol, err_msg=name)
    saved, expected = weights.load(tmp_path / f"{training.target}.h5"), training.state("best")
    for name in expected:
        error = np.abs(saved[name] - expected[name]) - 1e-5 * np.abs(expected[name])
        assert (error > 5e-5).mean() <= 1e-3, name
        assert error.max() <= 2 * NB_STEPS * training.options["lr"], name


def open_training_set(training, folder):
    """As train.py opens it, of the songs that are written to a folder; and all options."""
    options, given = args.train_parser().parse([*flags(training.options), "--is-wav"])
    settings = {**vars(options), "root": training.write_songs(folder)}
    data.choose_targets(settings, given - {"is_wav"})
    names = ("dataset", "seed", "nb_channels", *data.OPTIONS)
    return data.load(targets=[training.target], **{name: settings[name] for name in names})[0], settings


@pytest.mark.parametrize("path", files("recipe"), ids=lambda path: path.stem)
def test_excerpts_of_every_dataset_are_those_of_openunmix(path, tmp_path):
    """Mixtures and targets of an epoch, for the same random numbers."""
    training = Training(path)
    source, _ = open_training_set(training, tmp_path)
    expected = training.arrays["excerpts"]
    assert len(source) == len(expected) and expected.std() > 0.01
    for index, (mixture, target) in enumerate(expected):
        x, (y,) = (audio[..., ::SPARSE] for audio in source.item(1, index))
        for ours, theirs in ((x, mixture), (y, target)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCES["excerpts"])


@pytest.mark.parametrize("path", files("recipe"), ids=lambda path: path.stem)
def test_statistics_of_every_dataset_are_those_of_openunmix(path, tmp_path):
    """Of mixtures without augmentations, which the reference means to leave out."""
    training = Training(path)
    source, settings = open_training_set(training, tmp_path)
    mean, std = data.statistics(source.mixtures(), settings["nfft"], settings["nhop"])
    expected = training.arrays["statistics/std"]
    unit = np.maximum(expected, 1e-3 * expected.max())  # weaker bins are rounding
    assert np.abs((mean - training.arrays["statistics/mean"]) / unit).max() < TOLERANCES["statistics"]
    assert np.abs((std - expected) / unit).max() < TOLERANCES["statistics"]


def test_the_table_of_what_is_compared_has_every_case():
    """Of docs/training.md: its rows are the golden trainings, its tolerances are those asserted here."""
    text = (GOLDEN.parents[1] / "docs" / "training.md").read_text().partition("### Compared with openunmix")[2]
    table = next(paragraph for paragraph in text.split("\n\n") if paragraph.startswith("|"))
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert header[2:] == list(TOLERANCES)
    cases = {
        path.stem.removeprefix("golden_recipe_"): Training(path) for path in files("recipe") if path.parent == GOLDEN
    }
    assert [row[0].strip("`") for row in rows] == [*cases, "tolerance"]
    for name, _, *differences in rows:
        for differs, tolerance in zip(map(float, differences), TOLERANCES.values()):
            assert differs == tolerance if name == "tolerance" else 0 <= differs <= tolerance
    for (_, options, *_), training in zip(rows, cases.values()):
        assert set(options.strip("`").split()) <= {*flags({"dataset": "musdb", **training.options})}


@pytest.mark.skipif("OPENUNMIX_PYTHON" not in os.environ, reason="made by `make reference`")
@pytest.mark.parametrize("nb_channels", [1, 2])
def test_validation_losses_are_openunmix_s_of_the_exported_weights(nb_channels, tmp_path):
    """Three layers with dropout and batch normalisation, trained, exported, and validated by the reference."""
    root = write_songs(tmp_path / "songs")
    options = {**TINY, "hidden_size": 32, "lr": 0.01, "epochs": 2, "samples_per_track": 4, "nb_channels": nb_channels}
    log = run(root, tmp_path / "ours", **options)
    weights.main([str(tmp_path / "ours"), str(tmp_path / "theirs")])
    songs = [root / "train" / track.name for track in data.MusdbSource("bass", root, "valid", is_wav=True).tracks]
    script = Path(__file__).parent / "reference" / "validate.py"
    command = [os.environ["OPENUNMIX_PYTHON"], script, tmp_path / "theirs", "bass", *songs]
    loss = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(songs) == 2 and loss == pytest.approx(log["best_loss"], rel=1e-5)


def test_defaults_are_the_reference_s():
    """Of openunmix 1.3.0's scripts/train.py; samples per track as of its MUSDBDataset."""
    expected = dict(epochs=1000, batch_size=16, lr=1e-3, patience=140, lr_decay_patience=80, lr_decay_gamma=0.3)
    expected.update(weight_decay=1e-5, seed=42, seq_dur=6.0, nfft=4096, nhop=1024, hidden_size=512, bandwidth=16000)
    expected.update(unidirectional=False, nb_channels=2, samples_per_track=64, target="vocals")
    expected.update(source_augmentations=["gain", "channelswap"])
    defaults = vars(args.train_parser().parse_args([]))
    assert {name: defaults[name] for name in expected} == expected


# --------------------------------------------------------------------------------- a new network

TINY = {"target": "bass", "nfft": 512, "nhop": 256, "hidden_size": 8, "seq_dur": 0.1, "batch_size": 2}
STILL = {"lr": 1e-12, "weight_decay": 0}  # the weights stay as they are


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_songs(tmp_path_factory.mktemp("songs"))


@pytest.fixture(scope="module")
def fresh(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("fresh")
    return output, run(root, output, **TINY, **STILL, samples_per_track=2, epochs=2)


def read_songs(root, split, names):
    """Arrays of one song after the other, (nb_channels, nb_timesteps) float64."""
    for track in data.MusdbSource("bass", root, split, is_wav=True).tracks:
        yield [soundfile.read(root / "train" / track.name / f"{name}.wav")[0].T for name in names]


def test_validation_loss_is_the_mean_over_whole_songs(root, fresh):
    """With their official mixtures, the running statistics, and without dropout, after an epoch's training."""
    output, log = fresh
    songs = list(read_songs(root, "valid", ["mixture", "bass"]))
    assert len({x.shape for x, _ in songs}) == 2, "two songs that differ in length"
    losses = [float64_loss(checkpoint(output), x, y, 512, 256) for x, y in songs]
    assert abs(losses[0] / losses[1] - 1) > 0.01
    assert log["valid_loss_history"][1] == pytest.approx(np.mean(losses), rel=1e-5)
    losses = [float64_loss(weights.load(output / "bass.h5"), x, y, 512, 256) for x, y in songs]
    assert log["best_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_new_network_has_the_statistics_of_the_training_mixtures(root, fresh):
    frames = np.concatenate(
        [float64_magnitudes(x, 512, 256).mean(axis=1) for (x,) in read_songs(root, "train", ["mixture"])]
    )
    max_bin = 1 + int(16000 / (RATE / 512))
    parameters = checkpoint(fresh[0])
    np.testing.assert_allclose(parameters["input_mean"], -frames.mean(axis=0)[:max_bin], rtol=1e-5)
    std = np.maximum(frames.std(axis=0), 1e-4 * frames.std(axis=0).max())
    np.testing.assert_allclose(parameters["input_scale"], 1 / std[:max_bin], rtol=1e-5)


@pytest.fixture(scope="module")
def one_excerpt(tmp_path_factory):
    """A folder with one song to train on, of one excerpt's length: every item of every epoch is the same."""
    root = tmp_path_factory.mktemp("one")
    songs = write_songs(tmp_path_factory.mktemp("songs"))
    for name in ("Noise - First", "Actions - One Minute Smile"):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for path in (songs / "train" / name).glob("*.wav"):
            soundfile.write(folder / path.name, soundfile.read(path)[0][: RATE // 10], RATE)
    return root


def test_dropout_draws_anew_in_every_epoch_and_step(one_excerpt, tmp_path):
    """The same excerpt, the same weights: the training loss tells dropout masks apart."""
    still = {**TINY, **STILL, "batch_size": 1, "source_augmentations": []}
    one = run(one_excerpt, tmp_path / "one", **still, samples_per_track=1, epochs=4)["train_loss_history"]
    two = run(one_excerpt, tmp_path / "two", **still, samples_per_track=2, epochs=4)["train_loss_history"]
    second = 2 * np.array(two) - one  # losses of the epochs' second steps
    losses = np.sort([*one, *second])
    assert np.diff(losses).min() > 1e-5 * losses[0], f"masks repeat themselves: {one}, {second}"

    seeds = [
        run(one_excerpt, tmp_path / str(seed), **still, samples_per_track=1, epochs=1, seed=seed) for seed in (1, 2)
    ]
    assert seeds[0]["train_loss_history"] != seeds[1]["train_loss_history"]


# ------------------------------------------------------------------------- schedule and resuming


@pytest.fixture
def give(monkeypatch):
    """A function that makes given numbers the validation losses of the epochs that follow."""

    def give(losses):
        losses = iter(losses)
        monkeypatch.setattr(train, "validate", lambda *_: float(next(losses)))

    return give


def test_schedule_across_interruptions_is_torch_s(one_excerpt, tmp_path, give):
    """Learning rates and the end, resumed among bad epochs, after a decay, and in the cooldown after it."""
    with np.load(GOLDEN / "golden_helpers.npz") as helpers:
        losses = helpers["losses"]
        lr, factor, patience = schedule = helpers["schedules"][-1]
        rates = [lr, *helpers["learning_rates"][list(map(tuple, helpers["schedules"])).index(tuple(schedule))]]
        stop_patience = int(helpers["patiences"][1])
        stop = 1 + int(np.argmax(helpers["early_stops"][1][:, 1]))
    decays = 1 + np.flatnonzero(np.diff(rates[:stop]))
    assert len(decays) == 2, "two decays before the end"
    give(losses)
    options = {**TINY, "batch_size": 1, "samples_per_track": 1, "hidden_size": 2}
    options.update(lr=lr, lr_decay_gamma=factor, lr_decay_patience=int(patience), patience=stop_patience)
    log = run(one_excerpt, tmp_path, **options, epochs=int(decays[0]) - 1)
    for epochs in (decays[0], decays[0] + 5, decays[1] - 1, decays[1], stop + 5):
        log = run(one_excerpt, tmp_path, **options, epochs=int(epochs), checkpoint=tmp_path)
    np.testing.assert_allclose(log["lr_history"], rates[:stop], rtol=1e-9)
    assert log["best_epoch"] == 1 + np.argmin(losses[:stop])


def test_best_weights_come_along_when_a_training_goes_on_elsewhere(one_excerpt, tmp_path, give):
    options = {**TINY, "batch_size": 1, "samples_per_track": 1}
    give([1.0, 2.0])
    run(one_excerpt, tmp_path / "here", **options, epochs=1)
    run(one_excerpt, tmp_path / "there", **options, epochs=2, checkpoint=tmp_path / "here")
    here, there = (weights.load(tmp_path / place / "bass.h5") for place in ("here", "there"))
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)


def test_a_training_that_diverges_ends_and_keeps_what_it_had(one_excerpt, tmp_path, capsys):
    options = {**TINY, "batch_size": 1, "samples_per_track": 1}
    run(one_excerpt, tmp_path, **options, epochs=1)
    before = {name: (tmp_path / name).read_bytes() for name in ("bass.h5", "bass.json", "bass.checkpoint.npz")}
    with pytest.raises(SystemExit) as stop:
        run(one_excerpt, tmp_path / "nan", **options, epochs=3, lr=1e30)
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and error.count("\n") == 1 and "--lr" in error
    assert not list(tmp_path.glob("nan/*.h5"))
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_a_validation_loss_that_is_no_number_ends_a_training(one_excerpt, tmp_path, capsys, give):
    """It is neither the best nor a bad epoch."""
    give([1.0, float("nan")])
    with pytest.raises(SystemExit) as stop:
        run(one_excerpt, tmp_path, **{**TINY, "batch_size": 1}, samples_per_track=1, epochs=3)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "the validation loss of epoch 2 is nan" in error and error.count("\n") == 1
    assert json.loads((tmp_path / "bass.json").read_text())["epochs_trained"] == 1


def test_a_model_for_another_rate_is_refused(root, tmp_path, capsys):
    training = Training(files("recipe")[0])
    model = training.write_model(tmp_path / "initial", sample_rate=48000)
    with pytest.raises(SystemExit) as stop:
        run(root, tmp_path / "output", **training.options, model=model)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "48000" in error and "44100" in error


# ------------------------------------------------------------------------------ what is drawn


def write_ramps(root, lengths):
    """Songs whose samples tell where they come from: one channel counts, the other is one; see `draws`."""
    for number, length in enumerate(lengths):
        folder = root / "train" / f"Ramp - {number}"
        folder.mkdir(parents=True)
        soundfile.write(folder / "mixture.wav", np.zeros((length, 2)), RATE)
        for kind, source in enumerate(SOURCES):
            counts = 8 * (kind + 1) + number + 0.25 + np.arange(length) / 4096
            samples = np.stack([counts, np.ones(length)], axis=1)
            soundfile.write(folder / f"{source}.wav", samples, RATE, subtype="FLOAT")
    return root


LENGTH = 256  # of an excerpt


def ramps(root, samples_per_track=1, **options):
    options = {"augmentations": ["gain", "channelswap"], "samples_per_track": samples_per_track, **options}
    return data.MusdbSource(SOURCES, root, is_wav=True, seq_dur=LENGTH / RATE, **options)


def draws(source, epoch, indices):
    """Of each item and source: track, start, gain and whether channels are swapped; arrays (nb_items, nb_sources)."""
    rows = []
    for index in indices:
        for kind, excerpt in enumerate(source.item(epoch, index)[1].astype(np.float64)):
            assert excerpt.shape == (2, LENGTH)
            swapped = int(np.ptp(excerpt[0]) == 0)
            gain = excerpt[1 - swapped][0]
            counts = excerpt[swapped] / gain
            np.testing.assert_allclose(excerpt[1 - swapped], gain)
            np.testing.assert_allclose(counts - counts[0], np.arange(LENGTH) / 4096, atol=1e-5)
            track = int(counts[0]) - 8 * (kind + 1)
            rows.append((track, round((counts[0] % 1 - 0.25) * 4096), gain, swapped))
    track, start, gain, swapped = np.array(rows).reshape(-1, len(SOURCES), 4).transpose(2, 0, 1)
    return track.astype(int), start.astype(int), gain, swapped.astype(int)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    lengths = np.array([600, 700, 850, 1000, 1300])
    source = ramps(write_ramps(tmp_path_factory.mktemp("ramps"), lengths), samples_per_track=500)
    tracks, starts, gains, swaps = draws(source, 1, range(len(source)))
    return tracks, starts / (lengths - LENGTH)[tracks], gains, swaps


def assert_independent(a, b):
    """Two columns of few integers each."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    assert stats.chi2_contingency(table).pvalue > LIMIT


def quarters(u):
    return np.minimum((4 * u).astype(int), 3)


def test_every_draw_is_uniform(drawn):
    tracks, starts, gains, swaps = drawn
    assert starts.min() >= 0 and starts.max() <= 1
    assert gains.min() >= 0.25 and gains.max() <= 1.25
    for k in range(len(SOURCES)):
        assert stats.chisquare(np.bincount(tracks[:, k], minlength=5)).pvalue > LIMIT
        assert stats.kstest(starts[:, k], "uniform").pvalue > LIMIT
        assert stats.kstest(gains[:, k], "uniform", (0.25, 1)).pvalue > LIMIT
        assert stats.binomtest(int(swaps[:, k].sum()), len(swaps)).pvalue > LIMIT


def test_draws_of_an_item_are_independent(drawn):
    """Of each other, within and between its sources, and of the item before."""
    tracks, starts, gains, swaps = drawn
    columns = np.concatenate([tracks, quarters(starts), quarters(gains - 0.25), swaps], axis=1).T
    for a, b in itertools.combinations(columns, 2):
        assert_independent(a, b)
    for a in columns:
        assert_independent(a[1:], a[:-1])


def test_draws_of_epochs_and_seeds_are_independent(tmp_path):
    root = write_ramps(tmp_path, [600, 700, 850])
    one, epoch, seed = (
        draws(ramps(root, 300, seed=seed), epoch, range(900)) for seed, epoch in [(7, 1), (7, 2), (8, 1)]
    )
    for a, b in itertools.combinations((one, epoch, seed), 2):
        for k in range(len(SOURCES)):
            assert_independent(a[0][:, k], b[0][:, k])
            assert_independent(a[3][:, k], b[3][:, k])
            assert_independent(quarters(a[2][:, k] - 0.25), quarters(b[2][:, k] - 0.25))


def test_starts_are_the_nearest_sample(tmp_path):
    """Uniform in [0, 4], to the nearest sample: as ffmpeg reads what musdb asks for."""
    root = write_ramps(tmp_path, [LENGTH + 4])
    _, starts, _, _ = draws(ramps(root, 500), 1, range(500))
    expected = np.array([0.125, 0.25, 0.25, 0.25, 0.125])
    assert stats.chisquare(np.bincount(starts.ravel(), minlength=5), starts.size * expected).pvalue > LIMIT


def test_an_excerpt_may_be_the_whole_song(tmp_path):
    _, starts, _, _ = draws(ramps(write_ramps(tmp_path, [LENGTH])), 1, range(1))
    np.testing.assert_array_equal(starts, 0)


class Numbered:
    """A source of data whose items are their own numbers."""

    nb_timesteps = nb_channels = nb_targets = 1

    def __init__(self, length, seed=0):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def fill(self, epoch, index, mixture, targets):
        mixture[:], targets[0][:] = epoch, index


def order(epoch, **options):
    epochs, order = map(np.concatenate, zip(*as_numpy(data.DataIterator(Numbered(**options), 4).epoch(epoch))))
    assert (epochs == epoch).all()
    return order.ravel().astype(int)


def test_order_of_an_epoch_is_a_permutation_of_its_own():
    orders = [order(epoch, length=10, seed=seed) for epoch in range(1, 400) for seed in (0, 1)]
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(10), (len(orders), 1)))
    assert len({tuple(one) for one in orders}) == len(orders)
    for place in np.transpose(orders):
        assert stats.chisquare(np.bincount(place, minlength=10)).pvalue > LIMIT
    assert_independent(np.array(orders)[:, 0], np.array(orders)[:, 1] % 5)
