"""The published comparison: its parts, each a command of `memory-bench`, and what is kept of them.

A part that was interrupted goes on, and one that is finished is only reported anew. After each part its
tables, pictures and lines of results (no weights) go to the folder for publication, and its tables into a
document, between markers; the words around them are left as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.document import as_markdown
from benchmarks.endings import EXIT_BUSY, EXIT_INTERRUPTED
from benchmarks.overview import document as overview_document
from benchmarks.overview import draw, gather
from benchmarks.results import Results, exclusive, read_json, write_atomically
from memory_models.registry import nearest

TASKS = (
    *("recall", "rewrite", "copy", "reverse", "selective-copy", "needle", "ballet", "text"),
    # Known settings of other people's papers.
    *("mqar", "rmt-copy", "rmt-reverse"),
)
# Longer sequences of these have the same vocabulary, so their models are evaluated on them as they are.
LENGTHENED = ("rewrite", "selective-copy", "needle")
FACTORS = ("2", "4", "8", "16")
GRID = ("1e-3", "3e-3", "6e-3", "1.2e-2")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One table of the study.

    Attributes:
        name: for `--only`, the folder and the markers.
        title: heading in the document.
        command: words after `memory-bench`.
        folder: of its results.
        table: the file, without its ending, whose tables are published: `table` or `sweep`.
    """

    name: str
    title: str
    command: tuple[str, ...]
    folder: Path
    table: str = "table"


def parts(
    *,
    work: Path,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 2,
    on: str = "local",
    smoke: bool = False,
    steps_scale: float = 1.0,
) -> list[Part]:
    """The parts of the study in their order.

    Args:
        work: folder for the runs.
        only: names of parts; empty means all.
        seeds: seeds of every run.
        jobs: processes at once.
        on: where they run, `local` or `ray`.
        smoke: tiny sizes and few steps.
        steps_scale: share of each task's usual steps.

    Raises:
        LookupError: if there is no part of such a name.
        ValueError: if `steps_scale` is not positive.
    """
    if steps_scale <= 0:
        raise ValueError(f"steps_scale ({steps_scale}) must be positive")
    common = ["--seeds", *map(str, seeds), "--jobs", str(jobs), *(["--smoke"] if smoke else [])]

    def part(name: str, title: str, kind: str, task: str, *words: str, folder: str = "") -> Part:
        shorter = [] if steps_scale == 1 or smoke else ["--steps", str(_steps(task, steps_scale))]
        place = ["--on", on] if kind == "compare" and on != "local" else []
        out = work / (folder or name)
        command = (kind, "--task", task, *words, *common, *shorter, *place, "--out", str(out))
        return Part(
            name=name, title=title, command=command, folder=out, table="sweep" if kind == "sweep" else "table"
        )

    found = []
    for task in TASKS:
        longer = ("--extrapolate", *FACTORS) if task in LENGTHENED else ()
        found.append(part(task, f"All models on `{task}`", "compare", task, "--models", "all", *longer))
    # Sweeps lie in the comparison's folder, so that a run they have in common is done once.
    found += [
        part(
            "text-memories",
            "`memorizing` on `text` by the size of its memory",
            "sweep",
            "text",
            *("--model", "memorizing", "--mode", "both", "--vary", "memories=0,256,1024,4096"),
            folder="text",
        ),
        part(
            "recall-keys",
            "`memorizing` on `recall`: what its keys are made of",
            "sweep",
            "recall",
            *("--model", "memorizing", "--vary", "shift_keys=false,true", "tie_keys=false,true"),
            folder="recall",
        ),
        part(
            "recall-writes",
            "`memformer` on `recall`: ways to write, by the number of slots",
            "sweep",
            "recall",
            *("--model", "memformer", "--vary", "slots=8,32,128", "write=bmn,gru"),
            folder="recall",
        ),
        part(
            "recall-longer",
            "`recall`, longer than trained",
            "compare",
            "recall",
            *("--models", "all", "--extrapolate", "2", "4"),
        ),
        part(
            "recall-params",
            "`recall` with equal parameters and tuned learning rates",
            "compare",
            "recall",
            *("--models", "all", "--match", "params", "--tune", *GRID),
        ),
        part(
            "recall-state",
            "`recall` with equally large memories",
            "compare",
            "recall",
            *("--models", "all", "--match", "state"),
        ),
        Part(
            name="cost",
            title="What the models cost",
            command=("cost", "--out", str(work / "cost"), *(["--smoke"] if smoke else [])),
            folder=work / "cost",
        ),
    ]
    names = [one.name for one in found]
    for name in only:
        if name not in names:
            raise LookupError(f"the study has no part {name!r}. {nearest(name, names)}")
    return [one for one in found if not only or one.name in only]


def run_study(
    chosen: Sequence[Part], command: Callable[[Sequence[str]], int], *, publish: Path, document: Path
) -> int:
    """Do the parts and publish each as soon as it has ended; one that failed does not stop the others.

    Args:
        chosen: from `parts`.
        command: `memory-bench` itself: takes the words, returns the exit code.
        publish: folder with a folder for each part.
        document: Markdown file whose tables are written anew; made if it is not there.

    Returns:
        130 if a part was interrupted, else the largest exit code of all parts.

    Raises:
        OSError: if something cannot be written.
    """
    worst = 0
    for part in chosen:
        code = command(part.command)
        if code == EXIT_INTERRUPTED:
            return code
        worst = max(worst, code)
        if code == EXIT_BUSY:
            # What lies in the folder is another command's.
            continue
        if (part.folder / f"{part.table}.md").exists():
            publish_part(part, publish / part.name)
            write_tables(part, publish / part.name, document)
            write_overview(publish, document)
    return worst


def publish_part(part: Part, out: Path) -> list[Path]:
    """Copy the tables and pictures of a part, and the lines of its own runs; returns the files."""
    text = (part.folder / f"{part.table}.md").read_text(encoding="utf-8")
    pictures = [part.folder / name for name in re.findall(r"\]\(([\w.-]+\.png)\)", text)]
    files = [part.folder / f"{part.table}.md", part.folder / f"{part.table}.csv", *pictures]
    for file in (file for file in files if file.exists()):
        write_atomically(out / file.name, file.read_bytes())
    results = Results(part.folder)
    ids = _ids(part, results)
    lines = [json.dumps(record) for record in results.records() if ids is None or record["id"] in ids]
    write_atomically(out / "results.jsonl", "".join(f"{line}\n" for line in lines).encode())
    return sorted(out.iterdir())


def write_tables(part: Part, published: Path, document: Path) -> None:
    """Put the main tables of a part between its markers in the document; append them if it has none."""
    tables = main_tables((published / f"{part.table}.md").read_text(encoding="utf-8"))
    with exclusive(document):
        _put(document, part.name, part.title, tables)


def write_overview(publish: Path, document: Path) -> None:
    """Put all published comparisons, as one table and picture, into the document; nothing without any."""
    if gather(publish, TASKS) is None:
        return
    # All of it in turn: what was gathered before another study published must not come after its own.
    with exclusive(document):
        overview = gather(publish, TASKS)
        if overview is not None:
            words = as_markdown(overview_document(overview, draw(overview, document.parent)))
            _put(document, "overview", "All models on all tasks", words)


def _put(document: Path, name: str, heading: str, words: str) -> None:
    """Put words between their markers; append them, with a heading, where there are no markers.

    The caller holds the document (`exclusive`): others may be at work on other parts.
    """
    begin, end = f"<!-- study: {name} -->", f"<!-- end: {name} -->"
    text = document.read_text(encoding="utf-8") if document.exists() else "# Results\n"
    block = f"{begin}\n{words.strip()}\n{end}"
    if begin in text and end in text:
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{block}{after}"
    else:
        text = f"{text.rstrip()}\n\n## {heading}\n\n{block}\n"
    write_atomically(document, text.encode())


def main_tables(report: str) -> str:
    """What a report in Markdown says before its sections, and the sections that belong to its tables.

    Without pictures, whose files lie beside the report and not beside the document.
    """
    first, *sections = re.split(r"^## ", report, flags=re.MULTILINE)
    found = [first.partition("\n")[2]]
    # A level deeper, for the document has a section for the part itself.
    found += ["### " + re.sub(r"^###", "####", one, flags=re.MULTILINE) for one in sections if _is_shown(one)]
    return "\n\n".join(re.sub(r"^!\[.*$", "", one, flags=re.MULTILINE).strip() for one in found)


def _is_shown(section: str) -> bool:
    return section.startswith(("Longer than trained", "Training and decoding"))


def _ids(part: Part, results: Results) -> set[str] | None:
    """The runs of the part; None: all that the folder has."""
    if part.command[0] == "compare":
        noted = read_json(results.comparison) or {}
        return {run["id"] for run in [*noted.get("runs", ()), *noted.get("longer", ())]}
    if part.command[0] == "sweep":
        noted = read_json(results.sweep) or {}
        return {run["id"] for run in [*noted.get("points", ()), *noted.get("bases", ())]}
    return None


def _steps(task: str, scale: float) -> int:
    from benchmarks.defaults import EVERY, TRAINING
    from benchmarks.settings import TrainSettings

    usual = TRAINING.get(task, {}).get(EVERY, {}).get("steps", TrainSettings().steps)
    return max(1, round(scale * usual))
