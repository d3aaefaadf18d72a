"""What was measured of speed, as a table and as a file, which a stranger may have made."""

import json

import pytest

from optimum_dsa import Speed, SpeedComparison, read_speed, save_speed


ONE, OTHER = Speed("a", 150.0, 30.0, 10, 40, 8), Speed("b", 100.0, 20.0, 20, 80, 16)
FULL = Speed("c", 300.0, 60.0, 20, 20, 16, 4, None, 10**9, 12, 2 * 10**6, 3 * 10**6)
HOW = (8, 2, 1, 3, 1, "cpu", "float32")


def test_what_is_said_has_a_ratio_of_two():
    said = str(SpeedComparison({"a": ONE, "b": OTHER}, *HOW)).splitlines()
    assert said[0].split() == ["a", "b", "ratio"]
    assert said[1].split() == ["prefill,", "tokens/s", "150", "100", "1.50"]
    assert said[2].split()[-3:] == ["30.0", "20.0", "1.50"] and said[3].split()[-3:] == ["10", "20", "0.50"]
    assert not any(word in line for line in said for word in ("cache", "peak", "packed", "resident", "bandwidth"))
    assert said[-1] == "prompt 8, 2 new tokens, batch 1, best of 3; cpu, float32, 1 threads"


def test_more_than_two_are_held_against_the_last_and_what_is_not_known_of_one_is_a_dash():
    found = SpeedComparison({"c": FULL, "a": ONE, "b": OTHER}, *HOW, 240e9, "A chip, 2 cores", "2026-01-31")
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[0] == ["c", "a", "b"]
    assert ["prefill,", "times", "the", "last", "3.00", "1.50", "1.00"] in lines
    assert ["decode,", "times", "the", "last", "3.00", "1.50", "1.00"] in lines
    assert ["of", "them", "packed", "12", "B", "–", "–"] in lines
    assert ["of", "the", "memory's", "bandwidth", "25%", "–", "–"] in lines
    assert ["resident", "memory", "2", "MB", "–", "–"] in lines
    assert found.where == "A chip, 2 cores, memory reads 240 GB/s (measured), 2026-01-31" == " ".join(lines[-1])


def test_one_alone_has_no_ratio():
    assert str(SpeedComparison({"c": FULL}, *HOW)).splitlines()[1].split() == ["prefill,", "tokens/s", "300"]


def test_a_file_gives_back_what_was_saved_and_replaces_nothing_else(tmp_path):
    found = SpeedComparison({"c": FULL, "b": OTHER}, *HOW, 240e9, "A chip", "2026-01-31")
    for _ in range(2):
        save_speed(tmp_path / "speed.json", found)
    assert read_speed(tmp_path / "speed.json") == found
    assert json.loads((tmp_path / "speed.json").read_text())["versions"]["torch"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileExistsError, match="other.json exists and holds no speeds"):
        save_speed(tmp_path / "other.json", found)
    assert (tmp_path / "other.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speeds": {}}, "Expected speeds"),
        ({"speeds": {"c": 3}}, "Expected an object, got 3"),
        ({"speeds": {"c": {"model": "c"}}}, "prefill is float, got None"),
        ({"prompt": -1}, "prompt is int, got -1"),
        ({"prompt": True}, "prompt is int, got True"),
        ({"device": None}, "device is str, got None"),
        ({"bandwidth": 0}, "bandwidth is float, got 0"),
        ({"machine": 5}, "machine is str, got 5"),
        ({"date": ["x"]}, "date is str"),
        ({"decode": 0.0}, "decode is float, got 0.0"),
        ({"decode": float("inf")}, "decode is float, got inf"),
        ({"read_bytes": 1.5}, "read_bytes is int, got 1.5"),
        ({"model": 7}, "model is str, got 7"),
    ],
)
def test_what_no_measurement_can_have_is_refused(tmp_path, change, message):
    data = SpeedComparison({"c": FULL}, *HOW, 240e9, "A chip", "2026-01-31").to_dict()
    for name, value in change.items():
        (data if name in data else data["speeds"]["c"])[name] = value
    (tmp_path / "speed.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"speed.json holds no speeds: {message}"):
        read_speed(tmp_path / "speed.json")


@pytest.mark.parametrize("data", ["[]", '{"models": []}', "3", "null"])
def test_another_file_holds_no_speeds(tmp_path, data):
    (tmp_path / "speed.json").write_text(data)
    with pytest.raises(ValueError, match="Expected speeds"):
        read_speed(tmp_path / "speed.json")


def test_an_older_file_lacks_what_was_not_measured_then():
    data = SpeedComparison({"a": ONE}, *HOW).to_dict()
    for name in ("bandwidth", "machine", "date", "versions"):
        del data[name]
    for name in ("cache_bytes", "peak_bytes", "read_bytes", "packed_bytes", "resident_bytes", "file_bytes"):
        del data["speeds"]["a"][name]
    assert SpeedComparison.from_dict(data) == SpeedComparison({"a": ONE}, *HOW)
