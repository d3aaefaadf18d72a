"""`DSAPruner`: the façade."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint.base_files import BaseFiles
from .checkpoint.beside import find_beside
from .checkpoint.description import Description, after
from .checkpoint.opened import open_checkpoint
from .checkpoint.origin import base_of, described_report, known_of, report_of, training_of
from .checkpoint.packing import make_ready, pack, unpack
from .checkpoint.save import asked_encoding, base_model, save_checkpoint, writes_adapters
from .checkpoint.smaller import check_run, report_of_cut
from .checkpoint.verify import Verification, verify
from .common.escaping import one_line
from .common.output import OutputFolder
from .model.adapters import has_adapters, inner_model, plain_name, without_adapters
from .model.walk import walk_blocks
from .packed.pack_model import LEAST_ZEROS, Packing, seen_dense
from .pruning.allocate import allocate, architecture_for, check_dense
from .pruning.allocation import Allocation
from .pruning.calibration import Calibration, load_calibration
from .pruning.configuration import DSAConfig
from .pruning.prune import prune_with_others
from .pruning.report import PruningReport
from .pruning.structured.configuration import DSAStructuredConfig
from .pruning.structured.prune import StructuredReport, prune_structures
from .pruning.zeros import counted, recounted


if TYPE_CHECKING:
    from .evaluation.measurement import Measurement
    from .recovery.adapters.merge import Merged
    from .recovery.configuration import RecoveryConfig
    from .recovery.result import RecoveryResult
    from .search.result import SearchResult
    from .search.sensitivity import Sensitivity


logger = logging.getLogger(__name__)


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
        report (`PruningReport`): of the last `prune`, or of the one that made a loaded model; `None` before.
        recovery (`RecoveryResult`): of the last `recover`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None):
        self.model = model
        self.tokenizer = tokenizer
        self.report: PruningReport | None = None
        self.recovery: RecoveryResult | None = None
        self._training: dict[str, Any] | None = None  # what trained it, here or before it was loaded
        self._base = base_model(model)
        self._restored: PruningReport | None = None  # of a loaded model, whose weights may have been changed since
        self._stored: str | None = None  # where the weights are, zeros included, as they are here
        self._description: Description | None = None  # and the file that it is from
        self._under_adapters = False  # pruned while it had adapters, and so nowhere without them
        self._options: dict[str, Any] = {}  # with which it was loaded
        self._beside: BaseFiles | None = None  # what its class does not write, once it was looked for

    @classmethod
    def from_pretrained(
        cls, model_or_path: str | Path | nn.Module, tokenizer: Any = None, **transformers_kwargs
    ) -> DSAPruner:
        """A pruner for a model, or for the checkpoint at a path or Hub id.

        Of a pruned model, dense or compressed, it has the report that was saved with it: config and allocation are
        `report.config` and `report.allocation`, the masks come from `masks()`, and `verify()` tells whether they hold.

        Args:
            model_or_path (`str | Path | nn.Module`): a transformers model, a folder, or a Hub id.
            tokenizer (`Any`, *optional*): a tokenizer or where to load one from; by default the checkpoint's own, if
                it has one.
            transformers_kwargs (`dict`): go to the model's `from_pretrained` (`dtype`, `device_map`, `revision`, ...).
                The class is the one that the checkpoint names.
        """
        found = open_checkpoint(model_or_path, tokenizer, **transformers_kwargs)
        pruner = cls(found.model, found.tokenizer)
        pruner.report = pruner._restored = found.report
        pruner._description, pruner._base, pruner._stored = found.description, found.base, found.stored
        pruner._options, pruner._training = found.options, (found.description or {}).get("recovery")
        return pruner

    def prune(
        self,
        calibration: Any,
        config: DSAConfig | DSAStructuredConfig,
        checkpoints: str | Path | None = None,
        resume: bool = False,
    ) -> PruningReport | StructuredReport:
        """Prune the model in place: weights become zero, or with a `DSAStructuredConfig` structures are cut out.

        Both compose: cut structures first, and prune the weights of what is left then.

        Args:
            calibration (`Any`): texts, a .txt / .jsonl / .parquet path, a dataset or its name, a LongTensor (samples,
                length), or a mapping of the model's inputs; `None` where method and allocation need no data.
            config (`DSAConfig` or `DSAStructuredConfig`): of a `DSAConfig` with `allocation="auto"`, every row of
                `ALLOCATIONS` that one walk measures is tried for real before, on windows that do not calibrate.
                The report says what was compared.
            checkpoints (`str`, *optional*): folder for the blocks that are finished, from which a run goes on that was
                interrupted. It stays, and takes as much room as the blocks. Of a learner it has the state.
            resume (`bool`, defaults to `False`): go on from those in it, with the model as it was at the beginning:
                load it again. The end is that of an uninterrupted run.

        Returns:
            The report; of structures a [`StructuredReport`], which `report.structured` is from then on.
        """
        make_ready(self.model, "Pruning")
        self._look_beside()
        known, before = known_of(self.model, self.report, self._training)
        cuts, compared = isinstance(config, DSAStructuredConfig), {}
        if cuts:
            check_run(self.model, config, checkpoints, resume)
            data = load_calibration(calibration, self.model, self.tokenizer, config.data)
        elif config.is_open:
            from .search.ready_made import settle

            with without_adapters(self.model):
                settled = settle(inner_model(self.model), calibration, config, self.tokenizer)
            data, config, compared = settled.calibration, settled.config, settled.facts()
        else:
            data = self._load(calibration, config, config.resolved.reads | config.resolved.allocation_reads)
        self._stored, self._under_adapters = None, has_adapters(self.model)
        if cuts:
            cut = prune_structures(self.model, data, config, checkpoints, resume, self.tokenizer)
            report = report_of_cut(self.model, cut, known)
        else:
            report = prune_with_others(self.model, data, config, checkpoints, resume)
            compared["structured"] = known and known.structured
        self.report = replace(report, **compared, trained_before=before)
        self.recovery = self._training = None
        return self.report.structured if cuts else self.report

    def allocate(self, calibration: Any, config: DSAConfig) -> Allocation:
        """The allocation that `prune` would use; nothing is changed."""
        data = self._load(calibration, config, config.resolved.allocation_reads)
        with without_adapters(self.model):
            return allocate(inner_model(self.model), data, config)

    def search(
        self,
        calibration: Any,
        config: DSAConfig | DSAStructuredConfig,
        strategy: str = "auto",
        budget: str | int = "2M tokens",
        validation: Any = None,
        output: str | Path | None = None,
        resume: bool = False,
        report_to: Any = None,
    ) -> SearchResult:
        """The allocation that hurts the model, a dense one, least at `config.sparsity`; the model is not changed.

        Args:
            calibration (`Any`): as in `prune`; feeds statistics.
            config (`DSAConfig` or `DSAStructuredConfig`): what is pruned; its allocation is not looked at.
            strategy (`str`, defaults to `"auto"`): a row of `STRATEGIES`.
            budget (`str`, defaults to `"2M tokens"`): such as `"500k tokens"`, `"300 evaluations"` or `"10 min"`. A
                backward pass counts as two forward passes.
            validation (`Any`, *optional*): text or tokens on which candidates are compared. By default windows of the
                calibration source that calibration does not use. Never the text that a result is reported on.
            output (`str`, *optional*): folder for the trace, as it grows, and the result.
            resume (`bool`, defaults to `False`): go on with the search in `output`.
            report_to (`Any`, *optional*): an experiment tracker that accelerate knows, such as `"trackio"`.
        """
        from .search.apart import load_apart
        from .search.prepared import check_search
        from .search.search import search
        from .sharing.pictures import plot_search

        check_search(config, self.model)  # before any text is read
        data, tokens = load_apart(self.model, self.tokenizer, calibration, validation, config.data)
        options = {"strategy": strategy, "budget": budget, "folder": output, "resume": resume, "report_to": report_to}
        with without_adapters(self.model):
            return search(inner_model(self.model), data, tokens, config, pictures=plot_search, **options)

    def sensitivity(self, calibration: Any, config: DSAConfig) -> Sensitivity:
        """How much of its output every matrix loses at rising sparsities under the method of `config`.

        The model, a dense one, is not changed.
        """
        from .search.sensitivity import CURVES, sensitivity

        check_dense(self.model, config, CURVES)  # before any text is read
        needed = config.resolved.reads | config.resolved.metric_reads
        data = self._load(calibration, config, needed)
        with without_adapters(self.model):
            return sensitivity(inner_model(self.model), data, config)

    @torch.no_grad()
    def masks(self) -> Iterator[tuple[str, Tensor]]:
        """Name and mask of every pruned matrix: (out_features, in_features), True where the weight is kept.

        One at a time, in the model's order; `dict(pruner.masks())` holds them all, a byte per weight.
        """
        model, config = inner_model(self.model), self._pruned().config
        with seen_dense(model):
            for walked in walk_blocks(model, architecture_for(model, config), None):
                for weight in walked.weights:
                    yield plain_name(weight.name), walked.tensor(weight) != 0

    def verify(self) -> Verification:
        """Whether zeros, pattern and budget are those of the report, counted in the weights as they are now.

        Of a model that was loaded, also whether its `dsa_config.json` agrees with itself and is as it was written.
        """
        report = self._pruned()
        described, trained = self._description if report is self._restored else None, bool(self._training)
        return verify(self.model, report, described, trained)

    def measure(self, text: Any = None, tasks: Any = (), **options) -> Measurement:
        """Perplexity on a text, results on tasks of lm-eval, and zeros, with the protocol of each.

        ```python
        print(DSAPruner.from_pretrained("qwen3-0.6b-dsa-60").measure("wikitext2", windows="paper"))
        ```

        Args:
            text (`Any`, *optional*): texts, a file, a dataset or its name, or a LongTensor (samples, length).
            tasks (`Sequence[str]`): names of lm-eval's tasks, or YAML files that describe one.
            options (`dict`): of [`measure`]: `sequence_length`, `windows`, `bos`, ...
        """
        from .evaluation.measure import measure

        return measure(self.model, text, tasks, tokenizer=self.tokenizer, report=self.report, **options)

    def recover(
        self,
        train: Any,
        config: RecoveryConfig | None = None,
        validation: Any = None,
        teacher: str | Path | nn.Module | None = None,
        checkpoints: str | Path | None = None,
        resume: bool = False,
    ) -> RecoveryResult:
        """Train the model, pruned here or before, and keep each of its zeros, or with `method="elsa"` their number.

        Args:
            train (`Any`): texts, a .txt / .jsonl / .parquet path, a dataset or its name, or a LongTensor (samples,
                length).
            config (`RecoveryConfig`, *optional*): method, steps, learning rate, ...; by default sparse adapters, 300
                steps.
            validation (`Any`, *optional*): as `train`; by default the end of it, which is then not trained on.
            teacher (`str | Path | nn.Module`, *optional*): the dense model, for `distillation`.
            checkpoints (`str`, *optional*): folder for checkpoints that a run can be resumed from.
            resume (`bool`, defaults to `False`): go on from the last of them.
        """
        from .recovery.configuration import RecoveryConfig
        from .recovery.elsa.budget import with_budget
        from .recovery.recover import recover

        make_ready(self.model, "Training")
        self._look_beside()
        report = self.report or report_of(self.model)
        if self.report is None:
            self._base, self._training = base_of(self.model, self._base), training_of(self.model)
        config = config or RecoveryConfig()
        report = with_budget(self.model, report, config)
        if config.trains_weights or config.merge:
            self._stored = None
        self.model, self.recovery = recover(
            self.model, self.tokenizer, train, config, report, validation, teacher, checkpoints, resume
        )
        if config.moves_zeros:
            report = replace(report, chosen_by=config.method)
        self.report = counted(report, self.model)
        self._training = after(self._training, self.recovery.to_dict())
        return self.recovery

    def pack(self, least_zeros: float = LEAST_ZEROS) -> Packing:
        """Leave the zeros of matrices with a share of `least_zeros` or more out of memory, in place; what is packed.

        The model multiplies with them as they are; `unpack()` is the way back, bit for bit.
        """
        return pack(self.model, least_zeros)

    def unpack(self) -> tuple[str, ...]:
        """Give packed matrices their zeros back, in place; names of their layers."""
        return unpack(self.model)

    def merge(self, fill: bool = False) -> Merged:
        """Make the adapters of the model, a PEFT model, part of its weights; how many zeros they have a value for.

        These stay zero, unless the adapters may `fill` them, as one that was trained on the dense model would.
        """
        from .recovery.adapters.merge import merge_adapters

        self.model, found = merge_adapters(self.model, fill)
        self._stored, self._under_adapters = None, False
        if self.report is not None:
            self.report = (recounted if fill and found.filled else counted)(self.report, self.model)
        return found

    def save_pretrained(
        self,
        directory: str | Path | OutputFolder,
        compressed: bool = False,
        encoding: str | None = None,
        **save_kwargs,
    ) -> None:
        """Write an ordinary checkpoint, the tokenizer and `dsa_config.json`; whole or not at all.

        An existing folder is replaced only if all that it holds was written here and is unchanged; anything else is
        refused, and so is a folder that another process writes. Of a model with an adapter that is not merged, the
        adapter is written; the pruned model under it has to be saved before. Of one that had adapters when it was
        pruned, the first save does that, and leaves the adapters alone.

        Args:
            directory (`str | Path | OutputFolder`): the folder to write, or one that was begun before the work.
            compressed (`bool`, defaults to `False`): store a bit per weight and the kept weights instead of the zeros.
                Such a checkpoint is smaller, and loads after `import optimum_dsa` only.
            encoding (`str`, *optional*): a row of `ENCODINGS` (`compressed=True` is "bitmask", or "bitmask_whole" of a
                model that was pruned with `values`), or "packed": stored likewise, and loaded packed. By default
                "dense", or "packed" if the model is.
            save_kwargs (`dict`): go to the model's `save_pretrained` (`max_shard_size`, ...).
        """
        report = self._pruned()
        encoding = asked_encoding(encoding, compressed, report, self.model)
        if report is self._restored and not (found := self.verify()).holds:
            logger.warning("The model is not what its report says any more: %s.", one_line(found.problems[0]))
        place = directory.path if isinstance(directory, OutputFolder) else Path(directory)
        adapters = writes_adapters(self.model, report, place, self._stored, self._under_adapters, encoding)
        trained, beside = self._training, None if adapters else self._look_beside()
        made = (report, self._base, directory, encoding, trained, beside, adapters)
        save_checkpoint(self.model, self.tokenizer, *made, **save_kwargs)
        if not adapters:
            self._stored = str(place)

    def _look_beside(self) -> BaseFiles | None:
        """What belongs to the model and its class does not write; looked for once, and what stays behind is said."""
        source = getattr(getattr(inner_model(self.model), "config", None), "name_or_path", None)
        if self._beside is None and source:
            self._beside = find_beside(self.model, str(source), **self._options)
        return self._beside

    def _pruned(self) -> PruningReport:
        if self.report is None and (found := described_report(self.model)) is not None:
            self.report, self._base = found, base_of(self.model)  # of a model that somebody else has loaded
            self._training = training_of(self.model)
        if self.report is None:
            raise ValueError("Nothing was pruned yet; call prune() or load a pruned model first.")
        return self.report

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Push model, tokenizer, `dsa_config.json`, a card and its pictures in one commit; returns the address.

        Args:
            repo_id (`str`): "user/name", or "name" for the token's own; made where it is missing.
            private (`bool`, *optional*): of a repository that is made; by default what the account has chosen.
            revision (`str`, *optional*): branch to push to, made where it is missing; "main" by default.
            create_pr (`bool`, defaults to `False`): open a pull request instead of pushing.
            commit_message (`str`, *optional*): by default says what was removed.
            token (`str`, *optional*): by default the one that `hf auth login` stored.

        Raises:
            OSError: the Hub refused or the network failed; the model is as it was, and the same call goes on.
        """
        from .sharing.push import push_saved

        stored = self._stored
        options = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
        try:
            return push_saved(self.save_pretrained, repo_id, commit_message=commit_message, **options)
        finally:
            self._stored = stored  # the folder is gone

    def _load(self, calibration: Any, config: DSAConfig, needed: Collection[str]) -> Calibration | None:
        if calibration is None or not needed:
            return None
        architecture_for(self.model, config)  # a model that cannot be pruned is refused before any text is read
        return load_calibration(calibration, self.model, self.tokenizer, config.data)
