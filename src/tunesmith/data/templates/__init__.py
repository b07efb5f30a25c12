"""From samples to the text that the model sees, by the model's own chat template."""

from tunesmith.data.templates.choose import install_template
from tunesmith.data.templates.from_recipe import build_renderer
from tunesmith.data.templates.render import Renderer, RenderOptions, Segment, unroll

__all__ = [
    "RenderOptions",
    "Renderer",
    "Segment",
    "build_renderer",
    "install_template",
    "unroll",
]
