"""`optimum-cli dsa verify`."""

from __future__ import annotations

from .base import LeafCommand, add_loading_options, loading_options, say


class VerifyCommand(LeafCommand):
    """Whether a pruned model is what it says."""

    DESCRIPTION = """\
Count the zeros of a pruned model, dense or compressed, and hold them against its dsa_config.json: zeros of every
block, pattern of every matrix, budget, all totals, and whether the file itself was changed. Weights are read block by
block. What weights cannot tell, such as method and calibration, is said not to be proven.

Of what was quantised afterwards too: a folder of `quantize`, and a .gguf of `convert --to gguf`, in which kept weights
may be rounded to zero, and are counted apart.

exit code  0 all that can be counted holds, 1 something does not, 2 it cannot be checked
"""
    EXAMPLES = """\
  optimum-cli dsa verify out
  optimum-cli dsa verify out.gguf
  optimum-cli dsa verify me/llama-3.2-1b-dsa-70 --revision v1
"""

    @staticmethod
    def parse_args(parser):
        VerifyCommand.describe(parser, "verify")
        parser.add_argument("model", help="folder or Hub id of a pruned model, or a .gguf of one")
        add_loading_options(parser, reads_text=False)
        parser.set_defaults(device="cpu", device_map="disk")

    def execute(self) -> dict:
        import tempfile
        from pathlib import Path

        from ..checkpoint.countable import countable

        with tempfile.TemporaryDirectory(prefix="optimum-dsa-") as scratch:
            path, stored = countable(self.args.model, Path(scratch, "dense"))
            return self._verified(path, stored, scratch)

    def _verified(self, path: str, stored: str | None, scratch: str) -> dict:
        from dataclasses import asdict

        from ..checkpoint.countable import GGUF
        from ..checkpoint.description import DescriptionError, report_from
        from ..checkpoint.load import find_description, load_model
        from ..checkpoint.running import packed_options
        from ..checkpoint.verify import verify

        options = loading_options(self.args)
        try:
            data = find_description(path, **options)
            report = None if data is None else report_from(data)
        except DescriptionError as error:
            problem = " ".join(str(error).split())
            say(f"wrong: {problem}")
            self.exit_code = 1
            return {"holds": False, "problems": [problem]}
        if report is None:
            raise ValueError(f"{self.args.model} has no dsa_config.json of a pruned model, so nothing can be checked.")
        options["offload_folder"] = self.args.offload_folder or scratch
        options |= packed_options(path, options, run_packed=False)  # a matrix at a time comes from the disk
        model = load_model(path, adapter=False, **options)
        # quantised since, so that numbers are others than those that pruning may have given
        found = verify(model, report, data, trained=stored is not None, rounded=stored == GGUF)
        say(str(found))
        self.exit_code = 0 if found.holds else 1
        return {"holds": found.holds, **asdict(found)}
