"""Visual-token pruning for vision-language models, with fused kernels."""
