"""What a request and a streamed chunk cost on their way through the sidecar's proxy; beside Go's `httputil.ReverseProxy`.

    python -m bench.proxy

Engine, load and peer are one Go program (go/): the engine computes nothing and stamps each chunk when it sends it, the
load keeps a number of streams running and reads the stamps. Our proxy does what it does in front of a real engine: it
reads the request, asks for usage, counts the tokens and takes the usage out again; Go's passes bytes. Each is measured
right after a run without any proxy, and a p99 is only ever compared with that run's. CPU time is the process's user and
system time over the load's window, from /proc.
"""
