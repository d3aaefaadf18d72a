"""What the tests of pushing share."""

import json

from huggingface_hub import ModelCard

from optimum_dsa.sharing.push import push_folder

from ..hub_server import TOKEN


FILES = {"config.json", "generation_config.json", "model.safetensors", "dsa_config.json", "README.md"}
PLOTS = {"plots/allocation.png", "plots/heatmap.png"}


def change(folder, name, **facts):
    """Set facts in a JSON file of `folder`."""
    data = json.loads((folder / name).read_text())
    for key, value in facts.items():
        part = data
        *outer, last = key.split("__")
        for step in outer:
            part = part[step]
        part[last] = value
    (folder / name).write_text(json.dumps(data))


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(folder, repository="me/tiny", **options):
    return push_folder(folder, repository, token=TOKEN, **options)


def card(server, repository="me/tiny"):
    return ModelCard(server.content(repository)["README.md"].decode())
