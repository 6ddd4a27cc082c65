"""How the processes that torchrun or accelerate launch has started become one run, and end as one:
what goes wrong in any is said once."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from kvfold.compress.processes import Processes
from kvfold.errors import KvfoldError

COMING = timedelta(minutes=5)  # of all processes, at the beginning
STORE = "KVFOLD_STORE"  # the file by which processes of one machine find each other (local.py)
NEAR = timedelta(minutes=1)  # until they have
PATIENCE = timedelta(days=1)  # with one that computes; one that ends is noticed at once
LEAVING = 5  # seconds that a process which has failed waits for the others to leave too
FAILED = "kvfold/failed"  # how many have, in the table that they share


def from_environment() -> Processes:
    """Those that the launcher's variables tell of; a single one without them.

    Raises:
        KvfoldError: they contradict each other, or are not all there.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if given == "1":
        return Processes()
    places = () if os.environ.get(STORE) else ("MASTER_ADDR", "MASTER_PORT")
    names = ("WORLD_SIZE", "RANK", *places)
    if missing := [name for name in names if not os.environ.get(name)]:
        raise KvfoldError(
            f"WORLD_SIZE is '{given}', so this is one of several processes, but {' and '.join(missing)} is not set; "
            "start them by torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    try:
        rank, size = int(os.environ["RANK"]), int(given)
        local = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError:
        rank, size, local, local_size = -1, 0, 0, 1
    if not (0 <= rank < size and 0 <= local < local_size <= size):
        stated = ", ".join(
            f"{name}={os.environ[name]}"
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            if name in os.environ
        )
        raise KvfoldError(
            f"{stated} is no numbering of processes from 0 to one less than WORLD_SIZE; start them by torchrun or "
            "accelerate launch, which set these."
        )
    return Processes(rank, size, local, local_size)


def own_device(processes: Processes, name: str) -> str:
    """The device of this process: of CUDA's the one of its number on this host.

    Args:
        name: that is asked for: "auto", "cpu", "cuda"; of a single process anything.
    Raises:
        KvfoldError: another name for several processes, or fewer CUDA devices than processes.
    """
    if processes.size == 1:
        return name
    count, local_size = torch.cuda.device_count(), processes.local_size
    if name not in ("auto", "cpu", "cuda"):
        raise KvfoldError(
            f"--device '{name}' is one device for all {processes.size} processes; give 'cuda', of whose devices each "
            "takes one, or 'cpu'."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda" or not count:
        return name
    if local_size > count:
        raise KvfoldError(
            f"{local_size} processes on this host need {local_size} CUDA devices, one each, but it has {count}; start "
            f"{count} at the most (--nproc-per-node), or give --device cpu."
        )
    return f"cuda:{processes.local_rank}"


@contextmanager
def join(device: str) -> Iterator[str]:
    """A context in which `Processes.current()` is all that were started; yields the name of this
    one's device. A single process waits for nobody.

    The first process that fails says why on stderr; the others say no more, and all end.

    Args:
        device: as in `own_device`.
    Raises:
        KvfoldError: as `from_environment` and `own_device`; or the processes don't find each other.
    """
    processes = from_environment()
    name = own_device(processes, device)
    if processes.size == 1:
        yield name
        return
    if not dist.is_available():
        raise KvfoldError(
            f"This PyTorch is built without torch.distributed, which {processes.size} processes need; start a single "
            "one, or install another build."
        )
    own = torch.device(name) if name.startswith("cuda") else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    store = _meet(processes, "nccl" if own.type == "cuda" else "gloo")
    Processes.joined = Processes(
        processes.rank, processes.size, processes.local_rank, processes.local_size, own
    )
    if not processes.first:
        logging.disable(logging.WARNING)  # process 0 warns of the same
    try:
        yield name
    except BaseException:
        _fail(processes, own, store)
        raise
    else:
        dist.destroy_process_group()
    finally:
        Processes.joined = None
        logging.disable(logging.NOTSET)


def _meet(processes: Processes, backend: str) -> "dist.Store":
    """Waits for all processes; returns what they share besides, a small table."""
    near = os.environ.get(STORE)
    try:
        if near:
            store: dist.Store = dist.FileStore(near, processes.size)
            store.set_timeout(NEAR)
            rank, size = processes.rank, processes.size
        else:
            store, rank, size = next(dist.rendezvous("env://", timeout=COMING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if near:
            raise KvfoldError(
                f"The {processes.size} processes did not find each other on this machine ({reason[:200]}); leave "
                "--processes out."
            ) from error
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise KvfoldError(
            f"The {processes.size} processes did not find each other by MASTER_ADDR and MASTER_PORT, '{place}' "
            f"({reason[:200]}); see to it that all are started and reach that address."
        ) from error
    return store


def _fail(processes: Processes, device: torch.device, store: "dist.Store") -> None:
    """Leaves the others, who see it; silences this process, if another has failed before."""
    try:
        says = store.add(FAILED, 1) == 1
    except RuntimeError:  # the table was process 0's, which was killed
        says = True
    if not says:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if device.type == "cuda":  # NCCL would wait for the others: the launcher ends them
        return
    with suppress(RuntimeError, KeyboardInterrupt):
        dist.destroy_process_group()
        # the launcher ends all when one has ended, and process 0 may have files to remove
        end = time.monotonic() + LEAVING
        while store.add(FAILED, 0) < processes.size and time.monotonic() < end:
            time.sleep(0.02)
