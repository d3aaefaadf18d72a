"""The best model of each sparsity, in a folder of its own with its measurement, its report page and its card."""

from dataclasses import replace
from pathlib import Path

from table import DENSE, Row, Table

from optimum_dsa import DSAPruner, Measurement, read_results, save_results, write_report
from optimum_dsa.common.files import write_text
from optimum_dsa.sharing.card import model_card
from optimum_dsa.sharing.upload import collect, count, pictures


EVALUATION = "evaluation.json"


class Best:
    """Called with every row that is made, it saves the model if none of its sparsity was better.

    Args:
        folder: for the models, each called after the dense one and what was asked of it: smollm2-135m-0.5.
        name: the dense model's.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name

    def place(self, sparsity: str) -> Path:
        return self.folder / f"{self.name}-{sparsity.replace(':', '-of-')}"

    def __call__(self, row: Row, pruner: DSAPruner, found: Measurement) -> None:
        if not row.sparsity or found.perplexity is None:
            return
        place = self.place(row.sparsity)
        kept = read_results(place / EVALUATION) if (place / EVALUATION).is_file() else []
        # of a text that was measured otherwise nothing is known
        if any(one.protocol == found.protocol and one.perplexity <= found.perplexity for one in kept if one.sparsity):
            return
        pruner.save_pretrained(place)
        save_results(place / EVALUATION, [replace(found, model=place.name)])

    def finish(self, table: Table, sparsities: list[str]) -> list[Path]:
        """Write pages and cards of the models that are there, the dense model's numbers beside theirs; the folders."""
        places = [place for sparsity in sparsities if (place := self.place(sparsity)).is_dir()]
        for place in places:
            own = [one for one in read_results(place / EVALUATION) if one.model == place.name]
            dense = [replace(one, model=self.name) for (name, _), (one, _) in table.found.items() if name == DENSE]
            save_results(place / EVALUATION, [*dense, *own])
            write_report(place)
            write_card(place)
        return places


def write_card(folder: Path) -> None:
    """Write README.md, the card that `optimum-cli dsa push` would send, and the pictures in it."""
    upload, uncounted = count(collect(folder), folder)
    drawn = pictures(upload.outcome, folder.name)
    for name, content in drawn.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    plots = {Path(name).stem: name for name in drawn if name.startswith("plots/")}
    card = model_card(
        upload.outcome, f"you/{folder.name}", upload.model_config, {}, plots, upload.files.keys(), uncounted
    )
    write_text(folder / "README.md", str(card))
