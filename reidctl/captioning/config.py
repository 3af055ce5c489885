"""The `caption` section of a recipe: styles, what the texts may say, and how a describer is asked."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from reidctl.config import Section

ALGORITHMS = ("dbscan", "hdbscan", "kmeans", "gmm", "agglomerative", "random", "none")


class StyleConfig(Section):
    """How writing styles are found among the train captions.

    Attributes:
        algorithm: how the vectors are grouped; `none` asks for no style, `random` is the ablation's control.
        encoder: recorded name of the text encoder; `hashed` is the offline one (reidctl/captioning/embedding.py).
        eps: cosine distance that joins two captions; `auto` takes the knee of the k-distance curve.
        min_samples: captions within `eps` (itself included) that make a caption a core of a cluster.
        min_cluster_size: smaller clusters join the nearest large one.
        max_styles: beyond it the closest clusters are merged.
        clusters: number of clusters for kmeans, gmm, agglomerative and random; `auto` takes what DBSCAN finds.
        fit_limit: captions that the clustering sees; the rest go to the nearest centroid. scikit-learn's DBSCAN
            needs memory that grows with its square.
        exemplars: central captions that are measured and kept for each style.
    """

    algorithm: Literal["dbscan", "hdbscan", "kmeans", "gmm", "agglomerative", "random", "none"] = "dbscan"
    encoder: str = "hashed"
    eps: Annotated[float, Field(gt=0, lt=2)] | Literal["auto"] = "auto"
    min_samples: Annotated[int, Field(ge=1)] = 5
    min_cluster_size: Annotated[int, Field(ge=1)] = 10
    max_styles: Annotated[int, Field(ge=1)] = 32
    clusters: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    fit_limit: Annotated[int, Field(ge=10)] = 5000
    exemplars: Annotated[int, Field(ge=1)] = 20


class CheckConfig(Section):
    """What a reply must look like.

    Attributes:
        min_words, max_words: length bounds, inclusive.
        min_coverage: share of the expected slots (gender, age, build; garment, colour) that a text must mention.
        min_letters: share of ASCII letters among all letters.
        min_english: share of words that are English function words or words of our lexicon.
        max_clothing_words: clothing words that an identity text may contain.
    """

    min_words: Annotated[int, Field(ge=1)] = 4
    max_words: Annotated[int, Field(ge=1)] = 60
    min_coverage: Annotated[float, Field(ge=0, le=1)] = 0.5
    min_letters: Annotated[float, Field(ge=0, le=1)] = 0.9
    min_english: Annotated[float, Field(ge=0, le=1)] = 0.3
    max_clothing_words: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _ordered(self) -> "CheckConfig":
        if self.min_words > self.max_words:
            raise ValueError("min_words is above max_words")
        return self


class RemoteConfig(Section):
    """How a describer outside this process is asked.

    Attributes:
        base_url: of an OpenAI-compatible server; None for OpenAI's own.
        concurrency: requests in flight.
        timeout_s: seconds for one reply.
        attempts: tries of one request when the service answers 429, 5xx or not at all.
        backoff_s: first pause without a Retry-After header; it doubles.
        max_wait_s: longest single pause; a longer Retry-After fails the item.
        max_failures: so many items failing in a row stop the run.
        temperature, max_tokens: passed to the model.
        image_side: longest side in pixels of the image that is sent.
        image_detail: the OpenAI `detail` field.
        structured: ask for JSON by schema; falls back to plain text where the server refuses it.
    """

    base_url: str | None = None
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    attempts: Annotated[int, Field(ge=1)] = 6
    backoff_s: Annotated[float, Field(ge=0)] = 0.5
    max_wait_s: Annotated[float, Field(gt=0)] = 120.0
    max_failures: Annotated[int, Field(ge=1)] = 20
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.4
    max_tokens: Annotated[int, Field(ge=1)] = 200
    image_side: Annotated[int, Field(ge=16)] = 512
    image_detail: Literal["auto", "low", "high"] = "low"
    structured: bool = True


class CaptionConfig(Section):
    """Settings of the `caption` stage.

    Attributes:
        mllm: who writes: `template`, `replay:FILE`, `command:PROGRAM ARGS`, `gpt-4` or another OpenAI model name.
        kinds: which texts are written per image.
        hair: which text may mention hair. 002 (BDAM long) lists hairstyle as irrelevant to identity.
        sensitive: allow ethnicity and skin; off unless asked for.
        identity_prompt, clothing_prompt: what the two texts are about; style, options and bounds are added.
        retries: how often a reply that fails a check is asked again, with the reason.
        limit: only the first so many images; None for all.
        seed: of everything random here.
    """

    mllm: str = "template"
    kinds: tuple[Literal["identity", "clothing"], ...] = ("identity", "clothing")
    hair: Literal["clothing", "identity", "drop"] = "clothing"
    sensitive: bool = False
    identity_prompt: str = (
        "Describe the person's identity: gender presentation, age group, build and stature. "
        "Do not mention clothes, shoes, bags or anything the person wears or carries."
    )
    clothing_prompt: str = (
        "Describe the person's clothing: garments, their colour, pattern and material, shoes, accessories and "
        "belongings. Do not describe the body, the face or the age."
    )
    retries: Annotated[int, Field(ge=0)] = 2
    limit: Annotated[int, Field(ge=0)] | None = None
    seed: int = 0
    style: StyleConfig = StyleConfig()
    check: CheckConfig = CheckConfig()
    remote: RemoteConfig = RemoteConfig()
