"""What the loss of a rank costs a client, on a real cluster of four nodes; beside LeaderWorkerSet with the same engine.

    python -m bench.ring_recovery

Both contestants serve the same model from the same image with the same settings, one after the other on the same cluster. A
rank other than 0 is killed (kill -9 of its engine) in the midst of a streamed answer. kvplane leaves the ring to heal itself;
LeaderWorkerSet has RecreateGroupOnPodRestart, its own way for engines that do not survive a member. Then rank 0 of ours.
"""
