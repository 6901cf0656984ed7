"""`routed_lora_linear`: a LoRA layer whose factors are mixed from an inventory of skills, for every row by its task.

It is three ops in a row, for a layer of your own. A model does the first two once for all of its layers:

    groups = Groups.of(task_ids, T, rows)                  linlora.ops.grouping
    A, B   = mix_inventories([A], [B], [mixture])          linlora.ops.mix_inventories
    y      = grouped_lora_linear(x, W, b, A, B, groups)    linlora.ops.grouped_lora_linear

Only tasks that occur are mixed. Where hardly any rows share a task, or the inventory is no wider than one adapter, the
skills' activations are mixed instead of their factors (`linlora.ops.mixing.by_activations`). A skill of weight 0 has no
part in a row, NaN or not, in either form; where a weight is seen to be 0, the first one has less to do for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linlora.kernels.grouped_problem import GroupedLoraLinear
from linlora.ops import backends, composed
from linlora.ops.aten.grouping import MIN_BLOCK
from linlora.ops.checks import autocast_input
from linlora.ops.grouped_lora_linear import run
from linlora.ops.grouping import Groups, unique_tasks
from linlora.ops.mix_inventories import mix_inventories
from linlora.ops.mixing import activations_pay, by_activations
from linlora.ops.routing_checks import check_routed_lora_linear, check_task_ids
from linlora.ops.rows import as_rows, of_rows
from linlora.ops.transforms import readable, transform_active


def routed_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor,
    mixture: Tensor,
    scaling: float,
    task_ids: Tensor | None = None,
    *,
    A0: Tensor | None = None,
    B0: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """One LoRA layer on rows of mixed tasks, each task with its own mixture of S skills in Q heads.

    Args:
        x: (..., K), float32, float16 or bfloat16 (float64 on the torch backend).
        weight: (N, K), of x's dtype, any strides. bias: (N,) or None.
        A: (Q, S, K/Q, r). B: (Q, S, r, N/Q). float32 or of x's dtype; Q divides K and N. Linearized, they are the
            skills' offsets from the point; at B0 = 0 A has no effect then and may be None.
        mixture: (T, Q, S), the weights of T tasks; without task_ids (leading dimensions of x, Q, S): the weights
            themselves, per example or per token, or one mixture (Q, S) for all rows.
        scaling: alpha / r; PEFT's Poly has 1 / r.
        task_ids: integers below T, shaped like x's leading dimensions or the first of them: (batch,) gives every
            example its task, (batch, length) every token. Tasks may come in any order, and some not at all.
        A0: (r, K), B0: (N, r): the linearization point. Neither: plain routing. A0 alone: B0 = 0.
        dropout_p, seed: LoRA dropout of the low-rank branch by the mask of `lora_linear`, drawn, or made from `seed`, a
            0-d int64 tensor on x's device.

    Returns: (..., N), in the dtype of x (of autocast, where it is on).

    Formula (arXiv 2211.03831, A and B mixed separately, head q on the q-th blocks of inputs and outputs)::

        A_z = Σ_s w_qs A_qs      B_z = Σ_s w_qs B_qs
        plain        x Wᵀ + b + s (x A_z) B_z
        linearized   x Wᵀ + b + s [ (x A0ᵀ)(B0ᵀ + B_z) + (x A_z) B0ᵀ ]

    A weight of exactly 0 leaves its skill out of the row, in both directions, whatever the skill holds. (Under
    torch.func transforms x and cotangents that are not finite reach the gradients of skills that their rows leave out.)

    Raises ValueError for shapes, dtypes, devices or task ids that do not fit (task ids on a GPU are asserted on the
    device, without waiting for it), BackendUnavailableError for a backend that has no such op.

    >>> import torch
    >>> x, W = torch.ones(3, 2), torch.zeros(2, 2)
    >>> A, B = torch.ones(1, 2, 2, 1), torch.tensor([1.0, 10.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    >>> mixture = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    >>> routed_lora_linear(x, W, None, A, B, mixture, 0.5, torch.tensor([0, 1, 0])).tolist()
    [[1.0, 1.0], [5.5, 5.5], [1.0, 1.0]]
    """
    x = autocast_input(x)
    problem = GroupedLoraLinear(x, weight, bias, A0, B0, A, B, None, scaling, None, dropout_p, seed)
    check_routed_lora_linear(problem, mixture, task_ids)
    if task_ids is None:
        mixture = mixture.reshape(-1, *mixture.shape[-2:])
        task_ids = torch.arange(mixture.shape[0], device=x.device)
        if _leaves_out(mixture) and not mixture.requires_grad:
            mixture, task_ids = torch.unique(mixture, dim=0, return_inverse=True)
    else:
        task_ids = task_ids.reshape(-1).long()
        check_task_ids(task_ids, mixture.shape[0])
    rows = as_rows(x)
    problem = problem._replace(x=rows, d_shrink=None if problem.at_zero else A)
    tasks, places = unique_tasks(task_ids, mixture.shape[0])
    if not _leaves_out(mixture) and _mixes_activations(problem, task_ids.shape[0], tasks.shape[0]):
        repeats = rows.shape[0] // max(task_ids.shape[0], 1)
        y = by_activations(problem, mixture, task_ids.unsqueeze(1).expand(-1, repeats).reshape(-1))
    else:
        (mixed_A,), (mixed_B,) = mix_inventories([problem.d_shrink], [B], [mixture.index_select(0, tasks)])
        groups = Groups(places, tasks.shape[0], rows.shape[0])
        y = run(problem._replace(d_shrink=mixed_A, d_expand=mixed_B, groups=groups))
    return of_rows(y, x)


def _leaves_out(mixture: Tensor) -> bool:
    """Whether a weight is seen to be 0."""
    return readable(mixture) and bool((mixture == 0).any())


def _mixes_activations(problem: GroupedLoraLinear, examples: int, groups: int) -> bool:
    """Which of the two forms runs; under a transform or torch.compile, on no rows or few, the one of fewer calls."""
    x, B = problem.x, problem.d_expand
    assert B is not None
    backend = backends.select_op("routed_lora_linear", x, problem.weight)
    if transform_active() or torch.compiler.is_compiling() or x.numel() == 0:
        return True
    if composed.preferred(backend, x, problem.weight, B.shape[2], problem.dropout_p):
        return True
    repeats = x.shape[0] // max(examples, 1)
    return activations_pay(examples, repeats, groups, B.shape[1], B.shape[2], gathers=repeats < MIN_BLOCK)
