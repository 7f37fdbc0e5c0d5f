"""One process of a group that trains on CPUs as it would on GPUs: accelerate engages FSDP2 and DeepSpeed on GPUs only.

    torchrun --nproc-per-node 2 tests/engine_driver.py train RECIPE --set ...

Everything but accelerate's opinion of the devices is real: its own FSDP2 or DeepSpeed code, gloo, and our trainer.
"""

import os
from importlib import import_module

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from mage_tune.cli import main

begin_process, begin = PartialState.__init__, AcceleratorState.__init__


def as_on_gpus(self, *arguments, **options) -> None:
    begin_process(self, *arguments, **options)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def not_on_a_cpu(self, mixed_precision=None, cpu=False, *arguments, **options) -> None:
    begin(self, mixed_precision, False, *arguments, **options)


if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    PartialState.__init__, AcceleratorState.__init__ = as_on_gpus, not_on_a_cpu

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    # Minutes of compiling for a faster all-reduce on CPUs. (`deepspeed.comm.torch` names another module.)
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None

if __name__ == "__main__":
    main()
