"""The method contract: a batch in, named losses and unit vectors out. Adding a method is adding one file.

The file name is the registry: `methods/mta_clip.py` is `mta-clip` and defines `METHOD`, its class. Listing the names
imports nothing.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from reidctl import tables
from reidctl.backbones.base import Backbone
from reidctl.backbones.weights import from_config
from reidctl.batch import Batch, PhraseSets, Roster
from reidctl.config import Section, parse_section
from reidctl.errors import DataError, UsageError
from reidctl.layers.gradients import Gradients, local_gradients
from reidctl.layers.matching import Encoded
from reidctl.parts import Parts
from reidctl.phrases.base import Phrase, PhraseSource
from reidctl.phrases.rules import extract
from reidctl.phrases.sets import PhraseTable

Explainer = Literal["gradcam", "patch"]
Role = Literal["image", "text", "new", "prompt"]
"""Which learning rate of `train` a parameter takes: `lr`, `lr_text`, `lr_new`, `lr_prompt`."""
Task = Literal["t2i", "i2i"]
Look = Callable[[Batch], dict[str, Tensor]]
Survey = Callable[[Look], dict[str, Tensor]]
TargetText = Literal["caption", "identity", "identity+clothing", "clothing", "mix"]

FORMAT = 1


def by_rules(texts: Sequence[str]) -> list[list[Phrase]]:
    """Return the part phrases of texts, found offline."""
    return [extract(text) for text in texts]


class MethodConfig(Section):
    """Settings that every method has; each method adds its own."""

    weights: dict[str, float] = Field(default_factory=dict)
    """Loss weights by exact loss name, over the method's defaults; an unknown name is an error."""

    @property
    def needs_prompt_stage(self) -> bool:
        """Whether `finetune` cannot start without the result of the prompt stage."""
        return False

    @property
    def spares_prompt_stage(self) -> str:
        """The setting with which `finetune` does without a prompt stage, for messages; empty if none does."""
        return ""

    def prompt_settings(self) -> dict[str, Any]:
        """The settings that the result of the prompt stage depends on, by name; plain values only."""
        return {}


class Method(nn.Module, ABC):
    """A retrieval model and how it is trained.

    Class attributes:
        Config: the recipe section.
        stages: the training stages it has, in order; `prompt-stage` comes before `finetune`.
        loss_weights: default weight of every loss.
        learns_without_text: whether a batch may hold images without a caption, from which it learns too.

    Args:
        config: its settings.
        backbone: the two towers.
        persons: number of training identities, for classifiers.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    stages: ClassVar[tuple[str, ...]] = ("finetune",)
    loss_weights: ClassVar[Mapping[str, float]] = {}
    learns_without_text: ClassVar[bool] = False
    reads_roster: ClassVar[bool] = False
    """Whether its constructor takes a `roster`, and its saved form holds one."""
    roster: Roster = Roster()
    """Datasets and cameras of the training set, for methods that ask for it."""
    reads_phrases: ClassVar[bool] = False
    """Whether its losses and pair scores read the part phrases of texts."""
    reads_phrase_places: bool = False
    """Whether it needs to know where they stand among the text's tokens."""
    gradients: Gradients = staticmethod(local_gradients)
    """Returns the gradients of losses at a weight; a training on several processes or in several passes brings its own,
    which sees the whole batch."""
    phrase_source: PhraseSource = staticmethod(by_rules)
    """Finds the phrases of texts that it has not seen in training."""

    def __init__(self, config: MethodConfig, backbone: Backbone, persons: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.persons = persons
        self._cut: list[Tensor] | None = None
        unknown = sorted(set(config.weights) - set(self.loss_weights))
        if unknown:
            raise UsageError(
                f"`{self.name}` has no loss `{unknown[0]}`.",
                hint=f"Its losses: {', '.join(self.loss_weights) or 'none'}.",
            )
        negative = sorted(name for name, weight in config.weights.items() if not weight >= 0)
        if negative:
            raise UsageError(
                f"`method.weights.{negative[0]}` is {config.weights[negative[0]]}: training would make that loss grow.",
                hint="Give 0 or more.",
            )

    @property
    def train_texts(self) -> tuple[str, ...]:
        """Which texts of a sample its losses read: any of `full`, `identity`, `clothing`."""
        return ("full",)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The vectors that an image has: `t2i` is compared with texts; with `i2i` too, images are compared by it."""
        return ("t2i",)

    @property
    def selects_by(self) -> Task:
        """The direction of retrieval that chooses the epoch, where a validation split allows both."""
        return "t2i"

    @property
    def reads_out(self) -> tuple[float, float]:
        """Shares of the first class token and of the average patch in the image vector that texts are compared with."""
        return 1.0, 0.0

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras, `dataset/camera`, that its image encoder tells apart; usually none."""
        return ()

    @property
    def gallery_texts(self) -> tuple[str, ...]:
        """Texts, written from the gallery image alone, that its gallery embeddings read; usually none."""
        return ()

    @property
    def target_text(self) -> TargetText:
        """Which text plays the query during training."""
        return "caption"

    def weight(self, loss: str) -> float:
        """Return the weight of a loss; 0 removes it."""
        return self.config.weights.get(loss, self.loss_weights[loss])

    def active(self, loss: str) -> bool:
        """Whether a loss is computed at all."""
        return self.weight(loss) != 0

    def losses(self, batch: Batch, stage: str) -> dict[str, Tensor]:
        """Return the unweighted losses of a training batch by name; every entry counts."""
        return self.losses_of(self.encode(self.prepare(batch), stage), stage)

    def prepare(self, batch: Batch) -> Batch:
        """Return a batch with what the method draws at random about its texts; called on the CPU, before the copy.

        So the places of drawn tokens are known without asking the device for them.
        """
        return batch

    @abstractmethod
    def encode(self, batch: Batch, stage: str) -> Parts:
        """Return what the losses read of a batch: everything that is computed of each sample by itself.

        The batch may be a part of one: on each of several processes, or in each of several passes. Nothing here may
        compare samples or average over them; a sum over the part's samples has shape (1,) and adds up.
        """

    @abstractmethod
    def losses_of(self, parts: Parts, stage: str) -> dict[str, Tensor]:
        """Return the unweighted losses of a whole batch by name, from what `encode` returned of all of it.

        Every process computes them, so that classifiers and norms here see the whole batch.
        """

    @abstractmethod
    def embed_images(self, batch: Batch) -> Tensor:
        """Return unit vectors (B, D) of the images; reads at most `gallery_texts` besides."""

    @abstractmethod
    def embed_texts(self, batch: Batch) -> Tensor:
        """Return unit vectors (B, D) of the texts `full`."""

    def embed_tasks(self, batch: Batch) -> dict[Task, Tensor]:
        """Return one unit vector per image for each of `tasks`, each (B, D), from one forward pass.

        `t2i` is what `embed_images` returns. Where `i2i` is missing, images are compared with images by it too.
        """
        return {"t2i": self.embed_images(batch)}

    def phrase_sentence(self, phrase: str) -> str:
        """Return the text that is encoded for a phrase."""
        return phrase

    def phrase_table(self, texts: Sequence[str], source: PhraseSource | None = None) -> PhraseTable:
        """Return the phrases of texts, tokenised; `source` finds them, default `phrase_source`."""
        offsets = self.backbone.tokenize_offsets if self.reads_phrase_places else None
        return PhraseTable(texts, source or self.phrase_source, self.backbone.tokenize, self.phrase_sentence, offsets)

    def phrases_of(self, texts: Sequence[str]) -> PhraseSets | None:
        """Return the phrases of texts, for `Batch.phrases`; None for methods that read none."""
        return self.phrase_table(texts).sets(texts) if self.reads_phrases else None

    def phrase_maps(self, batch: Batch) -> Tensor | None:
        """Return where each phrase of `batch.phrases` is seen in its image, distributions (B, K, N).

        None for methods without a phrase-patch module.
        """
        return None

    @property
    def scores_pairs(self) -> bool:
        """Whether it has a trained head that reads an image and a text together, for re-ranking."""
        return False

    def encode_pair_images(self, batch: Batch) -> Encoded:
        """Return the images of a batch as far as they can be computed without a text; reads no text.

        Raises:
            UsageError: the method does not score pairs.
        """
        raise self._no_pairs()

    def encode_pair_texts(self, batch: Batch) -> Encoded:
        """Return the texts `full` as far as they can be computed without an image.

        Raises:
            UsageError: the method does not score pairs.
        """
        raise self._no_pairs()

    def pair_scores(self, image: Encoded, text: Encoded) -> Tensor:
        """Return the log-odds that image p shows the person of text p, shape (P,), float32.

        Select rows of what `encode_pair_images` and `encode_pair_texts` returned: `pair_scores(images[i], texts[t])`
        for index tensors i and t. The score of a pair does not depend on the other pairs.

        Raises:
            UsageError: the method does not score pairs.
        """
        raise self._no_pairs()

    def require_pairs(self) -> None:
        """Refuse a method that does not score pairs.

        Raises:
            UsageError: it does not.
        """
        if not self.scores_pairs:
            raise self._no_pairs()

    def _no_pairs(self) -> UsageError:
        return UsageError(
            f"This `{self.name}` has no match head that could score an image with a text.",
            hint="Train one: `reidctl finetune --method bdam --set method.protocol=pairwise`, or `--method interpart`.",
        )

    def objective(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses, a scalar."""
        return torch.stack([self.weight(name) * value for name, value in losses.items()]).sum()

    def current_weights(self, stage: str = "finetune") -> dict[str, float]:
        """The weight that each loss of a stage has now; losses that are not active are left out."""
        return {name: self.weight(name) for name in self.loss_weights if self.active(name)}

    def gradient_norms(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the Euclidean norm of each unweighted loss's gradient at `shared_weight`; none without one.

        A loss that does not reach it has norm 0.
        """
        shared = self.shared_weight()
        if shared is None:
            return {}
        found = self.gradients(losses, [shared])
        return {name: 0.0 if grad is None else float(grad.float().norm()) for name, (grad,) in found.items()}

    def shared_weight(self) -> nn.Parameter | None:
        """The last weight above which all image losses pass, the output of the last image block's MLP, if it trains."""
        weight = self.backbone.image.last_mlp_weight
        return weight if weight.requires_grad else None

    def parameters_by_role(self, stage: str) -> dict[Role, list[tuple[str, nn.Parameter]]]:
        """Return the parameters that train in a stage: image tower, text tower, new modules.

        A stage freezes a parameter by leaving it out.
        """
        roles: dict[Role, list[tuple[str, nn.Parameter]]] = {"image": [], "text": [], "new": []}
        for name, parameter in self.named_parameters():
            role: Role = "new"
            if name.startswith("backbone.image."):
                role = "image"
            elif name.startswith("backbone.text."):
                role = "text"
            roles[role].append((name, parameter))
        return roles

    def begin(self, stage: str) -> None:
        """Prepare for a training stage, once the starting weights are loaded; also before a killed one goes on."""

    @property
    def balances(self) -> bool:
        """Whether a training step needs the gradients of single losses."""
        return False

    @property
    def surveys(self) -> bool:
        """Whether it looks at all training samples before each epoch of `finetune`."""
        return False

    def begin_epoch(self, epoch: int, survey: Survey) -> None:
        """Prepare for an epoch (0-based); called only where `surveys` says so.

        Args:
            epoch: the epoch that follows.
            survey: `survey(look)` calls `look` with every batch of the epoch, on the device, without gradients and in
                evaluation mode, and returns what it returned by sample number: for each name a tensor (S, ...) on the
                CPU, NaN where no batch held the sample.
        """

    def frozen_features(self, batch: Batch) -> dict[str, Tensor]:
        """Return what the prompt stage reads of the images, or of the texts `full`, and never changes.

        Images give tensors (B, ...) by names that start with `image`, texts tensors (T, ...) that start with `text`.
        They can be computed once and kept, because the prompt stage trains neither encoder; `losses` takes them from
        `Batch.frozen` if they are there. Called in evaluation mode with a batch of images alone or of texts alone.

        Raises:
            UsageError: the method has no prompt stage.
        """
        raise UsageError(f"`{self.name}` has no prompt stage.", hint="Train it with `reidctl finetune`.")

    def prompt_rows(self, persons: Sequence[str]) -> list[tuple[str, str, Tensor]]:
        """Return the learnt prompts as (scope, key, vectors (M, W)); scope `shared`, `domain` or `person`.

        Args:
            persons: ids of the training people, in the order of their numbers.
        """
        return []

    def prompt_state(self) -> dict[str, Tensor]:
        """What the prompt stage hands over to `finetune`: every tensor of its result, by name in the state."""
        names = {name for members in self.parameters_by_role("prompt-stage").values() for name, _ in members}
        return {name: value for name, value in self.state_dict().items() if name in names}

    def training_report(self) -> dict[str, float]:
        """Further numbers of the last step for the history, by name."""
        return {}

    def training_facts(self) -> dict[str, Any]:
        """What the record of a training says about it besides its settings; plain values only."""
        return {}

    def training_state(self) -> dict[str, Any]:
        """What must survive a kill besides the weights; plain values and tensors only."""
        return {}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `training_state` returned."""

    def gates(self, batch: Batch) -> dict[str, Tensor]:
        """Return gate activations by name, shape (B, ...), for methods that have gates."""
        return {}

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Return features of the images by name, float32, each (B, its width), for analyses of what they hold.

        `embedding` is what is retrieved, the unit vectors of `embed_images`, and comes first; a method that separates
        what it sees adds its parts, as they are, not normalised. Nothing beyond what `embed_images` reads is read.
        """
        return {"embedding": self.embed_images(batch)}

    def token_maps(self, batch: Batch, partner: Tensor) -> dict[Task, Tensor]:
        """Return the Grad-CAM maps of the image vectors, each (B, h, w), in [0, 1] per image; see `explain`.

        `t2i`, where the batch has texts, follows the cosine with the image's text; `i2i` the cosine with the vector
        of another image. An image that is its own partner has no gradient: nothing is nearer to it than itself.

        Args:
            batch: B images, or B image-text pairs.
            partner: for each image another one of the person, normalised, (B, 3, H, W).
        """
        with torch.no_grad():
            other = self._image_vector(Batch(image=partner))

        def score() -> Tensor:
            return (self._image_vector(batch) * other).sum()

        found: dict[Task, Tensor] = {"t2i": self._gradcam(batch)} if "full" in batch.texts else {}
        found["i2i"] = self._gradcam(batch, score)
        return {
            task: (value / value.amax(dim=1, keepdim=True).clamp_min(1e-12)).reshape(len(batch), *self.backbone.grid)
            for task, value in found.items()
        }

    def _image_vector(self, batch: Batch) -> Tensor:
        """The vectors by which images are compared with images, (B, D)."""
        made = self.embed_tasks(batch)
        return made["i2i"] if "i2i" in made else made["t2i"]

    def activation(self, batch: Batch) -> Tensor:
        """Return how much each patch speaks for its image's feature, shape (B, h, w), in [0, 1].

        max(0, cos(patch, class token)) in the joint space. The length of a patch's feature, which convolutional
        networks are drawn by, says nothing here: the last norm makes all lengths nearly equal.
        """
        seen = self.backbone.encode_image(batch.require("image"))
        return self._towards(seen.patches, seen.cls[:, 0])

    def _towards(self, patches: Tensor, feature: Tensor) -> Tensor:
        """max(0, cos) of patches (B, N, D) with a feature of their image (B, D), as maps (B, h, w)."""
        cosine = torch.einsum("bnd,bd->bn", unit(patches), unit(feature))
        return cosine.clamp_min(0).reshape(len(patches), *self.backbone.grid)

    def extra_parts(self, batch: Batch) -> dict[str, Callable[[], Tensor]]:
        """Return modules of its own whose cost is worth a row of its own, by name, as calls on a batch."""
        return {}

    def explain(self, batch: Batch, explainer: Explainer = "gradcam") -> Tensor:
        """Return how much each image region supports its text, shape (B, h, w), in [0, 1] per image.

        Args:
            batch: B image-text pairs: image i with text `full` i.
            explainer: `gradcam` (Selvaraju et al. 2017 on the tokens that enter the last block's attention: the ReLU of
                the sum over channels of gradient x activation, gradient of cos(image, text)) or `patch` (cosine of each
                projected patch with the text, negative values cut).

        Raises:
            UsageError: the explainer is unknown.
        """
        if explainer == "gradcam":
            relevance = self._gradcam(batch)
        elif explainer == "patch":
            relevance = self.patch_similarity(batch)
        else:
            raise UsageError(f"Unknown explainer `{explainer}`.", hint="One of: gradcam, patch.")
        top = relevance.amax(dim=1, keepdim=True).clamp_min(1e-12)
        return (relevance.clamp_min(0) / top).reshape(len(batch), *self.backbone.grid)

    def patch_features(self, batch: Batch) -> Tensor:
        """Return every patch as a unit vector of the space in which images meet texts, shape (B, N, D)."""
        return unit(self.backbone.encode_image(batch.require("image")).patches)

    def patch_similarity(self, batch: Batch) -> Tensor:
        """Return the cosine of every patch with the text in the retrieval space, shape (B, N)."""
        with torch.no_grad():
            return torch.einsum("bnd,bd->bn", self.patch_features(batch), self.embed_texts(batch))

    def _gradcam(self, batch: Batch, score: Callable[[], Tensor] | None = None) -> Tensor:
        """Gradient x activation at the norm in front of the last block's attention, patch tokens only, shape (B, N).

        The gradient is of the scalar `score()`, which must pass the images of the batch through the image tower once;
        default: the sum of cos(image, text).
        """
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            kept.append(output if output.requires_grad else output.requires_grad_())
            return kept[-1]

        handle = self.backbone.image.last_norm.register_forward_hook(keep)
        self._cut = []
        try:
            with torch.enable_grad():
                if score is None:
                    with torch.no_grad():
                        text = self.embed_texts(batch)
                    similarity = (self.embed_images(batch) * text).sum()
                else:
                    similarity = score()
                watched = [kept[0], *self._cut]
                grads = torch.autograd.grad(similarity, watched, allow_unused=True)
        finally:
            handle.remove()
            self._cut = None
        patches = self.backbone.grid[0] * self.backbone.grid[1]
        # Class tokens come first, whatever their number.
        each = [
            (grad * tokens).sum(-1)[:, -patches:]
            for grad, tokens in zip(grads, watched, strict=True)
            if grad is not None
        ]
        return torch.stack(each).sum(dim=0).relu().detach()

    def _watched(self, patches: Tensor) -> Tensor:
        """Return patches behind the last norm that the feature reads directly, so that Grad-CAM sees this path too.

        What reaches the feature through the class token is seen at the norm in front of the last block's attention.
        The two paths are cut from each other here, so that nothing counts twice.
        """
        if self._cut is None:
            return patches
        self._cut.append(patches.detach().requires_grad_())
        return self._cut[-1]


def method_names() -> list[str]:
    """The methods by name, read from the file names."""
    folder = resources.files("reidctl.methods")
    files = [entry.name for entry in folder.iterdir() if entry.name.endswith(".py")]
    return sorted(f.removesuffix(".py").replace("_", "-") for f in files if f not in ("__init__.py", "base.py"))


def method_class(name: str) -> type[Method]:
    """Return the class of a method.

    Raises:
        UsageError: there is no such method.
    """
    if name not in method_names():
        raise UsageError(f"Unknown method `{name}`.", hint=f"One of: {', '.join(method_names())}.")
    found: type[Method] = importlib.import_module(f"reidctl.methods.{name.replace('-', '_')}").METHOD
    return found


def build_method(
    name: str, settings: Mapping[str, Any], backbone: Backbone, persons: int, roster: Roster | None = None
) -> Method:
    """Return an untrained method.

    Args:
        name: its name.
        settings: its recipe section, without `name`.
        backbone: the towers.
        persons: number of training identities.
        roster: of the training set; None: one dataset without cameras. Read by few methods.
    """
    cls = method_class(name)
    config = parse_section(cls.Config, settings, "method")
    more = {"roster": roster or Roster.single(persons)} if cls.reads_roster else {}
    try:
        return cls(config, backbone, persons, **more)
    except (ValueError, AssertionError) as error:
        # Layers check what only they know: that heads divide a width, that chunks do.
        raise UsageError(f"`{name}` cannot be built with these settings: {error}.") from None


def save_method(method: Method, folder: Path) -> list[Path]:
    """Write `model.safetensors` and `model.json`; return both paths."""
    weights, facts = folder / "model.safetensors", folder / "model.json"
    tensors = {name: value.detach().cpu().contiguous() for name, value in unique_state(method).items()}
    tables.write_bytes(weights, save(tensors))
    described = {
        "format": FORMAT,
        "method": method.name,
        "config": method.config.model_dump(),
        "backbone": method.backbone.config.model_dump(),
        "persons": method.persons,
        **({"roster": asdict(method.roster)} if method.reads_roster else {}),
    }
    tables.write_text(facts, json.dumps(described, indent=2) + "\n")
    return [weights, facts]


def unique_state(method: nn.Module) -> dict[str, Tensor]:
    """Return the state dictionary without second names of one tensor, which safetensors refuses."""
    return unique_tensors(method.state_dict())


def unique_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return named tensors without second names of one."""
    seen: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        key = value.data_ptr()
        if value.numel() and key in seen and found[seen[key]].shape == value.shape:
            continue
        seen[key] = name
        found[name] = value
    return found


def load_method(folder: Path, device: torch.device | str = "cpu") -> Method:
    """Return a trained method from its folder, in evaluation mode; needs neither network nor the first weights.

    Raises:
        DataError: a file is missing, damaged or of another version.
    """
    weights, facts = folder / "model.safetensors", folder / "model.json"
    if not (weights.is_file() and facts.is_file()):
        raise DataError(f"{folder} holds no trained model.", hint="Run `reidctl finetune` first.")
    try:
        described = json.loads(facts.read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise DataError(f"{facts} is model format {described['format']}; this reidctl reads {FORMAT}.")
        backbone = from_config(described["backbone"])
        roster = _roster(described["roster"]) if "roster" in described else None
        method = build_method(described["method"], described["config"], backbone, described["persons"], roster)
        state = load_file(weights)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"The model in {folder} is damaged: {error}.") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise DataError(f"{weights} is damaged: {error}.") from None
    missing, unexpected = method.load_state_dict(state, strict=False)
    known = set(unique_state(method))
    lacking = [name for name in missing if name in known]
    if lacking or unexpected:
        raise DataError(f"{weights} does not fit: missing {lacking[:3]}, unexpected {list(unexpected)[:3]}.")
    return method.to(device).eval()


def _roster(saved: Mapping[str, Any]) -> Roster:
    people = tuple(tuple(int(number) for number in members) for members in saved["people"])
    return Roster(tuple(saved["domains"]), people, tuple(saved["cameras"]))


def unit(features: Tensor) -> Tensor:
    """Return features (B, D) as float32 unit vectors."""
    return functional.normalize(features.float(), dim=-1)
