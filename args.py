"""Every command line: one parser per script, grouped, one line of help per option."""

from __future__ import annotations  # unions, on Python 3.9

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

TARGETS = ("vocals", "drums", "bass", "other")  # the one place that orders the targets
CONTEXTS = ("cpu", "cudnn")
MOST_ITERATIONS = 1000  # of the EM, which has long converged
MOST_ALPHA = 10  # of magnitudes to that power, single precision holds no more


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that say something, unless the help names the default already."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes options only by their full names."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
        """The options, and the names of those that the command line gives: an option may equal its default."""
        absent = object()
        options = argparse.Namespace(**{action.dest: absent for action in self._actions if action.dest != "help"})
        self.parse_args(argv, options)
        given = {name for name, value in vars(options).items() if value is not absent}
        for name in vars(options).keys() - given:
            setattr(options, name, self.get_default(name))
        return options, given

    def accepts(self, name: str, value: Any) -> bool:
        """Whether `value` is what an option that takes one, or a list of them, can have."""
        action = next(action for action in self._actions if action.dest == name)
        if value is None or action.nargs == 0:  # a flag
            return type(value) is type(action.default)
        if action.nargs is not None:
            return isinstance(value, list) and all(isinstance(item, action.type or str) for item in value)
        if action.type is None:
            return value in action.choices if action.choices else type(value) is str
        try:
            parsed = action.type(str(value))
        except (ValueError, argparse.ArgumentTypeError):
            return False
        return type(parsed) is type(value) and parsed == value

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def number(kind: type, lower: float, open_interval: bool = False, upper: float = 10**9) -> Callable[[str], float]:
    """An argparse type: a number of `kind` that is at least (or more than) `lower`, and at most `upper`."""

    def parse(text):
        value = kind(text)
        if not (value > lower if open_interval else value >= lower):
            raise argparse.ArgumentTypeError(f"{text} is not {'more than' if open_interval else 'at least'} {lower}")
        if value > upper:
            raise argparse.ArgumentTypeError(f"{text} is more than {upper}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid float value"
    return parse


POSITIVE = number(int, 1)
COUNT = number(int, 0)
NB_THREADS = 1024


def path(text: str) -> str:
    """An argparse type: the name of a file or folder, with ~ replaced."""
    try:
        if text and "\0" not in text:
            return str(Path(text).expanduser())
    except RuntimeError:  # ~ of a user whom there is not
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no name of a file or folder")


def add_context_options(parser: Parser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument("-c", "--context", choices=CONTEXTS, help="default: cudnn where it works, else cpu")
    group.add_argument("-d", "--device-id", type=COUNT, default=0, help="number of the GPU")
    group.add_argument("--threads", type=number(int, 1, upper=NB_THREADS), help="of the CPU; default: all cores")
    group.add_argument("--plain", action="store_true", help="NNabla's native functions on the CPU too (slow)")


def add_musdb_options(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("MUSDB18")
    group.add_argument(
        "--root", type=path, help="folder with train/ and test/; default: musdb's 7 s excerpts, downloaded"
    )
    group.add_argument("--is-wav", action="store_true", help="tracks are folders of WAV files, not .stem.mp4")
    return group


DATASETS = ("musdb", "manifest", "aligned", "sourcefolder", "trackfolder_var", "trackfolder_fix")


def add_data_options(parser: Parser, augmentations: Iterable[str] = ()) -> None:
    """What is trained on; data.py says which of these each dataset has, and which it needs."""
    group = parser.add_argument_group("dataset (docs/training.md: what a folder looks like)")
    group.add_argument("--dataset", choices=DATASETS, default="musdb", help="what --root, or --manifest, is")
    group.add_argument("--root", type=path, help="folder with train/; of musdb, default: its 7 s excerpts, downloaded")
    group.add_argument("--is-wav", action="store_true", help="musdb: tracks are folders of WAV files, not .stem.mp4")
    group.add_argument("--manifest", type=path, metavar="CSV", help="song,stem,path[,start,duration,split]")
    group.add_argument("--input-file", metavar="NAME", help="aligned: the mixture in each folder")
    group.add_argument("--output-file", metavar="NAME", help="aligned: the target in each folder, and its name")
    group.add_argument("--target-file", metavar="NAME", help="trackfolder_*: the target in each folder, and its name")
    group.add_argument("--interferer-files", nargs="+", metavar="NAME", help="trackfolder_fix: the other sources")
    group.add_argument("--target-dir", metavar="NAME", help="sourcefolder: the target's folder, and its name")
    group.add_argument("--interferer-dirs", nargs="+", metavar="NAME", help="sourcefolder: the others' folders")
    group.add_argument("--ext", default=".wav", help="sourcefolder, trackfolder_var: how names of sources end")
    group.add_argument(
        "--random-track-mix", action="store_true", help="trackfolder_fix: each interferer of a song of its own"
    )
    group.add_argument(
        "--random-interferer-mix", action="store_true", help="trackfolder_var: interferers of another song"
    )
    group.add_argument(
        "--silence-missing", action="store_true", help="trackfolder_var, manifest: what a song lacks is silent there"
    )
    group.add_argument(
        "--valid-share", type=number(float, 0, True, upper=0.9), default=0.1, help="of songs, if nothing else tells"
    )
    group.add_argument("--valid-seed", type=COUNT, default=42, help="by which these are chosen")
    group.add_argument("--sample-rate", type=POSITIVE, help="in Hz; files of others are resampled, once")
    group.add_argument("--cache", type=path, help="folder of what is decoded or resampled; default: the user's caches")

    group = parser.add_argument_group("excerpts")
    group.add_argument(
        "--seq-dur", type=number(float, -(10**9)), default=6.0, help="seconds per excerpt; <= 0: whole tracks"
    )
    group.add_argument(
        "--samples-per-track",
        type=number(int, 1, upper=10**6),
        default=64,
        help="musdb, manifest: excerpts per track and epoch",
    )
    group.add_argument("--nb-train-samples", type=POSITIVE, default=1000, help="sourcefolder: excerpts per epoch")
    group.add_argument("--nb-valid-samples", type=POSITIVE, default=100, help="sourcefolder: those that validate")
    group.add_argument(
        "--source-augmentations",
        nargs="*",
        default=["gain", "channelswap"],
        metavar="NAME",
        help=f"{', '.join(augmentations)}: of each source of a training mixture; none if empty, or for folders",
    )
    group.add_argument(
        "--nb-workers",
        type=number(int, 0, upper=NB_THREADS),
        help="threads that prepare batches ahead; default: what keeps the device busy, 1 for a CPU, up to 4 for a GPU",
    )


def train_parser(augmentations: Iterable[str] = (), losses: Iterable[str] = ()) -> Parser:
    """Options of train.py; --help names the `augmentations` and `losses`, which data.py and losses.py check."""
    parser = Parser(prog="train.py", description="Train Open-Unmix for one target, or several at once.")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--target", default="vocals", help="source to learn, or accompaniment, linear_mixture")
    targets.add_argument("--targets", nargs="+", help="several at once, by one joint network")
    output = parser.add_argument_group("what it begins with and leaves")
    output.add_argument(
        "--output", type=path, default="open-unmix", help="folder for the model, its log and checkpoint"
    )
    output.add_argument("--overwrite", action="store_true", help="replace an earlier training of the target there")
    output.add_argument(
        "--model", type=path, help="trained model to fine-tune: a folder, a file, or umx, umxhq, umxl, umxse"
    )
    output.add_argument(
        "--checkpoint", type=path, help="folder (or file) of a checkpoint to resume; --epochs is the total"
    )
    output.add_argument(
        "--checkpoint-every",
        type=number(float, 0),
        default=10.0,
        metavar="MINUTES",
        help="between checkpoints within an epoch; 0: after every step",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_context_options(parser)

    add_data_options(parser, augmentations)

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=POSITIVE, default=1000, help="number of epochs")
    recipe.add_argument("--batch-size", type=POSITIVE, default=16, help="excerpts per step, of all processes together")
    recipe.add_argument("--lr", type=number(float, 0, True), default=0.001, help="learning rate")
    recipe.add_argument(
        "--loss", default="mse", metavar="NAME", help=f"what is minimised: {', '.join(losses)}, or FILE.py:FUNCTION"
    )
    recipe.add_argument("--mcoef", type=number(float, 0), default=10.0, help="xumx: weight of the time domain; 0: none")
    recipe.add_argument(
        "--no-combinations",
        dest="combinations",
        action="store_false",
        help="xumx: each target alone; default: their sums, too",
    )
    recipe.add_argument("--patience", type=COUNT, default=140, help="epochs without a better loss before the end")
    recipe.add_argument("--lr-decay-patience", type=COUNT, default=80, help="epochs on a plateau before the decay")
    recipe.add_argument(
        "--lr-decay-gamma", type=number(float, 0, True, upper=1), default=0.3, help="factor of the decay"
    )
    recipe.add_argument("--weight-decay", type=number(float, 0), default=0.00001, help="L2 added to the gradient")
    recipe.add_argument(
        "--ema",
        type=number(float, 0, upper=0.99999),
        default=0.0,
        metavar="DECAY",
        help="validate and keep an average of the weights over the steps, each weighing DECAY times the next; as 0.999",
    )
    recipe.add_argument(
        "--seed", type=number(int, 0, upper=2**64), default=42, help="of the initial weights, the data and the dropout"
    )

    model = parser.add_argument_group("model")
    add_network_options(model)
    model.add_argument("--nfft", type=POSITIVE, default=4096, help="STFT window in samples")
    model.add_argument("--nhop", type=POSITIVE, default=1024, help="STFT hop in samples")
    model.add_argument("--hidden-size", type=POSITIVE, default=512, help="width of the bottleneck")
    model.add_argument("--bandwidth", type=POSITIVE, default=16000, help="frequencies that the model reads, in Hz")
    model.add_argument("--nb-channels", type=int, choices=(1, 2), default=2, help="1: average the magnitudes")
    model.add_argument("--unidirectional", action="store_true", help="causal LSTM")
    model.add_argument("--crossing", action="store_true", help="several targets: X-UMX, networks that share averages")
    return parser


def data_parser(augmentations: Iterable[str] = ()) -> Parser:
    parser = Parser(prog="data.py", description="Check that a dataset is complete and readable.")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--target", default="vocals", help="source to learn, or accompaniment, linear_mixture")
    targets.add_argument("--targets", nargs="+", help="several at once")
    parser.add_argument("--nb-channels", type=int, choices=(1, 2), default=2, help="of the model")
    parser.add_argument("--batch-size", type=POSITIVE, default=16, help="excerpts per batch")
    parser.add_argument("--seed", type=number(int, 0, upper=2**64), default=42, help="of what is drawn")
    parser.add_argument("--page", type=path, metavar="PNG", help="draw the spectrograms and levels of a batch")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_data_options(parser, augmentations)
    return parser


def synthesize_parser() -> Parser:
    parser = Parser(prog="synthesize.py", description="Write synthetic songs in the MUSDB18-HQ layout.")
    parser.add_argument("output", help="folder to make")
    parser.add_argument("--train", type=COUNT, default=8, help="songs to train on")
    parser.add_argument("--valid", type=COUNT, default=2, help="songs of the validation split (also in train/)")
    parser.add_argument("--test", type=COUNT, default=2, help="songs in test/")
    parser.add_argument("--duration", type=number(float, 1, True), default=30.0, help="seconds per song")
    parser.add_argument("--seed", type=COUNT, default=42, help="another seed makes other songs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def json_object(text: str) -> dict:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text} is not a JSON object, as {{"size": 64}}')
    return value


def add_network_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--network", metavar="FILE.py:CLASS", help="a network of one's own; default: ours")
    group.add_argument("--network-options", type=json_object, metavar="JSON", help="arguments of its class")


def add_separation_options(parser: Parser) -> None:
    """What separate.py and evaluate.py share: the model and the filter."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        nargs="+",
        default=["umxl"],
        help="umx, umxhq, umxl, umxse; a folder of a model; a file of weights; of several, estimates are averaged",
    )
    model.add_argument("--model-dir", help="folder of the files of a named model, for machines without network")
    model.add_argument("--targets", nargs="+", help="default: all that the model has")
    add_network_options(model)
    group = parser.add_argument_group("separation")
    group.add_argument(
        "--niter", type=number(int, 0, upper=1000), default=1, help="iterations of the Wiener filter's EM"
    )
    group.add_argument("--softmask", action="store_true", help="start it from a soft mask, not the mixture's phase")
    group.add_argument(
        "--alpha", type=number(float, 0, True, MOST_ALPHA), default=1.0, help="exponent in the soft mask"
    )
    group.add_argument("--wiener-win-len", type=COUNT, default=300, help="frames filtered together; 0: all")
    group.add_argument(
        "--wiener-eps",
        type=number(float, 0, upper=1),
        default=1e-10,
        metavar="EPS",
        help="regularisation of the filter; 0: norbert's, 2.2e-16",
    )
    group.add_argument("--residual", metavar="NAME", help="one more stem: the mixture less all estimates")
    group.add_argument("--aggregate", metavar="JSON", help='stems to add up, as {"rest": ["drums", "bass"]}')
    group.add_argument("--segment", type=number(float, 30), default=480.0, help="longer recordings are cut, in seconds")


def separator_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of Separator.load, from what separate.py and evaluate.py share."""
    names = ("model", "targets", "model_dir", "network", "network_options", "quiet", "niter", "softmask", "alpha")
    return {
        **{name: getattr(args, name) for name in (*names, "context", "device_id", "segment")},
        "residual": args.residual or False,
        "wiener_win_len": args.wiener_win_len or None,
        "wiener_eps": args.wiener_eps or None,
    }


def separate_parser() -> Parser:
    parser = Parser(prog="separate.py", description="Separate recordings into stems.")
    parser.add_argument("inputs", nargs="*", help="audio files, or folders of them; before --model, if of several")
    parser.add_argument("--outdir", help="stems go to OUTDIR/<song>/; default: <song>_<model>/")
    parser.add_argument("--start", type=number(float, 0), default=0.0, help="seconds to skip")
    parser.add_argument("--duration", type=number(float, 0, True), help="seconds to separate; default: all")
    parser.add_argument("--ext", choices=("wav", "flac"), default="wav", help="file format of the stems")
    parser.add_argument("--subtype", choices=("16", "24", "float"), help="default: float for wav, 24 for flac")
    parser.add_argument(
        "--sum-to-mixture", action="store_true", help="spread what they leave of the recording over the stems"
    )
    parser.add_argument(
        "--cores", type=POSITIVE, default=1, help="recordings at a time, a process each; they share --threads"
    )
    parser.add_argument("--karaoke", action="store_true", help="short for --targets vocals --residual accompaniment")
    parser.add_argument(
        "--stream", action="store_true", help="raw float32 samples on standard input to those of one stem, as they come"
    )
    parser.add_argument("--play", action="store_true", help="--stream from the sound device's input to its output")
    parser.add_argument(
        "--causal-wiener",
        type=number(float, 0, True),
        metavar="SECONDS",
        help="--stream through a Wiener filter of the past, whose covariances forget in that time",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_separation_options(parser)
    add_context_options(parser)
    return parser


def evaluate_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description="Separate MUSDB18's test set and score the stems.")
    parser.add_argument(
        "--evaldir", help="folder of the scores, where the same command continues; default: evaluation/<model>"
    )
    parser.add_argument("--outdir", help="stems go to OUTDIR/<subset>/<track>/; default: they are not kept")
    parser.add_argument("--cores", type=POSITIVE, default=1, help="processes, which share the tracks and --threads")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=path,
        metavar=("A", "B"),
        help="two folders of scores, song by song; nothing else",
    )
    scores = parser.add_argument_group("scores (BSSEval v4)")
    scores.add_argument("--museval", action="store_true", help="by museval itself: the same, slower")
    scores.add_argument(
        "--reference-precision",
        choices=("16", "file"),
        default="16",
        help="of the sources: 16 bits, as musdb reads them, or as the files hold them",
    )
    data = add_musdb_options(parser)
    data.add_argument("--subset", choices=("test", "train", "valid"), default="test", help="valid is a part of train")
    add_separation_options(parser)
    add_context_options(parser)
    return parser


def weights_parser() -> Parser:
    parser = Parser(prog="weights.py", description="Convert weights between NNabla (.h5) and torch (.pth).")
    parser.add_argument("src", help="file or model folder: ours, Sony's NNabla, or openunmix's")
    parser.add_argument("dst", help="file (.h5 or .pth), or a folder if SRC is one")
    parser.add_argument("--to", choices=("h5", "pth"), help="format of a folder's weights; default: the other one")
    return parser


def export_parser() -> Parser:
    parser = Parser(prog="export.py", description="Write a trained model for other software: ONNX, or NNabla's NNP.")
    parser.add_argument("model", help="umx, umxhq, umxl, umxse; a folder of a model; a file of weights")
    parser.add_argument("out", help="file to write, .onnx or .nnp")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--target", help="the only one to estimate")
    targets.add_argument("--targets", nargs="+", help="default: all that the model has")
    parser.add_argument("--model-dir", help="folder of the files of a named model, for machines without network")
    parser.add_argument("--frames", type=number(int, 1, upper=10**5), default=256, help="of an .nnp, which are fixed")
    add_network_options(parser)
    return parser


def demo_parser() -> Parser:
    parser = Parser(prog="demo.py", description="Write a page to look at and listen to what a model has learnt.")
    parser.add_argument("--songs", default="demo/songs", help="folder in MUSDB18-HQ's layout; those in test/ are used")
    parser.add_argument("--model", default="demo/model", help="folder of a trained model")
    parser.add_argument(
        "--outdir", default="demo", help="the page is OUTDIR/index.html, its files are in OUTDIR/media/"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser
