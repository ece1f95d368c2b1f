package main

import (
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
)

// buffers spares the peer an allocation for each response.
type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if buffer, ok := b.pool.Get().(*[]byte); ok {
		return *buffer
	}
	return make([]byte, 32*1024)
}

func (b *buffers) Put(buffer []byte) { b.pool.Put(&buffer) }

// serveReverseProxy is the standard library's proxy, told to keep connections and to pass each chunk at once.
func serveReverseProxy(address, engine string) {
	target, err := url.Parse(engine)
	if err != nil {
		fail(err.Error())
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(target) },
		FlushInterval: -1,
		Transport:     &http.Transport{MaxIdleConns: 2048, MaxIdleConnsPerHost: 2048, DisableCompression: true},
		BufferPool:    &buffers{},
	}
	// Without full duplex Go's server closes the request's body when the answer begins, and an answer that comes at once is
	// now and then cut short: the transport has not seen that body's end yet.
	handler := func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			fail(err.Error())
		}
		proxy.ServeHTTP(w, r)
	}
	fail(http.ListenAndServe(address, http.HandlerFunc(handler)).Error())
}
