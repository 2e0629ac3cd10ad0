"""Exported networks in other software, onnxruntime and plain NNabla, compute what they compute here."""

import json
import sys

import nnabla as nn
import nnabla.functions as F
import numpy as np
import onnxruntime
import pytest
import soundfile
from formulas import float64_estimate
from nnabla.utils.load import load
from nnabla.utils.nnp_graph import NnpLoader
from nnabla.utils.save import save

import context
import export
import folders
import functions
import pretrained
import separate
import trained
import weights
from examples import onnx_separate
from utils import UsageError

NETWORKS = {
    "open-unmix": ("OpenUnmix", ["vocals"], {"max_bin": 20}),
    "mono": ("OpenUnmix", ["speech"], {"nb_layers": 2}),
    "unidirectional": ("OpenUnmix", ["bass"], {"unidirectional": True, "nb_layers": 1}),
    "joint": ("JointOpenUnmix", ["a", "b", "c"], {"crossing": False}),
    "x-umx": ("JointOpenUnmix", ["a", "b"], {"crossing": True, "max_bin": 9, "nb_layers": 2}),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return made(*NETWORKS[request.param], nb_channels=1 if request.param == "mono" else 2)


def made(name="OpenUnmix", targets=("vocals",), options=None, nb_channels=2, n_fft=64, seed=0):
    """A model of ours whose parameters, statistics included, are drawn."""
    description = {"class": name, "options": {"hidden_size": 6, **(options or {})}, "targets": list(targets)}
    description.update(nb_channels=nb_channels, sample_rate=8000, n_fft=n_fft, n_hop=n_fft // 4)
    model, rng = trained.Model(description, trained.OWN[name]), np.random.default_rng(seed)
    for name, variable in model.variables(grad_only=False).items():
        low, high = (0.5, 1.5) if name.endswith("var") else (-1.0, 1.0)
        variable.d = variable.d + rng.uniform(low, high, variable.shape)
    return model


def write(folder, *models):
    """A model folder, as trainings leave it."""
    folder.mkdir()
    for model in models:
        weights.save(folder / f"{'+'.join(model.targets)}.h5", model.get_parameters(), model.description)
        folders.write_config(folder, model.config, model.targets)
    return str(folder)


def magnitudes(model, nb_frames=11, nb_samples=1):
    shape = nb_frames, nb_samples, model.nb_channels, model.n_fft // 2 + 1
    return np.random.default_rng(1).gamma(1, 2, shape).astype(np.float32)


def expected(model, X):
    """The textbook's formula; of X-UMX, whose bridges it lacks, our own graph, which is compared with Sony's."""
    params = weights.by_target(model.get_parameters())
    if model.joint and model.net.crossing:
        estimates = model.estimates(nn.Variable.from_numpy_array(X))
        nn.forward_all(list(estimates.values()))
        return {target: estimate.d for target, estimate in estimates.items()}
    return {target: float64_estimate(params.get(target, params.get("")), X) for target in model.targets}


def run(session, X):
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"mixture": X})))


def compare(found, wanted):
    assert list(found) == list(wanted)
    for target, estimate in wanted.items():
        assert estimate.std() > 0 and (estimate == 0).any()
        np.testing.assert_allclose(found[target], estimate, rtol=0, atol=1e-5 * np.abs(estimate).max())


# ------------------------------------------------------------------------------------------------- ONNX


def test_onnxruntime_computes_the_estimates(network):
    """Of any number of frames and samples, with one file."""
    session = onnxruntime.InferenceSession(export.to_onnx([network]).SerializeToString())
    for nb_frames, nb_samples in ((11, 1), (1, 3), (30, 2)):
        X = magnitudes(network, nb_frames, nb_samples)
        compare(run(session, X), expected(network, X))


def test_trained_networks_are_read_and_one_file_holds_them_all(tmp_path):
    models = [made(targets=[name], seed=k) for k, name in enumerate(["drums", "bass"])]
    folder, path = write(tmp_path / "model", *models), tmp_path / "new" / "all.onnx"
    export.main([folder, str(path)])
    X = magnitudes(models[0])
    session = onnxruntime.InferenceSession(path.read_bytes())
    compare(run(session, X), {**expected(models[0], X), **expected(models[1], X)})
    assert session.get_inputs()[0].shape == ["nb_frames", "nb_samples", 2, 33]
    config = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    sizes = {"sample_rate": 8000, "n_fft": 64, "n_hop": 16, "nb_channels": 2}
    assert config == {**sizes, "targets": ["drums", "bass"]}
    export.main([folder, str(tmp_path / "bass.onnx"), "--target", "bass"])
    compare(run(onnxruntime.InferenceSession(tmp_path / "bass.onnx"), X), expected(models[1], X))


@pytest.mark.parametrize("crossing", [False, True])
def test_a_target_of_a_joint_network_needs_no_more_than_it_has(tmp_path, crossing):
    """Of X-UMX, the layers behind the bridges; without bridges, its own network alone."""
    model = made("JointOpenUnmix", ["a", "b", "c"], {"crossing": crossing})
    folder, path = write(tmp_path / "model", model), tmp_path / "b.onnx"
    export.main([folder, str(path), "--targets", "b"])
    X = magnitudes(model)
    compare(run(onnxruntime.InferenceSession(path), X), {"b": expected(model, X)["b"]})
    whole = export.to_onnx([model]).ByteSize()
    assert path.stat().st_size < (0.9 if crossing else 0.4) * whole


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda monkeypatch: monkeypatch.setitem(sys.modules, "onnx", None), "pip install -r requirements-onnx.txt"),
        (lambda monkeypatch: monkeypatch.setattr(export, "LARGEST", 1000), "more than an ONNX file holds"),
    ],
)
def test_what_cannot_be_written_as_onnx(tmp_path, monkeypatch, capsys, change, message):
    folder = write(tmp_path / "model", made())
    change(monkeypatch)
    refused([folder, str(tmp_path / "out.onnx")], message, capsys)
    assert not (tmp_path / "out.onnx").exists()


# -------------------------------------------------------------------------------------------------- NNP


def test_plain_nnabla_computes_the_estimates(network, tmp_path):
    path = tmp_path / "network.nnp"
    export.main([write(tmp_path / "model", network), str(path), "--frames", "7"])
    X = magnitudes(network, 7)
    wanted = expected(network, X)
    net = NnpLoader(str(path)).get_network("open-unmix")
    net.inputs["mixture"].d = X
    found = {target: net.outputs[target] for target in wanted}
    nn.forward_all(list(found.values()))
    compare({target: variable.d for target, variable in found.items()}, wanted)
    assert list(net.inputs) == ["mixture"]
    types = {function.type for function in net.proto_network.functions.values()}
    assert "LSTM" in types


def test_an_executor_names_input_and_outputs(tmp_path):
    path = tmp_path / "network.nnp"
    models = [made(targets=[name]) for name in ("drums", "bass")]
    export.main([write(tmp_path / "model", *models), str(path), "--targets", "bass", "drums"])
    executor = load([str(path)]).executors["open-unmix"]
    assert list(executor.dataset_assign.values()) == ["mixture"]
    assert {name for names in executor.output_assign.values() for name in names[1:]} == {"drums", "bass"}


def test_networks_of_one_s_own_are_for_nnabla(tmp_path, capsys):
    name = f"{trained.__file__.replace('trained.py', 'examples/gru.py')}:Gru"
    network = trained.read_network(name, {"size": 4})
    description = {"class": network.name, "options": {"size": 4}, "targets": ["a"], "nb_channels": 2}
    statistics = {"input_mean": np.linspace(0.5, 1, 33), "input_scale": np.linspace(1, 2, 33)}
    sizes = {"sample_rate": 8000, "n_fft": 64, "n_hop": 16}
    model = trained.Model({**description, **sizes}, network.cls, statistics=statistics)
    folder, path = write(tmp_path / "model", model), tmp_path / "own.nnp"
    refused([folder, str(path)], "name the file of its class again", capsys)
    refused([folder, str(tmp_path / "own.onnx"), "--network", name], "only networks of our own", capsys)
    export.main([folder, str(path), "--network", name, "--frames", "5"])
    net = NnpLoader(str(path)).get_network("open-unmix")
    X = magnitudes(model, 5)
    net.inputs["mixture"].d = X
    y = model.estimates(nn.Variable.from_numpy_array(X))["a"]
    nn.forward_all([y, net.outputs["a"]])
    assert y.d.std() > 0
    np.testing.assert_allclose(net.outputs["a"].d, y.d, atol=1e-5 * y.d.max())


@pytest.mark.parametrize("name", ["batch_normalization", "lstm", "waveforms"])
def test_a_graph_of_fast_functions_is_not_saved(tmp_path, name):
    """NNabla could not load it; the same graph in plain form is saved, before and after."""
    x = nn.Variable.from_numpy_array(np.ones((3, 2, 4), np.float32))
    build = {
        "batch_normalization": lambda: functions.batch_normalization(x, F.tanh, True, "bn"),
        "lstm": lambda: functions.lstm(x, 2, 1, False, 0.0, True, "lstm"),
        "waveforms": lambda: functions.waveforms([nn.Variable((1, 3, 1, 3))], x, 4, 2)[0],
    }[name]
    path = tmp_path / "graph.nnp"

    def saved():
        y = build()
        y.forward()
        y.forward()  # as often as one likes
        network = {"name": "graph", "batch_size": 3, "outputs": {"y": y}, "names": {"x": x}}
        save(str(path), {"networks": [network]}, variable_batch_size=False)

    with pytest.raises(SystemError) as error:
        saved()
    assert isinstance(error.value.__cause__, UsageError) and "context.set_plain(True)" in str(error.value.__cause__)
    assert not path.exists()
    context.set_plain(True)
    saved()
    NnpLoader(str(path)).get_network("graph")


# --------------------------------------------------------------------------------------------- commands


@pytest.fixture(autouse=True)
def form():
    yield
    context.set_plain(False)


def refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        export.main(arguments)
    line = capsys.readouterr().err
    assert end.value.code == 2 and message in line and line.count("\n") == 1, line


@pytest.mark.parametrize(
    "options, message",
    [
        (["out.h5"], "exported as .onnx or .nnp"),
        (["out"], "exported as .onnx or .nnp"),
        (["out.onnx", "--frames", "3"], "--frames is for an .nnp"),
        (["out.onnx", "--target", "drums"], "no weights of the target 'drums'"),
        (["out.onnx", "--network-options", "{}"], "--network"),
        (["model/separator.json/out.onnx"], "cannot write"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    refused([write(tmp_path / "model", made()), *options], message, capsys)
    refused(["nowhere", "out.nnp"], "unknown model 'nowhere'", capsys)


def test_files_of_a_published_model_may_be_elsewhere(tmp_path, capsys):
    name = pretrained.MODELS["umxhq"].files["bass"]
    (tmp_path / name).write_bytes(b"damaged")
    options = ["--target", "bass", "--model-dir", str(tmp_path)]
    refused(["umxhq", str(tmp_path / "out.nnp"), *options], f"{name} is damaged", capsys)


def test_no_target_has_the_name_of_the_input(tmp_path, capsys):
    refused([write(tmp_path / "model", made(targets=["mixture"])), str(tmp_path / "x.nnp")], "mixture", capsys)


# ---------------------------------------------------------------------------------------------- example


@pytest.mark.parametrize("niter", [0, 1])
@pytest.mark.parametrize("name, nb_channels, nb_timesteps", [("x-umx", 2, 20000), ("x-umx", 1, 5000), ("joint", 2, 20)])
def test_the_example_writes_our_stems(tmp_path, monkeypatch, name, nb_channels, nb_timesteps, niter):
    """And those of a mono model, of a mono recording, of one that is shorter than a window; at any rate."""
    model = made(*NETWORKS[name], nb_channels=1 if name == "joint" else 2)
    folder = write(tmp_path / "model", model)
    export.main([folder, str(tmp_path / "model.onnx")])
    audio = 0.2 * np.random.default_rng(2).standard_normal((nb_timesteps, nb_channels))
    audio[:, 0] += 12.0 * (nb_channels == 2)  # so loud that the filter scales it
    monkeypatch.chdir(tmp_path)
    soundfile.write("song.wav", audio, 8000, subtype="FLOAT")
    separate.main(["song.wav", "--model", folder, "--niter", str(niter), "--quiet", "--outdir", "ours"])
    monkeypatch.setattr(sys, "argv", ["onnx_separate.py", "model.onnx", "song.wav", "stems", "--niter", str(niter)])
    onnx_separate.main()
    for target in model.targets:
        ours, rate = soundfile.read(f"ours/song/{target}.wav", always_2d=True)
        stem, other = soundfile.read(f"stems/{target}.wav", always_2d=True)
        assert rate == other and np.abs(ours).max() > 0.01
        np.testing.assert_allclose(stem, ours, atol=1e-5 * max(1, np.abs(ours).max()))


def test_the_example_resamples(tmp_path, monkeypatch):
    """A slow song of another rate: its stems are ours but for what the two resamplers differ in."""
    folder = write(tmp_path / "model", made())
    export.main([folder, str(tmp_path / "model.onnx")])
    monkeypatch.chdir(tmp_path)
    soundfile.write("song.wav", 0.5 * np.sin(np.arange(33333) / 40), 44100, subtype="FLOAT")
    separate.main(["song.wav", "--model", folder, "--quiet", "--outdir", "ours"])
    monkeypatch.setattr(sys, "argv", ["onnx_separate.py", "model.onnx", "song.wav", "stems"])
    onnx_separate.main()
    (ours, _), (stem, rate) = (soundfile.read(f"{folder}/vocals.wav") for folder in ("ours/song", "stems"))
    assert rate == 44100 and len(stem) == 33333
    inside = slice(2000, -2000)  # where no resampler meets an end
    assert np.abs(stem - ours)[inside].max() < 0.01 * np.abs(ours).max()
