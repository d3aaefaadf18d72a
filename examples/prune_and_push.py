"""Prune a model, measure it on text that pruning has not seen, and push it to the Hub with a model card.

    python examples/prune_and_push.py Qwen/Qwen3-0.6B you/qwen3-0.6b-60 --calibration train.txt --test test.txt

The folder stays, whole, whatever the network does; the same line again pushes what it holds.
"""

import argparse
from pathlib import Path

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, push_folder, save_results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of the dense model")
    parser.add_argument("repository", help="Hub id to push to")
    parser.add_argument("--calibration", required=True, help=".txt, .jsonl or .parquet file, or a dataset's name")
    parser.add_argument("--test", required=True, help="another text, for the perplexity in the card")
    parser.add_argument("-o", "--output", type=Path, default=Path("pruned"))
    parser.add_argument("-s", "--sparsity", type=float, default=0.6)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--private", action="store_true", default=None)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not (args.output / "evaluation.json").is_file():
        pruner = DSAPruner.from_pretrained(args.model)
        config = DSAConfig(args.sparsity, data=DataConfig(num_samples=args.samples, sequence_length=args.length))
        print(pruner.prune(args.calibration, config))
        pruner.save_pretrained(args.output)
        measured = pruner.measure(args.test, sequence_length=args.length, name=args.output.name)
        save_results(args.output / "evaluation.json", [measured])
    print(f"pushed to {push_folder(args.output, args.repository, private=args.private)}")


if __name__ == "__main__":
    main()
