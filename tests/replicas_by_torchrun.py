"""What `torchrun` starts in a test: a few runs on each process, and the results in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.replica_work import operated_run


def main() -> None:
    """Do the runs, and write what has to be the same on all processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = [operated_run(rank, seed, 20, wrapped_first=bool(seed % 2)) for seed in range(2)]
    torch.save(results, Path(sys.argv[1]) / f"result {rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
