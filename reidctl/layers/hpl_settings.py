"""Settings of `hpl` (methods/hpl.py): the class tokens, the prompts, the inversion networks and the losses."""

from typing import Literal

from pydantic import Field

from reidctl.config import Section
from reidctl.errors import UsageError
from reidctl.layers.inversion import Readout
from reidctl.layers.settings import PlainTripletConfig


class TrtConfig(Section):
    """The Task-Routed Transformer: a second class token."""

    dual: bool = True
    """False: one class token serves both tasks (Table 3, first row)."""
    init: Literal["copy", "random", "zeros"] = "copy"
    """The new token: a copy of the first with N(0, 0.01) noise, N(0, 0.02) or zeros; not stated."""
    isolation: Literal["none", "cls", "full"] = "none"
    """Who sees whom: everybody (`none`, as published), class tokens not each other (`cls`; they still meet through the
    patches), patches not the class tokens either (`full`: only then no token reaches the other's output)."""
    i2i_proj: Literal["shared", "own", "none"] = "shared"
    """v_i2i passes CLIP's projection, one of its own that starts as a copy, or none (its width is then the tower's)."""


class InversionConfig(Section):
    """The inversion networks; see `layers.inversion`. The paper gives their depth alone."""

    layers: int = Field(default=4, ge=1)
    width: int | None = Field(default=None, ge=8)
    """None: the width of the joint space."""
    heads: int = Field(default=8, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    readout: Readout = "queries"
    input: Literal["proj", "hidden"] = "proj"
    """Token features in the joint space, or the towers' own before the projection."""


class StageTwoConfig(Section):
    """What stage II trains of stage I's modules; not stated."""

    train_inversion: bool = True
    train_id_tokens: bool = False
    train_prompt_encoder: bool = False
    """With either of the last two, the prompts of all people are encoded anew at every step."""
    keep_ic: float = Field(default=0.0, ge=0)
    """Weight of stage I's inversion consistency in stage II; CMPR alone is least for a constant prompt."""


class HplSettings(Section):
    """Settings of `hpl` that it does not share with other methods."""

    trt: TrtConfig = TrtConfig()
    prompts: Literal["soft", "words", "plain", "none"] = "soft"
    """`soft` as published; `words` moves every learnt or inverted token to its nearest word (a hard prompt);
    `plain` is the fixed sentence `plain_template`, which knows neither person nor image; `none` leaves L_base."""
    cmpr: bool = True
    """False leaves L_CMPR out ("TRT + HPL")."""
    two_stage: bool = True
    """False trains everything at once, stage I's losses included, without a prompt stage."""
    train_tasks: tuple[Literal["t2i", "i2i"], ...] = ("t2i", "i2i")
    """Whose losses count: one task alone is a single-task model (Fig. 1a)."""
    template: str = "A photo of {id} and {inst} person"
    """Without the full stop of the printed T^v; Fig. 2 draws "A photo of a {id} and {inst} person."."""
    identity_template: str = "A photo of {id} person"
    instance_template: str = "A photo of {inst} person"
    """For people who were never trained on and have no identity tokens: analyses only, retrieval needs no prompt."""
    plain_template: str = "A photo of a person"
    n_id_tokens: int = Field(4, ge=0)
    n_inst_tokens: int = Field(default=4, ge=1)
    id_tokens: Literal["per_identity", "global"] = "per_identity"
    """"Shared" tokens: by the three prompts of a person, or by everybody (then Eq. 11 cannot tell people apart)."""
    inversion: InversionConfig = InversionConfig()
    temperature: float = Field(0.02, gt=0)
    """Of SDM."""
    tau_prompt: float = Field(0.02, gt=0)
    """Of Eq. 8, 9 and 11; 1 is the literal reading."""
    proto_positives: Literal["id", "literal"] = "id"
    l2_space: Literal["unit", "raw"] = "unit"
    lambda1: float = Field(0.4, ge=0)
    """Weight of L_tgps and L_vgps."""
    lambda2: float = Field(0.06, ge=0)
    """Weight of L_CMPR."""
    cic_reduction: Literal["mean", "sum"] = "mean"
    """`sum` over the batch is printed in Eq. 11; all other losses are means."""
    cic_over: Literal["all", "batch"] = "all"
    """Among whose prompts an image is classified. `batch` spares one-stage training N text passes per step."""
    i2i_losses_on: Literal["all", "i2i"] = "all"
    """Whether triplet and identity loss of v_i2i read all images or those without a caption (a batch in which all have
    one is read whole)."""
    ilpa_detach: Literal["none", "prompt", "feature"] = "none"
    """Which side of L_tgps and L_vgps gets no gradient."""
    stage2: StageTwoConfig = StageTwoConfig()
    triplet: PlainTripletConfig = PlainTripletConfig()
    freeze: tuple[Literal["image", "text"], ...] = ()
    """Encoders that stage II leaves as they are; the second class token still trains."""
    i2i_feature: Literal["proj", "concat", "bn"] = "proj"
    """What is compared image to image: v_i2i; beside it the same token before the projection; or v_i2i after the norm
    of its identity head."""

    @property
    def inverts(self) -> bool:
        """Whether there are learnt tokens and inversion networks."""
        return self.prompts in ("soft", "words")


def check(config: HplSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        UsageError: `train_tasks` is empty or repeats a task, or a template lacks its slot or has another's.
    """
    if not config.train_tasks or len(set(config.train_tasks)) != len(config.train_tasks):
        raise UsageError("`method.train_tasks` needs `t2i`, `i2i` or both, each once.")
    for key, slots in (("template", {"inst"}), ("identity_template", {"id"}), ("instance_template", {"inst"})):
        text = getattr(config, key)
        missing = [slot for slot in sorted(slots) if f"{{{slot}}}" not in text]
        if missing:
            raise UsageError(f"`method.{key}` has no slot `{{{missing[0]}}}`.", hint=f"It says: {text!r}.")
    if "{inst}" in config.identity_template or "{id}" in config.instance_template:
        raise UsageError("`method.identity_template` takes {id} alone, `method.instance_template` takes {inst} alone.")
