"""How much memory a model's weights may take while it is compressed."""

import torch

from kvfold.memory import memory_left

SHARE = 2  # one SHAREth of the memory; the rest is for what is computed


def room_for_weights(
    device: torch.device, max_memory: int | None = None, processes: int = 1
) -> int:
    """Bytes.

    Args:
        device: where they are to be.
        max_memory: bytes that are taken to be free on the CPU; None: those that are.
        processes: of this host, which all read the weights; on CUDA each has a device of its own.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // SHARE
    left = memory_left() if max_memory is None else (max_memory, "")
    return left[0] // SHARE // processes if left is not None else 1 << 62
