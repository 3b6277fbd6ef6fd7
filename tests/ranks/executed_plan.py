"""Prints, of each training step, what the ranks really did, so that a test can compare it with the plan.

One line per step begins with EXECUTED and holds JSON: the rows of each micro-batch, how often each layer's MLP was
called, for each micro-batch whether each layer's weights were whole after the forward pass, and for each micro-batch
whether some gradient was still missing before it.
"""

import json

from torch.distributed.tensor import DTensor

import train_llama2

load, loss_sum, take_step = train_llama2.load_model, train_llama2.token_loss_sum, train_llama2.training_step
calls, rows, gathered, unreduced = [], [], [], []


def load_model(parallel):
    model = load(parallel)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    return model


def token_loss_sum(model, micro_batch, parallel):
    if model.training:
        unreduced.append(any(weight.grad is None for weight in model.parameters()))
    loss = loss_sum(model, micro_batch, parallel)
    if model.training:
        rows.append(len(micro_batch["input_ids"]))
        gathered.append([not isinstance(layer.mlp.up_proj.weight, DTensor) for layer in model.model.layers])
    return loss


def training_step(model, optimizer, batch, lr, state, parallel, stop=None):
    for noted in (calls, rows, gathered, unreduced):
        noted.clear()
    result = take_step(model, optimizer, batch, lr, state, parallel, stop)
    counts = [calls.count(index) for index in range(len(model.model.layers))]
    parallel.say("EXECUTED", json.dumps(dict(rows=rows, calls=counts, gathered=gathered, unreduced=unreduced)))
    return result


train_llama2.load_model, train_llama2.token_loss_sum = load_model, token_loss_sum
train_llama2.training_step = training_step
