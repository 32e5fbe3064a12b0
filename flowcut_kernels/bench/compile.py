"""Compiles every Triton kernel for GPUs that need not be there: registers, spills, shared memory, and what is wrong.

Real launches are prepared from meta tensors, so that what is compiled (specialisation, block sizes, warps) is what a
launch of these sizes would run. The CUDA C++ kernels are read from the native library as nvcc built it.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .._library import cuda_error
from .._ops import Relevance, Select, ValueNorm
from ..ops._triton_common import Launch
from ..ops.anchor_stats.triton import prepare as prepare_selecting
from ..ops.anchor_stats.triton import prepare_all as prepare_stats
from ..ops.attention_with_stats.triton import prepare as prepare_attention
from ..ops.gather_tokens.triton import prepare as prepare_gather
from ..ops.patch_entropy.triton import prepare as prepare_entropy
from ..ops.received_attention.triton import prepare as prepare_received
from ..ops.recycle_tokens.triton import prepare as prepare_recycling
from ..ops.score_select.triton import prepare as prepare_select

ARCHITECTURES = (80, 90, 100)
_OLDEST = 70  # whose atomics release and acquire
_REGISTERS, _BLOCKS = 65536, 32  # of a multiprocessor


def known_architectures() -> list[int]:
    """Those of Triton's assemblers that the kernels can do with: LLVM ends the process at one that it does not know."""
    named = {}
    for path in {get_ptxas(arch).path for arch in ARCHITECTURES}:
        said = subprocess.run([path, "--help"], capture_output=True, text=True, check=True).stdout
        named[path] = {int(arch) for arch in re.findall(r"'sm_(\d+)'", said)}
    every = {arch for names in named.values() for arch in names}
    return sorted(arch for arch in every if arch >= _OLDEST and arch in named[get_ptxas(arch).path])


def limits(arch: int) -> tuple[int, int]:
    """Bytes of shared memory that a block of ``sm_<arch>`` may ask for, and warps that a multiprocessor holds.

    CUDA C++ Programming Guide, "Compute Capabilities"; others than data-centre parts have the least of all.
    """
    return {80: (163 * 1024, 64), 90: (227 * 1024, 64), 100: (227 * 1024, 64)}.get(arch, (99 * 1024, 48))


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one architecture; `stack` and `local` bytes are spills, and should be 0."""

    kernel: str
    variant: str
    arch: int
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    blocks: int  # that fit a multiprocessor at once, by registers, shared memory and warps
    faults: tuple[str, ...] = ()  # of the code itself: `serialised` and `unordered`

    @property
    def failure(self) -> str | None:
        """Why it must not be shipped: faults, spills, or more shared memory than a block may have."""
        reasons, (most, _) = list(self.faults), limits(self.arch)
        if self.stack or self.local:
            reasons.append(f"spills {self.stack + self.local} bytes")
        if self.shared > most:
            reasons.append(f"needs {self.shared} bytes of shared memory, a block has {most}")
        return "; ".join(reasons) or None


def compile_launch(launch: Launch, arch: int) -> tuple[triton.compiler.CompiledKernel, tuple[str, ...]]:
    """What `launch` would run on ``sm_<arch>``, compiled by the path of a real launch, and the faults of its code."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel, meta = launch.kernel, dict(launch.meta, debug=False)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*launch.arguments, **meta)
    options, signature, constants, attributes = kernel._pack_args(backend, meta, bound, specialization, options)
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options=dict(options.__dict__)
    )
    ptx = compiled.asm["ptx"]
    if "wgmma" not in ptx:
        return compiled, unordered(ptx)
    # Triton keeps what ptxas says to itself, and a cached kernel is not assembled at all: once more, with its log.
    with redirect_stdout(io.StringIO()) as log, triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(ptx, {}, options, arch)
    return compiled, (*unordered(ptx), *serialised(log.getvalue()))


def serialised(log: str) -> tuple[str, ...]:
    """What ptxas says it lost, such as tensor-core products that wait for one another (C7510 to C7514)."""
    return tuple(re.findall(r"Potential Performance Loss: (.+)", log))


_MEMORY = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?(?:(bar(?:rier)?\.sync\s+0;)|(atom\.global\S*)|(?:ld|st)\.global|\$L__BB)", re.M
)


def unordered(ptx: str) -> tuple[str, ...]:
    """How a counter in device memory fails to order what blocks write before it and what the last of them reads.

    The one thread that counts speaks for its block: a barrier of all threads, with no access and no branch target
    between, must come before its atomic and another one after it, and the atomic must release and acquire.
    """
    steps, faults = list(_MEMORY.finditer(ptx)), []
    for before, atomic, after in zip(steps, steps[1:], steps[2:], strict=False):
        if atomic[2]:
            if "acq_rel" not in atomic[2]:
                faults.append(f"{atomic[2]} neither releases nor acquires")
            if not before[1]:
                faults.append("no barrier before an atomic that announces a block's results")
            if not after[1]:
                faults.append("no barrier after an atomic that tells of other blocks' results")
    return tuple(faults)


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of the only kernel of a cubin, read by the cuobjdump that ships with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def resident_blocks(arch: int, warps: int, registers: int, shared: int) -> int:
    """Blocks that one multiprocessor of ``sm_<arch>`` holds; registers go to warps in units of 256.

    Of its shared memory, 1 KiB more than a block may ask for, it keeps 1 KiB per block for itself.
    """
    most, most_warps = limits(arch)
    by_registers = _REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, (most + 1024) // (shared + 1024), most_warps // warps, _BLOCKS)


def launches(arch: int) -> Iterator[tuple[str, Launch]]:
    """Launches on ``sm_<arch>`` at the sizes of real models.

    CLIP-L/336, 48 x 48 and 128 x 128 grids, SigLIP-so400m and ViT-H heads; groups of 2 x 2 and 4 x 4 patches.
    """
    cosine, full, head_mean = Relevance.COSINE, ValueNorm.FULL, ValueNorm.HEAD_MEAN
    half, single, bf16 = torch.float16, torch.float32, torch.bfloat16
    for dim, dtype, tokens, batch, anchors, relevance, norm, mode, ragged, powers, *group in (
        (64, bf16, 577, 8, 1, cosine, full, Select.ADAPTIVE, False, False),
        (64, bf16, 577, 8, 1, cosine, full, Select.ADAPTIVE, False, True),
        (64, bf16, 577, 8, 1, cosine, full, Select.SCORE_ONLY, False, False),
        (64, bf16, 577, 8, 1, cosine, full, Select.FIXED, True, False),
        (64, bf16, 577, 64, 1, Relevance.SOFTMAX, head_mean, None, False, False),
        (64, bf16, 2305, 64, 1, cosine, full, Select.ADAPTIVE, True, False),
        (72, bf16, 2305, 8, 1, cosine, full, Select.ADAPTIVE, False, False),
        (80, bf16, 577, 64, 1, Relevance.SCALED_SOFTMAX, full, None, False, False),
        (88, half, 577, 64, 1, cosine, full, Select.FIXED, False, False),
        (96, bf16, 577, 8, 1, cosine, full, Select.FIXED, False, False),
        (128, bf16, 16384, 1, 1, cosine, full, None, False, False),
        (64, bf16, 577, 8, 8, cosine, full, None, False, False),
        (72, bf16, 729, 10, 25, Relevance.NONE, ValueNorm.NONE, None, False, False),
        (64, single, 577, 64, 1, cosine, full, None, False, False),
        (128, single, 16384, 64, 1, cosine, head_mean, Select.ADAPTIVE, False, False),
        (128, single, 16384, 64, 1, cosine, head_mean, Select.ADAPTIVE, False, True),
        (80, bf16, 4096, 1, 1, cosine, full, Select.ADAPTIVE, False, False, 4),
        (72, bf16, 1024, 8, 1, cosine, full, Select.SCORE_ONLY, False, False, 16),
        (64, bf16, 1024, 8, 1, cosine, full, Select.FIXED, True, False, 4),
        (128, single, 16384, 64, 1, cosine, head_mean, Select.ADAPTIVE, True, True, 4),
        (80, bf16, 16384, 8, 1, cosine, full, Select.ADAPTIVE, True, False, 16),
    ):
        heads = 16
        key = torch.empty(batch, tokens, heads * dim, dtype=dtype, device="meta")
        key = key.view(batch, tokens, heads, dim).transpose(1, 2)
        lengths = torch.empty(batch, dtype=torch.int32, device="meta") if ragged else None
        selection = dict(
            history=torch.empty(batch, tokens, device="meta"), lengths=lengths, attention=True,
            history_weight=0.5, mode=mode, budget=64, divisor=2.0 if mode == Select.ADAPTIVE else 0.0,
            **_exponents(powers), **_grouped(group, lengths),
        )  # fmt: skip
        name = f"B={batch} N={tokens} H={heads} D={dim} {str(dtype)[6:]} {relevance.name.lower()} {norm.name.lower()}"
        name += f" R={anchors}" * (anchors > 1) + " ragged" * ragged + " powers" * powers
        name += "".join(f" block={block}" for block in group)
        inputs = key[:, :, :anchors], key, key, key[:, :, :anchors], None
        options = dict(scale=dim**-0.5, protect=0 if group else 1, relevance=relevance, value_norm=norm)
        if mode is not None:
            yield f"{name} select {mode.name.lower()}", prepare_selecting(*inputs, **options, selection=selection)
            continue
        for launch in prepare_stats(*inputs, **options):
            yield name, launch
    for dim, dtype, batch, tokens, segments, anchored in (
        (64, torch.bfloat16, 8, 577, 0, True), (64, torch.bfloat16, 8, 577, 0, False),
        (72, torch.bfloat16, 8, 729, 0, True), (80, torch.bfloat16, 8, 577, 0, True),
        (80, torch.bfloat16, 1, 4096, 64, True), (128, torch.bfloat16, 1, 4096, 0, True),
        (88, torch.float16, 8, 577, 0, True), (96, torch.bfloat16, 8, 577, 0, True),
        (64, torch.float32, 8, 577, 0, True), (128, torch.float32, 8, 577, 0, True),
    ):  # fmt: skip
        heads, images = 16, segments or batch
        key = torch.empty(batch, tokens, heads * dim, dtype=dtype, device="meta")
        key = key.view(batch, tokens, heads, dim).transpose(1, 2)
        anchor = torch.empty(images, heads, 1, dim, dtype=dtype, device="meta") if anchored else None
        cu_seqlens = torch.empty(segments + 1, dtype=torch.int32, device="meta") if segments else None
        name = f"B={batch} N={tokens} H={heads} D={dim} {str(dtype)[6:]}"
        name += f" {segments} segments" * bool(segments) + " no statistics" * (not anchored)
        yield name, prepare_attention(
            key, key, key, anchor, anchor, None, cu_seqlens,
            max_seqlen=tokens // segments if segments else None, scale=dim**-0.5, protect=0 if segments else 1,
            relevance=Relevance.COSINE if anchored else Relevance.NONE,
            value_norm=ValueNorm.FULL if anchored else ValueNorm.NONE, arch=arch,
        )  # fmt: skip
    for dim, dtype, batch, tokens, heads_per_key, ragged, *given in (
        (64, bf16, 1, 577, 1, False), (72, bf16, 10, 729, 1, True), (80, bf16, 1, 16384, 1, False),
        (72, bf16, 10, 729, 1, False, "lse"),
        (88, half, 8, 577, 1, False), (96, bf16, 8, 577, 1, False), (128, bf16, 8, 4096, 4, True),
        (64, single, 8, 577, 1, False), (128, single, 8, 577, 1, True),
    ):  # fmt: skip
        heads = 16
        query, key = (
            torch.empty(batch, tokens, n * dim, dtype=dtype, device="meta").view(batch, tokens, n, dim).transpose(1, 2)
            for n in (heads, heads // heads_per_key)
        )
        lengths = torch.empty(batch, dtype=torch.int32, device="meta") if ragged else None
        lse = torch.empty(batch, heads, tokens, device="meta") if given else None
        name = " ".join([f"B={batch} N={tokens} H={heads} D={dim} {str(dtype)[6:]}", *["ragged"] * ragged, *given])
        for launch in prepare_received(query, key, lse, lengths, scale=dim**-0.5, arch=arch):
            yield name, launch
    for tokens, mode, powers, *group in (
        (577, Select.ADAPTIVE_BATCH, False), (2305, Select.FIXED, False), (16384, Select.ADAPTIVE, False),
        (577, Select.ADAPTIVE_BATCH, True), (16384, Select.ADAPTIVE, True),
        (1025, Select.ADAPTIVE_BATCH, False, 4), (4097, Select.FIXED, False, 16), (16385, Select.ADAPTIVE, True, 4),
    ):  # fmt: skip
        row = torch.empty(64, tokens, device="meta")
        lengths = torch.empty(64, dtype=torch.int32, device="meta")
        name = f"B=64 N={tokens} {mode.name.lower()}" + " powers" * powers
        yield name + "".join(f" block={block}" for block in group), prepare_select(
            row, row, row, row, row[:, 0], lengths,
            history_weight=0.5, protect=1, mode=mode, budget=64, divisor=2.0, **_exponents(powers),
            **_grouped(group, lengths),
        )  # fmt: skip
    for dim, tokens, dtype, normed, rms in (
        (1024, 577, torch.bfloat16, True, False), (1152, 2305, torch.bfloat16, False, False),
        (4096, 2305, torch.float32, True, True),
    ):  # fmt: skip
        hidden = torch.empty(64, tokens, dim, dtype=dtype, device="meta")
        rotary = torch.empty(1, tokens, 72, dtype=dtype, device="meta").expand(64, -1, -1)
        score = torch.empty(64, tokens, device="meta")
        position = torch.empty(64, tokens, dtype=torch.int64, device="meta")
        index = torch.empty(64, 64, dtype=torch.int64, device="meta")
        weight = torch.empty(dim, dtype=dtype, device="meta") if normed else None
        name = f"B=64 N={tokens} D={dim} {str(dtype)[6:]} norm={'none' if not normed else 'rms' if rms else 'layer'}"
        yield (
            name,
            prepare_gather([hidden, rotary, rotary, score, position], index, weight, None if rms else weight, rms=rms),
        )
    for patch_size, channels, dtype in (
        (14, 3, torch.uint8), (14, 3, torch.bfloat16), (16, 3, torch.float32), (64, 1, torch.float16),
    ):  # fmt: skip
        pixels = torch.empty(64, channels, 384, 384, dtype=dtype, device="meta")
        shift = [] if dtype == torch.uint8 else [0.5] * channels
        yield (
            f"B=64 C={channels} 384x384 p={patch_size} {str(dtype)[6:]}",
            prepare_entropy(pixels, patch_size=patch_size, mean=shift, std=shift),
        )
    for tokens, dim, dtype in (
        (51200, 1024, torch.float32), (51200, 3584, torch.bfloat16), (6561, 1000, torch.float16),
    ):  # fmt: skip
        features = torch.empty(tokens, dim, dtype=dtype, device="meta")
        importance = torch.empty(tokens, device="meta")
        cell = torch.empty(tokens, dtype=torch.int64, device="meta")
        yield (
            f"T={tokens} D={dim} {str(dtype)[6:]} cells=512",
            prepare_recycling(features, importance, cell, cells=512),
        )


def _exponents(powers: bool) -> dict[str, Any]:
    """Options of a selection that needs g^w and h^e, or neither of them."""
    value = 1.5 if powers else 1.0
    return dict(criteria_weights=(1.0, 1.0, value), entropy_exponent=2 * value)


def _grouped(group: list[int], budgets: torch.Tensor | None) -> dict[str, Any]:
    """Options of a selection of groups of tokens, or none."""
    return dict(block=group[0], budgets=budgets) if group else {}


def native(architectures: Iterable[int], only: str | None = None) -> Iterator[Row]:
    """The CUDA C++ kernels in the native library; none where it was built without nvcc."""
    if cuda_error() is not None:
        return
    (library,) = Path(__file__).parents[1].glob("flowcut_kernels_native*.so")
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    arch, warps = 0, 256 // 32  # of every kernel, see kThreads
    for found in re.finditer(r"arch = sm_(\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text):
        if found[1]:
            arch = int(found[1])
            continue
        kernel, variant = _demangled(found[2])
        registers, stack, shared, local = map(int, found.groups()[2:])
        if arch in architectures and (not only or only in kernel):
            blocks = resident_blocks(arch, warps, registers, shared)
            yield Row(kernel, variant, arch, warps, registers, stack, local, shared, blocks)


def _demangled(symbol: str) -> tuple[str, str]:
    """Name and template arguments of a kernel, or the symbol where binutils are missing."""
    program = shutil.which("c++filt")
    if program is None:
        return symbol, ""
    name = subprocess.run([program, symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+)<(.*)>\(", name)
    return (found[1], found[2]) if found else (name.strip(), "")


def compile_all(architectures: Iterable[int] = ARCHITECTURES, only: str | None = None) -> list[Row]:
    """Every launch of :func:`launches` and every CUDA C++ kernel whose name contains `only`, by architecture."""
    rows = []
    architectures = tuple(architectures)
    for variants in zip(*map(launches, architectures), strict=True):
        for arch, (variant, launch) in zip(architectures, variants, strict=True):
            if only and only not in launch.kernel.fn.__name__:
                continue
            compiled, faults = compile_launch(launch, arch)
            used, warps, shared = resources(compiled.asm["cubin"]), launch.meta["num_warps"], compiled.metadata.shared
            rows.append(
                Row(
                    launch.kernel.fn.__name__.lstrip("_"), variant, arch, warps,
                    used["REG"], used["STACK"], used["LOCAL"], shared,
                    resident_blocks(arch, warps, used["REG"], shared), faults,
                )
            )  # fmt: skip
    return [*rows, *native(architectures, only)]
