"""What the runs of a folder are called where no comparison has named them. Needs neither models nor tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results import Record


def rows_of(records: Iterable[Record]) -> list[Record]:
    """The last record of each row and seed, its `model` being the name of the row.

    A row is what was asked for under one label. Runs of one label that were made with other options are rows
    of their own, named by what they differ in.
    """
    labels: dict[str, list[Record]] = {}
    for record in records:
        labels.setdefault(label_of(record), []).append(record)
    last: dict[tuple[str, int], Record] = {}
    for label, found in labels.items():
        for record, words in zip(found, _differences(found), strict=True):
            name = " ".join([label, *words])
            last[name, record["seed"]] = {**record, "model": name}
    return list(last.values())


def label_of(record: Mapping[str, Any]) -> str:
    """`RunSpec.label` of the record's run; older records do not say it and are called by their model."""
    variant = (record.get("settings") or {}).get("variant") or ""
    label: str = record.get("label") or f"{record['model']} {variant}".rstrip()
    return label


def _differences(records: Sequence[Record]) -> list[list[str]]:
    """For each record the options, as assignments, that not all of the records share."""
    options = [_options(record) for record in records]
    # An older library had fewer settings of the training; what a record does not say is no difference.
    keys = [
        key
        for key in dict.fromkeys(key for found in options for key in found)
        if key[0] != "train" or all(key in found for found in options)
    ]
    differing = [key for key in keys if len({found.get(key) for found in options}) > 1]
    return [[f"{key[1]}={found[key]}" for key in differing if key in found] for found in options]


def _options(record: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    settings = record.get("settings") or {}
    return {
        (part, name): value if isinstance(value, str) else json.dumps(value)
        for part in ("train", "task_options", "model_options")
        for name, value in (settings.get(part) or {}).items()
    }
