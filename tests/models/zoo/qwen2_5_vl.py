"""Qwen2.5-VL: windows in most layers of the encoder."""

from zoo.qwen2_vl import family

FAMILY = family("qwen2_5_vl")
