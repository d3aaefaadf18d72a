"""`optimum-cli dsa evaluate`."""

from __future__ import annotations

from argparse import ArgumentTypeError

from .base import (
    LeafCommand,
    add_bos_option,
    add_loading_options,
    add_source_options,
    asked_source,
    check_texts,
    loading_options,
    say,
)


class EvaluateCommand(LeafCommand):
    """Perplexity, tasks and sparsity of one checkpoint, or of several side by side."""

    DESCRIPTION = """\
Measure a model's perplexity on a text (non-overlapping windows) and its results on tasks of lm-eval, and count its
zeros. Several models give a table, in which all were measured by one protocol; others get a table of their own.
--tasks zero-shot is the seven tasks of the DSA paper (boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge,
openbookqa) and the mean of their accuracies.
"""
    EXAMPLES = """\
  optimum-cli dsa evaluate out --dataset test.txt
  optimum-cli dsa evaluate out --dataset wikitext2 --sequence-length 2048 --windows paper --json
  optimum-cli dsa evaluate out --dense Qwen/Qwen3-0.6B --dataset test.txt --output out/evaluation.json
  optimum-cli dsa evaluate dense out --tasks zero-shot --limit 200 --batch-size auto
  optimum-cli dsa evaluate out --tasks zero-shot,gsm8k --tasks-path ./tasks-with-local-data
  optimum-cli dsa evaluate dense pruned recovered --dataset test.txt --tasks ./my_task.yaml --output results.json
"""

    @staticmethod
    def parse_args(parser):
        EvaluateCommand.describe(parser, "evaluate")
        parser.add_argument("model", nargs="+", help="folders or Hub ids")
        text = parser.add_argument_group("perplexity")
        add_source_options(text)
        text.add_argument("--split", help="split of a named dataset, or rows of it: test[:50] (default: test)")
        text.add_argument("--text-column", default="text", help="column of the text or conversation (default: text)")
        text.add_argument("--subset", help="configuration of a dataset that has several")
        text.add_argument(
            "--windows",
            choices=("each", "paper"),
            default="each",
            help="each starts with BOS, where the tokenizer adds it (default); paper cuts the whole text as papers do",
        )
        add_bos_option(text)
        text.add_argument(
            "--sequence-length", type=int, help="tokens per window, BOS included (default: the model's, max 2048)"
        )
        text.add_argument("--num-samples", type=int, help="use this many windows, drawn by --seed (default: all)")
        text.add_argument("--seed", type=int, default=0)
        tasks = parser.add_argument_group("tasks (needs lm-eval, which the extra `eval` brings)")
        tasks.add_argument("--tasks", help="names of lm-eval's tasks, or YAML files, with commas between them")
        tasks.add_argument(
            "--include-path",
            "--tasks-path",
            metavar="FOLDER",
            help="folder of further YAML files of tasks, NAME being its NAME or local_NAME",
        )
        tasks.add_argument("--num-fewshot", type=int, help="examples before each question (default: the task's)")
        tasks.add_argument("--limit", type=int, help="questions per task (default: all)")
        parser.add_argument(
            "--batch-size", type=whole_or_auto, default=8, help="windows or questions at once, or auto (default: 8)"
        )
        parser.add_argument(
            "--dense",
            metavar="MODEL",
            help="the dense parent, as the first row; measured once by each protocol, and kept",
        )
        parser.add_argument("--output", help="JSON file to write all results to; in a model's folder, report shows it")
        add_loading_options(parser)

    def execute(self) -> dict:
        import contextlib
        import json
        import sys

        from ..common.hub_file import model_name
        from ..common.progress import progress
        from ..data import DataConfig
        from ..evaluation.comparison import comparison_table
        from ..evaluation.kept import measured_once
        from ..evaluation.measure import check_asked
        from ..evaluation.results import check_results, results_json, save_results
        from ..evaluation.tasks import find_tasks
        from ..pruner import DSAPruner

        args = self.args
        source = asked_source(args)
        if not source and not args.tasks:
            raise ValueError("say what to measure: --dataset FILE, --tasks NAMES, or both")
        check_read(args, source)
        if args.output:
            check_results(args.output)
        asked = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
        check_asked(source, asked, args.windows, args.num_samples, args.sequence_length, args.batch_size, args.limit)
        loading = loading_options(args)
        check_texts(args, DataConfig(text_column=args.text_column, split=args.split, subset=args.subset), "test")
        names = ("windows", "bos", "sequence_length", "num_samples", "seed", "split", "text_column", "subset")
        options = {name: getattr(args, name) for name in (*names, "num_fewshot", "limit", "batch_size")}
        with contextlib.redirect_stdout(sys.stderr):  # data sets and lm-eval print
            tasks = find_tasks(asked, args.include_path) if asked else ()
            models = [*args.model, *([args.dense] if args.dense else [])]
            if tasks:
                options["keep"] = len(models) > 1
                tasks.loaded  # noqa: B018 - data that are not to be had are missed before a model is loaded
            check_there(models, args.revision, args.gguf_file)
            names = distinct([model_name(model) for model in models])

            def measured(model: str, name: str, **loading):
                pruner = DSAPruner.from_pretrained(model, **loading)
                return pruner.measure(source, tasks, name=name, **options)

            results = []
            for name, model in progress(
                list(zip(names, args.model)), "Models", "model", "optimum_dsa.evaluate", hidden=len(args.model) == 1
            ):
                results.append(measured(model, name, **loading))
            if args.dense:
                loading.pop("revision", None)  # of the pruned models
                dense = measured_once(args.dense, results[0], lambda: measured(args.dense, names[-1], **loading))
                results.insert(0, dense)
        if args.output:
            save_results(args.output, results)
            self.saved = True
        say(comparison_table(results) if len(results) > 1 else str(results[0]))
        return json.loads(results_json(results))


def check_read(args, source) -> None:
    """Raise `ValueError` for an option of what is not measured."""
    of_tasks = {"tasks-path": args.include_path, "num-fewshot": args.num_fewshot, "limit": args.limit}
    of_text = {"split": args.split, "subset": args.subset, "num-samples": args.num_samples}
    of_text["windows"] = None if args.windows == "each" else args.windows
    for given, options, what in ((args.tasks, of_tasks, "--tasks"), (source, of_text, "--dataset")):
        for name, value in options.items():
            if not given and value is not None:
                raise ValueError(f"--{name} {value} is of {what}, which was not given; add it, or leave it out.")


def whole_or_auto(text: str) -> int | str:
    """A whole number, or "auto"."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise ArgumentTypeError(f"a whole number or auto, got {text!r}") from None


def check_there(models: list[str], revision: str | None = None, gguf_file: str | None = None) -> None:
    """Raise `OSError` where one of several models is not to be had: before others are measured, which takes long."""
    from pathlib import Path

    from ..checkpoint.forms import is_gguf
    from ..checkpoint.load import read_configuration
    from ..common.hub_file import hub_file

    for model in models if len(models) > 1 and not gguf_file else ():
        if Path(model).exists() or is_gguf(model):
            continue
        options = {"revision": revision} if revision else {}
        if not hub_file(model, "adapter_config.json", **options):
            read_configuration(model, options)  # which says what is wrong with a name, or who may ask for the model


def distinct(names: list[str]) -> list[str]:
    """The names, where one comes again with a number behind it: a table's rows are told apart by them."""
    found: list[str] = []
    for name in names:
        number, shown = 2, name
        while shown in found:
            number, shown = number + 1, f"{name} ({number})"
        found.append(shown)
    return found
