"""Takes four steps under DDP and under FSDP; in the second, one rank alone has a loss that is not a number.

Prints, after RESULT, the strategy, the losses and how many steps each rank has skipped.
"""

import dataclasses
import json
import sys

import numpy as np
import torch

import train_llama2 as script

config = script.parse_config(sys.argv[1:])
healthy = script.token_loss_sum
with script.enable_advanced_parallelization(config) as world:
    documents, *_ = script.load_data(script.load_tokenizer(world), world)
    for strategy in ("ddp", "fsdp"):
        config = dataclasses.replace(config, parallelism=strategy)
        plan = script.choose_plan(world.shape, world.cluster, config).chosen.plan
        parallel = dataclasses.replace(world, config=config, plan=plan)
        model = script.load_model(parallel)
        optimizer = script.build_optimizer(model, config)
        state = script.TrainingState.fresh(parallel.device)
        losses = []
        for step in range(4):
            batch = script.global_batch(documents, np.arange(len(documents)), parallel)
            bad = float("nan") if step == 1 and parallel.rank == 1 else 1.0
            script.token_loss_sum = lambda *arguments, bad=bad: healthy(*arguments) * bad
            result = script.training_step(model, optimizer, batch, config.lr, state, parallel)
            losses.append(result.loss.item())
        skipped = [torch.zeros(()) for _ in range(2)]
        torch.distributed.all_gather(skipped, state.skipped)
        parallel.say("RESULT", json.dumps([strategy, losses, [int(count) for count in skipped]]))
