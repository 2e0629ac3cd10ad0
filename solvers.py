"""What changes weights after each step: Adam with L2 weight decay, as torch.optim.Adam computes it; their average."""

import nnabla as nn
import nnabla.solvers as S
import numpy as np

import context
import kernels.training
import utils


class _Adam:
    """What both forms of Adam share; a form has `moments`, `zero_grad` and `_update`."""

    def __init__(self, parameters, lr, weight_decay, beta1=0.9, beta2=0.999, eps=1e-8):
        self.lr, self.weight_decay = lr, weight_decay
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.parameters = dict(parameters)
        self.step = 0

    @context.exclusive()
    def update(self) -> None:
        """One step along the gradients that the parameters hold."""
        self.step += 1
        self._update()

    def get_state(self) -> dict[str, np.ndarray]:
        """Dict of arrays that `set_state` continues from: step, and <name>/mean, <name>/var (copies)."""
        state = {"step": np.array(self.step)}
        state.update({name: moment.copy() for name, moment in self.moments().items()})
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `get_state` returned.

        Raises:
            ValueError: it is not of a solver of these parameters; nothing is changed then.
        """
        moments = self.moments()
        if state.keys() != {"step", *moments}:
            raise ValueError(f"moments of other parameters: {utils.some(sorted(state.keys() ^ {'step', *moments}))}")
        step = np.asarray(state["step"])
        if step.shape or step.dtype.kind not in "iu" or not 0 <= step < 2**53:
            raise ValueError(f"the number of steps cannot be {state['step']}")
        for name, moment in moments.items():
            value = np.asarray(state[name])
            if value.shape != moment.shape or value.dtype != moment.dtype:
                raise ValueError(f"{name} is {value.dtype} {value.shape}, expected {moment.dtype} {moment.shape}")
            if not np.isfinite(value).all() or (name.endswith("/var") and (value < 0).any()):
                raise ValueError(f"{name} has values that no moment has")
        self.step = int(step)
        for name, moment in moments.items():
            moment[...] = state[name]


class _PlainAdam(_Adam):
    """With nnabla's solver, which divides by (sqrt(v) + eps) / sqrt(1 − β₂ᵗ), torch by sqrt(v / (1 − β₂ᵗ)) + eps.

    They agree when nnabla's eps is eps · sqrt(1 − β₂ᵗ). So each step has a native solver of its own over the
    same moments: a solver is a few numbers, and without this the first steps differ for small gradients.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.solver = self._solver(step=1)

    def _solver(self, step):
        solver = S.Adam(self.lr, self.beta1, self.beta2, self.eps * (1 - self.beta2**step) ** 0.5)
        solver.set_parameters(self.parameters)
        return solver

    def moments(self) -> dict[str, np.ndarray]:
        states = self.solver.get_states().items()
        return {f"{name}/{moment}": state.pstate[moment].d for name, state in states for moment in ("mean", "var")}

    def zero_grad(self) -> None:
        self.solver.zero_grad()

    def _update(self):
        states = self.solver.get_states()
        for state in states.values():
            state.t = self.step - 1
        self.solver = self._solver(self.step)
        self.solver.set_states(states)
        if self.weight_decay:
            self.solver.weight_decay(self.weight_decay)
        self.solver.update()


class _FastAdam(_Adam):
    """For the CPU: one pass over each parameter."""

    def __init__(self, *args):
        super().__init__(*args)
        names = [f"{name}/{moment}" for name in self.parameters for moment in ("mean", "var")]
        self._moments = {name: np.zeros(self.parameters[name.rpartition("/")[0]].shape, np.float32) for name in names}

    def moments(self) -> dict[str, np.ndarray]:
        return self._moments

    def zero_grad(self) -> None:
        for variable in self.parameters.values():
            variable.grad.zero()

    def _update(self):
        arrays = [
            (
                variable.data.get_data("rw", np.float32).reshape(-1),
                variable.grad.get_data("r", np.float32).reshape(-1),
                self._moments[f"{name}/mean"].reshape(-1),
                self._moments[f"{name}/var"].reshape(-1),
            )
            for name, variable in self.parameters.items()
        ]
        kernels.training.adam(arrays, self.step, self.lr, self.beta1, self.beta2, self.eps, self.weight_decay)


@context.exclusive()
def Adam(parameters: dict[str, nn.Variable], lr: float = 1e-3, weight_decay: float = 0.0) -> _Adam:
    """Adam (Kingma & Ba 2015) with eps added after the bias correction, as in torch; β 0.9 and 0.999, eps 1e-8.

    Args:
        parameters: dict of name to variable, as from ``nn.get_parameters()``
        lr: learning rate; the attribute `lr` may be changed between updates
        weight_decay: times the parameter is added to its gradient
    """
    return (_FastAdam if context.fast() else _PlainAdam)(parameters, lr, weight_decay)


@context.exclusive()
def average(averages: dict[str, nn.Variable], values: dict[str, nn.Variable], decay: float, step: int) -> None:
    """After step t, take its values into averages over all steps, of which each weighs `decay` times the next one,

        a_t = (1 − decay) / (1 − decayᵗ) · Σ_s decay^(t − s) w_s,    s = 1 … t.

    It is a = decay · a + (1 − decay) · w from a = 0 on, with Adam's correction of what begins at zero: Kingma & Ba
    2015, section 7.2, after Polyak & Juditsky 1992; Demucs does so, too. What they hold before step 1 does not count.

    Args:
        averages, values: name -> variable, of the same names and shapes
        decay: 0 ≤ decay < 1
        step: t, 1 for the first
    """
    rate = (1 - decay) / (1 - decay**step)
    if context.fast():
        pairs = [(averages[name].data, value.data) for name, value in values.items()]
        pairs = [(a.get_data("rw", np.float32), w.get_data("r", np.float32)) for a, w in pairs]
        kernels.training.approach([(a.reshape(-1), w.reshape(-1)) for a, w in pairs], rate)
        return
    # A native solver scales gradients, and adds parameters to them, of all in two calls. Here these are a and w.
    pairs = {name: nn.Variable(value.shape) for name, value in values.items()}
    for name, pair in pairs.items():
        pair.data, pair.grad = values[name].data, averages[name].data
    solver = S.Sgd()
    solver.set_parameters(pairs)
    solver.scale_grad(1 - rate)
    solver.weight_decay(rate)
