"""What surfaces are made of: cloth, skin, and how far garments reach."""

from reidctl.synthped import palette
from reidctl.synthped.canvas import Fabric, plain
from reidctl.synthped.figure import Figure


def cloth(figure: Figure, colour: str) -> palette.Colour:
    """The RGB of a clothing colour in the figure's domain."""
    return palette.CLOTH[figure.person.domain][colour]


def skin(figure: Figure) -> Fabric:
    """Bare skin."""
    return plain(palette.SKIN[figure.body.skin], gloss=0.2)


def upper_fabric(figure: Figure, scale: float = 1.0) -> Fabric:
    """The fabric of the upper garment; `scale` shrinks the pattern, for sleeves."""
    outfit = figure.outfit
    period = {"striped": 6.4, "vertically striped": 5.4, "checked": 6.6, "dotted": 5.0}.get(outfit.upper_pattern, 6.0)
    waist = (figure.crotch - figure.shoulder) * 0.5 * figure.u
    first, second = cloth(figure, outfit.upper_colour), cloth(figure, outfit.upper_second)
    return Fabric(first, second, outfit.upper_pattern, period * figure.u * scale, 0.28, waist)


def hem(figure: Figure) -> float:
    """How far down the upper garment reaches, in hundredths of the figure."""
    below = {"coat": 17.0, "dress": 19.0, "shirt": 3.0, "jacket": 1.5, "hoodie": 2.0, "tank top": 0.5}
    return figure.crotch + below.get(figure.outfit.upper_type, 1.0)
