package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// spread describes samples in microseconds; percentiles are of the nearest rank.
type spread struct {
	Count  int     `json:"count"`
	Median float64 `json:"median_us"`
	P99    float64 `json:"p99_us"`
	Max    float64 `json:"max_us"`
}

func describe(samples []time.Duration) spread {
	if len(samples) == 0 {
		return spread{}
	}
	slices.Sort(samples)
	at := func(fraction float64) float64 {
		rank := max(0, int(math.Ceil(float64(len(samples))*fraction))-1)
		return float64(samples[rank].Nanoseconds()) / 1e3
	}
	return spread{Count: len(samples), Median: at(0.5), P99: at(0.99), Max: at(1)}
}

// result is the last line of a load; "begin" and "end" before it are the edges of what it covers.
type result struct {
	Seconds   float64 `json:"seconds"`
	Requests  int     `json:"requests"`
	Chunks    int     `json:"chunks"`
	Errors    int     `json:"errors"`
	FirstByte spread  `json:"first_byte"`
	Chunk     spread  `json:"chunk"`
}

func (r result) print() {
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		fail(err.Error())
	}
}

// body is a chat of some 2 KB.
var body = `{"model":"bench","messages":[{"role":"user","content":"` + strings.Repeat("A prompt like others. ", 90) +
	`"}],"max_tokens":100,"temperature":0.7,"stream":%t}`

func client(connections int) *http.Client {
	return &http.Client{Transport: &http.Transport{
		MaxIdleConns: connections, MaxIdleConnsPerHost: connections, DisableCompression: true,
	}}
}

func post(base string, stream bool, chunks, intervalUs int) *http.Request {
	request, err := http.NewRequest("POST", base+"/v1/chat/completions", strings.NewReader(fmt.Sprintf(body, stream)))
	if err != nil {
		fail(err.Error())
	}
	request.Header.Set("content-type", "application/json")
	if stream {
		request.Header.Set("x-chunks", strconv.Itoa(chunks))
		request.Header.Set("x-interval-us", strconv.Itoa(intervalUs))
	}
	return request
}

// samples are one stream's, taken inside the window only.
type samples struct {
	firstBytes, chunks []time.Duration
	requests, errors   int
}

// loadStreams keeps streams running one after another in each of many places, which start evenly over the length of one;
// it measures from when all have started.
func loadStreams(base string, streams, chunks, intervalUs, seconds int) {
	length := time.Duration(chunks*intervalUs) * time.Microsecond
	begin := time.Now().Add(length)
	end := begin.Add(time.Duration(seconds) * time.Second)
	all := make([]samples, streams)
	shared := client(streams)
	var running sync.WaitGroup
	for i := range streams {
		running.Go(func() {
			time.Sleep(length * time.Duration(i) / time.Duration(streams))
			for time.Now().Before(end) {
				all[i].stream(shared, post(base, true, chunks, intervalUs), chunks, begin, end)
			}
		})
	}
	time.Sleep(time.Until(begin))
	fmt.Println(`"begin"`)
	time.Sleep(time.Until(end))
	fmt.Println(`"end"`)
	running.Wait()
	total := result{Seconds: float64(seconds)}
	var firstBytes, waits []time.Duration
	for _, one := range all {
		total.Requests += one.requests
		total.Errors += one.errors
		firstBytes = append(firstBytes, one.firstBytes...)
		waits = append(waits, one.chunks...)
	}
	total.Chunks = len(firstBytes) + len(waits)
	total.FirstByte, total.Chunk = describe(firstBytes), describe(waits)
	total.print()
}

// stream reads one answer: its first event is timed from before the request, the others from when they were sent.
func (s *samples) stream(shared *http.Client, request *http.Request, chunks int, begin, end time.Time) {
	asked := time.Now()
	response, err := shared.Do(request)
	if err != nil {
		s.errors++
		time.Sleep(100 * time.Millisecond)
		return
	}
	defer response.Body.Close()
	got := 0
	lines := bufio.NewReader(response.Body)
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			break
		}
		if bytes.Contains(line, []byte(`"usage"`)) {
			s.errors++ // nobody asked for it
		}
		_, text, found := bytes.Cut(line, []byte(`"content":"`))
		if !found {
			continue
		}
		now := time.Now()
		got++
		if now.Before(begin) || now.After(end) {
			continue
		}
		if got == 1 {
			s.firstBytes = append(s.firstBytes, now.Sub(asked))
			continue
		}
		stamp, _, _ := bytes.Cut(text, []byte(`"`))
		sent, err := strconv.ParseInt(string(stamp), 10, 64)
		if err != nil {
			s.errors++
			continue
		}
		s.chunks = append(s.chunks, time.Duration(now.UnixNano()-sent))
	}
	if got != chunks || response.StatusCode != 200 {
		s.errors++
	}
	if now := time.Now(); now.After(begin) && now.Before(end) {
		s.requests++
	}
}

// loadRequests sends requests that are not streamed, each connection one after another, the first tenth to warm up.
func loadRequests(base string, connections, requests int) {
	shared := client(connections)
	var errors atomic.Int64
	run := func(count int) []time.Duration {
		all := make([][]time.Duration, connections)
		var running sync.WaitGroup
		for i := range connections {
			running.Go(func() {
				for range count / connections {
					asked := time.Now()
					response, err := shared.Do(post(base, false, 0, 0))
					if err != nil {
						errors.Add(1)
						continue
					}
					if _, err = io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != 200 {
						errors.Add(1)
					}
					response.Body.Close()
					all[i] = append(all[i], time.Since(asked))
				}
			})
		}
		running.Wait()
		return slices.Concat(all...)
	}
	run(requests / 10)
	fmt.Println(`"begin"`)
	start := time.Now()
	taken := run(requests)
	seconds := time.Since(start).Seconds()
	fmt.Println(`"end"`)
	result{Seconds: seconds, Requests: len(taken), Errors: int(errors.Load()), FirstByte: describe(taken)}.print()
}
