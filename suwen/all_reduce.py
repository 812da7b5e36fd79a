"""What one rank does in the preflight: it joins the others, adds up a tensor with them, and checks the sum."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from multiprocessing.connection import Connection

JOIN_SECONDS = 60
ROUNDS = 3
ELEMENTS = {"nccl": 1 << 24, "gloo": 1 << 20}  # float32


def take_part(init_method: str, world_size: int, rank: int, local_rank: int, gpu: bool, told: Connection) -> None:
    """Run in a process of its own, with `gpu` in one that was not forked.

    Tells {"step": what it does now} at each step, so that the parent can name the one in which it stayed, then
    {"step", "error": line} or {"step", "done": {"backend", "bytes", "seconds" of the fastest round}}.
    """
    told.send({"step": "loading torch"})
    import torch
    from torch import distributed

    backend = "nccl" if gpu else "gloo"
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    step = f"joining the {backend} group of {world_size} (limit {JOIN_SECONDS} s)"
    told.send({"step": step})
    try:
        if gpu:
            torch.cuda.set_device(device)
        limit = timedelta(seconds=JOIN_SECONDS)
        distributed.init_process_group(
            backend, init_method=init_method, world_size=world_size, rank=rank, timeout=limit,
            device_id=device if gpu else None,
        )  # fmt: skip
        step = f"all-reducing over {backend} (limit {JOIN_SECONDS} s)"
        told.send({"step": step})
        fastest, expected = float("inf"), world_size * (world_size + 1) / 2
        for _ in range(1 + ROUNDS):  # the first one makes the connections
            tensor = torch.full((ELEMENTS[backend],), float(rank + 1), device=device)
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(tensor)
            if gpu:
                torch.cuda.synchronize()
            fastest = min(fastest, time.perf_counter() - started)
            if not bool((tensor == expected).all()):
                raise RuntimeError(f"the sum is {tensor.min():g} to {tensor.max():g}, expected {expected:g}")
        distributed.barrier()
        told.send({"step": step, "done": {"backend": backend, "bytes": 4 * ELEMENTS[backend], "seconds": fastest}})
    except Exception as error:  # whatever a backend makes of a peer that it cannot reach: the parent tells it in a line
        told.send({"step": step, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
    finally:
        told.close()
        os._exit(0)  # nothing is left to be torn down, and a peer that is gone could hold that up
