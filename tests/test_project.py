"""The files around the code: pins that agree, import levels that hold."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LEVELS = (
    {"args", "utils", "kernels"},
    {"functions", "solvers", "filtering", "data", "weights", "pretrained", "synthesize"},
    {"model"},
    {"train", "separate"},
    {"evaluate", "demo"},
)


def pins(text):
    return set(re.findall(r"^([\w.-]+==[\w.]+)$", text, re.MULTILINE))


@pytest.mark.parametrize("name, more", [("cpu", set()), ("gpu", {"nnabla-ext-cuda120==1.39.0"})])
def test_conda_environments_hold_the_pins_of_requirements(name, more):
    dependencies = yaml.safe_load((ROOT / f"environment-{name}.yml").read_text())["dependencies"]
    conda = [item for item in dependencies if isinstance(item, str)]
    assert {"python=3.10", "ffmpeg", "libsndfile"} <= set(conda)
    assert set(dependencies[-1]["pip"]) == pins((ROOT / "requirements.txt").read_text()) | more


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_only_what_lies_below_them(path):
    level = next(number for number, names in enumerate(LEVELS) if path.stem in names)
    above = set().union(*LEVELS[level:])
    if level > 0 and path.stem in LEVELS[1]:
        above -= {"args", "utils", "kernels"}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & above, f"{path.name} imports {imported & above}"


def test_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.yml"), *ROOT.glob("requirements*.txt"), *ROOT.glob("docs/*.md")]:
        assert path.name in readme, f"README.md does not mention {path.name}"
