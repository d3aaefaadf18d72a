"""What is touched of dependencies beyond their documented API: who, what, why, and which test would notice its end.

The page "Dependencies" shows these rows. `fences.py` has the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata


class DependencyError(RuntimeError):
    """A release of a dependency lacks what optimum-dsa needs of it; the message says which one, and the way out."""


@dataclass(frozen=True)
class Fence:
    """One thing that is touched beyond a package's documented API.

    Attributes:
        package (`str`): whose it is.
        touched (`str`): what.
        reason (`str`): why, where no documented way leads there.
        where (`str`): the module that uses it.
        test (`str`): the contract test, or one of several.
    """

    package: str
    touched: str
    reason: str
    where: str
    test: str

    def missing(self) -> DependencyError:
        """The error for a release that has it no more."""
        return DependencyError(
            f"{self.package} {version_of(self.package)} has no {self.touched} any more, which optimum-dsa needs: "
            f"{self.reason}; install a release that it was tested with (constraints.txt names one)."
        )


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


_OFFLOAD = "tests/model/test_offload.py"
_QUANTIZER = "tests/checkpoint/test_transformers_loader.py"
_PEFT = "tests/recovery/adapters/test_peft_method.py"

FENCES = {
    # torch
    "tensor version": Fence(
        "torch",
        "Tensor._version",
        "it tells whether a tensor was changed in place between two blocks",
        "model.calls, model.observer",
        "tests/model/test_walk.py",
    ),
    "module parameters": Fence(
        "torch",
        "Module._parameters",
        "a masked weight takes a parameter's place for one forward pass, and parametrisations would rename it",
        "search.realise.masked_model",
        "tests/search/realise/test_masked_model.py",
    ),
    "module parts": Fence(
        "torch",
        "Module._parameters, ._buffers and ._modules",
        "a twin of a model shares its parameters and none of its modules, and a copy would share neither or both",
        "model.sharded",
        "tests/model/test_sharded.py",
    ),
    "sharded class": Fence(
        "torch",
        "the bases of a class that fully_shard makes",
        "the twin of a sharded model has the class from before; nothing documented says which",
        "model.sharded",
        "tests/model/test_sharded.py",
    ),
    # accelerate
    "hook": Fence(
        "accelerate",
        "_hf_hook of a module",
        "it says where offloaded weights are, and nothing documented does",
        "model.offload, model.calls",
        _OFFLOAD,
    ),
    "hook state": Fence(
        "accelerate",
        "AlignDevicesHook.offload, .weights_map and .place_submodules",
        "the weights of one block are brought in once, and written back",
        "model.offload, packed.pack_model",
        _OFFLOAD,
    ),
    "hooked forward": Fence(
        "accelerate",
        "_old_forward of a hooked module",
        "a masked weight has to take its place after the hook has brought the real one",
        "search.realise.masked_model",
        "tests/search/realise/test_masked_model.py",
    ),
    "store": Fence(
        "accelerate",
        "OffloadedWeightsLoader.state_dict, .index and .save_folder, PrefixedDataset.dataset and .prefix",
        "weights that pruning changed are written back to where they came from",
        "model.offload",
        _OFFLOAD,
    ),
    # transformers
    "device map": Fence(
        "transformers",
        "hf_device_map of a model",
        "it says that accelerate moves inputs, and makes transformers save offloaded weights a shard at a time",
        "model.calls, checkpoint.save, evaluation.perplexity, search.objective",
        _OFFLOAD,
    ),
    "ties": Fence(
        "transformers",
        "PreTrainedModel.all_tied_weights_keys",
        "tied weights are pruned once and written back under all their names",
        "model.architecture, checkpoint.save, model.offload, packed.pack_model",
        "tests/model/test_architecture.py",
    ),
    "experts": Fence(
        "transformers",
        "PretrainedConfig._experts_implementation",
        "statistics of each expert need the loop over them, and set_experts_implementation changes whole models only",
        "model.observer",
        "tests/model/test_walk.py",
    ),
    "fused experts": Fence(
        "transformers",
        "what use_experts_implementation gives a class of experts: _apply_gate, _is_expert_parallel, has_gate, "
        "has_bias, is_transposed, has_post_expert_norm",
        "packed experts compute what the registered implementations do; without them experts stay dense",
        "packed.experts",
        "tests/packed/test_experts.py",
    ),
    "quantizer": Fence(
        "transformers",
        "HfQuantizer's `_process_model_before_weight_loading`, `_process_model_after_weight_loading`, "
        "`update_attn_implementation`, `update_weight_conversions`, `get_new_dtype`, `remove_quantization_config`, "
        "`validate_environment`, `get_state_dict_and_metadata`, `_dequantize`; AUTO_QUANTIZER_MAPPING",
        "compressed checkpoints load with from_pretrained; the hooks are overridden, never called",
        "checkpoint.transformers_loader",
        _QUANTIZER,
    ),
    "conversions": Fence(
        "transformers",
        "core_model_loading: WeightConverter, WeightRenaming and ConversionOps",
        "packed tensors are unpacked before the model's own conversions",
        "checkpoint.transformers_loader, checkpoint.unpacking",
        _QUANTIZER,
    ),
    "loading options": Fence(
        "transformers",
        "quantizers.auto.LOADING_ATTRIBUTES_CONFIG_TYPES",
        "run_packed=True is asked for when a model is loaded; a checkpoint that says it needs no list",
        "checkpoint.transformers_loader",
        "tests/checkpoint/test_run_packed.py",
    ),
    "names": Fence(
        "transformers",
        "core_model_loading.rename_source_key and conversion_mapping.get_model_conversion_mapping",
        "they tell which tensors of a checkpoint the model's class does not know, which would vanish without a word",
        "checkpoint.unknown_tensors",
        "tests/checkpoint/test_unknown_tensors.py",
    ),
    "saved names": Fence(
        "transformers",
        "core_model_loading.revert_weight_conversion",
        "it tells whether finished blocks can be shards of the checkpoint as they are; without it they are saved anew",
        "checkpoint.finished_shards",
        "tests/checkpoint/test_finished_shards.py",
    ),
    "weights' name": Fence(
        "transformers",
        "transformers_weights in config.json",
        "compressed weights have a file name of their own, so that no loader takes them for dense ones",
        "checkpoint.convert, checkpoint.transformers_loader",
        _QUANTIZER,
    ),
    "callbacks": Fence(
        "transformers",
        "Trainer.callback_handler.callbacks",
        "sparsity reaches reporters only from a callback before them; without it, the callback is added as usual",
        "recovery.gradual.callback",
        "tests/recovery/gradual/test_callback.py",
    ),
    "loss": Fence(
        "transformers",
        "Trainer.model_accepts_loss_kwargs",
        "a loss with a teacher's share is a mean of batches",
        "recovery.trainer",
        "tests/recovery/test_recover.py",
    ),
    "attached adapters": Fence(
        "transformers",
        "PreTrainedModel._hf_peft_config_loaded",
        "save_pretrained writes the adapter alone, and the pruned model under it is what has changed",
        "checkpoint.save, model.adapters",
        "tests/model/test_adapters.py",
    ),
    # peft
    "methods": Fence(
        "peft",
        "members of the enumeration PeftType",
        "register_peft_method asks for a member, and there is no function that adds one",
        "recovery.adapters.peft_method",
        _PEFT,
    ),
    "layer": Fence(
        "peft",
        "tuners.lora: Linear._check_forward_args and update_layer, LoraModel._create_new_module",
        "a sparse adapter is a LoRA with another product",
        "recovery.adapters.layer, recovery.adapters.peft_method",
        _PEFT,
    ),
    "custom layers": Fence(
        "peft",
        "LoraConfig._register_custom_module, LoraLayer._get_in_out_features",
        "a LoRA stands beside a packed layer, which PEFT does not know",
        "recovery.adapters.packed",
        "tests/recovery/adapters/test_packed.py",
    ),
    # huggingface_hub
    "transport": Fence(
        "huggingface_hub",
        "the base class of HfHubHTTPError",
        "a network that fails is explained in one sentence; the client under it changed its name",
        "sharing.push",
        "tests/sharing/test_push.py",
    ),
    # optimum
    "commands": Fence(
        "optimum",
        "the namespace package optimum.commands.register, BaseOptimumCLICommand and CommandInfo",
        "`optimum-cli dsa` is found there",
        "commands",
        "tests/test_commands.py",
    ),
    # Python
    "parser": Fence(
        "argparse",
        "ArgumentParser._actions and ._mutually_exclusive_groups",
        "errors, files of options and next lines are in the words of a command's options, which nothing else lists",
        "commands.fences",
        "tests/test_commands.py",
    ),
    # evaluate
    "metric": Fence(
        "evaluate",
        "Metric._info and Metric._compute",
        "its template of a metric overrides them",
        "evaluation.metric",
        "tests/evaluation/test_metric.py",
    ),
}
