"""A network of one's own, in a file anywhere: trained, resumed, fine-tuned, separated with and scored by commands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nnabla as nn
import numpy as np
import pytest
import scipy.signal
import soundfile
from formulas import float64_magnitudes

import evaluate
import folders
import separate
import train
import trained
import weights
from utils import UsageError

FILE = Path(__file__).with_name("networks.py")
TINY = ["--nfft", "1024", "--nhop", "512", "--seq-dur", "0.3", "--batch-size", "4", "--samples-per-track", "3"]
TINY += ["--is-wav", "--context", "cpu", "--quiet", "--threads", "1"]
OPTIONS = {
    "Gru": {"size": 6},
    "Deeper": {"hidden_size": 8, "max_bin": 100},
    "Temporal": {"width": 1},
    "Wave": None,
    "Constant": None,
}


@pytest.fixture
def elsewhere(tmp_path):
    """The file of the networks, in a folder that is not ours."""
    return shutil.copy(FILE, tmp_path / "mine.py")


def network(file, name, options=None):
    return ["--network", f"{file}:{name}", *(["--network-options", json.dumps(options)] if options else [])]


def run(songs, output, *options):
    train.main([*TINY, "--root", str(songs), "--output", str(output), *map(str, options)])
    return next(output.glob("*.json" if "--targets" not in options else "*+*.json"))


def state(folder, name="bass"):
    with np.load(folder / f"{name}.checkpoint.npz") as archive:
        return {key: archive[key] for key in archive.files if key != "meta"}


@pytest.mark.parametrize("name", OPTIONS)
def test_all_commands(songs, tmp_path, elsewhere, name, capsys):
    """Two epochs and a third after resuming are three epochs; other commands need the file, and nothing else."""
    mine = network(elsewhere, name, OPTIONS[name])
    again = network(elsewhere, name)
    run(songs, tmp_path / "a", "--target", "bass", *mine, "--epochs", "2")
    log = json.loads((tmp_path / "a" / "bass.json").read_text())
    assert log["network"]["class"] == f"mine.py:{name}" and log["network"]["options"] == (OPTIONS[name] or {})
    run(songs, tmp_path / "b", "--target", "bass", *mine, "--epochs", "3")
    run(songs, tmp_path / "a", "--target", "bass", *again, "--epochs", "3", "--checkpoint", tmp_path / "a")
    resumed, whole = state(tmp_path / "a"), state(tmp_path / "b")
    assert resumed.keys() == whole.keys()
    for key in whole:
        np.testing.assert_array_equal(resumed[key], whole[key], err_msg=key)
        assert whole[key].any() or not key.startswith("solver/"), f"nothing was learnt: {key}"
    assert (tmp_path / "a" / "bass.h5").read_bytes() == (tmp_path / "b" / "bass.h5").read_bytes()

    # the first validation loss of a fine-tuning that moves nothing is that of the weights it started from
    run(songs, tmp_path / "c", "--target", "bass", *again, "--epochs", "1", "--model", tmp_path / "b", "--lr", "1e-12")
    before, after = (weights.load(tmp_path / folder / "bass.h5") for folder in "bc")
    for key in before.keys() - {key for key in before if "bn/" in key}:
        np.testing.assert_allclose(after[key], before[key], atol=1e-6, err_msg=key)

    capsys.readouterr()
    mixture = next((songs / "test").iterdir()) / "mixture.wav"
    options = ["--model", str(tmp_path / "b"), "--outdir", str(tmp_path / "stems"), "--context", "cpu", "--quiet"]
    separate.main([str(mixture), *options, *again, "--residual", "rest", "--niter", "0"])
    audio, bass, rest = (
        soundfile.read(path)[0]
        for path in (mixture, *(tmp_path / "stems/mixture" / f"{s}.wav" for s in ("bass", "rest")))
    )
    assert audio.shape == bass.shape and np.abs(bass).max() > 0
    np.testing.assert_allclose(bass + rest, audio, atol=1e-5)
    with pytest.raises(SystemExit) as stop:
        separate.main([str(mixture), *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"--network mine.py:{name}" in error and error.count("\n") == 1

    options = ["--root", str(songs), "--is-wav", "--model", str(tmp_path / "b"), "--evaldir", str(tmp_path / "scores")]
    evaluate.main([*options, *again, "--residual", "rest", "--context", "cpu", "--quiet"])
    scores = json.loads((tmp_path / "scores" / "summary.json").read_text())["scores"]
    assert all(np.isfinite(metrics["SDR"]) for group in scores.values() for metrics in group.values())


README = (FILE.parents[1] / "README.md").read_text()


def readme_code(start):
    """The block of code in the README that starts so."""
    return next(
        code for code in re.findall("```python\n(.*?)```", README, re.DOTALL) if code.lstrip().startswith(start)
    )


def test_the_layer_of_the_readme(songs, tmp_path):
    """Put into model.py of a copy: every command goes on with it, and weights of before are refused by name."""
    run(songs, tmp_path / "before", "--target", "bass", "--hidden-size", "8", "--epochs", "1")
    copy = tmp_path / "copy"
    copy.mkdir()
    root = FILE.parents[1]
    for path in root.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("kernels", "datasets"):
        shutil.copytree(root / folder, copy / folder)
    text = (copy / "model.py").read_text()
    last = '        return functions.batch_normalization(h, F.relu, test, name=_name("fc2", target))\n'
    assert text.count(last) == 1
    (copy / "model.py").write_text(text.replace(last, readme_code("h = functions") + last))

    def python(script, *options):
        command = [sys.executable, script, *map(str, options)]
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)

    training = [*TINY, "--root", songs, "--target", "bass", "--output", tmp_path / "a"]
    steps = [
        ("train.py", *training, "--hidden-size", "8", "--epochs", "1"),
        ("train.py", *training, "--checkpoint", tmp_path / "a", "--epochs", "2"),
        ("train.py", *training[:-1], tmp_path / "b", "--model", tmp_path / "a", "--epochs", "1"),
        ("separate.py", next((songs / "test").iterdir()) / "mixture.wav", "--model", tmp_path / "a"),
        ("weights.py", tmp_path / "a" / "bass.h5", tmp_path / "copy.h5"),
    ]
    for step in steps:
        result = python(*step)
        assert result.returncode == 0, result.stderr
    assert "fc2b/affine/W" in weights.load(tmp_path / "copy.h5")
    result = python("separate.py", "song.wav", "--model", tmp_path / "before")
    assert result.returncode == 2 and "missing fc2b/bn/beta" in result.stderr and result.stderr.count("\n") == 1


def test_several_targets_at_once(songs, tmp_path, elsewhere):
    """Trained together, their losses add up; the folder separates each of them."""
    options = ["--targets", "drums", "bass", "--epochs", "1", *network(elsewhere, "Gru")]
    run(songs, tmp_path / "a", *options)
    assert {path.name for path in (tmp_path / "a").glob("*.*")} == {
        *(f"drums+bass.{ending}" for ending in ("h5", "json", "png", "checkpoint.npz", "checkpoint.before.npz")),
        "separator.json",
    }
    run(
        songs, tmp_path / "a", *options[:3], *network(elsewhere, "Gru"), "--checkpoint", tmp_path / "a", "--epochs", "2"
    )
    run(songs, tmp_path / "b", *options, "--epochs", "2")
    resumed, whole = (state(tmp_path / folder, "drums+bass") for folder in "ab")
    assert all((resumed[key] == whole[key]).all() for key in whole)
    audio = 0.1 * np.random.default_rng(0).standard_normal((2, 9000)).astype(np.float32)
    load = {"network": f"{elsewhere}:Gru", "context": "cpu", "niter": 0}
    both = separate.Separator.load(tmp_path / "b", **load)(audio, 44100)
    assert list(both) == ["drums", "bass"]
    alone = separate.Separator.load(tmp_path / "b", "bass", **load)(audio, 44100)
    np.testing.assert_array_equal(alone["bass"], both["bass"])
    with pytest.raises(SystemExit):  # bass is there already
        run(songs, tmp_path / "b", "--target", "bass", "--hidden-size", "8", "--epochs", "1")
    assert not (tmp_path / "b" / "bass.h5").exists()


def test_targets_keep_their_order(songs, tmp_path, elsewhere):
    """Asked for the other way round, a network still learns each target from its own source."""
    mine = network(elsewhere, "Wave")
    run(songs, tmp_path / "a", "--targets", "drums", "bass", "--epochs", "1", *mine)
    options = ["--targets", "bass", "drums", "--epochs", "1", "--lr", "1e-12", *mine, "--model", tmp_path / "a"]
    run(songs, tmp_path / "b", *options)
    before, after = (json.loads((tmp_path / folder / "drums+bass.json").read_text()) for folder in "ab")
    assert after["best_loss"] == pytest.approx(before["best_loss"], rel=1e-5)


def test_our_joint_network_trains_as_one_of_ones_own(songs, tmp_path):
    options = network("model.py", "JointOpenUnmix", {"hidden_size": 8, "max_bin": 100})
    options[1] = f"{Path(train.__file__).with_name('model.py')}:JointOpenUnmix"
    run(songs, tmp_path, "--targets", "vocals", "bass", *options, "--epochs", "1", "--lr", "1e-12")
    params = weights.load(tmp_path / "vocals+bass.h5")
    assert weights.describe(params)["max_bin"] == 100
    # the statistics of the songs, which it takes although only its base names them
    assert params["input_mean_bass"].max() < 0 and params["input_scale_vocals"].std() > 0


def joint_model(targets, seed=0):
    net = trained.JointOpenUnmix(targets, n_fft=256, n_hop=64, hidden_size=8, input_is_spectrogram=True)
    scope = {}
    nn.random.prng = np.random.RandomState(seed)
    with nn.parameter_scope("", scope):
        net(nn.Variable((1, 1, 2, 129)))
        return net, weights.get_parameters(), scope


@pytest.mark.parametrize(
    "targets", [["speech"], ["speech", "noise"], ["a", "b_a", "lstm_a"], [f"s{k}" for k in range(7)]]
)
def test_joint_models_of_any_targets(tmp_path, targets):
    """Described, saved, loaded and separated with, from the weights alone."""
    net, params, scope = joint_model(targets)
    assert list(weights.by_target(params)) == targets
    assert weights.describe(params) == weights.describe(weights.by_target(params)[targets[0]])
    weights.save(tmp_path / "joint.h5", params)
    (tmp_path / "separator.json").write_text(json.dumps({"nhop": 64, "sample_rate": 8000}))
    separator = separate.Separator.load(tmp_path / "joint.h5", context="cpu", niter=0, wiener_win_len=None)
    audio = 0.1 * np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    stems = separator(audio, 8000)
    assert list(stems) == targets
    # the network itself, on the spectrogram of SciPy, with the mixture's phase
    window = scipy.signal.get_window("hann", 256)
    frames = np.pad(audio, ((0, 0), (128, 128)), mode="reflect")
    spectra = np.stack(
        [np.fft.rfft(frames[:, k : k + 256] * window) for k in range(0, frames.shape[1] - 255, 64)]
    )  # (nb_frames, nb_channels, nb_bins)
    with nn.parameter_scope("", scope):
        estimates = net(nn.Variable.from_numpy_array(np.abs(spectra)[:, None]), test=True)
    nn.forward_all(list(estimates.values()))
    for target in targets:
        spectrum = estimates[target].d[:, 0] * np.exp(1j * np.angle(spectra))
        _, expected = scipy.signal.istft(spectrum.transpose(1, 2, 0), 1, window, 256, 192, boundary=True)
        expected /= window.sum()  # SciPy's STFT divides by it
        np.testing.assert_allclose(stems[target][:, 300:3500], expected[:, 300:3500], atol=1e-5)


@pytest.mark.parametrize("targets", [[], ["a", "a"], [""], ["a/b"]])
def test_targets_that_parameters_cannot_carry(targets):
    with pytest.raises(ValueError, match="targets"):
        trained.JointOpenUnmix(targets)


def test_separation_calls_the_network_that_was_trained(songs, tmp_path, elsewhere):
    """A class that changes the call alone is called, not taken apart."""
    options = ["--target", "bass", "--epochs", "1"]
    run(songs, tmp_path / "half", *options, *network(elsewhere, "Changed", {"hidden_size": 8}))
    params = weights.load(tmp_path / "half" / "bass.h5")
    (tmp_path / "whole").mkdir()
    weights.save(tmp_path / "whole" / "bass.h5", params)
    shutil.copy(tmp_path / "half" / "separator.json", tmp_path / "whole")
    audio = 0.1 * np.random.default_rng(0).standard_normal((2, 9000)).astype(np.float32)
    half = separate.Separator.load(tmp_path / "half", network=f"{elsewhere}:Changed", context="cpu")(audio, 44100)
    whole = separate.Separator.load(tmp_path / "whole", context="cpu")(audio, 44100)
    np.testing.assert_allclose(half["bass"], 0.5 * whole["bass"], atol=1e-6)


def test_a_network_without_parameters(songs, tmp_path, elsewhere):
    mine = f"{elsewhere}:Identity"
    weights_file = tmp_path / "bass.h5"
    weights.save(weights_file, {"none": np.zeros(1)})
    with pytest.raises(UsageError, match="unknown none"):
        (tmp_path / "separator.json").write_text(
            json.dumps({"nfft": 256, "nhop": 64, "sample_rate": 8000, "nb_channels": 2})
        )
        separate.Separator.load(weights_file, network=mine, context="cpu")


def test_the_description_travels_with_the_weights(songs, tmp_path, elsewhere):
    """A file alone, without its json, in another folder: class, options, sizes and target come with it."""
    run(songs, tmp_path / "a", "--target", "bass", "--epochs", "1", *network(elsewhere, "Gru", {"size": 5}))
    (tmp_path / "mailed").mkdir()
    shutil.copy(tmp_path / "a" / "bass.h5", tmp_path / "mailed" / "unknown.h5")
    (tmp_path / "mailed" / "separator.json").write_text('{"nhop": 512, "sample_rate": 44100}')
    models, config = trained.load_models(
        tmp_path / "mailed" / "unknown.h5", network=trained.read_network(f"{elsewhere}:Gru")
    )
    assert [model.targets for model in models] == [["bass"]] and models[0].net.size == 5
    assert config == {"nfft": 1024, "nhop": 512, "sample_rate": 44100, "nb_channels": 2}
    nn.load_parameters(str(tmp_path / "a" / "bass.h5"))  # NNabla itself reads the file
    assert nn.get_parameters(grad_only=False).keys() == weights.load(tmp_path / "a" / "bass.h5").keys()


def test_weights_of_nnabla_itself(tmp_path, elsewhere):
    """nn.save_parameters writes no description: separator.json, the class and its options make up for it."""
    cls = trained.read_network(f"{elsewhere}:Gru").cls
    with nn.parameter_scope("", scope := {}):
        cls(["noise"], 2, 8000, 256, 64, size=4)(nn.Variable((9, 1, 2, 129)))
        nn.save_parameters(str(tmp_path / "noise.h5"))
    del scope
    load = {"network": f"{elsewhere}:Gru", "network_options": {"size": 4}, "context": "cpu"}
    with pytest.raises(UsageError, match="no separator.json tells its nfft and nb_channels"):
        separate.Separator.load(tmp_path, **load)
    config = {"nfft": 256, "nhop": 64, "sample_rate": 8000, "nb_channels": 2, "targets": ["noise"]}
    (tmp_path / "separator.json").write_text(json.dumps(config))
    assert list(separate.Separator.load(tmp_path, **load)(np.zeros((2, 900), np.float32), 8000)) == ["noise"]
    with pytest.raises(UsageError, match=r"in/affine/W has shape \(258, 4\), expected \(258, 12\)"):
        separate.Separator.load(tmp_path, network=f"{elsewhere}:Gru", context="cpu")


def test_no_model_folder_makes_us_run_a_file(tmp_path, elsewhere):
    """Not even one whose description names a file that is there."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Trap: pass\n")
    description = {"class": f"{trap}:Trap", "options": {}, "targets": ["bass"], "nb_channels": 2}
    description.update(sample_rate=8000, n_fft=256, n_hop=64)
    weights.save(tmp_path / "bass.h5", {"W": np.ones(3)}, description)
    for model in (tmp_path, tmp_path / "bass.h5"):
        with pytest.raises(UsageError, match="its network is not ours"):
            separate.Separator.load(model, context="cpu")
    assert not (tmp_path / "touched").exists()


BAD = [
    (["--network", "{file}"], "expected FILE.py:CLASS"),
    (["--network", "{tmp}/none.py:Gru"], "there is no file"),
    (["--network", "{file}:Nothing"], "has no class Nothing"),
    (["--network", "{tmp}/syntax.py:Gru"], "syntax.py, line 2: SyntaxError"),
    (["--network", "{tmp}/raises.py:Gru"], "raises.py, line 3: ZeroDivisionError"),
    (["--network", "{file}:Gru", "--network-options", "[1]"], "not a JSON object"),
    (["--network", "{file}:Gru", "--network-options", '{{"depth": 3}}'], "has no option depth: it has size"),
    (["--network", "{file}:Gru", "--network-options", '{{"targets": 3}}'], "has no option targets"),
    (["--network", "{file}:Temporal", "--network-options", '{{"depth": 3}}'], "ValueError: unknown options"),
    (["--network", "{file}:Twice"], "returns Variable: expected a dict"),
    (["--network", "{file}:Broken"], "mine.py, line"),
    (["--network", "{file}:Deeper", "--targets", "bass", "drums"], "estimates one target"),
    (["--network", "{file}:Gru", "--hidden-size", "8"], "--hidden-size is an option of our own network"),
    (["--network-options", '{{"size": 3}}'], "--network-options are for a --network"),
    (["--targets", "bass", "bass"], "named twice"),
    (["--target", "../bass"], "cannot name a file"),
    (["--target", "bass", "--targets", "drums"], "not allowed with"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[" ".join(options)[:60] for options, _ in BAD])
def test_bad_networks(songs, tmp_path, elsewhere, capsys, options, message):
    """One clear line, exit status 2, nothing written."""
    (tmp_path / "syntax.py").write_text("a = 1\ndef def\n")
    (tmp_path / "raises.py").write_text("a = 1\n\nb = a / 0\n")
    options = [option.format(file=elsewhere, tmp=tmp_path) for option in options]
    with pytest.raises(SystemExit) as stop:
        run(songs, tmp_path / "output", "--epochs", "1", *options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("output/*"))


def test_another_network_than_the_trained_one(songs, tmp_path, elsewhere, capsys):
    run(songs, tmp_path / "a", "--target", "bass", "--epochs", "1", *network(elsewhere, "Gru", {"size": 5}))
    run(songs, tmp_path / "own", "--target", "bass", "--epochs", "1", "--hidden-size", "8")
    capsys.readouterr()
    for folder, options, message in (
        ("a", network(elsewhere, "Wave"), "its network is mine.py:Gru, not mine.py:Wave"),
        ("a", network(elsewhere, "Gru", {"size": 6}), "its network has the options {'size': 5}, not {'size': 6}"),
        ("a", [], "name the file of its class again: --network mine.py:Gru"),
        ("own", network(elsewhere, "Gru"), "not of mine.py:Gru"),
    ):
        for again in ("--checkpoint", "--model"):
            with pytest.raises(SystemExit) as stop:
                run(songs, tmp_path / "new", "--target", "bass", again, tmp_path / folder, "--epochs", "2", *options)
            error = capsys.readouterr().err
            assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists()


def test_a_file_beside_the_network_can_be_imported(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("SIZE = 7\n")
    (tmp_path / "mine.py").write_text("from neighbour_of_mine import SIZE\n\n\nclass Mine:\n    size = SIZE\n")
    assert trained.read_network(f"{tmp_path / 'mine.py'}:Mine").cls.size == 7


def test_a_description_that_is_damaged(tmp_path):
    for number, description in enumerate(({}, {"class": 3}, {"targets": ["../x"]}, {"n_fft": -1}, {"n_hop": "4"})):
        whole = {"class": "OpenUnmix", "options": {}, "targets": ["bass"], "nb_channels": 2}
        whole.update(sample_rate=8000, n_fft=256, n_hop=64)
        path = tmp_path / f"{number}.h5"
        weights.save(path, {"W": np.ones(3)}, {**whole, **description} if description else description)
        with pytest.raises(ValueError, match=path.name):
            weights.load(path)
    assert folders.target_of(Path("x/vocals-0123abcd.pth")) == "vocals"


def model_of(network):
    """A Model of this function of its three targets and x."""

    class Mine:
        def __init__(self, targets, **sizes):
            self.targets = targets

        def __call__(self, x, test=False):
            return network(self.targets, x)

    description = {"class": "mine.py:Mine", "options": {}, "targets": ["b", "a", "c"]}
    description.update(nb_channels=2, sample_rate=8000, n_fft=256, n_hop=64)
    return trained.Model(description, Mine)


def test_estimates_come_in_the_order_of_the_targets():
    """Whatever the order in which the network returns them: the loss compares one after the other."""
    model = model_of(lambda targets, x: {target: x * 2 for target in sorted(targets)})
    assert list(model.estimates(nn.Variable((7, 1, 2, 129)))) == ["b", "a", "c"]


def test_the_loss_is_the_sum_over_targets():
    factors = {"a": 0.5, "b": 2.0, "c": 3.0}
    model = model_of(lambda targets, x: {target: x * factors[target] for target in factors})
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1, 2, 2000)), rng.standard_normal((1, 3, 2, 2000))
    graph = train.Graph(model, x.shape, test=True)
    graph.forward(x, y)
    X = float64_magnitudes(x[0], 256, 64)
    errors = [
        ((factors[target] * X - float64_magnitudes(y[0, k], 256, 64)) ** 2).mean() for k, target in enumerate("bac")
    ]
    np.testing.assert_allclose(graph.loss.d, sum(errors), rtol=1e-5)


def test_arrays_of_a_batch_become_those_of_the_graph():
    """None is copied, and a step leaves them as they were; those of NumPy may be of any kind."""
    model = model_of(lambda targets, x: {target: x for target in targets})
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1, 2, 2000)), rng.standard_normal((1, 3, 2, 2000))
    arrays = [nn.NdArray.from_numpy_array(one.astype(np.float32)) for one in (x, *y.swapaxes(0, 1))]
    graph = train.Graph(model, x.shape, test=False)
    graph.forward(arrays[0], arrays[1:], clear_no_need_grad=True)
    loss = float(graph.loss.d)
    graph.loss.backward(clear_buffer=True)
    for variable, array, expected in zip((graph.x, *graph.y), arrays, (x, *y.swapaxes(0, 1))):
        assert variable.data.data.ctypes.data == array.data.ctypes.data
        np.testing.assert_array_equal(array.data, expected.astype(np.float32))
    graph.forward(x, y)
    assert float(graph.loss.d) == loss


def test_negative_magnitudes_are_silence():
    """Which are none, though a network that is not ours may return them: not the mixture with its sign changed."""
    model = model_of(lambda targets, x: {"b": -x, "a": x, "c": 0 * x})
    audio = 0.1 * np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    stems = separate.Separator([model], niter=0, context="cpu")(audio, 8000)
    np.testing.assert_array_equal(stems["b"], 0)
    np.testing.assert_allclose(stems["a"], audio, atol=1e-6)


@pytest.mark.parametrize(
    "network, message",
    [
        (lambda targets, x: {target: x[:1] for target in targets}, "expected the shape of its input"),
        (lambda targets, x: {target: None for target in targets}, "returns NoneType for 'b'"),
        (lambda targets, x: {"a": x, "b": x}, "expected a dict"),
        (lambda targets, x: [x, x, x], "returns list: expected a dict"),
    ],
)
def test_estimates_that_are_none(network, message):
    with pytest.raises(UsageError, match=message):
        model_of(network)


def test_the_target_of_a_file_that_was_renamed(tmp_path):
    options = {"hidden_size": 4, "nb_layers": 3, "max_bin": 100, "unidirectional": False}
    description = {"class": "OpenUnmix", "options": options, "targets": ["bass"], "nb_channels": 2}
    description.update(sample_rate=8000, n_fft=256, n_hop=64)
    model = trained.Model(description, trained.OpenUnmix)
    weights.save(tmp_path / "tuba.h5", model.get_parameters(), model.description)
    (tmp_path / "separator.json").write_text('{"nhop": 64, "sample_rate": 8000, "targets": ["tuba"]}')
    assert [model.targets for model in trained.load_models(tmp_path)[0]] == [["tuba"]]
    assert [model.targets for model in trained.load_models(tmp_path / "tuba.h5")[0]] == [["bass"]]
    with pytest.raises(UsageError, match="has no target drums: it has bass"):
        trained.load_models(tmp_path / "tuba.h5", ["bass", "drums"])


def test_the_path_of_a_network_is_behind_ours_and_gone_after(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "scores", raising=False)
    (tmp_path / "scores.py").write_text("METRICS = None\n")
    (tmp_path / "mine.py").write_text("import scores\nclass Mine:\n    metrics = scores.METRICS\n")
    before = list(sys.path)
    assert "SDR" in trained.read_network(f"{tmp_path}/mine.py:Mine").cls.metrics
    assert sys.path == before
