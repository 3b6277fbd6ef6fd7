"""Another person's training loop around the hook: MODEL_FOLDER SAVE_FOLDER. Prints its losses after LOSSES."""

import json
import sys

import torch

from train_llama2 import Config, enable_advanced_parallelization, load_model, load_tokenizer, save_model

model_folder, save_folder = sys.argv[1:]
config = Config(
    model_name_or_path=model_folder, save_model_dir=save_folder, batch_size=8, block_size=128, parallelism="fsdp"
)
with enable_advanced_parallelization(config) as parallel:
    model = load_model(parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    documents = torch.randint(1024, (8, 128), generator=torch.Generator().manual_seed(0))[parallel.data_rank :: 2]
    losses = []
    for _ in range(3):
        loss = model(input_ids=documents, labels=documents).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parallel.sum_over_data_ranks(loss.detach()).item() / 2)
    save_model(model, load_tokenizer(parallel), parallel)
    parallel.say("LOSSES", json.dumps(losses))
