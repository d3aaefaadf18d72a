"""`optimum-cli dsa prune`."""

from __future__ import annotations

import logging
from pathlib import Path

from .base import (
    LeafCommand,
    add_loading_options,
    add_source_options,
    asked_source,
    check_texts,
    check_weights,
    loading_options,
    say,
)
from .options import add_alternative, add_settings, as_given, asked_settings, evaluate_options
from .processes import TOGETHER


logger = logging.getLogger(__name__)

CALIBRATION = ("data", "batch_size", "activations", "sequential")  # settings and sections of the group with --dataset


class PruneCommand(LeafCommand):
    """A model in, an ordinary checkpoint with zeros out, or a smaller one."""

    processes = TOGETHER

    DESCRIPTION = """\
Prune a transformers model to an exact budget, in one shot, and save it as an ordinary checkpoint: weights become zero,
or with --structures whole structures are cut out, and the model that is left is smaller, and faster everywhere.

quality     how good it is to be, in one word; it chooses the method, and fills in what is not said
{qualities}
method      how weights are scored and what happens to the rest
{methods}
allocation  how much to remove from each block (default: dsa)
{allocations}
              an allocation function such as "abslog/var/atan,asin/no_op@+0.08";
              an allocation as JSON, or the folder of a pruned model;
              auto: each of the names is tried for real on other windows of the text, at the cost of a prune each
pattern     row, matrix, group:128, 2:4 (any N:M), mixed:8 (N:8, N from the allocation)
permute     with N:M, in which order channels are put first: {permutations}
update      what becomes of the weights that stay: {updates}

structures  instead of weights, what may be cut out; the least important go
{structures}
importance  of a structure: {importances}
update      what makes up for them: none, bias, refit (default)
Both compose: cut structures first, and prune the weights of what is left then.
"""
    EXAMPLES = """\
  optimum-cli dsa prune Qwen/Qwen3-0.6B -o out --sparsity 0.6 --quality good
  optimum-cli dsa prune ./model -o out -s 0.7 --method sparsegpt --allocation owl --dataset calibration.txt
  optimum-cli dsa prune ./model -o out -s 0.5 --pattern 2:4 --allocation uniform
  optimum-cli dsa prune ./model -o out -s 0.5 --method magnitude --allocation uniform --device-map disk
  optimum-cli dsa prune Qwen/Qwen3-0.6B -o out --sparsity 0.6 --resume
  optimum-cli dsa prune Qwen/Qwen3-0.6B -o smaller -s 0.2 --structures ffn,kv_group
  optimum-cli dsa prune ./model -o smaller --structures ffn --max-loss 5% --dataset calibration.txt
  optimum-cli dsa prune smaller -o smaller-sparse -s 0.5
"""

    @staticmethod
    def parse_args(parser):
        PruneCommand.describe(parser, "prune")
        parser.add_argument("model", help="folder or Hub id of the model to prune")
        parser.add_argument(
            "-o", "--output", required=True, help="folder to write; an earlier result there is replaced"
        )
        what = parser.add_argument_group("what to remove")
        add_quality_option(what)
        data = add_calibration_options(parser)
        add_settings(parser, [(data, CALIBRATION)], "pruning.configuration.DSAConfig", what)
        cut = parser.add_argument_group("structures instead of weights (--structures)")
        add_alternative(parser, "structures", "pruning.structured.configuration.DSAStructuredConfig", cut)
        run = parser.add_argument_group("stopping and going on")
        place = run.add_mutually_exclusive_group()
        place.add_argument(
            "--checkpoints", help="folder for finished blocks (default: beside OUTPUT, hidden, removed at the end)"
        )
        place.add_argument(
            "--no-checkpoints", action="store_true", help="keep none: less disk and time, and nothing to go on from"
        )
        run.add_argument(
            "--resume",
            action="store_true",
            help="go on behind the last finished block; the same model, text and options are needed",
        )
        add_loading_options(parser)
        parser.add_argument("--max-shard-size", help="largest weight file, such as 2GB")
        parser.add_argument(
            "--compressed",
            action="store_true",
            help="store no zeros: smaller, and loads after import optimum_dsa only",
        )

    _checkpoints = None  # the folder of finished blocks, once there is one
    _learned = None  # the file of a learner's state, once there is to be one

    def left_behind(self) -> str:
        from ..pruning.finished import finished_in

        if self._learned is not None and self._learned.exists():
            return f"what was learned is in {self._learned}; the same command with --resume goes on"
        count = 0 if self._checkpoints is None else finished_in(self._checkpoints)
        if not count:
            return "nothing was written"
        return f"{count} finished blocks are in {self._checkpoints}; the same command with --resume goes on"

    def execute(self) -> dict:
        from contextlib import nullcontext
        from shlex import quote

        from ..checkpoint.description import base_files_in
        from ..checkpoint.shard_size import check_shard_size
        from ..common.output import OutputFolder
        from ..common.ranks import current_ranks
        from ..model.adapters import has_adapters, taken_out_of_base
        from ..model.offload import is_offloaded
        from ..model.parameters import weight_bytes
        from ..model.stacks import UnprunableError
        from ..pruner import DSAPruner
        from ..pruning.divided import check_divisible
        from ..pruning.finished import check_folder, finished_in
        from ..pruning.structured.checks import keeps_blocks
        from ..pruning.structured.described import structured_to
        from ..pruning.structured.learners.learner import place_of

        config = asked_structures(self.args, self.parser)
        cuts, ranks = config is not None, current_ranks()
        config = config if cuts else asked_config(self.args)
        check_divisible(config, ranks)
        options, loading = {}, loading_options(self.args)  # wrong ones end it here, before any work
        config.reconstruct.check_place(self.args.device_map == "disk")
        if self.args.max_shard_size is not None:
            check_shard_size(self.args.max_shard_size)
            options["max_shard_size"] = self.args.max_shard_size
        if self.args.checkpoints and _within(self.args.checkpoints, self.args.output):
            raise ValueError(
                f"--checkpoints {self.args.checkpoints} is the output or in it, and that holds the result alone; name "
                "another folder, or leave it out."
            )
        if self.args.no_checkpoints and self.args.resume:
            raise ValueError("--resume goes on from checkpoints, and --no-checkpoints keeps none; leave one out.")
        if cuts or _reads_text(config):
            check_texts(self.args, config.data)
        check_weights(self.args, loading)
        # Of several processes the first alone writes.
        place = OutputFolder(self.args.output, resume=self.args.resume) if ranks.is_first else nullcontext()
        with place as output:
            self.place = output
            if output and not self.args.no_checkpoints and (not cuts or keeps_blocks(config)):
                self._checkpoints = Path(self.args.checkpoints or output.scratch("blocks"))
                check_folder(self._checkpoints, self.args.resume)
            if output and not cuts:
                self._say_plan(config, loading | {"ranks": ranks.count})
            pruner = DSAPruner.from_pretrained(self.args.model, **loading)
            if has_adapters(pruner.model) and pruner.report is not None:
                raise ValueError(
                    f"{self.args.model} holds an adapter on a pruned model, which would be lost; merge it "
                    "(model.merge_and_unload()), or prune the model under it."
                )
            if start := taken_out_of_base(pruner.model):
                raise ValueError(
                    f"{self.args.model} holds an adapter that was taken out of its base ({start}), and the rest alone "
                    "would be saved; merge it (model.merge_and_unload()), and prune what that gives."
                )
            if output:
                self._check_room(output, weight_bytes(pruner.model), is_offloaded(pruner.model) and not cuts)
            learns = cuts and not keeps_blocks(config)
            kept = self.args.checkpoints if learns else self._checkpoints
            if learns and kept and config.learner:
                self._learned = place_of(config.learner, kept)
            if self.args.resume and self._checkpoints is not None and (count := finished_in(self._checkpoints)):
                say(f"going on behind {count} finished blocks in {self._checkpoints}")
            try:
                report = pruner.prune(asked_source(self.args), config, kept, self.args.resume)
            except UnprunableError:
                self._drop_blocks()
                raise
            if output is None:
                return {}
            say(str(report))
            pruner.save_pretrained(output, self.args.compressed, **options)
        options = evaluate_options(self.args, self.parser)
        line = f"saved to {self.args.output}; next: optimum-cli dsa evaluate {quote(self.args.output)}{options}"
        print(line if not cuts else f"{line}, or optimum-cli dsa bench {self._beside(quote)}")
        facts = structured_to(report) if cuts else report.to_dict()
        return {"output": self.args.output, **facts, **base_files_in(self.args.output)}

    def _drop_blocks(self) -> None:
        """Remove what a run that was refused has finished: going on, it would be refused again, and hinder others."""
        from shutil import rmtree

        if self._checkpoints is not None and not (self.args.checkpoints or self.args.resume):
            rmtree(self._checkpoints, ignore_errors=True)

    def _beside(self, quote) -> str:
        """The arguments of `bench` for what was written, beside what it was made of."""
        own = as_given(self.args, self.parser, ("device", "trust_remote_code"))
        return f"{quote(self.args.output)} --against {quote(self.args.model)}{own}"

    def _say_plan(self, config, options: dict) -> None:
        """What was chosen, and what it will need: arithmetic on the model's configuration, before it is loaded."""
        from ..checkpoint.plan import plan

        try:
            found = plan(self.args.model, config, output=self.args.output, run_block=False, **options)
        except Exception as error:  # noqa: BLE001 - what is wrong with the model, loading it says; it stops no work
            logger.info("No plan could be made: %s", error)
            return
        if self.args.quality:
            say(f"quality {self.args.quality}: {found.method}; {found.text.samples} x {found.text.length} tokens")
        say(f"expected: {found.line}")

    def _check_room(self, output, size: int, in_place: bool) -> None:
        """Raise where the disk has no room for a result of `size` bytes; without room for blocks, keep none.

        `in_place`: finished blocks become shards of the result as they are.
        """
        if self._checkpoints is None:
            output.require(size)
            return
        # Both at once at the end, unless the blocks are the result's shards, whose size is not given.
        # What a run left is there already, and counts as used.
        left = sum(file.stat().st_size for file in self._checkpoints.glob("block-*"))
        inside = self._checkpoints.is_relative_to(output.work)
        if inside and in_place and self.args.max_shard_size is None:
            output.require(max(size - left, 0))
            return
        blocks = max(size - left, 0) if inside else 0
        output.require(size + blocks if self.args.resume else size)
        if size + blocks > output.free:
            logger.warning(
                "The disk of %s has room for the result, and none for finished blocks beside it: this run cannot be "
                "resumed. --checkpoints FOLDER keeps them elsewhere.",
                self.args.output,
            )
            self._checkpoints = None


def _reads_text(config) -> bool:
    from ..pruning.configuration import AUTO

    return bool(config.resolved.reads | config.resolved.allocation_reads) or config.allocation == AUTO


def _within(folder: str, output: str) -> bool:
    return Path(folder).resolve().is_relative_to(Path(output).resolve())


def add_calibration_options(parser):
    """The group of options that say which text feeds the statistics, for `add_settings` to fill."""
    data = parser.add_argument_group("calibration")
    add_source_options(data, "wikitext2")
    return data


def add_quality_option(group):
    """`--quality`, a row of `QUALITIES`."""
    group.add_argument("--quality", help="fast, good or best: chooses the method, and fills in what is not said")


def asked_config(args, **given):
    """The `DSAConfig` that the options ask for, on top of `given` and of `--quality`, if any."""
    from ..common.settings import nested
    from ..pruning.configuration import DSAConfig
    from ..pruning.presets import with_quality

    asked = asked_settings(args, DSAConfig)
    quality = getattr(args, "quality", None)
    if quality and getattr(args, "described_config", False):
        raise ValueError(
            f"--quality {quality} chooses how to prune, and the config in {args.config} says it already; leave out "
            "one of both, --quality or --config."
        )
    if quality:
        given = with_quality(quality, given | asked)
    if "sparsity" not in given | asked:
        raise ValueError("say how much to remove, for example --sparsity 0.6")
    return DSAConfig.from_dict(nested(DSAConfig, given | asked))


def asked_structures(args, parser, **given):
    """The `DSAStructuredConfig` that the options ask for, on top of `given`; `None` where they ask for pruned weights.

    Raises:
        ValueError: options of both are given, or what cannot be saved or is none of this.
    """
    from ..common.settings import flag_of, nested
    from ..pruning.structured.checks import check_by_block, check_resumable, keeps_blocks
    from ..pruning.structured.configuration import DSAStructuredConfig

    foreign = parser.foreign(parser.settings_class(() if args.structures is None else ("structures",)))
    others = [name for name in sorted(foreign) if getattr(args, name, None) is not None]
    if args.structures is None:
        if others:
            raise ValueError(f"{flag_of(others[0])} is for --structures, which was not given; leave it out.")
        return None
    others += [name for name in ("quality", "compressed") if getattr(args, name, None)]
    if others:
        raise ValueError(
            f"{flag_of(others[0])} is of pruned weights, and --structures cuts structures out; leave out one of both."
        )
    asked = given | asked_settings(args, DSAStructuredConfig)
    if "max_loss" in asked:
        if "sparsity" in asked:
            raise ValueError(f"-s says how much goes, and --max-loss {asked['max_loss']} finds it; give one of both.")
        asked["sparsity"] = 0.0
    if "sparsity" not in asked:
        found = ", or by how much perplexity may rise: --max-loss 5%" if hasattr(args, "max_loss") else ""
        raise ValueError(f"say how much to cut out, for example --sparsity 0.2{found}")
    config = DSAStructuredConfig.from_dict(nested(DSAStructuredConfig, asked))
    if args.device_map == "disk":
        check_by_block(config)
    if hasattr(args, "checkpoints"):
        # Where none is named there is one beside the output.
        check_resumable(config, args.checkpoints, args.resume and not keeps_blocks(config))
    return config
