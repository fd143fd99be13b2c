"""Every setting of mpformer: one frozen schema; loading, overriding, dumping, hashing, comparing.

The names that other parts use; inside of this package they are imported from their own modules.
"""

from mpformer.config.data import (
    Data,
    DataSet,
    LabelMaps,
    LabelSplit,
    LargeScaleJitter,
    MaskFiles,
    MaskSplit,
    Packed,
    PluginDataSet,
    ShortEdgeJitter,
    ShortestEdge,
    Split,
    TestResize,
)
from mpformer.config.identity import config_hash, diff, dump_yaml, flatten, identity_settings, run_name
from mpformer.config.loading import build_config, inline_dataset, load_config, read_dataset, read_recipe
from mpformer.config.model import Backbone, Decoder, Loss, Model, Pilot, PixelDecoder
from mpformer.config.plugins import Plugin
from mpformer.config.run import (
    Cluster,
    Config,
    Evaluate,
    PolySchedule,
    StepSchedule,
    Tracking,
    Train,
    duration_in_steps,
)

__all__ = [
    "Backbone",
    "Cluster",
    "Config",
    "Data",
    "DataSet",
    "Decoder",
    "Evaluate",
    "LabelMaps",
    "LabelSplit",
    "LargeScaleJitter",
    "Loss",
    "MaskFiles",
    "MaskSplit",
    "Model",
    "Packed",
    "Pilot",
    "PixelDecoder",
    "Plugin",
    "PluginDataSet",
    "PolySchedule",
    "ShortEdgeJitter",
    "ShortestEdge",
    "Split",
    "StepSchedule",
    "TestResize",
    "Tracking",
    "Train",
    "build_config",
    "config_hash",
    "diff",
    "dump_yaml",
    "duration_in_steps",
    "flatten",
    "identity_settings",
    "inline_dataset",
    "load_config",
    "read_dataset",
    "read_recipe",
    "run_name",
]
