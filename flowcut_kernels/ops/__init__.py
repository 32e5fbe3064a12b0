"""The package's operators; each folder holds its API, its reference and its Triton form; the C++ file has its name."""

from .._library import load_native as _load_native
from .anchor_stats import anchor_stats
from .anchor_stats_select import anchor_stats_select
from .attention import attention
from .attention_with_stats import attention_with_stats
from .compact_kv import compact_kv, compact_kv_
from .gather_tokens import gather_tokens
from .score_select import score_select

_load_native()  # a failure is remembered for `flowcut_kernels.info`

__all__ = [
    "anchor_stats",
    "anchor_stats_select",
    "attention",
    "attention_with_stats",
    "compact_kv",
    "compact_kv_",
    "gather_tokens",
    "score_select",
]
