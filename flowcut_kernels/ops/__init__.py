"""The package's operators; each folder holds its API, reference, Triton form, and is named like its C++ file."""

from .._library import load_native as _load_native
from .anchor_stats import anchor_stats
from .anchor_stats_select import anchor_stats_select
from .attention import attention
from .attention_with_stats import attention_with_stats
from .gather_tokens import gather_tokens
from .score_select import score_select

_load_native()  # a failure is remembered for `flowcut_kernels.info`

__all__ = ["anchor_stats", "anchor_stats_select", "attention", "attention_with_stats", "gather_tokens", "score_select"]
