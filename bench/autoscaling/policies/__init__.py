"""The peers' scaling laws, each from its own source: repository, file and commit stand in each module.

Every law speaks ``bench.autoscaling.policy.Policy``. Each module has the peer's arithmetic as plain functions, which our
tests check with the numbers of the peer's own tests, and a class that feeds them. Where a peer leaves something open that
decides its result, the choice that favours the peer is taken, and said in its module; targets that depend on the engine
are arguments, which a search sets for each peer.

| module | law |
|---|---|
| ``fixed`` | static N; the clairvoyant minimum |
| ``hpa`` | Kubernetes' HorizontalPodAutoscaler on KV usage and queue length |
| ``keda`` | production-stack's KEDA recipe |
| ``knative`` | Knative's pod autoscaler |
| ``kubeai`` | KubeAI's mean of active requests |
| ``aibrix`` | AIBrix's APA |
| ``kthena`` | kthena's recommendation with windows and panic |
| ``wva`` | llm-d's workload variant autoscaler, both analyzers |
| ``dynamo`` | NVIDIA Dynamo's planner, load-based, for throughput and for latency |
| ``dynamo_sla`` | the same planner for goals, with what it learns of engines and load in ``dynamo_model`` |
"""
