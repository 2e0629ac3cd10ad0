"""The published models of openunmix 1.3.0, by name: downloaded once, checked, cached."""

from __future__ import annotations  # unions, on Python 3.9

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch

import files
from utils import UsageError

ZENODO = "https://zenodo.org/records"


@dataclass(frozen=True)
class Published:
    """Where a model's weights lie; a file's name carries the first 8 hex digits of its SHA-256."""

    url: str
    files: dict[str, str]  # target -> file
    config: dict[str, int]  # as in separator.json
    note: str = ""


_MUSIC = {"nfft": 4096, "nhop": 1024, "sample_rate": 44100, "nb_channels": 2}

MODELS = {
    "umx": Published(
        f"{ZENODO}/3370486/files",
        {
            "vocals": "vocals-c8df74a5.pth",
            "drums": "drums-5a48008b.pth",
            "bass": "bass-646024d3.pth",
            "other": "other-f8e132cc.pth",
        },
        _MUSIC,
    ),
    "umxhq": Published(
        f"{ZENODO}/3370489/files",
        {
            "vocals": "vocals-b62c91ce.pth",
            "drums": "drums-9619578f.pth",
            "bass": "bass-8d85a5bd.pth",
            "other": "other-b52fbbf7.pth",
        },
        _MUSIC,
    ),
    "umxl": Published(
        f"{ZENODO}/5069601/files",
        {
            "vocals": "vocals-bccbd9aa.pth",
            "drums": "drums-69e0ebd4.pth",
            "bass": "bass-2ca1ce51.pth",
            "other": "other-c8c5b3e6.pth",
        },
        _MUSIC,
        "umxl is licensed for non-commercial use only (CC BY-NC-SA 4.0)",
    ),
    "umxse": Published(
        f"{ZENODO}/3786908/files",
        {"speech": "speech_f5e0d9f9.pth", "noise": "noise_04a6fc2d.pth"},
        {"nfft": 1024, "nhop": 512, "sample_rate": 16000, "nb_channels": 1},
    ),
}


def _is_published(path, name):
    return pooch.file_hash(path, alg="sha256").startswith(Path(name).stem[-8:])


def fetch(
    name: str, targets: Sequence[str] | None = None, model_dir: str | Path | None = None, quiet: bool = True
) -> dict[str, Path]:
    """Files of a published model: {target: path}, downloaded if they are not there yet.

    Args:
        name: a key of MODELS
        targets: some of its targets; None: all
        model_dir: folder of the files; None: the user's cache folder
    Raises:
        UsageError: no such target; a file cannot be downloaded, or is not the published one.
    """
    published = MODELS[name]
    folder = Path(os.path.expanduser(model_dir)) if model_dir else Path(pooch.os_cache("open-unmix-nnabla")) / name
    if unknown := [target for target in targets or () if target not in published.files]:
        raise UsageError(f"{name} has no target {', '.join(unknown)}: it has {', '.join(published.files)}")
    paths = {target: folder / published.files[target] for target in targets or published.files}
    for path in paths.values():
        if path.exists():
            if not path.is_file() or not _is_published(path, path.name):
                raise UsageError(f"{path} is damaged: its SHA-256 is not that in its name; delete it")
            continue
        url = f"{published.url}/{path.name}"
        files.writable_folder(folder)
        try:
            with files.atomic_path(path) as temporary:
                pooch.HTTPDownloader(progressbar=not quiet)(url, temporary, None)
                if not _is_published(temporary, path.name):
                    raise UsageError(f"{url} is not the published file: its SHA-256 is not that in its name")
        except OSError as error:
            if error.errno is not None:  # the disk's, not the network's
                raise
            from requests.exceptions import ConnectionError as NoConnection  # slow to import

            missing = ", ".join(other.name for other in paths.values() if not other.exists())
            reason = "no connection" if isinstance(error, NoConnection) else " ".join(str(error).split())[:200]
            raise UsageError(
                f"cannot download {url} ({reason}): put {missing} from {published.url} into {folder}"
            ) from None
    return paths
