"""Run a script, named first, as accelerate would run it on GPUs: it takes up FSDP only where it finds an accelerator.

accelerate launch --config_file recipes/configs/fsdp2.yaml tests/distributed/fsdp_on_cpu.py recipes/finetune.py …
"""

import os
import runpy
import sys
from pathlib import Path


def pretend():
    """Let accelerate take the processes on this CPU for ones with a GPU each."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def begin_as_on_gpus(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    if begin.__name__ != begin_as_on_gpus.__name__:
        PartialState.__init__ = begin_as_on_gpus


if __name__ == "__main__":
    pretend()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
