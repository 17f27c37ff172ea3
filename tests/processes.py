"""Functions in several processes of one gloo group, forked, with what each of them returned.

A process that waits for one that does something else is a failure after `PATIENCE` seconds, not a hang.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

__all__ = ["NEEDS_FORK", "in_processes"]

PATIENCE = 60
NEEDS_FORK = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def in_processes(work: Callable[[int], Any], folder: Path, num: int = 2) -> list[Any]:
    """What a function returns for each rank: tensors, numbers, text, and lists and dictionaries of these."""
    folder.mkdir(exist_ok=True)
    children = [_forked(work, folder, rank, num) for rank in range(num)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * num, "a process failed"
    return [torch.load(folder / f"result {rank}", weights_only=True) for rank in range(num)]


def _forked(work: Callable[[int], Any], folder: Path, rank: int, num: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        met, patience = f"file://{folder / 'store'}", timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", met, patience, world_size=num, rank=rank)
        torch.save(work(rank), folder / f"result {rank}")
        dist.destroy_process_group()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
