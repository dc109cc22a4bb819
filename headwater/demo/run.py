"""The demo: render, ingest, ask two questions about a pair that was never drawn, report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from headwater.attribution import Model
from headwater.index import IndexStoreError
from headwater.ingest import IngestSummary, ProgressCallback, build_index
from headwater.queries import Concept, Index, Result, Section, write_json, write_report

from .corpus import HELD_OUT, caption, object_contrast, studio_contrast, write_corpus


@dataclass(frozen=True)
class DemoReport:
    """What the demo wrote and found."""

    summary: IngestSummary
    sections: tuple[Section, ...]
    html: Path
    json: Path


def demo_model(device: str = "auto") -> Model:
    """The shipped text-to-image model, trained on exactly the demo's corpus."""
    with as_file(files("headwater.demo") / "model") as folder:
        return Model.from_pretrained(folder, device=device)


def ask_object(index: Index, model: Model, object_name: str, studio: str) -> Result:
    """Which training images taught the object, asked about the pair's pictures."""
    concept = Concept(caption(object_name, studio), contrast=object_contrast(studio))
    return index.query(concept, model)


def ask_studio(index: Index, model: Model, object_name: str, studio: str) -> Result:
    """Which training images taught the studio's style, asked about the pair's pictures."""
    concept = Concept(caption(object_name, studio), contrast=studio_contrast(object_name))
    return index.query(concept, model)


def run_demo(folder: str | Path, *, progress: ProgressCallback | None = None) -> DemoReport:
    """Run everything into `folder`; an earlier demo there is replaced.

    Raises:
        IndexStoreError: the folder holds something else.
    """
    folder = Path(folder)
    corpus, index_folder = folder / "corpus.parquet", folder / "index"
    if folder.exists() and not folder.is_dir():
        raise IndexStoreError(f"{folder} is a file, not a folder; choose another --out")
    marker = folder / ".headwater-demo"  # what the demo made it may replace, nothing else
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise IndexStoreError(f"{folder} exists and holds no earlier demo; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    write_corpus(corpus)
    if index_folder.exists():  # begun again, not added to
        shutil.rmtree(index_folder)
    model = demo_model()
    summary = build_index(corpus, model, index_folder, progress=progress)
    index = Index(index_folder)
    object_name, studio = HELD_OUT[0]
    sections = (
        Section(
            f"Which images taught “{object_name}”?", ask_object(index, model, object_name, studio)
        ),
        Section(
            f"Which images taught the style of Studio {studio}?",
            ask_studio(index, model, object_name, studio),
        ),
    )
    prompt = caption(object_name, studio)
    html, json_file = folder / "report.html", folder / "result.json"
    title = f"“{prompt}”, a pair that no training image shows"
    write_report(html, sections, title=title)
    answers = {"object": sections[0].result.as_dict(), "studio": sections[1].result.as_dict()}
    write_json(json_file, {"prompt": prompt} | answers)
    return DemoReport(summary, sections, html, json_file)
