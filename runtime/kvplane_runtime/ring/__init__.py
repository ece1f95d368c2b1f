"""The ring-attention engine: exact attention over N processes, with the KV cache sharded by sequence.

Each process (*rank*) runs the same unmodified transformers model and holds the KV of its share of every sequence's
positions, from prefill through decode. Rank 0 decides everything and sends all ranks the same steps; the others follow.
What is decided (ranges, layout, scheduling, membership) is pure; one module speaks torch.distributed.
"""
