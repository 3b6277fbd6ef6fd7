"""Gives each rank a random state of its own, as after resuming; no result may depend on it.

Says how long the groups of a sharded model's mesh wait, and thereby how many there are, and whether DDP's replicas end
with the same weights.
"""

import torch

import train_llama2

load_model, save_model = train_llama2.load_model, train_llama2.save_model


def load_and_report_groups(parallel):
    torch.manual_seed(parallel.rank)
    model = load_model(parallel)
    if parallel.plan.dp_shard_size > 1:
        mesh = next(model.parameters()).device_mesh
        groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        parallel.say("TIMEOUTS", [backend.options._timeout.total_seconds() for backend in backends])
    return model


def compare_replicas_and_save(model, tokenizer, parallel, source):
    if parallel.plan.strategy == "ddp":
        mine = torch.cat([parameter.detach().flatten().float() for parameter in model.parameters()])
        everyones = [torch.empty_like(mine) for _ in range(parallel.data_parallel_size)]
        torch.distributed.all_gather(everyones, mine)
        parallel.say("REPLICAS EQUAL", all(torch.equal(each, mine) for each in everyones))
    save_model(model, tokenizer, parallel, source)


train_llama2.load_model, train_llama2.save_model = load_and_report_groups, compare_replicas_and_save
