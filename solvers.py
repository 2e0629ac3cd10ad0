"""The optimizer of the recipe: Adam with L2 weight decay, as torch.optim.Adam computes it."""

import nnabla.solvers as S
import numpy as np


class Adam:
    """Adam (Kingma & Ba 2015) whose eps is added after the bias correction, as in torch.

    torch divides by sqrt(v / (1 − β₂ᵗ)) + eps; nnabla's solver by (sqrt(v) + eps) / sqrt(1 − β₂ᵗ). They
    agree when nnabla's eps is eps · sqrt(1 − β₂ᵗ), so each step has a native solver of its own, over the
    same moments: a solver is a few numbers, and without this the first steps differ for small gradients.

    Args:
        parameters: dict of name to variable, as from ``nn.get_parameters()``
        lr: learning rate, may be changed between updates
        weight_decay: times the parameter is added to its gradient
    """

    def __init__(self, parameters, lr=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8):
        self.lr, self.weight_decay = lr, weight_decay
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.parameters = dict(parameters)
        self.step = 0
        self.solver = self._native_solver()

    def _native_solver(self):
        eps = self.eps * np.sqrt(1 - self.beta2 ** (self.step + 1))
        solver = S.Adam(self.lr, self.beta1, self.beta2, eps)
        solver.set_parameters(self.parameters)
        return solver

    def zero_grad(self):
        self.solver.zero_grad()

    def update(self):
        """One step along the gradients that the parameters hold."""
        states = self.solver.get_states()
        self.solver = self._native_solver()
        self.solver.set_states(states)
        if self.weight_decay:
            self.solver.weight_decay(self.weight_decay)
        self.solver.update()
        self.step += 1

    def get_state(self):
        """Dict of arrays that `set_state` continues from: step, and <name>/mean, <name>/var (copies)."""
        state = {"step": np.array(self.step)}
        for name, moments in self.solver.get_states().items():
            for moment in ("mean", "var"):
                state[f"{name}/{moment}"] = moments.pstate[moment].d.copy()
        return state

    def set_state(self, state):
        self.step = int(state["step"])
        states = self.solver.get_states()
        for name, moments in states.items():
            moments.t = self.step
            for moment in ("mean", "var"):
                moments.pstate[moment].d = state[f"{name}/{moment}"]
        self.solver.set_states(states)
