"""Perplexity as an `evaluate.Metric`, for a model in memory or a folder; needs no download."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import evaluate
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from ..model.model_class import model_class
from .measure import measure


class Perplexity(evaluate.Metric):
    """[`perplexity`] of a model on texts, in the form of Hugging Face's `evaluate`.

    ```python
    from optimum_dsa import Perplexity

    Perplexity().compute(predictions=texts, model=model, tokenizer=tokenizer, sequence_length=1024)
    # {'perplexity': 29.4, 'standard_error': 0.6, 'windows': 120, 'sequence_length': 1024, 'cut': 'each', 'bos': False}
    ```

    `compute` takes the texts as `predictions`; a `model`, or its folder or Hub id; its `tokenizer`, which a folder
    brings along; `sequence_length`, by default the model's, at most 2048; `batch_size`, by default 8; and `windows`
    and `bos`, as [`measure`] does. Beside the perplexity stands the protocol.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood per predicted token, over windows without overlap.",
            citation="",
            inputs_description="predictions: texts; model: a model, folder or Hub id; tokenizer; sequence_length.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        sequence_length: int | None = None,
        batch_size: int = 8,
        windows: str = "each",
        bos: bool | None = None,
    ) -> dict[str, Any]:
        if not isinstance(model, nn.Module):
            model, tokenizer = _loaded(str(model), tokenizer)
        if tokenizer is None:
            raise ValueError("Perplexity of texts needs the model's tokenizer; pass tokenizer=...")
        options = {"sequence_length": sequence_length, "batch_size": batch_size, "windows": windows, "bos": bos}
        found = measure(model, predictions, tokenizer=tokenizer, **options)
        how = asdict(found.protocol)
        del how["dataset"]
        return {"perplexity": found.perplexity, "standard_error": found.perplexity_error, **how}


def _loaded(path: str, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Model and tokenizer at a path or Hub id, as transformers loads them; compressed checkpoints among them."""
    config = AutoConfig.from_pretrained(path)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer or path))
    return model_class(config, path).from_pretrained(path, config=config).eval(), tokenizer
