"""Lets each run print what each rank's stage holds, and makes one gradient infinite in a run whose folder is `skipped`.

A line of rank 0 begins with STAGES and holds JSON: the names of each rank's parameters. The infinite gradient is that
of the embedding, which the first stage alone holds, in the third step.
"""

import json

import train_llama2

load, clip, taken = train_llama2.load_model, train_llama2.clip_gradients, []


def load_model(parallel):
    taken.clear()
    model = load(parallel)
    names = train_llama2.on_all_ranks(lambda: [name for name, _ in model.named_parameters()], gathered=True)
    parallel.say("STAGES", json.dumps(names))
    return model


def clip_gradients(model, parallel):
    taken.append(model)
    if len(taken) == 3 and parallel.config.save_model_dir.endswith("skipped"):
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.grad.fill_(float("inf"))
    return clip(model, parallel)


train_llama2.load_model, train_llama2.clip_gradients = load_model, clip_gradients
