import pytest

from fastdiff.words import counted


@pytest.mark.parametrize(
    ("n", "noun", "told"),
    [
        (0, ["image"], "0 images"),
        (1, ["image"], "1 image"),
        (5000, ["image"], "5,000 images"),
        (1, ["class", "classes"], "1 class"),
        (2, ["class", "classes"], "2 classes"),
    ],
)
def test_a_number_has_the_noun_that_goes_with_it(n, noun, told):
    assert counted(n, *noun) == told
