"""Which files a folder of a trained model holds: the one answer, for every command.

A target's weights are <target>.h5 or <target>.pth, or, as openunmix names them, <target>-<hash>.pth or
<target>_<hash>.pth; those of a joint network are <target>+<target>….h5. separator.json says which targets there are,
and what a separator needs to know besides.
"""

import glob
import os
import re
from pathlib import Path
from typing import Optional, Union

import files
from args import TARGETS
from utils import UsageError

CONFIG = "separator.json"
KINDS = (".h5", ".pth")
MOST_TARGETS = 100
UNSAID = {"nhop": 1024, "sample_rate": 44100}  # of files that come without separator.json: Sony's, the music models


def in_order(targets: list) -> list:
    """Targets in the usual order, others behind them as they come."""
    return sorted(targets, key=lambda target: TARGETS.index(target) if target in TARGETS else len(TARGETS))


def name_of(targets: list) -> str:
    """The name, without its ending, of the files of a network of these targets."""
    return "+".join(targets)


def name_of_models(models: list) -> str:
    """What results of one model, or of several together, are named after."""
    return "+".join(Path(os.path.realpath(model)).stem for model in models)


def check_targets(targets: list) -> None:
    """UsageError unless these can be targets: their names are parts of file names, and differ."""
    for target in targets:
        is_name = isinstance(target, str) and files.is_file_name(target) and target.isprintable() and len(target) < 64
        if not is_name or "+" in target or target.startswith("."):
            raise UsageError(f"the target {target!r:.99} cannot name a file: letters, digits, - and _ will do")
    if len(set(targets)) < len(targets):
        raise UsageError(f"a target is named twice: {', '.join(targets)}")


def asked_for(targets: Union[None, str, list]) -> Optional[list]:
    """Targets as a caller names them, one or several, as a list; None for all. UsageError if they cannot be targets."""
    if targets is None:
        return None
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, (list, tuple, set, frozenset)) or not targets:
        raise UsageError(f"targets {targets!r}: expected a name, names, or None for all")
    check_targets(list(targets))
    return list(targets)


def read_config(path: Path) -> dict:
    """What a separator.json says, {} if there is none.

    Raises:
        UsageError: not JSON, or values that cannot be.
    """
    if not path.exists():
        return {}
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not what a training writes")
    for key in config.keys() & {"nfft", "nhop", "sample_rate", "nb_channels"}:
        value = config[key]
        if type(value) not in (int, float) or not 0 < value < 2**31 or value != int(value):
            raise UsageError(f"{path} has {key} {value!r:.99}, which is not a positive whole number")
        config[key] = int(value)  # openunmix writes sample rates as 44100.0
    targets = config.get("targets")
    if targets is not None and not (isinstance(targets, list) and len(targets) <= MOST_TARGETS):
        raise UsageError(f"{path} has targets {targets!r:.99}, which is not a list of names")
    try:
        check_targets(targets or [])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if missing := [key for key in UNSAID if key not in config]:
        raise UsageError(f"{path} lacks {' and '.join(missing)}")
    return config


def write_config(folder: Path, config: dict, targets: list) -> None:
    """separator.json; the targets that are there already stay. `check_config` comes first."""
    with files.alone(folder):  # trainings of other targets write it too
        earlier = check_config(folder, config)
        files.write_json(folder / CONFIG, {**config, "targets": sorted({*earlier.get("targets", []), *targets})})


def check_config(folder: Path, config: dict) -> dict:
    """The separator.json of a folder; UsageError if it says something else than `config`."""
    earlier = read_config(folder / CONFIG)
    for key, value in config.items():
        if earlier.get(key, value) != value:
            raise UsageError(f"{folder / CONFIG} says {key} = {earlier[key]}, not {value}: use another --output")
    return earlier


def weights_of(folder: Path, target: str, known: tuple = (), kinds: tuple = KINDS) -> Optional[Path]:
    """The file of a target's weights, of a joint network's if it is one; None if there is none.

    Args:
        known: all targets of the folder as far as known; a file that has the name of one is not another's
        kinds: endings that count; of two files that differ in nothing else, the first
    Raises:
        UsageError: several files could be it.
    """
    exact = [folder / f"{target}{kind}" for kind in kinds]
    found = [path for path in exact if path.is_file()][:1]
    if not found and ".pth" in kinds:
        hashed = sorted(folder.glob(f"{glob.escape(target)}[-_]*.pth"))
        found = [path for path in hashed if path.stem not in known]
    if ".h5" in kinds:
        found += sorted(path for path in folder.glob("*+*.h5") if target in path.stem.split("+"))
    if len(found) > 1:
        raise UsageError(f"several files of the target {target!r}: {', '.join(map(str, found))}")
    return found[0] if found else None


def find(folder: Path, targets: Optional[list] = None, kinds: tuple = KINDS) -> tuple:
    """The files of a folder of ours, of openunmix, or of Sony's.

    Args:
        targets: names; None: those in separator.json, or else all whose weights are there
        kinds: endings of the files that count
    Returns:
        {target: path}; and what separator.json says, or `UNSAID`
    Raises:
        UsageError: a target without weights, or with several files of them; no target at all.
    """
    config = read_config(folder / CONFIG) or dict(UNSAID)
    listed = config.get("targets")
    known = tuple(listed or [path.stem for path in folder.glob("*.json") if path.name != CONFIG])
    if targets is None:
        targets = listed or _present(folder, known, kinds)
    if not targets:
        raise UsageError(f"no weights (<target>.h5 or <target>*.pth) in {folder}")
    files = {target: weights_of(folder, target, known, kinds) for target in in_order(targets)}
    if missing := [target for target, path in files.items() if path is None]:
        others = [target for target in files if target not in missing]
        rest = f", only of {' and '.join(others)}" if others else ""
        names = " or ".join(f"{missing[0]}{'*' * (kind == '.pth')}{kind}" for kind in kinds)
        raise UsageError(f"no weights of the target {missing[0]!r} ({names}) in {folder}{rest}")
    return files, config


def _present(folder: Path, known: tuple, kinds: tuple) -> list:
    """The targets whose weights are in a folder that does not list them."""
    files = {path for kind in kinds for path in folder.glob(f"*{kind}")}
    targets = [target for path in files if "+" in path.stem for target in path.stem.split("+")]
    for target in dict.fromkeys([*TARGETS, *known]):
        if path := weights_of(folder, target, known, kinds):
            targets.append(target)
            files.discard(path)
            files.discard(path.with_suffix(".pth"))
    targets += [target_of(path) for path in files if "+" not in path.stem]
    return in_order(sorted(set(targets)))


def target_of(path: Path) -> str:
    """The target that a file of weights is named after.

    Its name, without openunmix' hash; or, as Sony's files are named (umx_vocals.h5), the usual target in it.
    """
    name = re.sub("[-_][0-9a-f]{8}$", "", path.stem)
    words = [word for word in re.split("[-_.]", name) if word in TARGETS]
    return words[0] if len(words) == 1 else name
