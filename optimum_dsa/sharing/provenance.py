"""How a pruned model came about, from its `dsa_config.json`: the command to make it again, the papers behind it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..common.escaping import one_line
from ..common.registry import Registry
from ..common.settings import flag_of, flattened
from ..data import DATASETS
from ..pruning.allocation import ALLOCATIONS, POST_PROCESS, PRE_PROCESS, REDUCTION, TRANSFORM, AllocationFunction
from ..pruning.configuration import CONFIG_NAME, DSAConfig
from ..pruning.distill import REFERENCE as DISTILLATION
from ..pruning.reconstruct import REFERENCE as RECONSTRUCTION
from ..pruning.structured.configuration import DSAStructuredConfig
from ..pruning.structured.importance import IMPORTANCES, importances_of
from ..pruning.structured.learners import LEARNERS
from ..pruning.structured.structure import ENTIRE
from ..pruning.structured.wholes.entire import REFERENCE as WITHOUT
from ..pruning.structured.widths.shares import SHARES
from ..pruning.unstructured.grid import REFERENCE as FEEDBACK
from ..pruning.unstructured.methods import METHODS
from ..pruning.unstructured.metrics import METRICS
from ..pruning.unstructured.permutations import PERMUTATIONS
from ..pruning.unstructured.updates import UPDATES
from ..recovery.adapters.modes import MODES
from ..recovery.configuration import RecoveryConfig
from ..recovery.recoveries import RECOVERIES
from ..recovery.texts import END_OF_TRAIN
from ..search.strategies import STRATEGIES


_ADDRESS = re.compile(r"https?://[^\s<>()\[\]\"]+")
_PATH = re.compile(r"~|\.{0,2}/|[A-Za-z]:[\\/]|\\\\|file:")


def commands(facts: Mapping[str, Any], found: bool) -> str:
    """The command lines that make the model once more out of its base, a line each; of zeros that were `found`, none.

    Structures are cut first, each cut out of what the one before it wrote.
    """
    base, lines = facts.get("base_model") or {}, []
    cut = facts.get("structured") or {}
    cuts = (*cut.get("earlier", ()), cut) if cut else ()
    for number, one in enumerate(cuts):
        output = "OUT" if found and number == len(cuts) - 1 else f"SMALLER{number + 1 if number else ''}"
        lines.append(_cut_command(one, base, output))
        base = {"name": output}
    return "\n".join(lines if found else [*lines, command({**facts, "base_model": base})])


def _cut_command(cut: Mapping[str, Any], base: Mapping[str, Any], output: str) -> str:
    config = flattened(DSAStructuredConfig, cut["config"])
    defaults = flattened(DSAStructuredConfig, DSAStructuredConfig(config["sparsity"]).to_dict())
    words = ["optimum-cli", "dsa", "prune", _word(base.get("name")) or "BASE_MODEL", "-o", output]
    words += ["--sparsity", f"{config['sparsity']}", "--structures", ",".join(config.get("structures", ("ffn",)))]
    for name, value in config.items():
        if name in ("sparsity", "structures") or name not in defaults or value in (None, defaults[name]):
            continue
        if isinstance(value, bool):
            words.append(flag_of(name, off=not value))
            continue
        if isinstance(value, Mapping):  # an allocation that is written out in the file
            words += ["--config", CONFIG_NAME]
            continue
        words += [
            flag_of(name),
            *(_word(str(part)) or "VALUE" for part in (value if isinstance(value, list) else [value])),
        ]
    return shlex.join([*words, *_data_and_place(cut, base)])


def command(facts: Mapping[str, Any]) -> str:
    """The command line that prunes the base model once more, to be run beside the model's `dsa_config.json`.

    Texts that were given in Python have no name; then the command says so.
    """
    config = flattened(DSAConfig, facts["config"])
    defaults = flattened(DSAConfig, DSAConfig(config["sparsity"]).to_dict())
    base = facts.get("base_model") or {}
    words = ["optimum-cli", "dsa", "prune", _word(base.get("name")) or "BASE_MODEL", "-o", "OUT"]
    words += ["--sparsity", f"{config['sparsity']}"]
    changed = {name: value for name, value in config.items() if name in defaults and value != defaults[name]}
    switches = [name for name, value in changed.items() if isinstance(value, bool)]
    options = {
        flag_of(name): [_word(str(part)) for part in (value if isinstance(value, list) else [value])]
        for name, value in changed.items()
        if value is not None and name not in ("sparsity", "allocation", *switches)
    }
    if any(None in values for values in options.values()):
        words += ["--config", CONFIG_NAME]
    for flag, values in options.items():
        words += [] if None in values else [flag, *values]
    words += ["--allocation", _word(config.get("allocation")) or CONFIG_NAME]
    words += [flag_of(name, off=not changed[name]) for name in switches]
    return shlex.join([*words, *_data_and_place(facts, base)])


def _data_and_place(facts: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """The options that say which text calibrated, and which file and revision of the base was taken."""
    words: list[str] = []
    if facts.get("calibration"):
        source = calibration_source(facts)
        sources = mixture(source) or {(names_data(source) and _word(source)) or "YOUR_TEXT": ""}
        for one in sources:
            words += ["--dataset", _word(one) or "YOUR_TEXT"]
        words += ["--weights", *sources.values()] if len(sources) > 1 else []
    if base.get("gguf_file") and base["gguf_file"] != base.get("name"):
        words += ["--gguf-file", _word(base["gguf_file"]) or "FILE"]
    if base.get("revision"):
        words += ["--revision", _word(base["revision"]) or "REVISION"]
    return words


def recover_command(recovery: Mapping[str, Any], base: str | None = None) -> str:
    """The command line that trains the pruned model once more, or `base`, the dense one that was trained sparse.

    It has every setting that is not its default.
    """
    config, data = recovery["config"], recovery.get("data") or {}
    defaults = RecoveryConfig().to_dict()
    model, output = ("OUT", "BETTER") if config.get("sparsity") is None else (_word(base) or "BASE_MODEL", "OUT")
    words = ["optimum-cli", "dsa", "recover", model, "-o", output]
    texts = ("--dataset", data.get("train"), "YOUR_TEXT"), ("--validation", data.get("validation"), "OTHER_TEXT")
    for option, name, unknown in texts:
        if option == "--dataset" or name not in (None, "", END_OF_TRAIN):
            known = isinstance(name, str) and names_data(name) and not _PATH.match(name) and _word(name)
            words += [option, known or unknown]
    for name, value in config.items():
        if name in defaults and value != defaults[name] and value is not None:
            if name == "merge":
                words.append("--keep-adapter")
            else:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [_word(str(value)) or "VALUE"])]
    if config.get("distillation"):
        words += ["--teacher", "DENSE_MODEL"]
    return shlex.join(words)


def _word(value: Any) -> str | None:
    """`value` if it can stand in a command as what it is; `None` for what would be an option, or cannot be seen."""
    return value if isinstance(value, str) and value[:1] not in ("", "-") and one_line(value) == value else None


def calibration_source(facts: Mapping[str, Any]) -> str:
    """What a description calls its calibration data; empty where it does not."""
    source = (facts.get("calibration") or {}).get("source")
    return source if isinstance(source, str) else ""


def names_data(source: str) -> bool:
    """Whether a calibration source is a file's or a dataset's name, and not "3 texts" that were given in Python."""
    return bool(source) and not re.fullmatch(r"\d+ texts|tensor", source) and " " not in source


def mixture(source: str) -> dict[str, str]:
    """Sources and their weights, where a calibration source is several that have names; empty where it is not."""
    parts = [re.fullmatch(r"(\d[\d.e+-]*) (\S+)", part) for part in source.split(" + ")]
    return {part[2]: part[1] for part in parts} if len(parts) > 1 and all(parts) else {}


def dataset_id(source: str) -> str | None:
    """The Hub id of a dataset that calibration or evaluation names; `None` for a local file."""
    if source in DATASETS:
        return DATASETS[source][0]
    return source if is_repository(source) and not _PATH.match(source) else None


def is_repository(name: Any, alone: bool = False) -> bool:
    """Whether a text can be the Hub id of a repository, as in "user/name"; with `alone`, also as in "gpt2"."""
    part = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    return isinstance(name, str) and bool(re.fullmatch(rf"({part}/){'?' if alone else ''}{part}", name))


def papers(
    config: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]] = (), cuts: Sequence[Mapping[str, Any]] = ()
) -> dict[str, str]:
    """Part -> address of its publication, of every part that had a say, in cuts before and trainings after as well."""
    asked = [one.get("config") or {} for one in trainings]
    if any(one.get("sparsity") is not None for one in asked):  # trained sparse from dense: no method pruned it
        config = {name: value for name, value in config.items() if name == "allocation"}
    found: dict[str, str | None] = {}

    def cite(table: Registry, name: Any) -> None:
        if isinstance(name, str) and name in table:
            found[f"{table.kind} {name}"] = table.references[name]

    for cut in cuts:
        for row in importances_of(cut):
            cite(IMPORTANCES, row)
        if any(kind in (cut.get("structures") or ()) for kind in ENTIRE):
            found["attention, mlp"] = WITHOUT
        cite(LEARNERS, cut.get("learner"))
        cite(SHARES, cut.get("allocation"))
        cite(ALLOCATIONS, cut.get("allocation"))
        if (cut.get("reconstruct") or {}).get("steps"):
            found["reconstruct"] = RECONSTRUCTION
        if (cut.get("reconstruct") or {}).get("distill"):
            found["distill"] = DISTILLATION
    cite(METHODS, config.get("method"))
    cite(METRICS, config.get("metric"))
    cite(UPDATES, (config.get("update") or {}).get("name"))
    cite(PERMUTATIONS, config.get("permute"))
    for one in asked:
        cite(RECOVERIES, method := one.get("method"))
        if method in RECOVERIES and not RECOVERIES.fact(method, "trains_weights", True):
            cite(MODES, one.get("mode"))
    if (config.get("reconstruct") or {}).get("steps"):
        found["reconstruct"] = RECONSTRUCTION
    if (config.get("reconstruct") or {}).get("distill"):
        found["distill"] = DISTILLATION
    if (values := config.get("values") or {}).get("name") and values.get("feedback", True):
        found["values"] = FEEDBACK
    name = config.get("allocation")
    name = name.get("name") if isinstance(name, Mapping) else name
    name = str(name).split(", ")[0]  # a searched one goes on with its spread and offsets
    cite(ALLOCATIONS, name)
    cite(STRATEGIES, name)
    function = ALLOCATIONS.get(name) or _parsed(name)
    if getattr(function, "reads", None) in ("scores", "model"):
        cite(METRICS, config.get("allocation_metric"))
    if isinstance(function, AllocationFunction) and name not in ALLOCATIONS:
        stages = (PRE_PROCESS, function.pre_process), (REDUCTION, (function.reduction,))
        for table, names in (*stages, (TRANSFORM, function.transform), (POST_PROCESS, (function.post_process,))):
            for operation in names:
                cite(table, operation)
    return {part: address for part, address in found.items() if address and _ADDRESS.fullmatch(address)}


def _parsed(name: str) -> AllocationFunction | None:
    try:
        return AllocationFunction.parse(name)
    except (ValueError, KeyError):
        return None


def without_places(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`dsa_config.json`'s content with nothing of this computer in it.

    Paths are cut to their last part. An allocation that was read from a file is written out in place of its name.
    """
    facts = _cut(facts)
    config = facts.get("config")
    if isinstance(config, dict) and isinstance(config.get("allocation"), str):
        name = config["allocation"]
        if name not in ALLOCATIONS and _parsed(name) is None:
            config["allocation"] = facts["allocation"]
    return facts


def _cut(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _cut(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_cut(part) for part in value]
    return last_part(value) if isinstance(value, str) else value


def last_part(text: str) -> str:
    """A path's last part; any other text as it is."""
    if not _PATH.match(text) or text in ("/", "~", "."):
        return text
    windows = "\\" in text
    return (PureWindowsPath if windows else PurePosixPath)(text).name or text
