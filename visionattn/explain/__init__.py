"""What a model looks at: attention, routed regions, gates, dynamic kernels, class activation, receptive fields.

>>> from visionattn.explain import record
>>> with record(model) as maps:
...     model(image)
"""

from visionattn.explain.attention import Attention, ChannelMixing, DynamicKernels
from visionattn.explain.class_activation import ClassActivation, grad_cam
from visionattn.explain.distance import AttentionDistance, attention_distances
from visionattn.explain.gates import Gate
from visionattn.explain.pictures import overlay
from visionattn.explain.receptive_field import ReceptiveField, receptive_fields
from visionattn.explain.recording import Recording, record
from visionattn.explain.routing import RoutedRegions, routed_regions

__all__ = [
    "Attention",
    "AttentionDistance",
    "ChannelMixing",
    "ClassActivation",
    "DynamicKernels",
    "Gate",
    "ReceptiveField",
    "Recording",
    "RoutedRegions",
    "attention_distances",
    "grad_cam",
    "overlay",
    "receptive_fields",
    "record",
    "routed_regions",
]
