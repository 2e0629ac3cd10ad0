"""Nothing of a training is lost: resuming, damage, signals, full disks, several trainings at once."""

import errno
import json
import os
import shutil
import signal
import threading
import zipfile
import zlib
from pathlib import Path

import nnabla as nn
import numpy as np
import pytest
from trainings import NB_STEPS, TINY, assert_same, differs, litter, run, state

import checkpoint
import data
import files
import folders
import outputs
import randomness
import train
import utils
import weights
from utils import UsageError

LAST, BEFORE = "bass.checkpoint.npz", "bass.checkpoint.before.npz"
NETWORKS = {"ours": [], "NNabla's dropout": ["--network", f"{Path(__file__).with_name('networks.py')}:Constant"]}


def train_network(network, songs, output, *options):
    own = [option for option in TINY if option not in ("--hidden-size", "8")] if NETWORKS[network] else TINY
    options = ["--root", songs, "--output", output, "--epochs", "2", *NETWORKS[network], *options]
    train.main([*own, *map(str, options)])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time of a tiny training."""
    monkeypatch.setattr(outputs, "plot_losses", lambda path, log: files.write(path, b"png"))


@pytest.fixture(scope="module", params=NETWORKS)
def whole(request, songs, tmp_path_factory):
    """An uninterrupted training of two epochs: network, folder."""
    output = tmp_path_factory.mktemp("whole")
    train_network(request.param, songs, output)
    return request.param, output


@pytest.fixture(scope="module")
def uninterrupted(songs, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    return output, run(songs, output, "--epochs", "3")


def at_item(monkeypatch, number, action):
    """Do something when an excerpt is read, the first of them 0, or a validation track, of the first epoch 100."""

    fill, counts = data.MusdbSource.fill, {"train": 0, "valid": 100}

    def watched(self, *arguments):
        counts[self.split] += 1
        if counts[self.split] == number + 1:
            action()
        fill(self, *arguments)

    monkeypatch.setattr(data.MusdbSource, "fill", watched)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def ends(status, call, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == status


@pytest.fixture
def line(capsys):
    """The one line that a failure writes."""

    def read():
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    capsys.readouterr()
    return read


# ------------------------------------------------------------------------------------ resuming


def test_a_resumed_run_equals_the_uninterrupted_one(songs, tmp_path, uninterrupted):
    run(songs, tmp_path, "--epochs", "1")
    run(songs, tmp_path, "--epochs", "3", "--checkpoint", tmp_path)
    assert_same(tmp_path, uninterrupted[0])


@pytest.mark.parametrize("item", [5, 9 + 5, 100], ids=["first epoch", "second epoch", "validation"])
def test_averages_are_resumed_bit_for_bit(songs, tmp_path, monkeypatch, item, line):
    run(songs, tmp_path / "whole", "--epochs", "2", "--ema", "0.7")
    at_item(monkeypatch, item, send(signal.SIGTERM))
    ends(143, run, songs, tmp_path / "o", "--epochs", "2", "--ema", "0.7")
    monkeypatch.undo()
    monkeypatch.setattr(outputs, "plot_losses", lambda path, log: files.write(path, b"png"))
    run(songs, tmp_path / "o", "--epochs", "2", "--checkpoint", tmp_path / "o")  # which decay: the checkpoint knows
    assert any(name.startswith("average/") for name in state(tmp_path / "o"))
    assert_same(tmp_path / "o", tmp_path / "whole")


def test_another_decay_is_another_training(songs, tmp_path, uninterrupted, line):
    run(songs, tmp_path, "--ema", "0.7")
    again = ["--epochs", "2", "--checkpoint"]
    for origin, decay, was in ((tmp_path, "0.8", 0.7), (tmp_path, "0", 0.7), (uninterrupted[0], "0.7", 0.0)):
        ends(2, run, songs, tmp_path, *again, origin, "--ema", decay)
        assert f"--ema {float(decay)}: {origin / LAST} was trained with {was}" in line()


def test_checkpoints_of_versions_without_averages_go_on(songs, tmp_path, uninterrupted):
    run(songs, tmp_path, "--epochs", "1")
    resumed = checkpoint.load(tmp_path, "bass")
    assert resumed.state["log"]["args"].pop("ema") == 0
    (tmp_path / LAST).write_bytes(io_bytes(resumed))
    run(songs, tmp_path, "--epochs", "3", "--checkpoint", tmp_path)
    assert_same(tmp_path, uninterrupted[0])


# an item of a step of the first epoch, of the second; a validation track of the first epoch; all with the step or
# track that is finished before the end
@pytest.mark.parametrize(
    "number, status, item, epoch, step",
    [(signal.SIGINT, 130, 1, 1, 1), (signal.SIGTERM, 143, 9 + 5, 2, 2), (signal.SIGTERM, 143, 100, 1, 3)],
)
def test_a_signal_ends_between_two_steps(whole, songs, tmp_path, monkeypatch, line, number, status, item, epoch, step):
    network, expected = whole
    at_item(monkeypatch, item, send(number))
    ends(status, train_network, network, songs, tmp_path)
    assert f"interrupted in epoch {epoch}, step {step}; --checkpoint {tmp_path} continues" in line()
    assert not litter(tmp_path)
    monkeypatch.undo()
    elsewhere = tmp_path / "elsewhere"
    train_network(network, songs, elsewhere, "--checkpoint", tmp_path / LAST, "--nb-workers", "2")
    assert_same(elsewhere, expected)


def test_what_a_validation_draws_is_that_of_its_epoch(songs, tmp_path, monkeypatch, line):
    """Of a network that is not ours, and is random in validation, too."""

    def validate(model, tracks, *_):
        return len(list(tracks)) + nn.random.prng.rand()

    monkeypatch.setattr(train, "validate", validate)
    expected = run(songs, tmp_path / "whole", "--epochs", "2")["valid_loss_history"]
    with monkeypatch.context() as patch:
        at_item(patch, 100, send(signal.SIGTERM))
        ends(143, run, songs, tmp_path / "o", "--epochs", "2")
    assert "interrupted in epoch 1, step 3" in line()
    assert run(songs, tmp_path / "o", "--epochs", "2", "--checkpoint", tmp_path / "o")["valid_loss_history"] == expected


def test_a_training_goes_on_from_each_of_its_checkpoints(whole, songs, tmp_path, monkeypatch):
    """After every step: also from those after all steps of an epoch, before its validation."""
    network, expected = whole
    save, copies = checkpoint.Keeper.save, []

    def save_and_copy(self):
        save(self)
        copies.append(shutil.copytree(tmp_path / "o", tmp_path / str(len(copies))))

    monkeypatch.setattr(checkpoint.Keeper, "save", save_and_copy)
    train_network(network, songs, tmp_path / "o", "--checkpoint-every", "0")
    monkeypatch.undo()
    assert_same(tmp_path / "o", expected)
    assert len(copies) == 2 * (NB_STEPS + 1)
    progress = []
    for folder in copies:
        progress.append(checkpoint.load(folder, "bass").state["progress"])
        shutil.rmtree(folder / "monitor", ignore_errors=True)
        train_network(network, songs, folder, "--checkpoint", folder)
        assert_same(folder, expected)
    places = [(each["epoch"], each["steps"]) for each in progress]
    assert places[:5] == [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1)] and places[-2:] == [(2, 3), (3, 0)]


@pytest.mark.parametrize("minutes, places", [("10", [(1, 3), (2, 0)]), ("0.5", [(1, 2), (1, 3), (2, 0)])])
def test_time_between_checkpoints_within_an_epoch(songs, tmp_path, monkeypatch, minutes, places):
    """With a clock that goes on by 20 s whenever somebody looks: before a step, and after a checkpoint."""
    clock, saved = iter(range(0, 10**6, 20)), []

    def pack(arrays, meta):
        saved.append((meta["progress"]["epoch"], meta["progress"]["steps"]))
        return []

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(checkpoint, "_pack", pack)
    run(songs, tmp_path, "--checkpoint-every", minutes)
    assert saved == places


def test_a_second_signal_ends_at_once(songs, tmp_path, monkeypatch, line):
    steps = []

    def interrupted(*_):
        steps.append(1)
        send(signal.SIGTERM)()
        steps.append(2)
        send(signal.SIGTERM)()
        steps.append(3)

    monkeypatch.setattr(train, "train_step", interrupted)
    ends(143, run, songs, tmp_path)
    assert "terminated" in line() and steps == [1, 2]
    assert not litter(tmp_path) and not list(tmp_path.glob("*.npz"))


def test_a_signal_before_the_first_step_leaves_nothing(songs, tmp_path, monkeypatch, line):
    def interrupted(*_, **options):
        send(signal.SIGINT)()
        raise AssertionError("goes on")

    for name in ("statistics", "load"):
        with monkeypatch.context() as patch:
            patch.setattr(data, name, interrupted)
            ends(130, run, songs, tmp_path / "o")
        assert "interrupted" in line() and not (tmp_path / "o").exists()


def test_a_command_that_is_repeated_after_its_end_says_so(songs, tmp_path, uninterrupted, monkeypatch, capsys):
    """Also if it was killed between the last checkpoint and the files that show it: they are made up for."""
    write, calls = train.write_log, []

    def killed(output, name, log):
        calls.append(log["epochs_trained"])
        if calls[-1] == 3:
            raise OSError("killed")
        write(output, name, log)

    monkeypatch.setattr(train, "write_log", killed)
    ends(1, run, songs, tmp_path, "--epochs", "3")
    assert calls == [1, 2, 3]
    monkeypatch.undo()
    (tmp_path / "bass.png").unlink()
    for _ in range(2):
        capsys.readouterr()
        run(songs, tmp_path, "--epochs", "3", "--checkpoint", tmp_path)
        assert "3 epochs: nothing is left to train" in capsys.readouterr().out
        assert_same(tmp_path, uninterrupted[0])
        assert (tmp_path / "bass.png").exists()


def test_early_stopping_is_an_end(songs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "validate", lambda *_: 1.0)
    options = ["--epochs", "9", "--patience", "2"]
    assert run(songs, tmp_path, *options)["epochs_trained"] == 3
    before = state(tmp_path)
    assert run(songs, tmp_path, *options, "--checkpoint", tmp_path)["epochs_trained"] == 3
    assert not differs(before, state(tmp_path))
    assert "--patience decides" in capsys.readouterr().out
    assert run(songs, tmp_path, "--epochs", "9", "--patience", "4", "--checkpoint", tmp_path)["epochs_trained"] == 5


def test_resuming_brings_the_best_weights_whole_or_not_at_all(songs, tmp_path, uninterrupted, monkeypatch, line):
    options = ["--epochs", "3", "--checkpoint", uninterrupted[0]]
    with monkeypatch.context() as patch:
        full_disk(patch, 1)
        ends(1, run, songs, tmp_path / "new", *options)
    assert not list((tmp_path / "new").rglob("*"))
    run(songs, tmp_path / "new", *options)
    assert (tmp_path / "new" / "bass.h5").read_bytes() == (uninterrupted[0] / "bass.h5").read_bytes()
    assert json.loads((tmp_path / "new" / "separator.json").read_text())["targets"] == ["bass"]

    # never over, nor beside, the weights of another training
    run(songs, tmp_path / "other", "--seed", "43")
    other = (tmp_path / "other" / "bass.h5").read_bytes()
    line()
    ends(2, run, songs, tmp_path / "other", *options)
    assert "is of another training" in line()
    assert (tmp_path / "other" / "bass.h5").read_bytes() == other

    (tmp_path / "other" / "bass.h5").unlink()
    ends(2, run, songs, tmp_path / "newer", "--epochs", "4", "--checkpoint", tmp_path / "other")
    assert "the best weights so far" in line()


# ------------------------------------------------------------------- failures while it is at work


def full_disk(monkeypatch, number):
    """The `number`-th file that is written, and all after it, find no space. Returns the streams into the files."""
    write, streams = files._Checked._write, []

    def write_or_fail(self, view, start):
        if self not in streams:
            streams.append(self)
        if len(streams) < number:
            return write(self, view, start)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files._Checked, "_write", write_or_fail)
    return streams


def test_a_full_disk(songs, tmp_path, monkeypatch, line):
    """At each file that a resumed training writes: one line that names it, and what was there goes on."""
    falling = ["--lr", "0.01"]  # losses: there are new best weights
    run(songs, tmp_path / "begun", *falling)
    run(songs, tmp_path / "expected", *falling, "--epochs", "2")
    number, names = 0, []
    while True:
        number += 1
        output = shutil.copytree(tmp_path / "begun", tmp_path / str(number))
        kept = contents(output)
        with monkeypatch.context() as patch:
            streams = full_disk(patch, number)
            try:
                run(songs, output, "--epochs", "2", "--checkpoint", output)
                break
            except SystemExit as stop:
                assert stop.code == 1
        error = line()
        assert "No space left on device" in error and len(streams) == number
        names.append(error.split(": ")[1].rpartition("/")[2])
        assert not litter(output)
        if names[-1] in (LAST, "bass.h5"):
            assert contents(output)[output / names[-1]] == kept[output / names[-1]]
            run(songs, output, "--epochs", "2", "--checkpoint", output)
            assert_same(output, tmp_path / "expected")
    assert {LAST, "bass.h5", "bass.json", "bass.png", "separator.json", "training-loss.series.txt"} == {*names} - {
        "validation-loss.series.txt"
    }


@pytest.mark.parametrize("item", [4, 9 + 5, 101])
def test_a_data_file_that_fails(songs, tmp_path, uninterrupted, monkeypatch, line, item):
    """What was done until then is kept."""

    def fail():
        raise OSError(errno.EIO, "Input/output error", "bass.wav")

    at_item(monkeypatch, item, fail)
    ends(1, run, songs, tmp_path, "--epochs", "3")
    assert line().endswith("bass.wav: Input/output error\n")
    monkeypatch.undo()
    progress = checkpoint.load(tmp_path, "bass").state["progress"]
    assert (progress["epoch"], progress["steps"]) == {4: (1, 1), 14: (2, 1), 101: (2, 3)}[item]
    run(songs, tmp_path, "--epochs", "3", "--checkpoint", tmp_path)
    assert_same(tmp_path, uninterrupted[0])


def test_a_training_that_diverges_keeps_its_checkpoint(songs, tmp_path, line):
    run(songs, tmp_path)
    before = (tmp_path / LAST).read_bytes()
    resumed = checkpoint.load(tmp_path, "bass")
    resumed.state["scheduler"]["lr"] = 1e25
    content = io_bytes(resumed)
    (tmp_path / LAST).write_bytes(content)
    ends(1, run, songs, tmp_path, "--epochs", "2", "--checkpoint", tmp_path, "--checkpoint-every", "0")
    assert "try a smaller --lr" in line()
    assert np.isfinite(state(tmp_path)["parameters/fc1/affine/W"]).all() and before


@pytest.mark.parametrize("ending", ["the epoch", "a signal", "a checkpoint", "time", "an error"])
def test_the_first_loss_that_is_no_number_is_named_whenever_it_is_read(songs, tmp_path, monkeypatch, line, ending):
    """It may be read steps later, but before anything is saved."""
    step, losses, options = train.train_step, [], ["--checkpoint-every", "0"] if ending == "a checkpoint" else []

    def diverges(graph, *arguments):
        loss = step(graph, *arguments)
        losses.append(loss)
        if len(losses) in (NB_STEPS + 2, NB_STEPS + 3):
            loss.data = {NB_STEPS + 2: np.inf, NB_STEPS + 3: np.nan}[len(losses)]
        return loss

    if ending == "a signal":
        at_item(monkeypatch, 9 + 8, send(signal.SIGTERM))
    if ending == "an error":  # the reason of the end is the first one
        fill = data.MusdbSource.fill
        monkeypatch.setattr(data.MusdbSource, "fill", lambda *all: 1 / (len(losses) < NB_STEPS + 2) and fill(*all))
    monkeypatch.setattr(utils.Losses, "EVERY", 0.0 if ending == "time" else 1000.0)
    monkeypatch.setattr(train, "train_step", diverges)
    if ending == "an error":
        with pytest.raises(ZeroDivisionError):
            run(songs, tmp_path, "--epochs", "3", *options)
    elif ending == "a signal":
        ends(143, run, songs, tmp_path, "--epochs", "3", *options)
    else:
        ends(1, run, songs, tmp_path, "--epochs", "3", *options)
        assert "the loss of epoch 2, step 2 is inf: try a smaller --lr" in line()
        assert len(losses) == NB_STEPS + {"a checkpoint": 2, "time": 2}.get(ending, 3)
    last = checkpoint.load(tmp_path, "bass").state
    assert last["log"]["epochs_trained"] == 1 and last["progress"]["steps"] == (ending == "a checkpoint")


@pytest.mark.parametrize("what", ["a parameter", "a moment"])
def test_numbers_that_are_not_finite_are_not_saved(songs, tmp_path, monkeypatch, line, what):
    """They come of gradients that are not, of a loss that still is."""
    step = train.train_step

    def diverges(graph, x, y, solver, *rest):
        loss = step(graph, x, y, solver, *rest)
        if what == "a moment":
            next(iter(solver.moments().values()))[...] = np.inf
        else:
            next(iter(solver.parameters.values())).d = np.nan
        return loss

    monkeypatch.setattr(train, "train_step", diverges)
    ends(1, run, songs, tmp_path, "--checkpoint-every", "0")
    assert "is not finite after 1 steps: try a smaller --lr" in line() and not list(tmp_path.rglob("*.npz"))


def io_bytes(resumed):
    arrays = {f"parameters/{name}": value for name, value in resumed.parameters.items()}
    arrays.update({f"solver/{name}": value for name, value in resumed.solver.items()})
    return b"".join(checkpoint._pack(arrays, resumed.state))


# ------------------------------------------------------------------------- what a checkpoint must be


SMALL = ["--hidden-size", "2", "--nfft", "64", "--nhop", "32"]


@pytest.fixture(scope="module")
def small(songs, tmp_path_factory):
    """A folder with a training of the smallest network."""
    output = tmp_path_factory.mktemp("small")
    run(songs, output, *SMALL)
    return output


def test_every_flipped_bit_is_named(small, tmp_path):
    """In the arrays, in the directory of the archive, in the checksum; and each truncation."""
    path, content = tmp_path / LAST, (small / LAST).read_bytes()
    path.write_bytes(content)
    assert checkpoint.load(path, "bass").path == path
    rng = np.random.default_rng(0)
    places = [*rng.integers(len(content), size=500), *range(100), *range(len(content) - 100, len(content))]
    damaged = [content[:k] + bytes([content[k] ^ 1 << rng.integers(8)]) + content[k + 1 :] for k in places]
    damaged += [content[:k] for k in (*rng.integers(len(content), size=100), *range(100), len(content) - 1)]
    damaged += [content + b"\0", b"\0" + content, content * 2, content[:-32]]
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(UsageError, match="cannot read the checkpoint .*bass.checkpoint.npz: it is damaged"):
            checkpoint.load(path, "bass")


def without_checksum(content):
    return content[:-6] + b"\0\0"


def test_a_checkpoint_without_a_checksum_is_read(small, songs, tmp_path, capsys):
    shutil.copytree(small, tmp_path / "o")
    path, content = tmp_path / "o" / LAST, without_checksum((small / LAST).read_bytes())
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == b"" and archive.testzip() is None
    log = run(
        songs, tmp_path / "o", "--checkpoint", tmp_path / "o", "--hidden-size", "2", "--nfft", "64", "--nhop", "32"
    )
    assert log["epochs_trained"] == 1

    # whatever is flipped: either it is found, or it is nothing that is read
    expected, rng = checkpoint.load(path, "bass"), np.random.default_rng(0)
    (tmp_path / "o" / BEFORE).unlink()
    refused = 0
    for k in rng.integers(len(content), size=300):
        path.write_bytes(content[:k] + bytes([content[k] ^ 1 << rng.integers(8)]) + content[k + 1 :])
        try:
            found = checkpoint.load(path, "bass")
        except UsageError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert found.state == expected.state and found.parameters.keys() == expected.parameters.keys()
            assert not differs(expected.parameters, found.parameters) and not differs(expected.solver, found.solver)
    assert refused > 200


def test_the_checksum_is_the_crc_of_all_before(small):
    content = (small / LAST).read_bytes()
    assert zlib.crc32(content[:-4]) == int.from_bytes(content[-4:], "little")


def change(arrays, meta, *path, to):
    """Set what lies at a path within meta; `to` None deletes it."""
    for key in path[:-1]:
        meta = meta[key]
    if to is None:
        del meta[path[-1]]
    else:
        meta[path[-1]] = to


def averages(arrays):
    return {name.replace("parameters/", "average/", 1): value for name, value in arrays.items() if name.startswith("p")}


def averaged(arrays, meta):
    """As if --ema had been given."""
    arrays.update(averages(arrays))
    meta["log"]["args"]["ema"] = 0.9
    return arrays


W, MEAN, AVERAGE = "parameters/fc1/affine/W", "solver/fc1/affine/W/mean", "average/fc1/affine/W"
NAN, INF = float("nan"), float("inf")
WRONG = {
    "no parameter": lambda arrays, meta: arrays.pop(W),
    "another parameter": lambda arrays, meta: arrays.update({"parameters/x": arrays[W]}),
    "shape of a parameter": lambda arrays, meta: arrays.update({W: arrays[W][:-1]}),
    "NaN in a parameter": lambda arrays, meta: arrays.update({W: arrays[W] * np.float32(NAN)}),
    "double precision": lambda arrays, meta: arrays.update({W: arrays[W].astype(np.float64)}),
    "integers": lambda arrays, meta: arrays.update({W: arrays[W].astype(np.int32)}),
    "text": lambda arrays, meta: arrays.update({W: np.array("text")}),
    "averages that were not asked for": lambda arrays, meta: arrays.update(averages(arrays)),
    "no averages": lambda arrays, meta: meta["log"]["args"].update(ema=0.9),
    "an average too few": lambda arrays, meta: averaged(arrays, meta).pop(AVERAGE),
    "an average too many": lambda arrays, meta: averaged(arrays, meta).update({"average/x": arrays[W]}),
    "shape of an average": lambda arrays, meta: averaged(arrays, meta).update({AVERAGE: arrays[W][:-1]}),
    "NaN in an average": lambda arrays, meta: averaged(arrays, meta).update({AVERAGE: arrays[W] * np.float32(NAN)}),
    "a decay of one": lambda arrays, meta: averaged(arrays, meta) and meta["log"]["args"].update(ema=1.0),
    "no moment": lambda arrays, meta: arrays.pop(MEAN),
    "a moment of nothing": lambda arrays, meta: arrays.update({"solver/x/mean": arrays[MEAN]}),
    "a scalar moment": lambda arrays, meta: arrays.update({MEAN: np.float32(0)}),
    "shape of a moment": lambda arrays, meta: arrays.update({MEAN: arrays[MEAN].T}),
    "infinite moment": lambda arrays, meta: arrays.update({MEAN: arrays[MEAN] + np.float32(INF)}),
    "negative variance": lambda arrays, meta: arrays.update(
        {MEAN[:-4] + "var": -1 - arrays[MEAN[:-4] + "var"]},
    ),
    "no step": lambda arrays, meta: arrays.pop("solver/step"),
    "steps": lambda arrays, meta: arrays.update({"solver/step": np.array([1, 2])}),
    "negative step": lambda arrays, meta: arrays.update({"solver/step": np.array(-1)}),
    "half a step": lambda arrays, meta: arrays.update({"solver/step": np.array(0.5)}),
    "another group": lambda arrays, meta: arrays.update({"x/y": arrays[W]}),
    "a name without a group": lambda arrays, meta: arrays.update({"x": arrays[W]}),
    "statistics of another name": lambda arrays, meta: arrays.update({"statistics/x": np.zeros(33, np.float32)}),
    "statistics of another length": lambda arrays, meta: arrays.update(
        {"statistics/input_mean": np.zeros(3, np.float32)},
    ),
    **{
        f"{'/'.join(path)} is {to!r}": lambda arrays, meta, path=path, to=to: change(arrays, meta, *path, to=to)
        for paths, values in (
            ([("log",)], [None, [], "", 1]),
            ([("scheduler",), ("stopping",), ("progress",), ("log", "args"), ("log", "network")], [None, [], 1]),
            ([("log", f"{kind}_history") for kind in ("lr", "train_loss")], [None, [], {}, [NAN], ["1"], [1, 1]]),
            ([("log", "valid_loss_history"), ("log", "train_time_history")], [None, {}, [NAN], [INF], [None]]),
            ([("log", "best_epoch"), ("log", "epochs_trained")], [None, -1, 5, 1.0, True, "1", [1]]),
            ([("log", "best_loss")], [None, NAN, "1", -1]),
            ([("scheduler", "lr"), ("stopping", "best")], [None, NAN, -1, "1", {}]),
            ([("scheduler", "num_bad_epochs"), ("scheduler", "cooldown")], [None, NAN, 0.5, -1, "1"]),
            ([("progress", "epoch"), ("progress", "steps")], [None, NAN, 0.5, -1, "1", 10**20]),
            ([("progress", "loss"), ("progress", "seconds")], [None, NAN, INF, "1"]),
            ([("progress", "steps")], [10]),
            ([("log", "args", "seq_dur"), ("log", "args", "lr")], [None, "1", NAN, INF, {}, True]),
            ([("log", "args", "batch_size"), ("log", "args", "seed")], [None, -1, 1.0, "1", [1]]),
            ([("log", "args", "source_augmentations")], [None, "gain", [1], {"gain": 1}, ["nothing"]]),
            ([("log", "network", "class")], [None, "Other", 1, []]),
            ([("log", "network", "options")], [None, [], {"hidden_size": "2"}, {"x": 1}, {"nb_layers": 0}]),
            ([("log", "network", "options")], [{"hidden_size": 2**40}, {"nb_layers": 2**40}, {"dropout": NAN}]),
            ([("log", "network", "targets")], [None, [], "bass", [1], ["../x"], ["bass", "bass"]]),
            ([("log", "network", "n_fft"), ("log", "network", "n_hop")], [None, 0, 63, "64", 64.0, 2**40]),
            ([("log", "network", "nb_channels"), ("log", "network", "sample_rate")], [None, 0, "2", NAN, 10**400]),
        )
        for path in paths
        for to in values
    },
}


def test_content_that_cannot_be_is_one_line(small, songs, tmp_path, line):
    """With a checksum that is right: status 2, the name of the file."""
    output = shutil.copytree(small, tmp_path / "o")  # where nothing else is wrong
    with np.load(output / LAST) as archive:
        content = dict(archive)
    for name, damage in WRONG.items():
        arrays = dict(content)
        meta = json.loads(str(arrays.pop("meta")))
        damage(arrays, meta)
        (output / LAST).write_bytes(b"".join(checkpoint._pack(arrays, meta)))
        try:
            checkpoint.load(output, "bass")
            run(songs, output, *SMALL, "--epochs", "2", "--checkpoint", output)
        except UsageError as error:
            assert str(error).startswith(f"cannot read the checkpoint {output / LAST}: it is damaged"), name
            assert "\n" not in str(error)
        except SystemExit as stop:
            error = line()
            assert stop.code == 2 and (str(output / LAST) in error or "unknown augmentation" in error), (name, error)
        else:
            raise AssertionError(f"{name} is taken")


@pytest.mark.parametrize("meta", ["[]", "1", "null", "[" * 100000, "", "{", "NaN", '{"log": 1}', '"\\ud800"'])
def test_meta_that_is_no_dict(small, tmp_path, meta):
    with np.load(small / LAST) as archive:
        arrays = {**archive, "meta": np.array(meta)}
    np.savez(tmp_path / LAST, **arrays)
    with pytest.raises(UsageError, match="bass.checkpoint.npz: it is damaged"):
        checkpoint.load(tmp_path, "bass")


def test_files_that_are_no_checkpoints(tmp_path):
    """They neither wait nor fill the memory."""
    path = tmp_path / LAST
    os.mkfifo(path)
    for target in (path, "/dev/zero"):
        with pytest.raises(UsageError, match="not a regular file"):
            checkpoint.load(target, "bass")
    path.unlink()
    with open(path, "wb") as stream:
        stream.truncate(10**11)
    with pytest.raises(UsageError, match="larger than"):
        checkpoint.load(path, "bass")


def test_random_numbers_of_another_scheme_are_not_continued(songs, small, tmp_path, line):
    resumed = checkpoint.load(small, "bass")
    assert resumed.state["log"].pop("randomness") == randomness.SCHEME > 1  # the first scheme did not write it
    (tmp_path / LAST).write_bytes(io_bytes(resumed))
    ends(2, run, songs, tmp_path, "--checkpoint", tmp_path, "--epochs", "2")
    error = line()
    assert "by scheme 1" in error and "--model" in error


def test_the_one_before_the_last_is_kept_and_named(songs, tmp_path, uninterrupted, line):
    run(songs, tmp_path, "--epochs", "2")
    assert checkpoint.load(tmp_path / BEFORE, "bass").state["log"]["epochs_trained"] == 1
    content = (tmp_path / LAST).read_bytes()
    (tmp_path / LAST).write_bytes(content[:1000] + b"x" + content[1001:])
    ends(2, run, songs, tmp_path, "--epochs", "3", "--checkpoint", tmp_path)
    assert f"{LAST}: it is damaged: its checksum differs; the one before it is whole: " in (error := line())
    command = error.rpartition("; the one before it is whole: ")[2].split()
    run(songs, tmp_path, "--epochs", "3", *command)
    assert_same(tmp_path, uninterrupted[0])
    ends_with = checkpoint.load(tmp_path / BEFORE, "bass").state["log"]["epochs_trained"]
    assert ends_with == 2

    for name in (LAST, BEFORE):
        (tmp_path / name).write_bytes(b"x")
    ends(2, run, songs, tmp_path, "--epochs", "3", "--checkpoint", tmp_path)
    assert "the one before" not in line()


def test_what_is_damaged_never_replaces_the_one_before(songs, tmp_path, monkeypatch):
    """A training that goes on from the one before, killed at its first checkpoint, still has that."""
    run(songs, tmp_path, "--epochs", "2")
    (tmp_path / LAST).write_bytes(b"x")
    good = (tmp_path / BEFORE).read_bytes()
    replace = os.replace

    def killed(source, destination):
        if Path(destination).name == LAST:
            raise OSError("killed")
        return replace(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    ends(1, run, songs, tmp_path, "--epochs", "3", "--checkpoint", tmp_path / BEFORE)
    assert (tmp_path / BEFORE).read_bytes() == good


@pytest.mark.parametrize("links", [True, False])
def test_there_is_a_whole_checkpoint_at_every_moment(songs, tmp_path, monkeypatch, links):
    """Seen at every change of the folder, with and without a file system that has hard links."""
    seen = []

    def watch(function):
        def watched(*arguments, **options):
            if function is os.link and not links:
                raise OSError(errno.EPERM, "no links here")
            result = function(*arguments, **options)
            if (tmp_path / LAST).exists() or seen:
                seen.append(checkpoint.load(tmp_path / LAST, "bass").state["progress"])
            return result

        return watched

    for name in ("link", "replace", "unlink"):
        monkeypatch.setattr(os, name, watch(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", watch(Path.unlink))
    run(songs, tmp_path, "--epochs", "2", "--checkpoint-every", "0")
    monkeypatch.undo()
    assert len({(each["epoch"], each["steps"]) for each in seen}) == 2 * (NB_STEPS + 1)
    assert checkpoint.load(tmp_path / BEFORE, "bass").state["progress"]["epoch"] == 2
    assert (tmp_path / LAST).stat().st_ino != (tmp_path / BEFORE).stat().st_ino


# ------------------------------------------------------------------------------ trainings side by side


def test_a_target_is_trained_once_at_a_time(songs, tmp_path, line):
    tmp_path.joinpath("o").mkdir()
    with files.claimed(tmp_path / "o" / ".bass.lock", "training"):
        ends(2, run, songs, tmp_path / "o")
        assert "another process is training bass into" in line()
        run(songs, tmp_path / "o", "--target", "drums")
    assert not litter(tmp_path) and not (tmp_path / "o" / "bass.h5").exists()


def test_the_lock_is_held_until_the_end(songs, tmp_path, monkeypatch):
    held = []
    validate = train.validate

    def look(*arguments):
        with pytest.raises(UsageError, match="another process"), files.claimed(tmp_path / ".bass.lock", "x"):
            pass
        held.append(True)
        return validate(*arguments)

    monkeypatch.setattr(train, "validate", look)
    run(songs, tmp_path)
    assert held and not litter(tmp_path)


def test_targets_that_are_listed_at_once_are_all_listed(tmp_path):
    config = {"nfft": 4096, "nhop": 1024, "sample_rate": 44100, "nb_channels": 2}
    targets = [f"target{k}" for k in range(12)]
    threads = [threading.Thread(target=folders.write_config, args=(tmp_path, config, [target])) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(folders.read_config(tmp_path / folders.CONFIG)["targets"]) == set(targets)


# -------------------------------------------------------------------------------------- starting anew


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_starting_anew_asks(songs, tmp_path, monkeypatch, line):
    run(songs, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(data, "load", None)  # it asks before it reads anything
    ends(2, run, songs, tmp_path, "--seed", "43")
    error = line()
    assert "--overwrite" in error and f"--checkpoint {tmp_path} continues" in error and "another --output" in error
    for name in (LAST, BEFORE):
        (tmp_path / name).unlink()
    ends(2, run, songs, tmp_path, "--model", tmp_path)
    error = line()
    assert "bass.h5" in error and "--overwrite" in error and "--checkpoint" not in error
    assert contents(tmp_path).items() <= before.items()


def test_who_comes_second_asks_once_more(songs, tmp_path, monkeypatch, line):
    """Another training into the same folder was begun, and has ended, while this one read its data."""

    load = data.load

    def load_slowly(**settings):
        found = load(**settings)
        (tmp_path / "bass.h5").write_bytes(b"another's")
        return found

    monkeypatch.setattr(data, "load", load_slowly)
    ends(2, run, songs, tmp_path)
    assert "bass.h5 is there already" in line() and (tmp_path / "bass.h5").read_bytes() == b"another's"


def test_overwriting(songs, tmp_path, monkeypatch, line):
    run(songs, tmp_path, "--epochs", "2")
    run(songs, tmp_path / "expected", "--epochs", "2", "--seed", "43")
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", lambda *_: send(signal.SIGINT)() or send(signal.SIGINT)())
        ends(130, run, songs, tmp_path, "--seed", "43", "--overwrite")
    assert contents(tmp_path) == before

    save = weights.save

    def look(path, *arguments):
        """Whenever weights change: no checkpoint of the earlier training is there."""
        assert checkpoint.load(tmp_path, "bass").state["log"]["args"]["seed"] == 43
        assert (
            not (tmp_path / BEFORE).exists()
            or checkpoint.load(tmp_path / BEFORE, "bass").state["log"]["args"]["seed"] == 43
        )
        save(path, *arguments)

    monkeypatch.setattr(weights, "save", look)
    run(songs, tmp_path, "--epochs", "2", "--seed", "43", "--overwrite")
    assert_same(tmp_path, tmp_path / "expected")


def test_overwriting_that_a_signal_ends_goes_on(songs, tmp_path, monkeypatch, line):
    """In its first epoch, beside the weights of the earlier training."""
    run(songs, tmp_path)
    run(songs, tmp_path / "expected", "--epochs", "2", "--seed", "43")
    with monkeypatch.context() as patch:
        at_item(patch, 5, send(signal.SIGTERM))
        ends(143, run, songs, tmp_path, "--seed", "43", "--overwrite")
    assert "interrupted in epoch 1" in line() and not (tmp_path / BEFORE).exists()
    ends(2, run, songs, tmp_path / "expected", "--checkpoint", tmp_path, "--epochs", "2")
    assert "is of another training" in line()
    run(songs, tmp_path, "--epochs", "2", "--checkpoint", tmp_path)
    assert_same(tmp_path, tmp_path / "expected")


def test_overwriting_and_resuming_exclude_each_other(songs, tmp_path, line):
    ends(2, run, songs, tmp_path, "--overwrite", "--checkpoint", tmp_path)
    assert "give one of them" in line()
