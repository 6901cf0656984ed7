"""What does not fit is an error that names it."""

import pytest
import torch
from routed_problems import cast, grouped, make, make_grouped

from linlora import functional

ONES = torch.ones
BAD = {
    "unknown id": (dict(task_ids=torch.tensor([0, 5, 1, 1])), "task id 5 is unknown: the ids of 5 tasks are 0 to 4"),
    "negative id": (dict(task_ids=torch.tensor([0, -1, 1, 1])), "task id -1 is unknown"),
    "wrong length": (dict(task_ids=torch.tensor([0, 1])), r"leading dimensions of x \(4, 6\).*task_ids \(2,\)"),
    "too many dimensions": (dict(task_ids=torch.zeros(4, 6, 12).long()), "task_ids for leading dimensions"),
    "ids of floats": (dict(task_ids=torch.ones(4)), "integers"),
    "missing ids": (dict(task_ids=None), "if it is a table with a row a task, task_ids are missing"),
    "heads that do not divide": (dict(A=ONES(5, 3, 2, 2), B=ONES(5, 3, 2, 1)), "Q = 5 heads do not divide .* 12 .* 8"),
    "ranks that differ": (dict(A=ONES(2, 3, 6, 1)), "differ in heads, skills or rank"),
    "skills that differ": (dict(A=ONES(2, 4, 6, 2)), "differ in heads, skills or rank"),
    "sizes that differ": (dict(A=ONES(2, 3, 12, 2)), r"A \(2, 3, 6, 2\) and B \(2, 3, 2, 4\) are expected"),
    "no skill": (dict(A=ONES(2, 0, 6, 2), B=ONES(2, 0, 2, 4)), "at least one head, one skill"),
    "three dimensions": (dict(A=ONES(3, 6, 2)), r"inventory A \(Q, S, K/Q, r\)"),
    "mixture of other skills": (dict(mixture=ONES(5, 2, 4)), r"mixture \(..., Q = 2, S = 3\)"),
    "mixture of a table of tables": (dict(mixture=ONES(5, 1, 2, 3)), "is a table"),
    "x": (dict(x=ONES(4, 6, 11)), r"x \(4, 6, 11\)"),
    "dtype": (dict(B=ONES(2, 3, 2, 4).half()), "B is torch.float16"),
    "no A": (dict(A=None), "A is missing"),
    "half a point": (dict(B0=ONES(8, 2)), "B0 without A0"),
    "point": (dict(A0=ONES(3, 12), B0=ONES(8, 3)), "A0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    change, message = BAD[name]
    arguments = cast(make(), torch.float32)
    with pytest.raises(ValueError, match=f"routed_lora_linear: .*{message}"):
        functional.routed_lora_linear(**{**arguments, **change})


BAD_GROUPED = {
    "ranks that differ": (dict(A=ONES(5, 12, 3)), r"A \(5, 12, 2\) and B \(5, 2, 8\) are expected for 5 groups"),
    "factors of other groups": (dict(A=ONES(4, 12, 2)), r"A \(5, 12, 2\) and B \(5, 2, 8\) are expected for 5 groups"),
    "two dimensions": (dict(A=ONES(12, 2)), r"mixed factors A \(T, K, r\) and B \(T, r, N\)"),
    "x": (dict(x=ONES(4, 6, 11)), r"x \(4, 6, 11\)"),
    "no A": (dict(A=None), "A is missing"),
    "half a point": (dict(B0=ONES(8, 2)), "B0 without A0"),
    "dtype": (dict(B=ONES(5, 2, 8).half()), "B is torch.float16"),
}


@pytest.mark.parametrize("name", BAD_GROUPED)
def test_what_does_not_fit_a_grouped_layer_is_named(name):
    change, message = BAD_GROUPED[name]
    with pytest.raises(ValueError, match=message):
        grouped({**cast(make_grouped(), torch.float32), **change})
