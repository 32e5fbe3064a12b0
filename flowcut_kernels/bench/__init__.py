"""flowcut-bench: what choosing tokens costs and saves on this machine. Needs ``flowcut_kernels[bench]``."""
