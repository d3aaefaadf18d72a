"""A vision-language model × method, each with the budget spread evenly and by DSA's function: pictures, and text.

First how many questions about pictures are answered, then, at smaller sparsities as well, the perplexity of the
language tower on text. Rows are calibrated on pictures with their questions; only the language tower is pruned.

Without a model, a tiny LLaVA is trained on pictures of shapes, in minutes, and kept in --folder. With one, such as
LLaVA-1.5, --data names a file of JSON lines with `question`, `answer` or a list of `answers`, and the picture:
`image`, a file beside it, or `png`, in base64. VQAv2, ScienceQA and TextVQA can be written so. Its first --samples
rows calibrate, the others are measured.

    python vision.py --output rows.jsonl
    python vision.py ./llava-1.5-7b-hf --data vqav2.jsonl --text test.txt --device cuda --dtype bfloat16
"""

import argparse
import base64
import hashlib
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from shapes import TRAINING, asked, questions, train
from table import DENSE, Row, Table, markdown, parser_of, signed, title
from transformers import AutoModelForImageTextToText, AutoProcessor

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, Measurement, demo_model, measure
from optimum_dsa.evaluation.measurement import with_error


METHODS = ("magnitude", "wanda", "sparsegpt")
TOWER = ("0.1", "0.2", "0.3", "0.4", "0.5")
WORDS = "\nAnswer the question using a single word or phrase."  # what LLaVA-1.5 was trained to be asked
NEEDED = 3  # people of ten who said it make an answer wholly right, in VQAv2 and TextVQA
SEEDS = {"calibration": 1 << 20, "measured": 1 << 21}  # of pictures that training, which counts from 0, never sees


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, ("0.5", "0.6"))
    parser.set_defaults(model=None, tasks_path=None, samples=64, batch_size=32)
    parser.add_argument("--data", type=Path, help="file of questions about pictures (default: pictures of shapes)")
    parser.add_argument("--folder", type=Path, default=Path("tiny-llava"), help="of the model that is trained here")
    parser.add_argument("--language", help="the model that it is made around (default: the embedded one)")
    parser.add_argument("--steps", type=int, default=240, help="of its training (default: 240)")
    parser.add_argument("--questions", type=int, default=600, help="about shapes, that are measured (default: 600)")
    parser.add_argument("--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--text-sparsities", nargs="*", default=TOWER, help=f"default: {' '.join(TOWER)}")
    parser.add_argument("--new-tokens", type=int, default=8, help="of an answer, at most (default: 8)")
    parser.add_argument(
        "--words", help="behind the questions of --data (default: those LLaVA-1.5 knows; none for shapes)"
    )
    parser.add_argument("--dtype", default="float32", help="of the model (default: float32)")
    return parser.parse_args()


def read(path: Path, words: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a file of questions: `question` with these words behind it, its `answers`, and its `picture`."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:limit], 1):
        row = json.loads(line)
        if "question" not in row or not {"image", "png"} & row.keys() or not {"answer", "answers"} & row.keys():
            raise ValueError(f"{path}, line {number}: question, answer or answers, and image or png are needed.")
        picture = io.BytesIO(base64.b64decode(row["png"])) if "png" in row else path.parent / row["image"]
        answers = row["answers"] if "answers" in row else [row["answer"]]
        rows.append({"picture": picture, "question": row["question"] + words, "answers": answers})
    return rows


def opened(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its picture as one: those of a file stay there until they are looked at."""
    picture = row["picture"]
    return row if isinstance(picture, Image.Image) else {**row, "picture": Image.open(picture).convert("RGB")}


def plain(answer: str) -> str:
    """An answer's first line, as it is compared."""
    return answer.strip().split("\n")[0].strip(" .").lower()


def right(answer: str, answers: Sequence[str]) -> float:
    """Of one known answer whether it is given; of several people's how many gave it, three being enough."""
    same = sum(plain(one) == plain(answer) for one in answers)
    return min(1.0, same / min(NEEDED, len(answers)))


@torch.no_grad()
def answered(
    model: torch.nn.Module, processor: Any, rows: Sequence[dict[str, Any]], batch: int, tokens: int
) -> list[float]:
    """How right the model's likeliest answer to every question is, word by word, from 0 to 1."""
    found = []
    for first in range(0, len(rows), batch):
        some = [opened(row) for row in rows[first : first + batch]]
        inputs = {name: value.to(model.device) for name, value in asked(processor, some).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        given = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.batch_decode(given, skip_special_tokens=True)
        found += [right(one, row["answers"]) for one, row in zip(said, some)]
    return found


class Vision(Table):
    """Rows that are calibrated on pictures, and measured on questions about others and on text."""

    of_tasks = ()  # the limit is of its own questions

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.processor = AutoProcessor.from_pretrained(args.model)
        if args.data:
            rows = read(args.data, args.words, args.samples + args.limit if args.limit else None)
            self.shown, self.asked = rows[: args.samples], rows[args.samples :]
            if not self.asked:
                raise ValueError(
                    f"{args.data} holds {len(rows)} questions, and all would calibrate; give fewer --samples, "
                    f"not {args.samples}."
                )
        else:
            counts = {"calibration": args.samples, "measured": args.limit or args.questions}
            self.shown, self.asked = (questions(count, SEEDS[part]) for part, count in counts.items())
        self.task = args.data.stem if args.data else "shapes"

    def looks(self, row: Row) -> bool:
        """Whether the row is asked about pictures."""
        return not row.sparsity or row.sparsity in self.args.sparsities

    def config(self) -> DataConfig:
        return DataConfig(len(self.shown), image_column="picture", text_column="question")

    def _key(self, row: Row, config: DSAConfig | None, tasks: None, text: bool) -> str:
        said = json.dumps([[one["question"], one["answers"]] for one in self.asked])
        of = [
            hashlib.sha256(said.encode()).hexdigest()[:16],
            self.args.trained,
            self.args.dtype,
            self.args.new_tokens,
            self.args.words,
        ]
        return json.dumps([super()._key(row, config, tasks, text), self.looks(row), *of])

    def _make(self, row: Row, config: DSAConfig | None, tasks: None, text: bool) -> dict:
        args = self.args
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        pruner = DSAPruner(model.to(args.device).eval(), self.processor.tokenizer)
        start = time.perf_counter()
        if config is not None:
            pruner.prune(self.calibration_rows(), config)
        middle, kept = time.perf_counter(), {}
        windows = self.tokens[self.text][: args.windows]
        found = measure(pruner.model, windows, report=pruner.report, name=title(row), batch_size=args.batch_size)
        found = replace(found, protocol=replace(found.protocol, dataset=Path(args.text or self.text).name))
        if self.looks(row):
            kept["right"] = answered(pruner.model, self.processor, self.asked, args.batch_size, args.new_tokens)
            found = replace(found, tasks={self.task: {"acc": dict(zip(("value", "error"), mean(kept["right"])))}})
        seconds = {"prune_seconds": middle - start, "measure_seconds": time.perf_counter() - middle}
        return {"measured": found.to_dict(), **{name: round(value, 1) for name, value in seconds.items()}, **kept}

    def calibration_rows(self) -> datasets.Dataset:
        """Pictures with their questions, as the package reads them."""
        rows = [opened(row) for row in self.shown]
        columns = {"picture": [r["picture"] for r in rows], "question": [r["question"] for r in rows]}
        return datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())

    # -- what came of it

    def heading(self, found: Sequence[Measurement]) -> str:
        own = f"{len(self.asked)} questions of {self.task}, calibrated on {len(self.shown)} others with their pictures"
        rest = [part for part in super().heading(found).split("; ")[1:] if not part.startswith("tasks: ")]
        made = [f"trained here in {self.args.trained['steps']} steps"] if self.args.trained else []
        return "; ".join([Path(self.args.model).name, *made, own, *rest])

    def _columns(self, rows: Sequence[Row], found: Sequence[Measurement]) -> dict[str, list[str]]:
        columns = super()._columns(rows, found)
        seconds = columns.pop("seconds")
        return {**columns, "answers, difference": [self.answers(row) for row in rows], "seconds": seconds}

    def answers(self, row: Row) -> str:
        """A row's right answers less those of the row that it is held against, question by question."""
        pair = [self.found.get((name, row.sparsity)) for name in (row.against, row.name)]
        if row.against is None or None in pair:
            return ""
        return signed(*mean([own - even for even, own in zip(*(kept["right"] for _, kept in pair))]))

    def print_text(self, rows: Sequence[Row], sparsities: Sequence[str]) -> None:
        """The language tower's perplexity on text, a column for each sparsity."""
        names = list(dict.fromkeys(row.name for row in rows if row.sparsity))
        columns: dict[str, list[str]] = {"perplexity": [DENSE, *names]}
        dense = self.found.get((DENSE, ""))
        for sparsity in sparsities:
            found = [dense, *(self.found.get((name, sparsity)) for name in names)]
            columns[sparsity] = [
                with_error(one[0].perplexity, one[0].perplexity_error, 2) if one else "not run" for one in found
            ]
        print("", *markdown(columns), sep="\n")


def mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def main() -> None:
    args = parse()
    args.trained = None
    if args.model is None:
        args.model = args.folder
        if not (args.folder / TRAINING).is_file():
            train(args.folder, args.language or demo_model(), args.steps)
        args.trained = json.loads((args.folder / TRAINING).read_text())
    if args.words is None:
        args.words = "" if args.trained else WORDS
    table = Vision(args)
    rows = [Row(DENSE)]
    data: dict[str, Any] = {"data": table.config()}
    for sparsity in dict.fromkeys([*args.sparsities, *args.text_sparsities]):
        for method in args.methods:
            rows.append(Row(method, sparsity, {"method": method, **data}))
            settings = {"method": method, "allocation": "dsa", **data}
            rows.append(Row(f"{method} + dsa", sparsity, settings, against=method))
    table.run(rows)
    table.print([row for row in rows if table.looks(row)])
    if args.text_sparsities:
        table.print_text(rows, args.text_sparsities)


if __name__ == "__main__":
    main()
