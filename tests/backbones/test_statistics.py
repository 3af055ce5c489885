import pytest

from reidctl.backbones.statistics import STATISTICS, check_statistics
from reidctl.errors import UsageError

CLIP = STATISTICS["clip"]


def test_the_checkpoints_own_statistics_are_used_and_nothing_is_said():
    odd = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert check_statistics(*odd) == (*odd, None)
    assert check_statistics(*CLIP, "checkpoint") == (*CLIP, None)
    assert check_statistics(list(CLIP[0]), list(CLIP[1]), "clip") == (*CLIP, None)


def test_rounded_statistics_are_the_same_ones_and_keep_their_own_digits():
    rounded = ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))
    assert check_statistics(*rounded, "clip") == (*rounded, None)


@pytest.mark.covers(20)
@pytest.mark.parametrize("wanted", ["half", "imagenet"])
def test_other_statistics_than_the_checkpoints_are_used_with_one_sentence_that_names_both(wanted):
    mean, std, warning = check_statistics(*CLIP, wanted)
    assert (mean, std) == STATISTICS[wanted]
    assert f"`{wanted}` statistics" in warning and "`clip`" in warning
    assert warning.count(". ") == 0 and warning.endswith(".")


@pytest.mark.covers(20)
def test_a_wrong_standard_deviation_alone_is_enough_for_a_warning():
    mean, std, warning = check_statistics((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "half")
    assert (mean, std) == STATISTICS["half"]
    assert "mean 0.5/0.5/0.5, std 0.25/0.25/0.25" in warning and "`other`" in warning


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UsageError, match=r"`image-net`\. Did you mean `imagenet`\?"):
        check_statistics(*CLIP, "image-net")
    with pytest.raises(UsageError, match="Known statistics: checkpoint, clip, imagenet, half"):
        check_statistics(*CLIP, "zzz")
