"""In the run with seed 7 each rank says that it is of a node of another size. No rank waits before it leaves."""

import json
import os
import sys
from pathlib import Path

import train_llama2

train_llama2.time.sleep = lambda seconds: None
find_cluster, runs = train_llama2.find_cluster, json.loads(Path(sys.argv[1]).read_text())


def of_unequal_nodes():
    if "7" in runs[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]:
        os.environ["LOCAL_WORLD_SIZE"] = str(1 + int(os.environ["RANK"]))
    return find_cluster()


train_llama2.find_cluster = of_unequal_nodes
