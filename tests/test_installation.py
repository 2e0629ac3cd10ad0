"""How the project is installed: locked requirements, the image's steps."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_project import ROOT

LOCKS = {"requirements.lock": "requirements.txt", "requirements-gpu.lock": "requirements-gpu.txt"}


def locked(name):
    """{package: version} of a lock file, each with a hash, and nothing else in it."""
    entries = {}
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", "")
    for line in text.splitlines():
        requirement, *hashes = line.split()
        assert hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", word) for word in hashes), line
        package, version = requirement.split("==")
        assert package not in entries
        entries[package] = Version(version)
    return entries


def required(name):
    """The pins of a file of requirements and of those that it names."""
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            yield from required(line[3:])
        elif line and not line.startswith("#"):
            yield Requirement(line)


@pytest.mark.parametrize("lock, requirements", LOCKS.items())
def test_locks_hold_the_pins_and_all_that_these_need(lock, requirements):
    """What packages need is asked of those that are installed here, whose pins are the same."""
    versions = locked(lock)
    pins = list(required(requirements))
    assert pins
    for pin in pins:
        assert versions[canonicalize_name(pin.name)] in pin.specifier, f"make {lock} again, by the command in its head"
    pinned = {canonicalize_name(pin.name) for pin in required("requirements.txt")}
    for package in pinned:
        for line in metadata.requires(package) or ():
            need = Requirement(line)
            if not need.marker or need.marker.evaluate({"extra": ""}):
                version = versions.get(canonicalize_name(need.name))
                assert version and need.specifier.contains(version), f"{package} needs {need}, {lock} has {version}"


def test_the_gpu_only_adds_to_the_lock():
    assert locked("requirements.lock").items() < locked("requirements-gpu.lock").items()


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_say_how_they_were_made_and_name_no_registry(lock):
    text = (ROOT / lock).read_text()
    command = text.splitlines()[1]
    assert "uv pip compile" in command and f" {LOCKS[lock]} -o {lock}" in command
    assert "://" not in text and "--index" not in text and "--find-links" not in text


# ------------------------------------------------------------------------------------------- the image


def instructions():
    """{stage: (its origin, [(instruction, what follows)])} of the Dockerfile."""
    stages = {}
    for line in (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            name, rest = line.split(maxsplit=1)
            if name == "FROM":
                origin, _, stage = rest.split()
                stages[stage] = origin, []
            else:
                stages[stage][1].append((name, rest))
    return stages


STAGES = instructions()


def steps(stage):
    """All instructions of a stage, from those of the first that it stands on."""
    origin, own = STAGES[stage]
    return [*(steps(origin) if origin in STAGES else ()), *own]


def ignored(folder, names):
    """Those of a folder of the project that do not get into the image."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    within = Path(folder).relative_to(ROOT)
    anywhere = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    return {
        name
        for name in names
        if any(fnmatch.fnmatch(name, pattern) for pattern in anywhere)
        or any((within / name).match(pattern) and pattern.count("/") == len(within.parts) for pattern in patterns)
    }


def place(root, step):
    """Do a COPY below `root` instead of /."""
    *sources, destination = step.split()
    folder = root / destination.lstrip("/")
    assert destination.endswith("/")
    for source in sources:
        if source == ".":
            shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=ignored)
        else:
            assert not ignored(ROOT, [source]), f"{source} is in .dockerignore"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, folder)


def test_stages_of_the_image():
    version = (ROOT / ".python-version").read_text().strip()
    origins = {origin for origin, _ in STAGES.values()} - set(STAGES)
    assert origins == {f"python:{version}-slim"}, "a name without the address of a registry"
    assert set(STAGES) == {"base", "gpu", "cpu"} and list(STAGES)[-1] == "cpu"


@pytest.mark.parametrize("stage, lock", [("cpu", "requirements.lock"), ("gpu", "requirements-gpu.lock")])
def test_steps_of_the_image(stage, lock, tmp_path):
    """Without Docker: files are copied as it would, in its order; its command runs among them, with these packages."""
    installed, environment, directory = [], {**os.environ}, None
    for name, rest in steps(stage):
        if name == "COPY":
            place(tmp_path, rest)
        elif name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest]).returncode == 0 and "://" not in rest
            for path in re.findall(r"-r (\S+)", rest):
                assert (tmp_path / path.lstrip("/")).is_file(), f"{path} is used before it is copied"
                assert "--require-hashes" in rest
                installed.append(path.rsplit("/")[-1])
            if folder := re.search(r"mkdir -m 1777 (\S+)", rest):
                (tmp_path / folder[1].lstrip("/")).mkdir()
        elif name == "ENV":
            environment.update((key, f"{tmp_path}{path}") for key, path in re.findall(r"(\w+)=(\S+)", rest))
        elif name == "WORKDIR":
            directory = tmp_path / rest.lstrip("/")
            directory.mkdir()
        else:
            environment[name] = rest  # the last one counts
    assert installed[-1] == lock and (tmp_path / "open-unmix" / "docs" / "published_scores.json").exists()
    assert not list(tmp_path.rglob("test_*.py")) and not list(tmp_path.rglob(".git"))
    python, *entry = json.loads(environment.pop("ENTRYPOINT"))
    assert python == "python"

    def container(*command):
        command = [sys.executable, *entry, *map(str, command)]
        process = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stderr
        return process.stdout

    assert "usage" in container(*json.loads(environment.pop("CMD")))
    if stage == "cpu":  # in /data, of which the image has only the name
        container("synthesize", "songs", "--train", 0, "--valid", 0, "--test", 1, "--duration", 2, "--quiet")
        assert list(directory.glob("songs/test/*/mixture.wav"))
