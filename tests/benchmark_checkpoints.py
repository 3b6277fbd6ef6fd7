"""Measures how long a checkpoint holds training, synchronous against asynchronous, in one run.

    python tests/benchmark_checkpoints.py [--hidden-size 1536 --layers 14 --saves 4 --folder DIR]

One process, a random Llama of about 0.5 billion parameters (a checkpoint of 6 GB) unless told otherwise; both ways take
turns on the same model. `pause` is the time the training loop waits for a save, `written` the time until the
checkpoint has its final name, `step while writing` how long the steps take meanwhile, against a step with no write.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig  # noqa: E402

import train_llama2 as script  # noqa: E402


def make_model_folder(folder: Path, hidden_size: int, layers: int) -> None:
    LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tests" / "data" / "tiny_llama").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--saves", type=int, default=4, help="of each kind")
    parser.add_argument("--folder", help="where checkpoints are written; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_model_folder(folder / "model", options.hidden_size, options.layers)
        flags = dict(model_name_or_path=str(folder / "model"), random_init=True, save_model_dir=str(folder / "run"))
        config = script.Config(**flags, block_size=64, keep_checkpoints=1, lr=1e-5)
        with script.enable_advanced_parallelization(config) as parallel:
            script.prepare_save_folder(config, parallel)
            model = script.load_model(config, parallel)
            optimizer = script.build_optimizer(model, config)
            state = script.TrainingState.fresh(parallel.device)
            checkpoints = script.Checkpoints(config, parallel, {}, total_steps=1)
            row = torch.arange(3, 67)[None]
            micro_batch = script.with_targets(dict(input_ids=row, attention_mask=torch.ones_like(row), labels=row))
            batch = script.GlobalBatch([micro_batch], tokens=64, label_tokens=63, squared_lengths=64**2)

            def step() -> float:
                began = time.perf_counter()
                script.training_step(model, optimizer, batch, config.lr, state, config, parallel)
                if parallel.device.type == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - began

            step()
            alone = statistics.median(step() for _ in range(4))
            pauses: dict[bool, list[float]] = {False: [], True: []}
            written: dict[bool, list[float]] = {False: [], True: []}
            meanwhile: list[float] = []
            for turn in range(2 * options.saves):
                checkpoints.asynchronous = asynchronous = bool(turn % 2)
                step()
                checkpoints.save(model, optimizer, state)
                pauses[asynchronous].append(checkpoints.pause_seconds)
                while checkpoints.pending is not None and not checkpoints.pending.done():
                    meanwhile.append(step())
                checkpoints.wait()
                written[asynchronous].append(checkpoints.seconds)
            size_gib = checkpoints.checkpoint_bytes / script.GIB
            print(f"checkpoint of {size_gib:.2f} GiB, {options.saves} saves each, medians")
            for asynchronous, kind in ((False, "synchronous"), (True, "asynchronous")):
                pause, total = statistics.median(pauses[asynchronous]), statistics.median(written[asynchronous])
                print(f"{kind:>12}: pause {pause:6.2f} s, written after {total:6.2f} s")
            ratio = statistics.median(pauses[False]) / statistics.median(pauses[True])
            print(
                f"ratio of pauses {ratio:.1f}; step {alone:.2f} s, while writing {statistics.median(meanwhile):.2f} s"
            )


if __name__ == "__main__":
    main()
