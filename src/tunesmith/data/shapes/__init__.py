"""The row shapes that people have, each read into a canonical sample."""

from tunesmith.data.shapes.fields import MistakeError
from tunesmith.data.shapes.known import SHAPES, Shape, shape_of

__all__ = ["SHAPES", "MistakeError", "Shape", "shape_of"]
