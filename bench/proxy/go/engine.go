package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"
)

// A KV cache in which a thousand streams never meet, so that admission decides on each request and lets each one in.
const (
	kvBlocks      = 131_072 // that requests can use
	blockSize     = 16
	contextTokens = 32_768
)

const (
	promptTokens = 512 // of every request; each is counted as if the prefix cache had nothing of it
	answerTokens = 2   // of an answer that is not streamed
)

const (
	// As vLLM writes it; the text of a token is the time at which it was sent.
	event = `data: {"id":"chatcmpl-8f1c2f0a6c1b4f6b9f0e6a4f5d1c7b3e","object":"chat.completion.chunk","created":1763700000,` +
		`"model":"bench","choices":[{"index":0,"delta":{"content":"%d"},"logprobs":null,"finish_reason":null}]}` + "\n\n"
	usage = `data: {"id":"chatcmpl-8f1c2f0a6c1b4f6b9f0e6a4f5d1c7b3e","object":"chat.completion.chunk","created":1763700000,` +
		`"model":"bench","choices":[],"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}}` + "\n\n"
	done = "data: [DONE]\n\n"
)

var (
	answer = fmt.Sprintf(`{"id":"chatcmpl-8f1c2f0a6c1b4f6b9f0e6a4f5d1c7b3e","object":"chat.completion","created":1763700000,`+
		`"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":"Yes."},"logprobs":null,`+
		`"finish_reason":"stop"}],"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}}`,
		promptTokens, promptTokens+answerTokens, answerTokens)
	models = fmt.Sprintf(`{"object":"list","data":[{"id":"bench","object":"model","max_model_len":%d}]}`, contextTokens)
)

// engine computes nothing and counts what a real one would say of itself.
type engine struct {
	running   atomic.Int64 // streams
	blocks    atomic.Int64 // that they hold
	prompts   atomic.Int64 // tokens, since the start
	generated atomic.Int64 // tokens, since the start

	exposition []piece
}

// serveEngine answers what clients and a sidecar ask of vLLM; exposition is the file of a recorded one.
func serveEngine(address, exposition string) {
	e := &engine{}
	e.exposition = e.live(exposition)
	routes := http.NewServeMux()
	routes.HandleFunc("POST /v1/chat/completions", e.generate)
	routes.HandleFunc("GET /metrics", e.metrics)
	routes.HandleFunc("GET /health", func(http.ResponseWriter, *http.Request) {})
	routes.HandleFunc("GET /version", say(`{"version":"0.32.0"}`))
	routes.HandleFunc("GET /v1/models", say(models))
	fail(http.ListenAndServe(address, routes).Error())
}

func say(document string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("content-type", "application/json")
		io.WriteString(w, document)
	}
}

// generate sends x-chunks events, one every x-interval-us, or one answer.
func (e *engine) generate(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	e.prompts.Add(promptTokens)
	chunks, _ := strconv.Atoi(r.Header.Get("x-chunks"))
	if chunks == 0 {
		e.generated.Add(answerTokens)
		w.Header().Set("content-type", "application/json")
		io.WriteString(w, answer)
		return
	}
	held := int64(promptTokens / blockSize)
	e.running.Add(1)
	e.blocks.Add(held)
	defer func() {
		e.running.Add(-1)
		e.blocks.Add(-held)
	}()
	interval, _ := strconv.Atoi(r.Header.Get("x-interval-us"))
	w.Header().Set("content-type", "text/event-stream; charset=utf-8")
	controller := http.NewResponseController(w)
	start := time.Now()
	for i := range chunks {
		time.Sleep(time.Until(start.Add(time.Duration(i*interval) * time.Microsecond)))
		if (promptTokens+i)%blockSize == 0 {
			held++
			e.blocks.Add(1)
		}
		e.generated.Add(1)
		fmt.Fprintf(w, event, time.Now().UnixNano())
		if controller.Flush() != nil {
			return
		}
	}
	if bytes.Contains(body, []byte(`"include_usage":true`)) {
		fmt.Fprintf(w, usage, promptTokens, promptTokens+chunks, chunks)
		controller.Flush()
	}
	io.WriteString(w, done)
}
