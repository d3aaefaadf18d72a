"""What training brings back after pruning, and what sparse adapters cost beyond plain ones.

The model is pruned once. Every row starts from it and makes the same steps on the same tokens: no training; plain
LoRA, whose merged weights are masked again; sparse adapters (mask, scale, spp), merged; and all weights, with
`DSACallback`. The last two start from the dense model and train all weights: gradual, which is pruned on the way, in
the first half of the steps; and elsa, whose zeros move until the end, as many in each matrix as the pruned model has.
Learning rates are the defaults of `RecoveryConfig`, or --rate in the rows that train all weights; LoRA's is mask's.
Perplexity is measured on `test`, which nothing else sees, and on 32 windows of `validation`, to choose a rate by.

Little text is learnt by heart: with --sampled so many windows are trained on beside `calibration` that the dense model
has written itself, from the first words of that text.

Cost: steps of each adapter on one batch, taken in turns in one process, whose median is held against plain LoRA's; and
in a process of its own per adapter, the peak memory of training over what was resident before the model was loaded
(model, adapter, optimizer and activations). glibc is told to hand freed memory back at once.

    python recovery.py                                              # the embedded model on the demo's text
    python recovery.py MODEL --tokens tokens.safetensors --steps 300
    python recovery.py MODEL --tokens tokens.safetensors --steps 300 --distillation 0.5     # the dense model teaches
    python recovery.py MODEL --tokens tokens.safetensors --sparsity 0.8 --sampled 896 --rows full elsa --only quality
    python recovery.py MODEL --tokens tokens.safetensors --only cost
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_dsa import (
    MODES,
    DSACallback,
    DSAConfig,
    DSAPruner,
    PruningSchedule,
    RecoveryConfig,
    SparseLoraConfig,
    demo_model,
    demo_texts,
    find_architecture,
    load_tokens,
    perplexity,
)
from optimum_dsa.recovery.elsa.callback import ElsaCallback
from optimum_dsa.recovery.recover import make_trainer


ROWS = ("none", "lora", "mask", "scale", "spp", "full", "gradual", "elsa")
WHOLE = ("full", "gradual", "elsa")  # train all weights
ADAPTERS = ("lora", "mask", "scale", "spp")
MB = 2**20


def load(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in float32 and the tokens of calibration (which is trained on), validation and test."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # memory of its own, not pages of the checkpoint
    parts = ("calibration", "validation", "test")
    if args.tokens:
        tokens = {name: value.long() for name, value in load_file(args.tokens).items() if name in parts}
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokens = {name: load_tokens(demo_texts(name), tokenizer, sequence_length=256) for name in parts}
    tokens["train"] = tokens["calibration"]
    if args.train_on:
        tokens["train"] = torch.cat([tokens["train"], load_file(args.tokens)[args.train_on].long()])
    if args.sampled:
        tokens["train"] = torch.cat([tokens["train"], written(model, tokens["calibration"], args.sampled)])
    return model, {**tokens, "test": tokens["test"][: args.test], "validation": tokens["validation"][:32]}


@torch.no_grad()
def written(model: nn.Module, text: Tensor, count: int, given: int = 4, at_once: int = 64) -> Tensor:
    """`count` windows of the length of `text`, (windows, length), that the model goes on writing."""
    torch.manual_seed(0)
    starts = text[:, : text.shape[1] // given * given].reshape(-1, given)
    starts = starts[torch.randperm(len(starts))[:count]]
    length = text.shape[1] - given
    options = {"do_sample": True, "top_k": 0, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}
    return torch.cat([model.generate(input_ids=part, **options) for part in starts.split(at_once)])


def prune(model: nn.Module, tokens: dict[str, Tensor], args: argparse.Namespace) -> DSAPruner:
    pruner = DSAPruner.from_pretrained(model)
    pruner.prune(tokens["calibration"][: args.samples], pruning(args))
    return pruner


def pruning(args: argparse.Namespace) -> DSAConfig:
    return DSAConfig(args.sparsity, "wanda", "dsa")


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Where each prunable weight is zero."""
    return {weight.name: weight.tensor(model) == 0 for weight in find_architecture(model).weights}


def adapted(model: nn.Module, kind: str, rank: int) -> nn.Module:
    """`model` inside a PEFT model with the same rank everywhere."""
    modules = [weight.module for weight in find_architecture(model).weights]
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": modules, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**options) if kind == "lora" else SparseLoraConfig(mode=kind, **options))


def train(model: nn.Module, tokens: dict[str, Tensor], config: RecoveryConfig, teacher, *callbacks) -> nn.Module:
    """`model` after the steps of `config`."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokens["train"], tokens["validation"], config, teacher, Path(folder))
        for callback in callbacks:
            callback.attach(trainer)
        trainer.train()
    return model


def train_lora(model: nn.Module, tokens: dict[str, Tensor], config: RecoveryConfig, teacher) -> nn.Module:
    """Plain LoRA, merged, and what was zero set to zero again."""
    zero = masks(model)
    merged = train(adapted(model, "lora", config.rank), tokens, config, teacher).merge_and_unload()
    for weight in find_architecture(merged).weights:
        weight.tensor(merged)[zero[weight.name]] = 0
    return merged


def train_gradually(
    model: nn.Module, tokens: dict[str, Tensor], config: RecoveryConfig, teacher, args: argparse.Namespace
) -> nn.Module:
    """The dense model, pruned in the first half of its training."""
    half = config.steps // 2
    schedule = PruningSchedule(end=half, every=max(half // 10, 1), initial=args.sparsity / 2)
    return train(
        model, tokens, config, teacher, DSACallback(pruning(args), tokens["calibration"][: args.samples], schedule)
    )


def quality(args: argparse.Namespace) -> None:
    """Print perplexity and zeros of each row."""
    dense, tokens = load(args)
    start = perplexity(dense, tokens["test"])
    pruner = prune(copy.deepcopy(dense), tokens, args)
    zero = masks(pruner.model)
    lost = perplexity(pruner.model, tokens["test"]) - start
    seen = args.steps * args.batch_size * tokens["train"].shape[1]
    print(f"dense perplexity {start:.2f}; {args.sparsity:.0%} removed with wanda and dsa; {args.steps} steps of")
    print(f"{args.batch_size} windows, {seen:,} tokens of {tokens['train'].numel():,}; rank {args.rank}", end="")
    print(f"; distillation {args.distillation:g}" if args.distillation else "")
    heads = f"{'validation':>11}{'test':>9}{'regained':>10}{'zeros kept':>24}{'new zeros':>11}{'seconds':>9}"
    print(f"{'':<8}{heads}", flush=True)
    for row in args.rows:
        again, before = copy.deepcopy(pruner.model), time.perf_counter()
        whole = {"method": "full"} | ({"learning_rate": args.rate} if args.rate else {})
        kind = whole if row in WHOLE else {"mode": row if row in MODES else "mask", "rank": args.rank}
        config = RecoveryConfig(
            steps=args.steps, batch_size=args.batch_size, eval_steps=args.steps, distillation=args.distillation, **kind
        )
        teacher = dense if args.distillation else None
        if row == "lora":
            again = train_lora(again, tokens, config, teacher)
        elif row == "gradual":
            again = train_gradually(copy.deepcopy(dense), tokens, config, teacher, args)
        elif row == "elsa":
            again = train(copy.deepcopy(dense), tokens, config, teacher, ElsaCallback(pruner.report))
        elif row != "none":
            one = DSAPruner.from_pretrained(again)
            one.report = pruner.report
            one.recover(tokens["train"], config, tokens["validation"], teacher)
            again = one.model
        again.eval()
        value, found = perplexity(again, tokens["test"]), masks(again)
        kept = sum(int((found[name] & mask).sum()) for name, mask in zero.items())
        count, total = (sum(int(mask.sum()) for mask in part.values()) for part in (found, zero))
        if row in ("gradual", "elsa"):  # their zeros are their own: the number alone is held against the others'
            kept = min(count, total)
        regained, chosen = (start + lost - value) / lost, perplexity(again, tokens["validation"])
        print(
            f"{row:<8}{chosen:>11.2f}{value:>9.2f}{regained:>10.0%}{f'{kept:,} / {total:,}':>24}{count - kept:>11,}"
            f"{time.perf_counter() - before:>9.0f}",
            flush=True,
        )


class Steps:
    """Training steps of an adapter, one at a time."""

    def __init__(self, model: nn.Module, kind: str, rank: int):
        self.model = adapted(model, kind, rank).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-3)

    def seconds(self, batch: Tensor) -> float:
        start = time.perf_counter()
        self.model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def peak(args: argparse.Namespace, kind: str) -> int:
    """Bytes at the peak of training with an adapter, beyond what was there before the model."""
    before = status("VmRSS")
    model, tokens = load(args)
    weights = find_architecture(model).weights
    for weight in weights:  # any zeros will do for what is measured here
        weight.tensor(model).mul_(torch.rand(weight.shape) > args.sparsity)
    steps, batch = Steps(model, kind, args.rank), tokens["calibration"][: args.batch_size]
    steps.seconds(batch[:1, :8])  # code is loaded, and the optimizer has its state
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    for _ in range(2):
        steps.seconds(batch)
    return status("VmHWM") - before


def peak_of(kind: str) -> int:
    """`peak` in a fresh process."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *sys.argv[1:], "--case", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def cost(args: argparse.Namespace) -> None:
    """Print the memory and the time of each adapter over plain LoRA's."""
    model, tokens = load(args)
    pruned = prune(model, tokens, args).model
    steps = {kind: Steps(copy.deepcopy(pruned), kind, args.rank) for kind in ADAPTERS}
    batch = tokens["calibration"][: args.batch_size]
    times = {kind: [] for kind in ADAPTERS}
    for number in range(args.repeats + 1):
        for kind, one in steps.items():
            taken = one.seconds(batch)
            if number:  # first calls load code
                times[kind].append(taken)
    print(f"\n{'':<6}{'step':>9}{'over LoRA':>11}{'peak':>11}{'over LoRA':>11}")
    memory = {kind: peak_of(kind) for kind in ADAPTERS}
    for kind in ADAPTERS:
        ratio = statistics.median(one / plain for one, plain in zip(times[kind], times["lora"]))
        print(
            f"{kind:<6}{statistics.median(times[kind]):>7.2f} s{ratio:>11.2f}{memory[kind] / MB:>8.0f} MB"
            f"{memory[kind] / memory['lora']:>11.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default=demo_model(), help="a folder or Hub id (default: the embedded one)"
    )
    parser.add_argument("--tokens", help="safetensors file with calibration, validation and test, (samples, length)")
    parser.add_argument("--train-on", help="another tensor of that file to train on as well")
    parser.add_argument("--sampled", type=int, default=0, help="windows that the dense model writes to be trained on")
    parser.add_argument("--rate", type=float, help="learning rate of the rows that train all weights")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--samples", type=int, default=128, help="windows that pruning is calibrated on")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--distillation", type=float, default=0.0, help="weight of the divergence from the dense model"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--test", type=int, default=128, help="windows of test that perplexity is measured on")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--only", choices=("quality", "cost"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(peak(args, args.case)))
        return
    if args.only != "cost":
        quality(args)
    if args.only != "quality":
        cost(args)


if __name__ == "__main__":
    main()
