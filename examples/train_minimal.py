"""A small MAG, trained by a loop of one's own: plain PyTorch, consecutive segments, the memory carried along.

    python examples/train_minimal.py [STEPS]

Every row of a batch reads one document, segment after segment. The memory a row has at the end of a step is
its memory at the beginning of the next; only the gradient stops there. A row that comes to another document
starts afresh.
"""

from __future__ import annotations

import math
import sys

import torch
from torch.utils.data import DataLoader

from titans import TitansConfig, TitansForCausalLM
from titans.data import CarryDataset, byte_tokenizer, encode_document, hold_out, load_corpus
from titans.evaluate import bits_per_byte
from titans.state import map_state

BATCH_ROWS, SEQUENCE_LENGTH, PEAK_LEARNING_RATE = 8, 128, 3e-3
EVALUATED_BYTES = 4096


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return PEAK_LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * progress))


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    train, held_out = (
        [encode_document(tokenizer, document.data, document.name) for document in documents]
        for documents in hold_out(load_corpus("excerpt"))
    )
    dataset = CarryDataset(train, SEQUENCE_LENGTH, BATCH_ROWS)
    loader = DataLoader(dataset, batch_size=BATCH_ROWS)  # in order: the rows go on from step to step

    config = TitansConfig.from_preset(
        "tiny", variant="mag", num_hidden_layers=2, hidden_size=64, intermediate_size=176, head_dim=32
    )
    model = TitansForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)

    def evaluate() -> float:
        documents = [(ids[:EVALUATED_BYTES], len(ids[:EVALUATED_BYTES])) for ids in held_out]
        return bits_per_byte(model, documents).bits_per_byte

    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; held out {evaluate():.3f} bits/byte")
    step, epoch = 0, 0
    while step < steps:
        dataset.set_epoch(epoch)
        states = None
        for batch in loader:
            # A batch is what the model takes: input_ids, attention_mask, labels, and restart.
            output = model(**batch, memory_states=states, return_memory_states=True)
            loss = output.loss
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            # The values go on, the graph does not.
            states = map_state(torch.Tensor.detach, output.memory_states)

            step += 1
            if step % 10 == 0 or step == steps:
                print(f"step {step}: loss {loss.item():.3f} nats, {loss.item() / math.log(2):.3f} bits/byte")
            if step == steps:
                break
        epoch += 1
    print(f"held out {evaluate():.3f} bits/byte")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
