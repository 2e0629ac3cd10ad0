"""What every dataset has in common: a source of pairs (mixture, target)."""

from __future__ import annotations  # unions, on Python 3.9

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from datasets.augmentations import AUGMENTATIONS, REMIX
from datasets.mixing import Item
from datasets.recordings import Recording
from randomness import random_stream
from utils import UsageError, finite, some, whole


def checked_names(kind: str, names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """A tuple of names; `UsageError` for one that is unknown, or given twice."""
    if not isinstance(names, Iterable) or isinstance(names, (str, bytes)):
        raise UsageError(f"expected names of {kind}s, not {names!r}")
    names = tuple(map(str, names))
    for name, count in Counter(names).items():
        if name not in known:
            raise UsageError(f"unknown {kind} {name!r}: there are {', '.join(known)}")
        if count > 1:
            raise UsageError(f"the {kind} {name!r} is named {count} times")
    return names


class Dataset:
    """Pairs (mixture, target) of one split, float32 (nb_channels, nb_timesteps) each.

    With a list of targets, a target is (nb_targets, nb_channels, nb_timesteps). A training set draws `len` excerpts per
    epoch, all of them anew in every epoch; a validation set has `len` items, the same in every epoch.

    Attributes:
        sample_rate, nb_channels: of its items; mono recordings are in all channels
        nb_timesteps: of an excerpt; None: items are whole, and differ in length
        notes: lines on what was left out, and why
    """

    remixable = False  # whether sources of an item come from one place, so that there is something to remix

    def __init__(
        self,
        split: str = "train",
        seq_dur: float | None = None,
        augmentations: Iterable[str] = (),
        seed: int = 42,
    ):
        """
        Args:
            split: "train" or "valid"
            seq_dur: seconds per excerpt; None: whole recordings
            augmentations: names in AUGMENTATIONS, in their order, or "remix"; a validation set has none
        """
        if seq_dur is not None:
            finite("seq_dur", seq_dur, 0)
        checked_names("split", [split], ("train", "valid"))
        known = [*AUGMENTATIONS, *([REMIX] if self.remixable else [])]
        augmentations = checked_names("augmentation", augmentations, known)
        self.split, self.seed, self.seq_dur = split, whole("seed", seed, 0, 2**64), seq_dur
        self.is_remixed = REMIX in augmentations
        self.augmentations = tuple(name for name in augmentations if name != REMIX)
        self.notes, self.stacked, self.nb_targets = [], False, 1
        self._permutations = {}

    def adopt_formats(self, recordings: Iterable[Recording], nb_channels: int = 1) -> None:
        """Take rate and channels from all that is read; UsageError if they do not go together.

        Args:
            nb_channels: at least so many
        """
        recordings = list(recordings)
        rates = {one.sample_rate for one in recordings}
        assert len(rates) == 1, "those who open them see to it"
        self.sample_rate = rates.pop()
        widest = max(recordings, key=lambda one: one.nb_channels)
        if widest.nb_channels > 2 and "force_stereo" not in self.augmentations:
            raise UsageError(
                f"{widest.path} has {widest.nb_channels} channels, which models of one or two do not read: "
                "--source-augmentations force_stereo takes the first two"
            )
        forced = 2 if "force_stereo" in self.augmentations else 1
        self.nb_channels = min(2, max(widest.nb_channels, nb_channels, forced))
        self.nb_timesteps = None if self.seq_dur is None else round(self.seq_dur * self.sample_rate)
        if self.nb_timesteps == 0:
            raise UsageError(f"--seq-dur {self.seq_dur} is less than a sample")

    # what each dataset says of itself

    def __len__(self) -> int:
        raise NotImplementedError

    def plan(self, epoch: int, index: int) -> Item:
        """What item `index` of an epoch is made of."""
        raise NotImplementedError

    def mixtures(self) -> Iterator[Item]:
        """What the statistics are of: mixtures as they are, without augmentation."""
        raise NotImplementedError

    def recordings(self) -> Iterable[Recording]:
        """All that is read."""
        raise NotImplementedError

    def sums(self) -> Iterator[tuple[str, Item, Item]]:
        """Of songs that have a mixture of their own: name, that mixture, and the sum of the sources."""
        return iter(())

    # what follows from it

    def item(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Mixture and target."""
        return self.render(self.plan(epoch, index))

    def render(self, item: Item) -> tuple[np.ndarray, np.ndarray]:
        shape = (self.nb_channels, item.nb_timesteps)
        mixture, targets = np.empty(shape, np.float32), np.empty((self.nb_targets, *shape), np.float32)
        item.render(mixture, targets)
        return mixture, targets if self.stacked else targets[0]

    def items(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All items, one after another."""
        return (self.item(0, index) for index in range(len(self)))

    def shortest(self) -> int:
        """Samples of the shortest of its items and mixtures."""
        lengths = [mixture.nb_timesteps for mixture in self.mixtures()]
        return min([*lengths, *([self.nb_timesteps] if self.nb_timesteps else [])])

    def fill(self, epoch: int, index: int, mixture: np.ndarray, targets: Sequence[np.ndarray]) -> None:
        """Write item `index` of an epoch into its places in a batch, (nb_channels, nb_timesteps) each."""
        self.plan(epoch, index).render(mixture, targets)

    # for those who draw

    def key(self, epoch: int, index: int, source: str) -> dict:
        return {"seed": self.seed, "epoch": epoch, "index": index, "source": source}

    def start(self, rng: np.random.Generator, nb_timesteps: int) -> int:
        """Where an excerpt of so long a recording begins: uniform, to the nearest sample, like ffmpeg for musdb."""
        return round(rng.uniform(0, nb_timesteps - self.nb_timesteps)) if self.nb_timesteps else 0

    def partner(self, epoch: int, index: int, source: str) -> int:
        """The item whose `source` item `index` has: itself, but for "remix"."""
        if not self.is_remixed:
            return index
        permutation = self._permutations.get((epoch, source))
        if permutation is None:  # what two threads do at once, they do alike
            rng = random_stream("remix", seed=self.seed, epoch=epoch, source=source)
            permutation = rng.permutation(len(self))
            if len(self._permutations) > 16:  # those of epochs that are over
                self._permutations = {}
            self._permutations[epoch, source] = permutation
        return int(permutation[index])

    def long_enough(self, lengths: dict[str, int]) -> list[str]:
        """Names of those of enough samples for an excerpt; a note on the others."""
        short = [name for name, length in lengths.items() if self.nb_timesteps and length < self.nb_timesteps]
        if short:
            self.notes.append(
                f"{len(short)} of {len(lengths)} are shorter than {self.seq_dur:g} s, left out: {some(short)}"
            )
        return [name for name in lengths if name not in set(short)]


def validating(names: Iterable[str], share: float, seed: int) -> set[str]:
    """Those of songs that validate, where nothing else tells: a share of them, one at least and not all.

    Each song has a number drawn by its name, and the smallest ones validate: more songs do not move the others around.
    """
    names = sorted(names, key=lambda name: random_stream("validation song", seed=seed, song=name).random())
    return set(names[: min(max(1, round(share * len(names))), len(names) - 1)]) if len(names) > 1 else set()
