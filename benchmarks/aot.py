"""Triton kernels compiled ahead of time, for chips that are not here, and what the compiler made of them.

In a process that does not interpret: TRITON_INTERPRET must be unset before triton is imported.
"""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes for a block


def compile_for(target: str, kernel, types: dict[str, str], constants: dict, num_warps: int = 4, num_stages: int = 2):
    """The kernel as the JIT would compile it for well-aligned tensors.

    Args:
        target: a key of TARGETS.
        kernel: a triton.jit function.
        types: Triton's type of each argument that is not a constant: "*bf16", "fp32", "i32".
        constants: the constexpr arguments.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(_source(kernel, types, constants), target=TARGETS[target], options=options)


def key_of(target: str, kernel, types: dict[str, str], constants: dict, num_warps: int = 4, num_stages: int = 2) -> str:
    """A hash of all that decides what `compile_for` returns for these arguments, and what `report` says of it.

    It is the key of Triton's own cache, and this file. In that key are the kernel's source and that of each function
    which it calls, types, constants and options, every file of the compiler, ptxas' version, and the variables that
    Triton reads from the environment.
    """
    backend, source = make_backend(TARGETS[target]), _source(kernel, types, constants)
    options = backend.parse_options({"num_warps": num_warps, "num_stages": num_stages})
    key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode() + Path(__file__).read_bytes()).hexdigest()


def _source(kernel, types: dict[str, str], constants: dict) -> ASTSource:
    """The kernel with its arguments' types, as `compile_for` takes them; pointers and strides are aligned."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    free = set(kernel.do_not_specialize or ())
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name.startswith("s_") and name not in free)
    }
    return ASTSource(kernel, signature, constants, attributes)


def report(kernel) -> dict:
    """Registers, spills, shared memory and tensor-core instructions of a compiled kernel.

    `tf32` counts instructions that round float32 to 10 bits: none is wanted. `barriers` counts those that the source
    asks for and those that are left in the machine's code, where the compiler's own are among them.
    `serial` is the share of warpgroup matrix instructions (HGMMA) that wait for their operands one by one
    (WARPGROUP.ARRIVE before each), which ptxas does where it cannot keep several in flight: near 1 is bad.
    """
    facts = {"shared": kernel.metadata.shared}
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        count = {
            name: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
            for name, key in (("registers", "vgpr_count"), ("spills", "vgpr_spill_count"))
        }
        return facts | count | {"tensor": text.count("v_mfma")}
    usage, instructions = _dump(kernel, "-res-usage"), sass(kernel)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ptx, wgmma = kernel.asm["ptx"], len(re.findall(r"\bHGMMA\b", instructions))
    facts |= {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", instructions)),
        "tensor": sum(ptx.count(word) for word in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")),
        "tf32": ptx.count("tf32"),
        "barriers": [
            len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", kernel.asm["ttir"])),
            len(re.findall(r"\bBAR\.SYNC", instructions)),
        ],
    }
    if wgmma:
        facts |= {"wgmma": wgmma, "serial": round(instructions.count("WARPGROUP.ARRIVE") / wgmma, 2)}
    return facts


def sass(kernel) -> str:
    """The instructions of a kernel compiled for an NVIDIA chip, as cuobjdump lists them."""
    return _dump(kernel, "-sass")


def _dump(kernel, flag: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
