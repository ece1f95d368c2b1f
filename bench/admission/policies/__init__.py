"""The peers' admission policies, each from its own source: repository, file and commit stand in each module.

Every policy speaks ``bench.admission.policy.Policy``: the load generator in front of the real engine and the replay on
the simulated one run the same objects. Where a peer leaves something open that decides its result, the choice that
favours the peer is taken, and said in its module; most of all, a peer that queues without a bound on the waiting time
gets the goal for the time to first token as that bound.

| module | policy | setting that is tuned |
|---|---|---|
| ``unlimited`` | none: vLLM's default | |
| ``vllm_caps`` | ``--max-num-queued-reqs``, ``--max-num-queued-tokens`` | the cap |
| ``kaito`` | queue-depth guard of KAITO's vLLM preset | |
| ``llmd`` | flow control of llm-d's router with its utilization, request, and token detectors | |
| ``reservations`` | prompt x 1.5 (llm-d), prompt + 1024 (LightLLM), prompt + max_tokens (TGI) | |
"""
