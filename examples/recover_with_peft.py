"""Recover a pruned model with a sparse adapter, and merge it without losing a zero.

    python examples/recover_with_peft.py PRUNED -o out --text train.txt --steps 300
    python examples/recover_with_peft.py PRUNED -o out --text train.txt --mode spp --keep-adapter

Ranks follow the allocation in the model's dsa_config.json: more where more was pruned.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from optimum_dsa import Allocation, SparseLoraConfig, load_tokens, use_cpu


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pruned model")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--text", required=True, help=".txt, .jsonl or .parquet file, or a dataset's name")
    parser.add_argument("--mode", default="mask", help="mask, scale or spp")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--keep-adapter", action="store_true", help="save the adapter instead of a merged model")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = load_tokens(args.text, tokenizer, sequence_length=args.length)
    config = SparseLoraConfig.for_allocation(
        Allocation.load(args.model),
        r=args.rank,
        lora_alpha=2 * args.rank,
        mode=args.mode,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
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
    Trainer(model, training, train_dataset=rows).train()
    if not args.keep_adapter:
        model = model.merge_and_unload(safe_merge=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
