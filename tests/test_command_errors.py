"""What the command line refuses: each time one line that names what to do, and nothing is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import Command, ask, corpus_table, one_line

from headwater import Concept, Index, Model, QueryError, Recipe
from headwater.index import StoredIndex

SMALL = ("--timesteps", 2, "--dim", 256, "--quiet")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("missing", "does not exist; check --model"),
        ("empty", "not a diffusers pipeline"),
        ("halved", "cannot be loaded as a diffusers pipeline"),
        ("no/hub/id", "does not exist; check --model"),
    ],
)
def test_bad_model_folder(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path, broken: str, message: str
) -> None:
    folder: Path | str = tmp_path / broken
    if broken == "empty":
        (tmp_path / broken).mkdir()
    elif broken == "halved":
        shutil.copytree(model_folder, folder)
        (tmp_path / broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    elif broken == "no/hub/id":
        folder = broken
    err = one_line(*headwater("ingest", corpus, "--model", folder, "--out", tmp_path / "i", *SMALL))
    assert message in err
    assert str(folder) in err
    assert not (tmp_path / "i").exists()


def bad_source(tmp_path: Path, kind: str) -> Path:
    table = corpus_table(3)
    if kind == "no captions":
        table = table.drop_columns(["caption"])
    elif kind == "empty captions":
        table = table.set_column(2, "caption", pa.array([None, "", " "]))
    elif kind == "no images":
        table = table.drop_columns(["image"])
    elif kind == "all broken":
        table = table.set_column(1, "image", pa.array([b"", b"x", b""]))
    elif kind == "no rows":
        table = table.slice(0, 0)
    elif kind == "text file":
        (tmp_path / "s.parquet").write_text("hello")
        return tmp_path / "s.parquet"
    elif kind == "missing":
        return tmp_path / "nowhere"
    pq.write_table(table, tmp_path / "s.parquet")
    return tmp_path / "s.parquet"


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("no captions", (), "--caption-column"),
        ("no images", (), "--image-column"),
        ("all broken", (), "no usable image"),
        ("no rows", (), "no records"),
        ("text file", (), "Parquet"),
        ("missing", (), "does not exist"),
        ("fine", ("--caption-column", "titel"), "titel"),
        ("fine", ("--where", "\"group\" = 'none'"), "widen it"),
        ("fine", ("--where", "grup = 'even'"), "group"),
        ("fine", ("--where", "read_csv('/etc/passwd')"), "read_csv"),
        ("fine", ("--where", "true; drop table items"), "drop table"),
        ("fine", ("--limit", 0), "--limit 0"),
        ("fine", ("--batch-size", 0), "--batch-size 0"),
        ("fine", ("--method", "magic"), "das-mean, probe, mixed, dps, cfg"),
        ("fine", ("--scaling", "row"), "timestep, layer, none"),
        ("fine", ("--levels", "1-0"), "0-1 is all of it"),
        ("fine", ("--parameters", "nothing_like_it"), "matches no parameter"),
        ("fine", ("--dim", 0), "--dim 0"),
        ("fine", ("--projection", "fourier"), "sjlt, mask, factored, trak, identity"),
        ("fine", ("--device", "foo"), "--device foo cannot be used"),
        ("empty captions", (), "has a caption"),
        ("fine", ("--dtype", "int8"), "float32"),
    ],
)
def test_bad_ingest_leaves_nothing_behind(
    headwater: Command, tmp_path: Path, model_folder: Path, kind: str, flags: tuple[object, ...],
    message: str,
) -> None:  # fmt: skip
    source = bad_source(tmp_path, kind)
    words = ("ingest", source, "--model", model_folder, "--out", tmp_path / "i", *SMALL, *flags)
    assert message in one_line(*headwater(*words))
    assert not (tmp_path / "i").exists()


def test_out_folder_that_is_no_index_or_one_of_another_space(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path, index: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out, message in (
        (tmp_path / "mine", "is no index"),
        (tmp_path / "file", "not a folder"),
        (index, "another feature space; different: recipe.seed (3 against 0)"),
    ):
        words = ("ingest", corpus, "--model", model_folder, "--out", out, *SMALL, "--seed", 3)
        assert message in one_line(*headwater(*words))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert StoredIndex.open(index).manifest.rows == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "a cat", "--contrast", "a cat"), "zero gradient"),
        ((), "no concept was given"),
        (("--prompt", "zebra", "--contrast", "yak"), "words it does not know"),
        (("--prompt", "a cat", "--top", 11), "10 items can be ranked"),
        (("--prompt", "a cat", "--top", 0), "choose 1 to 10"),
        (("--prompt", "a cat", "--where", "licence = 'GPL'"), "widen --where"),
        (("--prompt", "a cat", "--where", "licens = 'GPL'"), "licence"),
        (("--prompt", "a cat", "--where", "(select 1) = 1"), "subquer"),
        (("--prompt", "a cat", "--method", "dps"), "training method"),
        (("--prompt", "a cat", "--method", "magic"), "contrast, slider, image, journey"),
        (("--prompt", "a cat", "--damping", 0), "must be positive"),
        (("--prompt", "a cat", "--damping", "inf"), "must be positive"),
        (("--prompt", "a cat", "--guidance", "nan"), "must be finite"),
        (("--prompt", "a cat", "--method", "image", "--contrast", "a"), "takes no contrast"),
        (("--prompt", "a cat", "--method", "image", "--alone", "a"), "takes no --alone"),
        (("--prompt", "a cat", "--method", "slider", "--alone", "a"), "takes no --alone"),
        (("--prompt", "a cat", "--alone", "a"), "the rest as --contrast"),
        (("--prompt", "a cat", "--context", "a dog"), "'a dog' is no pair; write it as"),
        (("--prompt", "a cat", "--context", "a | b | c"), "'a | b | c' is no pair"),
        (("--prompt", "a cat", "--context", "a | a"), "both sides of a context are 'a'"),
        (("--prompt", "a cat", "--contrast", "a", "--context", "a | a cat"), "take back"),
        (("--context", "a cat | a"), "no concept was given"),
        *(
            (("--prompt", "a cat", "--method", method, "--context", "a | b"), "takes no --context")
            for method in ("image", "journey", "slider")
        ),
        (("--prompt", "a cat", "--device", "foo"), "--device foo cannot be used"),
        (("--prompt", "a cat", "--json", "no/such/folder/r.json"), "folder that exists"),
        (("--prompt", "a cat", "--seeds", 0), "at least 1"),
        (("--prompt", "a cat", "--image", "nowhere.png"), "nowhere.png"),
        (("--prompt", "a cat", "--image", __file__), "cannot be used"),
    ],
)
def test_bad_question(
    headwater: Command, index: Path, model_folder: Path, flags: tuple[object, ...], message: str
) -> None:
    assert message in one_line(*ask(headwater, index, model_folder, *flags))


def test_index_of_another_model_or_recipe_says_which_part_differs(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path
) -> None:
    other = tiny.saved(tiny.stable_diffusion(seed=1), tmp_path / "other")
    err = one_line(*ask(headwater, index, other, "--prompt", "a cat"))
    assert "model.denoiser" in err
    assert "model.scheduler" not in err
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert ask(headwater, index, moved, "--prompt", "a cat")[0] == 0
    model = Model.from_pretrained(model_folder, device="cpu")
    with pytest.raises(QueryError, match=r"recipe\.method \(dsm against dtrak\)"):
        Index(index).query(
            Concept("a cat"), model, recipe=Recipe(method="dsm", timesteps=2, dim=256)
        )


def test_not_an_index_or_an_unfinished_one(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path
) -> None:
    for words in (
        ("inspect", tmp_path / "no"),
        ("query", tmp_path / "no", "--model", model_folder),
    ):
        assert str(tmp_path / "no") in one_line(*headwater(*words))
    broken = shutil.copytree(index, tmp_path / "broken")
    (broken / "manifest.json").unlink()
    assert "is no index" in one_line(*headwater("inspect", broken))
    (broken / "job").mkdir()
    (broken / "job/job.json").touch()
    assert "is not finished" in one_line(*headwater("inspect", broken))


def test_folder_that_was_there_stays_after_an_error(
    headwater: Command, tmp_path: Path, model_folder: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    source = bad_source(tmp_path, "all broken")
    words = ("ingest", source, "--model", model_folder, "--out", tmp_path / "link", *SMALL)
    assert "no usable image" in one_line(*headwater(*words))
    assert list((tmp_path / "link").iterdir()) == []
