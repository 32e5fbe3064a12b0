"""Qwen3-VL: deepstack features of several layers, videos spelled frame by frame."""

from zoo.qwen2_vl import family

FAMILY = family("qwen3_vl")
