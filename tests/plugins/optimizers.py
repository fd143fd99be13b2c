"""Optimisers for tests: one that counts in plain numbers, and what is none."""

import torch


class NumberedSGD(torch.optim.Optimizer):
    """Gradient descent whose rate falls with its own count of steps, which is an int and not a tensor."""

    def __init__(self, params, decay=0.5):
        super().__init__(params, {"decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    state["scale"] = state.get("scale", 1.0) * group["decay"]
                    parameter.add_(parameter.grad, alpha=-group["lr"] * (state["scale"] + 1 / state["count"]))


class Half:
    """Has the method, and is no optimiser of torch."""

    def __init__(self, params):
        self.params = params

    def step(self):
        pass
