"""Every kernel compiles for three GPU generations without a GPU, spills nothing, fits, and its blocks are in order."""

import json
import os
import subprocess
import sys

import pytest

from flowcut_kernels import _library

pytest.importorskip("triton")

# A fresh process: under TRITON_INTERPRET=1 this one has no Triton kernels to compile.
ALL = """
import json
from dataclasses import asdict
from flowcut_kernels.bench.compile import compile_all
print(json.dumps([asdict(row) | dict(failure=row.failure) for row in compile_all()]))
"""
# Blocks that count one another: as they are, and without each of what orders them. Products that lack registers.
FAULTY = r"""
import json, re
from flowcut_kernels.bench.compile import compile_launch, launches, unordered
kernels = {launch.kernel.fn.__name__: launch for variant, launch in launches(90) if "D=128 bfloat16" in variant}
compiled, faults = compile_launch(kernels["_anchor_stats"], 90)
head, atomic, tail = re.split("(atom.global.*)", compiled.asm["ptx"])
without = lambda part: re.sub(r"bar\.sync\s+0;", "", part)
for ptx in (without(head) + atomic + tail, head + atomic + without(tail), head + atomic.replace("acq_rel", "") + tail):
    faults += unordered(ptx)
kernels["_attention_with_stats"].meta["maxnreg"] = 128
print(json.dumps([*faults, *compile_launch(kernels["_attention_with_stats"], 90)[1]]))
"""
# Functions of Triton that run while launches are prepared: its helpers for kernels take 5 us a call on the host.
ENTERED = """
import json, sys
from flowcut_kernels.bench.compile import launches
entered, folder = set(), "/triton/"
def watch(frame, event, _):
    if event == "call" and folder in frame.f_code.co_filename and "/flowcut_kernels/" not in frame.f_code.co_filename:
        entered.add(frame.f_code.co_name)
sys.setprofile(watch)
prepared = len(list(launches(90)))
sys.setprofile(None)
print(json.dumps([prepared, *sorted(entered)]))
"""


def run(script):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def seen():
    """What two short scripts print, of one process: most of its time is that of imports."""
    return run(ENTERED + FAULTY)


def test_faults_of_the_code_are_found(seen):
    before, after, relaxed, serial = seen[1]
    assert before.startswith("no barrier before") and after.startswith("no barrier after")
    assert "neither releases nor acquires" in relaxed and "instructions are serialized" in serial


def test_launches_are_prepared_without_triton(seen):
    prepared, *entered = seen[0]
    assert prepared > 0 and not entered, entered


def test_no_kernel_spills_or_overruns():
    [rows] = run(ALL)
    for row in rows:
        print(
            f"{row['kernel']:20} sm_{row['arch']:<3} {row['registers']:3} registers {row['shared']:6} B shared "
            f"{row['warps']:2} warps {row['blocks']:2} blocks/SM  {row['variant']}"
        )
    kernels = {
        "anchor_logits",
        "anchor_rows",
        "anchor_stats",
        "attention_with_stats",
        "score_select",
        "gather_tokens",
        "patch_entropy",
        "received_attention",
        "recycle_tokens",
        "row_lse",
    }
    if _library.cuda_error() is None:
        kernels |= {"compact_kv", "compact_kv_paged"}
    assert {row["kernel"] for row in rows} == kernels
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert not [row for row in rows if row["failure"]]
    assert all(row["blocks"] >= 1 for row in rows)
    # 99 KiB is what a block may take on every one of them (sm_86 and sm_89 included).
    assert max(row["shared"] for row in rows) <= 99 * 1024
