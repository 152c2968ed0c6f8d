"""A transformers model built from a config, on a toy text task that this file makes.

    pip install "torchkeep[hf]"
    python examples/text_model.py

The task: is the sentence a praise? "not" turns the next judging word into its opposite, so single words do not tell.
Nothing is downloaded.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

import torchkeep as tk

try:
    from transformers import BertConfig, BertForSequenceClassification
except ImportError:
    sys.exit('this example needs transformers: pip install "torchkeep[hf]"')

GOOD = ("good", "fine", "clever", "moving", "funny")
BAD = ("bad", "dull", "silly", "empty", "slow")
THINGS = ("film", "book", "play", "song", "story")
FILLERS = ("really", "quite", "somehow", "again", "today")
WORDS = ("[PAD]", "the", "was", "not", *GOOD, *BAD, *THINGS, *FILLERS)
NUMBER_OF = {word: number for number, word in enumerate(WORDS)}


def make_sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences with their truth: {"text": "the film was really not dull", "labels": 1}."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        is_good, is_turned = rng.random() < 0.5, rng.random() < 0.5
        words = ["the", rng.choice(THINGS), "was", *rng.sample(FILLERS, rng.randrange(3))]
        words += [*(["not"] if is_turned else []), rng.choice(GOOD if is_good else BAD)]
        words += rng.sample(FILLERS, rng.randrange(3))
        made.append({"text": " ".join(words), "labels": int(is_good != is_turned)})
    return made


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Sentences of several lengths as one batch. Shapes: input_ids and attention_mask (B, T), labels (B,)."""
    rows = [torch.tensor([NUMBER_OF[word] for word in sample["text"].split()]) for sample in samples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != NUMBER_OF["[PAD]"]).long(),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    valid = make_sentences(200, seed=1)
    run = tk.fit(
        BertForSequenceClassification(config),
        make_sentences(1000, seed=0),
        valid,
        collate=collate,
        metrics=["accuracy"],
        epochs=8,
        batch_size=32,
        settings={"train": {"threads": 1}},  # steps this small are faster on one thread
        learning_rate=3e-3,
        schedule="one_cycle",
        run_dir="runs/text-model",
        resume="auto",
    )

    print()
    model = run.model()
    for text in ("the film was good", "the film was really not good", "the book was somehow not dull again"):
        batch = collate([{"text": text, "labels": 0}])
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        print(f"{text:<40} {'praise' if logits.argmax() else 'blame':<7} {logits.softmax(1).max():.2f}")


if __name__ == "__main__":
    main()
