"""Several models at once: their estimates, averaged, against NumPy and norbert in double precision."""

import json
import shutil

import networks
import nnabla as nn
import norbert
import numpy as np
import pytest
import soundfile
from formulas import float64_estimate
from test_separate import N_FFT, N_HOP, RATE, joint_params, make_folder, random_params, read, run, song, stack

import filtering
import separate
import trained
import weights
from args import TARGETS
from separator import Separator
from utils import UsageError

WINDOW = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
SEEDS = (0, 10, 20)  # of the models; those of targets follow


def float64_stft(audio):
    """(nb_channels, nb_timesteps) to (nb_frames, nb_channels, nb_bins), centred, of a whole number of hops."""
    x = np.pad(np.float64(audio), ((0, 0), (N_FFT // 2, N_FFT // 2)), mode="reflect")
    starts = range(0, x.shape[1] - N_FFT + 1, N_HOP)
    return np.array([np.fft.rfft(x[:, start : start + N_FFT] * WINDOW) for start in starts])


def float64_istft(Y, nb_timesteps):
    """The inverse: each frame windowed once more, over the sum of the squared windows."""
    sums = np.zeros((Y.shape[1], (len(Y) - 1) * N_HOP + N_FFT))
    envelope = np.zeros(sums.shape[1])
    for k, frame in enumerate(np.fft.irfft(Y) * WINDOW):
        sums[:, k * N_HOP : k * N_HOP + N_FFT] += frame
        envelope[k * N_HOP : k * N_HOP + N_FFT] += WINDOW**2
    inner = slice(N_FFT // 2, N_FFT // 2 + nb_timesteps)
    return sums[:, inner] / envelope[inner]


def float64_stems(models, audio, niter, softmask, eps):
    """All of a separation: mean estimates of models, lists of parameters per target, through norbert's filter."""
    X = float64_stft(audio)
    v = np.mean([[float64_estimate(one, np.abs(X)[:, None])[:, 0] for one in model] for model in models], axis=0)
    y = norbert.wiener(v.transpose(1, 3, 2, 0), X.transpose(0, 2, 1), niter, softmask, eps)
    return np.array([float64_istft(one, audio.shape[1]) for one in y.transpose(3, 0, 2, 1)])


def parameters(seed, nb_targets, level=0.0):
    """Of a model of some targets; a low `level` makes masks of a ReLU that are mostly zero."""
    all_params = [random_params(seed + k) for k in range(nb_targets)]
    for params in all_params:
        params["output_mean"] += np.float32(level)
    return all_params


def separator(models, **options):
    models = [
        trained.described(params, [target], N_HOP, RATE) for model in models for params, target in zip(model, TARGETS)
    ]
    return Separator(models, context="cpu", wiener_win_len=None, **options)


# -------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("softmask", [False, True])
@pytest.mark.parametrize("niter", [0, 1, 2])
@pytest.mark.parametrize("nb_models", [1, 2, 3])
def test_estimates_are_averaged_before_the_filter(nb_models, niter, softmask):
    audio = song(40 * N_HOP)
    models = [parameters(seed, len(TARGETS)) for seed in SEEDS[:nb_models]]
    stems = stack(separator(models, niter=niter, softmask=softmask)(audio, RATE))
    expected = float64_stems(models, audio, niter, softmask, 1e-10)
    assert stems.shape == expected.shape
    assert np.abs(stems - expected).max() < 1e-5 * np.abs(expected).max()
    others = [float64_stems([model], audio, niter, softmask, 1e-10) for model in models]
    assert nb_models == 1 or min(np.abs(other - expected).max() for other in others) > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("niter, softmask", [(0, False), (1, False), (2, True)])
def test_windows_are_averaged_like_all_frames(niter, softmask):
    """Whose estimates lie in memory that the next window takes again."""
    models = [parameters(seed, 2) for seed in SEEDS[:2]]
    whole, windows = (separator(models, niter=niter, softmask=softmask) for _ in range(2))
    windows.wiener_win_len = 7
    audio = song(40 * N_HOP)
    if niter == 0:
        np.testing.assert_allclose(*(stack(one(audio, RATE)) for one in (whole, windows)), atol=1e-6)
        return
    alone = [separator([model], niter=niter, softmask=softmask) for model in models]
    for one in alone:
        one.wiener_win_len = 7
    same = separator([models[0], models[0]], niter=niter, softmask=softmask)
    same.wiener_win_len = 7
    np.testing.assert_array_equal(stack(same(audio, RATE)), stack(alone[0](audio, RATE)))
    assert np.abs(stack(windows(audio, RATE)) - stack(alone[0](audio, RATE))).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"softmask": True, "alpha": 2.0}, {"targets": ["bass"], "residual": "rest"}])
def test_a_list_of_one_or_of_the_same_is_that_model(tmp_path, options):
    """To the last bit: the mean of two that are alike is exact."""
    folder, audio = make_folder(tmp_path / "m"), song()
    alone = Separator.load(folder, context="cpu", **options)(audio, RATE)
    for several in ([folder], [str(folder), folder], (folder,) * 4):
        stems = Separator.load(several, context="cpu", **options)(audio, RATE)
        assert list(stems) == list(alone)
        np.testing.assert_array_equal(stack(stems), stack(alone))


def test_each_target_is_averaged_over_its_own_models():
    """Of a plain list of models: here two of one target, and one of another."""
    one, two = parameters(0, 2), parameters(10, 1)
    audio = song(20 * N_HOP)
    mixed = separator([one, two], niter=0)(audio, RATE)
    alone = [separator([model], niter=0)(audio, RATE) for model in (one, two)]
    first, second = TARGETS[:2]
    np.testing.assert_allclose(mixed[first], (alone[0][first] + alone[1][first]) / 2, atol=1e-6)
    np.testing.assert_array_equal(mixed[second], alone[0][second])


def test_joint_models_and_separate_ones(tmp_path):
    """And without the filter's EM, the stems are the mean of the stems."""
    weights.save(tmp_path / "x-umx.h5", joint_params(nb_bins=1025))
    config = {"nfft": 2048, "nhop": 1024, "sample_rate": 44100}
    folder, audio = make_folder(tmp_path / "umx", config=config, first_seed=5, nb_bins=1025), song(9000, rate=44100)
    names = [tmp_path / "x-umx.h5", folder]
    both, *alone = (Separator.load(name, niter=0, context="cpu")(audio, 44100) for name in (names, *names))
    assert list(both) == list(TARGETS)
    for target, stem in both.items():
        np.testing.assert_allclose(stem, sum(stems[target] for stems in alone) / 2, atol=1e-6)
    (stems,) = Separator.load(names, ["drums"], niter=0, context="cpu")(audio, 44100).values()
    np.testing.assert_allclose(stems, both["drums"], atol=1e-6)


def wave(seed):
    """A network in the time domain."""
    description = {"class": "w.py:Wave", "options": {}, "targets": ["bass", "vocals"], "nb_channels": 2}
    nn.random.prng = np.random.RandomState(seed)
    return trained.Model({**description, "sample_rate": RATE, "n_fft": N_FFT, "n_hop": N_HOP}, networks.Wave)


@pytest.mark.parametrize("nb_channels", [1, 2, 3])
def test_waveforms_are_averaged(nb_channels):
    models, audio = [wave(seed) for seed in range(3)], song(5000, nb_channels)
    both, *alone = (Separator(some, context="cpu")(audio, RATE) for some in (models, *([model] for model in models)))
    for target, stem in both.items():
        np.testing.assert_allclose(stem, np.mean([stems[target] for stems in alone], axis=0), atol=1e-6)
    assert np.abs(alone[0]["bass"] - alone[1]["bass"]).max() > 0.01


# ----------------------------------------------------------------------------- norbert's regularisation


@pytest.mark.parametrize("softmask", [False, True])
@pytest.mark.parametrize("niter", [1, 2])
@pytest.mark.parametrize("level", [0.0, -1.5], ids=["dense", "mostly zero"])
def test_without_a_regularisation_of_its_own_the_filter_has_norberts(level, niter, softmask, monkeypatch):
    """Which computes in double precision, as for Sony's X-UMX: what comes out differs by rounding to single precision;
    with 1e-10 it is something else. One of the sources is silent."""
    source_spectra, errors = filtering.source_spectra, []

    def compare(v, x, *options, out):
        source_spectra(v, x, *options, out=out)
        V, X = v.transpose(1, 3, 2, 0).astype(float), x.transpose(1, 2, 0).astype(complex)
        expected = norbert.wiener(V, X, niter, softmask).transpose(3, 2, 0, 1)
        assert not v[1].any() and not expected[1].any() and np.abs(expected[[0, 2, 3]]).max(axis=(1, 2, 3)).min() > 1
        errors.append(np.abs(out - expected).max() / np.abs(expected).max())

    monkeypatch.setattr(filtering, "source_spectra", compare)
    model = parameters(0, len(TARGETS), level)
    model[1]["output_mean"][:], model[1]["output_scale"][:] = -100, 0
    for eps in (None, 1e-10):
        separator([model], niter=niter, softmask=softmask, wiener_eps=eps)(song(40 * N_HOP), RATE)
    print(*(f"{error:.1e}" for error in errors))
    assert errors[0] < 1e-7 and errors[1] > 1e-4


# ------------------------------------------------------------------------------------------ errors


def test_what_cannot_be_averaged_is_one_line_that_names_both(tmp_path):
    basic = make_folder(tmp_path / "basic")
    others = {
        "nhop": make_folder(tmp_path / "hop", config={"nhop": 32}),
        "sample_rate": make_folder(tmp_path / "rate", config={"sample_rate": 16000}),
        "nfft": make_folder(tmp_path / "fft", config={"nfft": 512}, nb_bins=257),
        "nb_channels": make_folder(tmp_path / "mono", nb_channels=1),
    }
    for key, other in others.items():
        for names in ([basic, other], [other, basic], [basic, basic, other]):
            with pytest.raises(UsageError, match=f"{key} .*: they cannot be averaged") as caught:
                Separator.load(names, context="cpu")
            assert str(basic) in str(caught.value) and str(other) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_domains_are_not_mixed(tmp_path):
    """Of networks of one class, whose options tell."""
    (tmp_path / "either.py").write_text(EITHER)
    network, folders = trained.read_network(f"{tmp_path / 'either.py'}:Either"), []
    for domain in ("audio", "spectrogram"):
        description = {"class": network.name, "options": {"domain": domain}, "targets": ["bass"], "nb_channels": 2}
        model = trained.Model({**description, "sample_rate": RATE, "n_fft": N_FFT, "n_hop": N_HOP}, network.cls)
        folders.append(tmp_path / domain)
        folders[-1].mkdir()
        weights.save(folders[-1] / "bass.h5", model.arrays(), model.description)
        (folders[-1] / "separator.json").write_text(json.dumps({**model.config, "targets": ["bass"]}))
    load = {"network": f"{tmp_path / 'either.py'}:Either", "context": "cpu"}
    assert Separator.load([folders[0]] * 2, **load).targets == ["bass"]
    line = f"{folders[0]} has domain audio, {folders[1]} spectrogram: they cannot be averaged"
    with pytest.raises(UsageError, match=line):
        Separator.load(folders, **load)


EITHER = """
import nnabla as nn
import nnabla.parametric_functions as PF


class Either:
    def __init__(self, targets, domain, **sizes):
        self.targets, self.domain = targets, domain

    def __call__(self, x, test=False):
        gain = nn.parameter.get_parameter_or_create("gain", (1,) * x.ndim)
        return {target: x * gain for target in self.targets}
"""


def test_every_model_has_every_target(tmp_path):
    """Else a stem would be an average, and the next one not, and nobody would know."""
    all_targets, some = make_folder(tmp_path / "all"), make_folder(tmp_path / "some", ["vocals", "bass"])
    for names in ([all_targets, some], [some, all_targets]):
        with pytest.raises(UsageError, match=f"{all_targets} has the target 'drums', {some} has not: name --targets"):
            Separator.load(names, context="cpu")
    assert Separator.load([some, all_targets], ["bass"], context="cpu").targets == ["bass"]
    with pytest.raises(UsageError, match=f"no weights of the target 'drums' .* in {some}"):
        Separator.load([all_targets, some], ["drums"], context="cpu")


@pytest.mark.parametrize("model", [[], (), [None], ["umx", 3], None, {"umx": 1}])
def test_models_that_are_no_names(model):
    with pytest.raises(UsageError, match="a name, a folder or a file, or a list of them"):
        Separator.load(model, context="cpu")


# ---------------------------------------------------------------------------------------- the command


@pytest.fixture
def models(tmp_path):
    return [str(make_folder(tmp_path / name, first_seed=seed)) for name, seed in (("one", 0), ("two", 10))]


@pytest.fixture
def recording(tmp_path):
    soundfile.write(tmp_path / "song.wav", song().T, RATE)
    return tmp_path / "song.wav"


def test_the_command_takes_several(models, recording, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    separate.main([str(recording), "--model", *models, "--context", "cpu", "--quiet"])
    written = read(tmp_path / "song_one+two")
    audio = soundfile.read(recording, dtype="float32")[0].T
    for name, stem in Separator.load(models, context="cpu")(audio, RATE).items():
        np.testing.assert_allclose(written[f"{name}.wav"], stem, atol=1e-6)
    run(models[0], tmp_path / "stems", recording)
    assert (read(tmp_path / "stems" / "song")["bass.wav"] != written["bass.wav"]).any()


def test_recordings_may_stand_behind_one_model(models, recording, tmp_path, monkeypatch, capsys):
    """As before there were several: the words behind it are recordings if nothing else is."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(recording, tmp_path / "again.wav")
    separate.main(["--context", "cpu", "--quiet", "--model", models[0], str(recording), "again.wav"])
    assert (tmp_path / "song_one").is_dir() and (tmp_path / "again_one").is_dir()
    for words in (["--model", models[0]], []):
        with pytest.raises(SystemExit) as stop:
            separate.main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "which recordings?" in error and error.count("\n") == 1
