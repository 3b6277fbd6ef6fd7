"""Prints, after MIB, what the loss of 4,096 tokens over 32,000 pieces adds to the peak: ours, and then stock."""

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from train_llama2 import head_loss_sum, peak_memory_gib


def peak():
    return peak_memory_gib(torch.device("cpu")) * 1024


hidden = torch.randn(1, 4096, 64, requires_grad=True)
weight = torch.randn(32000, 64, requires_grad=True)
labels = torch.randint(0, 32000, (1, 4096))
head_loss_sum(hidden[0, :64], weight, labels[0, :64]).backward()
start = peak()
head_loss_sum(hidden[0], weight, labels[0]).backward()
ours = peak()
ForCausalLMLoss(torch.nn.functional.linear(hidden, weight), labels, 32000).backward()
print("MIB", ours - start, peak() - start)
