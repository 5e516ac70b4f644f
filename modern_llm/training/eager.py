"""torch's optimizers without torch's compiler.

Their methods are wrapped so that the compiler, should it meet them, leaves them alone; for that the
first call imports it, whether anything is compiled or not: 800 modules, two to three seconds of
every process that trains. Here blocks of a model are compiled (`prepare_module`), optimizers never.
"""

from __future__ import annotations

import inspect

import torch
from torch.optim import Optimizer


class Eager:
    """For an optimizer that is never compiled: the methods of `Optimizer` as they are inside their
    wrapping.
    """

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class AdamW(Eager, torch.optim.AdamW):
    """`torch.optim.AdamW`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
