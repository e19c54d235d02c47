"""The processes of one run: who is who, sums over them, and the group that torchrun or srun describes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, TCPStore

TIMEOUT = timedelta(minutes=10)  # in which a rank has to answer the others; what waits longer for good reason: `first`
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
PORTS = 5  # that are tried for the meeting of a SLURM step's ranks


def world() -> tuple[int, int]:
    """(world size, rank)."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def keep_memory() -> None:
    """Freed memory stays with this process, as far as the C library is glibc.

    It hands the top of its heap back to the system and asks for it again at the next step, page by page. A step of
    VGG-16 takes 4-7% longer by that, of a wide ResNet-8 14-21% (`bench/loop.py --allocator`).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes


def device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    own = torch.device("cuda", local % torch.cuda.device_count())  # SLURM may show each task its GPU only
    torch.cuda.set_device(own)
    # Else gradients add up in any order: not the same bits again. A kernel that has no other way warns.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, of no use
    return own


@contextlib.contextmanager
def first() -> Iterator[None]:
    """Rank 0 goes through the block first; the others wait up to 12 hours (the conversion of a corpus)."""
    if not dist.is_initialized():
        yield
        return
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    assert isinstance(patient, dist.ProcessGroup)
    if dist.get_rank():
        dist.barrier(patient)
    yield
    if not dist.get_rank():
        dist.barrier(patient)
    dist.destroy_process_group(patient)


def lost(error: Exception) -> bool:
    """Whether an error says that another rank is gone: that one's own error is what counts."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|nccl", str(error), re.IGNORECASE) is not None
    )


def total(x: Tensor) -> Tensor:
    """A new tensor: the sum of every rank's `x`."""
    x = x.clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def maximum(x: float) -> float:
    if not dist.is_initialized():
        return float(x)
    tensor = torch.tensor(float(x), dtype=torch.float64, device=device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def slurm_rank(environment: Mapping[str, str]) -> dict[str, str] | None:
    """What torch.distributed wants to know, out of a SLURM step's environment; None for a step of one task, or none.

    The address is the first host of the step; the port follows from job, step and restart, so that jobs which share
    a node do not meet. (submitit's TorchDistributedEnvironment knows the hosts of the job only, and one port for all
    its steps and restarts.)

    Raises:
        SystemExit: this node has no submitit, which reads lists of hosts.

    >>> e = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    ...      "SLURM_STEP_NODELIST": "rack[1-2]node[3-4],cpu1", "SLURM_JOB_ID": "41"}
    >>> slurm_rank(e)["MASTER_ADDR"], slurm_rank(e)["RANK"], slurm_rank(e)["MASTER_PORT"]
    ('rack1node3', '3', '20287')
    """
    if "SLURM_STEP_ID" not in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    try:
        from submitit.slurm.slurm import _parse_node_list
    except ImportError:
        sys.exit("a SLURM step of several tasks needs submitit on its nodes: pip install 'scalerun[slurm]'")
    salt = 7 * int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_RESTART_COUNT", 0))
    return {
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": _parse_node_list(environment["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": str(20000 + (salt + int(environment["SLURM_STEP_ID"])) % 12000),
    }


def meet(size: int) -> Store:
    """The store where the ranks of a SLURM step meet: at the first of PORTS ports that rank 0 can have.

    The port of `slurm_rank` may be another program's, which refuses, or answers something else, or nothing.
    """
    name = "-".join(os.environ.get(f"SLURM_{part}", "") for part in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    host, first, own = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    until, found = time.monotonic() + TIMEOUT.total_seconds(), list[Store]()
    tried: dict[int, threading.Thread] = {}

    def attempt(port: int) -> None:
        with contextlib.suppress(dist.DistError, OSError):
            if not own:
                socket.create_connection((host, port), 5).close()  # a store would try for long
            store = TCPStore(host, port, size, own, timeout=TIMEOUT, wait_for_workers=False)
            if own:
                store.set("name", name)
            if store.get("name") == name.encode():
                found.append(store)

    while not found:
        if time.monotonic() > until:
            raise dist.DistStoreError(f"no rank 0 of this step at {host}, ports {first} to {first + PORTS - 1}")
        for port in range(first, first + PORTS):
            if not found and not (port in tried and tried[port].is_alive()):
                tried[port] = threading.Thread(target=attempt, args=(port,), daemon=True)
                tried[port].start()
                tried[port].join(None if own else 1)  # where nothing answers, a store waits for ever
        time.sleep(0.1)
    return found[0]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the group that torchrun's or srun's environment describes; nothing to do for a single process.

    Raises:
        DistStoreError: the ranks do not find each other within TIMEOUT.
    """
    found = slurm_rank(os.environ) if "WORLD_SIZE" not in os.environ else None
    os.environ.update(found or {})
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield
        return
    own, there = device(), dict[str, Any]()
    if found:
        there = {"store": meet(size), "rank": int(os.environ["RANK"]), "world_size": size}
    kind, index = "nccl" if own.type == "cuda" else "gloo", own if own.index is not None else None
    dist.init_process_group(kind, timeout=TIMEOUT, device_id=index, **there)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone
