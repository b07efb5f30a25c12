"""From samples to the text that the model sees, by the model's own chat template."""

from tunesmith.data.templates.choose import install_template
from tunesmith.data.templates.render import Renderer, Segment, unroll

__all__ = ["Renderer", "Segment", "install_template", "unroll"]
