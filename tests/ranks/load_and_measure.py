"""Loads a model through the hook, and prints after RESULT what that took on the largest rank: MODEL_FOLDER."""

import json
import os
import sys
from pathlib import Path

import train_llama2
from train_llama2 import Config, enable_advanced_parallelization, load_model, local_part

MIB = 2**20


def memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


parallelism = "fsdp" if int(os.environ["WORLD_SIZE"]) > 1 else "none"
config = Config(model_name_or_path=sys.argv[1], block_size=64, parallelism=parallelism)
with enable_advanced_parallelization(config) as parallel:
    before = memory_mib("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    resident = memory_mib("VmRSS")
    model = load_model(parallel)
    mine = {
        "added_mib": memory_mib("RssAnon") - before,
        "peak_mib": memory_mib("VmHWM") - resident,
        "held_mib": sum(local_part(parameter).nbytes for parameter in model.parameters()) / MIB,
    }
    ranks = train_llama2.on_all_ranks(lambda: mine, gathered=True)
    parallel.say("RESULT" + json.dumps({name: max(rank[name] for rank in ranks) for name in mine}))
