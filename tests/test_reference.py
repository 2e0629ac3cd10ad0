"""Equality with the reference, openunmix 1.3.0, on files that tests/reference/make_cases.py has made with it.

tests/data/golden_*.npz are always compared; OPENUNMIX_REFERENCE names a folder with more (`make reference`).
`pytest -s` shows the largest error of each kind.
"""

import json
import math
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import nnabla as nn
import numpy as np
import pytest
import soundfile
from reference.songs import RATE, noise_songs

import context
import data
import functions
import solvers
import utils
import weights
from datasets.mixing import Item, Part
from datasets.recordings import open_recording
from model import OpenUnmix

GOLDEN = Path(__file__).parent / "data"


def files(kind):
    live = os.environ.get("OPENUNMIX_REFERENCE")
    return sorted(GOLDEN.glob(f"golden_{kind}*.npz")) + (sorted(Path(live).rglob(f"{kind}*.npz")) if live else [])


@pytest.fixture(scope="module", params=["plain", "fast"])
def plain(request):
    """Both forms of the graph functions and the solver are compared with the reference."""
    context.set_plain(request.param == "plain")
    yield
    context.set_plain(False)


@pytest.fixture(scope="module")
def largest():
    """Kind of comparison -> its largest error, and where."""
    errors = defaultdict(lambda: (0.0, ""))
    yield errors
    print("\nlargest errors")
    for kind, (error, where) in errors.items():
        print(f"  {kind:<28} {error:.1e}  {where}")


class Comparison:
    """Compares arrays by name with the reference's, and reports all that differ at once."""

    def __init__(self, kind, where, largest, tolerance):
        self.kind, self.where, self.largest, self.tolerance = kind, where, largest, tolerance
        self.failures = []

    def __call__(self, name, ours, reference, scale=None):
        """The largest difference relative to `scale`, by default the reference's maximum."""
        scale = np.abs(reference).max() if scale is None else scale
        assert ours.shape == reference.shape, f"{name}: shape {ours.shape}, the reference's is {reference.shape}"
        error = float((np.abs(np.asarray(ours, np.float64) - reference) / scale).max())
        self.largest[self.kind] = max(self.largest[self.kind], (error, f"{self.where} {name}"))
        if not error <= self.tolerance:  # a NaN fails
            self.failures.append(f"{name}: error {error:.2e} × {np.max(scale):.3g}, tolerance {self.tolerance:.0e}")

    def __enter__(self):
        return self

    def __exit__(self, exception, *_):
        if exception is None:
            assert not self.failures, f"{self.kind} of {self.where}\n" + "\n".join(self.failures)


# ----------------------------------------------------------------------------------- network


class Case:
    """One file of make_cases.py; the states come under our names."""

    def __init__(self, path):
        self.name = path.stem
        with np.load(path) as archive:
            self.arrays = dict(archive)
        statistics = {name: self[name] for name in ("input_mean", "input_scale")}
        self.config = {**json.loads(str(self["config"])), **statistics, "dropout": 0}

    def __getitem__(self, name):
        return self.arrays[name]

    def state(self, prefix):
        """Arrays of a state_dict under our names; what was not written under this prefix is that of the start."""
        state = {}
        for part in ("initial/", prefix + "/"):
            state.update({name[len(part) :]: a for name, a in self.arrays.items() if name.startswith(part)})
        return weights.from_torch(state)


@pytest.fixture(scope="module", params=files("case"), ids=lambda path: path.stem)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def ours(case, plain):
    """What our code makes of a case: the same steps as make_case of tests/reference/make_cases.py."""
    nn.clear_parameters()
    weights.set_parameters(case.state("initial"))
    net = OpenUnmix(**case.config)
    x, y = nn.Variable(case["x"].shape[1:]), nn.Variable(case["y"].shape[1:])
    Y_hat = net(x)
    Y_hat.persistent = True
    loss = functions.squared_error(Y_hat, net.spectrogram(y))
    solver = solvers.Adam(nn.get_parameters(), lr=float(case["lr"]), weight_decay=float(case["weight_decay"]))
    results = SimpleNamespace()
    for step, (x.d, y.d) in enumerate(zip(case["x"], case["y"])):
        loss.forward(clear_no_need_grad=True)
        solver.zero_grad()
        loss.backward(clear_buffer=True)
        if step == 0:
            results.estimate, results.loss = Y_hat.d.copy(), float(loss.d)
            results.gradients = {name: variable.g.copy() for name, variable in nn.get_parameters().items()}
            results.running = weights.get_parameters()
        nn.get_parameters()["input_mean"].g[...] = 0  # the true gradient: see make_case
        solver.update()
    results.trained = weights.get_parameters()
    Y_hat = net(x, test=True)
    x.d = case["x"][0]
    Y_hat.forward(clear_buffer=True)
    results.trained_estimate = Y_hat.d.copy()
    return results


def test_initial_statistics(case):
    """The arguments input_mean and input_scale become the parameters that the reference makes of them."""
    net, initial = OpenUnmix(**case.config), case.state("initial")
    np.testing.assert_array_equal(net.input_mean, initial["input_mean"])
    np.testing.assert_array_equal(net.input_scale, initial["input_scale"])


def test_estimate(case, ours, largest):
    with Comparison("estimate", case.name, largest, 1e-5) as compare:
        compare("estimate", ours.estimate, case["estimate"])


def test_loss(case, ours, largest):
    with Comparison("loss", case.name, largest, 1e-6) as compare:
        compare("loss", np.array(ours.loss), case["loss"])


def test_gradients(case, ours, largest):
    reference = case.state("gradient")
    with Comparison("gradient", case.name, largest, 2e-5) as compare:
        for name in sorted(ours.gradients.keys() - {"input_mean"}):
            compare(name, ours.gradients[name], reference[name])


def test_gradient_of_input_mean(case, ours, largest):
    """Zero but for rounding: the batch normalisation undoes a shift of its input.

    How much rounding, the gradient of input_scale tells: with (x + mean) · scale of unit variance, the
    sums over frames that give gradient(mean) / scale and gradient(scale) · scale have terms of equal size.
    """
    gradient, scale = case.state("gradient"), case.state("initial")["input_scale"]
    unit = np.abs(gradient["input_scale"] * scale).max()
    with Comparison("gradient of input_mean", case.name, largest, 2e-5) as compare:
        compare("ours", ours.gradients["input_mean"] / scale, np.zeros_like(scale), unit)
        compare("difference", ours.gradients["input_mean"] / scale, gradient["input_mean"] / scale, unit)


def test_running_statistics(case, ours, largest):
    reference = case.state("running")
    with Comparison("running statistics", case.name, largest, 1e-4) as compare:
        for name in reference:
            if name.endswith(("bn/mean", "bn/var")):
                compare(name, ours.running[name], reference[name])


def test_three_steps(case, ours, largest):
    """The parameters after three steps of Adam.

    Adam divides a gradient by its own size: where it is nothing but rounding, so is the direction of a full
    step. Of a thousand elements one may therefore be an outlier, though only as far as steps can lead.
    """
    reference = case.state("trained")
    furthest = 2 * len(case["x"]) * float(case["lr"])
    with Comparison("parameters after three steps", case.name, largest, 5e-5) as compare:
        for name in ours.gradients:
            error = np.abs(ours.trained[name] - reference[name])
            outliers = error > compare.tolerance
            largest["share of outliers"] = max(largest["share of outliers"], (outliers.mean(), f"{case.name} {name}"))
            assert outliers.mean() <= 1e-3, f"{name}: {outliers.sum()} of {outliers.size} elements off by > 5e-5"
            assert not error.max() > furthest, f"{name}: error {error.max():.2e}, more than three steps"
            compare(name, np.where(outliers, reference[name], ours.trained[name]), reference[name], scale=1)


def test_trained_estimate(case, ours, largest):
    with Comparison("estimate after three steps", case.name, largest, 1e-4) as compare:
        compare("estimate", ours.trained_estimate, case["trained_estimate"])


@pytest.mark.parametrize("path", files("packed"), ids=lambda path: path.stem)
def test_recordings_of_several_lengths(path, plain, largest):
    """Through one LSTM, as torch's packed sequences."""
    with np.load(path) as archive:
        arrays = dict(archive)
    nb_layers, hidden_size = 3, arrays["weight_hh_l0"].shape[1]
    nn.clear_parameters()
    for k in range(nb_layers):
        ways = [{name: arrays[f"{name}_l{k}{way}"] for name in PARTS_OF_LSTM} for way in ("", "_reverse")]
        gates = (2, 4, hidden_size)
        weight = np.stack([np.concatenate([way["weight_ih"], way["weight_hh"]], axis=1) for way in ways])
        parameters = {f"weight_l{k}": weight.reshape(*gates, -1)}
        for name in ("bias_ih", "bias_hh"):
            parameters[f"{name}_l{k}"] = np.stack([way[name] for way in ways]).reshape(gates)
        for name, array in parameters.items():
            nn.parameter.set_parameter(f"lstm/{name}", nn.Variable.from_numpy_array(array))
    expected = [arrays[f"y{k}"] for k in range(sum(name.startswith("y") for name in arrays))]
    x = [nn.Variable.from_numpy_array(arrays[f"x{k}"][:, None]) for k in range(len(expected))]
    y = functions.lstm(x, hidden_size, nb_layers, True, 0.4, True, "lstm")
    nn.forward_all(y)
    with Comparison("recordings together", path.stem, largest, 1e-6) as compare:
        for k, one in enumerate(expected):
            compare(f"recording {k}", y[k].d[:, 0], one, scale=1)


PARTS_OF_LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


# -------------------------------------------------------------------------------- statistics


def write_noise_songs(folder):
    for number, song in enumerate(noise_songs()):
        path = folder / f"{number}.wav"
        soundfile.write(path, song, RATE, subtype="PCM_16")
        yield Item([Part((open_recording(path),), True, ())], len(song))


@pytest.mark.parametrize("path", files("statistics"), ids=lambda path: path.stem)
def test_statistics(path, tmp_path, largest):
    with np.load(path) as expected:
        if "root" in expected:
            mixtures = data.MusdbSource("bass", str(expected["root"]), is_wav=True).mixtures()
        else:
            mixtures = write_noise_songs(tmp_path)
        mean, std = data.statistics(mixtures, int(expected["n_fft"]), int(expected["n_hop"]))
        with Comparison("statistics", path.stem, largest, 1e-5) as compare:
            # In units of each bin's deviation, which is how the network sees it. In bins that are weaker than
            # a thousandth of the loudest, the float32 rounding of torch's own STFT is more than the tolerance.
            unit = np.maximum(expected["std"], 1e-3 * expected["std"].max())
            compare("mean", mean, expected["mean"], unit)
            compare("std", std, expected["std"], unit)


# ----------------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def helpers():
    with np.load(GOLDEN / "golden_helpers.npz") as archive:
        return dict(archive)


def test_learning_rates(helpers):
    for (lr, factor, patience), expected in zip(helpers["schedules"], helpers["learning_rates"]):
        scheduler = utils.ReduceLROnPlateau(lr, factor, patience)
        rates = [scheduler.step(loss) for loss in helpers["losses"]]
        np.testing.assert_allclose(rates, expected, rtol=1e-9, err_msg=f"lr {lr}, factor {factor}, patience {patience}")


def test_early_stopping(helpers):
    for patience, expected in zip(helpers["patiences"], helpers["early_stops"]):
        stopping = utils.EarlyStopping(patience)
        epochs = [(stopping.step(loss), stopping.stop) for loss in helpers["losses"]]
        np.testing.assert_array_equal(epochs, expected, err_msg=f"patience {patience}")


def test_average(helpers, plain):
    for decay, expected in zip(helpers["decays"], helpers["averages"]):
        averages, values = ({"w": nn.Variable.from_numpy_array(np.full(7, 9, np.float32))} for _ in range(2))
        for step, value in enumerate(helpers["values"], 1):
            values["w"].d = value
            solvers.average(averages, values, float(decay), step)
            np.testing.assert_allclose(averages["w"].d, expected[step - 1], rtol=3e-6, err_msg=f"{decay}, step {step}")


def test_bandwidth_to_max_bin(helpers):
    for (rate, n_fft, bandwidth), expected in zip(helpers["bands"], helpers["max_bins"]):
        assert utils.bandwidth_to_max_bin(rate, int(n_fft), bandwidth) == expected, (rate, n_fft, bandwidth)


# ----------------------------------------------------------------------------------- dropout


P = 0.4


def transparent_lstm(nb_layers, directions, hidden_size):
    """Weights of an LSTM "lstm" that hands small inputs (…, directions · hidden_size) on as they are.

    Input and output gate are open, the forget gate is closed, and each direction's cell reads its own part
    of the input: h = tanh(tanh(x)), which is x up to a relative x². What drops out is so seen directly.
    """
    eye = np.eye(hidden_size * directions, dtype=np.float32).reshape(directions, hidden_size, -1)
    weight = np.zeros((directions, 4, hidden_size, hidden_size * (directions + 1)), np.float32)
    weight[:, 2, :, : hidden_size * directions] = eye
    bias = np.zeros((directions, 4, hidden_size), np.float32)
    bias[:] = np.array([20, -20, 0, 20])[:, None]
    for layer in range(nb_layers):
        for name, value in (("weight", weight), ("bias_ih", bias), ("bias_hh", 0 * bias)):
            parameter = nn.parameter.get_parameter_or_create(f"lstm/{name}_l{layer}", value.shape)
            parameter.d = value


@pytest.fixture(params=[False, True], ids=["unidirectional", "bidirectional"])
def bidirectional(request):
    return request.param


def dropped(nb_layers, bidirectional, test=False, dropout=P):
    """Small input and output, not yet computed, of a transparent LSTM."""
    hidden_size = 16
    directions = 2 if bidirectional else 1
    transparent_lstm(nb_layers, directions, hidden_size)
    rng = np.random.default_rng(0)
    x = nn.Variable((6, 10, hidden_size * directions), need_grad=True)
    x.d = rng.uniform(1e-3, 2e-3, x.shape) * rng.choice([-1, 1], x.shape)
    return x, functions.lstm(x, hidden_size, nb_layers, bidirectional, dropout, test, name="lstm")


@pytest.mark.parametrize("nb_layers", [1, 2, 3])
def test_dropout_acts_between_layers(plain, bidirectional, nb_layers):
    """Each unit passes all nb_layers - 1 gaps, enlarged by 1 / (1 - P) at each, or is zero."""
    x, y = dropped(nb_layers, bidirectional)
    y.forward()
    factor = y.d / x.d
    kept = factor > 0.5
    keep = (1 - P) ** (nb_layers - 1)
    np.testing.assert_allclose(factor, np.where(kept, 1 / keep, 0), atol=1e-4)
    sigma = math.sqrt(keep * (1 - keep) / kept.size)
    assert abs(kept.mean() - keep) <= 5 * sigma, f"{kept.mean():.3f} of the units are kept, expected {keep:.3f}"


@pytest.mark.parametrize("nb_layers", [2, 3])
def test_dropout_preserves_expectation(plain, bidirectional, nb_layers):
    """Averaged over forward passes, whose masks are independent, each unit keeps its value."""
    x, y = dropped(nb_layers, bidirectional)
    repetitions = 100
    total = 0
    for _ in range(repetitions):
        y.forward()
        total = total + y.d / x.d
    keep = (1 - P) ** (nb_layers - 1)
    sigma = math.sqrt((1 / keep - 1) / repetitions)
    deviation = np.abs(total / repetitions - 1)
    assert deviation.max() <= 7 * sigma
    assert abs(total.mean() / repetitions - 1) <= 5 * sigma / math.sqrt(total.size)


def test_dropout_drops_gradients_alike(plain, bidirectional):
    """What was dropped on the way forward gets no gradient; what was enlarged gets an enlarged one."""
    x, y = dropped(3, bidirectional)
    x.grad.zero()
    y.forward(clear_no_need_grad=True)
    factor = y.d / x.d
    y.backward(1, clear_buffer=True)
    np.testing.assert_allclose(x.g, factor, atol=1e-3)


def test_dropout_is_off_in_test_mode(plain, bidirectional):
    outputs = []
    for settings in ({"test": True}, {"dropout": 0}):
        x, y = dropped(3, bidirectional, **settings)
        y.forward()
        np.testing.assert_allclose(y.d / x.d, 1, atol=1e-4)
        outputs.append(y.d.copy())
    np.testing.assert_array_equal(*outputs)


def test_dropout_of_the_model(plain):
    """In training only, and only between LSTM layers."""
    audio = np.random.default_rng(0).normal(size=(2, 2, 400))

    def estimates(**settings):
        nn.clear_parameters()
        y = OpenUnmix(n_fft=64, n_hop=16, hidden_size=8, **settings)(nn.Variable.from_numpy_array(audio), test)
        for _ in range(2):
            y.forward()
            yield y.d.copy()

    for test, settings, differ in [
        (False, {}, True),
        (False, {"dropout": 0}, False),
        (False, {"nb_layers": 1}, False),
        (True, {}, False),
    ]:
        first, second = estimates(**settings)
        assert np.any(first != second) == differ, (test, settings)
