"""`DSAPruner`: the façade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .allocation import Allocation
from .checkpoint import base_model, save_checkpoint
from .configuration import DSAConfig
from .data import Calibration, load_calibration
from .loading import load_model, load_tokenizer
from .pruning import allocate, allocation_needs_inputs, architecture_for, prune, pruning_needs_inputs
from .report import PruningReport


class DSAPruner:
    """A transformers model, its tokenizer, and what can be done to them.

    ```python
    pruner = DSAPruner.from_pretrained("Qwen/Qwen3-0.6B")
    report = pruner.prune("wikitext2", DSAConfig(sparsity=0.6))
    pruner.save_pretrained("qwen3-0.6b-dsa-60")
    ```

    Attributes:
        model (`nn.Module`): pruned in place.
        tokenizer (`Any`): saved with it; needed for calibration text.
        report (`PruningReport`): of the last `prune`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None):
        self.model = model
        self.tokenizer = tokenizer
        self.report: PruningReport | None = None
        self._base = base_model(model)

    @classmethod
    def from_pretrained(
        cls, model_or_path: str | Path | nn.Module, tokenizer: Any = None, **transformers_kwargs
    ) -> DSAPruner:
        """A pruner for a model, or for the checkpoint at a path or Hub id.

        Args:
            model_or_path (`str | Path | nn.Module`): a transformers model, a folder, or a Hub id.
            tokenizer (`Any`, *optional*): a tokenizer or where to load one from; by default the checkpoint's own, if
                it has one.
            transformers_kwargs (`dict`): go to the model's `from_pretrained` (`dtype`, `device_map`, `revision`, ...).
                The class is the one that the checkpoint names.
        """
        if isinstance(model_or_path, nn.Module):
            if transformers_kwargs:
                raise ValueError(f"A loaded model takes no loading options, got {', '.join(transformers_kwargs)}.")
            model, path = model_or_path, None
        else:
            path = str(model_or_path)
            model = load_model(path, **transformers_kwargs)
        return cls(model, load_tokenizer(tokenizer or path, **transformers_kwargs))

    def prune(self, calibration: Any, config: DSAConfig) -> PruningReport:
        """Prune the model in place.

        Args:
            calibration (`Any`): texts, a .txt / .jsonl / .parquet path, a dataset or its name, a LongTensor (samples,
                length), or a mapping of the model's inputs; `None` where method and allocation need no data.
        """
        needed = pruning_needs_inputs(config) or allocation_needs_inputs(config)
        self.report = prune(self.model, self._load(calibration, config, needed), config)
        return self.report

    def allocate(self, calibration: Any, config: DSAConfig) -> Allocation:
        """The allocation that `prune` would use; nothing is changed."""
        return allocate(self.model, self._load(calibration, config, allocation_needs_inputs(config)), config)

    def save_pretrained(self, directory: str | Path, **save_kwargs) -> None:
        """Write an ordinary checkpoint, the tokenizer and `dsa_config.json`; whole or not at all.

        An existing folder is replaced if it is empty or holds a pruned model; anything else is refused.
        """
        if self.report is None:
            raise ValueError("Nothing was pruned yet; call prune() before save_pretrained().")
        save_checkpoint(self.model, self.tokenizer, self.report, self._base, directory, **save_kwargs)

    def _load(self, calibration: Any, config: DSAConfig, needed: bool) -> Calibration | None:
        if calibration is None or not needed:
            return None
        architecture_for(self.model, config)  # a model that cannot be pruned is refused before any text is read
        return load_calibration(
            calibration,
            self.model,
            self.tokenizer,
            config.num_samples,
            config.sequence_length,
            config.seed,
            config.text_column,
            config.split,
        )
