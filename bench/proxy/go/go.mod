module kvplane.dev/bench-proxy

go 1.26.0
