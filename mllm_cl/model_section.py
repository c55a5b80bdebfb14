"""The `model` section of a recipe, and what of it a processor carries."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the recipe; frozen, unknown keys forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)


AUTO = "auto"
ImageMode = Literal["native", "pad", "crop"]


class InputSettings(Section):
    """How rows become model inputs. It travels with the processor, so that training and evaluation see the same."""

    image_mode: ImageMode = "native"
    max_length: int | None = None
    truncate: bool = False

    @classmethod
    def of(cls, processor: object) -> InputSettings:
        """Returns the settings that a processor carries; the defaults when it carries none."""
        return vars(processor).get(_INPUTS) or cls()

    def attach_to(self, processor: object) -> None:
        """Makes a processor carry these settings; they are not saved with it."""
        vars(processor)[_INPUTS] = self


_INPUTS = "_mllm_cl_inputs"


class ModelSection(Section):
    """Which model learns, and where its adapters go."""

    name_or_path: str = Field(default="tiny-llava", description="`tiny-llava` (built in), a Hub id or a local folder")
    revision: str | None = Field(default=None, description="branch, tag or commit of a Hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of the base weights"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the checkpoint")
    lora: dict[str, Any] = Field(
        default_factory=lambda: {"r": 8, "lora_alpha": 16},
        description="passed to peft.LoraConfig; `r: auto` is the largest rank within the budget, with lora_alpha 2 x r",
    )
    adapters: Literal["one", "stacked"] | None = Field(
        default=None,
        description="one continued adapter, or a fresh one per task added to the consolidated adapter; "
        "what the methods need when not given",
    )
    max_rank: int | None = Field(
        default=None, ge=1, description="rank of the consolidated adapter after recompression; 4 x r when not given"
    )
    image_mode: ImageMode = Field(
        default="native",
        description="`native` leaves images to the model's processor; `pad` (as LLaVA-1.5) and `crop` make them square first",
    )
    prompt_profile: Literal["llava_v1"] | None = Field(
        default=None,
        description="prompt format instead of the model's own chat template; `llava_v1`: that of LLaVA-1.5",
    )
    max_length: int | None = Field(
        default=None, ge=1, description="longest training row in tokens, images included; a longer one is an error"
    )
    truncate: bool = Field(
        default=False, description="cut the end of the text of longer training rows off, never through an image"
    )
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None, description="quantise the base weights of the language part with bitsandbytes (QLoRA)"
    )
    train_bridge: bool = Field(default=False, description="put LoRA on the vision-language bridge too")
    train_vision: bool = Field(default=False, description="put LoRA on the vision tower too")
    bridge_learning_rate: float | None = Field(
        default=None, gt=0, description="learning rate of the bridge; `training.learning_rate` when not given"
    )
    vision_learning_rate: float | None = Field(
        default=None, gt=0, description="learning rate of the vision tower; `training.learning_rate` when not given"
    )

    @model_validator(mode="after")
    def _rates_of_trained_parts(self) -> ModelSection:
        for part in ("bridge", "vision"):
            if getattr(self, f"{part}_learning_rate") is not None and not getattr(self, f"train_{part}"):
                raise ValueError(f"`{part}_learning_rate` has no effect without `train_{part}: true`")
        return self

    @property
    def part_rates(self) -> dict[str, float]:
        """Learning rates of the parts that have one of their own."""
        rates = {"bridge": self.bridge_learning_rate, "vision": self.vision_learning_rate}
        return {part: rate for part, rate in rates.items() if rate is not None}

    def with_rank(self, rank: int) -> ModelSection:
        """Returns the section with this rank where it says `auto`; a section with a rank of its own stays as it is."""
        if self.lora.get("r") != AUTO:
            return self
        return self.model_copy(update={"lora": {"lora_alpha": 2 * rank, **self.lora, "r": rank}})

    @property
    def inputs(self) -> InputSettings:
        """How rows become model inputs."""
        return InputSettings(image_mode=self.image_mode, max_length=self.max_length, truncate=self.truncate)
