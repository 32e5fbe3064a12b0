"""Two processes with a patched model each, as accelerate runs them, on CPUs through gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from zoo import Image, families

import flowcut_kernels as fk

TESTS = Path(__file__).parents[1]
POLICY = fk.FlowCut(9, llm_layer=1)
# Placeholders that go, tiles, ones that stay until the language model, several layers of features.
FAMILIES = [family for family in families() if family.name in ("llava", "internvl", "qwen2_5_vl", "qwen3_vl")]
ROWS = [[3, Image(seed=i), *range(5, 6 + i)] for i in range(5)]
GREEDY = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
WORKER = """
import sys

sys.path[:0] = [f"{sys.argv[1]}/models", sys.argv[1]]
import torch
from accelerate import Accelerator

rank, store, result = int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
import flowcut_kernels as fk
import test_accelerate as test

accelerator = Accelerator(cpu=True)
assert (accelerator.num_processes, accelerator.process_index) == (2, rank)
gathered = []
for family in test.FAMILIES:
    model = fk.patch(family.model(), test.POLICY)
    wrapped = accelerator.prepare(model)
    assert type(wrapped).__name__ == "DistributedDataParallel" and accelerator.unwrap_model(wrapped) is model
    with accelerator.split_between_processes(test.ROWS, apply_padding=True) as rows, torch.no_grad():
        inputs = family.prompt(rows)
        last = wrapped(**inputs, logits_to_keep=1).logits[:, -1]
        new = accelerator.unwrap_model(wrapped).generate(**inputs, **test.GREEDY)[:, -3:]
    gathered.append([x[: len(test.ROWS)] for x in accelerator.gather((last, new))])
if accelerator.is_main_process:
    torch.save(gathered, result)
accelerator.end_training()
"""


@pytest.mark.any_transformers
@torch.no_grad()
def test_data_parallel(tmp_path):
    """Rows shared out between the processes give what one process gives."""
    command = [sys.executable, "-c", WORKER, str(TESTS)]
    processes = []
    for rank in range(2):
        numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, OMP_NUM_THREADS=1)
        settings = dict(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
        environment = os.environ | settings | {name: str(value) for name, value in numbers.items()}
        arguments = [*command, str(rank), str(tmp_path / "store"), str(tmp_path / "result")]
        processes.append(
            subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    for family, (last, new) in zip(FAMILIES, torch.load(tmp_path / "result"), strict=True):
        model, inputs = fk.patch(family.model(), POLICY), family.prompt(ROWS)
        assert_close(last, model(**inputs, logits_to_keep=1).logits[:, -1], rtol=1e-3, atol=1e-3)
        assert torch.equal(new, model.generate(**inputs, **GREEDY)[:, -3:])
