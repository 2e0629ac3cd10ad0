"""Products of large matrices against NumPy's in float64: every edge of tiles, panels and blocks."""

import itertools

import numpy as np
import pytest

import kernels.threads
from kernels.blocks import DEPTH, HEIGHT, ROWS, WIDTH
from kernels.products import PANEL, matmul, products


def numbers(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def laid_out(matrix, layout):
    """The same numbers elsewhere: rows or columns contiguous, alone or within a larger matrix of NaNs."""
    order, between = layout
    if order == "columns":
        return laid_out(matrix.T, ("rows", between)).T
    whole = np.full((matrix.shape[0] + 2, matrix.shape[1] + between), np.nan, np.float32)
    view = whole[1:-1, between // 2 : between // 2 + matrix.shape[1]]
    view[:] = matrix
    return view


def check(m, depth, n, layouts=(("rows", 0), ("rows", 0)), accumulate=False):
    """Of a product, its error against what rounding allows, and what lies around it."""
    a, b, before = numbers(m, depth, seed=1), numbers(depth, n, seed=2), numbers(m, n, seed=3)
    whole = np.full((m + 2, n + 3), 7, np.float32)
    out = whole[1:-1, 1:-2]
    out[:] = before if accumulate else np.nan
    matmul(laid_out(a, layouts[0]), laid_out(b, layouts[1]), out, accumulate)
    start = before.astype(float) if accumulate else 0
    expected = start + a.astype(float) @ b.astype(float)
    bound = np.abs(start) + np.abs(a).astype(float) @ np.abs(b).astype(float)
    assert (np.abs(out - expected) <= 1e-6 * bound).all()
    out[:] = 7
    assert (whole == 7).all()


LAYOUTS = list(itertools.product(itertools.product(["rows", "columns"], [0, 5]), repeat=2))
SIZES = [1, ROWS - 1, ROWS, ROWS + 1, PANEL - 1, PANEL, PANEL + 1, 3 * PANEL + 7]


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_edges_of_tiles(layouts):
    kernels.threads.set_threads(1)
    for m, n, depth in itertools.product(SIZES, SIZES, [1, 16, 45]):
        check(m, depth, n, layouts, accumulate=(m + n + depth) % 2 == 1)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("depth", [DEPTH - 1, DEPTH, DEPTH + 1, 2 * DEPTH + 3])
def test_edges_of_blocks_of_the_depth(depth, accumulate):
    kernels.threads.set_threads(1)
    for layouts in LAYOUTS[::5]:
        check(ROWS + 1, depth, PANEL + 1, layouts, accumulate)


@pytest.mark.parametrize(
    "m, n", [(HEIGHT - 1, 5), (HEIGHT + 1, 5), (2 * HEIGHT + 5, 40), (5, WIDTH - 1), (5, WIDTH + 1)]
)
def test_edges_of_blocks(m, n):
    kernels.threads.set_threads(1)
    for layouts in LAYOUTS[::5]:
        check(m, DEPTH + 1, n, layouts, accumulate=True)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 4, 0), (3, 0, 4)])
def test_nothing_to_add_up(shape):
    for accumulate in (False, True):
        check(*shape, accumulate=accumulate)


@pytest.mark.parametrize("nb_threads", [1, 2, 3, 5, 8, 16])
def test_numbers_of_threads(nb_threads):
    """Parts cover the result once; a row comes out the same bit for bit with each of them, and without other rows."""
    m, depth, n = 4 * ROWS + 5, DEPTH + 77, 7 * PANEL + 9
    a, b = numbers(m, depth), numbers(depth, n)
    out, alone = np.zeros((2, m, n), np.float32)
    kernels.threads.set_threads(1)
    for row in range(m):
        matmul(a[row : row + 1], b, alone[row : row + 1])
    kernels.threads.set_threads(nb_threads)
    tasks = products(a, b, out, accumulate=True)
    assert len(tasks) <= nb_threads and len({task[0] for task in tasks}) == 1
    for function, *arguments in tasks:
        function(*arguments)
    np.testing.assert_array_equal(out, alone)


@pytest.mark.parametrize("shape", [(4080, 512), (255, 2048), (3, 512), (512, 3), (1, 1), (2048, 256)])
@pytest.mark.parametrize("nb_threads", [2, 3, 8, 16])
def test_work_is_spread_evenly(nb_threads, shape):
    """No part is larger than its share, where there is enough for all, by more than a tile's height and width."""
    kernels.threads.set_threads(nb_threads)
    out = np.empty(shape, np.float32)
    tasks = products(np.empty((shape[0], 1), np.float32), np.empty((1, shape[1]), np.float32), out)
    parts = [arguments[2].shape for _, *arguments in tasks]
    assert sum(m * n for m, n in parts) == out.size
    nb_tiles = -(-shape[0] // ROWS) * -(-shape[1] // PANEL)
    if nb_tiles >= 8 * nb_threads:
        assert len(parts) == nb_threads
        m, n = np.max(parts, axis=0)
        assert m * n <= out.size / nb_threads + ROWS * n + PANEL * m


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_a_number_stays_in_its_row_and_column(wrong):
    kernels.threads.set_threads(2)
    a, b = numbers(2 * ROWS + 3, 37), numbers(37, PANEL + 5)
    a[-1, -1] = b[-1, -1] = wrong
    out = np.zeros((len(a), b.shape[1]), np.float32)
    matmul(a, b, out)
    finite = np.ones(out.shape, bool)
    finite[-1], finite[:, -1] = False, False
    np.testing.assert_array_equal(np.isfinite(out), finite)
    np.testing.assert_allclose(out[finite], (a[:-1] @ b[:, :-1]).ravel(), atol=1e-4)


def test_a_result_whose_rows_are_not_contiguous():
    a, b = numbers(4, 5), numbers(5, 6)
    for out in (np.empty((6, 4), np.float32).T, np.empty((4, 12), np.float32)[:, ::2]):
        with pytest.raises(ValueError, match="contiguous"):
            matmul(a, b, out)
    backwards, out = np.empty((4, 6), np.float32)[::-1], np.empty((4, 6), np.float32)
    matmul(a[::-1], b, backwards)
    matmul(a[::-1], b, out)
    np.testing.assert_array_equal(backwards, out)
