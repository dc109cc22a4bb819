"""The kinds of diffusers pipelines: what the denoiser of each hears, and how it is called."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditions import Conditions
from .errors import ModelError
from .family import Family


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: the states of one text encoder."""

    denoiser_name = "unet"
    required = ("text_encoder", "tokenizer")

    def check(self) -> None:
        """Refuse a UNet that hears sizes, classes, a guidance scale or grounding tokens."""
        super().check()
        self._refuse_settings(
            "addition_embed_type",
            "class_embed_type",
            "num_class_embeds",
            "encoder_hid_dim",
            "time_cond_proj_dim",
        )
        if self.denoiser.config.get("attention_type", "default") != "default":
            raise ModelError(f"{self.name}: a denoiser with gated attention is not supported")

    def encode(self, prompts: list[str], device: torch.device) -> Conditions:
        """Text states [B, L, D]."""
        states, _ = self.pipeline.encode_prompt(prompts, device, 1, False)
        return Conditions({"encoder_hidden_states": states})


class StableDiffusionXL(Family):
    """SDXL: the states of two text encoders, pooled text, and the picture's sizes."""

    denoiser_name = "unet"
    required = ("text_encoder_2", "tokenizer_2")
    optional = ("text_encoder", "tokenizer")

    def check(self) -> None:
        """Refuse a UNet whose additional conditions are not pooled text and six numbers."""
        super().check()
        kind = self.denoiser.config.get("addition_embed_type")
        if kind != "text_time":
            raise ModelError(f"{self.name}: addition_embed_type {kind!r} is not supported")
        self._refuse_settings(
            "class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The empty prompt may be encoded or be zero."""
        return {**super().facts, "zeros": self.pipeline.config.force_zeros_for_empty_prompt}

    def encode(self, prompts: list[str], device: torch.device) -> Conditions:
        """Text states [B, L, D], pooled text [B, P], sizes [B, 6] of an uncropped picture."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False
        )
        height, width = (side * self.factor for side in self.sample_size)
        sizes = torch.tensor([height, width, 0, 0, height, width], device=device).to(states.dtype)
        return Conditions(
            {
                "encoder_hidden_states": states,
                "text_embeds": pooled,
                "time_ids": sizes.expand(len(prompts), 6),
            }
        )

    def unconditional(self, device: torch.device) -> Conditions:
        """The empty prompt, or zeros where the pipeline says so; the sizes stay."""
        empty = self.encode([""], device)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = empty.replaced("encoder_hidden_states", 0.0).replaced("text_embeds", 0.0)
        return empty

    def output(self, denoiser: Any, x: Tensor, time: Tensor, c: dict[str, Tensor]) -> Tensor:
        """The UNet's output."""
        added = {name: c[name] for name in ("text_embeds", "time_ids")}
        states = c["encoder_hidden_states"]
        found: Tensor = denoiser(
            x, timestep=time, encoder_hidden_states=states, added_cond_kwargs=added
        ).sample
        return found


class StableDiffusion3(Family):
    """SD3 and 3.5: joint attention over the states of two or three text encoders."""

    required = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    optional = ("text_encoder_3", "tokenizer_3")

    def encode(self, prompts: list[str], device: torch.device) -> Conditions:
        """Text states [B, L, D] and pooled text [B, P]."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return Conditions({"encoder_hidden_states": states, "pooled_projections": pooled})


class Flux(Family):
    """FLUX.1: packed latents; where guidance is distilled, its scale is a condition.

    A distilled model's points hear guidance 1, which is e(x_t, t, c) itself; its paths hear the
    path's guidance (`trajectory.guided_output`).
    """

    required = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    patch = 2
    even_sigmas = True
    # It keeps a backward plan by the layouts of q, k and v alone. The single and the double blocks
    # agree in these and differ in that of the gradient: the plan of one reads past the other's.
    cudnn_attention = False

    def check(self) -> None:
        """Refuse latents that cannot be packed."""
        super().check()
        if any(side % self.patch for side in self.sample_size):
            raise ModelError(f"{self.name}: latents {self.sample_size} cannot be packed 2 x 2")

    @property
    def sample_size(self) -> tuple[int, int]:
        """The transformer takes any size; the VAE's is that of its pictures."""
        side = int(self.vae.config.sample_size) // self.factor
        return side, side

    @property
    def tokens(self) -> int:
        """Length of the packed sequence."""
        height, width = self.sample_size
        return height * width // self.patch**2

    def encode(self, prompts: list[str], device: torch.device) -> Conditions:
        """Text states [B, L, D], pooled text [B, P], and the scale [B] of a distilled guidance."""
        states, pooled, _ = self.pipeline.encode_prompt(prompts, device=device)
        found = {"encoder_hidden_states": states, "pooled_projections": pooled}
        if self.denoiser.config.guidance_embeds:
            found["guidance"] = torch.ones(len(prompts), device=device)
        return Conditions(found)

    def output(self, denoiser: Any, x: Tensor, time: Tensor, c: dict[str, Tensor]) -> Tensor:
        """The transformer's output, packed and unpacked around it."""
        height, width = (side // self.patch for side in x.shape[2:])
        places = torch.zeros(height, width, 3, device=x.device)
        places[..., 1] = torch.arange(height, device=x.device)[:, None]
        places[..., 2] = torch.arange(width, device=x.device)
        words = torch.zeros(c["encoder_hidden_states"].shape[1], 3, device=x.device)
        found: Tensor = denoiser(
            F.pixel_unshuffle(x, self.patch).flatten(2).mT,  # [B, h w / 4, 4 C]
            timestep=time / 1000,  # it multiplies by 1000 itself
            txt_ids=words,
            img_ids=places.flatten(0, 1),
            **c,
        ).sample
        return F.pixel_shuffle(found.mT.reshape(len(x), -1, height, width), self.patch)


class PixArt(Family):
    """PixArt-alpha and -sigma: masked T5 states, at 1024 pixels also the picture's size."""

    required = ("text_encoder", "tokenizer")

    @property
    def facts(self) -> dict[str, Any]:
        """The two kinds cut prompts at different lengths."""
        return {**super().facts, "pipeline": self.name}

    def encode(self, prompts: list[str], device: torch.device) -> Conditions:
        """Text states [B, L, D] and mask [B, L]; resolution [B, 2], aspect ratio [B, 1]."""
        states, mask, _, _ = self.pipeline.encode_prompt(prompts, False, device=device)
        found = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        if self.denoiser.use_additional_conditions:
            height, width = (float(side * self.factor) for side in self.sample_size)
            sizes = torch.tensor([height, width, height / width], device=device)
            sizes = sizes.to(states.dtype).expand(len(prompts), 3)
            found |= {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
        return Conditions(found)

    def output(self, denoiser: Any, x: Tensor, time: Tensor, c: dict[str, Tensor]) -> Tensor:
        """The transformer's output, a variance beside the mean."""
        found: Tensor = denoiser(
            x,
            timestep=time,
            encoder_hidden_states=c["encoder_hidden_states"],
            encoder_attention_mask=c["encoder_attention_mask"],
            added_cond_kwargs={name: c.get(name) for name in ("resolution", "aspect_ratio")},
        ).sample
        return found


class DiT(Family):
    """DiT: a class, one of them standing for none."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.denoiser.config.num_embeds_ada_norm)

    @property
    def labels(self) -> dict[str, int]:
        """Names of classes."""
        names: dict[str, int] = getattr(self.pipeline, "labels", {})
        return names

    @property
    def facts(self) -> dict[str, Any]:
        """The names decide which caption is which class."""
        return {**super().facts, "labels": self.labels}

    def refuses(self, caption: str) -> str | None:
        """A caption must be the number or the name of a class; an empty one is no class."""
        if not caption.strip() or self._number(caption) is not None:
            return None
        named = f", or one of its {len(self.labels)} class names" if self.labels else ""
        return f"caption {caption!r} is no class of this model (0 to {self.classes - 1}{named})"

    def encode(self, prompts: list[str], device: torch.device) -> Conditions:
        """Classes [B] int64."""
        for prompt in prompts:
            if reason := self.refuses(prompt):
                raise ModelError(f"{reason}; give a class")
        numbers = [self._number(prompt) for prompt in prompts]
        return Conditions({"class_labels": torch.tensor(numbers, device=device)})

    def unconditional(self, device: torch.device) -> Conditions | None:
        """The class after the last."""
        return Conditions({"class_labels": torch.tensor([self.classes], device=device)})

    def _number(self, caption: str) -> int | None:
        word = caption.strip()
        if word in self.labels:
            return self.labels[word]
        if not (word.isascii() and word.isdigit()):
            return None
        return int(word) if int(word) < self.classes else None


class Unconditional(Family):
    """UNet2DModel without classes, on pixels or latents."""

    denoiser_name = "unet"
    conditional = False

    def encode(self, prompts: list[str], device: torch.device) -> Conditions:
        """Refuse."""
        raise ModelError(
            f"this model takes no text, so {prompts[0]!r} means nothing to it; "
            "ask about an image (--image) or give a reward"
        )

    def unconditional(self, device: torch.device) -> None:
        """There is nothing to hear."""
        return None


class ClassUNet(DiT):
    """UNet2DModel with classes, as in the CIFAR literature; none stands for no class."""

    denoiser_name = "unet"

    def check(self) -> None:
        """Refuse embeddings in the place of classes."""
        super().check()
        kind = self.denoiser.config.class_embed_type
        if kind not in (None, "timestep"):
            raise ModelError(f"{self.name}: class_embed_type {kind!r} is not supported")

    @property
    def float32_only(self) -> bool:
        """A class embedded as a number stays float32 whatever the weights are."""
        return bool(self.denoiser.config.class_embed_type == "timestep")

    @property
    def classes(self) -> int:
        """Number of classes; all int32 numbers where the class is embedded as one."""
        return 2**31 if self.float32_only else int(self.denoiser.config.num_class_embeds)

    def refuses(self, caption: str) -> str | None:
        """As for DiT, but every picture must have a class."""
        if not caption.strip():
            return "no caption, and this model knows no picture without a class"
        return super().refuses(caption)

    def unconditional(self, device: torch.device) -> None:
        """No class is none."""
        return None

    def output(self, denoiser: Any, x: Tensor, time: Tensor, c: dict[str, Tensor]) -> Tensor:
        """The UNet's output."""
        if not c:
            raise ModelError(
                "this model has no empty class to compare with; name two classes, or choose "
                "another method than cfg and dtrak-text"
            )
        return super().output(denoiser, x, time, c)


def _pixel_family(pipeline: Any) -> Family:
    config: Any = getattr(pipeline.components.get("unet"), "config", {})
    classes = config.get("class_embed_type") or config.get("num_class_embeds")
    return ClassUNet(pipeline) if classes else Unconditional(pipeline)


FAMILIES: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "DiTPipeline": DiT,
    "DDPMPipeline": _pixel_family,
    "DDIMPipeline": _pixel_family,
}


def family_of(pipeline: Any) -> Family:
    """The kind of a pipeline, by its class or one that it derives from.

    Raises:
        ModelError: a kind that is not known here, or a denoiser that asks for other conditions.
    """
    for kind in type(pipeline).__mro__:
        if kind.__name__ in FAMILIES:
            family: Family = FAMILIES[kind.__name__](pipeline)
            return family
    raise ModelError(
        f"{type(pipeline).__name__} is not supported; use one of {', '.join(FAMILIES)}"
    )
