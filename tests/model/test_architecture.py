import json
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
import transformers as tf
from torch import nn

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.model.architecture import UnprunableError, find_architecture, find_stacks
from optimum_dsa.model.walk import walk_blocks

from ..conftest import FAMILIES, VOCABULARY


def parameter_names(architecture):
    """Names of the parameters behind the prunable weights."""
    return {f"{weight.module}.{weight.attribute}" for weight in architecture.weights}


def zeros(model, weights):
    return sum(int((weight.tensor(model) == 0).sum()) for weight in weights)


def halved(model, inputs, **options):
    """The model pruned to 50 %, and the report."""
    return model, DSAPruner(model).prune(inputs, DSAConfig(**{"sparsity": 0.5, "allocation": "uniform"} | options))


@pytest.mark.contract
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_a_weight_or_dense_for_a_reason(family, tiny):
    model = tiny(family)
    found = find_architecture(model)
    prunable = parameter_names(found)
    for block in found.blocks:
        for name, parameter in model.get_submodule(block.name).named_parameters(prefix=block.name):
            if parameter.dim() >= 2:
                assert (name in prunable) != bool(found.dense.get(name)), name
    for weight in found.weights:
        parameter = model.get_parameter(f"{weight.module}.{weight.attribute}")
        assert weight.shape == tuple(weight.tensor(model).shape)
        assert weight.tensor(model).untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert len(found.weights) == len(set(found.weights))
    # Nothing of a parameter is counted twice, or forgotten.
    idle = sum(size for name, size in found.dense_sizes.items() if "[" in name)
    assert sum(w.size for w in found.weights) + idle == sum(model.get_parameter(name).numel() for name in prunable)


@pytest.mark.parametrize(
    ("family", "allocation"),
    [(family, "uniform") for family in FAMILIES] + [(family, "dsa") for family in ("gpt2", "gemma3", "mixtral", "t5")],
)
def test_half_of_the_weights_go_and_nothing_else_changes(family, allocation, tiny, inputs):
    before = tiny(family).state_dict()
    model, report = halved(tiny(family), inputs(family), allocation=allocation)
    found = find_architecture(model)
    size = sum(weight.size for weight in found.weights)
    assert zeros(model, found.weights) == report.removed == round(0.5 * size)
    for block in found.blocks:
        asked = round(report.allocation.sparsity[block.name] * block.size)
        assert zeros(model, block.weights) == asked
        assert allocation == "dsa" or asked == round(0.5 * block.size)
    prunable = parameter_names(found)
    for name, value in model.state_dict().items():
        kept = value != 0 if name in prunable else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[kept], before[name][kept]), name


@pytest.mark.parametrize("family", ["llava", "aya_vision"])
def test_of_several_towers_the_language_model_is_pruned(family, tiny):
    found = find_architecture(tiny(family))
    assert found.weights and all(".language_model." in f".{weight.name}" for weight in found.weights)
    vision = find_architecture(tiny(family), blocks=["model.vision_tower.encoder.layers"])
    assert vision.weights and all(".vision_tower." in weight.name for weight in vision.weights)


def test_a_tower_of_another_configuration_is_left_alone_even_if_it_is_the_largest():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = sizes | {"num_hidden_layers": 3, "image_size": 8, "patch_size": 4}
    model = tf.GitForCausalLM(tf.GitConfig(vision_config=vision, vocab_size=VOCABULARY, num_hidden_layers=1, **sizes))
    assert find_stacks(model) == ["git.encoder.layer"]


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_of_an_encoder_decoder_both_stacks_are_pruned(family, tiny):
    first, second = find_architecture(tiny(family)).stacks
    assert "encoder" in first.name and "decoder" in second.name


def test_an_encoder_decoder_of_two_models_is_pruned_whole():
    text = tf.BertConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    model = tf.EncoderDecoderModel(tf.EncoderDecoderConfig.from_encoder_decoder_configs(text, text))
    assert find_stacks(model) == ["encoder.encoder.layer", "decoder.bert.encoder.layer"]


def test_stacks_are_walked_in_the_order_of_the_model(tiny):
    found = find_architecture(tiny("t5"), blocks=["decoder.block", "encoder.block"])
    assert [stack.name for stack in found.stacks] == ["encoder.block", "decoder.block"]


LOADER = """
import hashlib, json, sys, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
for folder, auto in json.loads(sys.argv[1]).items():
    state = getattr(transformers, auto).from_pretrained(folder).state_dict()
    print(json.dumps([folder, {n: hashlib.sha256(v.numpy().tobytes()).hexdigest() for n, v in state.items()}]))
assert "optimum_dsa" not in sys.modules
"""


def test_pruned_models_load_elsewhere_with_equal_weights(tiny, inputs, tmp_path):
    states = {}
    for family in FAMILIES:
        pruner = DSAPruner(tiny(family))
        pruner.prune(None, DSAConfig(sparsity=0.5, method="magnitude", allocation="uniform"))
        pruner.save_pretrained(tmp_path / family)
        states[family] = pruner.model.state_dict()
    folders = {str(tmp_path / family): FAMILIES[family].auto for family in FAMILIES}
    done = subprocess.run([sys.executable, "-c", LOADER, json.dumps(folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = dict(json.loads(line) for line in done.stdout.splitlines())
    for family, state in states.items():
        hashes = {name: sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}
        assert loaded[str(tmp_path / family)] == hashes, family


ROUTED = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jetmoe", "llama4", "dbrx", "qwen3_next"]


@pytest.mark.parametrize("family", ROUTED)
def test_routers_stay_dense(family, tiny):
    model = tiny(family)
    dense = find_architecture(model).dense
    routers = {name for name, why in dense.items() if why == "router of experts"}
    assert routers and all(model.get_parameter(name).shape[0] == 4 for name in routers)
    assert routers == {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and (".router." in name or ".gate." in name)
    }


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("model.layers.0.mlp.down_proj.weight", 1),
        ("model.layers.0.mlp.down_proj", 1),
        ("down_proj", 2),
        ("layers.1", 7),
        ("mlp", 6),
        ("*.q_proj.weight", 2),
        ("model.layers.*.self_attn", 8),
        ("model.layers.[0]*", 7),
    ],
)
def test_exclude_takes_names_parts_and_patterns(pattern, gone, tiny):
    found = find_architecture(tiny("llama"), exclude=[pattern])
    assert len(found.weights) == 14 - gone
    assert list(found.dense.values()) == ["excluded"] * gone


def test_exclude_takes_an_experts_parameter_whole(tiny):
    found = find_architecture(tiny("mixtral"), exclude=["layers.0.mlp.experts.down_proj"])
    assert len(found.weights) == 24 - 4


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"exclude": ["down_prj"]}, "down_proj"),
        ({"exclude": ["lm_head"]}, "of its blocks"),
        ({"include": ["lm_hed"]}, "lm_head"),
        ({"include": ["q_proj"]}, "outside its blocks"),
        ({"include": ["model.norm"]}, "norm"),
        ({"blocks": ["model.layer"]}, "model.layers"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_with_a_near_name(options, hint, tiny):
    with pytest.raises(ValueError, match=hint):
        find_architecture(tiny("llama"), **options)


def test_a_model_with_everything_excluded_is_refused(tiny):
    with pytest.raises(UnprunableError, match="no weight left"):
        find_architecture(tiny("llama"), exclude=["layers"])


def test_included_head_counts_in_the_budget(tiny, inputs):
    model, report = halved(tiny("llama"), inputs("llama"), include=("lm_head",))
    found = find_architecture(model, include=["lm_head"])
    assert found.head.weights[0].name == "lm_head.weight"
    assert zeros(model, found.weights) == report.removed == round(0.5 * sum(weight.size for weight in found.weights))
    assert zeros(model, found.head.weights) == round(0.5 * found.head.size)


def test_exclude_takes_back_what_include_names(tiny):
    found = find_architecture(tiny("llama"), include=["*"], exclude=["embed_tokens"])
    assert [weight.name for weight in found.head.weights] == ["lm_head.weight"]


@pytest.mark.contract
def test_a_shared_embedding_is_pruned_once():
    config = tf.LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                            num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    found = find_architecture(model, include=["lm_head", "embed_tokens"])
    assert [weight.name for weight in found.head.weights] == ["lm_head.weight"]  # which has inputs to score by


@pytest.mark.parametrize("family", ["gemma", "gpt2", "t5", "bert"])
def test_half_of_a_shared_matrix_is_not_pruned_without_a_word(tiny, family):
    names = {"bert": "cls.predictions.decoder"}
    with pytest.raises(UnprunableError, match="are one matrix in this model.*include '.*' as well, or else leave"):
        find_architecture(tiny(family), include=[names.get(family, "lm_head")])
    with pytest.raises(UnprunableError, match="are one matrix"):
        find_architecture(tiny(family), include=["*"], exclude=[names.get(family, "lm_head")])


class Layer(nn.Module):
    """A block: a map, and what a test adds to it."""

    def __init__(self, size, **parts):
        super().__init__()
        self.map = nn.Linear(size, size)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, hidden_states):
        return hidden_states + self.map(hidden_states)


class Toy(tf.PreTrainedModel):
    """Embeddings, blocks, and a forward that may do something else than running one block after the other."""

    config_class = tf.PreTrainedConfig

    def __init__(self, layers=None, between=None, rounds=1):
        super().__init__(tf.PreTrainedConfig())
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = layers
        self.between, self.rounds = between or (lambda hidden: hidden), rounds

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        for _ in range(self.rounds):
            for layer in self.layers:
                hidden = self.between(layer(hidden))
        return hidden


def layers(count=3, **parts):
    return nn.ModuleList(Layer(8, **{name: part() for name, part in parts.items()}) for _ in range(count))


def walk(model, **options):
    found = find_architecture(model, **options)
    batches = [{"input_ids": torch.arange(12).view(2, 6)}]
    return [block.name for block in walk_blocks(model, found, batches)]


def test_a_model_made_of_blocks_is_walked_whatever_it_is_called():
    assert walk(Toy(layers())) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("model", "what", "way_out"),
    [
        (lambda: Toy(nn.ModuleList(nn.Linear(8, 8) for _ in range(3))), "Toy", "blocks="),
        (lambda: tf.ResNetModel(tf.ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)), "ResNet", "blocks="),
        (lambda: Toy(layers(mix=lambda: nn.Conv1d(8, 8, 3))), r"layers\.0\.mix\.weight \(Conv1d", "skip_unprunable"),
        (lambda: Toy(layers(mix=lambda: nn.Bilinear(8, 8, 8))), r"layers\.0\.mix\.weight \(Bilinear", "exclude="),
        (lambda: Toy(layers(), rounds=2), r"layers\.0 out of order or more than once", "blocks="),
        (lambda: Toy(layers(), between=lambda hidden: hidden * 2), r"between the blocks before layers\.1", "blocks="),
        (
            lambda: Toy(layers(), between=lambda hidden: hidden.mul_(2)),
            r"between the blocks before layers\.1",
            "no inputs",
        ),
        (
            lambda: tf.AlbertForMaskedLM(
                tf.AlbertConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=32,
                    intermediate_size=48,
                    num_attention_heads=4,
                    embedding_size=16,
                    num_hidden_layers=3,
                )  # fmt: skip
            ),
            r"albert_layer_groups\.0 out of order or more than once",
            "no inputs",
        ),
    ],
    ids=["single maps", "convolutions", "conv", "bilinear", "twice", "between", "between in place", "albert"],
)
def test_what_cannot_be_pruned_is_refused_by_name_with_a_way_out(model, what, way_out):
    with pytest.raises(UnprunableError, match=what) as error:
        walk(model())
    assert way_out in str(error.value)


def test_what_cannot_be_pruned_stays_dense_on_request_and_its_share_is_told():
    model = Toy(layers(mix=lambda: nn.Conv1d(8, 8, 3))).eval()
    with pytest.raises(UnprunableError, match="cannot be pruned") as error:
        find_architecture(model)
    # 3 · 8 · 8 beside 8 · 8, in each of three blocks
    left = "75.0% of the blocks' weights: layers.*.mix.weight 75.0%"
    assert f"exclude=['layers.*.mix.weight'] or skip_unprunable=True: then dense are {left}" in str(error.value)
    before = model.state_dict()["layers.1.mix.weight"].clone()
    model, report = halved(model, None, skip_unprunable=True, method="magnitude")
    assert report.sparsity == 0.5 and report.dense_sizes == {f"layers.{index}.mix.weight": 192 for index in range(3)}
    assert left in str(report)
    assert torch.equal(model.state_dict()["layers.1.mix.weight"], before)
    assert find_architecture(model, exclude=["layers.*.mix.weight"]).dense_sizes == report.dense_sizes


def test_blocks_that_are_handed_what_others_compute_are_refused():
    class Gated(Layer):
        def forward(self, hidden_states, gate=None):
            hidden_states = hidden_states * (1 if gate is None else gate)
            return hidden_states + self.map(hidden_states), hidden_states.sigmoid()

    class Chain(Toy):
        def forward(self, input_ids):
            hidden, gate = self.embedding(input_ids), None
            for layer in self.layers:
                hidden, gate = layer(hidden, gate)
            return hidden

    with pytest.raises(UnprunableError, match=r"hands layers\.2 more of what the blocks before it compute"):
        walk(Chain(nn.ModuleList(Gated(8) for _ in range(3))))


def test_a_matrix_that_blocks_share_stays_dense():
    model = Toy(layers())
    model.layers[2].map.weight = model.layers[0].map.weight
    found = find_architecture(model)
    assert [weight.name for weight in found.weights] == ["layers.1.map.weight"]
    assert found.dense.keys() == {"layers.0.map.weight", "layers.2.map.weight"}


def test_vectors_stay_dense():
    found = find_architecture(Toy(layers(scale=lambda: Scale())))
    assert found.dense == {f"layers.{index}.scale.gain": "vector" for index in range(3)}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 1, 8))
