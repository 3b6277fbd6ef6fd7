"""Trains run after run in the same ranks: RUNS.json [PROGRAM ...], where RUNS.json holds the flags of each run.

Each PROGRAM is run first. After each run rank 0 prints its exit code, between === and ===.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

import train_llama2

# these two take most of the time of a small run
train_llama2.draw_curves = lambda folder: None
train_llama2.measure_matmul_tflops = lambda *_: 0.05
for program in sys.argv[2:]:
    runpy.run_path(program)
for number, flags in enumerate(json.loads(Path(sys.argv[1]).read_text())):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # addresses of one run are not taken for another's
    AcceleratorState._reset_state(reset_partial_state=True)
    _clear_sharding_prop_cache()  # it would answer with a mesh of an earlier run, whose process groups are gone
    try:
        code = train_llama2.command_line(flags)
    except SystemExit as leaving:
        code = leaving.code
    for stream in (sys.stdout, sys.stderr) if os.environ.get("RANK", "0") == "0" else ():
        print(f"=== {code} ===", file=stream, flush=True)
train_llama2.leave(0)
