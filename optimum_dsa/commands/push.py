"""`optimum-cli dsa push`."""

from __future__ import annotations

from .base import LeafCommand


class PushCommand(LeafCommand):
    """The folder of a pruned model in, a repository on the Hub out."""

    DESCRIPTION = """\
Push a pruned model to the Hub, in one commit: weights, tokenizer, dsa_config.json, a model card and its pictures.
Nothing of this computer goes with them. A README.md in the folder is taken as it is. Of an adapter (recover
--keep-adapter) the pruned model under it goes first, to a repository of its own, which --base names. An allocation, a
JSON file or the folder of a search, goes alone: 'prune --allocation user/name' takes it from there.

The zeros are counted first, block by block: the card has the figures that were counted, and a model that is not what
its dsa_config.json says is not sent.

When the network fails, the folder is whole, and the same command goes on: what has arrived is not sent again.
"""
    EXAMPLES = """\
  optimum-cli dsa push out me/qwen3-0.6b-dsa-60
  optimum-cli dsa push out me/qwen3-0.6b-dsa-60 --private --revision owl --commit-message "with OWL"
  optimum-cli dsa push out team/qwen3-0.6b-dsa-60 --create-pr
  optimum-cli dsa push found/allocation.json me/qwen3-0.6b-allocation
  optimum-cli dsa push adapter me/qwen3-0.6b-dsa-60-adapter --base me/qwen3-0.6b-dsa-60
"""

    @staticmethod
    def parse_args(parser):
        PushCommand.describe(parser, "push")
        parser.add_argument(
            "folder", help="folder of a pruned model; or an allocation: its JSON, or the folder of a search"
        )
        parser.add_argument("repo", help="repository, as in user/name")
        parser.add_argument("--private", action="store_true", default=None, help="make the repository private")
        parser.add_argument("--revision", help="branch to push to (default: main)")
        parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing")
        parser.add_argument("--base", help="of an adapter: the repository of the pruned model under it")
        parser.add_argument("--commit-message", help="default: what was removed")
        parser.add_argument("--token", help="default: the one that 'hf auth login' stored")

    def execute(self) -> dict:
        from ..sharing.push import push_folder

        args = self.args
        address = push_folder(
            args.folder,
            args.repo,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
            token=args.token,
            base=args.base,
        )
        self.saved = True
        print(f"pushed to {address}")
        return {"address": address}
