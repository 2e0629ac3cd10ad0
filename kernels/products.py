"""Products of matrices: large ones over our threads, small ones inside of loops."""

import itertools

import numpy as np
from numba import types
from numba.extending import intrinsic

from kernels.blocks import ROWS, multiply
from kernels.compiler import inline
from kernels.shapes import check
from kernels.threads import get_threads, run, split
from kernels.vectors import INT64, LANES, PANEL, SINGLE, VECTOR, ZEROS, aligned, everywhere, fma, load, shift, store

PACKING = 16  # see `_grid`


def _strides(matrix):
    """(of rows, of columns) of a float32 matrix, in numbers; one of the two is 1."""
    if matrix.dtype != np.float32:
        raise ValueError(f"a product of {matrix.dtype}: float32 is needed")
    (rows, columns), (row, column) = matrix.shape, matrix.strides
    if column == 4 or columns <= 1:
        return row // 4, 1
    if row == 4 or rows <= 1:
        return 1, column // 4
    raise ValueError(f"neither rows nor columns are contiguous: strides {matrix.strides}")


def _grid(m, n, parts):
    """How many parts the rows of a result (m, n) are cut into, and its columns: what takes the least time.

    A part rearranges what it needs of both operands: a number takes as long as PACKING products.
    """

    def duration(grid):
        rows, columns = (unit * -(-size // (unit * count)) for unit, size, count in zip((ROWS, PANEL), (m, n), grid))
        return rows * columns + PACKING * (rows + columns)

    return min(((count, parts // count) for count in range(1, parts + 1) if parts % count == 0), key=duration)


def products(a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool = False) -> list[tuple]:
    """The tasks, for `run`, of out = a @ b, or out += a @ b.

    Transposes and slices of rows or columns cost nothing: of a and b either the rows or the columns must be
    contiguous, of out the rows. A row comes out the same, bit for bit, whatever the others, and the number of threads.

    Raises:
        ValueError: shapes that do not fit, strides other than these, not float32
    """
    check(a=(a, "M K"), b=(b, "K L"), out=(out, "M L"))
    if _strides(out)[1] != 1:
        raise ValueError(f"the rows of a product are not contiguous: strides {out.strides}")
    strides = *_strides(a), *_strides(b)
    rows, columns = _grid(*out.shape, get_threads())
    parts = itertools.product(split(len(a), rows, ROWS), split(b.shape[1], columns, PANEL))
    return [(multiply, a[i:j], b[:, p:q], out[i:j, p:q], strides, accumulate) for (i, j), (p, q) in parts]


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b: see `products`."""
    run(products(a, b, out, accumulate))


# A product for the LSTM: few rows (the batch), and the same weights in every frame. To rearrange them on each call
# would take longer than to multiply; here they are rearranged once, into panels, each (depth, PANEL) contiguous. A tile
# of up to 8 rows by one panel is kept in registers over the depth: per step two loads of weights and, for each row, one
# number of `a`. An addition waits for the one before it, so SUMS sums take turns over the depth: with few rows all at
# once, with more one after the other, so that a row's rounding does not depend on how many there are.
SUMS = 4  # the depth is filled up to a multiple of it
DEPTH = 256  # a panel of this depth fits in the first-level cache, to be used by all tiles


def _tile(rows):
    """c (rows, PANEL) += a (rows, depth) @ panel (depth, PANEL), from addresses and row lengths."""
    at_once = max(1, SUMS // rows)

    def generate(context, builder, signature, arguments):
        a, a_row, panel, c, c_row, depth = arguments
        c_at = [
            [shift(builder, c, builder.mul(c_row, INT64(r)), INT64(LANES * v)) for v in range(2)] for r in range(rows)
        ]
        a_at = [shift(builder, a, builder.mul(a_row, INT64(r))) for r in range(rows)]
        sums = {(0, r, v): load(builder, c_at[r][v], VECTOR) for r, v in itertools.product(range(rows), range(2))}
        for begin in range(0, SUMS, at_once):
            places = list(itertools.product(range(begin, begin + at_once), range(rows), range(2)))
            entry = builder.block
            loop, done = builder.append_basic_block("depth"), builder.append_basic_block("done")
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(INT64)
            before = {place: builder.phi(VECTOR) for place in places}
            for place in places:
                before[place].add_incoming(sums.get(place, ZEROS), entry)
            for number in range(begin, begin + at_once):
                row = builder.add(k, INT64(number))
                weights = shift(builder, panel, builder.mul(row, INT64(PANEL)))
                w = [load(builder, shift(builder, weights, INT64(LANES * v)), VECTOR) for v in range(2)]
                for r in range(rows):
                    one = everywhere(builder, load(builder, shift(builder, a_at[r], row), SINGLE))
                    for v in range(2):
                        sums[number, r, v] = fma(builder, one, w[v], before[number, r, v])
            following = builder.add(k, INT64(SUMS))
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
            k.add_incoming(INT64(0), entry)
            k.add_incoming(following, loop)
            for place in places:
                before[place].add_incoming(sums[place], loop)
            builder.position_at_end(done)

        for r, v in itertools.product(range(rows), range(2)):
            whole = [sums[number, r, v] for number in range(SUMS)]
            while len(whole) > 1:
                whole = [builder.fadd(*pair) for pair in zip(whole[::2], whole[1::2])]
            store(builder, whole[0], c_at[r][v])
        return context.get_dummy_value()

    @intrinsic
    def tile(typing, a, a_row, panel, c, c_row, depth):
        return types.void(*[types.intp] * 6), generate

    return tile


_tile8, _tile4, _tile2, _tile1 = _tile(8), _tile(4), _tile(2), _tile(1)


def panels(matrices: list[np.ndarray]) -> np.ndarray:
    """Weights, each (depth, columns) or with several axes for columns, as panels (len, nb_panels, depth, PANEL).

    Filled up with zeros: the depth to a multiple of SUMS, the columns to as many panels as the widest needs.
    """
    depth, columns = len(matrices[0]), max(matrix[0].size for matrix in matrices)
    shape = len(matrices), -(-columns // PANEL), -(-depth // SUMS) * SUMS, PANEL
    out = aligned(*shape)
    run([(_pack, *pair) for pair in zip(matrices, out)])
    return out


def _pack(matrix, out):
    matrix = matrix.reshape(len(matrix), -1)
    depth, columns = matrix.shape
    whole = columns // PANEL
    out[:, depth:] = 0
    out[whole:] = 0
    out[:whole, :depth] = matrix[:, : whole * PANEL].reshape(depth, whole, PANEL).transpose(1, 0, 2)
    if columns % PANEL:
        out[whole, :depth, : columns % PANEL] = matrix[:, whole * PANEL :]


@inline
def small_product(a, a_row, rows, panels, c, back):
    """c (rows, panels · PANEL) += a @ weights; a: address of its first number, a_row: from row to row.

    What exceeds a cache is read anew each time, if always from the start: walked to and fro, the panels that come first
    are those that came last before.
    """
    nb_panels, depth, _ = panels.shape
    weights, out, c_row = panels.ctypes.data, c.ctypes.data, c.shape[1]
    for number in range(nb_panels):
        p = nb_panels - 1 - number if back else number
        for k in range(0, depth, DEPTH):
            panel = weights + 4 * PANEL * (p * depth + k)
            n = min(DEPTH, depth - k)
            r = 0
            while r < rows:
                a_at, c_at = a + 4 * (r * a_row + k), out + 4 * (r * c_row + p * PANEL)
                if rows - r >= 8:
                    _tile8(a_at, a_row, panel, c_at, c_row, n)
                    r += 8
                elif rows - r >= 4:
                    _tile4(a_at, a_row, panel, c_at, c_row, n)
                    r += 4
                elif rows - r >= 2:
                    _tile2(a_at, a_row, panel, c_at, c_row, n)
                    r += 2
                else:
                    _tile1(a_at, a_row, panel, c_at, c_row, n)
                    r += 1
