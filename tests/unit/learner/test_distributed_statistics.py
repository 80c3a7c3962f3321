"""Mean and gather over ranks: identity alone; with two ranks the values and gradients of the global batch."""

import subprocess
import sys

import pytest
import torch

from learner.distributed import gather_over_ranks, mean_over_ranks, rank_count

RANK = """
import sys
import torch
import torch.distributed as dist
from learner.distributed import gather_over_ranks, mean_over_ranks

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
x = torch.tensor([1.0, 3.0]) * (rank + 1)
x.requires_grad_()
every = gather_over_ranks(x)
assert every.tolist() == [1.0, 3.0, 2.0, 6.0], every
every.var(correction=0).backward()  # every rank holds the same global loss
mean = every.detach().mean()
# Both ranks' losses depend on this rank's rows: their gradients add up, to twice the global one.
expected = 2 * 2 * (x.detach() - mean) / 4
assert torch.allclose(x.grad, expected), (x.grad, expected)
y = torch.tensor([2.0 * rank], requires_grad=True)
average = mean_over_ranks(y)
assert average.item() == 1.0
(average * (rank + 1)).sum().backward()
assert y.grad.item() == 1.5, y.grad
dist.destroy_process_group()
"""


def test_without_a_process_group_both_are_the_identity():
    x = torch.arange(3.0)
    assert rank_count() == 1
    assert gather_over_ranks(x) is x
    assert mean_over_ranks(x) is x


@pytest.mark.slow
def test_two_ranks_see_the_global_batch_and_its_gradient(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "rendezvous")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
