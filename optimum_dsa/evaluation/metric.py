"""Perplexity as an `evaluate.Metric`, for a model in memory or a folder; needs no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import evaluate
from torch import nn

from ..checkpoint.load import load_model, load_tokenizer
from ..data import default_length, load_tokens
from .perplexity import perplexity_with_error


class Perplexity(evaluate.Metric):
    """[`perplexity`] of a model on texts, in the form of Hugging Face's `evaluate`.

    ```python
    from optimum_dsa import Perplexity

    Perplexity().compute(predictions=texts, model=model, tokenizer=tokenizer, sequence_length=1024)
    # {'perplexity': 29.4, 'standard_error': 0.6, 'windows': 120, 'sequence_length': 1024}
    ```

    `compute` takes the texts as `predictions`; a `model`, or its folder or Hub id; its `tokenizer`, which a folder
    brings along; `sequence_length`, by default the model's, at most 2048; and `batch_size`, by default 8.
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
    ) -> dict[str, Any]:
        if not isinstance(model, nn.Module):
            model, tokenizer = load_model(str(model)), load_tokenizer(tokenizer or str(model))
        if tokenizer is None:
            raise ValueError("Perplexity of texts needs the model's tokenizer; pass tokenizer=...")
        length = sequence_length or default_length(model)
        tokens = load_tokens(predictions, tokenizer, sequence_length=length)
        value, error = perplexity_with_error(model, tokens, batch_size)
        return {"perplexity": value, "standard_error": error, "windows": len(tokens), "sequence_length": length}
