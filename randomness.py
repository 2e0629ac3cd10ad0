"""All that is drawn at random: a stream of numbers for each purpose, which depends on what it is for alone."""

from __future__ import annotations  # unions, on Python 3.9

import hashlib

import numpy as np

# Which numbers are drawn for a seed: another scheme gets another number. 1 (no number in the log) drew the order of an
# epoch and its first excerpt from one stream, and an augmentation more changed what later sources drew. In 2, the
# dropout of a step depended on all steps of its epoch before.
SCHEME = 3

# All that a training draws at random, and what each draw may depend on.
STREAMS = {
    "initial weights": ("seed",),
    "dropout": ("seed", "epoch", "step"),
    "dropout of a rank": ("seed", "epoch", "step", "rank"),  # of several processes, but the first
    "order": ("seed", "epoch"),
    "draw": ("seed", "epoch", "index", "source"),
    "augmentation": ("seed", "epoch", "index", "source", "name"),
    "remix": ("seed", "epoch", "source"),
    "validation song": ("seed", "song"),
}


def random_stream(purpose: str, **key: int | str) -> np.random.Generator:
    """The random numbers of one purpose: a stream of its own for each key, the same whenever it is asked for.

    Args:
        purpose: a key of STREAMS
        key: numbers or names for all that STREAMS lists there
    """
    parts = [purpose, *(f"{name}={key.pop(name)}" for name in STREAMS[purpose])]
    if key:
        raise TypeError(f"random numbers for {purpose!r} do not depend on {', '.join(key)}")
    # a hash keeps apart what differs in any part; of numbers added up or padded, some pairs would be the same
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, "<u4"))
