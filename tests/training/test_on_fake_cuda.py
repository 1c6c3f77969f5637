"""What a run does on a GPU, done on fake CUDA tensors: no tensor is on the wrong device.

All cases run in one process of their own, which loads the library of benchmarks/gpu/fake_cuda.cpp
before torch. The same cases run on a real GPU by `make gpu-check`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import fake_library, on_fake_cuda
from benchmarks.gpu.cases import cases
from benchmarks.gpu.fake_library import NoFakeCudaError

ROOT = Path(__file__).parents[2]
REMEDY = (
    "if that is meant, run `python -m benchmarks.gpu.on_fake_cuda --write-golden` and say in the "
    "commit why a step has to wait there"
)
pytestmark = pytest.mark.timeout(400)  # the first test waits for the process: 26 s of CPU


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    try:
        return on_fake_cuda.found(limit_s=360)
    except NoFakeCudaError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", cases())
def test_it_works_on_cuda(found: dict[str, Any], case: str) -> None:
    problem = found["cases"][case]
    assert problem is None, problem


@pytest.mark.parametrize("setting", on_fake_cuda.SETTINGS)
def test_a_step_waits_for_its_device_where_the_golden_file_says(
    found: dict[str, Any], setting: str
) -> None:
    golden = json.loads(on_fake_cuda.GOLDEN.read_text())
    now, then = set(found["syncs"][setting]), set(golden[setting])
    added, gone = sorted(now - then), sorted(then - now)
    assert not added, f"a step now waits in {added}; {REMEDY}"
    assert not gone, f"a step no longer waits in {gone}; {REMEDY}"


def test_bf16_weights_need_few_casts_and_half_the_activations_of_autocast(
    found: dict[str, Any],
) -> None:
    autocast, ours = found["forward"]["bf16"], found["forward"]["bf16_weights"]
    assert autocast["casts"] > 300
    assert ours["casts"] <= 10
    assert ours["bytes_per_image"] <= 0.55 * autocast["bytes_per_image"]


REFUSED = {  # by CUDA; without the fake device these pass
    "two devices": ("x + torch.zeros(3)", "same device, but found at least two devices"),
    "two devices, in place": ("torch.zeros(3).add_(x)", "same device, but found at least two"),
    "a number on the device": ("torch.zeros(3) + x.sum()", "same device, but found at least two"),
    "tables of the host": ("torch.searchsorted(torch.arange(3.0), x)", "same device, but found"),
    "numpy of the device": ("x.numpy()", "can't convert cuda:0 device type tensor to numpy"),
    "group norm of two types": (
        "torch.native_group_norm(x.bfloat16().view(1, 3, 1), x, x, 1, 3, 1, 1, 1e-5)",
        "operands of one type",
    ),
    "a kernel that is not deterministic": (
        "deterministically(lambda: x.kthvalue(1))",
        "does not have a deterministic implementation",
    ),
    "running sums in any order": (
        "deterministically(lambda: x.cumsum(0))",
        "does not have a deterministic implementation",
    ),
}
TAKEN = {  # by CUDA
    "a number of the host": "x * torch.tensor(2.0)",
    "places of the host": "x[torch.tensor([0, 2])]",
    "a copy": "torch.zeros(3).copy_(x)",
    "a view, written to": "x.view(3, 1)[1].fill_(5.0), x.tolist()[1] == 5.0 or 1 / 0",
    "running sums of integers": "deterministically(lambda: x.long().cumsum(0))",
    "any kernel, where nobody asked": "x.kthvalue(1)",
    "autocast": "torch.nn.functional.linear(x, w).dtype == torch.bfloat16 or 1 / 0",
    "a backward pass": "w.sum().backward(), w.grad.device.type == 'cuda' or 1 / 0",
}
SCRIPT = """
import json, sys, torch
from benchmarks.gpu.fake_cuda import end_process, fake_cuda
from benchmarks.gpu.measured import deterministic
from benchmarks.gpu.on_fake_cuda import outcome
def deterministically(action):
    with deterministic():
        return action()
reported = {}
for name, expression in json.loads(sys.argv[1]).items():
    with fake_cuda() as device, torch.autocast("cuda", torch.bfloat16):
        x = torch.ones(3, device=device)
        w = torch.ones(3, 3, device=device, requires_grad=True)
        reported[name] = outcome(lambda: eval(expression))
print(json.dumps(reported))
end_process()
"""


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    """Of each expression above: None, or the error."""
    expressions = json.dumps({name: of for name, (of, _) in REFUSED.items()} | TAKEN)
    try:
        environment = fake_library.environment()
    except NoFakeCudaError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, expressions],
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    reported: dict[str, Any] = json.loads(done.stdout)
    return reported


@pytest.mark.parametrize("name", REFUSED)
def test_the_fake_device_refuses_what_cuda_refuses(judged: dict[str, Any], name: str) -> None:
    assert REFUSED[name][1] in (judged[name] or "it was taken")


@pytest.mark.parametrize("name", TAKEN)
def test_the_fake_device_takes_what_cuda_takes(judged: dict[str, Any], name: str) -> None:
    assert judged[name] is None
