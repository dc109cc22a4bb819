"""Sources that cannot be ingested: one line that names file, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from test_sources import ids, png, write_parquet

from headwater.ingest import ColumnNames, SourceError, open_source


def one_line(caught: pytest.ExceptionInfo[SourceError]) -> bool:
    return "\n" not in str(caught.value)


def test_places_without_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "notes.md").write_text("x")
    write_parquet(tmp_path / "broken" / "a.parquet")
    (tmp_path / "broken" / "b.parquet").write_bytes(b"PAR1 and no more")
    write_parquet(tmp_path / "mixed" / "a.parquet", 1, n=[1])
    write_parquet(tmp_path / "mixed" / "b.parquet", 1, n=["one"])
    nothing = {"text": pa.array([], pa.string()), "image": pa.array([], pa.binary())}
    pq.write_table(pa.table(nothing), tmp_path / "zero.parquet")
    for name, message in (
        ("absent", "does not exist"),
        ("empty", "holds no Parquet file"),
        ("notes.md", "is no Parquet file"),
        ("broken", r"b\.parquet cannot be read as Parquet"),
        ("mixed", "do not fit together"),
        ("zero.parquet", "holds no records"),
    ):
        with pytest.raises(SourceError, match=message) as caught:
            open_source(tmp_path / name)
        assert one_line(caught)


def test_a_damaged_parquet_file_is_named_while_streaming(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", 50)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    source = open_source(path)
    with pytest.raises(SourceError, match=r"c\.parquet cannot be read as Parquet"):
        list(source)


def test_missing_captions_and_images_name_the_flag(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", 2, text=None, alt=["a", "b"])
    with pytest.raises(SourceError, match=r"--caption-column.*columns: image, alt") as caught:
        open_source(path)
    assert one_line(caught)
    path = write_parquet(tmp_path / "d.parquet", 2, image=None, photo=[png(1)] * 2)
    with pytest.raises(SourceError, match=r"--image-column.*columns: text, photo"):
        open_source(path)
    assert len(open_source(path, columns=ColumnNames(image="photo"))) == 2
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(png(1))
    with pytest.raises(SourceError, match=r"\.txt beside"):
        open_source(tmp_path / "folder")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ColumnNames(caption="nope"),
            "no column 'nope' .--caption-column.; its columns: image, te",
        ),
        (ColumnNames(rights_holder="nope"), "--rights-holder-column"),
        (ColumnNames(caption="image"), "'image' .* holds binary, not text"),
        (ColumnNames(image="n"), "'n' .* holds int64, not image bytes"),
    ],
)
def test_wrong_column_flags(tmp_path: Path, names: ColumnNames, message: str) -> None:
    path = write_parquet(tmp_path / "c.parquet", 2, n=[1, 2])
    with pytest.raises(SourceError, match=message) as caught:
        open_source(path, columns=names)
    assert one_line(caught)


def test_wrong_metadata(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    jsonl, table = tmp_path / "metadata.jsonl", tmp_path / "metadata.csv"
    for text, message in (
        ('{"file_name": "a.png", "text": "x"}\n{"file', "line 2: not JSON"),
        ("[1]", "line 1: not a JSON object"),
        ('{"file_name":"a","text":"x","n":1}\n{"file_name":"b","text":"y","n":"z"}', "'n' have no"),
        ('{"text": "x"}', "--image-column"),
        ("", "--image-column|holds no records"),
    ):
        jsonl.write_text(text)
        with pytest.raises(SourceError, match=message) as caught:
            open_source(tmp_path)
        assert one_line(caught)
    table.write_text("file_name,text\na.png,x\n")
    with pytest.raises(SourceError, match="keep one"):
        open_source(tmp_path)
    jsonl.unlink()
    assert ids(open_source(tmp_path)) == ["a.png"]
    for text, message in (
        ("file_name,text\na.png,x,y\n", "cannot be read as CSV"),
        ("text,text\na,b\n", "two columns"),
    ):
        table.write_text(text)
        with pytest.raises(SourceError, match=message):
            open_source(tmp_path)


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_must_be_positive(tmp_path: Path, limit: int) -> None:
    with pytest.raises(SourceError, match=f"--limit {limit}"):
        open_source(write_parquet(tmp_path / "c.parquet"), limit=limit)
