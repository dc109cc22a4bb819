"""Tar shards: every sample with its own image, and whatever is lost is said."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Command, png

from headwater.index import StoredIndex
from headwater.ingest import ColumnNames, SourceError, difference, open_source, tar_shards


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(first, first + count)
        for member in (
            (f"{n:06d}.png", png(n)),
            (f"{n:06d}.txt", f"picture {n}".encode()),
            (f"{n:06d}.json", json.dumps({"n": n, "license": "MIT", "tags": ["a", n]}).encode()),
        )
    ]


def write_img2dataset(folder: Path, shard: int, count: int, failed: dict[int, str]) -> None:
    """What img2dataset 1.4x writes: failed samples stand in the Parquet file alone."""
    members: list[tuple[str, bytes]] = []
    rows = []
    # Downloads end in any order, the same one in both files.
    for n in sorted(range(count), key=lambda n: (n * 7) % count):
        key = f"{shard:05d}{n:04d}"
        meta: dict[str, Any] = {
            "caption": f"picture {n}", "url": f"http://x/{n}.jpg", "key": key,
            "status": "failed_to_download" if n in failed else "success",
            "error_message": failed.get(n), "width": None if n in failed else 20,
            "original_width": None if n in failed else 200, "sha256": f"{n:064x}",
        }  # fmt: skip
        rows.append(meta)
        if n not in failed:
            members += [(f"{key}.jpg", png(100 * shard + n)), (f"{key}.txt", b"picture"),
                        (f"{key}.json", json.dumps(meta).encode())]  # fmt: skip
    write_tar(folder / f"{shard:05d}.tar", members)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": count}))


def test_webdataset(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", samples(0, 5))
    write_tar(tmp_path / "00001.tar", samples(5, 3))
    source = open_source(tmp_path)
    items = list(source)
    assert [item.data for item in items] == [png(n) for n in range(8)]
    assert [item.caption for item in items] == [f"picture {n}" for n in range(8)]
    assert items[6].item_id == items[6].uri == items[6].key == "00001.tar/000006"
    assert (items[6].licence, items[6].error) == ("MIT", None)
    assert items[6].extra == {"__key__": "000006", "n": 6, "tags": '["a", 6]'}
    assert list(open_source(tmp_path).part(3, 7)) == items[3:7]
    assert [i.data for i in open_source(tmp_path, where="n IN (1, 6)")] == [png(1), png(6)]
    assert [i.uri for i in open_source(tmp_path / "00001.tar", limit=1)] == ["00001.tar/000005"]


def test_patterns_name_the_shards(tmp_path: Path) -> None:
    for n in range(12):
        write_tar(tmp_path / "w" / f"{n:03d}.tar", samples(n, 1))
    found = [item.uri for item in open_source(f"{tmp_path}/w/{{009..011}}.tar")]
    assert found == ["009.tar/000009", "010.tar/000010", "011.tar/000011"]
    found = [item.uri for item in open_source(f"{tmp_path}/{{w,w}}/00{{1,3}}.tar")]
    assert found == [f"w/00{n}.tar/00000{n}" for n in (1, 3, 1, 3)]
    with pytest.raises(SourceError, match=r"012\.tar, of the pattern .*, does not exist"):
        open_source(f"{tmp_path}/w/{{011..012}}.tar")
    with pytest.raises(SourceError, match=r"no range of at most"):
        open_source(f"{tmp_path}/w/{{5..1}}.tar")


def test_img2dataset_with_its_failures(tmp_path: Path) -> None:
    robots = "Use of image disallowed by X-Robots-Tag directive"
    write_img2dataset(tmp_path, 0, 9, {2: "HTTP Error 404: Not Found", 5: robots})
    write_img2dataset(tmp_path, 1, 4, {})
    source = open_source(tmp_path)
    items = {item.item_id: item for item in source}
    assert len(items) == len(source) == 13
    for shard, count in ((0, 9), (1, 4)):
        for n in range(count):
            item = items[f"{shard:05d}{n:04d}"]
            if (shard, n) not in ((0, 2), (0, 5)):
                assert (item.data, item.error) == (png(100 * shard + n), None)
            assert item.uri == f"{shard:05d}.tar/{item.item_id}"
            assert (item.caption, item.source) == (f"picture {n}", f"http://x/{n}.jpg")
            assert item.extra["original_sha256"] == f"{n:064x}"
    lost, refused = items["000000002"], items["000000005"]
    assert (lost.data, lost.error) == (None, "failed_to_download: HTTP Error 404: Not Found")
    assert lost.extra["original_status"] == "failed_to_download"
    assert (lost.opt_out, refused.opt_out) == (None, f"error_message={robots}")
    assert refused.error == f"failed_to_download: {robots}"
    chosen = open_source(tmp_path, where="status = 'success'")
    assert [i.error for i in chosen] == [None] * 11


def test_headers_are_read_once_and_only_where_images_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in range(4):
        write_img2dataset(tmp_path, shard, 6, {})
    read: list[str] = []
    honest = tar_shards._scanned

    def watched(path: Path, *args: Any, **options: Any) -> Any:
        read.append(path.name)
        return honest(path, *args, **options)

    monkeypatch.setattr(tar_shards, "_scanned", watched)
    source = open_source(tmp_path)
    assert read == []
    found = [item.data for start in range(8, 24, 4) for item in source.part(start, start + 4)]
    assert read == ["00001.tar", "00002.tar", "00003.tar"]
    assert found == [item.data for item in open_source(tmp_path)][8:]
    source = open_source(tmp_path)
    (tmp_path / "00003.tar").unlink()
    with pytest.raises(SourceError, match=r"00003\.tar cannot be read \(No such file"):
        list(source.part(17, 19))


def test_a_side_file_that_does_not_fit(tmp_path: Path) -> None:
    write_img2dataset(tmp_path, 0, 3, {})
    write_tar(tmp_path / "00000.tar", [("000000001.jpg", png(1))])
    items = {item.item_id: item for item in open_source(tmp_path)}
    assert items["000000001"].data == png(1)
    assert items["000000002"].error == "no image of this record in 00000.tar"
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "00000.parquet")
    with pytest.raises(SourceError, match=r"00000\.parquet has no column 'key'"):
        open_source(tmp_path)
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(SourceError, match=r"belong to none of them \(other\.parquet\)"):
        open_source(tmp_path)


@pytest.mark.parametrize("side", [False, True])
def test_a_shard_cut_short_anywhere_gives_its_whole_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, side: bool
) -> None:
    if side:
        write_img2dataset(tmp_path, 0, 4, {})
        path = tmp_path / "00000.tar"
    else:
        path = write_tar(tmp_path / "00000.tar", samples(0, 4))
        write_tar(tmp_path / "00001.tar", samples(9, 1))  # so that columns are always there
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {m.name: m.offset_data + m.size for m in tar}
        last = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
        names = [m.name.split(".")[0] for m in tar][::3]
    whole = {item.caption: item.data for item in open_source(tmp_path)}
    assert len(whole) == 4 if side else 5
    image = "jpg" if side else "png"
    for cut in [*range(1, last, 257), *ends.values(), last]:
        path.write_bytes(content[:cut])
        caplog.clear()
        found = list(open_source(tmp_path))
        found = [item for item in found if "00001.tar" not in item.uri]
        good = [item for item in found if item.error is None]
        for item in good:
            assert item.data == whole[item.caption]
        # Whole: the image, and where it says what the record is, the JSON at the sample's end.
        needed = image if side else "json"
        expected = sum(ends[f"{name}.{needed}"] <= cut for name in names)
        if not side and len(found) == 1:  # what a sample should have is not known
            expected = 0
        assert len(good) == expected, cut
        assert f"00000.tar is cut short at byte {cut}" in caplog.text
        for item in found:
            if item.error is not None:
                assert "00000.tar is cut short at byte" in item.error
    if side:
        assert len(found) == 4


def test_a_damaged_header_ends_a_shard_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "00000.tar", samples(0, 4))
    with tarfile.open(path) as tar:
        third = tar.getmember("000002.png").offset
    content = bytearray(path.read_bytes())
    content[third : third + 512] = b"\xff" * 512
    path.write_bytes(content)
    found = list(open_source(tmp_path))
    assert [item.data for item in found] == [png(0), png(1)]
    assert f"is damaged at byte {third}; 2 samples before are whole" in caplog.text


def test_samples_of_every_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        ("a/1.0.png", png(9)),  # the key ends at the first dot: no image extension
        ("a/2.mask.png", png(8)),
        ("a/2.JPG", png(2)),
        ("a/2.txt", "café".encode()),
        ("a/2.npy", b"123"),
        ("a/3.json", b'{"text": "no image here"}'),
        ("a/4.png", png(4)),
        ("a/4.json", b"{broken"),
        ("a/5.png", png(5)),
        ("a/5.json", b'["a list"]'),
        ("a/6.png", png(6)),
        ("a/6.txt", b"\xff\xfe"),
        ("a/2.png", png(7)),  # a key again
        ("b/2.png", png(10)),
        ("b/2.json", b'{"n": "six", "txt": "mine"}'),
        ("b/7.png", png(11)),
        ("b/7.json", b'{"n": 7}'),
    ]
    write_tar(tmp_path / "x.tar", members)
    items = list(open_source(tmp_path))
    assert [item.uri for item in items] == [
        f"x.tar/{key}" for key in ("a/1", "a/2", "a/3", "a/4", "a/5", "a/6", "a/2#6", "b/2", "b/7")
    ]
    assert [item.data for item in items] == [
        None, png(2), None, None, None, None, png(7), png(10), png(11),
    ]  # fmt: skip
    assert [item.error for item in items[2:6]] == [
        "no image in this sample of x.tar",
        "JSON that cannot be read in this sample of x.tar",
        "JSON that is no object in this sample of x.tar",
        "text that is not UTF-8 in this sample of x.tar",
    ]
    assert [item.extra["n"] for item in items[-2:]] == ["six", "7"]  # no common type: text
    masks = open_source(tmp_path, columns=ColumnNames(image="mask.png", caption="txt"))
    assert [item.data for item in masks if item.data] == [png(8)]
    with pytest.raises(SourceError, match=r"no sample of .* --image-column.*: .*mask\.png"):
        open_source(tmp_path, columns=ColumnNames(image="webp"))


def test_columns_of_shards_that_do_not_agree(tmp_path: Path) -> None:
    for name, n in (("0", 1), ("1", "one"), ("2", None)):
        write_tar(
            tmp_path / f"{name}.tar",
            [("a.png", png(1)), ("a.json", json.dumps({"n": n, "text": "x"}).encode())],
        )
    assert [item.extra["n"] for item in open_source(tmp_path)] == ["1", "one", None]


def test_what_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises(SourceError, match=r"x\.tar is no uncompressed tar archive"):
        open_source(tmp_path)


def test_signatures_of_shards(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "c", 0, 3, {})
    write_img2dataset(tmp_path / "c", 1, 3, {})
    before = open_source(tmp_path / "c").signature()
    assert sorted(before["files"]) == ["00000.tar", "00001.tar"]
    write_img2dataset(tmp_path / "c", 1, 3, {})
    assert difference(before, open_source(tmp_path / "c").signature(before)) is None
    write_img2dataset(tmp_path / "c", 1, 3, {1: "gone"})
    found = difference(before, open_source(tmp_path / "c").signature(before))
    assert found is not None
    assert found.startswith("00001.tar has ")


def test_shards_become_an_index(tmp_path: Path, model_folder: Path, headwater: Command) -> None:
    """Failures in quarantine, refusals and duplicates counted, nothing of them dropped."""
    robots = "Use of image disallowed by X-Robots-Tag directive"
    write_img2dataset(tmp_path / "c", 0, 5, {1: "HTTP Error 404", 3: robots})
    repeated = [("z.jpg", png(0)), ("z.json", b'{"caption": "again", "tdm_reservation": 1}')]
    write_tar(tmp_path / "c" / "00001.tar", repeated)
    code, _, err = headwater(
        "ingest", f"{tmp_path}/c/{{00000..00001}}.tar", "--model", model_folder,
        "--out", tmp_path / "i", "--timesteps", 2, "--dim", 64, "--quiet",
    )  # fmt: skip
    assert code == 0, err
    items = {item["item_id"]: item for item in StoredIndex.open(tmp_path / "i").items().to_pylist()}
    assert len(items) == 6
    assert items["000000001"]["error"] == "failed_to_download: HTTP Error 404"
    assert items["000000003"]["opt_out"] == f"error_message={robots}"
    assert items["00001.tar/z"]["opt_out"] == "tdm_reservation=1"
    assert items["00001.tar/z"]["status"] == "ok"
    assert items["00001.tar/z"]["sha256"] == items["000000000"]["sha256"]
    code, out, err = headwater("inspect", tmp_path / "i")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    for words in ("items 6", "quarantined 2", "1 x failed_to_download: HTTP Error 404",
                  "duplicates 1 of a file, 0 near by its looks",
                  "opted out 1 by the column opt_out"):  # fmt: skip
        assert words in flat
