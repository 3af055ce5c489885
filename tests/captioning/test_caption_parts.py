"""Shards, budgets, other check settings, deferred describers: what a run does when it does not do everything."""

from collections.abc import Generator, Iterable
from pathlib import Path

import pytest
from fakeserver import CLOTHING, IDENTITY
from test_caption_run import NO_STYLE, Stub, pictures, run

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.captioning.budget import Ledger
from reidctl.captioning.config import CaptionConfig, CheckConfig, StyleConfig
from reidctl.captioning.journal import Index
from reidctl.captioning.plan import in_shard, part_name
from reidctl.captioning.run import caption_images
from reidctl.errors import UsageError


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
        ledger = Ledger(Penny(), bound=0.2, max_cost=limit)
        config = CaptionConfig(style=NO_STYLE, max_cost=limit)
        return caption_images(pictures(10), None, stub, config, tmp_path, ledger=ledger)

    poor = Stub()
    made = paid(1.0, poor)
    assert made.stopped == "budget" and made.totals["cost"] <= 1.0
    assert sum(poor.seen.values()) == 6  # 5 x 0.15 + 0.2 <= 1.0 < 6 x 0.15 + 0.2
    assert made.totals["not_asked"] == 14 and made.codes == {"not-asked": 14}
    assert made.captions["status"].value_counts().to_dict() == {"failed": 14, "ok": 6}
    broke = Stub()
    assert paid(1.0, broke).stopped == "budget" and not broke.seen
    rich = Stub()
    made = paid(100.0, rich)
    assert made.stopped is None and sum(rich.seen.values()) == 14
    assert made.totals["cost"] == pytest.approx(20 * 0.15)


def test_requests_in_flight_are_reserved(tmp_path: Path) -> None:
    class Greedy(Stub):
        def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
            held = list(requests)  # as many in flight as it is given
            yield from super().describe(iter(held))

    greedy = Greedy()
    ledger = Ledger(Penny(), bound=0.2, max_cost=1.0)
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
    made = run(tmp_path, describer)
    assert made.stopped == "pending" and made.pending == 8
    assert made.texts == {"identity": {"open": 4}, "clothing": {"open": 4}}
    assert not (tmp_path / "captions.parquet").exists()
    made = run(tmp_path, describer)
    assert made.stopped is None and made.totals["ok"] == 8


def test_replies_that_are_paid_for_are_fetched_even_when_the_budget_is_spent(tmp_path: Path) -> None:
    def paid(limit: float, describer: Slow):
        ledger = Ledger(Penny(), bound=0.2, max_cost=limit)
        return caption_images(pictures(4), None, describer, CaptionConfig(style=NO_STYLE), tmp_path, ledger=ledger)

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
    assert "none of the 8 stored replies" in caplog.text and len(other.seen) == 8


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
            return request.attributes["caption"]
        return IDENTITY if request.kind == "identity" else CLOTHING

    images, frame = pictures(40), human_frame(40)
    config = CaptionConfig(style=StyleConfig(neutralise="mllm"))
    stub = Stub(answer)
    made = caption_images(images, frame, stub, config, tmp_path)
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
