"""Of weights that accelerate keeps elsewhere as much is cut as in memory, one block at a time."""

import hashlib

import accelerate
import pytest

from optimum_dsa import DSAPruner, DSAStructuredConfig, find_share, prune_structures
from optimum_dsa.pruning.structured import layout
from optimum_dsa.pruning.structured.slicing import cut_out

from ...tiny import tiny_llama, tokens
from .families import FAMILIES, batch_of


def on_disk(kind, path, folder):
    return kind.from_pretrained(path, device_map={"": "disk"}, offload_folder=folder)


def accelerate_cpu(kind, path, folder):
    return accelerate.cpu_offload(kind.from_pretrained(path), execution_device="cpu")


def accelerate_disk(kind, path, folder):
    return accelerate.disk_offload(kind.from_pretrained(path), folder, execution_device="cpu")


PLACES = [on_disk, accelerate_cpu, accelerate_disk]
BOTH = DSAStructuredConfig(0.3, ("ffn", "kv_group"), layout="per_layer", batch_size=2)
# tied and transposed; experts that share a parameter; two stacks; no biases but those that are given to it
CUTS = {
    "Llama": BOTH,
    "Llama with biases": DSAStructuredConfig(0.3, importance="flap", update="bias"),
    "GPT2": DSAStructuredConfig(0.3, ("ffn", "head"), layout="padded", targets="dense", residual=True),
    "Falcon": DSAStructuredConfig(0.3, importance="obs", reconstruct=2),
    "Mixtral": DSAStructuredConfig(0.3, ("expert", "kv_group")),
    "Qwen3Moe": DSAStructuredConfig(0.3, ("expert",), "magnitude", layout="per_layer", allocation="global"),
    "Bloom": DSAStructuredConfig(0.2, ("head",), layout="per_layer"),
    "T5": DSAStructuredConfig(0.1),
    "OPT": DSAStructuredConfig(0.5, ("block",)),
}


def digests(folder):
    files = (path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("family", "place"),
    [
        *((family, on_disk) for family in CUTS),
        *((family, accelerate_cpu) for family in CUTS),
        ("GPT2", accelerate_disk),
    ],
)
def test_what_is_saved_is_byte_for_byte_that_of_the_cut_in_memory(family, place, tmp_path):
    model, batch = FAMILIES[family][0](), batch_of(family, 4)
    model.save_pretrained(tmp_path / "dense")
    before = digests(tmp_path / "dense")
    expected = DSAPruner(type(model).from_pretrained(tmp_path / "dense"))
    found = DSAPruner(place(type(model), tmp_path / "dense", tmp_path / "offload"))
    for name, pruner in (("expected", expected), ("found", found)):
        pruner.prune(batch, CUTS[family])
        pruner.save_pretrained(tmp_path / name)
    assert found.report.structured.gone == expected.report.structured.gone
    assert found.report.structured.removed == expected.report.structured.removed > 0
    assert digests(tmp_path / "found") == digests(tmp_path / "expected")
    assert found.verify().holds and digests(tmp_path / "dense") == before


@pytest.mark.parametrize("place", PLACES)
def test_what_was_written_back_is_cut_once_more(place, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    kind = type(tiny_llama())
    pruners = [
        DSAPruner(kind.from_pretrained(tmp_path / "dense")),
        DSAPruner(place(kind, tmp_path / "dense", tmp_path)),
    ]
    for pruner, name in zip(pruners, ("expected", "found")):
        for sparsity in (0.2, 0.4):
            pruner.prune(tokens(), DSAStructuredConfig(sparsity, batch_size=2))
        pruner.save_pretrained(tmp_path / name)
    assert digests(tmp_path / "found") == digests(tmp_path / "expected")


def test_of_the_blocks_one_is_there_while_it_is_cut_and_then_none(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    model = on_disk(type(tiny_llama()), tmp_path, tmp_path / "offload")
    here = []

    def blocks_here():
        layers = enumerate(model.model.layers)
        return {number for number, layer in layers if not all(one.is_meta for one in layer.parameters())}

    def watched(model, structures, gone):
        here.append((structures.unit, blocks_here()))
        return cut_out(model, structures, gone)

    monkeypatch.setattr(layout, "cut_out", watched)
    prune_structures(model, tokens(), BOTH)
    assert here == [(unit, {int(unit.split(".")[2].partition(":")[0])}) for unit, _ in here]
    assert here
    assert not blocks_here()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"importance": "taylor"}, "importance='taylor' takes gradients of the whole model, and some of its weights"),
        ({"learner": "projected_gates"}, "learner='projected_gates' trains the whole model"),
        ({"allocation": "fisher", "layout": "per_layer"}, "allocation='fisher' takes gradients of the whole model"),
        ({"allocation": "milp", "layout": "per_layer"}, "allocation='milp' changes and puts back the whole model"),
        ({"cost": "latency"}, "cost='latency' is timed where the weights are"),
        ({"sparsity": 0.0, "max_loss": "5%"}, "max_loss changes the whole model and puts it back"),
        ({"update": "bias"}, r"update='bias' gives matrices biases \(mlp_bias\)"),
        ({"reconstruct": {"steps": 1, "span": 2}}, "span=2 trains blocks together"),
    ],
)
def test_what_needs_the_whole_model_is_refused_by_name(asked, message):
    model = accelerate.cpu_offload(tiny_llama(), execution_device="cpu")
    with pytest.raises(ValueError, match=message) as raised:
        prune_structures(model, tokens(), DSAStructuredConfig(**{"sparsity": 0.2, **asked}))
    assert "\n" not in str(raised.value)


def test_heads_that_go_alike_from_all_blocks_stay_and_it_is_said():
    model = accelerate.cpu_offload(FAMILIES["T5"][0](), execution_device="cpu")
    with pytest.raises(ValueError, match="no head that could be cut out .*has to be tried on all of them at once"):
        prune_structures(model, batch_of("T5"), DSAStructuredConfig(0.1, ("head",)))


def test_shares_are_not_tried_on_it():
    model = accelerate.cpu_offload(tiny_llama(), execution_device="cpu")
    with pytest.raises(ValueError, match="max_loss changes the whole model and puts it back"):
        find_share(model, tokens(), DSAStructuredConfig(0.2), "5%")
    with pytest.raises(ValueError, match="A search changes the whole model and puts it back"):
        DSAPruner(model).search(tokens(), BOTH, tokens(8, 16, seed=5))
