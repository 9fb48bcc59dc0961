"""Kernels compiled for sm_90 without a GPU: what the interpreter accepts, the compiler may not."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
MODULES = {
    "heads": ("_expand", "_collect"),
    "prefill": ("_attend",),
    "prefill_backward": ("_grad_queries", "_grad_keys"),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel.

    Attributes:
        ptx: its code.
        registers: per thread.
        stack: bytes per thread.
        shared: bytes per program.
        spills_in_loops: accesses to the stack inside of loops that multiply matrices, per instruction there.
    """

    ptx: str
    registers: int
    stack: int
    shared: int
    spills_in_loops: float


def compile_for_hopper(call, monkeypatch, tmp_path):
    """Name -> kernel, for the launches of `call`, which computes nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns while it is unset
    from importlib import import_module

    found = {}
    for module_name, kernels in MODULES.items():
        module = import_module(f"tpa_attention.torch.kernels.{module_name}")
        for name in kernels:
            monkeypatch.setattr(module, name, _Launcher(name, getattr(module, name), found, tmp_path))
    call()
    return found


class _Launcher:
    def __init__(self, name, kernel, found, tmp_path):
        self.name, self.kernel, self.found, self.tmp_path = name, kernel, found, tmp_path

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps, maxnreg=None, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, fixed, aligned = {}, dict(constants), {}
        for place, (name, value) in enumerate(zip(self.kernel.arg_names, args, strict=False)):
            generic = self.kernel.params[place].do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                aligned[(place,)] = [["tt.divisibility", 16]]
            elif value is None or (value == 1 and isinstance(value, int) and not generic):
                signature[name], fixed[name] = "constexpr", value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0 and not generic:
                    aligned[(place,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys((name for name in fixed if name not in signature), "constexpr")
        signature = {name: signature[name] for name in self.kernel.arg_names}
        options = {"num_warps": num_warps, "maxnreg": maxnreg}
        source = ASTSource(self.kernel, signature, fixed, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        file = self.tmp_path / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", file)
        self.found[self.name] = Compiled(
            ptx=made.asm["ptx"],
            registers=int(re.search(r"REG:(\d+)", usage)[1]),
            stack=int(re.search(r"STACK:(\d+)", usage)[1]),
            shared=made.metadata.shared,
            spills_in_loops=_spills_in_loops(_cuobjdump("-sass", file)),
        )


def _cuobjdump(option, file):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def _spills_in_loops(sass):
    """Loads from and stores to the stack in the innermost loops around matrix instructions."""
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    ]
    jumps = [
        (int(target[1], 16), address)
        for address, text in code
        if (target := re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) and int(target[1], 16) < address
    ]
    total = spills = 0
    for first, last in jumps:
        holds_another = any(first <= a and b <= last and (a, b) != (first, last) for a, b in jumps)
        body = [text for address, text in code if first <= address <= last]
        if not holds_another and any("MMA" in text for text in body):
            total += len(body)
            spills += sum("LDL" in text or "STL" in text for text in body)
    return spills / max(total, 1)
