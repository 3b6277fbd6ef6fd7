"""Runs a program on a stand-in for MoAI: EVENTS.json PROGRAM [FLAG ...]. torch.moreh notes when its hook is called."""

import json
import runpy
import sys
import types
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

events, build = [], LlamaForCausalLM.__init__


def noted_build(self, *arguments, **keywords):
    events.append("model built")
    build(self, *arguments, **keywords)


LlamaForCausalLM.__init__ = noted_build
option = types.SimpleNamespace(enable_advanced_parallelization=lambda: events.append("hook called"))
torch.moreh = types.SimpleNamespace(option=option)
report, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    Path(report).write_text(json.dumps(events))
