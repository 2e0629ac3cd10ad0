"""What a training reads, of any dataset, for ``import data``; as a command, a look at it before hours are spent."""

from __future__ import annotations  # unions, on Python 3.9

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import utils

if __name__ == "__main__":
    utils.start()  # before imports that take long


from args import data_parser
from datasets import inspection
from datasets.augmentations import AUGMENTATIONS, REMIX
from datasets.batches import DataIterator, default_workers
from datasets.cache import open_recordings
from datasets.layouts import AlignedDataset, FixedSources, SourceFolders, VariableSources
from datasets.manifest import read_manifest
from datasets.recordings import Problems
from datasets.songs import ManifestSource, MusdbSource
from datasets.sources import Dataset
from datasets.statistics import magnitudes, statistics
from utils import UsageError

__all__ = [
    "AUGMENTATIONS", "REMIX", "DataIterator", "Dataset", "ManifestSource", "MusdbSource", "choose_targets",
    "default_workers", "load", "magnitudes", "open_split", "statistics",
]  # fmt: skip

_EVERY = ("source_augmentations", "seq_dur", "cache")
_FOLDERS = ("valid_share", "valid_seed", "sample_rate", *_EVERY)
# Of each dataset: its class, the options that it needs, those that it may have, and the one that names its target.
DATASETS = {
    "musdb": (MusdbSource, (), ("root", "is_wav", "samples_per_track", *_EVERY), None),
    "manifest": (ManifestSource, ("manifest",), ("samples_per_track", "silence_missing", *_FOLDERS), None),
    "aligned": (AlignedDataset, ("root", "input_file", "output_file"), _FOLDERS, "output_file"),
    "sourcefolder": (
        SourceFolders,
        ("root", "target_dir", "interferer_dirs"),
        ("ext", "nb_train_samples", "nb_valid_samples", *_FOLDERS),
        "target_dir",
    ),
    "trackfolder_fix": (
        FixedSources,
        ("root", "target_file", "interferer_files"),
        ("random_track_mix", *_FOLDERS),
        "target_file",
    ),
    "trackfolder_var": (
        VariableSources,
        ("root", "target_file"),
        ("ext", "random_interferer_mix", "silence_missing", *_FOLDERS),
        "target_file",
    ),
}
OPTIONS = {name for _, needed, allowed, _ in DATASETS.values() for name in needed + allowed}


def choose_targets(settings: dict[str, Any], given: set[str]) -> list[str]:
    """The targets that a command line asks for; UsageError if its options do not go with its dataset.

    Args:
        settings: all options; source_augmentations is changed to that dataset's default, unless given
        given: names of those that the command line gives
    """
    dataset = settings["dataset"]
    _, needed, allowed, naming = DATASETS[dataset]
    for name in needed:
        if not settings[name]:
            raise UsageError(f"--dataset {dataset} needs {_option(name)}")
    if wrong := sorted((given & OPTIONS) - {*needed, *allowed}):
        raise UsageError(f"{_option(wrong[0])} is no option of --dataset {dataset}")
    if naming is None:
        return settings["targets"] or [settings["target"]]
    if "source_augmentations" not in given:
        settings["source_augmentations"] = []
    file = Path(settings[naming])
    target = file.name if naming == "target_dir" else file.stem
    if (given & {"target", "targets"}) and (settings["targets"] or [settings["target"]]) != [target]:
        raise UsageError(f"--dataset {dataset} has the one target that {_option(naming)} names, {target}")
    return [target]


def _option(name):
    return "--" + name.replace("_", "-")


def open_split(
    split: str,
    dataset: str,
    targets: Sequence[str],
    seed: int,
    nb_channels: int,
    quiet: bool = True,
    thorough: bool = False,
    **settings: Any,
) -> Dataset:
    """One split of a dataset; its targets are stacked.

    Args:
        split: "train" or "valid"
        dataset: a key of DATASETS
        targets: of `choose_targets`
        seed: by which the training set is drawn
        nb_channels: at least so many in items
        thorough: read all files to their ends
        settings: the options in OPTIONS, by their names; those of other datasets are not looked at
    Raises:
        UsageError: nothing to train on, or to validate; or what else the dataset raises.
    """
    cls, needed, allowed, naming = DATASETS[dataset]
    options = {name: settings[name] for name in needed + allowed}
    options.update(split=split, nb_channels=nb_channels, seed=seed, quiet=quiet, thorough=thorough)
    options["seq_dur"] = options["seq_dur"] if options["seq_dur"] > 0 else None
    options["augmentations"] = options.pop("source_augmentations")
    if split == "valid":
        options["augmentations"] = [name for name in options["augmentations"] if name == "force_stereo"]
    if naming is None:
        options["target"] = list(targets)
        if split == "valid":
            options.update(seq_dur=None, samples_per_track=1)
    elif dataset == "sourcefolder":
        nb_samples = {name: options.pop(f"nb_{name}_samples") for name in ("train", "valid")}
        options["nb_samples"] = nb_samples[split]
    source = cls(**options)
    source.stacked = True
    return source


def load(**settings: Any) -> tuple[Dataset, Dataset]:
    """The training set and the validation set, which go together; arguments as of `open_split`."""
    train, valid = (open_split(split, **settings) for split in ("train", "valid"))
    if train.sample_rate != valid.sample_rate:
        raise UsageError(
            f"what trains has {train.sample_rate} Hz, what validates {valid.sample_rate} Hz: "
            f"--sample-rate {train.sample_rate} resamples, once"
        )
    train.nb_channels = valid.nb_channels = max(train.nb_channels, valid.nb_channels)
    return train, valid


# -------------------------------------------------------------------------------- command line


def problems(split: str, settings: dict[str, Any]) -> list[str]:
    """All that is wrong with the files of a split, a line for each; all of them are read to their ends."""
    try:
        open_split(split, **settings, thorough=True)
    except Problems as error:
        return error.lines
    except (UsageError, OSError) as error:
        return [utils.describe(error)]
    return []


@utils.command
def main(argv: Sequence[str] | None = None) -> None:
    """Check a dataset: read everything that is there, say all that is wrong with it, how much there is, how fast."""
    options, given = data_parser([*AUGMENTATIONS, REMIX]).parse(argv)
    settings = vars(options)
    targets = choose_targets(settings, given)
    settings = {name: settings[name] for name in ("dataset", "seed", "nb_channels", "quiet", *OPTIONS)}
    settings["targets"] = targets
    lines = [line for split in ("train", "valid") for line in problems(split, settings)]
    for line in dict.fromkeys(lines):
        print(f"data.py: {line}", file=sys.stderr)
    if lines:
        sys.exit(2)
    train, valid = load(**settings)
    for split, source in (("train", train), ("valid", valid)):
        for note in source.notes:
            print(f"{split}: {note}")
        print(f"{split}: {describe(source, settings['dataset'])}")
    # decoded and resampled as the others are: else the same song would not be the same samples
    test = open_recordings(files_of_test(settings), train.sample_rate, options.cache, options.quiet).values()
    wrong, known = inspection.look({"train": train, "valid": valid}, test, options.quiet)
    if settings["dataset"] == "musdb" and settings["root"]:  # stems of a test set are not decoded for this
        wrong += inspection.copies(*(Path(settings["root"], name).glob("*.stem.mp4") for name in ("train", "test")))
    for line in known:
        print(line)
    if train.nb_timesteps:
        for line in inspection.speeds(train, options.batch_size, options.nb_workers or len(os.sched_getaffinity(0))):
            print(line)
    if options.page:
        inspection.draw_page(options.page, train, targets, options.batch_size)
        print(f"{options.page}: a batch of {' and '.join(targets)}")
    for line in wrong:
        print(f"data.py: {line}", file=sys.stderr)
    if wrong:
        sys.exit(2)


def describe(source: Dataset, dataset: str) -> str:
    """What there is, in a line."""
    lengths = {one.path: one.nb_timesteps for one in source.recordings()}
    songs = [mixture.nb_timesteps for mixture in source.mixtures()]
    nb, total = (len(lengths), sum(lengths.values())) if dataset == "sourcefolder" else (len(songs), sum(songs))
    kind = "files" if dataset == "sourcefolder" else "tracks"
    hours = total / source.sample_rate / 3600
    return f"{nb} {kind}, {hours:.2f} h, {source.sample_rate} Hz, {source.nb_channels} channel(s), {len(source)} items"


def files_of_test(settings: dict[str, Any]) -> list[Path]:
    """Audio files of the test set that lies beside what is trained on."""
    if settings["dataset"] == "manifest":
        songs = [song for song in read_manifest(settings["manifest"]) if song.split == "test"]
        return [row.path for song in songs for rows in song.stems.values() for row in rows]
    return inspection.audio_files(Path(settings["root"]) / "test") if settings["root"] else []


if __name__ == "__main__":
    main()
