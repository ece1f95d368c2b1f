"""What a request and a streamed chunk cost on their way through the sidecar; beside Go's `httputil.ReverseProxy`.

    python -m bench.proxy

Engine, load and peer are one Go program (go/): the engine computes nothing and stamps each chunk when it sends it, the
load keeps a number of streams running and reads the stamps. The sidecar is the process that pods run, and does what it
does in front of a real engine: it reads the request, decides on it, asks for usage, counts the tokens and takes the usage
out again, and polls the engine's health and metrics; Go's proxy passes bytes. What deciding costs is the difference to a
fourth contestant, the sidecar's proxy alone. Each is measured in the same minute as a run without any proxy, and a p99 is
only ever compared with that run's. CPU time is the process's user and system time over the load's window, from /proc.
"""
