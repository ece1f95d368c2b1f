package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

const (
	// As vLLM writes it; the text of a token is the time at which it was sent.
	event = `data: {"id":"chatcmpl-8f1c2f0a6c1b4f6b9f0e6a4f5d1c7b3e","object":"chat.completion.chunk","created":1763700000,` +
		`"model":"bench","choices":[{"index":0,"delta":{"content":"%d"},"logprobs":null,"finish_reason":null}]}` + "\n\n"
	usage = `data: {"id":"chatcmpl-8f1c2f0a6c1b4f6b9f0e6a4f5d1c7b3e","object":"chat.completion.chunk","created":1763700000,` +
		`"model":"bench","choices":[],"usage":{"prompt_tokens":512,"total_tokens":612,"completion_tokens":100}}` + "\n\n"
	done   = "data: [DONE]\n\n"
	answer = `{"id":"chatcmpl-8f1c2f0a6c1b4f6b9f0e6a4f5d1c7b3e","object":"chat.completion","created":1763700000,` +
		`"model":"bench","choices":[{"index":0,"message":{"role":"assistant","content":"Yes."},"logprobs":null,` +
		`"finish_reason":"stop"}],"usage":{"prompt_tokens":512,"total_tokens":514,"completion_tokens":2}}`
)

// serveEngine answers like an engine that computes nothing: x-chunks events, one every x-interval-us, or one answer.
func serveEngine(address string) {
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		chunks, _ := strconv.Atoi(r.Header.Get("x-chunks"))
		if chunks == 0 {
			w.Header().Set("content-type", "application/json")
			io.WriteString(w, answer)
			return
		}
		interval, _ := strconv.Atoi(r.Header.Get("x-interval-us"))
		w.Header().Set("content-type", "text/event-stream; charset=utf-8")
		controller := http.NewResponseController(w)
		start := time.Now()
		for i := range chunks {
			time.Sleep(time.Until(start.Add(time.Duration(i*interval) * time.Microsecond)))
			fmt.Fprintf(w, event, time.Now().UnixNano())
			if controller.Flush() != nil {
				return
			}
		}
		if bytes.Contains(body, []byte(`"include_usage":true`)) {
			io.WriteString(w, usage)
			controller.Flush()
		}
		io.WriteString(w, done)
	}
	fail(http.ListenAndServe(address, http.HandlerFunc(handler)).Error())
}
