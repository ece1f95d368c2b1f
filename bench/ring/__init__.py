"""What the ring engine claims, measured here: exactness, memory, prefill, decode, first tokens, and a lost rank.

Everything that is compared alternates on the same pinned processors, and what is claimed is a ratio: a machine that is slow for
a minute is slow for both. Peers are measured in the same run where they run on this machine: the same transformers model
unsharded, and vLLM for CPUs.
"""
