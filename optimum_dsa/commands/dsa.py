"""The command group `optimum-cli dsa`."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .bench import BenchCommand
from .convert import ConvertCommand
from .demo import DemoCommand
from .env import EnvCommand
from .evaluate import EvaluateCommand
from .generate import GenerateCommand
from .options import CommandParser
from .plan import PlanCommand
from .prune import PruneCommand
from .push import PushCommand
from .quantize import QuantizeCommand
from .recover import RecoverCommand
from .report import ReportCommand
from .search import SearchCommand
from .verify import VerifyCommand


class DSACommand(BaseOptimumCLICommand):
    """Prints its help; the work is in its subcommands, whose parsers are complete when they are used."""

    COMMAND = CommandInfo("dsa", "Prune transformers models with discovered sparsity allocations.")
    SUBCOMMANDS = (
        CommandInfo("prune", "Prune a model to an exact budget and save it.", PruneCommand),
        CommandInfo("plan", "Say what pruning a model will need: memory, disk, time.", PlanCommand),
        CommandInfo("search", "Find the allocation that hurts a model least.", SearchCommand),
        CommandInfo("recover", "Train a pruned model and keep its zeros.", RecoverCommand),
        CommandInfo("evaluate", "Measure a model's perplexity and its sparsity.", EvaluateCommand),
        CommandInfo("generate", "Try a model: print what it writes after a prompt.", GenerateCommand),
        CommandInfo("bench", "Measure how fast a model reads and writes.", BenchCommand),
        CommandInfo("report", "Show a pruned model or a search as a page with pictures.", ReportCommand),
        CommandInfo("verify", "Check that a pruned model is what it says.", VerifyCommand),
        CommandInfo("convert", "Store a pruned model without its zeros, or with them again.", ConvertCommand),
        CommandInfo("quantize", "Store a pruned model as whole numbers, zeros kept.", QuantizeCommand),
        CommandInfo("push", "Push a pruned model to the Hub, with a model card.", PushCommand),
        CommandInfo("demo", "Prune the embedded model, discover an allocation, compare.", DemoCommand),
        CommandInfo("env", "Print the versions that a bug report needs.", EnvCommand),
    )

    @property
    def subparsers(self):
        if getattr(self, "_subparsers", None) is None:
            self._subparsers = self.parser.add_subparsers(parser_class=CommandParser)
        return self._subparsers

    @subparsers.setter
    def subparsers(self, subparsers):
        self._subparsers = subparsers
