"""The paper's tables and the comparison of a real model run, small, and say what was not run."""

import base64
import importlib.util
import io
import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optimum_dsa import DSAPruner, read_results

from .tiny import bos_tokenizer, tiny_llama, tokens


EXAMPLES = Path(__file__).parents[1] / "examples"
TASK = """\
task: local_next
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/next.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture
def place(tmp_path):
    """A tiny model and its tokenizer, its text, and a folder of tasks: one whose data are there, one without."""
    tiny_llama().save_pretrained(tmp_path / "model")
    bos_tokenizer().save_pretrained(tmp_path / "model")
    parts = {"calibration": tokens(8), "validation": tokens(8, 16, seed=5), "test": tokens(8, 16, seed=6)}
    save_file(parts, tmp_path / "tokens.safetensors")
    for folder in ("tasks", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tasks" / "next.yaml").write_text(TASK)
    (tmp_path / "tasks" / "lost.yaml").write_text(TASK.replace("next", "lost"))
    rows = [{"text": f"{n} {n + 1}", "choices": [str(n + 2), str(n)], "label": n % 2} for n in range(12)]
    (tmp_path / "data" / "next.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys, place):
    """Run a script of `examples` on the tiny model; its lines, and the rows that it kept."""

    def run(script, *options, folder=EXAMPLES / "benchmarks" / "tables"):
        monkeypatch.syspath_prepend(EXAMPLES / "benchmarks" / "tables")
        spec = importlib.util.spec_from_file_location(script, folder / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        places = [place / "model", "--output", place / "rows.jsonl"]
        if "--text" not in options:
            places += ["--tokens", place / "tokens.safetensors"]
        if "--tasks" in options:
            places += ["--tasks-path", place / "tasks"]
        asked = [script, *places, "--device", "cpu", *options]
        monkeypatch.setattr("sys.argv", list(map(str, asked)))
        if "--tasks" in options:  # of the machine lm-eval tells with the help of pip, which takes seconds
            monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
        module.main()
        rows = [json.loads(line)["row"]["measured"] for line in (place / "rows.jsonl").read_text().splitlines()]
        return capsys.readouterr().out.splitlines(), {row["model"]: row for row in rows}

    return run


def cells(lines, name):
    """The cells of a row of a table in Markdown."""
    return next([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(f"| {name} |"))


def test_allocations_are_held_against_uniform_and_not_run_again(run, place):
    options = ("--sparsities", "0.5", "0.7", "--allocations", "uniform", "owl", "nosuch")
    lines, rows = run("allocations", *options)
    assert set(rows) == {"dense", *(f"wanda + {name}, {s}" for name in ("uniform", "owl") for s in (0.5, 0.7))}
    assert all(rows[f"wanda + owl, {s}"]["sparsity"] == pytest.approx(s, abs=1e-4) for s in (0.5, 0.7))
    losses = (rows["wanda + owl, 0.7"]["losses"], rows["wanda + uniform, 0.7"]["losses"])
    changes = [own - even for own, even in zip(*losses)]
    error = statistics.stdev(changes) / len(changes) ** 0.5
    shown = cells(lines, "wanda + owl, 0.7")[3].lstrip("+")
    assert shown == f"{statistics.fmean(changes):.4f} ± {error:.4f}"
    missing = [line for line in lines if line.startswith("not run: ")]
    assert len(missing) == 2 and "wanda + nosuch, 0.5: Unknown allocation 'nosuch'" in missing[0]
    assert cells(lines, "wanda + nosuch") == ["wanda + nosuch", "not run", "not run"]
    written = (place / "rows.jsonl").read_text()
    again, _ = run("allocations", *options)
    assert (place / "rows.jsonl").read_text() == written and sum("was there" in line for line in again) == 5


def test_a_table_of_nothing_that_can_be_run_is_an_error_before_any_work(run, place):
    for options, why in (
        (("--allocations", "nosuch"), "Unknown allocation 'nosuch'"),
        (("--allocations", "owl", "--sparsities", "2:4"), "a pattern leaves nothing to allocate"),
    ):
        with pytest.raises(SystemExit, match=f"no row can be run\n(.*\n)*.*{why}"):
            run("allocations", *options)
    assert not (place / "rows.jsonl").exists()


def test_a_text_is_cut_into_parts_of_its_own(run, place):
    (place / "text.txt").write_text(" ".join(str(number % 90) for number in range(400)))
    options = ("--text", place / "text.txt", "--length", "16", "--sparsities", "0.5", "--allocations", "uniform")
    lines, rows = run("allocations", *options)
    assert set(rows) == {"dense", "wanda + uniform, 0.5"} and len(rows["dense"]["losses"]) > 2
    assert "text.txt" in "\n".join(lines)
    for words, message in ((3, "holds 0 windows of 16 tokens"), (40, "2 windows of 16 tokens, too few for 3 parts")):
        (place / "text.txt").write_text("1 " * words)
        with pytest.raises(SystemExit, match=message):
            run("allocations", *options)


def test_another_text_or_model_of_the_same_name_is_measured_anew(run, place):
    options = ("--sparsities", "0.5", "--allocations", "uniform")
    first = run("allocations", *options)[1]["dense"]["losses"]
    save_file({part: tokens(8, 16, seed=9) for part in ("calibration", "test")}, place / "tokens.safetensors")
    lines, rows = run("allocations", *options)
    assert not any("was there" in line for line in lines) and rows["dense"]["losses"] != first
    tiny_llama(seed=1).save_pretrained(place / "model")
    lines, others = run("allocations", *options)
    assert not any("was there" in line for line in lines) and others["dense"]["losses"] != rows["dense"]["losses"]


@pytest.mark.parametrize(
    "script,options,message",
    [
        ("symbolic", ("--limit", "3"), "--limit is of tasks, and no row has any"),
        ("allocations", ("--limit", "3"), "unrecognized arguments: --limit 3"),
        ("allocations", ("--sparsities", "50%"), "'50%' is no share such as 0.5, and no pattern such as 2:4"),
        ("allocations", ("--sparsities", "50"), "'50' is no share"),
        ("allocations", ("--text", "nofile.txt"), "there is no file nofile.txt"),
        ("allocations", ("--tokens", "none.safetensors"), "there is no file none.safetensors"),
        ("compare", ("--tasks", "lost"), "tasks lost: "),
        ("compare", ("--tasks", "nosuch"), "no task 'nosuch'"),
    ],
)
def test_what_cannot_be_is_said_before_any_row(script, options, message, run, place, capsys):
    folder = EXAMPLES / ("smollm2" if script == "compare" else "benchmarks/tables")
    with pytest.raises(SystemExit) as ended:
        run(script, *options, *(("--folder", place / "out") if script == "compare" else ()), folder=folder)
    said = capsys.readouterr()
    assert message in said.err + str(ended.value) and said.out == ""
    assert not (place / "rows.jsonl").exists() and not (place / "out").exists()


def test_tasks_stand_beside_perplexities_and_are_missed_by_name(run):
    pytest.importorskip("lm_eval")
    options = ("--sparsities", "0.5", "--methods", "magnitude", "--limit", "8")
    lines, rows = run("zero_shot", *options, "--tasks", "next")
    assert rows["magnitude + dsa, 0.5"]["tasks"]["local_next"]["acc"]["error"] > 0
    assert cells(lines, "")[4] == "local_next (acc)" and "the first 8 questions" in "\n".join(lines)
    lines, _ = run("zero_shot", *options, "--tasks", "lost")
    assert len(cells(lines, "magnitude, 0.5")) == 5
    assert [line[:20] for line in lines if line.startswith("not run")] == ["not run: tasks lost:"]


def test_every_pattern_has_its_row(run):
    pytest.importorskip("lm_eval")
    options = ("--methods", "wanda", "--tasks", "next", "--pattern-tasks", "next", "--limit", "4")
    lines, rows = run("reasoning", *options)
    kept = {"2:4": 0.5, "4:8": 0.5, "6:8": 0.25, "8:16": 0.5}
    assert {name: rows[f"wanda, {name}"]["sparsity"] for name in kept} == pytest.approx(kept)
    assert all(len(cells(lines, f"wanda, {name}")) == 6 for name in ("0.5", *kept))


def test_seeds_draw_other_windows_and_are_summed_up(run):
    lines, rows = run("seeds", "--seeds", "0", "1", "--allocations", "uniform", "dsa")
    first, second = (rows[f"wanda + dsa, seed {seed}, 0.5"] for seed in (0, 1))
    assert first["losses"] != second["losses"]
    found = [first["perplexity"], second["perplexity"]]
    shown = f"{statistics.fmean(found):.2f} ± {statistics.stdev(found):.2f}"
    assert cells(lines, "wanda + dsa, 0.5")[1:3] == ["2", shown]


def test_metric_and_allocation_are_crossed(run):
    lines, rows = run("symbolic", "--sparsities", "0.6", "--metrics", "wanda", "ria", "nosuch")
    assert set(rows) == {"dense", *(f"{m} + {a}, 0.6" for m in ("wanda", "ria") for a in ("uniform", "dsa"))}
    assert len({rows[f"{m} + uniform, 0.6"]["perplexity"] for m in ("wanda", "ria")}) == 2
    assert sum("not run: nosuch" in line for line in lines) == 2


def test_a_comparison_leaves_a_table_and_the_best_model_with_page_and_card(run, place, monkeypatch):
    pytest.importorskip("matplotlib")
    names = ["wanda + searched", "alps"]
    options = ("--folder", place / "out", "--rows", *names, "--strategy", "curves", "--budget", "2k tokens")
    lines, rows = run("compare", *options, folder=EXAMPLES / "smollm2")
    assert cells(lines, "alps, 0.5") and (place / "out" / "table.md").read_text().splitlines()[0] in lines
    best = min((f"{name}, 0.5" for name in names), key=lambda name: rows[name]["perplexity"])
    folder = place / "out" / "model-0.5"
    dense, own = read_results(folder / "evaluation.json")
    assert (dense.sparsity, own.model) == (0, "model-0.5") and own.perplexity == rows[best]["perplexity"]
    assert DSAPruner.from_pretrained(folder).verify().holds
    assert f"{own.perplexity:.2f}" in (folder / "README.md").read_text() and (folder / "report.html").is_file()
    # a later run replaces it by what is better, and by nothing else; pages are drawn once here
    monkeypatch.setattr("best.Best.finish", lambda *_: [])
    _, rows = run("compare", *options, "--rows", "wanda + uniform", "wanda + dsa", folder=EXAMPLES / "smollm2")
    own = read_results(folder / "evaluation.json")[-1]
    assert own.perplexity == min(row["perplexity"] for name, row in rows.items() if name != "dense")


def test_the_long_form_has_every_row_at_three_sparsities(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks" / "tables")
    spec = importlib.util.spec_from_file_location("compare", EXAMPLES / "smollm2" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["compare.py", "--long"])
    args = module.parse()
    assert args.sparsities == ["0.5", "0.6", "0.7"] and args.samples is None and len(args.rows) == 21
    rows = module.rows_of("0.5")
    assert all(module.tables.config_of(row.settings, "0.5", args).sparsity == 0.5 for row in rows.values())
    assert all(row.against in rows for row in rows.values())


@pytest.fixture
def shapes(monkeypatch):
    """The module of pictures and of the model that is trained on them."""
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks" / "tables")
    return importlib.import_module("shapes")


def png(picture):
    picture.save(buffer := io.BytesIO(), "png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_questions_about_pictures_are_counted_as_they_are_answered_one_by_one(run, place, shapes):
    model, processor = shapes.new_model(place / "model")
    model.save_pretrained(place / "model")
    processor.save_pretrained(place / "model")
    save_file({"calibration": tokens(), "test": tokens(vocabulary=90)}, place / "tokens.safetensors")
    lines = []
    for number, row in enumerate(shapes.questions(13, seed=1)):
        row["question"] = " ".join(map(str, range(number, 2 * number + 1)))  # none is as long as another
        inputs = shapes.asked(processor, [row])
        found = model.eval().generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said = processor.tokenizer.decode(found, skip_special_tokens=True) if number % 4 else "something else"
        picture = {"png": png(row["picture"])}
        if number % 2:
            row["picture"].save(place / f"{number}.png")
            picture = {"image": f"{number}.png"}
        lines.append(json.dumps({"question": row["question"], "answer": said, **picture}))
    (place / "asked.jsonl").write_text("\n".join(lines))
    # LLaVA's own words behind a question would be unknown ones to this tokenizer
    options = ("--data", place / "asked.jsonl", "--words", "", "--samples", "3", "--new-tokens", "2")
    options += ("--batch-size", "4", "--methods", "wanda", "--sparsities", "0.5", "--text-sparsities", "0.2")
    shown, rows = run("vision", *options)
    assert rows["dense"]["tasks"]["asked"]["acc"]["value"] == 0.7  # of rows 3 to 12 those are wrong that 4 divides
    assert rows["wanda + dsa, 0.5"]["sparsity"] == pytest.approx(0.5, abs=2e-3)
    assert "tasks" not in rows["wanda, 0.2"]
    assert cells(shown, "wanda")[1].startswith(f"{rows['wanda, 0.2']['perplexity']:.2f}")
    written = (place / "rows.jsonl").read_text()
    again, _ = run("vision", *options)
    assert (place / "rows.jsonl").read_text() == written and sum("was there" in line for line in again) == 5


def test_a_model_of_pictures_is_trained_on_answers_alone(place, shapes):
    _, processor = shapes.new_model(place / "model")
    rows = shapes.questions(3, seed=0)
    rows = [{**row, "question": "1 2", "answers": [f"{number} 8"]} for number, row in enumerate(rows)]
    labels = shapes.asked(processor, rows, answered=True)["labels"]
    ends = [processor.tokenizer(f"{number} 8 <eos>", add_special_tokens=False)["input_ids"] for number in range(3)]
    assert [row[row != shapes.IGNORED].tolist() for row in labels] == ends
    for row in shapes.questions(60, seed=3):
        seen = {colour for _, colour in row["picture"].getcolors(shapes.SIZE**2)}
        [colour] = [name for name, value in shapes.COLOURS.items() if value in seen]
        meant = {"what colour is it?": row["answers"][0], "what shape is it?": colour}.get(row["question"])
        assert (meant == colour if meant else colour in row["question"]) or row["answers"] == ["no"]
    shapes.train(place / "llava", place / "model", steps=2, batch=4)
    loaded = type(shapes.new_model(place / "model")[0]).from_pretrained(place / "llava")
    assert json.loads((place / "llava" / shapes.TRAINING).read_text())["steps"] == 2
    eyes = [key for key in loaded.state_dict() if "vision_tower" in key]
    fresh = shapes.new_model(place / "model")[0].state_dict()
    assert any(not torch.equal(loaded.state_dict()[key], fresh[key]) for key in eyes)


def test_three_of_ten_people_make_an_answer_right(shapes):
    vision = importlib.import_module("vision")
    people = ["Red."] * 2 + ["blue"] * 5 + ["dark"] * 3
    assert [vision.right(one, people) for one in ("red", "blue", "dark", "green")] == [2 / 3, 1, 1, 0]
    assert vision.right(" Red\nand more", ["red"]) == 1
