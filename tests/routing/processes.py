"""What each process of the distributed test runs: `python processes.py RANK DIRECTORY`."""

import sys

import torch
from routed_models import fill
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from linlora import routing


def small_network():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    routed = fill(routing.route(base, 4, n_skills=3, n_heads=2, rank=2, target_modules=["0", "2"]))
    return routed, torch.randn(8, 6), torch.tensor([0, 1, 0, 1, 2, 2, 1, 3])


def main(rank, directory):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    routed, x, ids = small_network()
    part = slice(4 * rank, 4 * rank + 4)  # the processes see different tasks
    model = DistributedDataParallel(routed)
    model(x[part], task_ids=ids[part]).sin().mean().backward()
    torch.save({n: p.grad for n, p in routed.named_parameters() if p.requires_grad}, f"{directory}/{rank}.pt")
    del model  # its reducer does not outlive the group
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
