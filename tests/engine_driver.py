"""Launches runs on several CPU processes as they would be launched on GPUs: python engine_driver.py < LAUNCHES.

LAUNCHES is JSON: for every launch the arguments of `accelerate launch`, the script and its own among them. Prints one
JSON object a launch: {"code", "out"}, how it ended and what its processes said.

accelerate engages FSDP2 and DeepSpeed on GPUs only, so it is told that it has some. All else is real: its launcher with
our config, its FSDP2 or DeepSpeed code, gloo, and our trainer. But where the launcher hands over to torchrun, which
starts processes that import torch for longer than they train, this process, which has imported it, forks.
`tests/evals/test_suites.py` launches two processes through torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from argparse import Namespace
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

import torch
import torch.distributed.run as torchrun
from accelerate.commands import launch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import mage_tune.run  # noqa: F401
from mage_tune.cli import main

begin_process, begin = PartialState.__init__, AcceleratorState.__init__


def as_on_gpus(self, *arguments, **options) -> None:
    begin_process(self, *arguments, **options)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def not_on_a_cpu(self, mixed_precision=None, cpu=False, *arguments, **options) -> None:
    begin(self, mixed_precision, False, *arguments, **options)


def run_rank(rank: int, processes: int, port: int, arguments: list[str]) -> NoReturn:
    """What one of torchrun's processes does, its environment included."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The first call in a fork makes torch's thread pool anew, which autograd's threads must not do at once: one that
    # finds none ends the run, "Invalid thread pool!" (`leak_corrupted_threadpool` in torch's caffe2/utils/threadpool).
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        PartialState.__init__, AcceleratorState.__init__ = as_on_gpus, not_on_a_cpu
    code: object = 1
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run_forks(arguments: Namespace) -> None:
    """In place of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, children = int(arguments.nproc_per_node), set()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            run_rank(rank, processes, port, arguments.training_script_args)
        children.add(child)
    codes = []
    while children:
        child, status = os.wait()
        children.remove(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
    if any(codes):
        raise SystemExit(next(code for code in codes if code))


def run_launch(arguments: list[str]) -> dict[str, object]:
    """One launch in a fork, so that nothing of it is left for the next."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code: object = 1
            try:
                torchrun.run = run_forks
                launch.launch_command(launch.launch_command_parser().parse_args(arguments))
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except Exception:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(abs(code) if isinstance(code, int) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return {"code": code, "out": said.read().decode(errors="replace")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if find_spec("deepspeed"):
        # Minutes of compiling for a faster all-reduce on CPUs. (`deepspeed.comm.torch` names another module.)
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    for wanted in json.load(sys.stdin):
        print(json.dumps(run_launch(wanted)), flush=True)
