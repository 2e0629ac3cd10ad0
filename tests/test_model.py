"""The network: shapes, arguments that act, errors. Its equality with the reference is in test_reference.py."""

import nnabla as nn
import numpy as np
import pytest

import context
import functions
import model
import trained


def audio(nb_samples=2, nb_channels=2, nb_timesteps=2000, seed=0):
    return np.random.RandomState(seed).randn(nb_samples, nb_channels, nb_timesteps).astype(np.float32)


def run(x, test=True, **options):
    """The estimate for audio (or a spectrogram) of a small model whose weights depend on nothing but their shapes."""
    nn.clear_parameters()
    nn.random.prng = np.random.RandomState(0)
    net = model.OpenUnmix(**{"n_fft": 64, "n_hop": 16, "hidden_size": 8, **options})
    variable = nn.Variable.from_numpy_array(x)
    estimate = net(variable, test)
    estimate.forward()
    return estimate.d.copy()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("nb_timesteps", [64, 500, 512])
def test_stft_equals_the_textbook_formula(center, nb_timesteps):
    x = audio(nb_timesteps=nb_timesteps)
    real, imag = model.STFT(nn.Variable.from_numpy_array(x), n_fft=64, n_hop=16, center=center)
    nn.forward_all([real, imag])
    padded = np.pad(x, ((0, 0), (0, 0), (32, 32)), mode="reflect") if center else x
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    starts = range(0, padded.shape[2] - 63, 16)
    expected = np.stack([np.fft.rfft(padded[..., start : start + 64] * window) for start in starts], axis=-1)
    assert real.shape == expected.shape == (2, 2, 33, len(starts))
    scale = np.abs(expected).max()
    assert np.abs(real.d + 1j * imag.d - expected).max() < 1e-5 * scale

    X = model.Spectrogram(real, imag)
    mono = model.Spectrogram(real, imag, power=2, mono=True)
    nn.forward_all([X, mono])
    magnitude = np.abs(expected).transpose(3, 0, 1, 2)
    np.testing.assert_allclose(X.d, magnitude, atol=1e-5 * scale)
    np.testing.assert_allclose(mono.d, (magnitude**2).mean(axis=2, keepdims=True), atol=1e-5 * scale**2)


@pytest.mark.parametrize("nb_channels", [1, 2])
@pytest.mark.parametrize("nb_samples", [1, 3])
def test_shapes(nb_channels, nb_samples):
    Y = run(audio(nb_samples), nb_channels=nb_channels)
    assert Y.shape == (1 + (2000 - 64) // 16, nb_samples, nb_channels, 33)
    assert np.isfinite(Y).all() and (Y >= 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10},
        {"nb_layers": 2},
        {"nb_layers": 1},
        {"input_mean": np.full(33, 2.0)},
        {"input_scale": np.full(33, 2.0)},
        {"max_bin": 20},
        {"unidirectional": True},
        {"power": 2},
    ],
    ids=str,
)
def test_arguments_change_the_estimate(change):
    base, other = run(audio()), run(audio(), **change)
    assert base.shape == other.shape
    assert np.abs(base - other).max() > 1e-3 * np.abs(base).max()


def test_arguments_that_change_the_shape():
    assert run(audio(), n_hop=32).shape[0] == 61
    assert run(audio(), n_fft=128).shape[3] == 65
    assert run(audio(), nb_channels=1).shape[2] == 1
    assert model.OpenUnmix(sample_rate=22050).separator_config["sample_rate"] == 22050


def test_dropout_acts_in_training_only():
    assert np.abs(run(audio(), test=False, dropout=0.4) - run(audio(), test=False, dropout=0.0)).max() > 1e-4
    np.testing.assert_array_equal(run(audio(), dropout=0.4), run(audio(), dropout=0.0))
    np.testing.assert_array_equal(
        run(audio(), test=False, nb_layers=1, dropout=0.4), run(audio(), test=False, nb_layers=1, dropout=0.0)
    )


def test_spectrogram_input_equals_audio_input():
    x = nn.Variable.from_numpy_array(audio())
    X = model.OpenUnmix(n_fft=64, n_hop=16, hidden_size=8).spectrogram(x)
    X.forward()
    np.testing.assert_allclose(run(X.d.copy(), input_is_spectrogram=True), run(audio()), atol=1e-5)


def test_the_estimate_is_a_mask_times_the_mixture():
    """Digital silence stays silence, and a max_bin does not cut the output."""
    x = audio()
    x[:, :, 800:1200] = 0
    Y = run(x, max_bin=10)
    assert (Y[50 : (1200 - 64) // 16] == 0).all()
    assert Y[:40, :, :, 10:].max() > 0


def test_a_unidirectional_model_is_causal():
    x = audio()
    changed = x.copy()
    changed[:, :, 1000:] *= -2
    before = (1000 - 64) // 16  # frames that end before the change
    causal, causal_changed = run(x, unidirectional=True), run(changed, unidirectional=True)
    np.testing.assert_allclose(causal[:before], causal_changed[:before], atol=1e-6)
    assert np.abs(run(x)[:before] - run(changed)[:before]).max() > 1e-4


def test_statistics_become_parameters():
    mean, std = np.linspace(1, 2, 40), np.linspace(3, 4, 40)
    run(audio(), input_mean=mean, input_scale=std, max_bin=20)
    parameters = nn.get_parameters()
    np.testing.assert_allclose(parameters["input_mean"].d, -mean[:20], rtol=1e-6)
    np.testing.assert_allclose(parameters["input_scale"].d, 1 / std[:20], rtol=1e-6)
    for name in ("output_mean", "output_scale"):
        np.testing.assert_array_equal(parameters[name].d, np.ones(33))


def test_running_statistics_are_not_learnt():
    """Nor moved by the optimizer, or by weight decay."""
    run(audio())
    learnt, rest = nn.get_parameters(), nn.get_parameters(grad_only=False)
    assert rest.keys() - learnt.keys() == {f"fc{k}/bn/{name}" for k in (1, 2, 3) for name in ("mean", "var")}


def test_initial_values_have_the_range_of_the_reference():
    run(audio(), hidden_size=128)
    for name, parameter in nn.get_parameters().items():
        if name.startswith("lstm/"):
            bound = 64**-0.5
        elif name.endswith("/W"):
            bound = parameter.shape[0] ** -0.5
        else:
            continue
        values = parameter.d
        assert 0.97 * bound < np.abs(values).max() <= bound, name
        assert abs(values.std() / (bound / 3**0.5) - 1) < 0.1, name


@pytest.mark.parametrize(
    "options, x, message",
    [
        ({"max_bin": 34}, audio(), "max_bin 34"),
        ({"max_bin": 0}, audio(), "max_bin 0"),
        ({"hidden_size": 7}, audio(), "odd"),
        ({"input_mean": np.zeros(5)}, audio(), "input_mean"),
        ({"input_mean": np.full(33, np.nan)}, audio(), "input_mean"),
        ({"input_scale": np.zeros((33, 2))}, audio(), "input_scale"),
        ({"input_scale": np.zeros(33)}, audio(), "input_scale"),
        *(
            ({name: value}, audio(), f"{name} ")
            for name, values in {
                "n_fft": (0, 1, 63, -64, 64.0, "64", True, None, 2**40),
                "n_hop": (0, -1, 32.0, "32", 10**20),
                "max_bin": (1.5, "20", True),
                "hidden_size": (0, -2, 8.0, "8", 2**40),
                "nb_layers": (0, -1, 3.0, "3", 10**9),
                "nb_channels": (0, -1, 2.0, "2"),
                "sample_rate": (0, -1, np.nan, np.inf, "44100", None),
                "power": (-1, np.nan, np.inf, "1"),
                "dropout": (-0.1, 1, 1.5, np.nan, "0.4"),
                "unidirectional": ("no", 1, None),
                "input_is_spectrogram": ("no", 1, None),
            }.items()
            for value in values
        ),
        ({}, audio(nb_channels=1), "audio of shape"),
        ({}, audio(nb_timesteps=63), "too short"),
        ({}, audio()[0], "audio of shape"),
        ({"input_is_spectrogram": True}, np.zeros((5, 1, 1, 33)), "spectrogram of shape"),
    ],
)
def test_what_does_not_fit_raises(options, x, message):
    with pytest.raises(ValueError, match=message):
        run(x, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: model.STFT(x, n_hop=0), "n_hop 0"),
        (lambda x: model.STFT(x, n_fft=0), "n_fft 0"),
        (lambda x: model.STFT(x, n_fft=64.0), "n_fft 64.0"),
        (lambda x: model.STFT(x, n_fft=4096, n_hop=10**20), "n_hop"),
        (lambda x: model.STFT(x[0], 64, 32), "audio of shape"),
        (lambda x: model.STFT(x, n_fft=10**6), "too short"),
        (lambda x: model.Spectrogram(*model.STFT(x, 64, 32), power=np.nan), "power nan"),
        (lambda x: model.Spectrogram(*model.STFT(x, 64, 32), power="1"), "power '1'"),
        (lambda x: model.Spectrogram(model.STFT(x, 64, 32)[0], model.STFT(x, 64, 16)[1]), "imaginary of"),
        (lambda x: model.Spectrogram(x, x), r"expected \(N, C, F, T\)"),
        (lambda x: model.JointOpenUnmix("bass"), "not a sequence of names"),
        (lambda x: model.JointOpenUnmix([1, 2]), "not a sequence of names"),
    ],
)
def test_arguments_that_cannot_be_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Variable.from_numpy_array(audio()))


@pytest.mark.parametrize("n_fft, n_hop", [(1, 1), (2, 1), (3, 1), (63, 20), (64, 100)])
def test_any_window_and_hop_of_the_transform(n_fft, n_hop):
    """Odd windows, and hops that leave gaps, are no model's, but the transform is what it should be."""
    x = audio()
    real, imag = model.STFT(nn.Variable.from_numpy_array(x), n_fft, n_hop)
    nn.forward_all([real, imag])
    frames = np.lib.stride_tricks.sliding_window_view(x, n_fft, axis=2)[:, :, ::n_hop] * np.hanning(n_fft + 1)[:-1]
    expected = np.fft.rfft(frames).transpose(0, 1, 3, 2)
    np.testing.assert_allclose(real.d + 1j * imag.d, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("nb_values", [7, 5_000_000])
def test_squared_error_is_accurate(nb_values, plain, monkeypatch):
    monkeypatch.setattr(context, "_plain", plain)
    rng = np.random.RandomState(0)
    y_hat, y = (rng.rand(nb_values // 2049 + 1, 1, 1, 2049).astype(np.float32) ** 4 for _ in range(2))
    loss = functions.squared_error(nn.Variable.from_numpy_array(y_hat), nn.Variable.from_numpy_array(y))
    loss.forward()
    assert loss.shape == ()
    assert abs(loss.d / np.mean((y_hat.astype(np.float64) - y) ** 2) - 1) < 1e-6


class Own(model.JointOpenUnmix):
    def encode(self, X, test=False):
        h = self._reduce(X, test)
        return {target: self._combine(h, self._recur(h, test), test, target) for target in self.targets}


@pytest.mark.parametrize("targets, crossing", [(None, True), (["bass", "a"], True), (["bass", "a"], False)])
def test_listening_to_bottlenecks_is_encoding(targets, crossing):
    """What a separator calls, and what the networks themselves do."""
    options = {"n_fft": 64, "n_hop": 16, "hidden_size": 12}
    net = model.JointOpenUnmix(targets, crossing, **options) if targets else model.OpenUnmix(**options)
    rng = np.random.RandomState(0)
    recordings = [rng.rand(nb_frames, 1, 2, 33).astype(np.float32) for nb_frames in (7, 3, 11)]
    X = [nn.Variable.from_numpy_array(one) for one in recordings]
    together = net.listen([net.bottleneck(one, test=True) for one in X], test=True)
    for got, one in zip(together, X):
        expected = net.encode(one, test=True)
        got, expected = ((y if targets else {"": y}) for y in (got, expected))
        assert got.keys() == expected.keys()
        for target in expected:
            nn.forward_all([got[target], expected[target]])
            np.testing.assert_allclose(got[target].d, expected[target].d, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cls", [model.OpenUnmix, model.JointOpenUnmix, Own])
def test_networks_of_ours_are_decoded_piece_by_piece(cls):
    assert trained.is_parted(cls)
