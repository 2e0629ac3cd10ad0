"""The files around the code: pins that agree, import levels that hold."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import mutants
import pytest
import yaml

ROOT = Path(__file__).parents[1]
LEVELS = (
    {"args", "utils", "music", "kernels", "randomness", "frames"},
    {"files", "containers", "ffmpeg_files", "ranks"},
    {"context", "communicator", "pool", "fast", "fourier", "filtering", "bsseval"}
    | {"audio", "torch_files", "h5_files", "pretrained", "folders"},
    {"functions", "foreign", "solvers", "scores", "datasets", "stems", "synthesize"},
    {"model", "losses", "data"},
    {"weights"},
    {"trained"},
    {"checkpoint", "ensemble"},
    {"outputs", "separator"},
    {"streaming"},
    {"live"},
    {"train", "separate", "export"},
    {"scorer"},
    {"evaluate", "demo"},
)
FOLDERS = ("kernels", "datasets")  # whose files import each other
FILES = sorted([*ROOT.glob("*.py"), *(path for name in FOLDERS for path in ROOT.glob(f"{name}/*.py"))])

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).replace(".__init__", ""): path for path in FILES}


def pins(text):
    return set(re.findall(r"^([\w.-]+==[\w.]+)$", text, re.MULTILINE))


@pytest.mark.parametrize("name, files", [("cpu", [""]), ("gpu", ["", "-gpu"])])
def test_conda_environments_hold_the_pins_of_requirements(name, files):
    dependencies = yaml.safe_load((ROOT / f"environment-{name}.yml").read_text())["dependencies"]
    conda = [item for item in dependencies if isinstance(item, str)]
    assert {"python=3.10", "ffmpeg", "libsndfile"} <= set(conda)
    required = [pins((ROOT / f"requirements{file}.txt").read_text()) for file in files]
    assert set(dependencies[-1]["pip"]) == set().union(*required) and all(required)


def imported(module):
    """Everything that a module imports, wherever in its file; `from a import b` as a and as a.b."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_lies_below_them(module):
    package = module.split(".")[0]
    level = next(number for number, names in enumerate(LEVELS) if package in names)
    above = set().union(*LEVELS[level:])
    if package in FOLDERS:
        above -= {package}
    wrong = {name for name in imported(module) if name.split(".")[0] in above}
    assert not wrong, f"{module} imports {wrong}"


def test_imports_have_no_circle():
    TopologicalSorter({module: imported(module) & MODULES.keys() for module in MODULES}).prepare()


def test_programs_hide_no_room():
    """A program's own folder comes first where Python looks for modules."""
    assert not {path.stem for path in ROOT.glob("benchmarks/*.py")} & set(MODULES)


def test_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.yml"), *ROOT.glob("requirements*"), *ROOT.glob("docs/*.md")]:
        assert path.name in readme, f"README.md does not mention {path.name}"


def test_every_mutant_fits():
    """Its old text is there, once; so are the tests that are to notice it."""
    listed = mutants.read()
    assert len({str(mutant) for mutant in listed}) == len(listed)
    for mutant in listed:
        mutant.text()  # raises
        for test in mutant.tests.split():
            file, _, name = test.partition("::")
            path = ROOT / "tests" / file
            text = path.read_text() if path.exists() else ""
            assert f"def {name.partition('[')[0]}(" in text if name else text, f"{mutant}: no test {test}"
