"""Reads the tree of AbC, Attribution by Customization (Wang et al. 2023), as it is downloaded.

Everything is below one folder; what this reads of it:

    all_tasks.json              custom_diffusion/tasks/all_tasks.json of the repository
                                PeterWang512/AttributeByUnlearning: a list of objects, one for each
                                picture (20 models x 20), with `synth_image_path`, `prompt`,
                                `test_case`, `test_case_ind`, `model_path`, `train_prompt`
    json/TEST_CASE.json         a list; of entry `test_case_ind` the paths under `exemplar`, which
                                begin with `dataset/` for the tree's own folder
    exemplar/, synth/           the pictures
    models/.../<new1>.bin       {word: embedding [768]} as diffusers' Custom Diffusion saves it
    models/.../pytorch_custom_diffusion_weights.pt
                                {name of a parameter of the UNet: tensor}: to_k, to_v of attn2
    laion_latents.npy           [2 N, 4, 64, 64]: x_0 of the distractors (times the VAE's scale),
                                then of their mirror images, which are not used
    laion_text_embeddings.npy   [N, 77, 768]: what SD-1.4 hears of the captions; used to check that
                                the captions belong to the latents
    laion_subset/captions.txt   a caption a line, in the order of the latents

Arrays stay on disk and are mapped. The assets are `sywang/GenDataAttribution` and
`sywang/AttributeByUnlearning` on the hub, for non-commercial use; we hold none of them.

Concept-TRAK's own figures on AbC (2507.06547) are not of these models: its code takes the folders
`models-ti` and `synth-ti`, textual inversions of the same exemplars with the weights of SD-1.4,
which were not published. `read_tree(folders=...)` reads such a tree too.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headwater.attribution import ImageRejected, Model, ModelError, decode, fit
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.finetuning import add_words

WEIGHTS = "pytorch_custom_diffusion_weights.pt"
EMBEDDINGS = ("<new1>.bin", "new1.bin")
_REMEDY = (
    "complete the tree with custom_diffusion/data/download_abc.sh of "
    "github.com/PeterWang512/AttributeByUnlearning"
)
# Half precision and another CLIP implementation move an embedding by less than this share.
_SAME_TEXT = 0.05
# diffusers' trainer names the trained copies so inside of its attention processors.
_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_custom_diffusion\.")


@dataclass(frozen=True)
class Task:
    """A picture whose teachers are known."""

    picture: Path
    prompt: str
    contrast: str  # the prompt without the new word


@dataclass(frozen=True)
class Customised:
    """A model that learned one concept from a few exemplars, and the pictures that it drew."""

    name: str  # "artchive/african"
    kind: str  # "artchive", "bamfg", "observed_imagenet", "unobserved_imagenet"
    folder: Path
    caption: str  # that it was trained with, beside every exemplar
    exemplars: tuple[Path, ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Laion:
    """The distractors: pictures that the base model was trained with."""

    latents: npt.NDArray[Any]  # [>= N, C, h, w] mapped
    heard: npt.NDArray[Any]  # [>= N, L, D] mapped
    captions: tuple[str, ...]  # N

    def __len__(self) -> int:
        return len(self.captions)

    def x_0(self, start: int, stop: int) -> Tensor:
        """Clean samples [stop - start, C, h, w] float32."""
        return torch.from_numpy(np.array(self.latents[start:stop], np.float32))

    def check(self, model: Model) -> None:
        """Refuse captions in another order than the latents, latents of another model or scale.

        Raises:
            BenchmarkError: names the file and the row.
        """
        shape = tuple(self.latents.shape[1:])
        if shape != model.sample_shape:
            raise BenchmarkError(
                f"laion_latents.npy holds {shape}, the model draws {model.sample_shape}; "
                "give --model the base model that the tree was made with (SD-1.4)"
            )
        size = float(self.x_0(0, min(64, len(self))).square().mean().sqrt())
        if not 0.2 < size < 3:
            raise BenchmarkError(
                f"laion_latents.npy has the root mean square {size:.3g}; x_0 has about 1: "
                "multiply the latents by the VAE's scaling_factor"
            )
        rows = sorted({0, len(self) // 2, len(self) - 1})
        states = model.encode_prompts([self.captions[row] for row in rows])
        heard = {} if states is None else dict(states.tensors)
        for row, mine in zip(rows, heard["encoder_hidden_states"].cpu(), strict=True):
            theirs = torch.from_numpy(np.array(self.heard[row], np.float32))
            if mine.shape != theirs.shape or (mine - theirs).norm() > _SAME_TEXT * theirs.norm():
                raise BenchmarkError(
                    f"laion_text_embeddings.npy, row {row}, is not what the model hears of line "
                    f"{row + 1} of laion_subset/captions.txt ({self.captions[row]!r}): another "
                    f"base model, or another order; {_REMEDY}"
                )


@dataclass(frozen=True)
class Tree:
    """What AbC asks."""

    customised: tuple[Customised, ...]
    laion: Laion


def read_tree(
    root: str | Path,
    *,
    tasks: str | Path | None = None,
    laion: int = 100_000,
    folders: tuple[str, str] = ("models", "synth"),
) -> Tree:
    """Read the tree's tables and map its arrays; no picture is opened yet.

    Args:
        root: the tree's folder (`data/abc`).
        tasks: list of tasks; None: `all_tasks.json` in the folder.
        laion: distractors, the first so many of the subset.
        folders: where models and pictures are sought instead of `models` and `synth`.

    Raises:
        BenchmarkError: a file that is missing, or not as this module says.
    """
    root = Path(root)
    if not root.is_dir():
        raise BenchmarkError(f"AbC folder {root} does not exist; check --tree")
    listed = Path(tasks) if tasks is not None else root / "all_tasks.json"
    found: dict[str, Customised] = {}
    cases: dict[str, Any] = {}
    for number, task in enumerate(_json(listed)):
        try:
            case, place = task["test_case"], task["test_case_ind"]
            path, prompt = task["model_path"], task["prompt"]
            picture, caption = task["synth_image_path"], task["train_prompt"]
        except (KeyError, TypeError) as error:
            raise BenchmarkError(
                f"{listed}: task {number} has no {error}; take the file anew"
            ) from None
        if case not in cases:
            cases[case] = _json(root / "json" / f"{case}.json")
        if not 0 <= place < len(cases[case]):
            raise BenchmarkError(f"{root}/json/{case}.json has no entry {place} (task {number})")
        asked = Task(root / _moved(picture, "synth", folders[1]), prompt, without_word(prompt))
        if path not in found:
            exemplars = cases[case][place].get("exemplar", [])
            if not exemplars:
                raise BenchmarkError(f"{root}/json/{case}.json, entry {place}, names no exemplar")
            found[path] = Customised(
                name=path.removeprefix("models/"),
                kind=case.removeprefix("test_"),
                folder=root / _moved(path, "models", folders[0]),
                caption=caption,
                exemplars=tuple(root / str(e).removeprefix("dataset/") for e in exemplars),
                tasks=(),
            )
        before = found[path]
        found[path] = Customised(**{**vars(before), "tasks": (*before.tasks, asked)})
    if not found:
        raise BenchmarkError(f"{listed} lists no task; take the file anew")
    return Tree(tuple(found.values()), _laion(root, laion))


def without_word(prompt: str) -> str:
    """The prompt without its new word: "a <new1> cat" -> "a cat"."""
    return " ".join(re.sub(r"<[^<>]+>", " ", prompt).split())


def check_files(customised: Customised, *, weights: bool) -> None:
    """Refuse a model of which a file is missing: a picture, its embedding or, if used, its weights.

    Raises:
        BenchmarkError: names the file.
    """
    needed = [*customised.exemplars, *(task.picture for task in customised.tasks)]
    needed.append(_embedding(customised))
    if weights:
        needed.append(customised.folder / WEIGHTS)
    for path in needed:
        if not path.is_file():
            raise BenchmarkError(f"{path} is missing; {_REMEDY}")


def read_pictures(paths: Sequence[Path], model: Model) -> Tensor:
    """Picture files as the model sees them, their centres: x_0 [N, C, h, w].

    Raises:
        BenchmarkError: a file that is missing or broken.
    """
    pictures = []
    for path in paths:
        try:
            pictures.append(fit(decode(path.read_bytes()), model.image_size))
        except OSError as error:
            raise BenchmarkError(f"{path}: {error.strerror}; {_REMEDY}") from error
        except ImageRejected as error:
            raise BenchmarkError(f"{path} cannot be used ({error}); {_REMEDY}") from error
    return model.encode_pictures(np.stack(pictures))


def customise(base: Model, customised: Customised, *, weights: bool) -> Model:
    """A copy of the base model that knows the new word and, with `weights`, has the new weights.

    Files are read as tensors; nothing in them is run.

    Raises:
        BenchmarkError: a file that is missing, damaged or made for another model.
    """
    pipeline = copy.deepcopy(base.family.pipeline)
    path = _embedding(customised)
    try:
        add_words(pipeline, _tensors(path))
    except ModelError as error:
        raise BenchmarkError(f"{path}: {error}") from error
    if weights:
        _put_weights(pipeline.unet, customised.folder / WEIGHTS)
    dtype = str(base.dtype).removeprefix("torch.")
    return Model.from_pipeline(pipeline, device=str(base.device), dtype=dtype)


def _embedding(customised: Customised) -> Path:
    paths = [customised.folder / name for name in EMBEDDINGS]
    return next((path for path in paths if path.is_file()), paths[0])


def _put_weights(unet: Any, path: Path) -> None:
    parameters = dict(unet.named_parameters())
    found = {_PROCESSOR.sub(r".\1.", name): tensor for name, tensor in _tensors(path).items()}
    if not found:
        raise BenchmarkError(f"{path} holds no weights; {_REMEDY}")
    for name, tensor in found.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise BenchmarkError(
                f"{path}: {name} {tuple(tensor.shape)} is no parameter of the model's UNet; give "
                "--model the base model that it was fine-tuned from (SD-1.4)"
            )
        with torch.no_grad():
            parameters[name].copy_(tensor)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}; {_REMEDY}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BenchmarkError(f"{path} cannot be read as tensors ({reason}); {_REMEDY}") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise BenchmarkError(f"{path} holds no table of tensors; {_REMEDY}")
    return found


def _laion(root: Path, rows: int) -> Laion:
    latents, heard = (
        _mapped(root / name) for name in ("laion_latents.npy", "laion_text_embeddings.npy")
    )
    path = root / "laion_subset" / "captions.txt"
    try:
        with path.open(encoding="utf-8") as lines:
            captions = tuple(line.strip() for line, _ in zip(lines, range(rows), strict=False))
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}; {_REMEDY}") from error
    held = {
        "laion_latents.npy (a picture and its mirror image)": len(latents) // 2,
        "laion_text_embeddings.npy": len(heard),
        "laion_subset/captions.txt": len(captions),
    }
    for name, count in held.items():
        if count < rows:
            raise BenchmarkError(
                f"{root}/{name} holds {count} of {rows} rows; ask for fewer (--laion)"
            )
    if rows < 1:
        raise BenchmarkError(f"--laion {rows} is not positive; the published runs take 100000")
    return Laion(latents, heard, captions)


def _mapped(path: Path) -> npt.NDArray[Any]:
    try:
        mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror or error}; {_REMEDY}") from error
    except ValueError as error:
        raise BenchmarkError(f"{path} is no array file ({error}); {_REMEDY}") from error


def _moved(path: str, folder: str, other: str) -> str:
    return other + path.removeprefix(folder) if path.startswith(f"{folder}/") else path


def _json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}; {_REMEDY}") from error
    except ValueError as error:
        raise BenchmarkError(f"{path} is no JSON ({error}); {_REMEDY}") from error
    if not isinstance(found, list):
        raise BenchmarkError(f"{path} is no list; {_REMEDY}")
    return found
