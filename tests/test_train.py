"""The training script, run as a user runs it, on small songs and a tiny network."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import soundfile
from trainings import TINY, assert_same_state, differs, run, state, without_times

import args
import checkpoint
import data
import kernels.threads
import pretrained
import train
import trained
import weights
from datasets import batches


@pytest.fixture(scope="module")
def base(songs, tmp_path_factory):
    """The run that all others are compared with: one epoch."""
    output = tmp_path_factory.mktemp("base")
    return output, run(songs, output)


# ------------------------------------------------------------------------------ what it writes


def test_training_learns_and_writes_its_files(songs, tmp_path):
    log = run(songs, tmp_path, "--epochs", "6", "--lr", "0.01")
    assert log["valid_loss_history"][-1] < 0.8 * log["valid_loss_history"][0]
    assert log["best_loss"] == min(log["valid_loss_history"]) == log["valid_loss_history"][log["best_epoch"] - 1]
    assert log["epochs_trained"] == len(log["train_time_history"]) == 6
    assert log["versions"]["nnabla"] == "1.39.0"
    names = {path.name for path in tmp_path.iterdir()}
    checkpoints = {"bass.checkpoint.npz", "bass.checkpoint.before.npz"}
    assert names == {"bass.h5", "bass.json", "bass.png", "separator.json", "monitor"} | checkpoints
    config = json.loads((tmp_path / "separator.json").read_text())
    assert config == {"nfft": 1024, "nhop": 512, "sample_rate": 44100, "nb_channels": 2, "targets": ["bass"]}
    series = (tmp_path / "monitor" / "bass" / "validation-loss.series.txt").read_text().split("\n")[:-1]
    np.testing.assert_allclose([float(line.split()[1]) for line in series], log["valid_loss_history"], rtol=1e-5)
    assert (tmp_path / "bass.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_weights_are_those_of_the_best_epoch(songs, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 4.0])
    seen = []

    def validate(model, *_):
        seen.append(model.get_parameters())
        return next(losses)

    monkeypatch.setattr(train, "validate", validate)
    log = run(songs, tmp_path, "--epochs", "3")
    assert log["best_epoch"] == 2
    saved = weights.load(tmp_path / "bass.h5")
    assert not differs(seen[1], saved) and differs(seen[2], saved)


def test_averages_are_validated_and_saved_and_training_goes_on_without(songs, tmp_path, monkeypatch):
    """Of all arrays, running statistics too, after every step: compared with their formula in double precision."""
    decay, steps, seen = 0.8, [], []
    train_step, validate = train.train_step, train.validate

    def step_and_look(*arguments):
        loss = train_step(*arguments)
        steps.append(models[0].get_parameters())
        return loss

    def look_and_validate(model, *arguments):
        seen.append(model.get_parameters())
        return validate(model, *arguments)

    class Model(train.Model):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            models.append(self)

    monkeypatch.setattr(train, "train_step", step_and_look)
    monkeypatch.setattr(train, "validate", look_and_validate)
    monkeypatch.setattr(train, "Model", Model)
    models = []
    run(songs, tmp_path / "without", "--epochs", "2")
    models, without, _ = [], steps.copy(), steps.clear()
    log = run(songs, tmp_path / "with", "--epochs", "2", "--ema", str(decay))
    assert log["args"]["ema"] == decay
    assert all(not differs(a, b) for a, b in zip(without, steps)) and len(steps) == len(without)
    for end, parameters in zip((len(steps) // 2, len(steps)), seen[2:]):
        for name, value in parameters.items():
            powers = decay ** np.arange(end - 1, -1, -1.0)
            expected = np.average([np.float64(step[name]) for step in steps[:end]], axis=0, weights=powers)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert any(name.endswith("bn/var") for name in parameters)
    assert not differs(seen[1 + log["best_epoch"]], weights.load(tmp_path / "with" / "bass.h5"))
    found = state(tmp_path / "with")
    assert not differs({f"parameters/{name}": value for name, value in steps[-1].items()}, found)
    assert not differs({f"average/{name}": value for name, value in seen[-1].items()}, found)


def test_several_targets_share_a_folder(songs, tmp_path):
    run(songs, tmp_path, "--target", "bass")
    run(songs, tmp_path, "--target", "accompaniment")
    assert json.loads((tmp_path / "separator.json").read_text())["targets"] == ["accompaniment", "bass"]
    with pytest.raises(SystemExit):  # one separator has one STFT
        run(songs, tmp_path, "--target", "vocals", "--nfft", "512")


def test_a_target_is_listed_when_it_has_weights(songs, tmp_path, monkeypatch):
    """An interruption in the first epoch of another target leaves the finished one's folder as it was."""
    run(songs, tmp_path)
    before = (tmp_path / "separator.json").read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", interrupt)
    with pytest.raises(SystemExit):
        run(songs, tmp_path, "--target", "drums")
    assert (tmp_path / "separator.json").read_bytes() == before
    assert [model.targets for model in trained.load_models(tmp_path)[0]] == [["bass"]]


def test_options_that_are_given_count_even_if_they_equal_the_default(songs, tmp_path, capsys):
    run(songs, tmp_path, "--lr", "0.01", "--bandwidth", "5000")
    again = ["--checkpoint", tmp_path, "--epochs", "2"]
    model = [option for option in TINY if option not in ("--nfft", "1024", "--nhop", "512", "--hidden-size", "8")]
    for options, message in (
        ([*again, "--lr", "0.001"], "--lr 0.001: "),
        ([*again, "--bandwidth", "16000"], "--bandwidth 16000: "),
        ([*again, "--target", "drums"], "cannot read the checkpoint"),
        (
            ["--checkpoint", tmp_path / "bass.checkpoint.npz", "--epochs", "2", "--target", "drums"],
            "trains bass, not drums",
        ),
        (["--model", tmp_path, "--bandwidth", "16000"], "--bandwidth 16000: "),
        (["--model", tmp_path, "--nhop", "1024"], "--nhop 1024: "),
        (["--model", tmp_path, "--hidden-size", "512"], "--hidden-size 512: "),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main([*model, "--root", str(songs), "--output", str(tmp_path / "o"), *map(str, options)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "o").exists()
    assert run(songs, tmp_path, *again)["lr_history"] == [0.01, 0.01]
    log = run(songs, tmp_path / "fine", "--model", tmp_path, "--bandwidth", "5000")  # it says the same
    assert log["network"]["options"]["max_bin"] == 117 and log["args"]["bandwidth"] == 5000


# --------------------------------------------------------------------------- flags have effects

# A run with these options, and what it must differ in from the base run.
WEIGHTS = {
    "target": ["--target", "linear_mixture"],
    "seq_dur": ["--seq-dur", "0.4"],
    "source_augmentations": ["--source-augmentations"],
    "batch_size": ["--batch-size", "3"],
    "samples_per_track": ["--samples-per-track", "4"],
    "lr": ["--lr", "0.01"],
    "weight_decay": ["--weight-decay", "0.1"],
    "ema": ["--ema", "0.9"],
    "seed": ["--seed", "43"],
    "nfft": ["--nfft", "512", "--nhop", "256"],
    "nhop": ["--nhop", "256"],
    "hidden_size": ["--hidden-size", "6"],
    "bandwidth": ["--bandwidth", "5000"],
    "nb_channels": ["--nb-channels", "1"],
    "unidirectional": ["--unidirectional"],
    "loss": ["--loss", "l1"],
    "plain": ["--plain"],
}
# Those whose effect is tested elsewhere in this file, by the test named, or cannot be.
ELSEWHERE = {
    "help": "argparse's own",
    "epochs": "test_training_learns_and_writes_its_files",
    "root": "test_bad_input",
    "is_wav": "test_bad_input",
    "output": "every test",
    "checkpoint": "tests/test_checkpoint.py",
    "checkpoint_every": "tests/test_checkpoint.py",
    "overwrite": "tests/test_checkpoint.py",
    "model": "test_fine_tuning_starts_from_the_model",
    "context": "test_bad_input",
    "device_id": "cannot be tested without a GPU: it names one of several",
    "quiet": "test_quiet",
    "threads": "test_threads",
    "nb_workers": "test_workers_prepare_batches",
    "patience": "test_schedule",
    "lr_decay_patience": "test_schedule",
    "lr_decay_gamma": "test_schedule",
    "targets": "tests/test_networks.py",
    "mcoef": "tests/test_losses.py",
    "combinations": "tests/test_losses.py",
    "crossing": "tests/test_losses.py",
    "network": "tests/test_networks.py",
    "network_options": "tests/test_networks.py",
    **{option: "tests/test_datasets.py" for option in checkpoint.DATASET + ("manifest", "cache")},
}


def test_every_flag_has_a_test():
    names = {action.dest for action in args.train_parser()._actions}
    assert names == set(WEIGHTS) | set(ELSEWHERE)
    assert all(reason in globals() for reason in ELSEWHERE.values() if reason.startswith("test_"))


@pytest.mark.parametrize("name", WEIGHTS)
def test_flag_changes_the_training(songs, tmp_path, base, name):
    output, _ = base
    log = run(songs, tmp_path, *WEIGHTS[name])
    other = weights.load(tmp_path / f"{log['args']['target']}.h5")
    assert differs(weights.load(output / "bass.h5"), other)
    shapes = weights.describe(other)
    expected = {"nfft": ("nb_bins", 257), "hidden_size": ("hidden_size", 6), "bandwidth": ("max_bin", 117)}
    expected.update(nb_channels=("nb_channels", 1), unidirectional=("unidirectional", True))
    if name in expected:
        key, value = expected[name]
        assert shapes[key] == value


def test_the_same_command_gives_the_same_weights(songs, tmp_path, base):
    log = run(songs, tmp_path)
    assert without_times(log) == without_times(base[1])
    assert_same_state(tmp_path, base[0])


def test_schedule(songs, tmp_path, monkeypatch):
    """On a plateau the learning rate decays, and the training ends."""
    monkeypatch.setattr(train, "validate", lambda *_: 1.0)
    options = ["--epochs", "9", "--lr-decay-patience", "1", "--lr-decay-gamma", "0.5", "--patience", "5"]
    log = run(songs, tmp_path, *options)
    assert log["lr_history"] == [0.001, 0.001, 0.001, 0.0005, 0.0005, 0.0005]
    assert log["best_epoch"] == 1 and log["num_bad_epochs"] == 5


def test_fine_tuning_starts_from_the_model(songs, tmp_path, base, monkeypatch):
    """With a learning rate of nearly nothing, the weights stay; the network's shape comes with them."""
    default = [option for option in TINY if option not in ("--nfft", "1024", "--nhop", "512", "--hidden-size", "8")]
    default += ["--root", str(songs), "--epochs", "1", "--output", str(tmp_path), "--model", str(base[0])]
    train.main([*default, "--lr", "1e-12"])
    before, after = weights.load(base[0] / "bass.h5"), weights.load(tmp_path / "bass.h5")
    moved = {name for name in before if np.abs(before[name] - after[name]).max() > 1e-6}
    assert moved and all(name.endswith(("bn/mean", "bn/var")) for name in moved)
    with pytest.raises(SystemExit):
        train.main([*default, "--hidden-size", "16"])


def test_fine_tuning_of_a_published_model(songs, tmp_path, base, monkeypatch):
    """The file that `pretrained` has fetched, here one of ours, brings the network's shape."""
    config = {"nfft": 1024, "nhop": 512, "sample_rate": 44100, "nb_channels": 2}
    monkeypatch.setitem(pretrained.MODELS, "umx", pretrained.Published("", {}, config))
    monkeypatch.setattr(pretrained, "fetch", lambda name, targets, model_dir, quiet: {"bass": base[0] / "bass.h5"})
    options = [option for option in TINY if option not in ("--nfft", "1024", "--nhop", "512", "--hidden-size", "8")]
    options += ["--root", str(songs), "--epochs", "1", "--output", str(tmp_path), "--model", "umx", "--lr", "1e-12"]
    train.main(options)
    before, after = weights.load(base[0] / "bass.h5"), weights.load(tmp_path / "bass.h5")
    np.testing.assert_allclose(after["fc1/affine/W"], before["fc1/affine/W"], atol=1e-6)


def test_the_best_of_several_seeds_are_a_model(songs, tmp_path, monkeypatch):
    """The lines of docs/training.md that choose it, where a user would run them."""
    monkeypatch.chdir(tmp_path)
    losses = {
        (target, seed): run(songs, Path("runs", seed), "--target", target, "--seed", seed)["best_loss"]
        for target in args.TARGETS
        for seed in "12"
    }
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], {})
    for target in args.TARGETS:
        best = "1" if losses[target, "1"] < losses[target, "2"] else "2"
        assert Path(f"best/{target}.h5").read_bytes() == Path(f"runs/{best}/{target}.h5").read_bytes()
    models, _ = trained.load_models("best")
    assert [model.targets for model in models] == [[target] for target in args.TARGETS]


def test_workers_prepare_batches(songs, tmp_path, base, monkeypatch):
    pools = []

    class Pool(batches.ThreadPoolExecutor):
        def __init__(self, size):
            pools.append(size)
            super().__init__(size)

    monkeypatch.setattr(batches, "ThreadPoolExecutor", Pool)
    run(songs, tmp_path, "--nb-workers", "2")
    assert pools == [2, 2]  # of what trains, of what validates
    assert_same_state(tmp_path, base[0])


def test_threads(songs, tmp_path, base):
    """Bit-identical for the same number of threads, and equal but for rounding for another."""
    run(songs, tmp_path / "one", "--threads", "1")
    assert kernels.threads.get_threads() == 1
    run(songs, tmp_path / "again", "--threads", "1")
    assert_same_state(tmp_path / "one", tmp_path / "again")
    run(songs, tmp_path / "three", "--threads", "3")
    assert kernels.threads.get_threads() == 3
    one, three = state(tmp_path / "one"), state(tmp_path / "three")
    for name in one:
        if "input_mean" not in name:  # whose gradient, and so its moments, are rounding noise
            np.testing.assert_allclose(one[name], three[name], atol=1e-4 * np.abs(one[name]).max(), err_msg=name)


def test_plain_functions_train_alike(songs, tmp_path, base):
    log = run(songs, tmp_path, "--plain")
    for key in ("train_loss_history", "valid_loss_history"):
        np.testing.assert_allclose(log[key], base[1][key], rtol=0.05)  # dropout draws other units


def test_quiet(songs, tmp_path, capsys):
    run(songs, tmp_path)
    assert capsys.readouterr().err == ""
    loud = [option for option in TINY if option != "--quiet"]
    train.main([*loud, "--root", str(songs), "--output", str(tmp_path), "--epochs", "1", "--overwrite"])
    assert "Epochs: 100%" in capsys.readouterr().err


def test_whole_tracks_of_any_length_need_few_graphs(songs, tmp_path, monkeypatch):
    """Each length has a graph of its own, but few are kept."""
    plan, graphs, most = data.MusdbSource.plan, weakref.WeakSet(), []

    def shorter(self, epoch, index):
        return plan(self, epoch, index)._replace(nb_timesteps=20000 + 1000 * epoch + 100 * index)

    class Graph(train.Graph):
        def __init__(self, *arguments, **options):
            graphs.add(self)
            most.append(len(graphs))
            super().__init__(*arguments, **options)

    monkeypatch.setattr(data.MusdbSource, "plan", shorter)
    monkeypatch.setattr(train, "Graph", Graph)
    run(songs, tmp_path, "--seq-dur", "0", "--batch-size", "1", "--samples-per-track", "3")
    assert len(most) == 10 and max(most) <= 3


def test_whole_tracks(songs, tmp_path, base):
    run(songs, tmp_path, "--seq-dur", "0", "--batch-size", "1", "--samples-per-track", "1")
    assert differs(weights.load(base[0] / "bass.h5"), weights.load(tmp_path / "bass.h5"))


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (["--root", "/nowhere"], "has no folder train/"),
        (["--root", "{tmp}"], "has no folder train/"),
        (["--target", "guitar"], "unknown target 'guitar'"),
        (["--seq-dur", "5"], "too short for --seq-dur"),
        (["--seq-dur", "0"], "use --batch-size 1"),
        (["--seq-dur", "0.001"], "shorter than one frame"),
        (["--seq-dur", "1e-9"], "less than a sample"),
        (["--nfft", "1"], "a window is even"),
        (["--nfft", "1023"], "a window is even"),
        (["--nhop", "513"], "at most half of it"),
        (["--checkpoint", ""], "--checkpoint: '' is no name"),
        (["--output", ""], "--output: '' is no name"),
        (["--model", ""], "--model: '' is no name"),
        (["--root", ""], "--root: '' is no name"),
        (["--target", ".."], "cannot name a file"),
        (["--nfft", "1000000"], "shorter than one frame"),
        (["--hidden-size", "7"], "odd"),
        (["--output", "{tmp}/file/below"], "cannot write to the output folder"),
        (["--context", "cudnn"], "--context cudnn does not work here"),
        (["--checkpoint", "{tmp}"], "cannot read the checkpoint"),
        (["--checkpoint", "{tmp}/file"], "cannot read the checkpoint"),
        (["--checkpoint", "{base}", "--epochs", "2", "--lr", "0.1"], "--lr 0.1"),
        (["--model", "{tmp}"], "no weights of the target 'bass'"),
        (["--model", "umxx"], "unknown model 'umxx'"),
        (["--model", "{base}", "--nfft", "512"], "--nfft 512"),
        (["--model", "{base}", "--checkpoint", "{base}"], "give one of them"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--epoch", "3"], "unrecognized arguments"),
        (["--batch-size", "0"], "at least 1"),
        (["--lr", "nan"], "more than 0"),
        (["--ema", "1"], "1 is more than 0.99999"),
        (["--nb-channels", "3"], "invalid choice"),
        (["--source-augmentations", "reverb"], "unknown augmentation 'reverb': there are gain, channelswap"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(songs, tmp_path, base, capsys, options, message):
    """One clear line, exit status 2, and nothing written."""
    (tmp_path / "file").write_text("no folder")
    options = [option.format(tmp=tmp_path, base=base[0]) for option in options]
    with pytest.raises(SystemExit) as stop:
        run(songs, tmp_path / "output", *options)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.h5")) and not list(tmp_path.rglob("*.json"))


def test_mono_tracks_train_a_stereo_network(songs, tmp_path):
    """Alike in both channels, as if the files were so."""
    for path in songs.glob("train/*/*.wav"):
        (tmp_path / path.relative_to(songs)).parent.mkdir(parents=True, exist_ok=True)
        audio, rate = soundfile.read(path)
        soundfile.write(tmp_path / path.relative_to(songs), audio.mean(axis=1), rate)
    log = run(tmp_path, tmp_path / "mono")
    for path in tmp_path.glob("train/*/*.wav"):
        audio, rate = soundfile.read(path, dtype="int16")
        soundfile.write(path, np.stack([audio, audio], axis=1), rate)
    assert run(tmp_path, tmp_path / "stereo")["train_loss_history"] == log["train_loss_history"]
    assert run(tmp_path, tmp_path / "one", "--nb-channels", "1")["epochs_trained"] == 1


def test_the_script_itself_fails_without_a_traceback(tmp_path):
    command = [sys.executable, "train.py", "--root", str(tmp_path), "--context", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(train.__file__).parent)
    assert result.returncode == 2
    assert "has no folder train/" in result.stderr and "Traceback" not in result.stderr


def test_a_network_without_the_memory_for_it_is_one_line(songs, tmp_path):
    """However NNabla, NumPy or our kernels say so."""
    script = "import resource, train; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); train.main()"
    options = ["--root", str(songs), "--output", str(tmp_path / "o"), "--hidden-size", "20000"]
    result = subprocess.run(
        [sys.executable, "-c", script, *TINY, *options], capture_output=True, text=True, cwd=Path(train.__file__).parent
    )
    assert result.returncode == 1 and "not enough memory" in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr
