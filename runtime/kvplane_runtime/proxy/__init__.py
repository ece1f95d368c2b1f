"""Streaming reverse proxy on raw asyncio protocols, shared by the sidecar and the gateway.

It stands in front of every token an engine streams, so the path of one chunk is: upstream ``data_received`` → framing
scan → client ``write``; no task switch, no copy, no parse of the payload. Heads are parsed by llhttp (httptools) in its
strict mode and written anew, never copied, so that what the upstream reads is what was checked here. Request bodies are
held whole (bounded per request and in total) before anything is sent upstream: admission must see the prompt, a
request must be repeatable on a fresh connection, and a slow upload must not hold an engine connection.

Guarantees: every accepted request leaves through its gate exactly once; every refusal is an OpenAI-style JSON error; a
client that goes away aborts its upstream exchange at once; buffers are bounded in both directions.

Reading order: :mod:`http1` (heads and chunked framing, pure), :mod:`gate` (the seam where requests are let in, refused,
sent again and measured), :mod:`answers` (errors), :mod:`upstream` (connections to one engine), :mod:`server` (clients).
Beside it, for whoever builds a gate: :mod:`openai` (what a request asks for), :mod:`reader` (the same for bodies of any
size), :mod:`sse` (tokens and usage of an answer).
"""
