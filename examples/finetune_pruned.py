"""Fine-tune with transformers' Trainer and keep every zero, or prune while training.

    python examples/finetune_pruned.py PRUNED -o out --text train.txt --steps 300
    python examples/finetune_pruned.py DENSE -o out --text train.txt --steps 300 --sparsity 0.7
    torchrun --nproc_per_node 2 examples/finetune_pruned.py PRUNED -o out --text train.txt

With --sparsity, pruning starts at once and ends after two thirds of the steps; the text is its calibration too.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from optimum_dsa import DSACallback, DSAConfig, PruningSchedule, load_tokens, use_cpu


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--text", required=True, help=".txt, .jsonl or .parquet file, or a dataset's name")
    parser.add_argument("--sparsity", type=float, help="prune to this while training")
    parser.add_argument("--allocation", default="dsa")
    parser.add_argument("--samples", type=int, default=128, help="windows that pruning is calibrated on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


def callback_for(args: argparse.Namespace, tokens: torch.Tensor) -> DSACallback:
    """One that holds the model's zeros, or that makes them."""
    if args.sparsity is None:
        return DSACallback()
    schedule = PruningSchedule(end=args.steps * 2 // 3, every=max(args.steps // 15, 1))
    return DSACallback(DSAConfig(args.sparsity, allocation=args.allocation), tokens[: args.samples], schedule)


def main() -> None:
    args = parse_arguments()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = load_tokens(args.text, tokenizer, sequence_length=args.length)
    training = TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=args.steps // 10,
        lr_scheduler_type="cosine",
        logging_steps=max(args.steps // 20, 1),
        save_strategy="no",
        use_cpu=use_cpu(),
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    # windows of equal length: nothing to pad
    trainer = Trainer(model, training, default_data_collator, rows, processing_class=tokenizer)
    callback = callback_for(args, tokens).attach(trainer)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        callback.write(model, args.output, args.steps)


if __name__ == "__main__":
    main()
