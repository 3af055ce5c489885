"""An image file as the data URL that a chat-completions request carries."""

import base64
import io

from reidctl.errors import DataError


def data_url(path: str, side: int) -> str:
    """Return an image as a JPEG data URL, its longest side at most `side` pixels, without its metadata.

    Raises:
        DataError: the file is missing or is not an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be read: {type(error).__name__}") from None
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    # A fresh file: EXIF (place, device, time) of the original is not copied.
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
