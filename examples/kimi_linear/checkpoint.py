# SPDX-License-Identifier: MIT
"""Weights in safetensors, under the names of the published checkpoint, in one file or in several with an index."""

from __future__ import annotations

import json
import pathlib

import safetensors
import safetensors.torch
import torch

import config
from model import Model

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _files(folder: pathlib.Path) -> dict[str, str]:
    """The file of each tensor."""
    if (folder / INDEX).exists():
        return json.loads((folder / INDEX).read_text())["weight_map"]
    if not (folder / ONE).exists():
        raise FileNotFoundError(f"{folder} has neither {ONE} nor {INDEX}")
    with safetensors.safe_open(folder / ONE, "pt") as file:
        return dict.fromkeys(file.keys(), ONE)


def load(folder: str | pathlib.Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Model:
    """The model in a folder with config.json and weights. dtype: of all weights but those that are fp32 anyway."""
    folder = pathlib.Path(folder)
    model = Model(config.read(folder / "config.json"), device, dtype)
    wanted, files = dict(model.public()), _files(folder)
    missing, unknown = wanted.keys() - files.keys(), files.keys() - wanted.keys()
    problems = [f"{len(names)} tensors are {what}, {min(names)} for one"
                for names, what in ((missing, "missing"), (unknown, "unknown")) if names]
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    for name in sorted(set(files.values())):
        with safetensors.safe_open(folder / name, "pt", device=str(model.device)) as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                if tensor.shape != wanted[key].shape:
                    raise ValueError(f"{folder / name}: {key} is {list(tensor.shape)}; "
                                     f"expected {list(wanted[key].shape)}")
                wanted[key].copy_(tensor)
    return model


def save(model: Model, folder: str | pathlib.Path, shards: int = 1) -> None:
    """Writes what load() reads."""
    folder = pathlib.Path(folder)
    config.write(model.config, folder / "config.json")
    tensors = {name: tensor.contiguous() for name, tensor in model.public()}
    names = [ONE] if shards == 1 else [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    files = {key: names[n * shards // len(tensors)] for n, key in enumerate(tensors)}
    for name in names:
        safetensors.torch.save_file({key: tensors[key] for key in tensors if files[key] == name}, folder / name,
                                    metadata={"format": "pt"})
    if shards > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": files}, indent=2) + "\n")
