"""Shapes of arguments: compiled loops do not look, and would read and write beyond the ends of arrays."""

import math

import numpy as np


def check(**expected: tuple) -> None:
    """ValueError unless arrays have shapes that fit together, as check(x=(x, "M K"), mean=(mean, "K", np.float32)).

    A word of a shape is a size: a number, a letter that stands for the same size wherever it is, or a product or sum of
    both, as 4*S, of letters that came before or beside it. A type is named where no kernel asks for it.
    """
    sizes = {}
    for name, (array, words, *types) in expected.items():
        shape, words = np.shape(array), words.split()
        if types and array.dtype != types[0]:
            raise ValueError(f"{name} of type {array.dtype}: expected {np.dtype(types[0])}")
        if len(shape) == len(words):
            for size, word in zip(shape, words):
                if word.isalpha():
                    sizes.setdefault(word, size)
            if shape == tuple(sum(_product(sizes, term) for term in word.split("+")) for word in words):
                continue
        known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
        raise ValueError(
            f"{name} of shape {shape}: expected ({', '.join(words)}), where {known or 'any size is right'}"
        )


def _product(sizes, term):
    return math.prod(int(part) if part.isdigit() else sizes[part] for part in term.split("*"))
