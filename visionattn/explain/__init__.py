"""What a model looks at: attention, routed regions, gates, dynamic kernels, class activation, receptive fields.

>>> from visionattn.explain import record
>>> with record(model) as maps:
...     model(image)
"""

from visionattn.explain.attention import Attention, ChannelMixing, DynamicKernels
from visionattn.explain.gates import Gate
from visionattn.explain.pictures import overlay
from visionattn.explain.recording import Recording, record
from visionattn.explain.routing import RoutedRegions, routed_regions

__all__ = [
    "Attention",
    "ChannelMixing",
    "DynamicKernels",
    "Gate",
    "Recording",
    "RoutedRegions",
    "overlay",
    "record",
    "routed_regions",
]
