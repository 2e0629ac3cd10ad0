"""A trained model: by name, by folder or by file; what a training leaves, and what rebuilds a network.

A network is described by a dict, which its file of weights carries:

    class         its name: one of `OWN`, or FILE.py:CLASS of a file that is not ours, and is never run on its own
    options       arguments of the class
    targets       what it estimates
    nb_channels, sample_rate, n_fft, n_hop
    statistics    {input_mean, input_scale}, arrays (nb_bins,), if the class is not ours and takes them

Files that bring none (torch's, Sony's) are those of `model.OpenUnmix`, or of X-UMX: their weights tell.
"""

import collections
import contextlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional, Union

import nnabla as nn
import numpy as np

import context
import folders
import foreign
import functions
import pretrained
import weights
from model import JointOpenUnmix, OpenUnmix
from utils import UsageError

OWN = {"OpenUnmix": OpenUnmix, "JointOpenUnmix": JointOpenUnmix}
COMMON = ("targets", "nb_channels", "sample_rate", "n_fft", "n_hop")  # arguments of every network
STATISTICS = ("input_mean", "input_scale")  # of the training mixtures, for networks that take them
EXAMPLE = 6.0  # seconds of audio that a network must take, to see which parameters it asks for

# ---------------------------------------------------------------------------------- classes of networks


class Network(NamedTuple):
    """A class that is not ours, as a user names it."""

    name: str  # by which a description refers to it, FILE.py:CLASS
    cls: type
    options: Optional[dict]  # None: those of the description, if there is one


def read_network(name: Optional[str], options: Optional[dict] = None) -> Optional[Network]:
    """The class CLASS of the Python file FILE, from "FILE.py:CLASS"; the file is run. None for no name.

    Raises:
        UsageError: no such file or class, or an error while it runs; options of no class.
    """
    if name is None:
        if options is not None:
            raise UsageError("--network-options are for a --network of one's own")
        return None
    path, cls, found = foreign.read("--network", name, "CLASS")
    if not inspect.isclass(found):
        raise UsageError(f"--network {name}: {path} has no class {cls}")
    return Network(f"{path.name}:{cls}", found, options)


def arguments(cls: type) -> tuple:
    """Names that the constructor of a class takes, those of its bases included where it passes **options on.

    Returns:
        set of names; whether it takes any others
    """
    names = set()
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
            names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                return names, False
    return names, True


def is_parted(cls: type) -> bool:
    """Whether encode and decode, one after the other, are what a call of a network computes.

    They are where they came with the call, or later: a class that changes only the call has inherited parts of
    another network.
    """
    place = {name: next((k for k, c in enumerate(cls.__mro__) if name in vars(c)), None) for name in _PARTS}
    return None not in place.values() and place["__call__"] >= max(place.values())


_PARTS = ("__call__", "encode", "decode")


# ----------------------------------------------------------------------------------------------- models


class Model:
    """A network with parameters of its own.

    ``model(x)`` is its graph, in test mode unless told otherwise; see `represent` for x. A class that takes no
    `targets` estimates one target, and returns its estimate; any other returns {target: estimate}.

    Args:
        description: see above
        cls: the class
        parameters: name -> array; None: initial values
        statistics: input_mean, input_scale, per bin (nb_bins,), for a new network whose class takes them
    Raises:
        UsageError: a class that does not take these arguments, or cannot be built.
        ValueError: the parameters are not those that the network asks for.
    """

    @context.exclusive()
    def __init__(
        self, description: dict, cls: type, parameters: Optional[dict] = None, statistics: Optional[dict] = None
    ):
        self.description = dict(description)
        self.targets = list(description["targets"])
        self.n_fft, self.n_hop = description["n_fft"], description["n_hop"]
        self.nb_channels, self.sample_rate = description["nb_channels"], description["sample_rate"]
        self.net = self._construct(cls, statistics or description.get("statistics", {}))
        self.domain = getattr(self.net, "domain", "spectrogram")
        if self.domain not in ("spectrogram", "audio"):
            raise UsageError(f"{self.name} has the domain {self.domain!r}: expected spectrogram or audio")
        self.is_parted, self.is_own = is_parted(cls), cls in OWN.values()
        self.scope = collections.OrderedDict()
        if parameters is None:
            with self.parameter_scope():
                self._example()
        else:
            need_grad = weights.compare(parameters, self._example)
            with self.parameter_scope():
                weights.fill(parameters, need_grad)

    @property
    def name(self) -> str:
        return self.description["class"]

    @property
    def config(self) -> dict:
        """What separator.json says of it."""
        config = {"nfft": self.n_fft, "nhop": self.n_hop}
        return {**config, "sample_rate": self.sample_rate, "nb_channels": self.nb_channels}

    def _construct(self, cls, statistics):
        names, any_other = arguments(cls)
        options = self.description["options"]
        self.joint = any_other or "targets" in names
        given = {name: self.description[name] for name in COMMON if any_other or name in names}
        statistics = {name: statistics[name] for name in STATISTICS if name in names and name in statistics}
        if self.name not in OWN and statistics:  # ours make parameters of them, of others nobody knows
            if self.n_fft // 2 >= weights.MOST_BINS:
                raise UsageError(f"{self.name} takes statistics, which are kept of up to {weights.MOST_BINS} bins only")
            statistics = {name: np.asarray(values, np.float32) for name, values in statistics.items()}
            self.description["statistics"] = statistics
        if "input_is_spectrogram" in names:
            given["input_is_spectrogram"] = True
        if not self.joint and len(self.targets) != 1:
            raise UsageError(
                f"{self.name} estimates one target, not {' and '.join(self.targets)}: several need another --network"
            )
        known = sorted(names - {*COMMON, *STATISTICS, "input_is_spectrogram"})
        if unknown := [name for name in options if name in given or name not in known and not any_other]:
            raise UsageError(f"{self.name} has no option {unknown[0]}: it has {', '.join(known) or 'none'}")
        return self._run("it cannot be made", cls, **given, **statistics, **options)

    def _run(self, what, function, *args, **options):
        """Call code that need not be ours: its errors say where they are, in one line."""
        if self.name in OWN:
            return function(*args, **options)
        path = Path(inspect.getsourcefile(type(self.net) if hasattr(self, "net") else function))
        return foreign.call(path, f"{self.name}: {what}", function, *args, **options)

    @contextlib.contextmanager
    def parameter_scope(self) -> Iterator[None]:
        """NNabla's current parameters are those of this network; no other thread enters a scope meanwhile."""
        with context.exclusive(), nn.parameter_scope("", self.scope):
            yield

    def variables(self, grad_only: bool = True) -> dict:
        """The parameters that are learnt, or all, name -> variable."""
        with self.parameter_scope():
            return nn.get_parameters(grad_only=grad_only)

    def arrays(self) -> dict:
        """All parameters, name -> float32 array: NNabla's own memory, for who is done with it before the next step."""
        with self.parameter_scope():
            variables = nn.get_parameters(grad_only=False)
        return {name: variable.data.get_data("r", np.float32) for name, variable in variables.items()}

    def get_parameters(self) -> dict:
        """Copies of all parameters, name -> float32 array."""
        with self.parameter_scope():
            return weights.get_parameters()

    @context.exclusive()
    def represent(self, x: nn.Variable, center: bool = False) -> nn.Variable:
        """Audio (nb_samples, nb_channels, nb_timesteps) to what the network reads and estimates.

        Returns:
            magnitude (nb_frames, nb_samples, nb_channels, nb_bins), averaged over channels if it has one; or the audio
        """
        if self.domain == "audio":
            return x
        return functions.spectrogram(x, self.n_fft, self.n_hop, center, mono=self.nb_channels == 1)

    def __call__(self, x: nn.Variable, test: bool = True) -> Union[nn.Variable, dict]:
        with self.parameter_scope():
            return self._run("it cannot be called", self.net, x, test=test)

    def estimates(self, x: nn.Variable, test: bool = True) -> dict:
        """Of all targets, {target: estimate of the shape of x}.

        Raises:
            UsageError: the network returns something else.
        """
        return self._checked(self(x, test), x)

    def _checked(self, y, x):
        if not self.joint and not isinstance(y, dict):
            y = {self.targets[0]: y}
        if not isinstance(y, dict) or set(y) != set(self.targets):
            found = list(y) if isinstance(y, dict) else type(y).__name__
            raise UsageError(f"{self.name} returns {found}: expected a dict with an estimate of {self.targets}")
        for target, estimate in y.items():
            shape = getattr(estimate, "shape", type(estimate).__name__)
            if shape != x.shape:
                raise UsageError(
                    f"{self.name} returns {shape} for {target!r}: expected the shape of its input, {x.shape}"
                )
        return {target: y[target] for target in self.targets}

    def _example(self):
        """Build the graphs of training and test in the current scope: what they ask for are the parameters."""
        nb_timesteps = max(round(EXAMPLE * self.sample_rate), self.n_fft)
        if self.domain == "audio":
            x = nn.Variable((1, self.nb_channels, nb_timesteps))
        else:
            nb_frames = 1 if isinstance(self.net, OpenUnmix) else 1 + (nb_timesteps - self.n_fft) // self.n_hop
            x = nn.Variable((nb_frames, 1, self.nb_channels, self.n_fft // 2 + 1))
        for test in (False, True):
            self._checked(self._run("it cannot be called", self.net, x, test=test), x)

    # A separator needs little memory if a network's estimate can be made of few numbers per frame, some frames at a
    # time: decode of encode. Of any other network, the features are the estimates themselves. And it is faster if
    # several recordings go through an LSTM together: of our networks, encode is listen of their bottlenecks. A network
    # of another class may have changed encode, or look at frames all at once: its bottleneck is encode as a whole.

    def bottleneck(self, x: nn.Variable) -> dict:
        """What `listen` makes features of, {target: variable}, from what `represent` gives of one recording."""
        if not self.is_parted:
            return self.estimates(x)
        with self.parameter_scope():
            encode = self.net.bottleneck if self.is_own else self.net.encode
            h = self._run("encode fails", encode, x, test=True)
        return h if self.joint else {self.targets[0]: h}

    def listen(self, recordings: list[dict]) -> list[dict]:
        """Features of all frames of several recordings, each {target: variable}, from the `bottleneck` of each."""
        if not self.is_own:
            return recordings
        with self.parameter_scope():
            if self.joint:
                return self.net.listen(recordings, test=True)
            (target,) = self.targets
            return [{target: h} for h in self.net.listen([one[target] for one in recordings], test=True)]

    def decode(self, target: str, features: nn.Variable, X: nn.Variable) -> nn.Variable:
        """The estimate of a target from its features and the mixture's spectrogram of the same frames."""
        if not self.is_parted:
            return features
        whose = {"target": target} if self.joint else {}
        with self.parameter_scope():
            return self._run("decode fails", self.net.decode, features, X, test=True, **whose)


def described(parameters: dict, targets: list, n_hop: int, sample_rate: float) -> Model:
    """The model of weights that bring no description: an OpenUnmix, or a joint one, whose targets their names hold.

    Raises:
        ValueError: they are not those of any such model.
    """
    sizes = weights.describe(parameters)
    joint = [target for target in weights.by_target(parameters) if target]
    options = {name: sizes[name] for name in ("hidden_size", "nb_layers", "max_bin", "unidirectional")}
    options.update({"crossing": True} if joint else {})
    description = {"class": "JointOpenUnmix" if joint else "OpenUnmix", "options": options}
    description.update(targets=joint or list(targets), nb_channels=sizes["nb_channels"], sample_rate=sample_rate)
    description.update(n_fft=2 * (sizes["nb_bins"] - 1), n_hop=n_hop)
    return Model(description, OWN[description["class"]], parameters)


# ---------------------------------------------------------------------------------------------- loading


def load_models(
    model: str,
    targets: Optional[list] = None,
    model_dir: Optional[str] = None,
    network: Optional[Network] = None,
    quiet: bool = True,
) -> tuple:
    """Trained models by name, folder or file.

    Args:
        model: "umx", "umxhq", "umxl" or "umxse"; a folder of ours or of openunmix; a file of weights, also
            Sony's of a single target (whose name must hold the target's) or of the joint model X-UMX
        targets: names, or a single one, or None for all that are there
        model_dir: where the files of a named model are; None: the user's cache folder, downloaded if missing
        network: of models that are not ours, from `read_network`
    Returns:
        list of Model, and the dict that separator.json holds
    Raises:
        UsageError: no such model or target, damaged or unfitting weights, a class that is needed or not.
    """
    if not all(isinstance(value, (str, os.PathLike)) for value in (model, model_dir or "")):
        raise UsageError(f"model {model!r}, model_dir {model_dir!r}: expected names or paths")
    path = Path(os.path.expanduser(model))
    targets = folders.asked_for(targets)
    if path.is_dir():
        files, config = folders.find(path, targets)
    elif path.is_file():
        files, config = {None: path}, folders.read_config(path.parent / folders.CONFIG) or dict(folders.UNSAID)
    elif str(model) in pretrained.MODELS:
        config = dict(pretrained.MODELS[model].config)
        files = pretrained.fetch(model, targets, model_dir, quiet)
        if pretrained.MODELS[model].note:
            print(pretrained.MODELS[model].note, file=sys.stderr)
    else:
        raise UsageError(f"unknown model {str(model)!r}: neither a folder, a file, nor {', '.join(pretrained.MODELS)}")

    found = {}
    for target, file in files.items():
        if file not in found:  # a joint network's is the file of each of its targets
            found[file] = _read_model(file, target, config, network)
        _check_config(file, found[file], target, config)
    models = list(found.values())
    if network and all(each.name in OWN for each in models):
        raise UsageError(f"{model} is a model of our own, not of {network.name}: leave out --network")
    available = [target for each in models for target in each.targets]
    if unknown := [target for target in targets or () if target not in available]:
        raise UsageError(f"{model} has no target {', '.join(unknown)}: it has {', '.join(available)}")
    return models, {**config, **models[0].config}


def _read_model(file, target, config, network):
    try:
        parameters, description = weights.read(file)
        if description is None and network is None:
            target = target or folders.target_of(file)
            return described(parameters, [target], config["nhop"], config["sample_rate"])
        if description is None:
            description = _from_config(file, target, config, network)
        cls = class_of(file, description, network)
        if cls in OWN.values():
            weights.check_claims(parameters, description)
        if cls is OpenUnmix and target:  # the file may have been renamed: the target's name is nowhere in it
            description["targets"] = [target]
        return Model(description, cls, parameters)
    except (ValueError, OSError) as error:
        line = str(error)
        raise UsageError(line if str(file) in line else f"{file}: {line}") from None


def _from_config(file, target, config, network):
    """The description of a network whose file brings none, such as one of nn.save_parameters."""
    if missing := [key for key in ("nfft", "nb_channels") if key not in config]:
        raise UsageError(f"it does not describe its network, and no separator.json tells its {' and '.join(missing)}")
    targets = target.split("+") if target else folders.target_of(file).split("+")
    description = {"class": network.name, "options": network.options or {}, "targets": targets, "n_fft": config["nfft"]}
    description.update({key: config[key] for key in ("nb_channels", "sample_rate")}, n_hop=config["nhop"])
    return description


def class_of(origin: Path, description: dict, network: Optional[Network]) -> type:
    """The class that a description names: one of ours, or the one that the user named again.

    Raises:
        UsageError: the network is not ours, and not named; or is another one, or has other options.
    """
    name = description["class"]
    if name in OWN:
        return OWN[name]
    if network is None:
        raise UsageError(f"{origin}: its network is not ours, name the file of its class again: --network {name}")
    if network.name.rpartition(":")[2] != name.rpartition(":")[2]:
        raise UsageError(f"{origin}: its network is {name}, not {network.name}")
    if network.options not in (None, description["options"]):
        raise UsageError(f"{origin}: its network has the options {description['options']}, not {network.options}")
    return network.cls


def _check_config(file, model, target, config):
    for key, value in model.config.items():
        if config.setdefault(key, value) != value:
            raise UsageError(f"{file} has {key} {value}, the separator {config[key]}")
    if target is not None and target not in model.targets:
        raise UsageError(f"{file} holds weights of {', '.join(model.targets)}, not of {target!r}")


def _published(name, targets, model_dir):
    return {model.targets[0]: model for model in load_models(name, targets, model_dir)[0]}


def umx_spec(targets: Optional[list] = None, model_dir: Optional[str] = None) -> dict:
    """Open-Unmix trained on MUSDB18, {target: Model}; arguments as of `load_models`."""
    return _published("umx", targets, model_dir)


def umxhq_spec(targets: Optional[list] = None, model_dir: Optional[str] = None) -> dict:
    """Open-Unmix trained on MUSDB18-HQ, {target: Model}."""
    return _published("umxhq", targets, model_dir)


def umxl_spec(targets: Optional[list] = None, model_dir: Optional[str] = None) -> dict:
    """Open-Unmix trained on more music, for non-commercial use only, {target: Model}."""
    return _published("umxl", targets, model_dir)


def umxse_spec(targets: Optional[list] = None, model_dir: Optional[str] = None) -> dict:
    """Open-Unmix for speech in noise, mono, 16 kHz, {target: Model}."""
    return _published("umxse", targets, model_dir)
