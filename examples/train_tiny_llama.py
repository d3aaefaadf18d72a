"""Train the demo model of `examples/tiny-llama` on the text of the Python standard library.

    python examples/train_tiny_llama.py --output tiny-llama

Writes the tokenizer, the bfloat16 model and `training.json` (held-out modules, recipe, perplexities). The text is what
every CPython carries: the `.py` files of its standard library and the language reference of `pydoc_data/topics.py`.
Neither the model nor the tokenizer is trained on the modules of `HELD_OUT`.
"""

import argparse
import ast
import itertools
import json
import math
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward


HELD_OUT = {
    "calibration": "argparse.py http/client.py heapq.py textwrap.py json/decoder.py json/encoder.py csv.py random.py",
    "validation": "configparser.py fractions.py socketserver.py html/parser.py sched.py",
    "test": "tarfile.py statistics.py urllib/parse.py email/message.py smtplib.py pprint.py fileinput.py bisect.py",
}
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "entities.py", "topics.py"}
WINDOW, END_OF_TEXT = 256, "<|endoftext|>"
DESCRIPTION = (
    "CPython's standard library: all .py files except test folders, encodings, html/entities.py, build data and the "
    "held-out modules, plus the texts of pydoc_data/topics.py. To measure a held-out list: encode each module, append "
    f"{END_OF_TEXT}, join the modules in the order given, cut into non-overlapping windows, drop the rest; perplexity "
    "is exp of the mean negative log-likelihood of all predicted tokens."
)
RECIPE = {
    "sequence_length": WINDOW,
    "optimizer": "Muon (weight decay 0.1) for the matrices of the blocks, AdamW (0.9, 0.95) for the rest, clipping 1",
    "schedule": "linear warm-up over 3 %, constant, linear decay to 0 over the last 60 % of steps or minutes",
    "precision": "float32 weights, bfloat16 autocast with attention in float32, stored in bfloat16",
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}


def parse_arguments():
    parser = argparse.ArgumentParser(description="Train the demo model on the standard library.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--checkpoint", type=Path, help="file to keep the training state in and resume from")
    for name, default in {"steps": 2400, "batch": 16, "seed": 0, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--minutes", type=float, default=1440, help="wall limit; the schedule is squeezed to fit")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    return parser.parse_args()


def read_training_texts(library):
    """Returns a list of strings: every source file that may be trained on and every topic of the reference."""
    held_out = " ".join(HELD_OUT.values()).split()
    texts = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if not EXCLUDED & set(name.split("/")) and name not in held_out and not name.startswith("_sysconfigdata"):
            texts.append(path.read_text("utf-8"))
    topics = ast.parse((library / "pydoc_data/topics.py").read_text("utf-8")).body[-1].value
    return texts + list(ast.literal_eval(topics).values())


def train_tokenizer(texts, vocabulary=2048):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": [END_OF_TEXT], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **options))
    return tokenizer


def encode_texts(tokenizer, texts):
    """Returns a list of 1-dimensional tensors, one per text, each closed by the end-of-text token."""
    return [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch([text + END_OF_TEXT for text in texts])]


def attend_in_float(module, query, key, value, *arguments, **options):
    """Attention in float32 under autocast too, faster on CPUs. Query, key and value: (batch, heads, length, size)."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *arguments, **options)


def build_model(vocabulary):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    AttentionInterface.register("float", attend_in_float)
    model = LlamaForCausalLM._from_config(config, attn_implementation="float")
    for name, weight in model.model.layers.named_parameters():
        if weight.dim() == 2:
            branches = 2 * config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            torch.nn.init.normal_(weight, std=0.6 / math.sqrt(branches * weight.shape[1]))
    return model


def yield_batches(documents, batch, seed):
    """Yields (batch, WINDOW + 1) tensors without end; every epoch joins the documents in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.cat([documents[i] for i in torch.randperm(len(documents), generator=generator).tolist()])
        rows = tokens.unfold(0, WINDOW + 1, WINDOW + 1)
        order = torch.randperm(len(rows), generator=generator)[: len(rows) // batch * batch]
        yield from rows[order].split(batch)


def scale_rate(progress, warmup=0.03, decay=0.6):
    """Returns the factor of the learning rate: linear warm-up, constant, then linear decay to 0 at progress 1."""
    return min(1.0, (progress + 1e-3) / warmup, (1 - progress) / decay)


def compute_loss(model, rows):
    """Mean loss of next-token prediction over rows (batch, length)."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def train(model, documents, arguments):
    """Trains the model in place and returns a dict of what was done."""
    matrices = [weight for name, weight in model.named_parameters() if "_proj" in name]
    others = [weight for name, weight in model.named_parameters() if "_proj" not in name]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    parts, losses, spent = [model, muon, adamw], [], 0.0
    if arguments.checkpoint and arguments.checkpoint.exists():
        states, losses, spent = torch.load(arguments.checkpoint)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
    done, started = len(losses), time.monotonic() - spent
    batches = itertools.islice(yield_batches(documents, arguments.batch, arguments.seed), done, None)
    bar = tqdm(batches, total=arguments.steps, initial=done, mininterval=10)
    for step, rows in enumerate(bar, done):
        progress = max(step / arguments.steps, (time.monotonic() - started) / 60 / arguments.minutes)
        if progress >= 1:
            break
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = arguments.learning_rate * scale_rate(progress)
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
        mean_loss, spent = statistics.mean(losses[-100:]), time.monotonic() - started
        bar.set_postfix(loss=mean_loss, refresh=False)
        if arguments.checkpoint and step % 200 == 199:
            torch.save(([part.state_dict() for part in parts], losses, spent), arguments.checkpoint)
    return {
        "planned_steps": arguments.steps,
        "steps": len(losses),
        "wall_seconds": round(spent),
        "tokens_seen": len(losses) * arguments.batch * WINDOW,
        "final_training_loss": round(mean_loss, 4),
    }


@torch.no_grad()
def measure_perplexity(model, documents):
    rows = torch.cat(documents).unfold(0, WINDOW, WINDOW)
    return math.exp(statistics.mean(compute_loss(model, row[None]).item() for row in rows))


def save_tokenizer(tokenizer, folder):
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=512, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # where the class becomes the one that every transformers version knows
    path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    library = Path(os.__file__).parent
    texts = read_training_texts(library)
    tokenizer = train_tokenizer(texts)
    documents = {"training": encode_texts(tokenizer, texts)}
    for part, names in HELD_OUT.items():
        documents[part] = encode_texts(tokenizer, [(library / name).read_text("utf-8") for name in names.split()])
    model = build_model(tokenizer.get_vocab_size())
    kept = ("minutes", "batch", "learning_rate", "seed", "threads")
    recipe = {name: vars(arguments)[name] for name in kept} | train(model, documents["training"], arguments) | RECIPE
    save_tokenizer(tokenizer, arguments.output)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    saved = LlamaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    perplexity = {part: round(measure_perplexity(saved, documents[part]), 4) for part in ("validation", "test")}
    record = {
        "text": DESCRIPTION,
        "held_out": {part: names.split() for part, names in HELD_OUT.items()},
        "tokens": {part: sum(map(len, documents[part])) for part in documents},
        "parameters": saved.num_parameters(),
        "perplexity": perplexity,
        "recipe": recipe,
    }
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"perplexity {perplexity}, training {recipe}")


if __name__ == "__main__":
    main()
