"""The state of the optimizer; that it is torch's Adam is in test_functions.py and test_reference.py."""

import nnabla as nn
import numpy as np
import pytest

import context
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
