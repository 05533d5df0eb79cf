"""Quantized layers sharded by FSDP2 compute what one process computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tuner.quantization.nf4 import NF4Linear

RANKS = 2


class Adapted(nn.Module):
    """A quantized linear of an odd shape with a low-rank path that trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = NF4Linear.from_linear(nn.Linear(192, 500), block_size=64, double_quant=True)
        self.a = nn.Parameter(torch.randn(4, 192) / 14)
        self.b = nn.Parameter(torch.zeros(500, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def losses(model: nn.Module, batches: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=0.01)
    values = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def batches_of(rank: int | None) -> Tensor:
    batches = torch.randn(5, RANKS, 8, 192, generator=torch.Generator().manual_seed(1))
    return batches.flatten(1, 2) if rank is None else batches[:, rank]


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    model = fully_shard(Adapted(), mesh=mesh)
    sharded = [part.to_local().numel() for part in model.base.parameters()]
    total = torch.tensor(losses(model, batches_of(rank)))
    dist.all_reduce(total)
    torch.save({"losses": total / RANKS, "sharded": sharded}, folder / f"rank{rank}.pt")
    dist.barrier()  # nobody closes connections on which the other one still waits
    dist.destroy_process_group()
    # DTensor's caches keep the mesh, and with it gloo's threads, which go on when the group is destroyed. They must not
    # meet the end of the interpreter: once in many runs a process ended with SIGABRT.
    os._exit(0)


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_process(tmp_path: Path) -> None:
    mp.spawn(worker, args=(tmp_path,), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    whole = Adapted()
    assert [sum(sizes) for sizes in zip(*(rank["sharded"] for rank in ranks), strict=True)] == [
        part.numel() for part in whole.base.parameters()
    ]
    assert ranks[0]["sharded"][0] == 24000  # half of the packed bytes
    # fp32; the mean over ranks adds in another order than the mean over the batch.
    expected = torch.tensor(losses(whole, batches_of(None)))
    torch.testing.assert_close(ranks[0]["losses"], expected, rtol=1e-5, atol=1e-6)
    assert expected[-1] < expected[0]
