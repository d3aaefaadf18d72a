"""An allocation on the Hub without a model: a JSON file, and a card that says how to use it."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..pruning.allocation import ALLOCATION_FILE, Allocation
from ..pruning.allocation.layout import by_block
from ..pruning.configuration import CONFIG_NAME


def allocation_alone(source: str | Path) -> Allocation | None:
    """The allocation in a JSON file, or in the folder of a search; `None` for the folder of a model."""
    path = Path(source)
    if path.is_file() and path.suffix == ".json":
        return Allocation.load(path)
    if (path / ALLOCATION_FILE).is_file() and not (path / CONFIG_NAME).is_file():
        return Allocation.load(path / ALLOCATION_FILE)
    return None


def files_of(allocation: Allocation, repo_id: str) -> dict[str, bytes]:
    """Name in the repository -> content: the allocation, and its card."""
    content = json.dumps(allocation.to_dict(), indent=2) + "\n"
    return {ALLOCATION_FILE: content.encode(), "README.md": str(_card(allocation, repo_id)).encode()}


def _card(allocation: Allocation, repo_id: str) -> ModelCard:
    known = any(allocation.sizes.values())
    shares = by_block(allocation)
    mean = allocation.overall if known else sum(shares.values()) / max(len(shares), 1)
    units = f"{len(allocation.sparsity)} units of {sum(allocation.sizes.values()):,} weights" if known else "units"
    lines = [
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"How much to prune where: an allocation of [optimum-dsa](https://pypi.org/project/optimum-dsa/) for {units}, "
        f"{mean:.4f} of which are removed. No weights are in this repository.",
        "",
        "```bash",
        f"optimum-cli dsa prune MODEL -o out --sparsity {mean:.4f} --allocation {repo_id}",
        "```",
        "",
        "| block | removed |",
        "|---|---|",
        *(f"| {block} | {share:.2%} |" for block, share in shares.items()),
        "",
    ]
    data = ModelCardData(library_name="optimum-dsa", tags=["pruning", "sparsity", "allocation"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))
