package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
)

// piece is a part of the engine's metrics: text that stands, and the value behind it, where there is one.
type piece struct {
	text  string
	value func() float64
}

var cacheSize = regexp.MustCompile(`\b(num_gpu_blocks|block_size|kv_cache_size_tokens)="[^"]*"`)

// live reads a recorded exposition of vLLM and makes this engine's of it. Gauges and counters that a sidecar decides by
// move; all others, and the histograms, stay as they were recorded, and are there to be read past.
func (e *engine) live(recorded string) []piece {
	text, err := os.ReadFile(recorded)
	if err != nil {
		fail(err.Error())
	}
	nothing := func() float64 { return 0 }
	prompts := func() float64 { return float64(e.prompts.Load()) }
	values := map[string]func() float64{
		"vllm:num_requests_running":           func() float64 { return float64(e.running.Load()) },
		"vllm:num_requests_waiting":           nothing,
		"vllm:num_requests_waiting_by_reason": nothing,
		"vllm:kv_cache_usage_perc":            func() float64 { return float64(e.blocks.Load()) / kvBlocks },
		"vllm:num_preemptions_total":          nothing,
		"vllm:prefix_cache_queries_total":     prompts,
		"vllm:prefix_cache_hits_total":        nothing,
		"vllm:prompt_tokens_total":            prompts,
		"vllm:generation_tokens_total":        func() float64 { return float64(e.generated.Load()) },
	}
	found := map[string]bool{}
	var pieces []piece
	var standing strings.Builder
	for line := range strings.Lines(string(text)) {
		name, _, _ := strings.Cut(line, "{")
		if name == "vllm:cache_config_info" {
			line = cacheSize.ReplaceAllStringFunc(line, sized)
		}
		value, moves := values[name]
		if !moves {
			standing.WriteString(line)
			continue
		}
		found[name] = true
		standing.WriteString(line[:strings.LastIndexByte(line, ' ')+1])
		pieces = append(pieces, piece{standing.String(), value})
		standing.Reset()
	}
	if len(found) != len(values) {
		fail(fmt.Sprintf("%s has %d of the %d series that are to move", recorded, len(found), len(values)))
	}
	return append(pieces, piece{text: standing.String()})
}

// sized is a label of cache_config_info with this engine's size; vLLM counts one block that nobody gets.
func sized(label string) string {
	name, _, _ := strings.Cut(label, "=")
	size := map[string]int{
		"num_gpu_blocks":       kvBlocks + 1,
		"block_size":           blockSize,
		"kv_cache_size_tokens": (kvBlocks + 1) * blockSize,
	}[name]
	return name + "=" + strconv.Quote(strconv.Itoa(size))
}

func (e *engine) metrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("content-type", "text/plain; version=0.0.4; charset=utf-8")
	for _, part := range e.exposition {
		io.WriteString(w, part.text)
		if part.value != nil {
			fmt.Fprintf(w, "%g\n", part.value())
		}
	}
}
