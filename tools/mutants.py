"""Do the tests notice a fault? Small faults are put into a copy of the package, one at a time, each against its tests.

    pip install coverage pytest-cov
    OMP_NUM_THREADS=1 python tools/mutants.py --seed 0 --number 300 --copy /tmp/mutants --log /tmp/mutants.jsonl

Not part of CI: 300 mutants take more than an hour on one core. Anywhere in `MODULES`, changed is an operator of
arithmetic, bits, comparison or logic, a condition, a constant, a sign, a slice, a returned value, or one of min / max,
any / all and floor / ceil; never annotations, decorators, texts, `raise`, `assert` or what is logged. A mutant is run
against those tests of its own module (`test_files`) that run its line, quickest first, until one fails.

A line of the log is one mutant: what was changed, and whether it was killed, survived or ran out of time. `--known`
takes earlier logs and leaves out what was killed there. A survivor is a missing test, dead code, or changes nothing
that can be observed; which of them, a person decides.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path


PACKAGE = "optimum_dsa"
CUT, ZEROS = "pruning/structured", "pruning/unstructured"
LEARNERS = ("learned", "projected_gates", "hard_concrete", "policy_gradient")
# module -> the files that test it; for others the one that mirrors it
TESTS = {
    **{f"{ZEROS}/{name}.py": [f"{ZEROS}/test_objective.py"] for name in ("admm", "refit", "swap")},
    "pruning/allocation/histogram.py": ["pruning/allocation/test_allocators.py", "search/test_summary.py"],
    **{f"search/{name}.py": ["search/test_search.py"] for name in ("conductor", "counts")},
    "common/apart.py": ["search/test_apart.py", "recovery/test_recover.py"],
    **dict.fromkeys(("model/modeling_per_layer.py", "model/per_layer.py"), [f"{CUT}/test_per_layer.py"]),
    "pruning/structured/remove.py": ["pruning/structured/test_remove.py", "pruning/structured/test_prune.py"],
    "pruning/structured/trial.py": ["pruning/structured/test_tolerance.py"],
    "pruning/structured/widths/dense.py": ["pruning/structured/widths/test_shares.py"],
    "pruning/structured/widths/felt.py": ["pruning/structured/test_instead.py"],
    "search/prepared.py": ["search/test_structures.py"],
    "pruning/structured/scores.py": ["pruning/structured/learners/test_learner.py"],
    **{f"{CUT}/learners/{name}.py": [f"{CUT}/learners/test_learner.py"] for name in LEARNERS},
    **{f"{CUT}/wholes/{name}.py": [f"{CUT}/wholes/test_experts.py"] for name in ("remove", "usage")},
    "pruning/structured/configuration.py": ["pruning/structured/test_prune.py"],
    "pruning/structured/refit.py": ["pruning/structured/test_importance.py"],
    **{f"{CUT}/{name}.py": [f"{CUT}/test_structures.py"] for name in ("slicing", "structure")},
    "pruning/sections.py": ["pruning/test_configuration.py"],
    "pruning/allocation/levels.py": ["pruning/allocation/test_budget.py"],
    **{f"pruning/{name}.py": ["pruning/test_prune.py"] for name in ("allocate", "report", "resolved_method", "sink")},
    **{f"pruning/{name}.py": ["pruning/test_prune.py"] for name in ("source", "steps")},
    **{f"pruning/{name}.py": ["pruning/test_reconstruct.py"] for name in ("reconstruct", "stretches", "training")},
    "pruning/unstructured/assignment.py": ["pruning/unstructured/test_permutations.py"],
    "pruning/unstructured/elimination_kernel.py": ["test_gpu.py"],
    "checkpoint/beside.py": ["checkpoint/test_base_files.py", "checkpoint/test_unknown_tensors.py"],
    "checkpoint/gguf_file.py": ["checkpoint/test_exports.py"],
    "checkpoint/pickles.py": ["checkpoint/test_unknown_tensors.py"],
    "checkpoint/unpacking.py": ["checkpoint/test_transformers_loader.py"],
    "checkpoint/shards.py": ["checkpoint/test_shards.py", "checkpoint/test_convert.py", "test_untrusted.py"],
    "checkpoint/convert.py": ["checkpoint/test_convert.py", "test_untrusted.py"],
    "model/walk.py": ["model/test_walk.py"],
    "pruning/allocation/unit.py": ["pruning/allocation/test_unit.py", "pruning/allocation/test_function.py"],
    "search/objective.py": ["search/test_objective.py", "search/realise/test_masks.py"],
    "search/resolver.py": ["search/test_resolver.py", "search/test_search.py"],
    **{
        f"search/{name}.py": [f"search/test_{name}.py", "search/test_search.py"]
        for name in ("evaluator", "trace", "problem", "strategies", "result", "refinement", "space", "search")
    },
}
MODULES = (
    *("pruning/*.py", "pruning/unstructured/*.py", "pruning/allocation/*.py", "search/*.py"),
    *("model/statistics.py", "model/walk.py", "packed/bitmask.py"),
    *(f"checkpoint/{name}.py" for name in ("shards", "convert", "description", "verify", "unpacking")),
)

# imported once, before every child begins
HEAVY = ("torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "accelerate", "datasets", "peft")

ARITHMETIC = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
COMPARISON = {
    ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",),
}  # fmt: skip
TWINS = {"min": "max", "any": "all", "floor": "ceil", "minimum": "maximum", "amin": "amax"}
TWINS |= {b: a for a, b in TWINS.items()}


def mutants(source: str) -> Iterator[tuple[int, str, str, str]]:
    """(line, text before, text after, whole source) of every mutant of a module."""
    data = source.encode()
    starts = [0, *itertools.accumulate(len(line) for line in data.splitlines(keepends=True))]

    def where(node: ast.AST) -> slice:
        return slice(starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)

    def text(node: ast.AST) -> str:
        return data[where(node)].decode()

    for node in _code(ast.parse(source)):
        for target, new in _changes(node, text):
            place = where(target)
            for written in (f"({new})", new):  # statements and slices cannot stand in brackets
                changed = (data[: place.start] + written.encode() + data[place.stop :]).decode()
                if _parses(changed):
                    yield target.lineno, text(target), new, changed
                    break


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that does something: no annotations, decorators, texts, errors or logging."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("logger.", "warnings.")):
        return
    yield node
    skipped = {"annotation", "returns", "decorator_list", "type_params"}
    for name, value in ast.iter_fields(node):
        if name in skipped:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_type(node, child):
                yield from _code(child)


def _is_type(parent: ast.AST, child: ast.AST) -> bool:
    """Whether a statement of the module names a type, such as `Known = A | B`."""
    value = getattr(child, "value", None)
    union = isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)
    return isinstance(parent, ast.Module) and (union or isinstance(value, ast.Subscript))


def _changes(node: ast.AST, text) -> Iterator[tuple[ast.AST, str]]:
    """(what is replaced, by which text) for one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield node, f"({text(node.left)}) {ARITHMETIC[type(node.op)]} ({text(node.right)})"
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield node, f"{text(node.target)} {ARITHMETIC[type(node.op)]}= {text(node.value)}"
    elif isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for place, operator in enumerate(node.ops):
            for new in COMPARISON[type(operator)]:
                signs = [_SIGNS[type(one)] for one in node.ops]
                signs[place] = new
                parts = [f"({text(operands[0])})"]
                parts += [f"{sign} ({text(operand)})" for sign, operand in zip(signs, operands[1:])]
                yield node, " ".join(parts)
    elif isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        yield node, word.join(f"({text(value)})" for value in node.values)
        own = " and " if isinstance(node.op, ast.And) else " or "
        for left_out in node.values:
            yield node, own.join(f"({text(value)})" for value in node.values if value is not left_out)
    elif isinstance(node, ast.UnaryOp):
        yield node, text(node.operand)
    elif isinstance(node, ast.Constant):
        yield from ((node, new) for new in _constants(node.value))
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        if not isinstance(node.test, ast.Compare):  # whose opposite is among its own changes
            yield node.test, f"not ({text(node.test)})"
        yield from ((node.test, word) for word in ("True", "False") if not isinstance(node, ast.While))
    elif isinstance(node, ast.comprehension):
        yield from ((condition, "True") for condition in node.ifs)
    elif isinstance(node, ast.Return) and node.value is not None and text(node.value) != "None":
        yield node.value, "None"
    elif isinstance(node, ast.Slice):
        lower, upper, step = (text(part) if part else "" for part in (node.lower, node.upper, node.step))
        if lower:
            yield node, f":{upper}:{step}"
        if upper:
            yield node, f"{lower}::{step}"
    elif isinstance(node, ast.Name) and node.id in TWINS:
        yield node, TWINS[node.id]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TWINS:
        whole, owner = text(node), text(node.func.value)
        yield node, f"{owner}.{TWINS[node.func.attr]}{whole[len(owner) + 1 + len(node.func.attr) :]}"


_SIGNS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
    ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip


def _constants(value) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (str(not value),)
    if isinstance(value, int):
        return str(value + 1), str(value - 1)
    if isinstance(value, float):
        return repr(value * 2 if value else 1.0), repr(value / 2 if value else -1.0)
    return ()


def population(package: Path) -> list[dict]:
    """All mutants of all modules, in order."""
    found = []
    for pattern in MODULES:
        for path in sorted(package.glob(pattern)):
            if path.name == "__init__.py":
                continue
            source = path.read_text(encoding="utf-8")
            module, lines, seen = path.relative_to(package).as_posix(), source.splitlines(), Counter()
            for line, before, after, changed in mutants(source):
                name = (module, lines[line - 1], before, after)
                seen[name] += 1
                facts = {"module": module, "line": line, "before": before, "after": after, "source": changed}
                found.append({"id": sha256(repr((*name, seen[name])).encode()).hexdigest(), **facts})
    return found


def sample(everything: list[dict], seed: int, number: int) -> list[dict]:
    """`number` mutants in random order: those whose names have the lowest hashes, so that a change in one place leaves
    the rest of the sample what it was."""
    return sorted(everything, key=lambda mutant: sha256(f"{seed} {mutant['id']}".encode()).hexdigest())[:number]


def test_files(module: str, tests: Path) -> list[str]:
    """The files that test a module, which are there."""
    folder, _, name = module.rpartition("/")
    own = [f"{folder}/test_{name}".lstrip("/")]
    return [f"{tests.name}/{file}" for file in TESTS.get(module, own) if (tests / file).is_file()]


class Coverage:
    """Which tests run a line, and how long each takes; of whole files, measured once in the copy."""

    def __init__(self, copy: Path):
        self.copy = copy
        self.known: dict[str, tuple[dict[str, float], dict[tuple[str, int], set[str]]]] = {}

    def of(self, file: str) -> tuple[dict[str, float], dict[tuple[str, int], set[str]]]:
        """(test -> seconds, (module, line) -> tests) of a test file; a fixture's lines count for all tests in it."""
        if file not in self.known:
            data, times = self.copy / ".coverage", self.copy / "times.json"
            data.unlink(missing_ok=True)
            plugins = ["-p", "pytest_cov", f"--cov={PACKAGE}", "--cov-context=test", "--cov-report="]
            (code,) = run_pytest(self.copy, [[*plugins, file]], 1800, times)
            if code not in (0, 1):
                raise SystemExit(f"{file} cannot be run: see {self.copy / 'output.txt'}")
            seconds = json.loads(times.read_text())
            lines: dict[tuple[str, int], set[str]] = {}
            for module, number, context in _covered(data):
                name, _, phase = context.rpartition("|")
                lines.setdefault((module, number), set()).update([name] if phase == "run" else seconds)
            self.known[file] = seconds, lines
        return self.known[file]

    def tests(self, module: str, first: int, last: int) -> list[tuple[str, float]]:
        """The tests of a module that run any of these lines, quickest first; all, where the lines run at import."""
        found: dict[str, float] = {}
        for file in test_files(module, self.copy / "tests"):
            seconds, lines = self.of(file)
            for number in range(first, last + 1):
                found |= {name: seconds[name] for name in lines.get((module, number), ()) if name in seconds}
        return sorted(found.items(), key=lambda pair: pair[1])


def _covered(data: Path) -> Iterator[tuple[str, int, str]]:
    import coverage

    read = coverage.CoverageData(str(data))
    read.read()
    for file in read.measured_files():
        module = file.partition(f"/{PACKAGE}/")[2]
        for line, contexts in read.contexts_by_lineno(file).items():
            for context in contexts:
                yield module, line, context


def run_pytest(copy: Path, calls: list[list[str]], limit: float, times: Path | None = None) -> Iterator[int | None]:
    """The exit code of pytest with each list of arguments in turn, `None` where it ran out of time.

    Each in a child of this process, which has imported the heavy libraries and nothing of the package.
    """
    for arguments in calls:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            with open(copy / "output.txt", "w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            import pytest

            code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[Times(times)])
            sys.stdout.flush()
            os._exit(int(code))
        yield _waited(child, limit)


class Times:
    """A pytest plugin that writes down how long each test took."""

    def __init__(self, path: Path | None):
        self.path, self.seconds, self.bad = path, {}, set()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if not report.passed:
            self.bad.add(report.nodeid)

    def pytest_sessionfinish(self):
        if self.path is not None:
            good = {name: seconds for name, seconds in self.seconds.items() if name not in self.bad}
            self.path.write_text(json.dumps(good))
            print("not passed, and left out:", sorted(self.bad), file=sys.stderr)


def _waited(child: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge(copy: Path, coverage: Coverage, mutant: dict) -> dict:
    """The mutant with what became of it."""
    path = copy / PACKAGE / mutant["module"]
    original = path.read_text(encoding="utf-8")
    last = mutant["line"] + mutant["before"].count("\n")
    tests = coverage.tests(mutant["module"], mutant["line"], last)
    began, result = time.monotonic(), "survived"
    if tests:
        limit = 60 + 5 * sum(seconds for _, seconds in tests)
        (copy / "tests.txt").write_text("\n".join(name for name, _ in tests))
        path.write_text(mutant["source"], encoding="utf-8")
        try:
            (code,) = run_pytest(copy, [["-x", "@tests.txt"]], limit)
        finally:
            path.write_text(original, encoding="utf-8")
        result = {0: "survived", None: "timeout"}.get(code, "killed")
    facts = {name: value for name, value in mutant.items() if name != "source"}
    said = (copy / "output.txt").read_text(errors="replace").splitlines() if tests and result == "killed" else []
    why = next((line for line in reversed(said) if line.startswith(("FAILED", "ERROR"))), "\n".join(said[-3:]))
    seconds = round(time.monotonic() - began, 1)
    return {**facts, "result": result, "tests": len(tests), "seconds": seconds, "why": why[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--copy", type=Path, required=True, help="folder for the copy of the tree; it is replaced")
    parser.add_argument("--log", type=Path, required=True, help="file that a line per mutant is added to")
    parser.add_argument("--modules", nargs="*", default=[""], help="of the sample only modules that begin so")
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="logs; what was killed there is left out")
    options = parser.parse_args()
    shutil.rmtree(options.copy, ignore_errors=True)
    ignored = shutil.ignore_patterns(".venv", ".git", "build", "__pycache__", "*.egg-info", ".hypothesis")
    shutil.copytree(Path(__file__).resolve().parents[1], options.copy, ignore=ignored, symlinks=True)
    everything = population(options.copy / PACKAGE)
    chosen = sample(everything, options.seed, options.number)
    chosen = [mutant for mutant in chosen if mutant["module"].startswith(tuple(options.modules))]
    lines = [json.loads(line) for path in options.known for line in path.read_text().splitlines()]
    killed = {line["id"] for line in lines if line["result"] != "survived"}
    counts = Counter(known=sum(mutant["id"] in killed for mutant in chosen))
    chosen = [mutant for mutant in chosen if mutant["id"] not in killed]
    print(f"{len(everything)} mutants, {len(chosen)} chosen", flush=True)
    os.environ |= {"PYTHONPATH": os.pathsep.join([str(options.copy), *filter(None, sys.path)])}
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    for name in HEAVY:
        importlib.import_module(name)
    coverage = Coverage(options.copy)
    with options.log.open("a") as log:
        for number, mutant in enumerate(chosen, 1):
            judged = judge(options.copy, coverage, mutant)
            counts[judged["result"]] += 1
            log.write(json.dumps(judged) + "\n")
            log.flush()
            said = f"{judged['module']}:{judged['line']} {judged['result']}"
            print(f"{number}/{len(chosen)} {dict(counts)} {said}", flush=True)


if __name__ == "__main__":
    main()
