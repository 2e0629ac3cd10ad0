"""The files of examples/: each goes through the commands of docs/extensions.md, and computes what it says."""

import json
import re
import shlex
from pathlib import Path

import nnabla as nn
import numpy as np
import pytest
import soundfile
from formulas import float64_magnitudes

import data
import evaluate
import losses
import model
import separate
import solvers
import train
import trained
import weights
from examples import manifest

ROOT = Path(__file__).parents[1]
ALONE = ROOT / "examples" / "onnx_separate.py"  # no extension, but a way out: see docs/export.md and test_export.py
EXAMPLES = sorted({*(ROOT / "examples").glob("*.py")} - {ALONE})
EXTENSIONS = (ROOT / "docs" / "extensions.md").read_text()
SECTIONS = re.findall("^## (.*?)\n(.*?)(?=^## |\\Z)", EXTENSIONS, re.DOTALL | re.MULTILINE)
CPU = "--context cpu --quiet"
SMALL = f"{CPU} --threads 1 --nfft 256 --nhop 128 --seq-dur 0.1 --batch-size 4 --samples-per-track 2"


@pytest.mark.parametrize("title, section", SECTIONS, ids=[title for title, _ in SECTIONS])
def test_commands_of_a_section(songs, tmp_path, monkeypatch, capsys, title, section):
    """As they are written, with small sizes: one epoch, another after resuming, stems of a song, scores."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    Path("songs").symlink_to(songs)
    mixture = next((songs / "test").iterdir()) / "mixture.wav"
    Path("song.wav").symlink_to(mixture)
    ran = []
    (block,) = re.findall("```sh\n(.*?)```", section, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines():
        python, script, *options = shlex.split(line)
        ran.append(script)
        if script == "train.py":
            epochs = "2" if "--checkpoint" in options else "1"
            sizes = [] if "--network" in options or epochs == "2" else ["--hidden-size", "8"]  # of ours
            train.main([*options, *shlex.split(SMALL), *sizes, "--epochs", epochs])
        elif script == "data.py":
            data.main([*options, "--seq-dur", "0.1", "--quiet"])
        elif script == "examples/manifest.py":
            manifest.main(*options)
        else:
            {"separate.py": separate, "evaluate.py": evaluate}[script].main([*options, *shlex.split(CPU)])
    assert ran[-4:] == ["train.py", "train.py", "separate.py", "evaluate.py"], title
    (picture,) = tmp_path.glob("*/*.png")  # of the losses, beside their log
    log = json.loads(picture.with_suffix(".json").read_text())
    assert log["epochs_trained"] == 2 and np.isfinite(log["valid_loss_history"]).all()
    stems = {path.stem: soundfile.read(path)[0] for path in Path("stems").rglob("*.wav")}
    assert set(stems) - {"rest"} == set(log["network"]["targets"])
    audio, _ = soundfile.read(mixture)
    assert all(stem.shape == audio.shape and np.abs(stem).max() > 0 for stem in stems.values())
    if "conv_tasnet" in block:  # no filter: the residual is exactly what its estimates leave
        np.testing.assert_allclose(sum(stems.values()), audio, atol=1e-5)
    (summary,) = Path("evaluation").rglob("summary.json")
    scores = json.loads(summary.read_text())["scores"]
    assert all(np.isfinite(metrics["SDR"]) for group in scores.values() for metrics in group.values())


def test_every_example_is_short_and_shown():
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 60, path
        link = f"examples/{path.name}"
        assert f"]({link})" in (ROOT / "README.md").read_text(), f"README.md does not link {path.name}"
        assert any(f"](../{link})" in text and f"{link}" in text for _, text in SECTIONS), path
    assert len(SECTIONS) == len(EXAMPLES)
    assert len(ALONE.read_text().splitlines()) <= 90
    assert all(ALONE.name in (ROOT / name).read_text() for name in ("README.md", "docs/export.md"))


def test_what_runs_alone_imports_nothing_of_ours():
    names = re.findall(r"^(?:import|from) (\w+)", ALONE.read_text(), re.MULTILINE)
    others = {"argparse", "json", "math", "pathlib"}
    assert set(names) == {"numpy", "onnxruntime", "scipy", "soundfile"} | others


def example(name, targets, nb_channels=2, seed=0, **options):
    """A Model of a class of examples/, with initial values by this seed."""
    network = trained.read_network(f"{ROOT}/examples/{name}")
    description = {"class": network.name, "options": options, "targets": targets, "nb_channels": nb_channels}
    description.update(sample_rate=8000, n_fft=256, n_hop=64)
    nn.random.prng = np.random.RandomState(seed)
    statistics = {"input_mean": np.full(129, 0.5), "input_scale": np.full(129, 2.0)}
    return trained.Model(description, network.cls, statistics=statistics)


NETWORKS = [
    ("gru.py:Gru", {"size": 8}),
    ("shared.py:Shared", {"hidden_size": 8, "dropout": 0.0}),
    ("conv_tasnet.py:ConvTasNet", {"filters": 16, "bottleneck": 8, "hidden": 16, "blocks": 3, "repeats": 1}),
]


@pytest.mark.parametrize("name, options", NETWORKS, ids=[name for name, _ in NETWORKS])
def test_networks_learn(name, options):
    """Thirty steps on one batch, of tones in noise: the loss falls below half of what it was."""
    net = example(name, ["low", "high"], **options)
    rng = np.random.default_rng(0)
    t = np.arange(2000) / 8000
    low, high = (np.sin(2 * np.pi * f * t + rng.uniform(0, 6, (4, 2, 1))) for f in (200, 1500))
    y = 0.3 * np.stack([low, high], axis=1)
    x = y.sum(axis=1) + 0.01 * rng.standard_normal((4, 2, 2000))
    graph, solver = train.Graph(net, x.shape, test=False), solvers.Adam(net.variables(), 0.01, 0)
    losses = [float(train.train_step(graph, x, y, solver).data) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("nb_channels", [1, 2])
@pytest.mark.parametrize("nb_timesteps", [1, 7, 64, 500, 501])
def test_conv_tasnet_takes_any_number_of_timesteps(nb_channels, nb_timesteps):
    options = {"filters": 4, "bottleneck": 3, "hidden": 5, "blocks": 2, "repeats": 2}
    net = example("conv_tasnet.py:ConvTasNet", ["a", "b"], nb_channels, **options)
    x = np.random.default_rng(0).standard_normal((2, nb_channels, nb_timesteps)).astype(np.float32)
    params = {name: values.astype(np.float64) for name, values in net.get_parameters().items()}
    estimates = net.estimates(nn.Variable.from_numpy_array(x))
    nn.forward_all(list(estimates.values()))
    for number, target in enumerate("ab"):
        expected = np.stack([float64_tasnet(params, signal, "ab", 16, 2, 2)[number] for signal in x.astype(np.float64)])
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(estimates[target].d, expected, atol=atol, err_msg=target)


def float64_tasnet(params, x, targets, length, blocks, repeats):
    """The equations of the paper for audio x (nb_channels, nb_timesteps), frame by frame; (nb_targets, …)."""
    hop, nb_timesteps = length // 2, x.shape[1]
    nb_frames = -(-nb_timesteps // hop) + 1
    x = np.pad(x, ((0, 0), (hop, (nb_frames + 1) * hop - hop - nb_timesteps)))

    def pointwise(name, h):
        return params[f"{name}/conv/W"][:, :, 0] @ h + params[f"{name}/conv/b"][:, None]

    def prelu(name, h):
        return np.where(h > 0, h, params[f"{name}/prelu/slope"] * h)

    def normalized(h):
        return (h - h.mean()) / np.sqrt(h.var() + 1e-5)

    frames = np.stack([x[:, k * hop : k * hop + length] for k in range(nb_frames)], axis=-1)
    w = np.einsum("fcl,clt->ft", params["encoder/conv/W"], frames)
    h, sums = pointwise("bottleneck", normalized(w)), 0
    for number in range(blocks * repeats):
        name, d = f"block{number}", 2 ** (number % blocks)
        y = normalized(prelu(f"{name}/in", pointwise(f"{name}/in", h)))
        W, b = params[f"{name}/depth/depthwise_conv/W"], params[f"{name}/depth/depthwise_conv/b"]
        wide = np.pad(y, ((0, 0), (d, d)))
        y = sum(W[:, [k]] * wide[:, k * d : k * d + nb_frames] for k in range(3)) + b[:, None]
        y = normalized(prelu(f"{name}/depth", y))
        sums = sums + pointwise(f"{name}/skip", y)
        if number + 1 < blocks * repeats:
            h = h + pointwise(f"{name}/residual", y)
    slopes = params["prelu/slope"]
    sums = np.where(sums > 0, sums, slopes * sums)
    outputs = []
    for target in targets:
        mask = 1 / (1 + np.exp(-pointwise(target, sums)))
        y = np.zeros_like(x)
        for k in range(nb_frames):
            y[:, k * hop : k * hop + length] += np.einsum("fcl,f->cl", params["decoder/deconv/W"], (mask * w)[:, k])
        outputs.append(y[:, hop : hop + nb_timesteps])
    return np.stack(outputs)


def test_shared_is_open_unmix_with_one_lstm_for_all():
    """With the weights of an OpenUnmix per target that differ behind the LSTM only, it estimates what they do."""
    net = example("shared.py:Shared", ["a", "b"], hidden_size=6)
    params = net.get_parameters()
    assert sum("lstm" in name for name in params) == sum(name.startswith("lstm/") for name in params) > 0
    for k, name in enumerate(sorted(params)):  # not the initial values, which are alike
        params[name] = params[name] + np.random.default_rng(k).uniform(0.01, 0.1, params[name].shape).astype(np.float32)
    with net.parameter_scope():
        weights.set_parameters(params)
    x = nn.Variable.from_numpy_array(np.random.default_rng(0).uniform(0, 1, (9, 1, 2, 129)))
    estimates = net.estimates(x)
    own = model.OpenUnmix(n_fft=256, n_hop=64, hidden_size=6, input_is_spectrogram=True)
    for target, other in ("ab", "ba"):
        with nn.parameter_scope(target):
            own(x, test=True)
            weights.set_parameters(
                {re.sub(f"_{target}\\b", "", n): v for n, v in params.items() if not re.search(f"_{other}\\b", n)}
            )
            expected = own(x, test=True)
        nn.forward_all([estimates[target], expected])
        np.testing.assert_allclose(estimates[target].d, expected.d, atol=1e-6)
        assert expected.d.std() > 0


def float64_spectral(estimate, target):
    relative = np.sqrt((np.mean((estimate - target) ** 2) + 1e-4) / (np.mean(target**2) + 1e-4))
    return relative + np.mean(np.abs(np.log(estimate + 0.01) - np.log(target + 0.01)))


def graph_of(loss, net, x, y):
    graph = train.Graph(net, x.shape, test=False, loss=loss)
    graph.forward(x, y)
    return graph


def test_the_spectral_loss_is_its_formula():
    net = example("gru.py:Gru", ["a", "b"], size=4)
    loss = losses.read(f"{ROOT}/examples/spectral_loss.py:spectral")
    assert loss.name == "spectral_loss.py:spectral"
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2, 1000)), rng.standard_normal((2, 2, 2, 1000))
    estimates = net.estimates(net.represent(nn.Variable.from_numpy_array(x)), test=False)
    nn.forward_all(list(estimates.values()))
    expected = sum(
        float64_spectral(
            estimate.d.astype(np.float64), np.stack([float64_magnitudes(each[k], 256, 64) for each in y], axis=1)
        )
        for k, estimate in enumerate(estimates.values())
    )
    np.testing.assert_allclose(graph_of(loss.function, net, x, y).loss.d, expected, rtol=1e-5)


def test_the_spectral_loss_of_silence_has_gradients():
    net = example("gru.py:Gru", ["a"], size=4)
    loss = losses.read(f"{ROOT}/examples/spectral_loss.py:spectral").function
    graph = graph_of(loss, net, np.zeros((1, 2, 600)), np.zeros((1, 1, 2, 600)))
    graph.loss.backward()
    assert all(np.isfinite(variable.g).all() for variable in net.variables().values())
