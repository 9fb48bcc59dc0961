"""Where Triton kernels can run and what they take: asked by every operator, and by the choice of one."""

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked for once: torch.compile cannot trace it
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def runs_kernels(device: torch.device) -> bool:
    """CUDA, or the CPU where TRITON_INTERPRET=1 has kernels interpreted."""
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
