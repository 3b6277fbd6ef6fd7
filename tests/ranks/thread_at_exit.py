"""Runs SCRIPT [FLAG ...] with a thread in torch that asks for the GIL while Python ends, as gloo's do at times."""

import atexit
import runpy
import sys
import threading

import torch


def multiply():
    matrix = torch.ones(256, 256)
    while True:
        torch.mm(matrix, matrix)  # without the GIL, which it takes again at its end


def begin():
    print("atexit", flush=True)
    threading.Thread(target=multiply, daemon=True).start()


atexit.register(begin)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
