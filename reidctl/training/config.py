"""How a stage is trained: the recipe sections `train` and `prompt`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from reidctl.augment import AugmentConfig
from reidctl.config import Section


class ParameterRule(Section):
    """Another learning rate or weight decay for some parameters, as published code has by parts of names."""

    match: str
    """A regular expression that is searched for in the parameter's name, such as `mlm\\.` or `bias$`."""
    factor: float | None = Field(None, ge=0)
    """The learning rate is `train.lr` times this."""
    lr: float | None = Field(None, ge=0)
    """The learning rate."""
    weight_decay: float | None = Field(None, ge=0)


class TrainConfig(Section):
    """How a method is trained; the defaults are IRRA's solver at its published settings."""

    epochs: int = Field(60, ge=0)
    """0 keeps the starting weights: zero-shot."""
    batch: int = Field(64, ge=2)
    sampler: Literal["identity", "random", "shuffle", "mixed", "alternating", "alternating-random"] = "identity"
    """`random` shuffles the samples and never puts an image twice into a batch, `shuffle` does not care, as published
    code; `identity` draws `instances` samples of each of batch / instances people; `mixed` adds `batch_images` images
    without captions to `batch` captioned ones; `alternating` takes each identity batch from one dataset, in turns, and
    `alternating-random` each random one."""
    instances: int = Field(4, ge=1)
    batch_images: int = Field(64, ge=2)
    """Caption-free images in a `mixed` batch, `instances` of each person."""
    mixed_pairs: Literal["identity", "random"] = "identity"
    """How the captioned part of a `mixed` batch is drawn."""
    alternation_power: float = Field(0.5, ge=0, le=1)
    """A dataset's share of `alternating` batches is proportional to its size to this power."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """`adam` couples weight decay with the gradient, as IRRA, CLIP-ReID and BDAM do."""
    fused: bool | None = None
    """Update all weights in one kernel; None: on a GPU only. On a CPU it is faster too, and rounds
    differently."""
    lr: float = Field(1e-5, ge=0)
    lr_text: float | None = Field(None, ge=0)
    """Learning rate of the text tower; None: `lr`."""
    lr_new: float | None = Field(None, ge=0)
    """Learning rate of everything that is not a tower; None: five times `lr`."""
    lr_prompt: float | None = Field(None, ge=0)
    """Learning rate of prompt tokens; None: `lr_new`."""
    bias_lr_factor: float = Field(2.0, ge=0)
    """Biases learn this much faster, without weight decay."""
    decay_biases: bool = False
    """Biases have weight decay too, as in CLIP-ReID's code."""
    groups: tuple[ParameterRule, ...] = ()
    """Rules for parameters by name, over what the rates above say; where several match, the last one wins."""
    weight_decay: float = Field(4e-5, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    warmup_epochs: float = Field(5, ge=0)
    warmup_factor: float = Field(0.1, ge=0, le=1)
    schedule: Literal["cosine", "constant", "step", "exponential"] = "cosine"
    milestones: tuple[int, ...] = (20, 50)
    gamma: float = Field(0.1, gt=0)
    """Factor at each milestone (`step`) or each epoch (`exponential`)."""
    final_factor: float = Field(0.0, ge=0, le=1)
    """Where the cosine ends, as a factor on the rate."""
    cosine_over: Literal["rest", "all"] = "rest"
    """The cosine begins where the warm-up ends, or runs over all epochs under it, as timm's and so CLIP-ReID's."""
    first_epoch: Literal[0, 1] = 0
    """The number of the first epoch for warm-up, milestones and cosine: 1 in CLIP-ReID's code, which steps the schedule
    before each epoch."""
    schedule_by: Literal["epoch", "step"] = "epoch"
    """Whether the rate changes after each epoch, as published, or smoothly after each step."""
    clip_grad_norm: float | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` computes the towers in bfloat16 (autocast); weights, optimiser and losses stay in float32."""
    accumulate: int = Field(1, ge=1)
    """Passes in which a batch is computed, for batches that do not fit: features of all passes first, without
    gradients, then the losses of the whole batch, then each pass again with them (GradCache, Gao et al. 2021,
    arXiv:2101.06983). Negatives, and so the result, are those of the whole batch; the towers work a third more."""
    compile: bool = False
    """Compile the Transformer blocks (`torch.compile`): some minutes once, faster steps on a GPU. Where that fails,
    training goes on without and says why."""
    channels_last: bool = False
    """Lay images and the patch projection out with channels last."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """On several devices: `ddp` keeps a whole model on each; `fsdp` shares parameters, gradients and optimiser state
    out (FSDP2), for models that do not fit."""
    ema: float | None = Field(None, ge=0, lt=1)
    """Validate and keep an exponential moving average of the weights with this decay per step, such as 0.999."""
    device: str = "auto"
    workers: int | None = Field(None, ge=0)
    """Threads that load images ahead; 0 loads when a step asks. None: 0 on a CPU, one per core up to 8 for a GPU."""
    cache_mb: int = Field(512, ge=0)
    augment: AugmentConfig = AugmentConfig()
    select: Literal["val", "test"] = "val"
    """Which split chooses the epoch. `test` is what most published code does; it is recorded and warned about."""
    select_metric: Literal["rank1", "mAP"] = "rank1"
    validate_every: int = Field(1, ge=1)
    patience: int | None = Field(None, ge=1)
    """Stop early after this many validations in a row without a better value; None: never."""
    save_steps: int | None = Field(None, ge=1)
    """Keep the state of the training every so many steps, beside the end of each epoch: what a kill can cost."""
    keep_epochs: bool = False
    """Keep the weights of every validated epoch in `finetune/epochs`, to compare the chosen epoch with the best on test
    (`evaluate`). Costs one model on disk per epoch: 60 epochs of CLIP ViT-B/16 in float32 are about 36 GB."""
    log_every: int = Field(10, ge=1)
    tensorboard: bool = False
    """Write the history for TensorBoard too, to `STAGE/tensorboard` (needs the package tensorboard)."""
    wandb: str | None = Field(None, min_length=1)
    """Send the history to this project of Weights & Biases too (needs the package wandb)."""
    shuffle_labels: bool = False
    """Give every person the texts of another, or images of anybody where no text is read: the control run that must
    stay at chance."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("two numbers from 0 up to, but not, 1 are needed")
        return value

    @model_validator(mode="after")
    def _has_negatives(self) -> "TrainConfig":
        sizes = [] if self.sampler in ("random", "shuffle", "alternating-random") else [self.batch]
        if self.sampler == "mixed":
            sizes = [self.batch_images, *([self.batch] if self.mixed_pairs == "identity" else [])]
        for size in sizes:
            if size % self.instances or size < 2 * self.instances:
                raise ValueError(f"a batch of {size} is not two or more people with {self.instances} samples each")
        return self


class PromptConfig(TrainConfig):
    """How the prompt stage is trained; the defaults are HPL's (CLIP-ReID's number of epochs is 120)."""

    epochs: int = Field(10, ge=0)
    lr: float = Field(5e-5, ge=0)
    lr_new: float | None = Field(5e-5, ge=0)
    lr_prompt: float | None = Field(0.02, ge=0)
    bias_lr_factor: float = Field(1.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_epochs: float = Field(0, ge=0)
    schedule: Literal["cosine", "constant", "step", "exponential"] = "exponential"
    gamma: float = Field(0.8, gt=0)
    cache: Literal["fp16", "fp32", "off"] = "fp16"
    """Compute what the frozen encoders give once and keep it on disk while the stage runs, in this precision; images
    are then not augmented. `off` computes it at every step, with augmentation."""
    use: Path | None = None
    """`finetune` takes the prompts of this run instead of its own."""

    @field_validator("cache", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        # YAML reads a bare `off` as false.
        return "off" if value is False else value
