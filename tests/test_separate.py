"""Separation: equality with openunmix's Separator, what holds for any audio, and the command as a user runs it.

tests/data/golden_stems_*.npz are by tests/reference/make_stems.py; OPENUNMIX_REFERENCE names a folder with more.
`pytest -s` shows the largest error of each kind.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import networks
import nnabla as nn
import numpy as np
import pytest
import shapes
import soundfile

import args
import audio
import context
import kernels.lstm
import kernels.threads
import separate
import stems
import trained
import weights
from args import TARGETS
from separator import Separator
from utils import UsageError

GOLDEN = Path(__file__).parent / "data"
RATE, N_FFT, N_HOP = 8000, 256, 64
SIZES = {"nb_channels": 2, "hidden_size": 8, "nb_layers": 3, "nb_bins": N_FFT // 2 + 1, "max_bin": 100}


def random_params(seed=0, **sizes):
    """Of a network that is used: with masks of all values, and statistics that are no zeros and ones."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.open_unmix(**{**SIZES, "unidirectional": False, **sizes}).items():
        values = 0.4 * rng.standard_normal(shape)
        if name.endswith("/var") or name.startswith(("input_scale", "output_scale")):
            values = 1 + np.abs(values)
        elif name.endswith("/gamma") or name.startswith("output_mean"):
            values = 0.5 + values
        params[name] = values.astype(np.float32)
    return params


def random_models(targets=TARGETS, rate=RATE, **sizes):
    return [
        trained.described(random_params(seed, **sizes), [target], N_HOP, rate) for seed, target in enumerate(targets)
    ]


def open_models(nb_targets):
    """Whose masks are never all zero, so that a soft mask leaves nothing of the mixture."""
    all_params = [random_params(seed) for seed in range(nb_targets)]
    all_params[0]["output_mean"] += 10
    return [trained.described(params, [target], N_HOP, RATE) for params, target in zip(all_params, TARGETS)]


def song(nb_timesteps=4000, nb_channels=2, seed=0, rate=RATE):
    """Tones and noise, with channels that differ."""
    rng = np.random.default_rng(seed)
    t = np.arange(nb_timesteps) / rate
    tones = [np.sin(2 * np.pi * f * t + np.sin(5 * t + c)) for c, f in zip(range(nb_channels), (220, 330, 500) * 9)]
    noise = rng.standard_normal((nb_channels, nb_timesteps))
    return (0.15 * np.array(tones).reshape(noise.shape) + 0.05 * noise).astype(np.float32)


def stack(stems):
    return np.stack(list(stems.values()))


# ---------------------------------------------------------------------------------- the reference

TOLERANCE = {0: 1e-5, 1: 1e-5, 2: 5e-5}  # by iterations, absolute


def reference_files():
    """Files and the form of the graph functions to compare with; the plain one is slow on those of real size."""
    live = os.environ.get("OPENUNMIX_REFERENCE")
    golden = [(path, plain) for path in sorted(GOLDEN.glob("golden_stems*.npz")) for plain in (False, True)]
    return golden + ([(path, False) for path in sorted(Path(live).rglob("stems*.npz"))] if live else [])


@pytest.fixture(autouse=True)
def fast():
    yield
    context.set_plain(False)


@pytest.mark.parametrize("path, plain", reference_files(), ids=lambda value: getattr(value, "stem", f"plain={value}"))
def test_stems_equal_the_references(path, plain, tmp_path):
    context.set_plain(plain)
    with np.load(path) as archive:
        arrays = dict(archive)
    config, stride = json.loads(str(arrays["config"])), int(arrays["stride"])
    mixture = arrays["mixture"] / np.float32(32768)
    for target in {name.split("/")[0] for name in arrays if name.endswith("/fc1.weight")}:
        state = {name[len(target) + 1 :]: value for name, value in arrays.items() if name.startswith(target + "/")}
        weights.save(tmp_path / f"{target}-0123abcd.pth", weights.from_torch(state))
    (tmp_path / "separator.json").write_text(str(arrays["config"]))
    largest, failures = {}, []
    for name, expected in arrays.items():
        if not name.startswith("stems/"):
            continue
        options = json.loads(name[len("stems/") :])
        audio = mixture[: options.pop("channels"), : None if options.pop("whole") else int(arrays["end"])]
        stems = stack(Separator.load(tmp_path, context="cpu", **options)(audio, config["sample_rate"]))
        error = float(np.abs(stems[..., ::stride] - expected).max())
        largest[options["niter"]] = max(largest.get(options["niter"], 0), error)
        if stems[..., ::stride].shape != expected.shape or not error <= TOLERANCE[options["niter"]]:
            failures.append(f"{options}: {error:.1e}")
    print(f"\n{path.stem}{' (plain)' * plain}, by iterations:", {key: f"{error:.1e}" for key, error in largest.items()})
    assert largest and not failures, "\n".join(failures)


# --------------------------------------------------------------------------------------- Separator


@pytest.fixture(scope="module")
def models():
    return random_models()


@pytest.mark.parametrize("rate", [RATE, 22050, 48000, 5512.5])
@pytest.mark.parametrize("nb_channels", [1, 2, 3, 6])
@pytest.mark.parametrize("nb_timesteps", [1, 2, N_FFT // 2, N_FFT // 2 + 1, 3001])
def test_stems_have_the_shape_of_the_audio(models, nb_timesteps, nb_channels, rate):
    audio = song(nb_timesteps, nb_channels)
    stems = Separator(models, context="cpu")(audio, rate)
    assert list(stems) == list(TARGETS)
    for stem in stems.values():
        assert stem.shape == audio.shape and stem.dtype == np.float32 and np.isfinite(stem).all()


@pytest.mark.parametrize("rate", [22050, 48000, 5512.5])
def test_resampling_keeps_time_and_level(rate):
    """The stems of a soft mask add up to the mixture, but for what the lower of the two rates cannot hold."""
    audio = song(6001)
    total = sum(Separator(open_models(2), niter=0, softmask=True, context="cpu")(audio, rate).values())
    low = slice(0, int(0.9 * audio.shape[1] / 2 * min(1, RATE / rate)))
    window = np.hanning(audio.shape[1])
    difference, whole = np.fft.rfft(window * (total - audio)), np.fft.rfft(window * audio)
    assert np.abs(difference[:, low]).max() < 1e-3 * np.abs(whole).max()


def test_channels_are_separated_in_pairs(models):
    separator = Separator(models, context="cpu")
    audio = song(2000, 5)
    stems = stack(separator(audio, RATE))
    for first in (0, 2):
        pair = stack(separator(audio[first : first + 2], RATE))
        np.testing.assert_array_equal(stems[:, first : first + 2], pair)
    np.testing.assert_array_equal(stems[:, 4:], stack(separator(audio[4:], RATE)))


def test_mono_is_stereo_with_equal_channels(models):
    separator = Separator(models, context="cpu")
    audio = song(2000, 1)
    twice = stack(separator(audio.repeat(2, axis=0), RATE))
    np.testing.assert_allclose(stack(separator(audio, RATE)), twice.mean(axis=1, keepdims=True), atol=1e-7)


def test_floats_of_any_precision(models):
    separator = Separator(models, context="cpu")
    audio = song(1000)
    np.testing.assert_array_equal(
        stack(separator(audio.astype(np.float64), RATE)), stack(separator(np.asfortranarray(audio), RATE))
    )


@pytest.mark.parametrize(
    "audio, rate, message",
    [
        (np.zeros(9), RATE, "expected floats"),
        (np.zeros((1, 2, 9)), RATE, "expected floats"),
        (np.zeros((2, 0)), RATE, "expected floats"),
        (np.zeros((0, 9)), RATE, "expected floats"),
        (np.zeros((2, 9), np.int16), RATE, "int16"),  # of unknown scale
        (np.zeros((2, 9), complex), RATE, "complex128"),
        (np.array([[0, np.nan]]), RATE, "not finite"),
        (np.array([[0, -np.inf]]), RATE, "not finite"),
        (np.array([[0, 1e30]]), RATE, "1e9"),
        (np.zeros((2, 9)), 0, "rate"),
        (np.zeros((2, 9)), float("nan"), "rate"),
        (np.zeros((2, 9)), "44100", "rate"),
        (np.zeros((2, 9)), None, "rate"),
        (np.zeros((2, 9)), True, "rate"),
        (np.zeros((2, 9)), 1e-9, "rate"),
        (np.zeros((2, 9)), 1e12, "rate"),
        (np.zeros((10**6, 9)), RATE, "1000000 channels"),
        (np.zeros((2, 9), object), RATE, "object"),
        (np.full((2, 9), 1e300), RATE, "not finite"),
        ([[0.0], [0.0, 1.0]], RATE, "audio"),
        ("audio", RATE, "expected floats"),
        (None, RATE, "expected floats"),
    ],
)
def test_audio_that_is_none(models, audio, rate, message):
    with pytest.raises(UsageError, match=message):
        Separator(models, context="cpu")(audio, rate)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"niter": -1}, "niter"),
        ({"wiener_win_len": 0}, "window"),
        ({"segment": 10, "overlap": 5}, "overlaps"),
        ({"overlap": -1}, "overlaps"),
        ({"alpha": 2}, "softmask"),
        ({"targets": ["bass", "bass"]}, "one name"),
        ({"residual": "bass"}, "one name"),
        ({"residual": "../bass"}, "names of files"),
        ({"context": "gpu"}, "choose cpu or cudnn"),
        ({"niter": 1.5}, "niter"),
        ({"niter": "1"}, "niter"),
        ({"niter": True}, "niter"),
        ({"niter": 10**20}, "niter"),
        ({"wiener_win_len": 2.5}, "window"),
        ({"wiener_win_len": "300"}, "window"),
        ({"segment": float("nan")}, "overlaps"),
        ({"segment": "480"}, "overlaps"),
        ({"segment": None}, "overlaps"),
        ({"overlap": float("inf")}, "overlaps"),
        ({"alpha": float("nan"), "softmask": True}, "alpha"),
        ({"alpha": 1e308, "softmask": True}, "alpha"),
        ({"wiener_eps": 0}, "wiener_eps"),
        ({"wiener_eps": "1e-10"}, "wiener_eps"),
        ({"wiener_eps": float("nan")}, "wiener_eps"),
        ({"targets": 3}, "names"),
        ({"targets": [b"bass"]}, "names"),
        ({"targets": ["guitar"]}, "no target 'guitar'"),
        ({"residual": 3}, "residual"),
        ({"residual": ["rest"]}, "residual"),
        ({"residual": "x" * 300}, "names of files"),
        ({"residual": "\ud800"}, "names of files"),
    ],
)
def test_options_that_do_not_fit(models, options, message):
    with pytest.raises(UsageError, match=message):
        Separator(models, **{"context": "cpu", **options})


@pytest.mark.parametrize(
    "options",
    [{"segment": float("inf")}, {"segment": 1e308, "overlap": 1e307}, {"wiener_win_len": 10**4000}, {"targets": "bass"}]
    + [{"niter": np.int64(1), "segment": np.float32(60)}, {"residual": os.fsdecode(b"\xff")}],
    ids=str,
)
def test_options_that_are_only_odd(models, options):
    audio = song(1000)
    for stem in Separator(models, **{"context": "cpu", **options})(audio, RATE).values():
        assert stem.shape == audio.shape


def test_models_that_are_none(models):
    other = trained.described(random_params(), ["speech"], N_HOP // 2, RATE)
    for several in ([], None, "umxl", [None], [*models, other]):
        with pytest.raises(UsageError, match="models"):
            Separator(several, context="cpu")
    with pytest.raises(UsageError, match="a name, a folder or a file"):
        Separator.load(3)


def test_a_hop_must_not_leave_gaps():
    model = trained.described(random_params(), ["bass"], N_FFT // 2 + 1, RATE)
    with pytest.raises(UsageError, match="gaps"):
        Separator([model], context="cpu")


def test_the_same_audio_gives_the_same_stems_and_stays_as_it_is(models):
    audio = song()
    before = audio.copy()
    separator = Separator(models, context="cpu", niter=2)
    stems = stack(separator(audio, RATE))
    np.testing.assert_array_equal(audio, before)
    np.testing.assert_array_equal(stems, stack(separator(audio, RATE)))


def test_silence_stays_silence(models):
    audio = song(6000)
    audio[:, 2000:4000] = 0
    for stem in Separator(models, context="cpu", residual=True)(audio, RATE).values():
        assert not stem[:, 2000 + N_FFT : 4000 - N_FFT].any()
    for stem in Separator(models, context="cpu")(np.zeros((2, 1000), np.float32), RATE).values():
        assert not stem.any()


def test_a_residual_completes_the_mixture(models):
    audio = song()
    stems = Separator(models[:2], context="cpu", niter=0, residual="rest")(audio, RATE)
    assert list(stems) == [*TARGETS[:2], "rest"]
    np.testing.assert_allclose(sum(stems.values()), audio, atol=1e-6)
    one = Separator(models, ["bass"], context="cpu", niter=1, residual=True)(audio, RATE)
    assert list(one) == ["bass", "residual"]


def test_one_target_alone_is_not_filtered(models):
    audio = song()
    alone = Separator(models, ["bass"], context="cpu", niter=1)(audio, RATE)
    np.testing.assert_array_equal(alone["bass"], Separator(models, context="cpu", niter=0)(audio, RATE)["bass"])


def test_the_context_stays_as_it_is(models):
    """While stems are made piece by piece, too."""
    before = nn.Context(["cpu:half"], "CpuCachedArray")
    nn.set_default_context(before)
    stream = Separator(models, context="cpu", wiener_win_len=5).stream(lambda a, b: song()[:, a:b], 3, 4000)
    next(stream)
    assert nn.get_current_context().backend == before.backend
    list(stream)
    assert nn.get_current_context().backend == before.backend


# ---------------------------------------------------------------------------------------- segments


def segmented(models, **options):
    """A separator with segments of 40 windows of the filter, 10 of them overlapping."""
    window = 6 * N_HOP / RATE
    separator = Separator(models, context="cpu", wiener_win_len=6, segment=30 * window, overlap=10 * window, **options)
    assert (separator.segment, separator.overlap) == (40 * 6 * N_HOP, 10 * 6 * N_HOP)
    return separator


@pytest.mark.parametrize("nb_channels", [1, 3])
def test_segments_lose_and_double_no_sample(nb_channels):
    """The stems of a soft mask add up to the mixture, at every length around the seams."""
    window = 2 * N_HOP / RATE
    options = {"segment": 7 * window, "overlap": 2 * window, "niter": 0, "softmask": True}
    separator = Separator(open_models(2), context="cpu", wiener_win_len=2, **options)
    assert (separator.segment, separator.overlap) == (9 * 2 * N_HOP, 2 * 2 * N_HOP)
    step = separator.segment - separator.overlap
    ends = [separator.segment, separator.segment + separator.overlap, separator.segment + step]
    for nb_timesteps in [end + d for end in ends for d in (-N_HOP, -1, 0, 1, N_FFT // 2)]:
        audio = song(nb_timesteps, nb_channels)
        pieces = list(separator.stream(lambda a, b, audio=audio: audio[:, a:b], *audio.shape))
        starts = [start for start, _ in pieces]
        assert starts == [0, *np.cumsum([piece.shape[2] for _, piece in pieces])[:-1]]
        total = np.concatenate([piece for _, piece in pieces], axis=2).sum(axis=0)
        np.testing.assert_allclose(total, audio, atol=1e-6, err_msg=f"{nb_timesteps} samples")


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_segments_without_or_with_little_overlap(overlap):
    window = 6 * N_HOP / RATE
    options = {"segment": 7 * window, "overlap": overlap * window, "niter": 0, "softmask": True}
    separator = Separator(open_models(2), context="cpu", wiener_win_len=6, **options)
    audio = song(4 * separator.segment + 11)
    np.testing.assert_allclose(sum(separator(audio, RATE).values()), audio, atol=1e-6)


@pytest.mark.parametrize("niter, at_seams", [(0, 3e-3), (1, 3e-2)])
def test_segments_agree_with_the_whole(models, niter, at_seams):
    """At a seam, the LSTM starts anew, and the filter's outermost frames miss their neighbours. Measured here: 4e-4 of
    the maximum without the filter, 3e-3 with it; and nothing where the LSTM has forgotten its start."""
    separator = segmented(models[:2], niter=niter)
    audio = song(3 * separator.segment)
    whole = stack(Separator(models[:2], context="cpu", wiener_win_len=6, niter=niter)(audio, RATE))
    difference = np.abs(stack(separator(audio, RATE)) - whole).max(axis=(0, 1)) / np.abs(whole).max()
    print(f"\nseams, niter {niter}: {difference.max():.1e} of the maximum")
    assert difference.max() < at_seams
    step = separator.segment - separator.overlap
    for start in range(step, len(difference) - separator.segment, step):
        middle = slice(start + separator.overlap * 3 // 2, start + step - separator.overlap // 2)
        assert difference[middle].max() < 1e-5
    assert difference.max() > 1e-5  # there were seams


@pytest.mark.parametrize("kind", ["ours", "others"])
def test_two_pieces_at_a_time_as_one_at_a_time(models, kind, monkeypatch):
    """No more samples than a segment has are there at once; the last piece, of five, has no other beside it."""
    window, several = 6 * N_HOP / RATE, of_every_kind(models)[kind]
    options = {"context": "cpu", "wiener_win_len": 6, "overlap": 2 * window}
    pairs, singles = (Separator(several, segment=length * window, **options) for length in (38, 16))
    assert (pairs.segment, pairs.piece) == (40 * 6 * N_HOP, 18 * 6 * N_HOP)
    assert singles.segment == singles.piece == pairs.piece
    audio, lengths, together, layer = song(4 * (pairs.piece - pairs.overlap) + 3000, 3), [], [], kernels.lstm.lstm_layer

    def read(start, stop):
        lengths.append(stop - start)
        return audio[:, start:stop]

    def count(*arguments):
        together.append(1 if arguments[6] is None else len(arguments[6]))
        layer(*arguments)

    expected = list(singles.stream(read, *audio.shape))
    assert lengths[:4] == [pairs.piece] * 4 and len(lengths) == 5
    monkeypatch.setattr(kernels.lstm, "lstm_layer", count)
    found, ahead = [], []
    lengths.clear()
    for piece in pairs.stream(read, *audio.shape):
        found.append(piece)
        ahead.append(sum(lengths) - found[-1][0])
    assert max(ahead) <= pairs.segment and lengths[:4] == [pairs.piece] * 4 and len(lengths) == 5
    if kind == "ours":  # two pairs of channels, of each target
        assert together == SIZES["nb_layers"] * 2 * len(models) * [2] * 2 + SIZES["nb_layers"] * 2 * len(models) * [1]
    assert [start for start, _ in found] == [start for start, _ in expected]
    for (_, got), (_, alone) in zip(found, expected):
        np.testing.assert_array_equal(got, alone)


def test_short_recordings_are_not_cut(models):
    separator = segmented(models)
    audio = song(separator.segment)
    whole = Separator(models, context="cpu", wiener_win_len=6)
    np.testing.assert_array_equal(stack(separator(audio, RATE)), stack(whole(audio, RATE)))


# ------------------------------------------------------------------------------- several recordings

LENGTHS = [(3000, 2), (1, 2), (5000, 1), (4000, 3), (130, 2), (5000, 2)]  # samples, channels


def of_every_kind(models):
    """Models of one target, of several with bridges, of a class that is not ours; and all in one ensemble."""
    description = {**models[0].description, "class": "networks.py:Deeper"}
    deeper = trained.Model(description, networks.Deeper)
    joint = trained.described(joint_params(**SIZES), TARGETS, N_HOP, RATE)
    return {"ours": models, "joint": [joint], "others": [deeper], "all": [*models, joint, deeper]}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["ours", "joint", "others", "all"])
def test_together_as_one_at_a_time(models, kind, plain):
    context.set_plain(plain)
    separator = Separator(of_every_kind(models)[kind], context="cpu", niter=1, residual=True)
    recordings = [song(*shape, seed=k) for k, shape in enumerate(LENGTHS)]
    together = list(separator.together(iter(recordings), RATE))
    assert len(together) == len(recordings)
    for got, recording in zip(together, recordings):
        alone = separator(recording, RATE)
        assert list(got) == list(alone)
        np.testing.assert_allclose(stack(got), stack(alone), rtol=0, atol=1e-6 if plain else 0)


@pytest.mark.parametrize("rate", [RATE, 11025])
def test_as_many_together_as_a_segment_is_long(models, rate, monkeypatch):
    """The next ones are not even read before; longer ones go segment by segment."""
    together, layer = [], kernels.lstm.lstm_layer

    def count(*arguments):
        together.append(1 if arguments[6] is None else len(arguments[6]))
        layer(*arguments)

    monkeypatch.setattr(kernels.lstm, "lstm_layer", count)
    separator = segmented(models[:1])
    lengths = [round(part * separator.segment * rate / RATE) for part in (0.3, 0.3, 0.3, 0.3, 0.4, 1.5, 0.5, 0.4)]
    read, seen = [], []

    def recordings():
        for length in lengths:
            read.append(length)
            yield song(length)

    for got in separator.together(recordings(), rate):
        seen.append((len(read), sum(together) // SIZES["nb_layers"], max(together, default=0)))
        assert stack(got).shape == (1, 2, lengths[len(seen) - 1])
        together.clear()
    # a group is known to be full when the next one is read; the long one has two segments
    assert seen == [(4, 3, 3), *[(4, 0, 0)] * 2, (6, 2, 2), (6, 0, 0), (7, 2, 1), (8, 2, 2), (8, 0, 0)]


def test_waveforms_one_after_another():
    model = trained.Model(
        {"class": "w.py:W", "options": {}, "targets": ["bass", "vocals"], "nb_channels": 2, "sample_rate": RATE,
         "n_fft": N_FFT, "n_hop": N_HOP}, networks.Wave,
    )  # fmt: skip
    separator = Separator([model], context="cpu", residual=True)
    recordings = [song(4000), song(3000, 1)]
    together = list(separator.together(recordings, RATE))
    assert len(together) == len(recordings)
    for got, recording in zip(together, recordings):
        np.testing.assert_array_equal(stack(got), stack(separator(recording, RATE)))


def test_a_bad_recording_among_others(models):
    together = Separator(models, context="cpu").together([song(), song()[0]], RATE)
    with pytest.raises(UsageError, match="expected floats"):
        next(together)


# ------------------------------------------------------------------------------------- joint models


def joint_params(**sizes):
    params = {}
    for seed, target in enumerate(TARGETS):
        for name, value in random_params(seed, **sizes).items():
            first, slash, rest = name.partition("/")
            params[f"{first}_{target}{slash}{rest}"] = value
    return params


def test_a_joint_model_is_its_formula():
    """X-UMX in NumPy: averages over the targets before and after the LSTMs, here of one layer and direction."""
    rng = np.random.default_rng(0)
    X = rng.uniform(0, 2, (7, 1, 2, SIZES["nb_bins"])).astype(np.float32)
    sizes = {"nb_layers": 1, "unidirectional": True}
    nets = [random_params(seed, **sizes) for seed in range(4)]

    def bn(p, name, h):
        beta, gamma, mean, var = (p[f"{name}/bn/{key}"][0, 0] for key in ("beta", "gamma", "mean", "var"))
        return (h - mean) / np.sqrt(var + 1e-5) * gamma + beta

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def lstm(p, x):
        weight, bias = p["lstm/weight_l0"][0], (p["lstm/bias_ih_l0"] + p["lstm/bias_hh_l0"])[0]
        h = c = np.zeros(bias.shape[1])
        states = []
        for frame in x:
            i, f, g, o = weight @ np.concatenate([frame, h]) + bias
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            states.append(h)
        return np.array(states)

    reduced = []
    for p in nets:
        x = ((X[:, 0, :, : SIZES["max_bin"]] + p["input_mean"]) * p["input_scale"]).reshape(len(X), -1)
        reduced.append(np.tanh(bn(p, "fc1", x.astype(np.float64) @ p["fc1/affine/W"])))
    h = np.mean(reduced, axis=0)
    both = np.concatenate([h, np.mean([lstm(p, h) for p in nets], axis=0)], axis=1)
    variable = nn.Variable.from_numpy_array(X)
    joint = trained.described(joint_params(**sizes), TARGETS, N_HOP, RATE)
    estimates = joint(variable)
    nn.forward_all(list(estimates.values()))
    assert tuple(estimates) == TARGETS
    for (target, estimate), p in zip(estimates.items(), nets):
        z = bn(p, "fc3", np.maximum(0, bn(p, "fc2", both @ p["fc2/affine/W"])) @ p["fc3/affine/W"]).reshape(X.shape)
        expected = np.maximum(0, z * p["output_scale"] + p["output_mean"]) * X
        np.testing.assert_allclose(estimate.d, expected, atol=1e-5 * expected.max(), err_msg=target)


def test_a_joint_model_separates(tmp_path):
    weights.save(tmp_path / "x-umx.h5", joint_params(nb_bins=1025))
    audio = song(9000)
    stems = Separator.load(tmp_path / "x-umx.h5", context="cpu")(audio, 44100)
    assert list(stems) == list(TARGETS)
    some = Separator.load(tmp_path / "x-umx.h5", ["other", "drums"], niter=0, context="cpu")(audio, 44100)
    assert list(some) == ["other", "drums"]
    whole = Separator.load(tmp_path / "x-umx.h5", niter=0, context="cpu")(audio, 44100)
    for name in some:
        np.testing.assert_array_equal(some[name], whole[name])
    with pytest.raises(UsageError, match="no target speech"):
        Separator.load(tmp_path / "x-umx.h5", "speech", context="cpu")


# --------------------------------------------------------------------------------- folders and files


def make_folder(folder, targets=TARGETS, extension=".h5", first_seed=0, config=None, **sizes):
    """As `train.py` (.h5) or openunmix (.pth) leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, target in enumerate(targets, start=first_seed):
        name = target if extension == ".h5" else f"{target}-0123abcd"
        weights.save(folder / f"{name}{extension}", random_params(seed, **sizes))
        (folder / f"{target}.json").write_text('{"args": {}}')
    basic = {"nfft": N_FFT, "nhop": N_HOP, "sample_rate": RATE, "nb_channels": sizes.get("nb_channels", 2)}
    (folder / "separator.json").write_text(json.dumps(basic if config is None else {**basic, **config}))
    return folder


def write_sony(path, params):
    """The names and shapes of Sony's NNabla code."""
    nb_layers = sum(name.startswith("lstm/weight") for name in params)
    with h5py.File(path, "w") as file:
        for name, value in params.items():
            if not name.startswith("lstm"):
                file[name] = value
        file["lstm/lstm/weight_l0"] = params["lstm/weight_l0"]
        file["lstm/lstm/weight"] = np.stack([params[f"lstm/weight_l{k}"] for k in range(1, nb_layers)])
        file["lstm/lstm/bias"] = np.stack(
            [params[f"lstm/bias_ih_l{k}"] + params[f"lstm/bias_hh_l{k}"] for k in range(nb_layers)]
        )


def test_every_kind_of_model_gives_the_same_stems(tmp_path, models):
    audio = song()
    expected = stack(Separator(models, context="cpu")(audio, RATE))
    for extension in (".h5", ".pth"):
        folder = make_folder(tmp_path / extension, TARGETS[::-1], extension, config={"sample_rate": 8000.0})
        for number, target in enumerate(TARGETS):  # the order in which they were trained does not matter
            (path,) = folder.glob(f"{target}*{extension}")
            weights.save(path, random_params(number))
        separator = Separator.load(folder, context="cpu")
        assert separator.targets == list(TARGETS)
        np.testing.assert_array_equal(stack(separator(audio, RATE)), expected)
    sony = tmp_path / "sony"
    sony.mkdir()
    for number, target in enumerate(TARGETS):
        write_sony(sony / f"{target}.h5", random_params(number))
    (sony / "separator.json").write_text(json.dumps({"nhop": N_HOP, "sample_rate": RATE}))
    np.testing.assert_allclose(stack(Separator.load(sony, context="cpu")(audio, RATE)), expected, atol=1e-6)
    path = tmp_path / "sony_umx_bass_mse.h5"  # a file alone: the STFT is Sony's, the target in the name
    write_sony(path, random_params(nb_bins=2049))
    alone = Separator.load(path, context="cpu")
    assert (alone.targets, alone.n_fft, alone.n_hop, alone.sample_rate) == (["bass"], 4096, 1024, 44100)


def test_load_takes_its_arguments_in_the_order_of_the_contract(tmp_path):
    folder = make_folder(tmp_path)
    separator = Separator.load(str(folder), "bass", 2, True, "rest", 7, "cpu")
    assert (separator.targets, separator.sources) == (["bass"], ["bass", "rest"])
    assert (separator.niter, separator.softmask, separator.residual, separator.wiener_win_len) == (2, True, True, 7)
    assert Separator.load(folder, ["other", "bass"], context="cpu").targets == ["other", "bass"]


def test_targets_of_ones_own(tmp_path):
    folder = make_folder(tmp_path, ["accompaniment", "vocals"])
    assert Separator.load(folder, context="cpu").targets == ["vocals", "accompaniment"]
    (folder / "separator.json").write_text(
        json.dumps({"nhop": N_HOP, "sample_rate": RATE, "targets": ["accompaniment"]})
    )
    assert Separator.load(folder, context="cpu").targets == ["accompaniment"]


def spoil(folder, name, content):
    path = folder / name
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        weights.save(path, random_params(**content))
    else:
        path.write_bytes(content)


EVIL = b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00touchx\x85R."
SPOILT = [
    ("bass.h5", None, ["bass"], "no weights of the target 'bass'"),
    ("bass.h5", b"", None, "bass.h5"),
    ("bass.h5", EVIL, None, "posix.system, which is refused"),
    ("bass.h5", {"hidden_size": 6, "nb_bins": 65, "max_bin": 60}, None, "bass.h5 has nfft 128"),
    ("bass.h5", {"nb_channels": 1}, None, "bass.h5 has nb_channels 1"),
    ("bass-0123abcd.pth", {}, None, None),  # beside bass.h5, which counts
    ("separator.json", b"[]", None, "separator.json"),
    ("separator.json", b"{", None, "cannot read"),
    ("separator.json", b'{"nhop": 64}', None, "lacks sample_rate"),
    ("separator.json", b'{"nhop": 0, "sample_rate": 8000}', None, "nhop 0"),
    ("separator.json", b'{"nhop": 64, "sample_rate": "8000"}', None, "sample_rate '8000'"),
    ("separator.json", b'{"nhop": 64, "sample_rate": NaN}', None, "sample_rate nan"),
    ("separator.json", b'{"nhop": 64, "sample_rate": 8000, "nfft": 512}', None, "nfft 256, the separator 512"),
    ("separator.json", b'{"nhop": 64, "sample_rate": 8000, "targets": "bass"}', None, "list of names"),
    ("separator.json", b'{"nhop": 64, "sample_rate": 8000, "targets": ["guitar"]}', None, "'guitar'"),
    ("x", b"", ["*"], "no weights of the target '*'"),
    ("x", b"", ["../x"], "the target '../x' cannot name a file"),
]


@pytest.mark.parametrize("name, content, targets, message", SPOILT, ids=lambda value: str(value)[:40])
def test_a_spoilt_folder(name, content, targets, message, tmp_path, capsys):
    folder = make_folder(tmp_path / "model", ["vocals", "bass"])
    spoil(folder, name, content)
    soundfile.write(tmp_path / "song.wav", song().T, RATE)
    command = [str(tmp_path / "song.wav"), "--model", str(folder), "--outdir", str(tmp_path / "out"), "--quiet"]
    command += ["--targets", *targets] if targets else []
    if message is None:
        separate.main(command)
        return
    with pytest.raises(SystemExit) as stop:
        separate.main(command)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not Path("x").exists()


def test_several_files_of_a_target(tmp_path):
    folder = make_folder(tmp_path, ["bass"], ".pth")
    shutil.copy(folder / "bass-0123abcd.pth", folder / "bass-89abcdef.pth")
    with pytest.raises(UsageError, match="several files of the target 'bass'"):
        Separator.load(folder, context="cpu")


# ------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A song of half a second in several formats."""
    root = tmp_path_factory.mktemp("recordings")
    for extension in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(root / f"song.{extension}", song().T, RATE)
    ffmpeg(root / "song.wav", root / "song.m4a")
    return root


def ffmpeg(source, *destination):
    subprocess.run(["ffmpeg", "-y", "-v", "error", "-i", source, *destination], check=True)


def run(folder, outdir, *options):
    """Separate, quietly and on the CPU; later options win."""
    separate.main(["--model", str(folder), "--outdir", str(outdir), "--context", "cpu", "--quiet", *map(str, options)])


def read(folder):
    """{name of the file: samples (nb_channels, nb_timesteps)} of all stems below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): soundfile.read(path, always_2d=True)[0].T for path in paths}


def names(song_name="song", stems=TARGETS, extension="wav"):
    return {f"{song_name}/{stem}.{extension}" for stem in stems}


def test_the_command_writes_what_the_separator_gives(folder, recordings, tmp_path):
    run(folder, tmp_path, recordings / "song.wav")
    written = read(tmp_path)
    audio, rate = soundfile.read(recordings / "song.wav", dtype="float32")
    expected = Separator.load(folder, context="cpu")(audio.T, rate)
    assert set(written) == names()
    for name, stem in expected.items():
        np.testing.assert_array_equal(written[f"song/{name}.wav"], stem)
        info = soundfile.info(tmp_path / f"song/{name}.wav")
        assert (info.samplerate, info.subtype) == (RATE, "FLOAT")
    assert [path.name for path in tmp_path.iterdir()] == ["song"]  # nothing temporary


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3", "m4a"])
def test_formats(folder, recordings, tmp_path, extension):
    run(folder, tmp_path, recordings / f"song.{extension}", "--targets", "bass")
    (stem,) = read(tmp_path).values()
    padded = extension == "m4a"  # its last frame is filled up, and nothing says by how much
    assert stem.shape[0] == 2 and (4000 <= stem.shape[1] < 5024 if padded else stem.shape[1] == 4000)
    run(folder, tmp_path / "reference", recordings / "song.wav", "--targets", "bass")
    (expected,) = read(tmp_path / "reference").values()
    limit = {"wav": 0, "flac": 1e-3}.get(extension, 0.5)  # the others lose some
    assert np.sqrt(np.mean((stem[:, :4000] - expected) ** 2)) <= limit * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize(
    "rate, nb_channels, nb_timesteps", [(48000, 2, 9001), (44100, 1, 7003), (RATE, 3, 5), (96000, 2, 1)]
)
def test_stems_have_rate_channels_and_length_of_the_recording(folder, tmp_path, rate, nb_channels, nb_timesteps):
    soundfile.write(tmp_path / "song.wav", song(nb_timesteps, nb_channels).T, rate, "FLOAT")
    run(folder, tmp_path / "out", tmp_path / "song.wav")
    audio = soundfile.read(tmp_path / "song.wav", always_2d=True)[0].T
    expected = Separator.load(folder, context="cpu")(audio, rate)
    for name, stem in expected.items():
        written, written_rate = soundfile.read(tmp_path / f"out/song/{name}.wav", always_2d=True)
        assert written_rate == rate and written.T.shape == (nb_channels, nb_timesteps)
        np.testing.assert_allclose(written.T, stem, atol=1e-5)


def test_long_recordings_are_read_and_written_in_blocks(folder, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "song.flac", song(9001).T, 11025, "PCM_24")
    run(folder, tmp_path / "whole", tmp_path / "song.flac")
    monkeypatch.setattr(audio, "BLOCK", 1000)
    run(folder, tmp_path / "blocks", tmp_path / "song.flac")
    whole, blocks = read(tmp_path / "whole"), read(tmp_path / "blocks")
    for name in names():
        np.testing.assert_allclose(blocks[name], whole[name], atol=1e-6)


@pytest.mark.parametrize("extension", ["wav", "mp3", "m4a"])
def test_start_and_duration_each_alone(folder, recordings, tmp_path, extension):
    def cut(first, last):
        whole = np.concatenate(list(audio._open_audio(recordings / f"song.{extension}", 0, None)[2]), axis=1)
        return Separator.load(folder, ["bass"], context="cpu")(whole[:, first:last], RATE)["bass"]

    for number, (options, first, last) in enumerate(
        [
            (["--start", "0.1"], 800, None),
            (["--duration", "0.2"], 0, 1600),
            (["--start", "0.05", "--duration", "0.2"], 400, 2000),
            (["--start", "0.4", "--duration", "1000"], 3200, None),
            (["--start", "0.00001"], 0, None),
        ]
    ):
        outdir = tmp_path / str(number)
        run(folder, outdir, recordings / f"song.{extension}", "--targets", "bass", *options)
        np.testing.assert_allclose(read(outdir)["song/bass.wav"], cut(first, last), atol=1e-6)


def test_mp3_that_does_not_say_how_long_it_is(folder, tmp_path):
    """libsndfile guesses from the first frame, wrongly if the rate varies."""
    soundfile.write(tmp_path / "loud first.wav", np.concatenate([song(40000), 0.001 * song(80000)], axis=1).T, 44100)
    ffmpeg(tmp_path / "loud first.wav", "-q:a", "4", "-write_xing", "0", tmp_path / "song.mp3")
    assert soundfile.info(tmp_path / "song.mp3").frames < 100000
    run(folder, tmp_path / "out", tmp_path / "song.mp3", "--targets", "bass")
    assert soundfile.info(tmp_path / "out/song/bass.wav").frames >= 120000


def test_several_inputs_and_folders(folder, recordings, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    for name in ("b.wav", "a.flac", "notes.txt", "._b.wav"):
        shutil.copy(recordings / "song.flac", tmp_path / "more" / name)
    run(folder, tmp_path / "out", recordings / "song.wav", tmp_path / "more", recordings / "song.mp3")
    assert set(read(tmp_path / "out")) == set.union(*map(names, ("song.wav", "song.mp3", "a", "b")))
    shutil.copy(recordings / "song.wav", tmp_path / "song.wav")
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ([tmp_path / "song.wav", recordings / "song.wav"], "several inputs named song.wav"),
        ([tmp_path / "song.wav", tmp_path / "empty"], "no audio files in the folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(folder, tmp_path / "no", *inputs)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_several_at_a_time(folder, recordings, tmp_path, capfd):
    """The same files, messages and status as one at a time; one bar for all of them."""
    for name in ("1.wav", "2.wav", "4.wav"):
        shutil.copy(recordings / "song.wav", tmp_path / name)
    soundfile.write(tmp_path / "3.wav", 9 * song().T, RATE, "FLOAT")
    (tmp_path / "3 bad.wav").write_text("none at all")
    found, said = [], []
    for number in (1, 2):
        outdir = tmp_path / "out"
        with pytest.raises(SystemExit) as stop:
            run(folder, outdir, tmp_path, "--subtype", "16", "--cores", number, "--threads", number)
        found.append((stop.value.code, {path.relative_to(outdir): path.read_bytes() for path in outdir.rglob("*.wav")}))
        said.append(sorted(line for line in capfd.readouterr().err.splitlines() if "compiling" not in line))
        outdir.rename(tmp_path.parent / f"{tmp_path.name} {number}")
    assert found[0] == found[1] and found[0][0] == 2 and len(found[0][1]) == 4 * len(TARGETS)
    assert said[0] == said[1] and len(said[0]) == 2 and "3.wav: stems scaled by" in said[0][0]


def test_several_at_a_time_interrupted(folder, tmp_path):
    """Ctrl-C on a terminal, which reaches all processes; nothing half is left."""
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", song(120 * RATE).T, RATE)
    command = [sys.executable, separate.__file__, tmp_path, "--outdir", tmp_path / "out", "--model", folder]
    command += ["--context", "cpu", "--cores", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    limit = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*/.*.partial"))) < 2:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.splitlines()[-1] == "separate.py: interrupted"
    assert "Traceback" not in error and "Separating:   0%" in error
    assert not list((tmp_path / "out").iterdir())


def test_where_stems_go_by_default(folder, recordings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    separate.main([str(recordings / "song.wav"), "--model", str(folder) + "/", "--quiet"])
    assert set(read(tmp_path)) == names("song_tiny")
    monkeypatch.chdir(folder)
    separate.main([str(recordings / "song.wav"), "--model", ".", "--quiet"])
    assert {path.name for path in (folder / "song_tiny").iterdir()} == {f"{target}.wav" for target in TARGETS}
    shutil.rmtree(folder / "song_tiny")


@pytest.mark.parametrize("options", [["--subtype", "16"], ["--subtype", "24"], ["--ext", "flac"]], ids=" ".join)
def test_nothing_clips_in_silence(folder, tmp_path, capsys, options):
    audio = song() * 9
    soundfile.write(tmp_path / "song.wav", audio.T, RATE, "FLOAT")
    run(folder, tmp_path / "float", tmp_path / "song.wav")
    assert capsys.readouterr().err == ""
    run(folder, tmp_path / "out", tmp_path / "song.wav", *options)
    error = capsys.readouterr().err
    expected, written = read(tmp_path / "float"), read(tmp_path / "out")
    peak = max(np.abs(stem).max() for stem in expected.values())
    assert peak > 1 and f"scaled by {0.999 / peak:.3f}" in error and error.count("\n") == 1
    for name, stem in written.items():  # all alike
        wanted = expected[f"{name.rsplit('.')[0]}.wav"] * (0.999 / peak)
        np.testing.assert_allclose(stem, wanted, atol=2**-15 if "16" in options else 2**-23)


def test_stems_that_fit_are_not_scaled(folder, recordings, tmp_path, capsys):
    run(folder, tmp_path / "out", recordings / "song.wav", "--subtype", "16")
    run(folder, tmp_path / "float", recordings / "song.wav")
    assert capsys.readouterr().err == ""
    written, expected = read(tmp_path / "out"), read(tmp_path / "float")
    for name in names():
        np.testing.assert_allclose(written[name], expected[name], atol=2**-15)


def test_aggregate(folder, recordings, tmp_path):
    run(folder, tmp_path / "stems", recordings / "song.wav", "--residual", "rest")
    aggregate = {"vocals": ["vocals"], "accompaniment": ["drums", "bass", "other", "rest"]}
    options = ["--residual", "rest", "--aggregate", json.dumps(aggregate)]
    run(folder, tmp_path / "sums", recordings / "song.wav", *options)
    stems, sums = read(tmp_path / "stems"), read(tmp_path / "sums")
    assert set(sums) == names(stems=aggregate)
    for name, parts in aggregate.items():
        expected = sum(stems[f"song/{part}.wav"] for part in parts)
        np.testing.assert_allclose(sums[f"song/{name}.wav"], expected, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "3", '{"a": "bass"}', '{"a": []}', '{"a": ["guitar"]}', '{"a": [["bass"]]}', '{"../a": ["bass"]}']
    + ['{"": ["bass"]}', '{"a": 3}', '{"a/b": ["bass"]}', '{"\\ud800": ["bass"]}', '{"a": {"bass": 1}}', "NaN"]
    + [f'{{"{"x" * 300}": ["bass"]}}', "[" * 100000, '{"a": [null]}', '{".": ["bass"]}'],
    ids=lambda text: text[:20],
)
def test_an_aggregate_that_is_none(folder, recordings, tmp_path, capsys, text):
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out", recordings / "song.wav", f"--aggregate={text or ' '}")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--aggregate" in error and "vocals, drums, bass, other" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- flags have effects

# A run with these options, and the options of the run that it must differ from.
EFFECTS = {
    "model": (["--model", "{other}"], []),
    "targets": (["--targets", "vocals", "bass"], []),
    "niter": (["--niter", "2"], []),
    "softmask": (["--softmask"], []),
    "alpha": (["--softmask", "--alpha", "2"], ["--softmask"]),
    "wiener_win_len": (["--wiener-win-len", "0"], ["--wiener-win-len", "5"]),
    "wiener_eps": (["--wiener-eps", "0"], []),
    "residual": (["--residual", "rest"], []),
    "aggregate": (["--aggregate", '{"bass": ["bass", "drums"]}'], []),
    "start": (["--start", "0.1"], []),
    "duration": (["--duration", "0.1"], []),
    "subtype": (["--subtype", "16"], []),
    "plain": (["--plain"], []),
}
# Those whose effect is tested elsewhere in this file (or the one named), by the test named, or cannot be.
ELSEWHERE = {
    "help": "argparse's own",
    "inputs": "test_several_inputs_and_folders",
    "outdir": "test_where_stems_go_by_default",
    "cores": "test_several_at_a_time",
    "ext": "test_nothing_clips_in_silence",
    "model_dir": "tests/test_pretrained.py",
    "network": "tests/test_networks.py",
    "network_options": "tests/test_networks.py",
    "segment": "test_long_recordings_are_cut",
    "context": "test_bad_options",
    "device_id": "cannot be tested without a GPU: it names one of several",
    "threads": "test_threads",
    "quiet": "test_quiet",
    "sum_to_mixture": "tests/test_stems.py",
    "karaoke": "tests/test_stems.py",
    "stream": "tests/test_streaming.py",
    "play": "tests/test_streaming.py",
    "causal_wiener": "tests/test_streaming.py",
}


def test_every_flag_has_a_test():
    flags = {action.dest for action in args.separate_parser()._actions}
    assert flags == set(EFFECTS) | set(ELSEWHERE)
    assert all(reason in globals() for reason in ELSEWHERE.values() if reason.startswith("test_"))


@pytest.mark.parametrize("name", EFFECTS)
def test_flag_changes_the_stems(folder, recordings, tmp_path, name):
    make_folder(tmp_path / "other", first_seed=10)
    options, base = ([text.replace("{other}", str(tmp_path / "other")) for text in part] for part in EFFECTS[name])
    run(folder, tmp_path / "base", recordings / "song.wav", *base)
    run(folder, tmp_path / "run", recordings / "song.wav", *options)
    a, b = read(tmp_path / "base")["song/bass.wav"], read(tmp_path / "run")["song/bass.wav"]
    assert a.shape != b.shape or (a != b).any()
    if name == "plain":
        np.testing.assert_allclose(a, b, atol=1e-5)
    if name in ("targets", "residual"):
        assert set(read(tmp_path / "run")) == names(stems=[*TARGETS, "rest"] if name == "residual" else options[1:])


def test_long_recordings_are_cut(tmp_path):
    """Of 50 s: --segment is at least 30 s. A low rate keeps the test short."""
    model = make_folder(tmp_path / "model", ["bass"], config={"sample_rate": 500})
    soundfile.write(tmp_path / "song.wav", song(25000).T, 500, "FLOAT")
    for number, seconds in enumerate((30, 60)):
        run(model, tmp_path / str(number), tmp_path / "song.wav", "--segment", seconds, "--wiener-win-len", "5")
    a, b = (read(tmp_path / str(number))["song/bass.wav"] for number in range(2))
    assert a.shape == b.shape == (2, 25000) and 0 < np.abs(a - b).max() < 1e-2


def test_threads(folder, recordings, tmp_path):
    for number in (1, 3):
        run(folder, tmp_path / str(number), recordings / "song.wav", "--threads", number)
        assert kernels.threads.get_threads() == number
    one, three = read(tmp_path / "1"), read(tmp_path / "3")
    for name in names():
        np.testing.assert_allclose(one[name], three[name], atol=1e-5)


def test_quiet(folder, tmp_path, capfd):
    soundfile.write(tmp_path / "song.wav", song(2 * RATE).T, RATE)
    run(folder, tmp_path, tmp_path / "song.wav")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    separate.main([str(tmp_path / "song.wav"), "--model", str(folder), "--outdir", str(tmp_path)])
    captured = capfd.readouterr()
    assert captured.out == f"{tmp_path / 'song.wav'} -> {tmp_path / 'song'}\n"
    assert "song.wav: 100%" in captured.err


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "umy"], "unknown model 'umy'"),
        (["--model", "{tmp}"], "no weights"),
        (["--model", "{tmp}/text.wav"], "text.wav: neither NNabla's .h5 nor torch's .pth"),
        (["--targets", "guitar"], "'guitar'"),
        (["--niter", "-1"], "at least 0"),
        (["--alpha", "0"], "more than 0"),
        (["--alpha", "2"], "softmask"),
        (["--wiener-eps", "-1"], "at least 0"),
        (["--wiener-eps", "2"], "more than 1"),
        (["--wiener-eps", "1e-20"], "wiener_eps is 1e-20: expected 2.22e-16 to 1"),
        (["--softmask", "--targets", "bass"], "it needs two of them"),
        (["--residual", "bass"], "two stems of one name"),
        (["--residual", "a/b"], "names of files"),
        (["--start", "-1"], "at least 0"),
        (["--start", "nan"], "at least 0"),
        (["--duration", "0"], "more than 0"),
        (["--segment", "5"], "at least 30"),
        (["--ext", "flac", "--subtype", "float"], "flac holds integers"),
        (["--ext", "mp3"], "invalid choice"),
        (["--context", "cudnn"], "--context cudnn does not work here"),
        (["--unknown"], "unrecognized arguments"),
        (["--outdir", "{tmp}/text.wav/below"], "cannot write to the output folder"),
        (["--niter", "1" + 20 * "0"], "more than 1000"),
        (["--softmask", "--alpha", "1e308"], "more than 10"),
        (["--residual", "x" * 300], "names of files"),
        (["--residual", ".."], "names of files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(folder, recordings, tmp_path, capsys, options, message):
    (tmp_path / "text.wav").write_text("no audio")
    options = [option.format(tmp=tmp_path) for option in options]
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out", recordings / "song.wav", *options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.wav"]


def make_bad(kind, recordings, path):
    """A recording that is none, of this kind; returns its path."""
    extension = kind.split()[-1] if kind.split()[-1] in ("flac", "ogg", "mp3", "m4a", "aiff") else "wav"
    path = path / f"bad.{extension}"
    if kind.startswith("cut"):
        whole = recordings / f"song.{extension}"
        if extension == "m4a":
            ffmpeg(whole, "-movflags", "+faststart", path)
        elif extension == "aiff":
            soundfile.write(path, song().T, RATE)
        else:
            shutil.copy(whole, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    elif kind == "text":
        path.write_text("no audio")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        (path / "inner.wav").mkdir(parents=True)
    elif kind == "picture":
        subprocess.run(
            ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=s=16x16:d=0.1", "-f", "mp4", path], check=True
        )
    elif kind != "missing":
        audio = song().T.copy()
        audio = audio[:0] if kind == "no samples" else audio
        if kind in ("nan", "inf", "huge"):
            audio[-1, 1] = {"nan": np.nan, "inf": -np.inf, "huge": 1e20}[kind]
        soundfile.write(path, audio, RATE, "FLOAT")
    return path


BAD = {
    "missing": "there is no file",
    "text": "is not audio",
    "empty": "is not audio",
    "picture": "is not audio",
    "no samples": "has no samples",
    "nan": "not finite",
    "inf": "not finite",
    "huge": "1e9",
    "folder": "there is no file",
    "cut wav": "is truncated",
    "cut aiff": "is truncated",
    "cut flac": "damaged or truncated",
    "cut ogg": "is truncated",
    "cut mp3": "is truncated",
    "cut m4a": "is truncated",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recording(folder, recordings, tmp_path, capfd, kind):
    """One clear line, exit status 2, nothing of it is left; the other songs are done."""
    bad = make_bad(kind, recordings, tmp_path)
    (tmp_path / "out" / "bad").mkdir(parents=True)
    (tmp_path / "out" / "bad" / "bass.wav").write_text("of yesterday")
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out", bad, recordings / "song.wav")
    error = capfd.readouterr().err
    assert stop.value.code == 2
    assert BAD[kind] in error and "bad" in error and error.count("\n") == 1
    assert (tmp_path / "out" / "bad" / "bass.wav").read_text() == "of yesterday"
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert found == {"bad", "bad/bass.wav", "song"} | names() or kind == "folder"
    if kind != "folder":
        with pytest.raises(SystemExit):  # where there was nothing, there is nothing
            run(folder, tmp_path / "new", bad)
        assert not list(tmp_path.glob("new/*"))


WRONG = {
    "0.wav": "is not audio",
    "65535.wav": "65535",
    os.fsdecode(b"\xff.wav"): "is not audio",
    "hls.mp3": "refers to other files",
    "missing.wav": "there is no file",
    "fast.wav": "sample rate",
    "pipe.wav": "not a regular file",
    "half.flac": "truncated",
}


@pytest.mark.parametrize(
    "while_working", [None, OSError(28, "No space left on device"), RuntimeError("odd\nindeed"), MemoryError()]
)
def test_a_batch_goes_on(folder, recordings, tmp_path, capfd, monkeypatch, while_working):
    """One line for each that is bad; the others are done; the status says whether it was the input's fault."""
    whole = (recordings / "song.wav").read_bytes()
    for name in WRONG:
        (tmp_path / name).write_text("none at all")
    for name, place, value in (
        ("0.wav", 22, b"\0\0"),
        ("65535.wav", 22, b"\xff\xff"),
        ("fast.wav", 24, b"\0\xca\x9a\x3b"),
    ):
        (tmp_path / name).write_bytes(whole[:place] + value + whole[place + len(value) :])
    (tmp_path / "hls.mp3").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "half.flac").write_bytes((recordings / "song.flac").read_bytes()[:9000])
    for name in ("missing.wav", "pipe.wav"):
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("first.wav", "last.wav", "middle.wav"):
        shutil.copy(recordings / "song.wav", tmp_path / name)
    inputs = [tmp_path / name for name in ("first.wav", *WRONG, "middle.wav", "last.wav")]
    if while_working:
        write = audio.write

        def fail(path, *arguments):
            if "middle" in str(path):
                raise while_working
            write(path, *arguments)

        monkeypatch.setattr(audio, "write", fail)
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out", *inputs, "--targets", "bass")
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == (1 if while_working else 2)
    assert len(lines) == len(WRONG) + bool(while_working)
    for (name, message), line in zip(WRONG.items(), lines):
        assert message in line and line.startswith("separate.py: ")
        assert name in line or not name.isascii()
    if while_working:
        assert "middle" in lines[-1]
    done = {"first", "last"} | ({"middle"} if not while_working else set())
    assert {path.name for path in (tmp_path / "out").iterdir()} == done
    assert set(read(tmp_path / "out")) == {f"{name}/bass.wav" for name in done}


def test_what_flac_cannot_hold_is_told_before_the_work(folder, tmp_path, capsys, monkeypatch):
    soundfile.write(tmp_path / "song.wav", song(1000, 9).T, RATE)
    monkeypatch.setattr(Separator, "stream", None)
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path / "out", tmp_path / "song.wav", "--ext", "flac")
    assert stop.value.code == 2 and "FLAC cannot hold 9 channels" in capsys.readouterr().err


def test_start_after_the_end(folder, recordings, tmp_path, capsys):
    for extension in ("wav", "mp3", "m4a"):
        for start in (100.0, 1e9):
            with pytest.raises(SystemExit) as stop:
                run(folder, tmp_path, recordings / f"song.{extension}", "--start", start)
            assert stop.value.code == 2 and f"has no samples after {start} s" in capsys.readouterr().err
        run(folder, tmp_path, recordings / f"song.{extension}", "--duration", "1e9")


def test_without_ffmpeg(folder, recordings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run(folder, tmp_path, recordings / "song.mp3")
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path, recordings / "song.m4a")
    assert stop.value.code == 2 and "there is no ffmpeg to try" in capsys.readouterr().err


@pytest.mark.parametrize("error", [UsageError("no"), OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_stems_are_replaced_together_or_not_at_all(folder, recordings, tmp_path, capsys, monkeypatch, error):
    run(folder, tmp_path, recordings / "song.wav")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.wav")}
    whole, count = audio.write, iter(range(9))

    def write(*arguments):
        whole(*arguments)
        if next(count) == 2:
            raise error

    monkeypatch.setattr(audio, "write", write)
    with pytest.raises(SystemExit):
        run(folder, tmp_path, recordings / "song.wav", "--niter", "0")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(list(tmp_path.rglob("*"))) == 5
    assert capsys.readouterr().err.count("\n") == 1


class Broken:
    """A separator whose stem is no number at one moment."""

    sources = targets = ["bass"]
    softmask, sample_rate = False, RATE

    def stream(self, read, nb_channels, nb_timesteps):
        stem = np.stack([read(0, nb_timesteps)])
        stem[0, 0, 10] = np.nan
        yield 0, stem[:, :, :100]
        yield 100, stem[:, :, 100:]


@pytest.mark.parametrize("subtype", ["float", "16"])
def test_stems_that_are_not_finite(recordings, tmp_path, subtype):
    with pytest.raises(UsageError, match="the stems of .*song.wav are not finite"):
        stems.write_stems(Broken(), recordings / "song.wav", tmp_path / "out", subtype=subtype)
    assert not (tmp_path / "out").exists()


def test_a_stem_that_would_take_the_place_of_a_recording(folder, recordings, tmp_path, capsys):
    (tmp_path / "bass").mkdir()
    shutil.copy(recordings / "song.wav", tmp_path / "bass" / "bass.wav")
    before = (tmp_path / "bass" / "bass.wav").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run(folder, tmp_path, tmp_path / "bass" / "bass.wav")
    assert stop.value.code == 2 and "would replace a recording" in capsys.readouterr().err
    with pytest.raises(UsageError, match="would replace a recording"):  # whoever calls it
        stems.write_stems(Broken(), tmp_path / "bass" / "bass.wav", tmp_path / "bass")
    assert (tmp_path / "bass" / "bass.wav").read_bytes() == before and len(list(tmp_path.rglob("*"))) == 2
    (tmp_path / "link.wav").symlink_to(tmp_path / "bass" / "bass.wav")
    with pytest.raises(UsageError, match="would replace a recording"):  # by another name
        stems.check_places([(tmp_path / "link.wav", tmp_path / "bass")], ["bass"], "wav")
    (tmp_path / "link").symlink_to(tmp_path / "bass")
    songs = [(Path("a.wav"), tmp_path / "bass"), (Path("b.wav"), tmp_path / "link")]
    with pytest.raises(UsageError, match="the stems of a.wav and of b.wav would go to the same folder"):
        stems.check_places(songs, ["vocals"], "wav")


@pytest.mark.parametrize(
    "errors, status",
    [
        ([UsageError("damaged"), None], 2),
        ([OSError(28, "No space left on device", "stem.wav"), None], 1),
        ([None, UsageError("damaged"), RuntimeError("of a network")], 1),
        ([None, None], None),
    ],
    ids=str,
)
def test_the_status_after_several_songs(folder, recordings, tmp_path, capsys, monkeypatch, errors, status):
    """1 if anything has failed at its work, 2 if all that is wrong is wrong with the input; a line for each."""
    for number in range(len(errors)):
        shutil.copy(recordings / "song.wav", tmp_path / f"{number}.wav")
    done = []

    def write_stems(separator, path, *arguments):
        done.append(path)
        if (error := errors[int(path.stem)]) is not None:
            raise error
        return 1.0

    monkeypatch.setattr(separate, "write_stems", write_stems)
    found = None
    try:
        run(folder, tmp_path / "out", *(tmp_path / f"{number}.wav" for number in range(len(errors))))
    except SystemExit as stop:
        found = stop.code
    assert found == status and len(done) == len(errors)
    assert capsys.readouterr().err.count("\n") == sum(error is not None for error in errors)


def test_the_script_itself(folder, recordings, tmp_path):
    """Without a traceback, and without what libraries write to the process's stderr by themselves."""
    bad = make_bad("cut mp3", recordings, tmp_path)
    command = [sys.executable, separate.__file__, bad, recordings / "song.wav", "--model", folder, "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if "compiling" not in line]
    assert lines == [f"separate.py: {bad} is truncated"]
    assert set(read(tmp_path / "song_tiny")) == {f"{target}.wav" for target in TARGETS}


def test_what_separation_does_not_need_is_not_imported():
    """Each of these takes a while to import, before the first sound."""
    slow = {"requests", "matplotlib", "pandas", "musdb", "museval", "mpi4py", "onnx", "scipy.stats", "scipy.signal"}
    script = f"import sys; import separate; print(sorted({slow} & sys.modules.keys()))"
    root = Path(separate.__file__).parent
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert result.stdout.endswith("[]\n"), result.stdout + result.stderr
