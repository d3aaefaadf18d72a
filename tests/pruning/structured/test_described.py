"""What was cut out, written down and read again."""

import json

import pytest

from optimum_dsa import DSAStructuredConfig, prune_structures
from optimum_dsa.pruning.structured.described import (
    after,
    by_kind,
    disagreements,
    parameters_before,
    renamed,
    stay_of,
    structured_from,
    structured_to,
    widths,
    widths_in,
)

from ...tiny import tiny_llama, tokens
from .families import FAMILIES, batch_of


@pytest.fixture(scope="module")
def cuts():
    """Two, one after the other: of channels, and of channels again with groups."""
    model = tiny_llama()
    first = prune_structures(model, tokens(), DSAStructuredConfig(0.1, reconstruct={"steps": 1, "rate": 1e-4}))
    second = prune_structures(model, tokens(), DSAStructuredConfig(0.3, ("kv_group", "ffn"), importance="flap"))
    return model, first, second


def test_what_is_written_is_read_again(cuts):
    _, first, second = cuts
    for report in (first, after(second, first)):
        data = json.loads(json.dumps(structured_to(report)))
        assert structured_to(structured_from(data)) == data and list(disagreements(data)) == []
        found = structured_from(data)
        assert (found.config, found.gone, found.places) == (report.config, report.gone, report.places)
        assert str(found) == str(report)


def test_two_cuts_are_one_history(cuts):
    """Widths are the last ones, of how many there were at first, and stand in the matrices."""
    model, first, second = cuts
    both = after(second, first)
    assert both.earlier == (first,) and after(first, None) is first
    found = widths(both)
    assert {unit: place.count(model) for unit, (_, _, place) in found.items()} == {
        u: n for u, (n, _, _) in found.items()
    }
    data = structured_to(both)
    assert widths_in(data) == {unit: (stay, were) for unit, (stay, were, _) in found.items()}
    assert found["model.layers.1:ffn"][:2] == (second.kept["model.layers.1:ffn"], 48)
    assert parameters_before(data) == first.parameters == first.removed + second.parameters
    assert after(both, first).earlier == (first, first)


@pytest.mark.parametrize("family", ["GPT2", "Falcon", "GPTNeoX", "Bert"])
def test_structures_are_counted_in_every_form_of_matrix(family):
    make, kinds = FAMILIES[family]
    model = make()
    calibration = {name: value.repeat(4, 1) for name, value in batch_of(family).items()}
    report = prune_structures(model, calibration, DSAStructuredConfig(0.1, tuple(kinds), layout="per_layer"))
    assert {unit: place.count(model) for unit, place in report.places.items()} == report.kept


def test_names_of_another_model(cuts):
    def short(name):
        return name.removeprefix("model.")

    report = renamed(after(cuts[2], cuts[1]), short)
    assert set(report.kept) == {short(unit) for unit in cuts[2].kept}
    assert report.places["layers.0:ffn"].matrix == "layers.0.mlp.down_proj.weight"
    assert set(report.earlier[0].reconstruction) == {f"layers.{number}" for number in range(3)}


def test_what_stays_by_kind():
    found = {"layers.0:ffn": (34, 48), "layers.1:ffn": (40, 48), "layers.1:head": (3, 4), "layers.1:head.1": (4, 4)}
    assert stay_of(found) == "ffn: 34 to 40 of 48 stay, head: 3 to 4 of 4 stay"
    assert by_kind(found)["head"] == {"layers.1": (3, 4), "layers.1:1": (4, 4)}


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda data: data["units"]["model.layers.0:ffn"].update(kept=1), "keeps 1 of 48 structures"),
        (lambda data: data["units"]["model.layers.0:ffn"].update(gone="3-60"), "as in '0-3,7', got '3-60'"),
        (lambda data: data["units"]["model.layers.0:ffn"].update(gone="9-3"), "as in '0-3,7', got '9-3'"),
        (lambda data: data["units"]["model.layers.0:ffn"].update(gone="many"), "as in '0-3,7', got 'many'"),
        (lambda data: data.update(removed=1), "structured.removed is 1, and the structures that went"),
        (lambda data: data.update(sparsity=0.5), "structured.sparsity is 0.5, and its counts make"),
    ],
)
def test_what_contradicts_itself_is_named(cuts, change, message):
    data = structured_to(cuts[1])
    change(data)
    assert any(message in found for found in disagreements(data))
    assert any(message in found for found in disagreements({**structured_to(cuts[1]), "earlier": [data]}))


def test_numbers_that_are_none_are_refused(cuts):
    data = structured_to(cuts[1])
    data["units"]["model.layers.0:ffn"]["gone"] = "0-999999999"
    with pytest.raises(ValueError, match="numbers of 48 structures"):
        structured_from(data)
