"""What a training minimises: each loss against its formula in double precision, and trainings with them."""

import itertools
import json
from pathlib import Path

import nnabla as nn
import numpy as np
import pytest
from formulas import float64_magnitudes, float64_sdr, float64_waveform, float64_weighted_sdr

import context
import evaluate
import losses
import separate
import train
import trained
import weights
from model import JointOpenUnmix, OpenUnmix
from utils import UsageError

N_FFT, N_HOP, RATE = 64, 16, 8000
LENGTH = N_FFT + 40 * N_HOP + 7
WHOLE = slice(N_FFT - N_HOP, 41 * N_HOP)  # samples that all frames reach


@pytest.fixture(params=[False, True], ids=["fast", "plain"], autouse=True)
def plain(request, monkeypatch):
    """Of those tests that do not run a command, which would say it again."""
    monkeypatch.setattr(context, "_plain", request.param)


class Case:
    """A network whose estimate of each target is the mixture times a factor, which is its parameter."""

    def __init__(self, nb_targets, nb_channels, domain="spectrogram", nb_samples=2):
        rng = np.random.default_rng(nb_targets)
        self.targets = [f"t{k}" for k in range(nb_targets)]
        self.domain, self.nb_channels = domain, nb_channels
        self.factors = dict(zip(self.targets, rng.uniform(0.2, 1.5, nb_targets)))
        shape = (nb_samples, 2, LENGTH)  # stereo recordings, of mono networks too
        self.y = {target: rng.standard_normal(shape).astype(np.float32) * 0.1 for target in self.targets}
        self.y["t0"][0] = 0  # silence
        self.x = sum(self.y.values())
        if nb_targets == 1:
            self.x = self.x + 0.1 * rng.standard_normal(shape).astype(np.float32)

    def model(self):
        case = self

        class Mine:
            domain = case.domain

            def __init__(self, targets):
                pass

            def __call__(self, x, test=False):
                factor = nn.parameter.get_parameter_or_create
                return {target: x * factor(target, (1,) * x.ndim) for target in case.targets}

        description = {"class": "mine.py:Mine", "options": {}, "targets": self.targets, "sample_rate": RATE}
        description.update(nb_channels=self.nb_channels, n_fft=N_FFT, n_hop=N_HOP)
        ndim = 4 if self.domain == "spectrogram" else 3
        parameters = {target: np.full((1,) * ndim, factor) for target, factor in self.factors.items()}
        return trained.Model(description, Mine, parameters)

    def loss(self, loss):
        """Its value, and its derivatives by the factors, as NNabla has them."""
        model = self.model()
        graph = train.Graph(model, self.x.shape, True, loss)
        for variable in model.variables().values():
            variable.grad.zero()
        graph.forward(self.x, np.stack(list(self.y.values()), axis=1))
        graph.loss.backward()
        return float(graph.loss.d), [float(model.variables()[target].g.sum()) for target in self.targets]

    def represent(self, audio):
        if self.domain == "audio":
            return audio.astype(np.float64)
        X = np.stack([float64_magnitudes(one.astype(np.float64), N_FFT, N_HOP) for one in audio], axis=1)
        return X.mean(axis=2, keepdims=True) if self.nb_channels == 1 else X

    def signals(self, factors):
        """x, and {target: …} of Y_hat, Y, y_hat, y, float64; audio where it is whole."""
        part, X = WHOLE if self.domain == "spectrogram" else slice(None), self.represent(self.x)
        Y_hat = {target: factor * X for target, factor in factors.items()}
        Y = {target: self.represent(y) for target, y in self.y.items()}
        y_hat = Y_hat
        if self.domain == "spectrogram":
            y_hat = {target: float64_waveform(Y, self.x, N_FFT, N_HOP) for target, Y in Y_hat.items()}
        y_hat, y = ({target: v[..., part].astype(np.float64) for target, v in some.items()} for some in (y_hat, self.y))
        return self.x[..., part].astype(np.float64), Y_hat, Y, y_hat, y


def assert_loss(case, loss, formula):
    """Value and gradient, the latter by differences of the formula."""
    value, gradient = case.loss(loss)
    np.testing.assert_allclose(value, formula(*case.signals(case.factors)), rtol=2e-6, atol=1e-6)
    for target, derivative in zip(case.targets, gradient):
        around = [
            formula(*case.signals({**case.factors, target: case.factors[target] + step})) for step in (1e-5, -1e-5)
        ]
        assert abs(derivative - (around[0] - around[1]) / 2e-5) < 1e-4 * max(np.abs(gradient).max(), 0.01), target


CASES = list(itertools.product((1, 2, 3, 4, 5), (1, 2), ("spectrogram",))) + [(3, 2, "audio")]


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_mse(sizes):
    case = Case(*sizes)
    assert_loss(case, losses.mse, lambda x, Y_hat, Y, *_: sum(((Y_hat[t] - Y[t]) ** 2).mean() for t in Y))


@pytest.mark.parametrize("sizes", CASES[-4:], ids=str)
def test_l1(sizes):
    case = Case(*sizes)
    assert_loss(case, losses.l1, lambda x, Y_hat, Y, *_: sum(np.abs(Y_hat[t] - Y[t]).mean() for t in Y))


@pytest.mark.parametrize("sizes", CASES[:4] + CASES[-2:], ids=str)
def test_sdr(sizes):
    """Of silent targets, too, and of mono estimates for both channels of a stereo recording."""
    assert_loss(Case(*sizes), losses.sdr, lambda x, Y_hat, Y, y_hat, y: -sum(float64_sdr(y_hat[t], y[t]) for t in y))


@pytest.mark.parametrize("mcoef, combinations", [(10.0, True), (0.0, True), (3.0, False), (0.0, False)])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_xumx(sizes, mcoef, combinations):
    """The paper's sums, written out: mean over all combinations of targets, of both domains."""
    case = Case(*sizes)
    nb_targets = len(case.targets)
    largest = max(1, nb_targets - 1) if combinations else 1
    sets = [one for size in range(1, largest + 1) for one in itertools.combinations(case.targets, size)]
    assert len(sets) == {True: {1: 1, 2: 2, 3: 6, 4: 14, 5: 30}[nb_targets], False: nb_targets}[combinations]

    def formula(x, Y_hat, Y, y_hat, y):
        values = []
        for one in sets:
            P, T, p, t = (sum(some[target] for target in one) for some in (Y_hat, Y, y_hat, y))
            values.append(((P - T) ** 2).mean() + mcoef * float64_weighted_sdr(x, p, t))
        return np.mean(values)

    assert_loss(case, losses.choose("xumx", {"mcoef": mcoef, "combinations": combinations}), formula)


@pytest.mark.parametrize("loss", losses.LOSSES.values())
@pytest.mark.parametrize("level", [0, 1e-8, 1])
def test_losses_of_silence_and_of_perfect_estimates_are_numbers(loss, level):
    case = Case(1, 2)
    case.factors["t0"], case.x = 1.0, case.x * np.float32(level)
    case.y["t0"] = case.x
    value, gradient = case.loss(loss)
    assert np.isfinite([value, *gradient]).all()


def test_audio_is_made_only_where_a_loss_looks_at_it(monkeypatch):
    monkeypatch.setattr(losses.functions, "waveforms", None)
    case = Case(3, 2)
    for loss in (losses.mse, losses.l1, lambda signals: losses.xumx(signals, mcoef=0)):
        case.loss(loss)
    with pytest.raises(TypeError):
        case.loss(losses.sdr)


def test_choose():
    options = {"mcoef": 2.0, "combinations": False}
    assert losses.choose("xumx", options).keywords == options
    assert not losses.choose("mse", options, {"lr"}).keywords
    for name, given, message in (
        ("l2", (), "--loss l2: there are mse, l1, sdr, xumx"),
        ("mse", {"mcoef"}, "--loss mse has no option mcoef: it has none"),
        ("sdr", {"combinations", "lr"}, "--loss sdr has no option combinations"),
    ):
        with pytest.raises(UsageError, match=message):
            losses.choose(name, options, given)


# ------------------------------------------------------------------------------------------ networks


def test_networks_side_by_side_are_those_of_each_target_alone():
    """Bit by bit: estimates, gradients, running statistics."""
    targets, sizes = ["a", "b", "c"], {"n_fft": N_FFT, "n_hop": N_HOP, "hidden_size": 8, "dropout": 0.0}
    x = nn.Variable.from_numpy_array(np.random.default_rng(0).uniform(0, 1, (9, 2, 2, 33)))
    joint = JointOpenUnmix(targets, crossing=False, input_is_spectrogram=True, **sizes)
    estimates = joint(x)
    nn.forward_all(list(estimates.values()))
    sum(estimates.values()).backward()
    scope = nn.get_parameters(grad_only=False)
    params = {name: variable.d.copy() for name, variable in scope.items()}
    for target, one in weights.by_target(params).items():
        nn.clear_parameters()
        for name, value in one.items():
            is_running = name.endswith(("bn/mean", "bn/var"))
            start = np.full_like(value, name.endswith("/var")) if is_running else value  # before they were moved
            nn.parameter.set_parameter(name, nn.Variable.from_numpy_array(start, need_grad=not is_running))
        alone = OpenUnmix(input_is_spectrogram=True, **sizes)(x)
        alone.forward()
        alone.backward()
        np.testing.assert_array_equal(alone.d, estimates[target].d)
        for name, variable in nn.get_parameters(grad_only=False).items():
            first, slash, rest = name.partition("/")
            of_joint = scope[f"{first}_{target}{slash}{rest}"]
            np.testing.assert_array_equal(variable.d, of_joint.d, err_msg=name)
            if variable.need_grad:
                np.testing.assert_array_equal(variable.g, of_joint.g, err_msg=name)


def test_crossing_is_a_choice():
    with pytest.raises(ValueError, match="crossing 'yes'"):
        JointOpenUnmix(["a"], crossing="yes")
    assert JointOpenUnmix(["a"]).crossing  # as files without a description are


DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def sony():
    """X-UMX as Sony's implementation computes it, with random weights of hidden size 8, of 1.5 s of noise."""
    with np.load(DATA / "sony_xumx_expected.npz") as archive:
        return dict(archive)


def test_masks_and_audio_are_those_of_sony(sony):
    """Whose frames are centred, audio reflected at its ends."""
    (model,), _ = trained.load_models(DATA / "sony_xumx.h5")
    assert model.targets == ["bass", "drums", "vocals", "other"] and model.net.crossing
    audio = (sony["audio"] / 32768).astype(np.float32)
    x = nn.Variable.from_numpy_array(np.pad(audio, ((0, 0), (2048, 2048)), mode="reflect")[None])
    signals = losses.Signals(model, x, dict.fromkeys(model.targets, x), test=True)
    estimates, sounds = ([some[t] for t in model.targets] for some in (signals.Y_hat, signals.y_hat))
    nn.forward_all([signals.X, *estimates, *sounds])
    masks = np.concatenate([estimate.d / signals.X.d for estimate in estimates], axis=2)[::8, :, :, ::8]
    np.testing.assert_allclose(masks, sony["masks"], atol=1e-5 * sony["masks"].max())
    expected = sony["audio_of_estimates"]  # every 32nd sample of 64 hops
    found = np.stack([sound.d[..., 2048 : 2048 + 65536 : 32] for sound in sounds])
    inner = slice(1024 // 32, -1024 // 32)  # its first and last frames have fewer neighbours than windows overlap
    np.testing.assert_allclose(found[..., inner], expected[..., inner], atol=1e-5 * np.abs(expected).max())


def test_separation_without_a_filter_is_that_of_sony(sony):
    separator = separate.Separator.load(DATA / "sony_xumx.h5", niter=0, context="cpu")
    stems = separator((sony["audio"] / 32768).astype(np.float32), 44100)
    expected = sony["audio_of_estimates"]
    found = np.stack([stems[target][None, :, :65536:32] for target in ("bass", "drums", "vocals", "other")])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------ trainings

TINY = ["--nfft", "1024", "--nhop", "512", "--hidden-size", "8", "--seq-dur", "0.3", "--batch-size", "4"]
RUN = ["--samples-per-track", "3", "--is-wav", "--context", "cpu", "--quiet", "--threads", "1"]


def run(songs, output, *options, shape=TINY):
    train.main([*shape, *RUN, "--root", str(songs), "--output", str(output), *map(str, options)])
    (log,) = output.glob("*+*.json") if "--targets" in options else output.glob("bass.json")
    return json.loads(log.read_text())


def state(folder):
    (path,) = [path for path in folder.glob("*.checkpoint.npz") if "before" not in path.name]
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files if key != "meta"}


def differs(a, b):
    a, b = state(a), state(b)
    return a.keys() != b.keys() or any((a[key] != b[key]).any() for key in a)


TRAININGS = {
    "side by side": [],
    "X-UMX": ["--crossing", "--loss", "xumx"],
    "parts": ["--loss", "xumx", "--mcoef", "2", "--no-combinations"],
    "sdr, mono": ["--loss", "sdr", "--nb-channels", "1"],
}


@pytest.mark.parametrize("plain", [False], indirect=True)
@pytest.mark.parametrize("name", TRAININGS)
def test_joint_training(songs, tmp_path, name):
    """Two epochs, and a third after resuming, are three; separate.py and evaluate.py need nothing new."""
    options = ["--targets", "vocals", "drums", "bass", *TRAININGS[name]]
    log = run(songs, tmp_path / "a", *options, "--epochs", "2")
    expected = train.train_parser().parse_args([*options, *TINY])
    for key in ("loss", "mcoef", "combinations", "crossing"):
        assert log["args"][key] == getattr(expected, key)
    assert log["network"]["class"] == "JointOpenUnmix" and log["network"]["options"]["crossing"] == expected.crossing
    assert (np.min(log["train_loss_history"]) < 0) <= (expected.loss == "sdr")
    run(songs, tmp_path / "b", *options, "--epochs", "3")
    run(songs, tmp_path / "a", "--targets", *options[1:4], "--epochs", "3", "--checkpoint", tmp_path / "a", shape=[])
    assert not differs(tmp_path / "a", tmp_path / "b")
    weight_files = [(tmp_path / folder / "vocals+drums+bass.h5").read_bytes() for folder in "ab"]
    assert weight_files[0] == weight_files[1]

    (model,), _ = trained.load_models(tmp_path / "a")
    assert model.net.crossing == expected.crossing
    command = ["--model", str(tmp_path / "a"), "--context", "cpu", "--quiet"]
    mixture = next((songs / "test").iterdir()) / "mixture.wav"
    separate.main([str(mixture), *command, "--outdir", str(tmp_path / "stems"), "--residual", "rest"])
    assert {path.stem for path in (tmp_path / "stems/mixture").iterdir()} == {"vocals", "drums", "bass", "rest"}
    if name == "X-UMX":
        scores = ["--root", str(songs), "--is-wav", "--evaldir", str(tmp_path / "scores"), "--residual", "rest"]
        evaluate.main([*command, *scores])
        assert "vocals" in json.dumps(json.loads((tmp_path / "scores/summary.json").read_text())["scores"])


@pytest.mark.parametrize("plain", [False], indirect=True)
def test_every_part_of_x_umx_is_a_flag(songs, tmp_path):
    whole = ["--targets", "vocals", "drums", "bass", "--epochs", "1", "--crossing", "--loss", "xumx"]
    run(songs, tmp_path / "whole", *whole)
    without = {
        "time": [*whole, "--mcoef", "0"],
        "combinations": [*whole, "--no-combinations"],
        "crossing": [option for option in whole if option != "--crossing"],
        "loss": whole[:-2],
    }
    for name, options in without.items():
        run(songs, tmp_path / name, *options)
        assert differs(tmp_path / name, tmp_path / "whole"), name


@pytest.mark.parametrize("plain", [False], indirect=True)
def test_targets_may_be_one(songs, tmp_path):
    for folder, option in (("a", "--target"), ("b", "--targets")):
        train.main(
            [*TINY, *RUN, "--root", str(songs), "--output", str(tmp_path / folder), option, "bass", "--epochs", "1"]
        )
    assert not differs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("plain", [False], indirect=True)
def test_sony_s_file_is_fine_tuned(songs, tmp_path):
    """With next to no learning rate, its weights stay."""
    options = ["--targets", "vocals", "drums", "bass", "other", "--epochs", "1", "--loss", "xumx", "--lr", "1e-12"]
    log = run(songs, tmp_path, *options, "--model", DATA / "sony_xumx.h5", "--seq-dur", "0.3", shape=[])
    assert log["network"]["options"]["crossing"] and log["args"]["crossing"] and log["args"]["hidden_size"] == 8
    before, after = weights.load(DATA / "sony_xumx.h5"), weights.load(tmp_path / "bass+drums+vocals+other.h5")
    assert before.keys() == after.keys()
    for name in before:
        if not name.endswith(("bn/mean", "bn/var")):
            np.testing.assert_allclose(after[name], before[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("plain", [False], indirect=True)
def test_a_checkpoint_of_before_there_were_losses(songs, tmp_path):
    """Was of the mean squared error."""
    log = run(songs, tmp_path, "--target", "bass", "--epochs", "1")
    with np.load(tmp_path / "bass.checkpoint.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    meta = json.loads(str(arrays["meta"]))
    for key in ("loss", "mcoef", "combinations"):
        del meta["log"]["args"][key]
    np.savez(tmp_path / "bass.checkpoint.npz", **{**arrays, "meta": np.array(json.dumps(meta))})
    log = run(songs, tmp_path, "--target", "bass", "--epochs", "2", "--checkpoint", tmp_path)
    assert (log["args"]["loss"], log["args"]["mcoef"], log["args"]["combinations"]) == ("mse", 10.0, True)


BAD = [
    (["--target", "bass", "--crossing"], "--crossing bridges the networks of several --targets"),
    (["--targets", "bass", "--crossing"], "--crossing bridges the networks of several --targets"),
    (["--targets", "bass", "drums", "--crossing", "--network", "x.py:X"], "--crossing is an option of our own network"),
    (["--loss", "mae"], "--loss mae: there are mse, l1, sdr, xumx"),
    (["--mcoef", "3"], "--loss mse has no option mcoef"),
    (["--loss", "l1", "--no-combinations"], "--loss l1 has no option combinations"),
    (["--loss", "xumx", "--mcoef", "-1"], "--mcoef: -1 is not at least 0"),
    (["--loss", "xumx", "--seq-dur", "0.03"], "--loss xumx: an excerpt or a track of 1323 samples is too short"),
    (["--loss", "sdr", "--nhop", "500"], "--loss sdr: n_fft 1024, n_hop 500: the way back to audio needs"),
    (["--model", "{sony}", "--targets", "vocals", "bass"], "not one of vocals bass"),
]


@pytest.mark.parametrize("plain", [False], indirect=True)
@pytest.mark.parametrize("options, message", BAD, ids=[" ".join(options) for options, _ in BAD])
def test_options_that_do_not_fit_together(songs, tmp_path, capsys, options, message):
    """One clear line, exit status 2, nothing written."""
    options = [option.format(sony=DATA / "sony_xumx.h5") for option in options]
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *RUN, "--root", str(songs), "--output", str(tmp_path), "--epochs", "1", *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plain", [False], indirect=True)
def test_a_resumed_training_keeps_its_loss_and_its_bridges(songs, tmp_path, capsys):
    options = ["--targets", "vocals", "bass", "--loss", "xumx"]
    run(songs, tmp_path, *options, "--epochs", "1")
    for more, message in (
        (["--loss", "mse"], "--loss mse: "),
        (["--mcoef", "3"], "--mcoef 3.0: "),
        (["--no-combinations"], "--combinations False: "),
        (["--crossing"], "--crossing True: "),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(songs, tmp_path, *options[:3], *more, "--checkpoint", tmp_path, "--epochs", "2")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
