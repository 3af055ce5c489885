"""Shards, budgets, other check settings, deferred describers: what a run does when it does not do everything."""

from collections.abc import Generator, Iterable
from pathlib import Path

import pytest
from fakeserver import CLOTHING, IDENTITY
from test_caption_run import NO_STYLE, Stub, pictures, run

from reidctl.captioning.backends.base import Reply, Request, failed, rejected
from reidctl.captioning.budget import Ledger
from reidctl.captioning.config import BatchConfig, CaptionConfig, CheckConfig, RemoteConfig, StyleConfig
from reidctl.captioning.embedding import hashed
from reidctl.captioning.journal import Index
from reidctl.captioning.plan import in_shard, part_name
from reidctl.captioning.run import caption_images
from reidctl.errors import RemoteError, UsageError


class Penny:
    """Every token costs a hundredth; half in a batch."""

    def cost(self, tokens_in: int, tokens_out: int, *, batch: bool = False) -> float:
        return (tokens_in + tokens_out) / 100 * (0.5 if batch else 1.0)


@pytest.mark.covers(132)
def test_shards_ask_every_image_once_and_merge_by_copying_their_parts(tmp_path: Path) -> None:
    whole = Stub()
    for number in (1, 2, 3):
        shard = Stub()
        out = tmp_path / f"machine-{number}"
        made = run(out, shard, count=30, shard=f"{number}/3")
        assert made.stopped == "part" and not (out / "captions.parquet").exists()
        assert all(in_shard(image, f"{number}/3") for image, _ in shard.seen)
        whole.seen.update(shard.seen)
        for part in (out / "parts").iterdir():
            assert part.name == part_name(f"{number}/3")
            target = tmp_path / "merged/parts" / part.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(part.read_bytes())
    assert len(whole.seen) == 60 and set(whole.seen.values()) == {1}
    nobody = Stub()
    merged = run(tmp_path / "merged", nobody, count=30)
    assert not nobody.seen and merged.totals["ok"] == 60
    assert merged.captions.equals(run(tmp_path / "alone", Stub(), count=30).captions)


def test_a_shard_of_one_is_everything_and_shards_differ_in_size_little() -> None:
    ids = [f"image-{number}" for number in range(4000)]
    assert all(in_shard(image, "1/1") for image in ids)
    sizes = [sum(in_shard(image, f"{number}/4") for image in ids) for number in range(1, 5)]
    assert sum(sizes) == 4000 and min(sizes) > 850


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(shard: str) -> None:
    with pytest.raises(ValueError, match="shard"):
        CaptionConfig(shard=shard)


def test_the_budget_stops_before_it_is_overdrawn_and_more_money_goes_on(tmp_path: Path) -> None:
    # A stub's reply has 10 + 5 tokens: 0.15; the bound per request is 0.2.
    def paid(limit: float, stub: Stub):
        ledger = Ledger(Penny(), most=(15, 5), max_cost=limit)
        config = CaptionConfig(style=NO_STYLE, max_cost=limit)
        return caption_images(pictures(10), None, stub, config, tmp_path, ledger=ledger)

    poor = Stub()
    made = paid(1.0, poor)
    assert made.stopped == "budget" and made.totals["cost"] <= 1.0
    assert sum(poor.seen.values()) == 6  # 5 x 0.15 + 0.2 <= 1.0 < 6 x 0.15 + 0.2
    assert made.totals["not_asked"] == 14 and made.codes == {"not-asked": 14}
    assert not (tmp_path / "captions.parquet").exists()
    broke = Stub()
    assert paid(1.0, broke).stopped == "budget" and not broke.seen
    rich = Stub()
    made = paid(100.0, rich)
    assert made.stopped is None and sum(rich.seen.values()) == 14
    assert made.totals["cost"] == pytest.approx(20 * 0.15)


def test_a_server_that_counts_no_tokens_is_charged_the_most_a_request_can_take(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = Stub(lambda request: Reply(request, "ok", IDENTITY if request.kind == "identity" else CLOTHING))
    with caplog.at_level("WARNING", logger="reidctl"):
        ledger = Ledger(Penny(), most=(15, 5), max_cost=1.0)
        made = caption_images(pictures(10), None, silent, CaptionConfig(style=NO_STYLE), tmp_path, ledger=ledger)
    assert made.stopped == "budget" and sum(silent.seen.values()) == 5  # 5 x 0.2
    assert made.totals["cost"] == pytest.approx(1.0) and caplog.text.count("does not count its tokens") == 1
    again = Ledger(Penny(), most=(15, 5), max_cost=1.0)
    caption_images(pictures(10), None, silent, CaptionConfig(style=NO_STYLE), tmp_path, ledger=again)
    assert again.spent == pytest.approx(1.0) and sum(silent.seen.values()) == 5


def test_replies_dearer_than_foreseen_raise_what_is_reserved(tmp_path: Path) -> None:
    dear = Stub(lambda request: Reply(request, "ok", IDENTITY, tokens_in=40, tokens_out=10))
    ledger = Ledger(Penny(), most=(15, 5), max_cost=1.2)
    config = CaptionConfig(style=NO_STYLE, kinds=("identity",))
    made = caption_images(pictures(10), None, dear, config, tmp_path, ledger=ledger)
    assert sum(dear.seen.values()) == 2 and made.totals["cost"] == pytest.approx(1.0)  # a third would make 1.5


def test_a_part_that_was_copied_twice_was_paid_for_once(tmp_path: Path) -> None:
    made = run(tmp_path, Stub())
    part = tmp_path / "parts/replies-000.jsonl"
    (tmp_path / "parts/replies-0001-of-0002.jsonl").write_bytes(part.read_bytes())
    assert run(tmp_path, Stub()).totals["tokens_in"] == made.totals["tokens_in"] == 80


def test_a_run_about_no_image_writes_no_table_and_no_part(tmp_path: Path) -> None:
    before = run(tmp_path, Stub()).captions
    made = run(tmp_path, Stub(), limit=0)
    assert made.stopped == "part" and len(made.captions) == len(before) == 8
    assert not list((tmp_path / "new").rglob("*.jsonl")) and run(tmp_path / "new", Stub(), limit=0).stopped == "part"
    assert not list((tmp_path / "new").rglob("*.jsonl"))


def test_requests_in_flight_are_reserved(tmp_path: Path) -> None:
    class Greedy(Stub):
        def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
            held = list(requests)  # as many in flight as it is given
            yield from super().describe(iter(held))

    greedy = Greedy()
    ledger = Ledger(Penny(), most=(15, 5), max_cost=1.0)
    made = caption_images(pictures(10), None, greedy, CaptionConfig(style=NO_STYLE), tmp_path, ledger=ledger)
    assert sum(greedy.seen.values()) == 5 and made.stopped == "budget"


THIN = "The person is a young man."  # says nothing of the build: coverage 2/3


def test_refused_texts_that_looser_checks_accept_are_taken_without_asking(tmp_path: Path) -> None:
    strict = CheckConfig(min_coverage=1.0)
    made = run(tmp_path, Stub(lambda request: THIN), check=strict, retries=1, kinds=("identity",))
    assert made.totals["rejected"] == 4 and made.codes == {"coverage": 4}
    nobody = Stub()
    made = run(tmp_path, nobody, retries=1, kinds=("identity",))
    assert not nobody.seen and made.totals["ok"] == 4 and made.totals["judged_again"] == 4
    assert made.totals["tokens_in"] == 4 * 2 * 10  # nothing is counted twice
    again = run(tmp_path, nobody, retries=1, kinds=("identity",))
    assert again.totals["judged_again"] == 0 and again.totals["ok"] == 4


def test_accepted_texts_that_stricter_checks_refuse_are_asked_again(tmp_path: Path) -> None:
    run(tmp_path, Stub(lambda request: THIN), kinds=("identity",))
    better = Stub(lambda request: IDENTITY)
    made = run(tmp_path, better, kinds=("identity",), check=CheckConfig(min_coverage=1.0))
    assert sum(better.seen.values()) == 4 and made.captions["text"].eq(IDENTITY).all()
    assert "build" in better.prompts[0].split("refused")[1]


class Slow(Stub):
    """Answers a request only when it sees it a second time, as an open batch does."""

    deferred = True

    def paid(self):
        return lambda request: (request.image_id, request.kind) in self.seen

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        for request in requests:
            self.seen[request.image_id, request.kind] += 1
            if self.seen[request.image_id, request.kind] > 1:
                text = IDENTITY if request.kind == "identity" else CLOTHING
                yield Reply(request, "ok", text, tokens_in=10, tokens_out=5)


def test_a_deferred_describer_leaves_the_run_pending_and_a_later_run_ends_it(tmp_path: Path) -> None:
    describer = Slow()
    no_wait = {"batch": BatchConfig(enabled=True, wait=False)}
    made = run(tmp_path, describer, **no_wait)
    assert made.stopped == "pending" and made.pending == 8
    assert made.texts == {"identity": {"open": 4}, "clothing": {"open": 4}}
    assert not (tmp_path / "captions.parquet").exists()
    made = run(tmp_path, describer, **no_wait)
    assert made.stopped is None and made.totals["ok"] == 8


def test_replies_that_are_paid_for_are_fetched_even_when_the_budget_is_spent(tmp_path: Path) -> None:
    def paid(limit: float, describer: Slow):
        ledger = Ledger(Penny(), most=(15, 5), max_cost=limit)
        config = CaptionConfig(style=NO_STYLE, batch=BatchConfig(enabled=True, wait=False))
        return caption_images(pictures(4), None, describer, config, tmp_path, ledger=ledger)

    describer = Slow()
    made = paid(1.0, describer)
    assert made.stopped == "pending" and made.pending == 5 and len(describer.seen) == 5
    made = paid(0.1, describer)
    assert made.stopped == "budget" and made.totals["ok"] == 5 and made.totals["not_asked"] == 3
    assert len(describer.seen) == 5


def test_a_request_that_a_describer_forgets_is_a_failed_row(tmp_path: Path) -> None:
    class Forgetful(Stub):
        def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
            yield from list(super().describe(requests))[1:]

    made = run(tmp_path, Forgetful())
    assert made.totals["failed"] == 1 and made.totals["ok"] == 7
    assert made.first_reason == "the describer gave no answer"


def test_another_model_in_the_folder_is_said_before_everything_is_asked_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, Stub())
    other = Stub()
    other.model = "stub-2"
    with caplog.at_level("WARNING", logger="reidctl"):
        run(tmp_path, other)
    assert "8 stored replies belong to other prompts" in caplog.text and len(other.seen) == 8


def human_frame(count: int):
    from sixstyles import captions as write_captions
    from test_caption_run import human

    texts, _ = write_captions(6 * count)
    return human(pictures(count), texts)


@pytest.mark.covers(125)
def test_a_model_can_neutralise_the_train_captions_once(tmp_path: Path) -> None:
    def answer(request: Request):
        if request.kind == "neutral":
            assert request.image_path == ""
            return f"There is somebody here: {request.attributes['caption']}"
        return IDENTITY if request.kind == "identity" else CLOTHING

    images, frame = pictures(40), human_frame(40)
    config = CaptionConfig(style=StyleConfig(neutralise="mllm"))
    stub = Stub(answer)
    clustered: list[str] = []

    def embed(texts: list[str]):
        clustered.extend(texts)
        return hashed(texts)

    made = caption_images(images, frame, stub, config, tmp_path, embed=embed)
    # What the model wrote was clustered, not the captions.
    assert clustered and all(text.startswith("There is person here:") for text in clustered)
    train = set(frame.loc[frame["image_id"].isin(images.loc[images["split"] == "train", "image_id"]), "text"])
    asked = [key for key in stub.seen if key[1] == "neutral"]
    assert len(asked) == len(train) and made.totals["ok"] == 80
    assert set(made.captions["kind"]) == {"identity", "clothing"}
    test_only = set(frame["text"]) - train
    assert test_only and not any(text in prompt for text in test_only for prompt in stub.prompts)
    again = Stub(answer)
    caption_images(images, frame, again, config, tmp_path)
    assert not again.seen
    stored = Index(tmp_path / "parts").load()
    assert len(stored) == len(train) + 80
    stored.close()


def test_captions_that_the_model_fails_on_are_neutralised_by_the_lexicon_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first: list[str] = []

    def answer(request: Request):
        if request.kind == "neutral":
            first.append(request.attributes["caption"])
            return failed(request, "no", own_fault=True) if len(first) > 1 else "There is somebody over here today."
        return IDENTITY if request.kind == "identity" else CLOTHING

    seen: list[str] = []

    def embed(texts: list[str]):
        seen.extend(texts)
        return hashed(texts)

    config = CaptionConfig(style=StyleConfig(neutralise="mllm"))
    with caplog.at_level("WARNING", logger="reidctl"):
        caption_images(pictures(40), human_frame(40), Stub(answer), config, tmp_path, embed=embed)
    assert "neutralised by the lexicon" in caplog.text
    colours = {"red", "blue", "black", "white", "green"}
    assert not any(colours & set(text.lower().replace(",", " ").split()) for text in seen)


def test_a_model_that_neutralises_nothing_stops_the_run_before_the_images(tmp_path: Path) -> None:
    stub = Stub(lambda request: failed(request, "no", own_fault=True))
    config = CaptionConfig(style=StyleConfig(neutralise="mllm"))
    with pytest.raises(RemoteError, match="no usable neutral text"):
        caption_images(pictures(40), human_frame(40), stub, config, tmp_path)
    assert {kind for _, kind in stub.seen} == {"neutral"}


def test_a_budget_spent_on_neutralising_leaves_no_styles_and_no_table(tmp_path: Path) -> None:
    stub = Stub(lambda request: "There is somebody over here today.")
    config = CaptionConfig(style=StyleConfig(neutralise="mllm"))
    ledger = Ledger(Penny(), most=(15, 5), max_cost=1.0)
    made = caption_images(pictures(40), human_frame(40), stub, config, tmp_path, ledger=ledger)
    assert made.stopped == "budget" and not made.styles.size
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]


def test_damaged_images_do_not_look_like_a_service_that_is_down(tmp_path: Path) -> None:
    def answer(request: Request):
        damaged = int(request.image_id[-3:]) < 12
        return failed(request, "the image cannot be read", own_fault=True) if damaged else IDENTITY

    made = run(tmp_path, Stub(answer), count=20, kinds=("identity",), remote=RemoteConfig(max_failures=5))
    assert made.totals["failed"] == 12 and made.totals["ok"] == 8


def test_styles_come_back_after_a_run_without_styles(tmp_path: Path) -> None:
    images, frame = pictures(40), human_frame(40)
    with_styles = caption_images(images, frame, Stub(), CaptionConfig(), tmp_path)
    caption_images(images, frame, Stub(), CaptionConfig(style=NO_STYLE), tmp_path)
    nobody = Stub()
    again = caption_images(images, frame, nobody, CaptionConfig(), tmp_path)
    assert len(again.styles) == len(with_styles.styles) == 6 and not nobody.seen
    assert again.captions.equals(with_styles.captions)


def test_nothing_of_an_earlier_run_changes_before_there_is_something_better(tmp_path: Path) -> None:
    run(tmp_path, Stub())
    before = (tmp_path / "captions.parquet").read_bytes()
    touched: list[str] = []
    dead = Stub(lambda request: failed(request, "down"))
    config = CaptionConfig(style=NO_STYLE, seed=1, remote=RemoteConfig(max_failures=3))
    with pytest.raises(RemoteError):
        caption_images(pictures(4), None, dead, config, tmp_path, before_writing=lambda: touched.append("x"))
    assert not touched and (tmp_path / "captions.parquet").read_bytes() == before


def test_what_another_model_wrote_is_counted_at_its_own_price(tmp_path: Path) -> None:
    class Dear(Penny):
        def cost(self, tokens_in: int, tokens_out: int, *, batch: bool = False) -> float:
            return 100 * super().cost(tokens_in, tokens_out, batch=batch)

    prices = {"dear": Dear(), "cheap": Penny(), "free": None}

    def spend(model: str, limit: float | None = None) -> float:
        stub = Stub()
        stub.model = model
        ledger = Ledger(prices[model], most=(15, 5), max_cost=limit, price_of=prices.get)
        images = pictures(1).assign(sha256=model)
        return caption_images(images, None, stub, CaptionConfig(style=NO_STYLE), tmp_path, ledger=ledger).totals["cost"]

    assert spend("dear") == pytest.approx(30.0)
    assert spend("cheap") == pytest.approx(30.3)
    assert spend("free") == pytest.approx(30.3)
    assert spend("dear") == pytest.approx(30.3)  # nothing new


def test_more_retries_are_used_on_refusals_that_hold_no_text(tmp_path: Path) -> None:
    refusing = Stub(lambda request: rejected(request, "the model refused", tokens_in=10))
    run(tmp_path, refusing, count=1, kinds=("identity",), retries=0)
    better = Stub(lambda request: IDENTITY)
    made = run(tmp_path, better, count=1, kinds=("identity",), retries=1)
    assert made.totals["ok"] == 1 and sum(better.seen.values()) == 1
    assert "the model refused" in better.prompts[0]


def test_refused_texts_of_a_deferred_describer_wait_for_the_next_run(tmp_path: Path) -> None:
    class Full(Slow):
        """One place: takes one request more than it has answered."""

        def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
            self.calls = getattr(self, "calls", 0) + 1
            yield Reply(next(iter(requests)), "ok", "No.", tokens_in=10)

    describer = Full()
    made = run(tmp_path, describer, batch=BatchConfig(enabled=True, wait=False))
    assert describer.calls == 1 and made.stopped == "pending" and made.pending == 8


def test_kinds_are_asked_once_each() -> None:
    for wrong in (("identity", "identity"), ()):
        with pytest.raises(ValueError, match="each once"):
            CaptionConfig(kinds=wrong)


@pytest.mark.parametrize("name", ["api_key", "Authorization", "x-api-key", "password"])
def test_a_secret_among_the_extra_fields_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="environment"):
        RemoteConfig(extra={name: "x"})


def test_what_a_program_sends_as_a_reason_is_one_printable_line() -> None:
    request = Request("a", "a.png", "identity", "s", "p", "d")
    reason = failed(request, "\x1b[2J\x1b]0;owned\x07 bad\nreidctl: fake \ud800 line " + "x" * 900).reason
    assert reason is not None and reason.isprintable() and len(reason) <= 240 and "\x1b" not in reason
    reason.encode()


def test_a_template_cannot_neutralise(tmp_path: Path) -> None:
    stub = Stub()
    stub.name = "template"
    config = CaptionConfig(style=StyleConfig(neutralise="mllm"))
    with pytest.raises(UsageError, match="cannot neutralise"):
        caption_images(pictures(40), human_frame(40), stub, config, tmp_path)


def test_a_failed_second_attempt_is_asked_again_as_the_second(tmp_path: Path) -> None:
    def first(request: Request):
        return "No." if request.attempt == 1 else failed(request, "down")

    run(tmp_path, Stub(first), count=1, kinds=("identity",))
    seen = []

    def later(request: Request):
        seen.append(request.attempt)
        return IDENTITY

    assert run(tmp_path, Stub(later), count=1, kinds=("identity",)).totals["ok"] == 1
    assert seen == [2]
