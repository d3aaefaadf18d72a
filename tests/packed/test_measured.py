"""A table remembers what was measured, and has no kernel whose product is not PyTorch's."""

import json

import pytest
import torch

from optimum_dsa.packed.measured import Table, read, shown


def test_a_kernel_whose_product_is_wrong_is_not_in_the_table(tmp_path, caplog):
    table, output, expected = Table(tmp_path / "table.json"), torch.empty(1, 4), torch.arange(4.0)[None]

    def wrong():
        output.copy_(expected)[0, 3] += 1

    def fails():
        raise RuntimeError("error 1700")

    ways = {"right": lambda: output.copy_(expected), "wrong": wrong, "fails": fails, "idle": lambda: None}
    row = table.measure("some", ways, output, expected, {"unpacked": expected.clone, "dense": expected.clone})
    assert set(row) == {"right", "unpacked", "dense"}
    assert "away from PyTorch's" in caplog.text and "1700" in caplog.text
    assert Table(tmp_path / "table.json").rows == {"some": row}


@pytest.mark.parametrize("best", ["a", "b", "unpacked"])
def test_the_fastest_is_taken_and_a_dense_weight_never(best):
    table = Table()
    table.rows["some"] = {name: float(name != best) for name in ("a", "b", "unpacked")} | {"dense": -1.0}
    assert table.fastest("some", ("a", "b")) == (None if best == "unpacked" else best)
    assert table.fastest("some", ("b",)) == (None if best == "unpacked" else "b")  # of a table of more


def test_rows_of_another_process_are_kept(tmp_path):
    file = tmp_path / "folder" / "table.json"
    first, second = Table(file), Table(file)
    first.rows["one"], second.rows["two"] = {"a": 1.0}, {"a": 2.0}
    first.save()
    second.save()
    assert json.loads(file.read_text()) == {"one": {"a": 1.0}, "two": {"a": 2.0}} == Table(file).rows
    Table().save()


def test_where_no_file_can_be_a_table_serves_its_process(tmp_path, caplog):
    (tmp_path / "folder").write_text("a file")
    table, output = Table(tmp_path / "folder" / "table.json"), torch.ones(1, 4)
    row = table.measure("some", {"a": lambda: output.fill_(1)}, output, torch.ones(1, 4), {"unpacked": output.clone})
    assert table.rows == {"some": row} and "is for this process alone" in caplog.text


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"some": 1}', '{"some": {"a": "fast"}}'])
def test_a_damaged_table_is_made_anew(content, tmp_path, caplog):
    file = tmp_path / "table-card.json"
    file.write_text(content)
    table = Table(file)
    assert table.rows == {} and f"{file} holds no table" in caplog.text
    table.rows["some"] = {"a": 1.0}
    table.save()
    assert read(file) == {"some": {"a": 1.0}}


def test_what_was_measured_is_shown_a_card_after_another(tmp_path):
    assert shown(tmp_path) == shown(tmp_path / "nothing") == ""
    for name, kinds in (("table-A.json", {"x": {}, "y": {}}), ("table-B.json", {}), ("other.json", {"x": {}})):
        (tmp_path / name).write_text(json.dumps(kinds))
    assert (
        shown(tmp_path)
        == f"2 kinds of product in {tmp_path / 'table-A.json'}, 0 kinds of product in {tmp_path / 'table-B.json'}"
    )
