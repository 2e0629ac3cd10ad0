"""The network: shapes, arguments that act, errors. Its equality with the reference is in test_reference.py."""

import nnabla as nn
import numpy as np
import pytest

import context
import functions
import model


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
        ({"input_scale": np.zeros((33, 2))}, audio(), "input_scale"),
        ({}, audio(nb_channels=1), "audio of shape"),
        ({}, audio(nb_timesteps=63), "too short"),
        ({}, audio()[0], "audio of shape"),
        ({"input_is_spectrogram": True}, np.zeros((5, 1, 1, 33)), "spectrogram of shape"),
    ],
)
def test_what_does_not_fit_raises(options, x, message):
    with pytest.raises(ValueError, match=message):
        run(x, **options)


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
