"""A trained model for other software: ``python export.py MODEL OUT.onnx``, or OUT.nnp for NNabla's own tools.

Both files hold the network alone, as it separates. Its input is the magnitude of the mixture's STFT (nb_frames,
nb_samples, nb_channels, nb_bins); of each target there is an output of that shape, named after it. docs/export.md says
what is around it: the STFT before, the filter and the inverse STFT behind.
"""

from __future__ import annotations  # unions, on Python 3.9

import collections
import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import utils

if __name__ == "__main__":
    utils.start()  # before imports that take long

import nnabla as nn
import numpy as np
from nnabla.utils.save import save

import context
import files
import folders
import trained
import weights
from args import export_parser
from fast import BN_EPS
from utils import UsageError

if TYPE_CHECKING:
    import onnx

INPUT = "mixture"  # the name of the network's input
OPSET, IR_VERSION = 13, 7  # of ONNX, of 2020: older runtimes, of phones and browsers, read it too
LARGEST = 2**31 - 2**20  # bytes of an ONNX file that carries its weights itself, less what is around them


def _chosen(models, targets):
    """Of each target that is asked for, its model."""
    nets = {target: model for model in models for target in model.targets if not targets or target in targets}
    if INPUT in nets:
        raise UsageError(f"a target called {INPUT} cannot be exported: the network's input has that name")
    return nets


# ------------------------------------------------------------------------------------------------- ONNX


def to_onnx(models: Sequence[trained.Model], targets: Sequence[str] | None = None) -> onnx.ModelProto:
    """Networks as one ONNX model, of any number of frames and samples.

    Statistics, batch normalisations and the output's scale are folded into the affine maps beside them, in double
    precision. The configuration is in the model's metadata, each value as JSON.

    Args:
        models: of our own networks, with the same STFT
        targets: which to estimate; None: all
    Raises:
        UsageError: the package onnx is missing; a network is not ours; a target is called as the input; too large.
    """
    onnx = _package()
    one, nets = models[0], _chosen(models, targets)
    if others := [model.name for model in nets.values() if not model.is_own]:
        raise UsageError(f"only networks of our own are written as ONNX, not {others[0]}: an .nnp takes it")
    graph = _Graph(onnx, one)
    for model in dict.fromkeys(nets.values()):
        graph.add(model, [target for target in model.targets if nets.get(target) is model])
    if graph.size > LARGEST:
        raise UsageError(f"{graph.size} bytes of weights are more than an ONNX file holds: fewer --targets")
    shape = ["nb_frames", "nb_samples", one.nb_channels, graph.nb_bins]
    values = {
        name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape, "magnitudes of a centred STFT")
        for name in (INPUT, *nets)
    }
    outputs = [values[target] for target in nets]
    proto = onnx.helper.make_graph(graph.nodes, "open-unmix", [values[INPUT]], outputs, graph.constants)
    proto = onnx.helper.make_model(
        proto,
        producer_name="Open-Unmix for NNabla",
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    )
    config = {"sample_rate": one.sample_rate, "n_fft": one.n_fft, "n_hop": one.n_hop, "nb_channels": one.nb_channels}
    config["targets"] = list(nets)
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in config.items()})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _package():
    try:
        import onnx
    except ImportError:
        raise UsageError("ONNX files need the package onnx: pip install -r requirements-onnx.txt") from None
    return onnx


class _Graph:
    """The nodes and constants of an ONNX graph; `size` is that of the constants, in bytes."""

    def __init__(self, onnx, model):
        self.onnx, self.nb_channels, self.nb_bins = onnx, model.nb_channels, model.n_fft // 2 + 1
        self.nodes, self.constants, self.size = [], [], 0

    def _node(self, operator, name, *inputs, **attributes):
        """Append a node, whose output has its name; inputs are names, or arrays."""
        names = []
        for k, value in enumerate(inputs):
            if not isinstance(value, str):
                array = np.asarray(value)
                array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
                self.size += array.nbytes
                value = f"{name}/{k}"
                self.constants.append(self.onnx.numpy_helper.from_array(array, value))
            names.append(value)
        self.nodes.append(self.onnx.helper.make_node(operator, names, [name], name=name, **attributes))
        return name

    def add(self, model: trained.Model, targets: list) -> None:
        """The nodes of a network of ours, as model.py has them, for these of its targets."""
        net, params = model.net, weights.by_target(model.arrays())
        crossing = model.joint and net.crossing
        own = {target: params[target if model.joint else ""] for target in (model.targets if crossing else targets)}
        h = {target: self._reduce(p, net, target) for target, p in own.items()}
        h = self._bridged(h, crossing, "fc1")
        s = {target: self._recur(p, h[target], target) for target, p in own.items()}
        s = self._bridged(s, crossing, "lstm")
        for target in targets:
            both = self._node("Concat", f"{target}/skip", h[target], s[target], axis=2)
            self._decode(own[target], both, target)

    def _bridged(self, names, crossing, layer):
        if not crossing:
            return names
        return dict.fromkeys(names, self._node("Mean", f"{'+'.join(names)}/{layer}", *names.values()))

    def _reduce(self, p, net, target):
        """The cropped mixture, normalised, to hidden_size features."""
        W, b = _folded(p, "fc1", np.tile(p["input_scale"], net.nb_channels)[:, None])
        b = b + np.tile(p["input_mean"], net.nb_channels) @ W
        X = self._node("Slice", f"{target}/crop", INPUT, [0], [net.max_bin], [3])
        X = self._node("Reshape", f"{target}/input", X, [0, 0, len(W)])
        return self._node("Tanh", f"{target}/fc1", self._affine(f"{target}/fc1/affine", X, W, b))

    def _recur(self, p, h, target):
        """The LSTM, layer by layer: all gates of a direction stand in the order input, output, forget, cell."""
        for layer in range(sum(name.startswith("lstm/weight") for name in p)):
            weight, *biases = (p[f"lstm/{kind}_l{layer}"][:, _GATES] for kind in ("weight", "bias_ih", "bias_hh"))
            nb_directions, _, size, _ = weight.shape
            weight = weight.reshape(nb_directions, 4 * size, -1)
            name = f"{target}/lstm{layer}"
            y = self._node(
                "LSTM",
                f"{name}/directions",
                h,
                weight[:, :, :-size],
                weight[:, :, -size:],
                np.concatenate([bias.reshape(nb_directions, -1) for bias in biases], axis=1),
                hidden_size=size,
                direction="bidirectional" if nb_directions == 2 else "forward",
            )
            y = self._node("Transpose", f"{name}/beside", y, perm=[0, 2, 1, 3])
            h = self._node("Reshape", name, y, [0, 0, nb_directions * size])
        return h

    def _decode(self, p, h, target):
        """What the LSTM and its input tell, to a mask over all bins, applied to the mixture."""
        h = self._node("Relu", f"{target}/fc2", self._affine(f"{target}/fc2/affine", h, *_folded(p, "fc2")))
        W, b = _folded(p, "fc3")
        scale, mean = (np.tile(p[name], self.nb_channels) for name in ("output_scale", "output_mean"))
        h = self._affine(f"{target}/fc3/affine", h, W * scale, b * scale + mean)
        h = self._node("Reshape", f"{target}/fc3", h, [0, 0, self.nb_channels, self.nb_bins])
        return self._node("Mul", target, self._node("Relu", f"{target}/mask", h), INPUT)

    def _affine(self, name, h, W, b):
        return self._node("Add", name, self._node("MatMul", f"{name}/product", h, W), b)


_GATES = [0, 3, 1, 2]  # ours are input, forget, cell, output


def _folded(p, layer, scale=1.0):
    """An affine map of inputs times `scale`, and the batch normalisation after it: W and b, in double precision."""
    beta, gamma, mean, var = (p[f"{layer}/bn/{name}"].ravel().astype(np.float64) for name in _NORMALIZATION)
    slope = gamma / np.sqrt(var + BN_EPS)
    return p[f"{layer}/affine/W"] * np.float64(scale) * slope, beta - mean * slope


_NORMALIZATION = ("beta", "gamma", "mean", "var")


# -------------------------------------------------------------------------------------------------- NNP


def to_nnp(models: Sequence[trained.Model], targets: Sequence[str] | None = None, nb_frames: int = 256) -> bytes:
    """Networks as the content of an .nnp file, of this number of frames; in plain form, so `context.set_plain` first.

    The network and its executor are called `open-unmix`. separator.json, which NNabla's loader passes over, has the
    configuration. Networks of one's own may be in the time domain: their audio is as long as these frames.
    """
    one, nets = models[0], _chosen(models, targets)
    shape = nb_frames, 1, one.nb_channels, one.n_fft // 2 + 1
    if one.domain == "audio":
        shape = 1, one.nb_channels, one.n_fft + (nb_frames - 1) * one.n_hop
    x = nn.Variable(shape)
    with context.exclusive(), nn.parameter_scope("", collections.OrderedDict()), nn.auto_forward(False):
        estimates = {}
        for model in dict.fromkeys(nets.values()):
            for name, variable in model.variables(grad_only=False).items():
                nn.parameter.set_parameter(f"{folders.name_of(model.targets)}/{name}", variable)
            estimates.update(model.estimates(x))
        outputs = {target: estimates[target] for target in nets}
        known = {x.data, *(variable.data for variable in nn.get_parameters(grad_only=False).values())}

        def keep_constants(function):  # a variable that nothing computes, such as an LSTM's first state
            for variable in function.inputs:
                if variable.parent is None and variable.data not in known:
                    known.add(variable.data)
                    nn.parameter.set_parameter(f"constant/{len(known)}", variable)

        for y in outputs.values():
            y.visit(keep_constants)
        network = {"name": _NETWORK, "batch_size": 1, "outputs": outputs, "names": {INPUT: x}}
        executor = {"name": _NETWORK, "network": _NETWORK, "data": [INPUT], "output": list(outputs)}
        stream = io.BytesIO()
        contents = {"networks": [network], "executors": [executor]}
        save(stream, contents, variable_batch_size=False, extension=".nnp")
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr(folders.CONFIG, json.dumps({**one.config, "targets": list(outputs)}, indent=4))
    return stream.getvalue()


_NETWORK = "open-unmix"


# ----------------------------------------------------------------------------------------- command line


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    options, given = export_parser().parse(argv)
    path = Path(os.path.expanduser(options.out))
    if path.suffix not in (".onnx", ".nnp"):
        raise UsageError(f"{path}: models are exported as .onnx or .nnp")
    if path.suffix == ".onnx":
        if "frames" in given:
            raise UsageError("--frames is for an .nnp: an .onnx takes any number of frames")
        _package()
    targets = folders.asked_for(options.targets or options.target)
    context.use("cpu", plain=True)
    network = trained.read_network(options.network, options.network_options)
    models, _ = trained.load_models(options.model, targets, options.model_dir, network, quiet=False)
    files.writable_folder(path.parent)
    if path.suffix == ".nnp":
        files.write(path, to_nnp(models, targets, options.frames))
    else:
        files.write(path, to_onnx(models, targets).SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
