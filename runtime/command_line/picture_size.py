"""Sizes of pictures as people write them."""

from __future__ import annotations

from saferedir.engines.errors import RequestError


def picture_size(text: str) -> tuple[int, int]:
    """Height and width in pixels of `512` or `512x768`.

    Raises:
        RequestError: it is neither.
    """
    height, cross, width = text.strip().partition("x")
    try:
        return int(height), int(width if cross else height)
    except ValueError:
        raise RequestError(f"size is {text!r}; expected SIDE or HEIGHTxWIDTH in pixels, such as 512 or 512x768") from None
