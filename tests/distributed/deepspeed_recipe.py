"""Run a script but for the operator that DeepSpeed would compile first: this file, the script, its arguments."""

import runpy
import sys
from pathlib import Path

from tests.distributed.deepspeed_worker import no_compiler

no_compiler()
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
