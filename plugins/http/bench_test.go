//go:build unix

package httpplugin

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// BenchmarkAttempt compares an attempt with a bare net/http loop over each stack. The sink runs in the
// same process, so cpu-us/op holds both sides; floor is
// what the sink and the kernel alone cost.
func BenchmarkAttempt(b *testing.B) {
	payload := bytes.Repeat([]byte("x"), 1024)
	headers := []plugin.Header{
		{Name: "content-type", Value: "application/json"}, {Name: "webhook-id", Value: "evt_0123456789abcdef"},
		{Name: "ce-specversion", Value: "1.0"}, {Name: "ce-id", Value: "order-1"}, {Name: "ce-source", Value: "/shop"},
		{Name: "ce-type", Value: "order.created"}, {Name: "ce-time", Value: "2026-11-21T00:00:00Z"},
		{Name: "webhook-timestamp", Value: "1614265330"},
		{Name: "webhook-signature", Value: "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="},
	}
	for _, stack := range []string{"plain", "tls", "h2"} {
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			w.WriteHeader(http.StatusNoContent)
		}))
		roots := x509.NewCertPool()
		if srv.EnableHTTP2 = stack == "h2"; stack == "plain" {
			srv.Start()
		} else {
			srv.StartTLS()
			roots.AddCert(srv.Certificate())
		}
		b.Cleanup(srv.Close)
		b.Run(stack+"/attempt", func(b *testing.B) {
			p := newPools()
			p.roots = roots
			b.Cleanup(p.closeIdle)
			i, err := newInstance(p, defaults(), plugin.Target{URL: srv.URL + "/hook", UserAgent: "grapnel/test", Egress: loopbackAllowed()})
			if err != nil {
				b.Fatal(err)
			}
			measure(b, func(ctx context.Context) error {
				r := plugin.Request{
					MessageID: "evt_0123456789abcdef", URL: srv.URL + "/hook", Headers: headers, Body: payload, MaxResponseBody: 4096,
					Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
				}
				_, err := i.attempt(ctx, &r)
				return err
			})
		})
		b.Run(stack+"/bare", func(b *testing.B) {
			client := &http.Client{Transport: &http.Transport{
				MaxIdleConnsPerHost: 1024, TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: stack == "h2",
			}}
			b.Cleanup(client.CloseIdleConnections)
			measure(b, func(ctx context.Context) error {
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, srv.URL+"/hook", bytes.NewReader(payload))
				if err != nil {
					return err
				}
				for _, h := range headers {
					req.Header.Set(h.Name, h.Value)
				}
				resp, err := client.Do(req)
				if err != nil {
					return err
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				return resp.Body.Close()
			})
		})
		if stack == "plain" {
			b.Run("plain/floor", func(b *testing.B) { measureFloor(b, srv.Listener.Addr().String(), headers, payload) })
		}
	}
}

// measureFloor writes the same bytes and reads whatever comes back: the sink and the kernel, no client.
func measureFloor(b *testing.B, addr string, headers []plugin.Header, payload []byte) {
	b.Helper()
	request := []byte("POST /hook HTTP/1.1\r\nHost: x\r\nContent-Length: 1024\r\n")
	for _, h := range headers {
		request = appendHeader(request, h.Name, h.Value)
	}
	request = append(append(request, "\r\n"...), payload...)
	conns := sync.Pool{New: func() any {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Error(err)
		}
		return c
	}}
	measure(b, func(context.Context) error {
		c := conns.Get().(net.Conn)
		defer conns.Put(c)
		if _, err := c.Write(request); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 512))
		return err
	})
}

func measure(b *testing.B, one func(context.Context) error) {
	b.Helper()
	b.ReportAllocs()
	b.SetParallelism(16)
	before := cpu(b)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
			if err := one(ctx); err != nil {
				b.Error(err)
			}
			cancel()
		}
	})
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "cpu-us/op")
}

func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
