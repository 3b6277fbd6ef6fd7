"""Two sharded ranks load model after model: TINY BIG REPORT.json. Rank 0 writes what both found to the report."""

import dataclasses
import json
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from train_llama2 import Config, enable_advanced_parallelization, load_model

tiny, big, report = sys.argv[1:]


def memory_mib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


peaks, loaded = [], threading.Event()


def watch_memory():
    while not loaded.wait(0.001):
        peaks.append(memory_mib("RssAnon"))


def settings(folder=tiny, **flags):
    return Config(model_name_or_path=folder, block_size=64, parallelism="fsdp", **flags)


def local(parameter):
    return parameter.to_local()


facts = {}
with enable_advanced_parallelization(settings()) as parallel:

    def load_with(folder=tiny, **flags):
        return load_model(dataclasses.replace(parallel, config=settings(folder, **flags)))

    model = load_with()  # the first load takes the library's own memory
    facts["dtypes"] = sorted({str(local(p).dtype) for p in model.parameters()})
    facts["held"] = sum(local(p).numel() for p in model.parameters())
    facts["names"] = [type(p).__name__ for p in model.parameters()]
    before = memory_mib("RssAnon")
    watching = threading.Thread(target=watch_memory)
    watching.start()
    big_model = load_with(big)
    loaded.set()
    watching.join()
    facts["added_mib"] = memory_mib("RssAnon") - before
    facts["peak_mib"], facts["watched"] = max(peaks) - before, len(peaks)
    random = load_with(random_init=True)
    facts["random_held"] = sum(local(p).numel() for p in random.parameters())
    facts["random_std"] = [p.full_tensor().std().item() for p in random.parameters() if p.ndim > 1]
    facts["random_norms"] = [p.full_tensor().unique().tolist() for p in random.parameters() if p.ndim == 1]
    weight = random.model.layers[0].mlp.up_proj.weight.full_tensor()
    facts["random_shards_differ"] = not torch.equal(*weight.chunk(2))
    loss = random(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss
    loss.backward()
    facts["random_loss"] = loss.item()
    everyones = [facts] * 2
    dist.all_gather_object(everyones, facts)
    if parallel.is_main:
        Path(report).write_text(json.dumps(everyones))
