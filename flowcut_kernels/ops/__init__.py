"""The package's operators; each folder holds its API, its reference and its Triton form; the C++ file has its name."""

from .._library import load_native as _load_native
from .._library import load_planner as _load_planner
from .._ops import Relevance, Select, ValueNorm
from .anchor_stats import anchor_stats
from .anchor_stats_select import anchor_stats_select
from .attention import attention
from .attention_with_stats import attention_with_stats
from .compact_kv import compact_kv, compact_kv_
from .compact_kv_paged import PagedPlan, compact_kv_paged, plan_paged
from .gather_tokens import gather_tokens
from .patch_entropy import patch_entropy
from .received_attention import received_attention
from .recycle_tokens import grid_cells, recycle_tokens
from .score_select import score_select

# A failure is remembered for `flowcut_kernels.info`.
_load_native()
_load_planner()

__all__ = [
    "PagedPlan",
    "Relevance",
    "Select",
    "ValueNorm",
    "anchor_stats",
    "anchor_stats_select",
    "attention",
    "attention_with_stats",
    "compact_kv",
    "compact_kv_",
    "compact_kv_paged",
    "gather_tokens",
    "grid_cells",
    "patch_entropy",
    "plan_paged",
    "received_attention",
    "recycle_tokens",
    "score_select",
]
