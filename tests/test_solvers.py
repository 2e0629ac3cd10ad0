"""The state of the optimizer, averages; that it is torch's Adam is in test_functions.py and test_reference.py."""

import nnabla as nn
import numpy as np
import pytest

import context
import kernels.threads
import solvers


@pytest.fixture(params=["fast", "plain"])
def solver(request, monkeypatch):
    """Of two parameters, after a step."""
    monkeypatch.setattr(context, "_plain", request.param == "plain")
    parameters = {
        name: nn.Variable.from_numpy_array(np.ones((2, 3), np.float32)).apply(need_grad=True) for name in "ab"
    }
    solver = solvers.Adam(parameters)
    solver.zero_grad()
    for variable in parameters.values():
        variable.d = variable.g = 1
    solver.update()
    return solver


WRONG = {
    "nothing": lambda state: state.clear(),
    "no step": lambda state: state.pop("step"),
    "no moment": lambda state: state.pop("a/mean"),
    "another moment": lambda state: state.update({"c/mean": state["a/mean"]}),
    "a scalar, which would be broadcast": lambda state: state.update({"a/mean": np.float32(0)}),
    "a row, which would be broadcast": lambda state: state.update({"a/mean": state["a/mean"][0]}),
    "another shape": lambda state: state.update({"a/mean": state["a/mean"].T}),
    "another type": lambda state: state.update({"a/mean": state["a/mean"].astype(np.float64)}),
    "text": lambda state: state.update({"a/mean": np.full((2, 3), "x")}),
    "NaN": lambda state: state.update({"b/mean": state["b/mean"] * np.float32(np.nan)}),
    "a negative variance": lambda state: state.update({"b/var": -state["b/var"]}),
    "half a step": lambda state: state.update(step=np.array(0.5)),
    "several steps": lambda state: state.update(step=np.array([1, 2])),
    "a step before the first": lambda state: state.update(step=np.array(-1)),
    "a step that is text": lambda state: state.update(step=np.array("1")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_that_cannot_be_changes_nothing(solver, name):
    before, state = solver.get_state(), solver.get_state()
    WRONG[name](state)
    with pytest.raises(ValueError):
        solver.set_state(state)
    after = solver.get_state()
    assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before)
    solver.set_state(before)  # and one that can be is taken


def history(nb_steps, *shapes):
    """Values of some parameters after each step."""
    rng = np.random.default_rng(0)
    return [[rng.normal(1, 3, shape).astype(np.float32) for shape in shapes] for _ in range(nb_steps)]


def averaged(values, decay):
    """What `solvers.average` makes of a history of values: the arrays after each step."""
    variables, averages = (
        {str(k): nn.Variable.from_numpy_array(np.full_like(value, 7)) for k, value in enumerate(values[0])}
        for _ in range(2)
    )
    for step, arrays in enumerate(values, 1):
        for variable, array in zip(variables.values(), arrays):
            variable.d = array
        solvers.average(averages, variables, decay, step)
        assert all((variable.d == array).all() for variable, array in zip(variables.values(), arrays))
        yield [average.d.copy() for average in averages.values()]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 0.99999])
def test_averages_are_their_formula(decay, plain, monkeypatch):
    """Weighted by decayᵗ⁻ˢ, in double precision; of more numbers than a task has, of a matrix, of a single one."""
    monkeypatch.setattr(context, "_plain", plain)
    values = history(6, (2**17 + 5,), (3, 4), ())
    for step, arrays in enumerate(averaged(values, decay), 1):
        weights = decay ** np.arange(step - 1, -1, -1.0)
        for k, array in enumerate(arrays):
            expected = np.average([np.float64(some[k]) for some in values[:step]], axis=0, weights=weights)
            np.testing.assert_allclose(array, expected, rtol=1e-6, atol=3e-6)


def test_threads_do_not_change_a_bit_of_averages():
    values = history(3, (2**18 + 3,))
    results = []
    for threads in (1, 3):
        kernels.threads.set_threads(threads)
        results.append([array for (array,) in averaged(values, 0.9)])
    np.testing.assert_array_equal(*results)
