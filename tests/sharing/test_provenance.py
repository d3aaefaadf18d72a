import json
import shlex

import pytest

from optimum_dsa import (
    ALLOCATIONS,
    METHODS,
    METRICS,
    PERMUTATIONS,
    PRE_PROCESS,
    REDUCTION,
    UPDATES,
    Allocation,
    DataConfig,
    DSAConfig,
    ReconstructConfig,
    UpdateConfig,
)
from optimum_dsa.commands.base import asked_source
from optimum_dsa.commands.prune import asked_config
from optimum_dsa.data import describe
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.recovery.configuration import RecoveryConfig
from optimum_dsa.recovery.recoveries import RECOVERIES
from optimum_dsa.sharing.provenance import (
    command,
    dataset_id,
    last_part,
    names_data,
    papers,
    recover_command,
    without_places,
)

from ..test_docs import commands


UPDATE = UpdateConfig("sparsegpt", damping=0.1)
GIVEN = Allocation({"layers.0": 0.5, "layers.1": 0.7}, {"layers.0": 10, "layers.1": 10}, "mine")
CONFIGS = [
    DSAConfig(0.6),
    DSAConfig(0.7, "sparsegpt", "owl", sequential=False, data=DataConfig(num_samples=64, sequence_length=512, seed=3)),
    DSAConfig(0.5, "magnitude", "uniform", pattern="2:4", exclude=["layers.0", "*.down_proj.weight"]),
    DSAConfig(0.5, "ria", "abslog/var/atan,asin/no_op@+0.08", spread=0.1, granularity="matrix", skip_unprunable=True),
    DSAConfig(0.5, metric="ria", allocation_metric="magnitude", max_sparsity=0.8, update=UPDATE),
    DSAConfig(0.5, data=DataConfig(bos=False)),
    DSAConfig(0.5, data=DataConfig(bos=True)),
    DSAConfig(0.5, update=UpdateConfig(true_sequential=True)),
    DSAConfig(0.5, "sparsegpt", update=UpdateConfig(true_sequential=True, targets="dense", residual=True)),
    DSAConfig(0.5, "alps", reconstruct=ReconstructConfig(64, rate=1e-3, span=2)),
    DSAConfig(0.5, reconstruct=ReconstructConfig(8, apart=True)),
    DSAConfig(
        0.6, allocation=GIVEN, batch_size=2, include=["lm_head"], data=DataConfig(split="test", text_column="code")
    ),
]


def facts(config, source="calibration.txt", base="org/model", revision=None):
    return {
        "config": config.to_dict(),
        "allocation": GIVEN.to_dict(),
        "base_model": {"name": base, "revision": revision},
        "calibration": {"source": source, "samples": 4, "length": 8},
    }


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_command_asks_for_the_same_config(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dsa_config.json").write_text(json.dumps(facts(config)))
    line = command(facts(config, revision="abc"))
    args = commands().parse_args(shlex.split(line)[1:])
    asked = asked_config(args)
    if isinstance(config.allocation, Allocation):
        assert asked.given_allocation() == config.allocation
    assert {**asked.to_dict(), "allocation": None} == {**config.to_dict(), "allocation": None}
    assert (args.model, asked_source(args), args.revision) == ("org/model", "calibration.txt", "abc")


def test_the_command_names_several_sources_with_their_weights():
    source = {"wikitext2": 3.0, "code.jsonl": 0.5}
    line = command(facts(DSAConfig(0.5), source=describe(source)))
    assert asked_source(commands().parse_args(shlex.split(line)[1:])) == source
    assert "YOUR_TEXT" in command(facts(DSAConfig(0.5), source=describe({("a", "b"): 3.0, "c.txt": 1.0})))


def test_texts_from_python_have_no_name():
    assert not names_data("3 texts") and not names_data("tensor") and names_data("wikitext2")
    assert "--dataset YOUR_TEXT" in command(facts(DSAConfig(0.5), "3 texts"))
    assert "--dataset" not in command({**facts(DSAConfig(0.5)), "calibration": None})


def test_a_dataset_has_an_id_where_it_is_on_the_hub():
    assert dataset_id("wikitext2") == "Salesforce/wikitext" and dataset_id("org/data") == "org/data"
    assert dataset_id("test.txt") is None and dataset_id("./data/x") is None and dataset_id("3 texts") is None


@pytest.mark.parametrize(
    "table,field",
    [
        (METHODS, "method"),
        (ALLOCATIONS, "allocation"),
        (METRICS, "metric"),
        (PERMUTATIONS, "permute"),
        (UPDATES, "update"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_every_part_that_was_published_is_cited(table, field):
    for name in table:
        cited = papers(
            {**DSAConfig(0.5, "magnitude", "uniform").to_dict(), field: {"name": name} if field == "update" else name}
        )
        assert cited.get(f"{table.kind} {name}") == table.references[name]


def test_the_parts_of_a_function_and_a_search_are_cited():
    config = {"method": "wanda", "allocation": "sigmoid/var/atan/no_op@+0.1", "allocation_metric": "ria"}
    assert {f"{PRE_PROCESS.kind} sigmoid", f"{REDUCTION.kind} var", "metric ria"} <= papers(config).keys()
    searched = {"method": "wanda", "allocation": {"name": "level_switch", "sparsity": {}}}
    assert papers(searched)["search strategy level_switch"] == "https://arxiv.org/abs/2410.14649"
    offset = {"allocation": {"name": "owl, spread 0.1, up_proj +0.02"}}
    assert papers(offset)["allocation owl"] == ALLOCATIONS.references["owl"]


@pytest.mark.parametrize(
    "text,kept",
    [
        ("/home/jane/cal.txt", "cal.txt"),
        ("~/cal.txt", "cal.txt"),
        ("../cal.txt", "cal.txt"),
        ("C:\\Users\\jane\\cal.txt", "cal.txt"),
        ("\\\\server\\share\\cal.txt", "cal.txt"),
        ("file:///home/jane/cal.txt", "cal.txt"),
        ("/home/jane/data/", "data"),
        ("org/model", "org/model"),
        ("abslog/var/atan,asin/no_op@+0.08", "abslog/var/atan,asin/no_op@+0.08"),
        ("*.down_proj.weight", "*.down_proj.weight"),
        ("2:4", "2:4"),
        ("/", "/"),
    ],
)
def test_paths_are_cut_and_other_text_is_not(text, kept):
    assert last_part(text) == kept


def test_an_allocation_from_a_file_is_written_out():
    cut = without_places({**facts(DSAConfig(0.6)), "config": {"sparsity": 0.6, "allocation": "runs/found"}})
    assert DSAConfig.from_dict(cut["config"]).allocation == GIVEN
    for name in ("owl", "abslog/var/atan,asin/no_op@+0.08"):
        assert without_places(facts(DSAConfig(0.6, allocation=name)))["config"]["allocation"] == name


def test_a_dense_model_that_was_trained_sparse_is_made_by_one_command_and_its_paper_is_cited():
    config = RecoveryConfig("elsa", sparsity=0.8, penalty=0.5)
    recovery = {"config": config.to_dict(), "data": {"train": "wikitext2"}}
    words = shlex.split(recover_command(recovery, "me/dense"))
    assert words[:6] == ["optimum-cli", "dsa", "recover", "me/dense", "-o", "OUT"]
    assert " --sparsity 0.8 --penalty 0.5" in " ".join(words)
    # its config is a budget, whose method pruned nothing
    assert papers(DSAConfig(0.8, "magnitude", "er").to_dict(), [recovery]) == {
        "allocation er": ALLOCATIONS.references["er"],
        "recovery method elsa": RECOVERIES.references["elsa"],
    }


def test_every_training_is_cited_with_the_mode_of_its_adapters():
    config = DSAConfig(0.8, "magnitude", "uniform").to_dict()
    trainings = [{"config": one.to_dict()} for one in (RecoveryConfig("elsa"), RecoveryConfig(mode="spp"))]
    assert papers(config, trainings).keys() - papers(config).keys() == {"recovery method elsa", "mode spp"}
    assert "mode mask" not in papers(config, [{"config": RecoveryConfig("full").to_dict()}, {"kind": "DSACallback"}])


@pytest.mark.parametrize(
    ("structures", "cited"),
    [
        (("ffn",), {"importance wanda_sp"}),
        (("ffn", "expert"), {"importance wanda_sp", "importance reap"}),
        (("block",), {"importance block_influence"}),
        (("attention",), {"importance block_influence", "attention, mlp"}),
    ],
)
def test_a_cut_cites_what_scored_what_went(structures, cited):
    config, cut = DSAConfig(0.5).to_dict(), DSAStructuredConfig(0.2, structures, layout="per_layer").to_dict()
    found = papers(config, cuts=[cut])
    assert {name for name in found.keys() - papers(config).keys() if "allocation" not in name} == cited
    assert papers(config, cuts=[{**cut, "importance": "no such"}]).keys() <= found.keys()
