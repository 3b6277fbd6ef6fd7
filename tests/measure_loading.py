"""Measures the memory that loading takes per rank: python tests/measure_loading.py [--processes 1 2 4]

Makes a random Llama of about 1 GB in fp32 (stored in fp16, like Llama-2's own checkpoint), loads it through the
script's own hook and `load_model` on 1, 2 and 4 ranks, and prints for each the largest rank's resident memory: what
loading added in anonymous pages, and the peak with the mapped pages of the weight file counted too. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MIB = 2**20


def memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def worker(folder: str) -> None:
    """One rank: loads, and prints what that added, as JSON on rank 0."""
    import torch.distributed as dist

    import train_llama2

    config = train_llama2.Config(
        model_name_or_path=folder, block_size=64, parallelism="fsdp" if int(os.environ["WORLD_SIZE"]) > 1 else "none"
    )
    with train_llama2.enable_advanced_parallelization(config) as parallel:
        before = memory_mib("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        resident = memory_mib("VmRSS")
        model = train_llama2.load_model(config, parallel)
        mine = {
            "added_mib": memory_mib("RssAnon") - before,
            "peak_mib": memory_mib("VmHWM") - resident,
            "held_mib": sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in model.parameters()) / MIB,
        }
        ranks = [mine] * parallel.accelerator.num_processes
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_gather_object(ranks, mine)
        parallel.say("RESULT" + json.dumps({name: max(rank[name] for rank in ranks) for name in mine}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        shape = LlamaConfig(
            hidden_size=options.hidden_size,
            intermediate_size=options.hidden_size * 11 // 4,
            num_hidden_layers=options.layers,
            num_attention_heads=16,
            vocab_size=32_000,
        )
        model = LlamaForCausalLM(shape)
        whole_mib = sum(parameter.numel() for parameter in model.parameters()) * 4 / MIB
        model.to(torch.float16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "tests" / "data" / "tiny_llama").save_pretrained(folder)
        del model
        print(f"model of {whole_mib:,.0f} MiB in fp32; MiB of the largest rank")
        print(f"{'ranks':>5}  {'parameters held':>15}  {'memory added':>12}  {'peak while loading':>18}")
        for processes in options.processes:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            output = subprocess.run(
                [*command, __file__, "--worker", folder],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            result = json.loads(next(line[6:] for line in output.splitlines() if line.startswith("RESULT")))
            held, added, peak = result["held_mib"], result["added_mib"], result["peak_mib"]
            print(f"{processes:>5}  {held:>15,.0f}  {added:>12,.0f}  {peak:>18,.0f}")


if __name__ == "__main__":
    main()
