package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// rawBound posts n signed bodies to the sink with a bare net/http client: what the machine could do if
// Grapnel cost nothing. It sends one signed request again and again, with the headers that Grapnel sends,
// so that the sink does the same work and the loop does nothing else.
func (b *bench) rawBound(ctx context.Context, n int) (throughput, error) {
	if err := b.sink.reset(); err != nil {
		return throughput{}, err
	}
	body := payload(b.payload, 1, time.Time{})
	header, err := rawHeader(body)
	if err != nil {
		return throughput{}, err
	}
	client := &http.Client{Transport: &http.Transport{
		MaxIdleConns: b.concurrency, MaxIdleConnsPerHost: b.concurrency, DisableCompression: true,
	}}
	defer client.CloseIdleConnections()
	var next, failed atomic.Int64
	m := beginMeasure(map[string][]int{"sink": {b.sink.cmd.Process.Pid}, "self": {selfPid()}})
	var wg sync.WaitGroup
	for range b.concurrency {
		wg.Go(func() {
			for {
				if next.Add(1) > int64(n) || ctx.Err() != nil {
					return
				}
				if err := rawPost(client, b.sink.url("/s/raw"), header, body); err != nil {
					failed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	wall, cpu := m.end()
	if f := failed.Load(); f > 0 {
		return throughput{}, fmt.Errorf("raw loop: %d of %d requests failed", f, n)
	}
	if st, err := b.sink.stats(false); err != nil || st.Arrived != int64(n) {
		return throughput{}, fmt.Errorf("raw loop: %d of %d requests verified: %s, %w", st.Arrived, n, st.FirstBad, err)
	}
	return throughput{
		Name: "raw net/http", Deliveries: n, Seconds: wall.Seconds(), PerSecond: float64(n) / wall.Seconds(), Ratio: 1,
		ClientCPU: perDelivery(cpu["self"], n), SinkCPU: perDelivery(cpu["sink"], n),
	}, nil
}

// rawHeader is what Grapnel sends, signed for body.
func rawHeader(body []byte) (http.Header, error) {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(benchKey, "whsec_"))
	if err != nil {
		return nil, err
	}
	const id = "evt_0123456789abcdefghijklmn"
	ts := strconv.FormatInt(time.Now().Unix(), 10)
	mac := hmac.New(sha256.New, key)
	_, _ = fmt.Fprintf(mac, "%s.%s.", id, ts)
	mac.Write(body)
	return http.Header{
		"Content-Type":      {"application/json"},
		"Webhook-Id":        {id},
		"Webhook-Timestamp": {ts},
		"Webhook-Signature": {"v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))},
		"Ce-Specversion":    {"1.0"}, "Ce-Id": {"bench-1"}, "Ce-Type": {"bench.event"}, "Ce-Source": {"//grapnel/bench"},
		"Ce-Time":     {"2026-01-01T00:00:00Z"},
		"Traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
		"User-Agent":  {"grapnel-bench"},
	}, nil
}

func rawPost(client *http.Client, url string, header http.Header, body []byte) error {
	req, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header = header
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	return nil
}
