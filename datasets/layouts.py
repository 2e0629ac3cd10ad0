"""The reference's datasets of folders, with the meaning that they have in openunmix 1.3.0.

Each reads <root>/train and <root>/valid; where there is no valid/, a share of what is in train/ validates. Folders and
files are taken in the order of their names. A song is as long as its shortest file. What lacks a file, or is shorter
than an excerpt, is left out, with a note. Where the reference stumbles, these do not: statistics are of mixtures
without augmentations, a whole song is a whole song (--seq-dur 0), trackfolder_var needs no augmentations, a file that
cannot be read is an error, an excerpt may be all of a file, and validation leaves the training's random numbers alone.
"""

from __future__ import annotations  # unions, on Python 3.9

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets.cache import open_recordings
from datasets.mixing import Item, Part
from datasets.recordings import Recording
from datasets.sources import Dataset, validating
from randomness import random_stream
from utils import UsageError, some


class Group(NamedTuple):
    """Files of one folder that belong together; the target is None where it is missing."""

    target: Recording | None
    others: list[Recording]
    nb_timesteps: int


class LayoutDataset(Dataset):
    """Args:
        root: folder with train/ and valid/
        valid_share, valid_seed: which songs of train/ validate if there is no valid/
        sample_rate: in Hz, to which files of other rates are resampled; None: all have the same
        nb_channels: at least so many in items
        cache: folder of what is decoded or resampled; None: where the user's caches are
        thorough: read all files to their ends
        the others: as of `Dataset`
    Raises:
        UsageError: no such folder; nothing in it that can be used; a file that cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        seq_dur: float | None = None,
        augmentations: Iterable[str] = (),
        seed: int = 42,
        nb_channels: int = 1,
        valid_share: float = 0.1,
        valid_seed: int = 42,
        sample_rate: int | None = None,
        cache: str | Path | None = None,
        quiet: bool = True,
        thorough: bool = False,
    ):
        super().__init__(split, seq_dur, augmentations, seed)
        self.root, self.nb_channels_asked = Path(root).expanduser(), nb_channels
        self.valid_share, self.valid_seed = valid_share, valid_seed
        self._opening = {"sample_rate": sample_rate, "cache": cache, "quiet": quiet, "thorough": thorough}
        if not (self.root / "train").is_dir():
            raise UsageError(f"{self.root} has no folder train/: --root names the folder of the dataset")
        self.folder = self.root / split
        self.is_shared = not (self.root / "valid").is_dir()
        if self.is_shared:
            self.folder = self.root / "train"

    def of_split(self, names: Iterable[str]) -> list[str]:
        """Those of a list of names of train/ that this split has, if there is no valid/."""
        names = sorted(names)
        if not self.is_shared:
            return names
        chosen = validating(names, self.valid_share, self.valid_seed)
        return [name for name in names if (name in chosen) == (self.split == "valid")]

    def songs(self) -> list[Path]:
        """Folders of this split, or of those that are shared."""
        folders = [path.name for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        if not folders:
            raise UsageError(f"{self.folder} has no folders: one per song is needed")
        return [self.folder / name for name in sorted(folders)]

    def open_all(self, paths: Iterable[Path]) -> dict[Path, Recording]:
        found = open_recordings(paths, **self._opening)
        self.adopt_formats(found.values(), self.nb_channels_asked)
        return found

    def leave_out(self, names: Sequence[str], total: int, reason: str) -> None:
        if names:
            self.notes.append(f"{len(names)} of {total} folders in {self.folder} {reason}, left out: {some(names)}")

    def nothing(self) -> UsageError:
        return UsageError(f"nothing in {self.folder} can be used: {'; '.join(self.notes)}")


class TrackFolders(LayoutDataset):
    """What has a folder per song: an epoch has one excerpt of each.

    Attributes:
        groups: of each song
    """

    def _open_groups(self, found: dict[str, tuple[Path | None, list[Path]]]) -> None:
        """Args: found: of each song, the target's file and the others."""
        if not found:
            raise self.nothing()
        found = {name: found[name] for name in self.of_split(found)}
        if not found:
            raise UsageError(f"{self.folder} has one song alone, and {self.root} no valid/: none would validate")
        paths = {name: [*([target] if target else []), *others] for name, (target, others) in found.items()}
        recordings = self.open_all(path for some_paths in paths.values() for path in some_paths)
        lengths = {name: min(recordings[path].nb_timesteps for path in paths[name]) for name in found}
        self.names = self.long_enough(lengths)
        if not self.names:
            raise self.nothing()
        self.groups = []
        for name in self.names:
            target, others = found[name]
            self.groups.append(
                Group(target and recordings[target], [recordings[path] for path in others], lengths[name])
            )

    def __len__(self) -> int:
        return len(self.groups)

    def recordings(self) -> list[Recording]:
        return [one for group in self.groups for one in [group.target, *group.others] if one]

    def _length(self, group):
        return self.nb_timesteps or group.nb_timesteps

    def draws(self) -> bool:
        """Whether excerpts are drawn: in training."""
        return self.split == "train" and self.nb_timesteps is not None


class AlignedDataset(TrackFolders):
    """Pairs of files, what goes into a network and what shall come out: <root>/train/<song>/<input>, <output>.

    An excerpt of both begins at one place, drawn uniformly; a validation excerpt at the beginning of the song.

    Args:
        input_file, output_file: names, or patterns (*) of one file in each folder
        the others: as of `LayoutDataset`
    """

    def __init__(self, root: str | Path, input_file: str, output_file: str, **options):
        super().__init__(root, **options)
        if self.augmentations:
            raise UsageError("--source-augmentations: an aligned dataset has a mixture, and no sources to change")
        found, lacking, songs = {}, [], self.songs()
        for folder in songs:
            pair = [_one(folder, pattern) for pattern in (output_file, input_file)]
            if all(pair):
                found[folder.name] = pair[0], pair[1:]
            else:
                lacking.append(folder.name)
        self.leave_out(lacking, len(songs), f"have no {input_file} or no {output_file}")
        self._open_groups(found)

    def plan(self, epoch: int, index: int) -> Item:
        group, start = self.groups[index], 0
        if self.draws():
            start = self.start(random_stream("draw", **self.key(epoch, index, "pair")), group.nb_timesteps)
        parts = [Part((group.others[0],), True, (0.0,), start), Part((group.target,), False, (1.0,), start)]
        return Item(parts, self._length(group))

    def mixtures(self) -> Iterator[Item]:
        return (Item([Part((group.others[0],), True, (0.0,))], group.nb_timesteps) for group in self.groups)


def _one(folder, pattern):
    """The file of a folder that a name or pattern stands for; None if there is none."""
    try:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"{pattern!r} is no name of a file in a folder: {error}") from None
    if len(found) > 1:
        raise UsageError(f"{pattern} stands for several files in {folder}: {some([path.name for path in found])}")
    return found[0] if found else None


class FixedSources(TrackFolders):
    """Songs with the same files each: <root>/train/<song>/<target>, <interferer>, …; the mixture is their sum.

    All sources of an excerpt are of one song and place; with `random_track_mix`, each interferer is of a song and a
    place of its own. Validation is of whole songs.

    Args:
        target_file, interferer_files: names
        random_track_mix: see above
        the others: as of `LayoutDataset`
    """

    remixable = True

    def __init__(
        self,
        root: str | Path,
        target_file: str,
        interferer_files: Sequence[str],
        random_track_mix: bool = False,
        **options,
    ):
        if options.get("split") == "valid":
            options["seq_dur"] = None
        super().__init__(root, **options)
        names = [target_file, *interferer_files]
        if len(set(names)) < len(names):
            raise UsageError(f"a file is named twice: {', '.join(names)}")
        self.interferers = list(interferer_files)
        self.is_mixed = random_track_mix and self.split == "train"
        if self.is_mixed and self.seq_dur is None:
            raise UsageError("--random-track-mix mixes excerpts: whole songs (--seq-dur 0) differ in length")
        found, lacking, songs = {}, [], self.songs()
        for folder in songs:
            if all((folder / name).is_file() for name in names):
                found[folder.name] = folder / target_file, [folder / name for name in interferer_files]
            else:
                lacking.append(folder.name)
        self.leave_out(lacking, len(songs), f"have not all of {', '.join(names)}")
        self._open_groups(found)

    def plan(self, epoch: int, index: int) -> Item:
        parts = []
        for number, source in enumerate(["target", *self.interferers]):
            mate = self.partner(epoch, index, source)
            key, group = self.key(epoch, mate, source), self.groups[mate]
            # one stream for all sources that are of one place
            rng = random_stream("draw", **(key if self.is_mixed and number else {**key, "source": "target"}))
            if self.is_mixed and number:
                group = self.groups[rng.integers(len(self.groups))]
            start = self.start(rng, group.nb_timesteps) if self.draws() else 0
            recording = group.others[number - 1] if number else group.target
            parts.append(Part((recording,), True, (float(not number),), start, self.augmentations, key))
        return Item(parts, self._length(self.groups[index]))

    def mixtures(self) -> Iterator[Item]:
        for group in self.groups:
            yield Item([Part((one,), True, (0.0,)) for one in [group.target, *group.others]], group.nb_timesteps)


class VariableSources(TrackFolders):
    """Songs with any number of files: <root>/train/<song>/*<ext>; the mixture is their sum, one of them the target.

    With `random_interferer_mix`, all interferers of an excerpt are of one other song. Validation is of whole songs.

    Args:
        target_file: a name
        ext: how names of sources end
        random_interferer_mix: see above
        silence_missing: take songs without the target, too; it is silent then
        the others: as of `LayoutDataset`
    """

    remixable = True

    def __init__(
        self,
        root: str | Path,
        target_file: str,
        ext: str = ".wav",
        random_interferer_mix: bool = False,
        silence_missing: bool = False,
        **options,
    ):
        if options.get("split") == "valid":
            options["seq_dur"] = None
        super().__init__(root, **options)
        self.is_mixed = random_interferer_mix and self.split == "train"
        if self.is_mixed and self.seq_dur is None:
            raise UsageError("--random-interferer-mix mixes excerpts: whole songs (--seq-dur 0) differ in length")
        found, lacking, empty, songs = {}, [], [], self.songs()
        for folder in songs:
            target = folder / target_file if (folder / target_file).is_file() else None
            others = sorted(path for path in folder.glob(f"*{ext}") if path != target and path.is_file())
            for path in others:
                if path.stem == "mixture":
                    raise UsageError(
                        f"{path} would be added to the sources it is the sum of: move it out of the folder"
                    )
            if not target and not silence_missing:
                lacking.append(folder.name)
            elif not target and not others:
                empty.append(folder.name)
            else:
                found[folder.name] = target, others
        self.leave_out(lacking, len(songs), f"have no {target_file} (--silence-missing takes them)")
        self.leave_out(empty, len(songs), f"have no file *{ext}")
        self._open_groups(found)
        if not any(group.target for group in self.groups):
            raise UsageError(f"no song in {self.folder} has a {target_file}: there is nothing to learn")

    def plan(self, epoch: int, index: int) -> Item:
        draws, group = self.draws(), self.groups[self.partner(epoch, index, "target")]
        parts = []
        key = self.key(epoch, self.partner(epoch, index, "target"), "target")
        start = self.start(random_stream("draw", **key), group.nb_timesteps) if draws else 0
        if group.target:
            parts.append(Part((group.target,), True, (1.0,), start, self.augmentations, key))
        mate = self.partner(epoch, index, "interferers")
        if self.is_mixed or mate != index or self.is_remixed:
            rng = random_stream("draw", **self.key(epoch, mate, "interferers"))
            group = self.groups[rng.integers(len(self.groups)) if self.is_mixed else mate]
            start = self.start(rng, group.nb_timesteps) if draws else 0
        for one in group.others:
            key = self.key(epoch, mate, one.path.name)
            parts.append(Part((one,), True, (0.0,), start, self.augmentations, key))
        return Item(parts, self._length(self.groups[index]))

    def mixtures(self) -> Iterator[Item]:
        for group in self.groups:
            recordings = [*([group.target] if group.target else []), *group.others]
            yield Item([Part((one,), True, (0.0,)) for one in recordings], group.nb_timesteps)


class SourceFolders(LayoutDataset):
    """A folder per source, with any files in it: <root>/train/<source>/*<ext>. The mixture is a sum of draws.

    For each source a file is drawn, and a start within it. Validation has the reference's own fixed set: for item
    `index`, every source draws by Python's random.Random(index), whatever the seed of the training.

    Args:
        target_dir, interferer_dirs: names of folders
        ext: how names of files end
        nb_samples: items per epoch
        the others: as of `LayoutDataset`
    """

    def __init__(
        self,
        root: str | Path,
        target_dir: str,
        interferer_dirs: Sequence[str],
        ext: str = ".wav",
        nb_samples: int = 1000,
        **options,
    ):
        super().__init__(root, **options)
        if self.seq_dur is None:
            raise UsageError("a sourcefolder has no whole songs: --seq-dur is more than 0")
        self.sources = [*interferer_dirs, target_dir]
        if len(set(map(Path, self.sources))) < len(self.sources):
            raise UsageError(f"a folder is named twice: {', '.join(self.sources)}")
        self.nb_samples = nb_samples
        paths = {}
        for source in self.sources:
            folder = self.folder / source
            if not folder.is_dir():
                raise UsageError(f"there is no folder {folder}")
            names = [path.name for path in folder.glob(f"*{ext}") if path.is_file()]
            if not names:
                raise UsageError(f"{folder} has no files *{ext}")
            paths[source] = [folder / name for name in self.of_split(names)]
            if not paths[source]:
                raise UsageError(f"{folder} has one file alone, and {self.root} no valid/: none would validate")
        found = self.open_all(path for of_source in paths.values() for path in of_source)
        self.found = {}
        for source, of_source in paths.items():
            enough = self.long_enough({str(path): found[path].nb_timesteps for path in of_source})
            if not enough:
                raise UsageError(f"no file in {self.folder / source} lasts --seq-dur {self.seq_dur:g}")
            self.found[source] = [found[Path(path)] for path in enough]

    def __len__(self) -> int:
        return self.nb_samples

    def recordings(self) -> list[Recording]:
        return [one for of_source in self.found.values() for one in of_source]

    def plan(self, epoch: int, index: int) -> Item:
        parts = []
        for source in self.sources:
            recordings, key = self.found[source], self.key(epoch, index, source)
            if self.split == "valid":
                rng = random.Random(int(index))
                recording = rng.choice(recordings)
                last = (recording.nb_timesteps - self.nb_timesteps) / self.sample_rate
                start = int(rng.uniform(0, last) * self.sample_rate)
            else:
                rng = random_stream("draw", **key)
                recording = recordings[rng.integers(len(recordings))]
                start = self.start(rng, recording.nb_timesteps)
            is_target = source == self.sources[-1]
            parts.append(Part((recording,), True, (float(is_target),), start, self.augmentations, key))
        return Item(parts, self.nb_timesteps)

    def mixtures(self) -> Iterator[Item]:
        """Of excerpts from the middle of the files that are drawn, as the reference has them."""
        for index in range(len(self)):
            parts = []
            for source in self.sources:
                rng = random_stream("draw", **self.key(0, index, source))
                recording = self.found[source][rng.integers(len(self.found[source]))]
                # in whole seconds, as there
                middle = recording.nb_timesteps / self.sample_rate // 2 - self.seq_dur // 2
                start = min(int(max(middle, 0) * self.sample_rate), recording.nb_timesteps - self.nb_timesteps)
                parts.append(Part((recording,), True, (0.0,), start))
            yield Item(parts, self.nb_timesteps)
