"""Prints the peak memory of this process in GiB, before and after it has written to a quarter of a GiB."""

import numpy
import torch

from train_llama2 import peak_memory_gib

cpu = torch.device("cpu")
before = peak_memory_gib(cpu)
numpy.ones(2**28, "uint8")
print("GIB", before, peak_memory_gib(cpu))
