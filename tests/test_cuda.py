"""What runs on a GPU: every function in the graphs of a training with the context cudnn is one that NNabla has there.

data/cuda_functions.txt lists what nnabla-ext-cuda 1.39.0, tag v1.39.0 of github.com/sony/nnabla-ext-cuda, registers:
the keys with a `float` in build-tools/code_generator/function_types.yaml ([cuda]) and function_types_cudnn.yaml
([cudnn]), of which its generate.py makes the calls of NBLA_REGISTER_FUNCTION_IMPL. Of other functions NNabla would take
the CPU's, and copy to and fro in every step.
"""

import re
from pathlib import Path

import nnabla as nn
import numpy as np
import pytest

import context
import functions
import losses
import model
import trained

REGISTERED = set(re.findall(r"^\w+$", (Path(__file__).parent / "data/cuda_functions.txt").read_text(), re.MULTILINE))
CONVOLUTIONS = {"STFT", "ISTFT", "Convolution", "Deconvolution"}  # the first two are made of the others
SIZES = {"hidden_size": 4, "nb_layers": 2, "max_bin": 20}
NETWORKS = {
    "one target": (model.OpenUnmix, ["bass"], 2, SIZES),
    "mono, unidirectional": (model.OpenUnmix, ["bass"], 1, {**SIZES, "unidirectional": True}),
    "crossing": (model.JointOpenUnmix, ["bass", "drums", "vocals"], 2, SIZES),
    "side by side": (model.JointOpenUnmix, ["bass", "drums"], 2, {**SIZES, "crossing": False}),
}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(context, "_plain", True)


def types(*outputs):
    """Names of the functions in a graph."""
    found = set()
    for output in outputs:
        output.visit(lambda function: found.add(function.info.type_name))
    return found


def made(name, n_fft=64, n_hop=16):
    cls, targets, nb_channels, options = NETWORKS[name]
    description = {"class": cls.__name__, "options": options, "targets": targets, "sample_rate": 8000}
    return trained.Model({**description, "nb_channels": nb_channels, "n_fft": n_fft, "n_hop": n_hop}, cls)


def test_the_list():
    assert len(REGISTERED) == 204
    assert {"BatchMatmul", "LSTM", "STFT", "BatchNormalization"} < REGISTERED
    assert REGISTERED.isdisjoint({"Constant", "Sink", "Unlink"})


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_functions_of_training_and_validation(name, loss, test):
    network = made(name)
    x, *y = (nn.Variable((2, 2, 64 + 16 * 20)) for _ in range(1 + len(network.targets)))
    signals = losses.Signals(network, x, dict(zip(network.targets, y)), test)
    found = types(losses.LOSSES[loss](signals))
    assert {"BatchMatmul", "LSTM", "Affine"} <= found
    assert found <= REGISTERED, f"not on a GPU: {found - REGISTERED}"
    assert found.isdisjoint(CONVOLUTIONS)


@pytest.mark.parametrize("name", NETWORKS)
def test_functions_of_separation(name):
    """Centred frames; features of all, and estimates of some."""
    network = made(name)
    X = network.represent(nn.Variable((1, 2, 1000)), center=True)
    (features,) = network.listen([network.bottleneck(X)])
    found = types(*(network.decode(target, h, X) for target, h in features.items()))
    assert found <= REGISTERED, f"not on a GPU: {found - REGISTERED}"
    assert found.isdisjoint(CONVOLUTIONS)


def test_cudnn_normalises_batches_only():
    """With running statistics it takes 65535 frames."""
    network = made("one target")
    for test in (False, True):
        found = types(*network.estimates(nn.Variable((9, 2, 2, 33)), test).values())
        assert ("BatchNormalization" in found) is not test


def test_graphs_run_again_with_memory_released():
    """Constants outlive a pass that releases all it can."""
    network = made("one target")
    rng = np.random.default_rng(0)
    x, y = (nn.Variable.from_numpy_array(rng.uniform(-1, 1, (2, 2, 64 + 16 * 20))) for _ in range(2))
    (y_hat,) = functions.waveforms([network.estimates(network.represent(x)).popitem()[1]], x, 64, 16)
    loss = losses.negative_sdr(y_hat, y)
    values = []
    for clear in ({}, {"clear_no_need_grad": True}, {"clear_buffer": True}, {"clear_buffer": True}):
        loss.forward(**clear)
        values.append(float(loss.d))
    assert len(set(values)) == 1
