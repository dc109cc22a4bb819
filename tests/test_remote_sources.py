"""Corpora behind fsspec URLs: what a local copy gives, to the item."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png

from headwater.ingest import SourceError, difference, open_source, places


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "_PAUSES", (0.0, 0.0))
        yield filesystem
    for path in filesystem.find("/corpora"):
        filesystem.rm(path)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Two Parquet files, images in the first and paths in the second, and a tar."""
    (tmp_path / "p" / "deep").mkdir(parents=True)
    (tmp_path / "p" / ".hidden").mkdir()
    (tmp_path / "p" / "deep" / "7.png").write_bytes(png(7))
    images: dict[str, Any] = {"a.parquet": [{"bytes": png(n), "path": None} for n in range(50)]}
    images["deep/b.parquet"] = [
        {"bytes": None, "path": path} for path in ("7.png", "../deep/7.png", "none.png")
    ]
    for name, cells in images.items():
        captions = [f"{name} {n}" for n in range(len(cells))]
        table = pa.table({"image": cells, "caption": captions, "n": range(len(cells))})
        pq.write_table(table, tmp_path / "p" / name, row_group_size=20)
    (tmp_path / "p" / ".hidden" / "c.parquet").write_bytes(b"junk")
    return tmp_path


def upload(memory: Any, folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            memory.pipe_file(f"/corpora/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("where", [None, "n % 7 = 2"])
def test_the_items_of_a_url_are_those_of_the_disk(memory: Any, local: Path, where: str) -> None:
    upload(memory, local)
    here = list(open_source(local / "p", where=where))
    assert any(item.data for item in here)
    for url in ("memory://corpora/p", "memory:///corpora/p/", f"file://{local}/p"):
        source = open_source(url, where=where)
        assert source.label == url
        assert list(source) == here
        assert list(source.part(3, 9)) == here[3:9]
    one = open_source("memory://corpora/p/a.parquet", limit=2)
    assert [item.uri for item in one] == ["a.parquet#0", "a.parquet#1"]


def test_local_urls_stay_mapped(local: Path) -> None:
    root, (path,) = places.places(f"file://{local}/p/a.parquet")
    assert root == path == local / "p" / "a.parquet"
    assert isinstance(path, Path)


def test_tar_shards_and_patterns_behind_a_url(memory: Any, tmp_path: Path) -> None:
    from test_tar_shards import samples, write_img2dataset, write_tar

    write_img2dataset(tmp_path, 0, 4, {1: "HTTP Error 404"})
    write_tar(tmp_path / "00001.tar", samples(0, 3))
    upload(memory, tmp_path)
    pattern = "{00000..00001}.tar"
    here = list(open_source(f"{tmp_path}/{pattern}"))
    assert len(here) == 7
    assert list(open_source(f"memory://corpora/{pattern}")) == here
    with pytest.raises(SourceError, match=r"memory://.*/00002\.tar, of the pattern"):
        open_source("memory://corpora/{00000..00002}.tar")


def test_signatures_of_urls(memory: Any, local: Path) -> None:
    upload(memory, local)
    before = open_source("memory://corpora/p").signature()
    assert list(before["files"])[:2] == ["a.parquet", "deep/b.parquet"]
    assert before["files"]["deep/none.png"] is None
    assert difference(before, open_source("memory://corpora/p").signature(before)) is None
    memory.pipe_file("/corpora/p/deep/7.png", png(8)[:-1] + b"x")
    found = difference(before, open_source("memory://corpora/p").signature(before))
    assert found is not None
    assert found.startswith("deep/7.png has ")


def test_files_without_a_mark_are_told_by_their_content(
    memory: Any, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(memory, local)
    honest = type(memory).info

    def bare(*arguments: Any, **options: Any) -> Any:
        found = honest(*arguments, **options)
        return {name: found[name] for name in ("name", "size", "type") if name in found}

    monkeypatch.setattr(type(memory), "info", bare)
    before = open_source("memory://corpora/p").signature()
    assert difference(before, open_source("memory://corpora/p").signature(before)) is None
    image = memory.cat_file("/corpora/p/deep/7.png")
    memory.pipe_file("/corpora/p/deep/7.png", image[:-1] + b"x")
    found = difference(before, open_source("memory://corpora/p").signature(before))
    assert found == "deep/7.png has other content of the same size"


@pytest.mark.parametrize(
    ("failures", "error"), [(2, None), (3, "image file cannot be read (timed out): 7.png")]
)
def test_a_store_that_does_not_answer_is_asked_again(
    memory: Any, local: Path, monkeypatch: pytest.MonkeyPatch, failures: int, error: str | None
) -> None:
    upload(memory, local)
    source = open_source("memory://corpora/p", where="n = 0", limit=2)
    honest, asked = type(memory).info, []

    def slow(self: Any, path: str, **options: Any) -> Any:
        if path.endswith("7.png") and len(asked) < failures:
            asked.append(path)
            raise TimeoutError(110, "timed out")
        return honest(self, path, **options)

    monkeypatch.setattr(type(memory), "info", slow)
    assert [item.error for item in source] == [None, error]


def test_a_table_beside_a_tar_is_not_overlooked(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_tar_shards import write_img2dataset

    write_img2dataset(tmp_path, 0, 2, {})
    upload(memory, tmp_path)
    honest = type(memory).info

    def slow(self: Any, path: str, **options: Any) -> Any:
        if path.endswith(".parquet"):
            raise TimeoutError(110, "timed out")
        return honest(self, path, **options)

    monkeypatch.setattr(type(memory), "info", slow)
    with pytest.raises(SourceError, match=r"00000\.parquet cannot be read \(timed out\)"):
        open_source("memory://corpora/00000.tar")


def test_urls_that_lead_nowhere(memory: Any) -> None:
    memory.pipe_file("/corpora/x.txt", b"1")
    for url, message in (
        ("memory://corpora/absent", "does not exist"),
        ("memory://corpora", "holds no Parquet file and no tar shard"),
        ("memory://corpora/x.txt", "is no Parquet file"),
        ("nosuch://bucket", "nosuch://bucket cannot be opened .*nosuch"),
    ):
        with pytest.raises(SourceError, match=message) as caught:
            open_source(url)
        assert "\n" not in str(caught.value)


def test_errors_of_a_file_system_are_told_in_a_line(
    memory: Any, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloud library raises kinds of its own, which no caller can know."""

    class Denied(Exception):
        pass

    def denied(*_: Any, **__: Any) -> Any:
        raise Denied("no credentials\nfor this bucket")

    upload(memory, local)
    source = open_source("memory://corpora/p", where="n = 0", limit=3)
    monkeypatch.setattr(type(memory), "cat_file", denied)
    assert [item.error for item in source] == [None, "image file cannot be read "
        "(Denied: no credentials for this bucket): 7.png"]  # fmt: skip
    monkeypatch.setattr(type(memory), "exists", denied)
    with pytest.raises(SourceError, match=r"cannot be read \(Denied: no credentials for"):
        open_source("memory://corpora/p")
    monkeypatch.setattr(type(memory), "info", denied)
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read \(Denied: no credentials"):
        source.signature()
