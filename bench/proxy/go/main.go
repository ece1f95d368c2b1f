// Command bench-proxy is what stands around a proxy under test: the engine behind it, the load before it, and the peer
// beside it, Go's own httputil.ReverseProxy. EXPOSITION is a file with metrics recorded from vLLM.
//
//	bench-proxy engine ADDRESS EXPOSITION
//	bench-proxy reverse-proxy ADDRESS ENGINE-URL
//	bench-proxy streams URL STREAMS CHUNKS INTERVAL-US SECONDS
//	bench-proxy requests URL CONNECTIONS REQUESTS
package main

import (
	"fmt"
	"os"
	"strconv"
)

func main() {
	if len(os.Args) < 3 {
		fail("usage: bench-proxy engine|reverse-proxy|streams|requests ...")
	}
	switch arguments := os.Args[2:]; os.Args[1] {
	case "engine":
		serveEngine(arguments[0], arguments[1])
	case "reverse-proxy":
		serveReverseProxy(arguments[0], arguments[1])
	case "streams":
		loadStreams(arguments[0], number(arguments[1]), number(arguments[2]), number(arguments[3]), number(arguments[4]))
	case "requests":
		loadRequests(arguments[0], number(arguments[1]), number(arguments[2]))
	default:
		fail("there is no command " + os.Args[1])
	}
}

func number(text string) int {
	value, err := strconv.Atoi(text)
	if err != nil || value < 1 {
		fail(text + " is no positive number")
	}
	return value
}

func fail(message string) {
	fmt.Fprintln(os.Stderr, message)
	os.Exit(1)
}
