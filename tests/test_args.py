"""What holds for every command line."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import args
import separate

ROOT = Path(args.__file__).parent
COMMANDS = sorted(path.name for path in ROOT.glob("*.py") if path.read_text().endswith("\n    main()\n"))
PARSERS = {name: build for name, build in vars(args).items() if name.endswith("_parser")}


@pytest.fixture(params=PARSERS)
def parser(request):
    return PARSERS[request.param]()


@pytest.mark.parametrize("name", ["train_parser", "separate_parser", "evaluate_parser"])
def test_short_options_are_those_of_nnabla_s_examples(name):
    options, given = PARSERS[name]().parse(["-c", "cudnn", "-d", "1"])
    assert (options.context, options.device_id) == ("cudnn", 1) and {"context", "device_id"} <= given


def test_every_option_has_help_with_its_default_once_if_that_says_something(parser):
    options = re.split(r"\n(?=\S|  \S)", parser.format_help())  # with the lines that an option goes on in
    options = [" ".join(text.split()) for text in options]
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else action.dest
        text = next(text for text in options if re.match(rf"(-\w( \S+)?, )?{name}\b", text))
        assert action.help
        assert "default: None" not in text and "default: False" not in text and text.count("default:") <= 1, text
        if action.option_strings and type(action.default) in (int, float, str) and name != "--help":
            assert text.endswith(f"(default: {action.default})")


@pytest.mark.parametrize(
    "option, accepted, refused",
    [
        ("--epochs", ["1", "7"], ["0", "-1", "1.5", "inf", "nan", "", "1" + 20 * "0", "9" * 5000]),
        ("--seed", ["0", "7", str(2**64)], ["-1", "1.5", "1" + 20 * "0"]),
        ("--lr", ["1e-12", "1"], ["0", "-1", "inf", "nan", "a", "1e308"]),
        ("--lr-decay-gamma", ["1e-12", "1"], ["0", "1.1", "nan"]),
        ("--weight-decay", ["0", "1"], ["-1e-9", "inf", "nan", "1e308"]),
        ("--seq-dur", ["-1", "0", "1e-9", "6"], ["inf", "-inf", "nan", "1e308", "-1e308"]),
        ("--checkpoint-every", ["0", "0.5", "600"], ["-1", "inf", "nan", "1e308"]),
        ("--threads", ["1", "1024"], ["0", "1" + 20 * "0"]),
        ("--nb-workers", ["0", "1024"], ["-1", "1" + 20 * "0"]),
        ("--samples-per-track", ["1", "1000000"], ["0", "1" + 20 * "0"]),
        ("--device-id", ["0", "1"], ["-1", "abc", "", "1.5"]),
    ],
)
def test_numbers_that_options_take(option, accepted, refused, capsys):
    parser = args.train_parser()
    for text in accepted:
        assert getattr(parser.parse_args([option, text]), option[2:].replace("-", "_")) == float(text)
    for text in refused:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([f"{option}={text}"])
        assert stop.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--model", "--checkpoint", "--root"])
def test_paths_are_not_empty(option, capsys):
    parser = args.train_parser()
    assert getattr(parser.parse_args([option, "~/x"]), option[2:]) == str(Path.home() / "x")
    for text in ("", "\0", "~nobody-of-this-name/x"):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([option, text])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"{option}: " in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100000, '{"a": NaN}', '{"a": [1e999]}', '{"a": -Infinity}'])
def test_network_options_are_an_object_of_numbers_that_are_some(text, capsys):
    with pytest.raises(SystemExit) as stop:
        args.train_parser().parse_args(["--network-options", text])
    assert stop.value.code == 2 and "is not a JSON object" in capsys.readouterr().err


def test_what_an_option_accepts():
    """Values as they are recorded: of the type that the option has, within its bounds."""
    parser = args.train_parser()
    for name, value in vars(parser.parse_args([])).items():
        if type(value) in (int, float, list):
            assert parser.accepts(name, value), name
    for name, value in (("lr", 1), ("lr", "0.1"), ("batch_size", 16.0), ("batch_size", True), ("batch_size", 0)):
        assert not parser.accepts(name, value)
    for value in ("gain", [1], None, {}):
        assert not parser.accepts("source_augmentations", value)


@pytest.mark.parametrize("parser, required", [(args.separate_parser, ["song.wav"]), (args.evaluate_parser, [])])
def test_defaults_of_separation_are_the_reference_s(parser, required):
    """Of openunmix 1.3.0's command umx and its Separator; those of the class are the same."""
    expected = dict(model=["umxl"], niter=1, softmask=False, wiener_win_len=300, residual=None, aggregate=None)
    defaults = vars(parser().parse_args(required))
    assert {name: defaults[name] for name in expected} == expected
    assert (defaults["alpha"], defaults["targets"], defaults["segment"]) == (1.0, None, 480.0)
    assert defaults["wiener_eps"] == 1e-10
    of_class = {name: one.default for name, one in inspect.signature(separate.Separator).parameters.items()}
    for name in ("niter", "softmask", "wiener_win_len", "wiener_eps", "alpha", "targets", "segment"):
        assert of_class[name] == defaults[name], name


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_all_that_help_shows(name):
    result = python(name, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith(f"usage: {name}")


@pytest.mark.parametrize("options", [["--context", "cpu"], []], ids=["cpu", "no context"])
def test_a_failure_is_all_that_a_failure_shows(options, tmp_path):
    """Without what NNabla says when it is imported."""
    result = python("train.py", "--quiet", "--root", tmp_path / "nowhere", "--output", tmp_path / "out", *options)
    assert result.returncode == 2 and "Initializing" not in result.stdout
    assert result.stderr.startswith("train.py: ") and result.stderr.count("\n") == 1


def test_processes_of_a_command_say_nothing_of_nnabla():
    """As those of evaluate.py --cores 2, which import its main module by another name."""
    script = "import runpy; runpy.run_path('evaluate.py', run_name='__mp_main__')"
    assert python("-c", script).stderr == ""


def test_who_imports_our_modules_hears_nnabla_as_before():
    script = "import logging, train, evaluate, demo; assert logging.getLogger('nnabla').level == logging.NOTSET"
    result = python("-c", script)
    assert result.returncode == 0 and "Initializing" in result.stderr
