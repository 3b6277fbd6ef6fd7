"""Lets each run print what each rank's stage holds, and makes one gradient infinite in a run whose folder is `skipped`.

At the end it prints the sum of each norm's weights on every rank, on a line that begins with NORMS.

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


def save_model(model, tokenizer, parallel, *more):
    norms = [train_llama2.local_part(each).tolist() for name, each in model.named_parameters() if "norm" in name]
    of_ranks = train_llama2.on_all_ranks(lambda: [float(sum(norm)) for norm in norms], gathered=True)
    parallel.say("NORMS", json.dumps(of_ranks))
    return save(model, tokenizer, parallel, *more)


save = train_llama2.save_model
train_llama2.load_model, train_llama2.clip_gradients, train_llama2.save_model = load_model, clip_gradients, save_model
