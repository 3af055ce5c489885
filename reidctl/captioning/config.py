"""The `caption` section of a recipe: styles, what the texts may say, and how a describer is asked."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from reidctl.config import Section

ALGORITHMS = ("dbscan", "hdbscan", "kmeans", "gmm", "agglomerative", "ups", "random", "none")


class StyleConfig(Section):
    """How writing styles are found among the train captions.

    Attributes:
        algorithm: how the vectors are grouped; `none` asks for no style, `random` is the ablation's control, `ups` is
            HAM's uniform prototype sampling beside k-means.
        encoder: `hashed`, offline and without weights; `clip:NAME/TAG` or another spec of a CLIP model, its text
            encoder; `sentence:ID or FOLDER`, any sentence encoder in the transformers format.
        neutralise: who takes the content out of a caption first: `lexicon`, `mllm` (asked through the same describer,
            stored like every reply), or nobody (`none`, the ablation).
        eps: cosine distance that joins two captions; `auto` takes the knee of the k-distance curve.
        min_samples: captions within `eps` (itself included) that make a caption a core of a cluster.
        min_cluster_size: smaller clusters join the nearest large one.
        max_styles: beyond it the closest clusters are merged.
        clusters: number of clusters for kmeans, gmm, agglomerative, ups and random; `auto` takes what DBSCAN finds.
        fit_limit: captions that the clustering sees; the rest go to the nearest centroid. Some algorithms have lower
            limits of their own (`clustering.FIT_ROWS`).
        exemplars: central captions that are measured and kept for each style.
        ups_sigma: half width, in standard deviations, of the box that UPS draws its prototypes from.
        ups_samples: captions nearest to a prototype that make its style.
    """

    algorithm: Literal["dbscan", "hdbscan", "kmeans", "gmm", "agglomerative", "ups", "random", "none"] = "dbscan"
    encoder: str = "hashed"
    neutralise: Literal["lexicon", "mllm", "none"] = "lexicon"
    eps: Annotated[float, Field(gt=0, lt=2)] | Literal["auto"] = "auto"
    min_samples: Annotated[int, Field(ge=1)] = 5
    min_cluster_size: Annotated[int, Field(ge=1)] = 10
    max_styles: Annotated[int, Field(ge=1)] = 32
    clusters: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    fit_limit: Annotated[int, Field(ge=10)] = 100_000
    exemplars: Annotated[int, Field(ge=1)] = 20
    ups_sigma: Annotated[float, Field(gt=0)] = 7.0
    ups_samples: Annotated[int, Field(ge=1)] = 200


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
    """How a model is asked: a server, a program, or (sampling and image size) a model in this process.

    Attributes:
        base_url: of an OpenAI-compatible server (vLLM, Ollama, LM Studio, Azure); None for OpenAI's own.
        key_env: name of the environment variable that holds the key; the key itself is never a setting.
        api_version: of Azure's older addresses (`https://NAME.openai.azure.com`); its `/openai/v1` needs none.
        concurrency: requests in flight.
        timeout_s: seconds for one reply.
        attempts: tries of one request when the service answers 5xx or not at all. A 429 is no try: one request waits
            for at most `attempts` times `max_wait_s`.
        backoff_s: first pause without a Retry-After header; it doubles.
        max_wait_s: longest single pause; a longer Retry-After fails the item.
        max_failures: so many items failing in a row stop the run.
        temperature, max_tokens: passed to the model.
        image_side: longest side in pixels of the image that is sent; None sends it in its own size.
        image_detail: the OpenAI `detail` field.
        image_quality: of the JPEG that is sent.
        structured: ask for JSON by schema; falls back to a JSON object, then to plain text, where the server refuses.
        extra: further fields of the request body, e.g. vLLM's `chat_template_kwargs`.
    """

    base_url: str | None = None
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "OPENAI_API_KEY"
    api_version: str | None = None
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    attempts: Annotated[int, Field(ge=1)] = 6
    backoff_s: Annotated[float, Field(ge=0)] = 0.5
    max_wait_s: Annotated[float, Field(gt=0)] = 120.0
    max_failures: Annotated[int, Field(ge=1)] = 20
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.4
    max_tokens: Annotated[int, Field(ge=1)] = 200
    image_side: Annotated[int, Field(ge=16)] | None = 512
    image_detail: Literal["auto", "low", "high"] = "low"
    image_quality: Annotated[int, Field(ge=1, le=100)] = 90
    structured: bool = True
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        # A key in the address would end up in every record of the run.
        if value is None:
            return value
        parts = urlsplit(value)
        try:
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # the port is out of range
            good = False
        if not good:
            raise ValueError("an address starts with http:// or https://, e.g. http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("the address holds more than a host and a path; a key belongs into the environment")
        return value

    @field_validator("extra")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        # Settings are recorded with the run.
        if any(re.search(r"api[-_]?key|secret|password|authorization|access[-_]?token", name, re.I) for name in value):
            raise ValueError("a key or password does not belong into the settings; it comes from the environment")
        return value


class BatchConfig(Section):
    """How the provider's Batch API is used (half the price by the shipped table, replies within a day).

    Attributes:
        enabled: send requests as batches; `--batch`.
        wait: stay until the last batch ended; otherwise fetch what is there, submit what is new, and stop.
        poll_s: seconds between two looks at a batch.
        requests: most requests in one batch (OpenAI allows 50,000).
        megabytes: largest file of requests (OpenAI allows 200).
        open: batches that may be in progress at a time.
        window: the completion window to ask for.
    """

    enabled: bool = False
    wait: bool = True
    poll_s: Annotated[float, Field(gt=0)] = 30.0
    requests: Annotated[int, Field(ge=1, le=50_000)] = 10_000
    megabytes: Annotated[int, Field(ge=1, le=200)] = 90
    open: Annotated[int, Field(ge=1)] = 8
    window: str = "24h"


class LocalConfig(Section):
    """How a vision-language model in this process (`hf:`) is run.

    Attributes:
        batch: requests in one forward pass.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` takes bfloat16 on CUDA and float32 on the CPU.
    """

    batch: Annotated[int, Field(ge=1)] = 8
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class CaptionConfig(Section):
    """Settings of the `caption` stage.

    Attributes:
        mllm: who writes: `template`, `replay:FILE`, `file:FILE`, `command:PROGRAM ARGS`, `hf:ID or FOLDER`, `gpt-4` or
            another OpenAI model name.
        kinds: which texts are written per image.
        hair: which text may mention hair. 002 (BDAM long) lists hairstyle as irrelevant to identity.
        sensitive: allow ethnicity and skin; off unless asked for.
        identity_prompt, clothing_prompt: what the two texts are about; style, options and bounds are added.
        retries: how often a reply that fails a check is asked again, with the reason.
        limit: only the first so many images; None for all.
        shard: `i/n`, i from 1 to n: only this machine's share of the images.
        max_cost: stop before the price of all stored replies could go above it, in the price table's currency.
        prices: a price table that takes precedence over the shipped one (reidctl/captioning/prices.yaml).
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
    shard: str | None = None
    max_cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    prices: Path | None = None
    seed: int = 0
    style: StyleConfig = StyleConfig()
    check: CheckConfig = CheckConfig()
    remote: RemoteConfig = RemoteConfig()
    batch: BatchConfig = BatchConfig()
    local: LocalConfig = LocalConfig()

    @field_validator("kinds")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) < len(value):
            raise ValueError("one or both of identity and clothing, each once")
        return value

    @field_validator("shard")
    @classmethod
    def _one_of_n(cls, value: str | None) -> str | None:
        if value is None:
            return value
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError("a shard is i/n with i from 1 to n, e.g. 2/8")
        return value
