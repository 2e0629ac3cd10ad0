"""A product of large matrices on one thread, by blocks that stay in the caches and tiles that stay in the registers.

The loops are those of Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008): of the depth,
DEPTH numbers at a time; of b, up to WIDTH columns, rearranged into panels of a tile's width; of a, up to HEIGHT rows,
rearranged into panels of a tile's height; of the result, tile by tile. What panels lack at the edges is filled up with
zeros, and of a tile only what there is is written: so every number is summed up in the same order, whatever the rest.
"""

import itertools
import threading

import numpy as np
from numba import types
from numba.extending import intrinsic

from kernels.compiler import INT, inline, kernel
from kernels.vectors import (
    INT64,
    LANES,
    PANEL,
    SINGLE,
    VECTOR,
    ZEROS,
    aligned,
    everywhere,
    first_lanes,
    fma,
    load,
    load_masked,
    shift,
    store,
    store_masked,
    transpose,
)

ROWS = 12 if LANES == 16 else 6  # of a tile: 24 sums in 32 registers, or 12 in 16
UNROLL = 4  # steps of the depth from one look at whether it is done to the next
DEPTH = 512  # a panel of a, at most 24 KB, stays in the first-level cache while it is multiplied
HEIGHT = 20 * ROWS  # a block of a, at most half a megabyte, and a panel of b stay in the second-level cache
WIDTH = 64 * PANEL  # a block of b, at most 4 MB, is read from the third-level cache


@intrinsic
def _tile(typing, a, b, depth, c, c_row, rows, columns, add):
    """c = or += a @ b from panels a (depth, ROWS) and b (depth, PANEL), of which c has `rows` and `columns`."""

    def generate(context, builder, signature, arguments):
        a, b, depth, c, c_row, rows, columns, add = arguments
        places = list(itertools.product(range(ROWS), range(2)))
        c_at = {(r, v): shift(builder, c, builder.mul(c_row, INT64(r)), INT64(v * LANES)) for r, v in places}
        entry = builder.block
        loop, done, whole, adding, storing, edge, end = map(
            builder.append_basic_block, ("depth", "done", "whole", "adding", "storing", "edge", "end")
        )
        builder.branch(loop)

        builder.position_at_end(loop)
        k, a_at, b_at = (builder.phi(INT64) for _ in range(3))
        before = {place: builder.phi(VECTOR) for place in places}
        sums = dict(before)
        for step in range(UNROLL):
            w = [load(builder, shift(builder, b_at, INT64(step * PANEL + v * LANES)), VECTOR) for v in range(2)]
            for r in range(ROWS):
                one = everywhere(builder, load(builder, shift(builder, a_at, INT64(step * ROWS + r)), SINGLE))
                for v in range(2):
                    sums[r, v] = fma(builder, one, w[v], sums[r, v])
        steps = [builder.add(k, INT64(UNROLL))]
        steps += [shift(builder, at, INT64(UNROLL * width)) for at, width in ((a_at, ROWS), (b_at, PANEL))]
        builder.cbranch(builder.icmp_signed("<", steps[0], depth), loop, done)
        for phi, first, following in zip((k, a_at, b_at), (INT64(0), a, b), steps):
            phi.add_incoming(first, entry)
            phi.add_incoming(following, loop)
        for place in places:
            before[place].add_incoming(ZEROS, entry)
            before[place].add_incoming(sums[place], loop)

        builder.position_at_end(done)
        adds = builder.icmp_signed("!=", add, INT64(0))
        all_rows = builder.icmp_signed(">=", rows, INT64(ROWS))
        all_columns = builder.icmp_signed(">=", columns, INT64(PANEL))
        builder.cbranch(builder.and_(all_rows, all_columns), whole, edge)
        builder.position_at_end(whole)
        builder.cbranch(adds, adding, storing)
        for block in adding, storing:
            builder.position_at_end(block)
            for place, address in c_at.items():
                total = sums[place]
                if block is adding:
                    total = builder.fadd(load(builder, address, VECTOR), total)
                store(builder, total, address)
            builder.branch(end)
        builder.position_at_end(edge)  # masks are slow on some processors
        for (r, v), address in c_at.items():
            there = builder.icmp_signed("<", INT64(r), rows)
            mask = first_lanes(builder, builder.select(there, builder.sub(columns, INT64(v * LANES)), INT64(0)))
            old = builder.select(adds, load_masked(builder, address, mask), ZEROS)
            store_masked(builder, builder.fadd(old, sums[r, v]), address, mask)
        builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


@intrinsic
def _copy(typing, source, count, out):
    """A vector: `count` numbers, then zeros."""

    def generate(context, builder, signature, arguments):
        source, count, out = arguments
        store(builder, load_masked(builder, source, first_lanes(builder, count)), out)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic
def _turn(typing, source, row, rows, columns, out, out_row):
    """The transpose of a matrix (rows, columns) of at most LANES both, with zeros as LANES vectors."""

    def generate(context, builder, signature, arguments):
        source, row, rows, columns, out, out_row = arguments
        vectors = []
        for r in range(LANES):
            there = builder.icmp_signed("<", INT64(r), rows)
            mask = first_lanes(builder, builder.select(there, columns, INT64(0)))
            vectors.append(load_masked(builder, shift(builder, source, builder.mul(row, INT64(r))), mask))
        for k, vector in enumerate(transpose(builder, vectors)):
            store(builder, vector, shift(builder, out, builder.mul(out_row, INT64(k))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), generate


@inline
def _pack(source, across, along, length, depth, whole, width, out):
    """A matrix (length, depth), of strides across and along, as panels of (whole, width), LANES numbers apart.

    The last vector of a row of a panel may reach beyond it: what lies there is written later, or nothing.
    """
    panel, nb_panels = whole * width + LANES, -(-length // width)
    if across == 1:  # row by row, since it is whole lines of the cache that come from memory
        for k in range(whole):
            for p in range(nb_panels):
                count, row = min(length - p * width, width) if k < depth else 0, out + 4 * (p * panel + k * width)
                for i in range(0, width, LANES):
                    _copy(source + 4 * (p * width + i + k * along), count - i, row + 4 * i)
    else:
        for p in range(nb_panels):
            for i in range(0, width, LANES):
                first, count = source + 4 * (p * width + i) * across, min(length - p * width, width) - i
                for k in range(0, whole, LANES):
                    _turn(first + 4 * k, across, count, depth - k, out + 4 * (p * panel + k * width + i), width)


@kernel
def _multiply(
    a: INT, a_row: INT, a_column: INT, b: INT, b_row: INT, b_column: INT, c: INT, c_row: INT,
    m: INT, n: INT, depth: INT, height: INT, width: INT, deep: INT, add: INT, left: INT, right: INT,
):  # fmt: skip
    """Addresses and strides of a (m, depth), b (depth, n), c (m, n); sizes of blocks; room for those of a and b."""
    for j in range(0, n, width):
        for k in range(0, depth, deep):
            nj, nk = min(width, n - j), min(deep, depth - k)
            whole = -(-nk // LANES) * LANES  # the depth of panels
            _pack(b + 4 * (k * b_row + j * b_column), b_column, b_row, nj, nk, whole, PANEL, right)
            for i in range(0, m, height):
                ni = min(height, m - i)
                _pack(a + 4 * (i * a_row + k * a_column), a_row, a_column, ni, nk, whole, ROWS, left)
                for q in range(-(-nj // PANEL)):
                    for p in range(-(-ni // ROWS)):
                        _tile(
                            left + 4 * p * (whole * ROWS + LANES), right + 4 * q * (whole * PANEL + LANES), whole,
                            c + 4 * ((i + p * ROWS) * c_row + j + q * PANEL), c_row,
                            ni - p * ROWS, nj - q * PANEL, add if k == 0 else 1,
                        )  # fmt: skip


def _block(length, most, multiple):
    """The length of blocks, as even as may be."""
    count = -(-length // most)
    return -(-length // (count * multiple)) * multiple


_own = threading.local()


def _room():
    """Of this thread, memory for a block of a, and for one of b, kept: fresh from the system it costs time."""
    if not hasattr(_own, "room"):
        _own.room = [
            aligned(length // width, DEPTH * width + LANES) for length, width in ((HEIGHT, ROWS), (WIDTH, PANEL))
        ]
    return _own.room


def multiply(a: np.ndarray, b: np.ndarray, out: np.ndarray, strides: tuple, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b.

    Args:
        strides: of a, then of b, in numbers; one of the two of each is 1. Rows of `out` are contiguous
    """
    (m, n), depth = out.shape, a.shape[1]
    if depth == 0:
        if not accumulate:
            out[:] = 0
    elif out.size:
        sizes = _block(m, HEIGHT, ROWS), _block(n, WIDTH, PANEL), _block(depth, DEPTH, LANES)
        matrices = a.ctypes.data, *strides[:2], b.ctypes.data, *strides[2:], out.ctypes.data, out.strides[0] // 4
        left, right = _room()
        _multiply(*matrices, m, n, depth, *sizes, int(accumulate), left.ctypes.data, right.ctypes.data)
