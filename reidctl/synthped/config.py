"""The settings of the synthetic benchmark."""

from typing import Literal, Self

from pydantic import Field, model_validator

from reidctl.config import Section


class SynthConfig(Section):
    """What to render. The same settings give the same bytes on every machine.

    A person's images do not depend on how many people there are, and an image does not depend on the images before it.
    """

    people: int = Field(default=200, ge=5, le=9999, description="identities per dataset")
    first: int = Field(
        default=0,
        ge=0,
        le=9999,
        description="number of the first identity in every id; sets of other seeds show other people, and with other "
        "numbers they have other names too",
    )
    images_per_person: int = Field(default=6, ge=2, le=99, description="images of each identity")
    size: tuple[int, int] = Field(default=(128, 64), description="height and width in pixels")
    seed: int = Field(default=0, ge=0, description="every random choice descends from it")
    domain: Literal["a", "b", "c", "both"] = Field(
        default="a",
        description="which of the three visual worlds; both = a and b as two datasets, so that c stays unseen",
    )
    captioned: Literal["both", "a", "b", "c"] = Field(
        default="both",
        description="which datasets of domain=both have captions; the other is for image-to-image alone",
    )
    variant: Literal["standard", "cloth-changing"] = Field(
        default="standard",
        description="cloth-changing: two outfits per identity; queries wear one, the gallery the other",
    )
    train_fraction: float = Field(default=0.6, gt=0, lt=1, description="share of the identities used for training")
    val_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="share of the identities used for validation; test is the rest"
    )
    clone_pairs: int | float = Field(
        default=0.1,
        ge=0,
        le=9999,
        description="pairs of look-alikes per dataset: a whole number, or (below 1) the share of identities in a pair; "
        "pairs alternate between same outfit on another body and same body in another outfit",
    )
    crossing: int = Field(
        default=0,
        ge=0,
        description="identities present in both datasets (domain=both); a third of them train in a and test in b",
    )
    crossing_outfit: Literal["same", "different"] = Field(
        default="same", description="whether crossing identities wear the same outfit in both datasets"
    )
    cameras: int = Field(default=4, ge=2, le=9, description="cameras per dataset")
    captions_per_image: int = Field(
        default=2, ge=1, le=6, description="captions per image, each in another writing style"
    )
    carry: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="probability that a kind of object (bag, umbrella, phone, cap) appears in one image of a person",
    )
    occlusion: float = Field(default=0.2, ge=0, le=1, description="probability of an occluder in front of the person")
    difficulty: float = Field(
        default=1.0,
        ge=0,
        le=2,
        description="strength of colour cast, brightness, blur, noise and shift; 0 = studio pictures",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        height, width = self.size
        if not (32 <= height <= 1024 and 16 <= width <= 1024):
            raise ValueError(f"size {height}x{width} is outside 32x16 to 1024x1024 (height x width)")
        if self.train_fraction + self.val_fraction >= 1:
            raise ValueError("train_fraction + val_fraction leaves no identities for the test split")
        if self.captioned not in ("both", *self.domains):
            whose = "both datasets" if self.domain == "both" else f"the only dataset, {self.domain},"
            raise ValueError(f"captioned={self.captioned} leaves {whose} without captions")
        if self.crossing and self.domain != "both":
            raise ValueError("crossing identities need domain=both")
        if self.crossing > int(self.people * self.train_fraction):
            raise ValueError("crossing is larger than the training split of a dataset")
        if self.pairs * 2 > self.people:
            raise ValueError(f"clone_pairs asks for {self.pairs} pairs among {self.people} people")
        return self

    @property
    def pairs(self) -> int:
        """How many pairs of look-alikes each dataset holds."""
        if self.clone_pairs < 1:
            return int(self.people * self.clone_pairs / 2 + 0.5)
        return int(self.clone_pairs)

    @property
    def domains(self) -> tuple[str, ...]:
        """The letters of the datasets to write."""
        return ("a", "b") if self.domain == "both" else (self.domain,)
