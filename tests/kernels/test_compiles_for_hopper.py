"""Any machine can compile for an H100: the Hopper kernel, which cannot be interpreted, and what operations launch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mage_kernels

pytest.importorskip("triton")

COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from mage_kernels.exact_attention.hopper_kernel import hopper_split_kernel as kernel

for name, (dim, groups, block_n, stages, masses_of, kept) in json.loads(sys.argv[1]).items():
    layout = gl.NVMMASharedLayout.get_default_for([block_n, dim], gl.bfloat16)
    pointers = dict(query="*bf16", lengths="*i32", part_out="*fp32", part_mass="*fp32", tile_mass=kept)
    pointers |= dict(qk_scale="fp32")
    descriptors = dict.fromkeys(("key", "value"), f"tensordesc<bf16[{block_n}, {dim}],{layout!r}>")
    registers = 240 if groups == 2 else 160
    fixed = dict(D=dim, GROUPS=groups, BLOCK_N=block_n, STAGES=stages, MASSES_OF=masses_of)
    fixed |= dict(REGISTERS=registers, num_warps=4)
    types = pointers | descriptors | dict.fromkeys(fixed, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"}
    source = GluonASTSource(kernel, signature, fixed, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    open(f"{name}.cubin", "wb").write(compiled.asm["cubin"])
    open(f"{name}.ptx", "w").write(compiled.asm["ptx"])
"""


SHAPES = {
    "128-rows": (128, 2, 128, 2, 1, "*fp32"),
    "128-rows-fp16": (128, 2, 128, 2, 1, "*fp16"),
    "192-rows": (128, 3, 64, 3, 2, "*fp32"),
    "192-rows-64-keys": (128, 3, 64, 3, 1, "*fp32"),
    "192-rows-no-masses": (128, 3, 64, 3, 0, "*fp32"),
    "short": (128, 2, 64, 3, 2, "*fp32"),
    "short-no-masses": (128, 2, 64, 3, 0, "*fp32"),
}
"""head_dim, warp groups, tile, stages, tiles that share a mass (0: none are kept), in which type masses are kept."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A folder with the kernel compiled for every shape, in one process: importing takes as long as compiling."""
    folder = tmp_path_factory.mktemp("hopper")
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", COMPILE, json.dumps(SHAPES)]
    subprocess.run(command, env=environment, cwd=folder, check=True, timeout=300)
    return folder


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted process cannot compile")
@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_for_hopper(shape, compiled):
    ptx = (compiled / f"{shape}.ptx").read_text()
    assert "wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx and "setmaxnreg" in ptx
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", f"{shape}.cubin"], cwd=compiled, capture_output=True, text=True, check=True
    )
    stack, shared = (int(re.search(rf"{name}:(\d+)", usage.stdout)[1]) for name in ("STACK", "SHARED"))
    assert stack == 0, f"the kernel spills {stack} bytes of registers: {usage.stdout}"
    assert shared <= 227 * 1024


OLDEST_TRITON = Path(__file__).parents[2] / ".make" / "triton-3.6.0"
"""Where `make test` installs the oldest Triton that pyproject.toml allows."""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted process cannot compile")
@pytest.mark.parametrize("is_oldest", [False, True], ids=["installed", "oldest"])
def test_every_launched_kernel_compiles(tmp_path, is_oldest):
    if is_oldest and not OLDEST_TRITON.is_dir():
        pytest.skip("the oldest Triton is not there; make test installs it")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    if is_oldest:
        environment["PYTHONPATH"] = os.pathsep.join([str(OLDEST_TRITON), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("compile_ops.py")), "1.5B"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    if is_oldest:
        version = OLDEST_TRITON.name.removeprefix("triton-")
        assert f"triton {version}" in done.stdout
        assert f'"triton>={version.removesuffix(".0")}"' in (OLDEST_TRITON.parents[1] / "pyproject.toml").read_text()
    compiled = set(re.findall(r"compiled (\w+)", done.stdout))
    sources = "".join(path.read_text() for path in Path(mage_kernels.__file__).parent.glob("*/triton.py"))
    defined = set(re.findall(r"^def (\w+_kernel)\(", sources, flags=re.MULTILINE))
    assert compiled == defined
    kernels = ("add_linear", "attend", "gate_up", "linear", "project_append")
    assert " ".join(["overlapped", *(f"{name}_kernel" for name in kernels)]) in done.stdout
    assert "read early add_linear_kernel attend_kernel linear_kernel project_append_kernel" in done.stdout
