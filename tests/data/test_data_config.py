import pytest

from vlm_jax.data import Data, Text
from vlm_jax.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size is 0: it must be at least 1"),
        ({"channels": 4}, r"channels is 4: it must be 1 \(grey\) or 3 \(RGB\)"),
        ({"crop_min_area": 0.0}, r"crop_min_area is 0.0: it must lie in \(0, 1\]"),
        ({"crop_min_area": 1.5}, r"crop_min_area is 1.5"),
        ({"crop_min_area": float("nan")}, r"crop_min_area is nan"),
    ],
)
def test_invalid_data(fields, message):
    with pytest.raises(UserError, match=message):
        Data(**{"name": "digits", "image_size": 8, **fields})


def test_invalid_text():
    with pytest.raises(UserError, match="context_length is 2: at least 3"):
        Text(context_length=2, vocab_size=300)
